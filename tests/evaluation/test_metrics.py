"""Metrics, their intervals, and thresholds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.metrics import METRICS, _Weighted, best_threshold, classification, with_intervals


def test_values_by_hand():
    y_B, score_B = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    values = classification(y_B, score_B, score_B >= 0.35)
    assert values["auroc"] == pytest.approx(0.75)  # three of the four pairs are in order
    assert values["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert values["accuracy"] == pytest.approx(0.75)
    assert values["f1"] == pytest.approx(0.8)
    assert values["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))


def test_one_class_is_an_error_not_a_nan():
    with pytest.raises(LsemvaeError, match="both classes"):
        classification(np.ones(5), np.arange(5), np.ones(5))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=2, max_size=40))
def test_no_other_threshold_has_a_larger_youden_index(pairs):
    y_B = np.array([label for label, _ in pairs])
    score_B = np.array([score / 10 for _, score in pairs])
    if len(np.unique(y_B)) < 2:
        return
    youden = lambda t: (score_B >= t)[y_B].mean() + (score_B < t)[~y_B].mean() - 1  # noqa: E731
    assert youden(best_threshold(y_B, score_B)) == pytest.approx(max(youden(t) for t in [*score_B]))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Two normal distributions a distance of 1 apart have AUROC Phi(1 / sqrt(2)).
    truth, covered, trials = 0.7602, 0, 40
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        y_B = rng.random(150) < 0.4
        score_B = rng.normal(size=150) + y_B
        estimate = with_intervals(y_B, score_B, score_B > 0.5, np.arange(150), draws=60, seed=seed)["auroc"]
        assert estimate.low <= estimate.value <= estimate.high
        covered += estimate.low <= truth <= estimate.high
    assert 0.8 <= covered / trials <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
def test_a_resampling_is_measured_as_scikit_learn_measures_the_repeated_recordings(rows):
    y_B, score_B, decision_B, times_B = (np.array(column) for column in zip(*rows, strict=True))
    repeated = np.repeat(np.arange(len(rows)), times_B)
    if len(np.unique(y_B[repeated])) == 2:
        found = _Weighted(y_B, score_B / 10, decision_B)(times_B)
        assert found == pytest.approx(classification(y_B[repeated], score_B[repeated] / 10, decision_B[repeated]))


def test_subjects_are_drawn_not_recordings():
    rng = np.random.default_rng(0)
    y_S = rng.random(40) < 0.5
    score_S = rng.normal(size=40) + y_S
    score_R, y_R = np.repeat(score_S, 20), np.repeat(y_S, 20)
    once = with_intervals(y_S, score_S, score_S > 0.5, np.arange(40), draws=200)
    often = with_intervals(y_R, score_R, score_R > 0.5, np.repeat(np.arange(40), 20), draws=200)
    for metric in METRICS:
        assert often[metric].value == pytest.approx(once[metric].value)
        # Twenty copies of each recording add no information, so the interval must not shrink.
        assert often[metric].high - often[metric].low == pytest.approx(once[metric].high - once[metric].low, rel=0.05)
