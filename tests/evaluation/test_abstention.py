"""Setting the most doubtful tenth aside: the measure, what a bundle then carries, and what readers are told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from support import scored
from support.bundles import CALIBRATION

from lsemvae.bundle import Bundle
from lsemvae.evaluation import abstention
from lsemvae.evaluation.compare import Comparison, Scores, compare
from lsemvae.evaluation.tables import abstention_table, all_as_markdown
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.reports.model_card import model_card
from lsemvae.storage import Storage

METHODS = {name: scored.METHODS[name] for name in ("LS-EMVAE", "ST-MEM")}
RECORDINGS = 300


def doubts_of(scores: Scores, method: str, kind: str, informative: float, seed: int = 5) -> pd.DataFrame:
    """Doubts of the main table on 12 leads: noise, and how far a score is from its label, as far as informative."""
    rng = np.random.default_rng(seed)
    main = scores.scores[(scores.scores.analysis == "main") & (scores.scores.method == method)]
    label_B = scores.people.set_index("record_id").label[main.record_id].to_numpy()
    error_B = np.abs(main.score.to_numpy() - label_B)
    value_B = np.exp(informative * error_B + rng.normal(0, 0.3, len(main)))
    columns = {"leads": "12L", "method": method, "seed": main.seed, "record_id": main.record_id}
    return pd.DataFrame({**columns, "doubt": kind, "value": value_B})


@pytest.fixture(scope="module")
def scores() -> Scores:
    """LS-EMVAE has an informative and a random measure, ST-MEM a random one."""
    of = scored.people(RECORDINGS)
    failed = pd.DataFrame(columns=["analysis", "setting", "leads", "method", "seed", "fold", "reason"])
    plain = Scores({**scored.FACTS, "task": "ph"}, of, scored.lines(of, METHODS), failed)
    parts = [
        doubts_of(plain, "LS-EMVAE", "distance", 2.0),
        doubts_of(plain, "LS-EMVAE", "disagreement", 0.0),
        doubts_of(plain, "ST-MEM", "distance", 0.0),
    ]
    return replace(plain, doubts=pd.concat(parts, ignore_index=True))


@pytest.fixture(scope="module")
def compared(scores: Scores) -> Comparison:
    return compare(scores, draws=100)


# --- the measure ----------------------------------------------------------------------------------------------


def test_recordings_of_equal_doubt_keep_the_same_part():
    kept_DB = abstention.kept(np.ones((1, 4)), np.array([1.0, 3.0, 2.0, 3.0]), 0.25)
    assert kept_DB.tolist() == [[1.0, 0.5, 1.0, 0.5]]
    times_DB = np.array([[0.0, 2.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(abstention.kept(times_DB, np.arange(4.0), 0.25), [[0, 2, 1, 0], [3, 0, 0, 0]])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_weights_are_as_repeated_recordings(seed: int):
    """Ten times each, so that a tenth is a whole number of repetitions: dropped one by one from the most doubtful."""
    rng = np.random.default_rng(seed)
    doubt_B, times_B = rng.permutation(8.0 + np.arange(12)), rng.integers(0, 4, 12)
    repeated = np.repeat(np.arange(12), 10 * times_B)
    remaining = repeated[np.argsort(doubt_B[repeated], kind="stable")][: round(0.9 * len(repeated))]
    expected_B = np.bincount(remaining, minlength=12) / 10
    np.testing.assert_allclose(abstention.kept(times_B[None], doubt_B)[0], expected_B, atol=1e-9)


def test_aurocs_are_those_of_all_and_of_the_least_doubtful():
    rng = np.random.default_rng(0)
    y_B, doubt_2B = rng.integers(0, 2, 100), rng.permuted(np.tile(np.arange(100.0), (2, 1)), axis=1)
    score_2B = rng.random((2, 100)) + 0.5 * y_B
    found = abstention.set_aside(y_B, score_2B, doubt_2B, np.arange(100), draws=20)
    rest = [roc_auc_score(y_B[d < 90], s[d < 90]) for s, d in zip(score_2B, doubt_2B, strict=True)]
    every = [roc_auc_score(y_B, s) for s in score_2B]
    assert (found.every.value, found.rest.value) == pytest.approx((np.mean(every), np.mean(rest)))
    assert found.gain.value == pytest.approx(found.rest.value - found.every.value)


def test_an_equal_doubt_gains_nothing_and_one_class_has_no_interval():
    y_B, score_B = np.arange(40) % 2, np.random.default_rng(0).random(40)
    found = abstention.set_aside(y_B, score_B, np.zeros(40), np.arange(40), draws=30)
    assert np.abs([found.gain.value, found.gain.low, found.gain.high]).max() < 1e-12
    rare_B = (np.arange(40) == 0).astype(int)  # the most doubtful is the only positive
    found = abstention.set_aside(rare_B, score_B, -np.arange(40.0), np.arange(40), draws=30)
    assert np.isfinite(found.every.value) and np.isnan([found.gain.value, found.gain.low]).all()


# --- what is carried ------------------------------------------------------------------------------------------


def test_an_informative_measure_is_carried_with_the_limit_of_its_tenth(scores: Scores, compared: Comparison):
    lines = compared.set_aside("LS-EMVAE", "12L")
    assert lines["doubt"].tolist() == ["distance", "disagreement"] and set(lines["recordings"]) == {RECORDINGS}
    good, random = lines.iloc[0], lines.iloc[1]
    assert good.gain_low > 0 and good.rest - good["all"] == pytest.approx(good.gain) and random.gain < good.gain
    doubt = abstention.carried(lines, scores.doubts_of("LS-EMVAE", "12L"))
    assert (doubt.kind, doubt.measured["gain"], doubt.measured["gain_low"]) == ("distance", good.gain, good.gain_low)
    of = scores.doubts[(scores.doubts.method == "LS-EMVAE") & (scores.doubts.doubt == "distance")]
    first_B = of[of.seed == 0].value
    assert (first_B > doubt.limit).mean() == pytest.approx(0.1, abs=1 / RECORDINGS)
    says = abstention.verdict(lines)
    assert says.startswith("the model carries the measure distance") and f"gain {good.gain:+.3f} [" in says
    assert "disagreement: AUROC" in says and "favours it a little" in says


def test_a_random_measure_is_not_carried_and_the_figures_are_said(scores: Scores, compared: Comparison):
    lines = compared.set_aside("ST-MEM", "12L")
    assert abstention.helpful(lines) is None
    assert abstention.carried(lines, scores.doubts_of("ST-MEM", "12L")) is None
    says = abstention.verdict(lines)
    assert "no measure of doubt is shown to help" in says and f"{lines.iloc[0]['all']:.3f} of all" in says
    assert "favours" not in says  # there was nothing to choose from
    rng, y_B = np.random.default_rng(1), np.arange(200) % 2
    times = 0
    for seed in range(10):  # expected: one in forty
        score_B, doubt_B = rng.random(200) + 0.7 * y_B, rng.random(200)
        found = abstention.set_aside(y_B, score_B, doubt_B, np.arange(200), draws=100, seed=seed)
        times += found.gain.low > 0
    assert times <= 1


def test_without_doubts_nothing_was_measured(scores: Scores):
    """As in files of before, and where one of two seeds has none."""
    without = compare(replace(scores, doubts=scores.doubts[:0]), draws=5)
    assert without.abstention.empty and abstention.verdict(without.set_aside("LS-EMVAE", "12L")) == "not measured"
    assert abstention.carried(without.set_aside("LS-EMVAE", "12L"), {}) is None
    partly = replace(scores, doubts=scores.doubts[scores.doubts.seed == 0])
    assert compare(partly, draws=5).abstention.empty


# --- files, tables and card -----------------------------------------------------------------------------------


def test_doubts_are_written_and_read_and_files_of_before_have_none(
    scores: Scores, compared: Comparison, tmp_path: Path
):
    place = Storage.open(tmp_path)
    scores.write(place)
    compared.write(place)
    pd.testing.assert_frame_equal(Scores.read(place).doubts, scores.doubts)
    again = Comparison.read(place)
    pd.testing.assert_frame_equal(again.abstention, compared.abstention, check_dtype=False)
    (tmp_path / "doubts.parquet").unlink()
    (tmp_path / "abstention.csv").unlink()
    assert Scores.read(place).doubts.empty and Comparison.read(place).abstention.empty


def test_the_tables_and_the_card_say_what_was_measured(scores: Scores, compared: Comparison):
    table = abstention_table(compared, "LS-EMVAE")
    assert [row[1] for row in table.rows] == ["distance", "disagreement"] and [r[5] for r in table.rows] == [
        "yes",
        "no",
    ]
    assert table.caption in all_as_markdown(compared)
    says = abstention.verdict(compared.set_aside("LS-EMVAE", "12L"))
    bundle = Bundle("classifier", {}, LEADS, PreprocessConfig(), task="ph", threshold=0.4, calibration=CALIBRATION)
    assert f"Abstention: {says}" in model_card(scores, compared, bundle, leads="12L", abstention=says)
