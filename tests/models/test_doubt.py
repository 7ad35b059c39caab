"""Measures of doubt: their definition, and recordings unlike those of the training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.unlike import UNLIKE, classifier, ecgs

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Doubt, Score, Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import doubt
from lsemvae.models.parts.head import Head


def test_the_distance_is_the_mean_over_the_observed_features():
    z_BF = torch.tensor([[0.0, 1.0, -3.0, 1000.0], [0.0, 1.0, 0.0, 3.0]])
    assert doubt.distance(z_BF).tolist() == [8.75, 2.5]
    observed_BF = torch.tensor([[True] * 4, [True, True, False, True]])
    assert doubt.distance(z_BF, observed_BF).tolist() == pytest.approx([8.75, 10 / 3])
    assert doubt.distance(z_BF[:1] * 0, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0.0]
    few = torch.zeros(1, 100)
    few[0, 0] = 1e30  # one feature does not decide
    assert doubt.distance(few).item() < doubt.distance(torch.ones(1, 100)).item()


def test_the_disagreement_is_the_deviation_of_the_logits():
    logit_SB = torch.tensor([[0.0, 2.0], [1.0, 2.0], [-1.0, 2.0]])
    torch.testing.assert_close(doubt.disagreement(logit_SB), torch.tensor([math.sqrt(2 / 3), 0.0]))


def test_standardised_features_are_what_the_layers_see():
    torch.manual_seed(0)
    head, h_BF = Head(4, hidden=3).eval(), torch.randn(9, 4) * 3 + 1
    head.standardise_from(h_BF)
    z_BF = head.standardised(h_BF)
    torch.testing.assert_close(z_BF.mean(dim=0), torch.zeros(4), atol=1e-6, rtol=0)
    assert torch.equal(head.logit_of(z_BF), head.logit(h_BF))


@pytest.fixture(scope="module", params=[("pooled", 1), ("means", 4)], ids=["pooled", "shifted"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """A classifier trained on simulated recordings. It carries the distance, which a tenth of others exceeds."""
    folder: Path = tmp_path_factory.mktemp("doubt") / "b"
    model, preprocess = classifier(*request.param)
    saved = {"task": "ph", "threshold": 0.5}
    bundles.save(Bundle.of(model, preprocess, doubt=Doubt("distance", 0.0), **saved), model, folder)
    doubts = [answer.doubt for answer in Scorer(folder).score(ecgs(30, seed=7))]
    limit = float(np.quantile(doubts, 0.9))
    bundles.save(Bundle.of(model, preprocess, doubt=Doubt("distance", limit), **saved), model, folder)
    return Scorer(folder)


def auroc(inside: list[float], outside: list[float]) -> float:
    return float(np.mean([[one > other for other in inside] for one in outside]))


@pytest.mark.parametrize("what", UNLIKE)
def test_recordings_unlike_those_of_the_training_are_more_doubtful(what: str, scorer: Scorer):
    like, unlike = ecgs(20, seed=8), [UNLIKE[what](record) for record in ecgs(20, seed=9)]
    inside, outside = (scorer.score(records) for records in (like, unlike))
    assert auroc([a.doubt for a in inside], [a.doubt for a in outside]) > 0.8
    marked, others = ([scorer.why_doubtful(answer) for answer in of] for of in (outside, inside))
    assert sum(map(bool, marked)) > 2 * sum(map(bool, others))
    if scorer.bundle.config.get("features") == "pooled" or what != "inverted":
        assert all(marked)  # features that depend on where the beats fall vary too much to tell inverted leads so well
    reason = "Unlike the recordings that the model was trained on: of those, 10 % were as unusual."
    assert set(marked) - {None} == {reason}


def test_a_doubt_is_the_same_alone_and_in_a_batch_and_none_without_a_score(scorer: Scorer):
    given = ecgs(5, seed=3)
    together = scorer.score(given)
    alone = [scorer.score([record])[0] for record in given]
    np.testing.assert_allclose([a.doubt for a in alone], [a.doubt for a in together], atol=1e-5)
    (refused,) = scorer.score_signals([np.full((6, 1000), np.nan, dtype=np.float32)], [100])
    assert (refused.score, refused.doubt, scorer.why_doubtful(refused)) == (None, None, None)


def test_a_reason_names_its_measure_and_wrong_settings_are_refused():
    assert Doubt("distance", 2.0).reason(2.0) is None
    reason = Doubt("disagreement", 2.0).reason(2.1)
    assert (
        reason == "The score depends on where in the recording the beats fall, as in 10 % of the training recordings."
    )
    with pytest.raises(LsemvaeError, match="'depth': this version knows distance, disagreement"):
        Doubt("depth", 1.0)
    for limit in (math.nan, math.inf, -1.0, "much"):
        with pytest.raises(LsemvaeError, match="limit of the doubt is"):
            Doubt("distance", limit)
    assert Score(0.5, True, ()).doubt is None
