"""How well scores separate two classes, with bootstrap intervals that draw subjects, not recordings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lsemvae.bundle import logit
from lsemvae.errors import LsemvaeError

METRICS = ("auroc", "auprc", "mcc", "f1", "accuracy")
ALL_METRICS = (
    *METRICS,
    "sensitivity_at_90_specificity",
    "ppv_at_80_sensitivity",
    "npv_at_80_sensitivity",
    "brier",
    "calibration_slope",
    "calibration_intercept",
)
"""AUROC to accuracy as in METRICS; the others:

sensitivity_at_90_specificity  the largest sensitivity of a threshold whose specificity is at least 0.9
ppv_at_80_sensitivity          PPV at the highest threshold whose sensitivity is at least 0.8, and NPV at the same
brier                          mean squared error of the scores, read as probabilities
calibration_slope              b in logit P(positive) = a + b logit(score) (Cox 1958): 1 is best; below 1 the scores are
                               too extreme
calibration_intercept          a in logit P(positive) = a + logit(score), with the slope fixed at 1 (Van Calster et al.
                               2019): 0 is best; below 0 the scores are too high on average

A value that is not defined is NaN: NPV where no score is below the threshold, and the slope where all scores are equal
or where a threshold separates the classes without an error, so that no finite slope fits best.
"""

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "mcc": "MCC",
    "f1": "F1",
    "accuracy": "accuracy",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "ppv_at_80_sensitivity": "PPV at 80 % sensitivity",
    "npv_at_80_sensitivity": "NPV at 80 % sensitivity",
    "brier": "Brier score",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
}

SPECIFICITY, SENSITIVITY = 0.9, 0.8
_ROUNDING = 1e-9  # 0.1 * 30 is not 3
_CELLS = 20_000  # draws times recordings in one pass, so that its arrays stay in the cache of the processor


@dataclass(frozen=True)
class Estimate:
    """A metric and its percentile bootstrap interval (Efron and Tibshirani 1993). NaN is what is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def best_threshold(y_B: np.ndarray, score_B: np.ndarray) -> float:
    """The threshold with the largest Youden index (sensitivity + specificity - 1); decision is score >= it."""
    from sklearn.metrics import roc_curve

    false_positive, true_positive, threshold = roc_curve(y_B, score_B)
    best = int(np.argmax((true_positive - false_positive)[1:])) + 1  # the first threshold is infinite
    return float(threshold[best])


def classification(
    y_B: np.ndarray, score_B: np.ndarray, decision_B: np.ndarray, metrics: Sequence[str] = ALL_METRICS
) -> dict[str, float]:
    """These metrics; raises LsemvaeError when one class is absent. All but METRICS need scores between 0 and 1."""
    from sklearn.metrics import (  # takes 1 s
        accuracy_score,
        average_precision_score,
        brier_score_loss,
        f1_score,
        matthews_corrcoef,
        roc_auc_score,
        roc_curve,
    )

    _require_both(y_B)
    y_B, score_B = np.asarray(y_B, dtype=float), np.asarray(score_B, dtype=float)
    false_K, true_K, threshold_K = roc_curve(y_B, score_B, drop_intermediate=False)
    sensitive_B = score_B >= threshold_K[np.argmax(true_K >= SENSITIVITY - _ROUNDING)]
    once_1B = np.ones((1, len(y_B)))
    of: dict[str, Callable[[], float]] = {
        "auroc": lambda: roc_auc_score(y_B, score_B),
        "auprc": lambda: average_precision_score(y_B, score_B),
        "mcc": lambda: matthews_corrcoef(y_B, decision_B),
        "f1": lambda: f1_score(y_B, decision_B, zero_division=0),
        "accuracy": lambda: accuracy_score(y_B, decision_B),
        "sensitivity_at_90_specificity": lambda: true_K[false_K <= 1 - SPECIFICITY + _ROUNDING].max(),
        "ppv_at_80_sensitivity": lambda: y_B[sensitive_B].mean(),
        "npv_at_80_sensitivity": lambda: np.nan if sensitive_B.all() else 1 - y_B[~sensitive_B].mean(),
        "brier": lambda: brier_score_loss(y_B, score_B),
        "calibration_slope": lambda: calibration_slope(y_B, score_B, once_1B)[0],
        "calibration_intercept": lambda: calibration_intercept(y_B, score_B, once_1B)[0],
    }
    return {name: float(of[name]()) for name in metrics}


def _require_both(y_B: np.ndarray) -> None:
    if len(np.unique(y_B)) < 2:
        raise LsemvaeError(f"all {len(y_B)} recordings have label {y_B[:1].tolist()}: both classes are needed")


def with_intervals(
    y_B: np.ndarray,
    score_NB: np.ndarray,
    decision_NB: np.ndarray,
    subject_B: np.ndarray,
    *,
    draws: int = 500,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Estimate]:
    """Each metric with its interval over `draws` resamplings of subjects with replacement.

    `score_NB` and `decision_NB` are [B], or [N, B] of N trainings with other seeds: then each value is the mean of the
    trainings' values, in every resampling too. Resamplings in which a metric is not defined do not count for it; there
    is no interval when they are more than a tenth.
    """
    _require_both(y_B)
    measures = [
        Weighted(y_B, score_B, decision_B)
        for score_B, decision_B in zip(np.atleast_2d(score_NB), np.atleast_2d(decision_NB), strict=True)
    ]
    points = [measure(np.ones(len(y_B)), metrics) for measure in measures]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for times_DB in resampled(y_B, subject_B, draws, seed):
        found = [measure(times_DB, metrics) for measure in measures]
        for name in metrics:
            drawn[name].append(np.mean([values[name] for values in found], axis=0))
    return {
        name: Estimate(float(np.mean([point[name] for point in points])), *interval_of(np.concatenate(drawn[name])))
        for name in metrics
    }


def auroc_difference(
    y_B: np.ndarray, one_NB: np.ndarray, other_NB: np.ndarray, subject_B: np.ndarray, *, draws: int = 500, seed: int = 0
) -> Estimate:
    """AUROC of one scorer minus that of another on the same recordings, with a paired interval.

    Both are measured on the same resamplings of subjects. Scores as in `with_intervals`.
    """

    def auroc(measures: list[Weighted], times_DB: np.ndarray) -> np.ndarray:
        return np.mean([measure(times_DB, ("auroc",))["auroc"] for measure in measures], axis=0)

    none_B = np.zeros(len(y_B), dtype=bool)
    one, other = (
        [Weighted(y_B, score_B, none_B) for score_B in np.atleast_2d(values)] for values in (one_NB, other_NB)
    )
    drawn = [auroc(one, times) - auroc(other, times) for times in resampled(y_B, subject_B, draws, seed)]
    once_1B = np.ones((1, len(y_B)))
    value = float((auroc(one, once_1B) - auroc(other, once_1B))[0])
    return Estimate(value, *interval_of(np.concatenate(drawn)))


def resamplings(y_B: np.ndarray, subject_B: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each recording counts in each bootstrap sample of subjects, [B]; both classes are in each."""
    _, subject_B = np.unique(subject_B, return_inverse=True)
    subjects = int(subject_B.max()) + 1
    rng = np.random.default_rng(seed)
    made = 0
    while made < draws:
        times_B = np.bincount(rng.integers(0, subjects, subjects), minlength=subjects)[subject_B]
        if 0 < times_B @ y_B < times_B.sum():
            made += 1
            yield times_B


def resampled(y_B: np.ndarray, subject_B: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """The same resamplings, several at a time: [D, B]."""
    at_once = max(1, _CELLS // len(y_B))
    times: list[np.ndarray] = []
    for times_B in resamplings(y_B, subject_B, draws, seed):
        times.append(times_B)
        if len(times) == at_once:
            yield np.stack(times).astype(float)
            times = []
    if times:
        yield np.stack(times).astype(float)


def interval_of(drawn_D: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle share of the resamplings' values; NaN where they are undefined in more than a tenth of them."""
    defined_D = drawn_D[np.isfinite(drawn_D)]
    if len(defined_D) < 0.9 * len(drawn_D):
        return np.nan, np.nan
    tail = (1 - level) / 2
    low, high = np.quantile(defined_D, [tail, 1 - tail]).tolist()
    return low, high


class Weighted:
    """The metrics of resamplings, in which each recording counts several times or never, in one pass over arrays.

    scikit-learn sorts and checks anew for every resampling and metric, which takes a hundred times as long.
    """

    def __init__(self, y_B: np.ndarray, score_B: np.ndarray, decision_B: np.ndarray) -> None:
        score_B = np.asarray(score_B, dtype=float)
        self._order_B = np.argsort(-score_B, kind="stable")
        self._score_B = score_B[self._order_B]
        self._y_B = np.asarray(y_B, dtype=float)[self._order_B]
        self._decision_B = np.asarray(decision_B, dtype=float)[self._order_B]
        # Equal scores share one point of the curves: the last recording that has the score.
        self._ends = np.flatnonzero(np.append(np.diff(self._score_B) != 0, True))

    def __call__(self, weight_DB: np.ndarray, metrics: Sequence[str] = ALL_METRICS) -> dict[str, np.ndarray]:
        """As `classification` of the repeated recordings, both classes among them, for each of D resamplings.

        `metrics` are those asked for; the answer has at least these. A weight [B] gives values without a dimension.
        """
        if weight_DB.ndim == 1:
            return {name: value[0] for name, value in self(weight_DB[None], metrics).items()}
        weight_DB = weight_DB[:, self._order_B].astype(float)
        positive_DB = weight_DB * self._y_B
        total_D, positives_D = weight_DB.sum(axis=1), positive_DB.sum(axis=1)
        start_D1 = np.zeros((len(weight_DB), 1))
        # At or above each score, from no recording to all of them.
        true_DK = np.append(start_D1, positive_DB.cumsum(axis=1)[:, self._ends], axis=1)
        false_DK = np.append(start_D1, weight_DB.cumsum(axis=1)[:, self._ends], axis=1) - true_DK
        area_D = (np.diff(false_DK) * (true_DK[:, 1:] + true_DK[:, :-1])).sum(axis=1)
        found = {"auroc": area_D / (2 * positives_D * (total_D - positives_D))}
        asked = set(metrics)
        if asked & {"auprc"}:
            precision_DK = true_DK[:, 1:] / np.maximum(true_DK + false_DK, 1)[:, 1:]
            found["auprc"] = (np.diff(true_DK) * precision_DK).sum(axis=1) / positives_D
        if asked & {"mcc", "f1", "accuracy"}:
            found |= _decided(weight_DB @ self._decision_B, positive_DB @ self._decision_B, total_D, positives_D)
        if asked & {"sensitivity_at_90_specificity", "ppv_at_80_sensitivity", "npv_at_80_sensitivity"}:
            found |= _operating_points(true_DK, false_DK)
        if asked & {"brier"}:
            found["brier"] = weight_DB @ (self._score_B - self._y_B) ** 2 / total_D
        if asked & {"calibration_slope"}:
            found["calibration_slope"] = calibration_slope(self._y_B, self._score_B, weight_DB)
        if asked & {"calibration_intercept"}:
            found["calibration_intercept"] = calibration_intercept(self._y_B, self._score_B, weight_DB)
        return found


def _decided(
    decided_D: np.ndarray, tp_D: np.ndarray, total_D: np.ndarray, positives_D: np.ndarray
) -> dict[str, np.ndarray]:
    """MCC, F1 and accuracy from the weights of what is decided positive, rightly so, and in all."""
    fp_D, fn_D = decided_D - tp_D, positives_D - tp_D
    tn_D = total_D - positives_D - fp_D
    spread_D = decided_D * positives_D * (tn_D + fp_D) * (tn_D + fn_D)
    return {
        "mcc": np.where(spread_D > 0, (tp_D * tn_D - fp_D * fn_D) / np.sqrt(np.where(spread_D > 0, spread_D, 1)), 0.0),
        "f1": 2 * tp_D / (2 * tp_D + fp_D + fn_D),
        "accuracy": (tp_D + tn_D) / total_D,
    }


def _operating_points(true_DK: np.ndarray, false_DK: np.ndarray) -> dict[str, np.ndarray]:
    """From how many of each class are at or above each threshold, highest first."""
    positives_D, negatives_D = true_DK[:, -1], false_DK[:, -1]
    specific_DK = false_DK <= ((1 - SPECIFICITY) * negatives_D + _ROUNDING)[:, None]
    at_D1 = np.argmax(true_DK >= (SENSITIVITY * positives_D - _ROUNDING)[:, None], axis=1)[:, None]
    tp_D, fp_D = (np.take_along_axis(of_DK, at_D1, axis=1)[:, 0] for of_DK in (true_DK, false_DK))
    below_D = positives_D - tp_D + negatives_D - fp_D
    return {
        "sensitivity_at_90_specificity": np.where(specific_DK, true_DK, 0.0).max(axis=1) / positives_D,
        "ppv_at_80_sensitivity": tp_D / (tp_D + fp_D),
        "npv_at_80_sensitivity": np.where(
            below_D > 0, (negatives_D - fp_D) / np.where(below_D > 0, below_D, 1), np.nan
        ),
    }


def calibration_slope(y_B: np.ndarray, score_B: np.ndarray, weight_DB: np.ndarray) -> np.ndarray:
    """The slope of logit P(positive) over logit(score), for each of D weightings of the recordings.

    NaN where all scores are equal or a threshold separates the classes: then no finite slope fits best.
    """
    x_B = logit(score_B)
    slope_D = np.full(len(weight_DB), np.nan)
    defined_D = ~_separated(y_B, x_B, weight_DB)
    if defined_D.any():
        weight_DB = weight_DB[defined_D]
        mean_D1 = (weight_DB @ x_B / weight_DB.sum(axis=1))[:, None]
        sd_D1 = np.sqrt((weight_DB * (x_B - mean_D1) ** 2).sum(axis=1) / weight_DB.sum(axis=1))[:, None]
        # Standardised, so that one bound on the steps fits all scores.
        slope_D[defined_D] = _logistic_slope(y_B, (x_B - mean_D1) / sd_D1, weight_DB) / sd_D1[:, 0]
    return slope_D


def _separated(y_B: np.ndarray, x_B: np.ndarray, weight_DB: np.ndarray) -> np.ndarray:
    """Whether no score of one class is above the lowest, or below the highest, of the other. [D]"""
    present_DB = weight_DB > 0
    lowest_D, highest_D = {}, {}
    for label in (0, 1):
        of_DB = present_DB & (y_B == label)
        lowest_D[label] = np.where(of_DB, x_B, np.inf).min(axis=1)
        highest_D[label] = np.where(of_DB, x_B, -np.inf).max(axis=1)
    return (lowest_D[1] >= highest_D[0]) | (lowest_D[0] >= highest_D[1])


def _logistic_slope(y_B: np.ndarray, z_DB: np.ndarray, weight_DB: np.ndarray) -> np.ndarray:
    """The slope of logistic regression on one standardised feature, without a penalty, for each weighting. [D]

    Newton's method for all weightings at once. A step that lowers the likelihood is halved. NaN where 100 steps do not
    suffice.
    """
    total_D = weight_DB.sum(axis=1)
    share_D = weight_DB @ y_B / total_D
    at_D2 = np.stack([np.log(share_D / (1 - share_D)), np.zeros_like(share_D)], axis=1)
    step_D2 = np.zeros_like(at_D2)
    likelihood_D = np.full(len(at_D2), -np.inf)
    for _ in range(100):
        tried_D2 = at_D2 + step_D2
        eta_DB = tried_D2[:, :1] + tried_D2[:, 1:] * z_DB
        p_DB, log_of_rest_DB = _sigmoid(eta_DB)
        now_D = (weight_DB * (y_B * eta_DB + log_of_rest_DB)).sum(axis=1)
        better_D = now_D >= likelihood_D - 1e-10 * total_D
        newton_D2 = _newton_step(weight_DB * (y_B - p_DB), weight_DB * p_DB * (1 - p_DB), z_DB)
        at_D2 = np.where(better_D[:, None], tried_D2, at_D2)
        likelihood_D = np.where(better_D, now_D, likelihood_D)
        step_D2 = np.where(better_D[:, None], np.clip(newton_D2, -4, 4), step_D2 / 2)
        if (np.abs(step_D2) < 1e-8).all():
            break
    return np.where((np.abs(step_D2) < 1e-6).all(axis=1), (at_D2 + step_D2)[:, 1], np.nan)


def _sigmoid(eta_DB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p = 1 / (1 + exp(-eta)), and ln(1 - p)."""
    small_DB = np.exp(-np.abs(eta_DB))
    p_DB = np.where(eta_DB >= 0, 1.0, small_DB) / (1 + small_DB)
    return p_DB, -np.maximum(eta_DB, 0) - np.log1p(small_DB)


def _newton_step(rest_DB: np.ndarray, curve_DB: np.ndarray, z_DB: np.ndarray) -> np.ndarray:
    """The step of intercept and slope, from weight * (y - p) and weight * p * (1 - p). [D, 2]"""
    gradient_0_D, gradient_1_D = rest_DB.sum(axis=1), (rest_DB * z_DB).sum(axis=1)
    curve_z_DB = curve_DB * z_DB
    h_00_D, h_01_D, h_11_D = curve_DB.sum(axis=1), curve_z_DB.sum(axis=1), (curve_z_DB * z_DB).sum(axis=1)
    determinant_D = np.maximum(h_00_D * h_11_D - h_01_D**2, 1e-300)
    steps = [h_11_D * gradient_0_D - h_01_D * gradient_1_D, h_00_D * gradient_1_D - h_01_D * gradient_0_D]
    return np.stack(steps, axis=1) / determinant_D[:, None]


def calibration_intercept(y_B: np.ndarray, score_B: np.ndarray, weight_DB: np.ndarray) -> np.ndarray:
    """The a for which the probabilities sigmoid(a + logit(score)) add up to the number of positives. [D]

    Newton's method between two bounds; a step beyond them is replaced by their middle.
    """
    x_B, positives_D = logit(score_B), weight_DB @ y_B
    low_D, high_D = np.full(len(weight_DB), -60.0), np.full(len(weight_DB), 60.0)
    a_D = np.zeros(len(weight_DB))
    for _ in range(100):
        p_DB, _ = _sigmoid(a_D[:, None] + x_B)
        weighted_DB = weight_DB * p_DB
        excess_D = weighted_DB.sum(axis=1) - positives_D
        low_D, high_D = np.where(excess_D <= 0, a_D, low_D), np.where(excess_D >= 0, a_D, high_D)
        next_D = a_D - excess_D / np.maximum((weighted_DB * (1 - p_DB)).sum(axis=1), 1e-12)
        next_D = np.where((next_D < low_D) | (next_D > high_D), (low_D + high_D) / 2, next_D)
        moved_D, a_D = np.abs(next_D - a_D), next_D
        if (moved_D < 1e-10).all():
            break
    return a_D
