"""The model card: it has the figures, what they are of, and what the model is not for."""

from dataclasses import replace

import pytest
from support import scored
from support.bundles import CALIBRATION

from lsemvae.bundle import Bundle
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.compare import Comparison, Scores, compare
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.reports.model_card import LIMITS, MAX_BYTES, NOT_FOR, TRIPOD_AI, model_card

BUNDLE = Bundle("classifier", {}, LEADS, PreprocessConfig(), task="ph", threshold=0.4321, calibration=CALIBRATION)


@pytest.fixture(scope="module")
def scores() -> Scores:
    whole = scored.scores(150, data="s3://user:secret@bucket/x", cohort="<img src=x>|a", refused=3)
    return replace(whole, scores=whole.scores[whole.scores.analysis == "main"])


@pytest.fixture(scope="module")
def comparison(scores: Scores) -> Comparison:
    return compare(scores, draws=10)


def test_the_card_has_every_part(scores: Scores, comparison: Comparison):
    card = model_card(scores, comparison, BUNDLE, leads="12L", data_licence="CC BY 4.0")
    assert card.startswith("# Model card: ph, 12L, LS-EMVAE\n")
    found = comparison.line("LS-EMVAE", "12L")
    assert all(f"| {of} |" in card for of in found.values() if of.low == of.low)
    for text in (
        "recordings: 150", "subjects: 120", "preprocess digest: fedcba9876543210", "folds: 5 folds by subject",
        "Threshold: 0.4321", "2.500 logit(score) -0.750", "Abstention: not measured", "licence of the data: CC BY 4.0",
        "| women | ", "fewer than 20 recordings", "not a medical device", "Leads: I, II, III",
    ):  # fmt: skip
        assert text in card
    assert all(text in card for text in (*NOT_FOR, *LIMITS))
    assert len(card.encode()) < MAX_BYTES
    assert "secret" not in card and "<img" not in card and "&lt;img src=x>\\|a" in card
    assert "| ST-MEM | " in card.split("Differences from other methods")[1]


def test_each_item_of_tripod_ai_is_there_once(scores: Scores, comparison: Comparison):
    assert [item for item, _, _ in TRIPOD_AI] == [str(number) for number in range(1, 28)]
    assert {state for _, state, _ in TRIPOD_AI} == {"answered", "in part", "not answered"}
    card = model_card(scores, comparison, BUNDLE, leads="6L")
    assert "- 10 not answered: sample size" in card and "licence of the data: not stated" in card


def test_a_method_without_results_or_that_is_not_the_reference_says_so(scores: Scores, comparison: Comparison):
    plain = replace(BUNDLE, calibration=None, threshold=None)
    card = model_card(scores, comparison, plain, leads="12L", method="MVAE", abstention="helps: 0.80 to 0.85")
    assert "None: MVAE has no complete training on 12L." in card and "Not measured." in card
    assert "Threshold: none" in card and "Calibration: none" in card and "Abstention: helps: 0.80 to 0.85" in card
    assert "Differences were measured for LS-EMVAE" in card


def test_a_card_that_is_too_large_is_refused(scores: Scores, comparison: Comparison):
    with pytest.raises(LsemvaeError, match="shorten the facts"):
        model_card(replace(scores, facts={"policy": "x" * MAX_BYTES}), comparison, BUNDLE, leads="12L")
