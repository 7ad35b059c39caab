"""Metrics, their intervals, thresholds, and tests of differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lsemvae.bundle import logit
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.metrics import (
    ALL_METRICS,
    METRICS,
    Weighted,
    auroc_difference,
    best_threshold,
    calibration_slope,
    classification,
    resampled,
    resamplings,
    with_intervals,
)
from lsemvae.evaluation.significance import delong, holm, placements


def test_values_by_hand():
    y_B, score_B = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    values = classification(y_B, score_B, score_B >= 0.35)
    assert values["auroc"] == pytest.approx(0.75)  # three of the four pairs are in order
    assert values["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert values["accuracy"] == pytest.approx(0.75)
    assert values["f1"] == pytest.approx(0.8)
    assert values["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))


def test_operating_points_by_hand():
    # Ten negatives, of which one may be a false positive at a specificity of 0.9; five positives, of which four are
    # needed for a sensitivity of 0.8.
    score_B = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.62, 0.8, 0.9, 0.85, 0.7, 0.61, 0.22])
    y_B = np.repeat([0, 1], [10, 5])
    values = classification(y_B, score_B, score_B >= 0.5)
    assert values["sensitivity_at_90_specificity"] == pytest.approx(3 / 5)  # 0.9, 0.85, 0.7; at 0.62 there are two
    assert values["ppv_at_80_sensitivity"] == pytest.approx(4 / 6)  # at 0.61: and 0.8 and 0.62 of the negatives
    assert values["npv_at_80_sensitivity"] == pytest.approx(8 / 9)
    assert values["brier"] == pytest.approx(np.mean((score_B - y_B) ** 2))
    constant = classification(y_B, np.full(15, 1 / 3), np.zeros(15))
    assert constant["sensitivity_at_90_specificity"] == 0 and constant["ppv_at_80_sensitivity"] == pytest.approx(1 / 3)
    assert np.isnan(constant["npv_at_80_sensitivity"])  # nobody is below the threshold
    assert np.isnan(constant["calibration_slope"])
    assert constant["calibration_intercept"] == pytest.approx(0, abs=1e-9)


def test_calibration_has_the_closed_form_of_two_groups():
    """With two scores the model is saturated: its line goes through the logits of both observed shares."""
    score_B = np.repeat([0.2, 0.7], [50, 40])
    y_B = np.concatenate([np.arange(50) < 5, np.arange(40) < 30])  # shares of 0.1 and 0.75
    values = classification(y_B, score_B, score_B >= 0.5)
    assert values["calibration_slope"] == pytest.approx((logit(0.75) - logit(0.1)) / (logit(0.7) - logit(0.2)))
    # The intercept alone: with one score, the logit of the share minus the logit of the score.
    alone = classification(y_B[:50], np.full(50, 0.2), np.zeros(50), ["calibration_intercept"])
    assert alone["calibration_intercept"] == pytest.approx(logit(0.1) - logit(0.2))
    a = values["calibration_intercept"]  # makes expected and observed positives equal
    assert (1 / (1 + np.exp(-(a + logit(score_B))))).sum() == pytest.approx(35)


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0, 40.0])
def test_the_slope_is_that_of_an_unpenalised_regression(spread: float):
    rng = np.random.default_rng(int(spread * 100))
    y_B = rng.random(200) < 0.2
    score_B = 1 / (1 + np.exp(-spread * (rng.normal(size=200) + y_B)))
    times_DB = rng.integers(0, 4, (5, 200)).astype(float)
    found_D = calibration_slope(y_B, score_B, times_DB)
    for times_B, found in zip(times_DB, found_D, strict=True):
        regression = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
        regression.fit(logit(score_B)[:, None], y_B, sample_weight=times_B)
        assert found == pytest.approx(regression.coef_[0, 0], rel=1e-5)


def test_no_slope_is_made_up_where_a_threshold_separates_the_classes():
    y_B, once_1B = np.array([0, 0, 1, 1]), np.ones((1, 4))
    for score in ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.2, 0.4], [0.4, 0.3, 0.3, 0.1]):
        assert np.isnan(calibration_slope(y_B, np.array(score), once_1B)).all()
    assert np.isfinite(calibration_slope(y_B, np.array([0.1, 0.3, 0.2, 0.4]), once_1B)).all()


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
        found = Weighted(y_B, score_B / 10, decision_B)(times_B)
        assert found == pytest.approx(
            classification(y_B[repeated], score_B[repeated] / 10, decision_B[repeated]), nan_ok=True, abs=1e-7
        )


def test_resamplings_are_measured_together_as_one_by_one():
    rng = np.random.default_rng(1)
    y_B, score_B, subject_B = rng.random(60) < 0.4, rng.random(60).round(1), np.arange(60) // 2
    one_by_one = list(resamplings(y_B, subject_B, 700, 3))
    together = list(resampled(y_B, subject_B, 700, 3))
    assert len(together) > 1
    np.testing.assert_array_equal(np.concatenate(together), one_by_one)
    measure = Weighted(y_B, score_B, score_B > 0.5)
    for name, values_D in measure(np.stack(one_by_one[:50])).items():
        assert values_D == pytest.approx([measure(times_B)[name] for times_B in one_by_one[:50]], nan_ok=True)


def test_all_metrics_have_intervals_around_their_values():
    rng = np.random.default_rng(2)
    y_B = rng.random(300) < 0.3
    score_NB = 1 / (1 + np.exp(-(rng.normal(size=(2, 300)) + y_B - 1)))
    found = with_intervals(y_B, score_NB, score_NB > 0.5, np.arange(300), draws=50, metrics=ALL_METRICS)
    for name in ALL_METRICS:
        values = [classification(y_B, score_B, score_B > 0.5)[name] for score_B in score_NB]
        assert found[name].value == pytest.approx(np.mean(values))
        assert found[name].low < found[name].value < found[name].high, name


def test_a_metric_that_is_not_defined_has_neither_value_nor_interval():
    y_B = np.arange(40) % 2
    found = with_intervals(y_B, np.full(40, 0.4), y_B, np.arange(40), draws=20, metrics=ALL_METRICS)
    assert np.isnan([found["calibration_slope"].low, found["calibration_slope"].value]).all()
    assert (found["auroc"].low, found["auroc"].value, found["auroc"].high) == (0.5, 0.5, 0.5)


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


# --- tests of differences -------------------------------------------------------------------------------------


def kernel(positive: float, negative: float) -> float:
    return float(positive > negative) + 0.5 * (positive == negative)


def test_delong_is_the_covariance_of_the_definition():
    """DeLong et al. 1988, equations 4 to 6, with every pair compared."""
    rng = np.random.default_rng(4)
    y_B = rng.random(50) < 0.4
    scores_2B = (rng.normal(size=(2, 50)) + y_B * [[1.0], [0.5]]).round(1)  # with ties
    v10_2P, v01_2N, auroc_2 = [], [], []
    for score_B in scores_2B:
        pairs_PN = np.array([[kernel(p, n) for n in score_B[~y_B]] for p in score_B[y_B]])
        v10_2P.append(pairs_PN.mean(axis=1))
        v01_2N.append(pairs_PN.mean(axis=0))
        auroc_2.append(pairs_PN.mean())
        found_B = placements(y_B, score_B)
        np.testing.assert_allclose(found_B[y_B], pairs_PN.mean(axis=1))
        np.testing.assert_allclose(found_B[~y_B], pairs_PN.mean(axis=0))
    covariance_22 = np.cov(v10_2P) / y_B.sum() + np.cov(v01_2N) / (~y_B).sum()
    variance = covariance_22[0, 0] + covariance_22[1, 1] - 2 * covariance_22[0, 1]
    error, p = delong(y_B, scores_2B[0], scores_2B[1], np.arange(50))
    assert error == pytest.approx(np.sqrt(variance))
    assert p == pytest.approx(2 * norm.sf(abs(auroc_2[0] - auroc_2[1]) / np.sqrt(variance)))
    order = rng.permutation(50)
    assert delong(y_B[order], *scores_2B[:, order], np.arange(50)) == pytest.approx((error, p))


ASAH = {
    "good": {
        1: "4 4 4 4 5 5 6 6 7 7 7 7 8 8 8 8 9 9 9 9 10 10 10 10 11 11 13 13 14 14 14 15 16 18 19 48 50",
        2: "4 7 8 8 9 9 10 10 10 11 11 13 14 15 15 15 16 17 19 43",
        3: "5 7 33",
        4: "16 17 28 32 34 38 45 47",
        5: "24 46 47 50",
    },
    "poor": {
        1: "7 8",
        2: "7 7 9 9 10 10 11 14 25 30 41 58",
        3: "13",
        4: "13 16 23 26 27 48 71 96",
        5: "3 12 22 32 33 35 44 44 49 52 56 70 71 74 77 82 86 207",
    },
}
"""113 patients after a subarachnoid haemorrhage by outcome and WFNS grade: S100 beta in 0.01 µg/l. Turck et al. 2010
(Intensive Care Med 36:107), the worked example of Robin et al. 2011 (BMC Bioinformatics 12:77)."""


@pytest.mark.parametrize("copies", [1, 3])
def test_delong_gives_the_published_figures(copies):
    """The grade's AUROC is 0.824, that of S100 beta 0.731: Z = 2.20898, p = 0.02718 (R's pROC). A recording of each
    patient, or three."""
    rows = [
        (outcome == "poor", grade, float(value))
        for outcome, by_grade in ASAH.items()
        for grade, values in by_grade.items()
        for value in values.split()
    ]
    y_B, *scores_2B = (np.repeat(column, copies) for column in zip(*rows, strict=True))
    aurocs = [roc_auc_score(y_B, score_B) for score_B in scores_2B]
    assert aurocs == pytest.approx([0.823678861788618, 0.731368563685637], abs=1e-9)
    error, p = delong(y_B, *scores_2B, np.repeat(np.arange(len(rows)), copies))
    assert (aurocs[0] - aurocs[1]) / error == pytest.approx(2.20898359144091, rel=1e-9)
    assert p == pytest.approx(0.0271757822291882, rel=1e-9)


def test_delong_counts_subjects_not_recordings():
    rng = np.random.default_rng(5)
    y_S = rng.random(40) < 0.5
    scores_2S = rng.normal(size=(2, 40)) + y_S
    once = delong(y_S, *scores_2S, np.arange(40))
    copies = delong(np.repeat(y_S, 9), *np.repeat(scores_2S, 9, axis=1), np.repeat(np.arange(40), 9))
    assert copies == pytest.approx(once)


def test_the_error_of_a_difference_is_right_for_subjects_with_recordings_of_both_classes():
    """Over simulated cohorts the differences spread as the standard error says; of single recordings it would not."""
    differences, errors, naive_errors = [], [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        subject_B = np.repeat(np.arange(40), 4)
        y_B = rng.random(160) < rng.random(40)[subject_B]
        person_2B = rng.normal(size=(2, 40))[:, subject_B]  # a person's own level, different for the two scorers
        scores_2B = 1.5 * person_2B + rng.normal(size=(2, 160)) + y_B
        one, other = (placements(y_B, score_B)[y_B].mean() for score_B in scores_2B)
        differences.append(one - other)
        errors.append(delong(y_B, *scores_2B, subject_B)[0])
        naive_errors.append(delong(y_B, *scores_2B, np.arange(160))[0])
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.15)
    assert abs(np.mean(naive_errors) / np.std(differences) - 1) > 0.2


def test_equal_scorers_do_not_differ():
    y_B, score_B = np.arange(30) % 2, np.arange(30) % 7 / 7
    assert delong(y_B, score_B, 2 * score_B, np.arange(30)) == (0.0, 1.0)
    assert delong(y_B, score_B, score_B[None].repeat(3, axis=0), np.arange(30)) == (0.0, 1.0)


def test_delong_agrees_with_the_bootstrap():
    rng = np.random.default_rng(6)
    y_B = rng.random(300) < 0.4
    one_B = rng.normal(size=300) + 1.2 * y_B
    other_B = one_B + rng.normal(size=300)
    error, _ = delong(y_B, one_B, other_B, np.arange(300))
    interval = auroc_difference(y_B, one_B, other_B, np.arange(300), draws=400)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(error, rel=0.15)


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, np.nan, 0.7]) == pytest.approx([1, np.nan, 1], nan_ok=True)
    assert holm([]) == []
