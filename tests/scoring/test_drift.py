"""The drift of a model's scores: bins, the index, and that Prometheus' rules compute the same."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.bundles import save
from support.session import ROOT

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError
from lsemvae.scoring.drift import DRIFT, LEAST_SCORES, SCORE_BINS, ScoreBins, drift_of, stability_index

RULES = yaml.safe_load((ROOT / "infra" / "prometheus" / "alerts.yaml").read_text())["groups"]
RECORDED = {rule["record"]: rule["expr"] for group in RULES for rule in group["rules"] if "record" in rule}


def beta_scores(count: int, seed: int, positive: float = 0.3) -> np.ndarray:
    """Scores of a cohort with this share of positives."""
    rng = np.random.default_rng(seed)
    is_positive = rng.random(count) < positive
    return np.where(is_positive, rng.beta(5, 3, count), rng.beta(2, 6, count))


def test_the_bins_hold_about_equally_many_and_none_is_empty():
    score_B = beta_scores(600, 0)
    bins = ScoreBins.of(score_B)
    assert bins is not None and len(bins.shares) == 10 and bins.recordings == 600
    assert np.allclose(bins.shares, 0.1, atol=0.005)
    assert bins.counts(score_B) == [round(600 * share) for share in bins.shares]
    assert ScoreBins.read({SCORE_BINS: bins.as_json()}) == bins


def test_few_or_equal_scores_have_no_bins_and_ties_leave_no_bin_empty():
    assert ScoreBins.of(beta_scores(59, 0)) is None
    assert ScoreBins.of(np.full(500, 0.5)) is None
    tied = ScoreBins.of(np.repeat([0.1, 0.4, 0.9], [400, 50, 50]))
    assert tied is not None and tied.edges == (0.4, 0.9) and tied.shares == (0.8, 0.1, 0.1)
    assert ScoreBins.read({}) is None
    for wrong in ({"edges": [0.5]}, {"edges": [0.5, 0.2], "shares": [0.2, 0.3, 0.5], "recordings": 9}, 3):
        with pytest.raises(LsemvaeError, match=SCORE_BINS):
            ScoreBins.read({SCORE_BINS: wrong})


def test_the_index_of_the_worked_example():
    assert stability_index([30, 10], [0.5, 0.5]) == pytest.approx(0.26, abs=0.005)
    assert stability_index([500, 500], [0.5, 0.5]) == 0
    assert np.isfinite(stability_index([100, 0], [0.5, 0.5]))


@pytest.mark.parametrize("trained", [60, 120, 300, 1000])
def test_without_drift_the_least_number_of_scores_rarely_exceeds_the_limit(trained: int):
    """The limit, the least number of scores and the size of the bins belong together."""
    found = []
    for seed in range(400):
        bins = ScoreBins.of(beta_scores(trained, 2 * seed))
        assert bins is not None
        found.append(stability_index(bins.counts(beta_scores(LEAST_SCORES, 2 * seed + 1)), bins.shares))
    assert np.mean(np.array(found) >= DRIFT) <= 0.01


@pytest.mark.parametrize("trained", [60, 120, 300, 1000])
def test_another_prevalence_is_drift(trained: int):
    bins = ScoreBins.of(beta_scores(trained, 0))
    assert bins is not None
    assert stability_index(bins.counts(beta_scores(400, 1, positive=0.8)), bins.shares) > DRIFT


def test_prometheus_computes_the_same_index():
    """Each operator of these two expressions means the same in PromQL and in Python."""
    count, expected = np.array([120.0, 0, 45, 60]), np.array([0.3, 0.2, 0.25, 0.25])
    share = arithmetic(RECORDED["lsemvae:score_bins:share7d"], {"lsemvae:score_bins:count7d": count})
    index = arithmetic(
        RECORDED["lsemvae:score_psi:7d"],
        {"lsemvae:score_bins:share7d": share, "lsemvae:score_bins:expected": expected},
    )
    assert float(index) == pytest.approx(stability_index(count, expected))
    (alert,) = [rule for group in RULES for rule in group["rules"] if rule.get("alert") == "LsemvaeScoreDrift"]
    assert [float(limit) for limit in re.findall(r">= ([\d.]+)", alert["expr"])] == [DRIFT, LEAST_SCORES]


def arithmetic(expression: str, values: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a PromQL expression over the bins of one version, without its matching of labels."""
    for number, name in enumerate(values):
        expression = expression.replace(name, f"v{number}")
    expression = re.sub(r"(on|by) \([\w, ]*\)|group_left \(\)", "", expression)
    assert re.fullmatch(r"[\w.()+\-*/ \n]+", expression) and not re.search(r"[a-z]{4,}", expression), expression
    names = {f"v{number}": value for number, value in enumerate(values.values())}
    return eval(f"({expression})", {"__builtins__": {}, "sum": np.sum, "ln": np.log}, names)


def test_a_cohort_is_judged_only_with_enough_scores():
    bins = ScoreBins.of(beta_scores(300, 0))
    few, many = drift_of(beta_scores(50, 1), bins), drift_of(beta_scores(300, 1), bins)
    assert few is not None and many is not None
    assert not few["judged"] and many["judged"] and many["index"] < DRIFT and sum(many["counts"]) == 300
    assert drift_of(beta_scores(50, 1), None) is None


def test_a_bundle_carries_the_bins_and_others_keep_their_digest(tmp_path: Path):
    bins = ScoreBins.of(beta_scores(300, 0))
    assert bins is not None
    without, again = save(tmp_path / "a"), save(tmp_path / "b")
    carried = save(tmp_path / "c", **{SCORE_BINS: bins.as_json()})
    assert without.digest == again.digest != carried.digest
    assert ScoreBins.read(describe(tmp_path / "c").provenance) == bins
    assert ScoreBins.read(describe(tmp_path / "a").provenance) is None
