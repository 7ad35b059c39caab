"""How well scores separate two classes, with bootstrap intervals that draw subjects, not recordings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
    roc_curve,
)

from lsemvae.errors import LsemvaeError

METRICS = ("auroc", "auprc", "mcc", "f1", "accuracy")


@dataclass(frozen=True)
class Estimate:
    """A metric and its percentile bootstrap interval (Efron and Tibshirani 1993)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def best_threshold(y_B: np.ndarray, score_B: np.ndarray) -> float:
    """The threshold with the largest Youden index (sensitivity + specificity - 1); decision is score >= it."""
    false_positive, true_positive, threshold = roc_curve(y_B, score_B)
    best = int(np.argmax((true_positive - false_positive)[1:])) + 1  # the first threshold is infinite
    return float(threshold[best])


def classification(y_B: np.ndarray, score_B: np.ndarray, decision_B: np.ndarray) -> dict[str, float]:
    """AUROC, AUPRC (average precision), MCC, F1 and accuracy; raises LsemvaeError when one class is absent."""
    if len(np.unique(y_B)) < 2:
        raise LsemvaeError(f"all {len(y_B)} recordings have label {y_B[:1].tolist()}: both classes are needed")
    return {
        "auroc": float(roc_auc_score(y_B, score_B)),
        "auprc": float(average_precision_score(y_B, score_B)),
        "mcc": float(matthews_corrcoef(y_B, decision_B)),
        "f1": float(f1_score(y_B, decision_B, zero_division=0)),
        "accuracy": float(accuracy_score(y_B, decision_B)),
    }


def with_intervals(
    y_B: np.ndarray,
    score_NB: np.ndarray,
    decision_NB: np.ndarray,
    subject_B: np.ndarray,
    *,
    draws: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each metric with its interval over `draws` resamplings of subjects with replacement.

    `score_NB` and `decision_NB` are [B], or [N, B] of N trainings with other seeds: then each value is the mean of the
    trainings' values, in every resampling too.
    """
    pairs = list(zip(np.atleast_2d(score_NB), np.atleast_2d(decision_NB), strict=True))
    points = [classification(y_B, score_B, decision_B) for score_B, decision_B in pairs]
    measures = [_Weighted(y_B, score_B, decision_B) for score_B, decision_B in pairs]
    drawn = []
    for times_B in resamplings(y_B, subject_B, draws, seed):
        values = [measure(times_B) for measure in measures]
        drawn.append({name: float(np.mean([value[name] for value in values])) for name in METRICS})
    return {
        name: Estimate(float(np.mean([point[name] for point in points])), *_interval([d[name] for d in drawn]))
        for name in METRICS
    }


def auroc_difference(
    y_B: np.ndarray, one_NB: np.ndarray, other_NB: np.ndarray, subject_B: np.ndarray, *, draws: int = 500, seed: int = 0
) -> Estimate:
    """AUROC of one scorer minus that of another on the same recordings, with a paired interval.

    Both are measured on the same resamplings of subjects. Scores as in `with_intervals`.
    """

    def auroc(measures: list[_Weighted], times_B: np.ndarray) -> float:
        return float(np.mean([measure(times_B)["auroc"] for measure in measures]))

    none_B = np.zeros(len(y_B), dtype=bool)
    one, other = (
        [_Weighted(y_B, score_B, none_B) for score_B in np.atleast_2d(values)] for values in (one_NB, other_NB)
    )
    once_B = np.ones(len(y_B))
    drawn = [auroc(one, times_B) - auroc(other, times_B) for times_B in resamplings(y_B, subject_B, draws, seed)]
    return Estimate(auroc(one, once_B) - auroc(other, once_B), *_interval(drawn))


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


def _interval(drawn: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return low, high


class _Weighted:
    """The metrics of a resampling, in which each recording counts several times or never, in one pass over arrays.

    scikit-learn sorts and checks anew for every resampling and metric, which takes a hundred times as long.
    """

    def __init__(self, y_B: np.ndarray, score_B: np.ndarray, decision_B: np.ndarray) -> None:
        self._order_B = np.argsort(-np.asarray(score_B, dtype=float), kind="stable")
        self._y_B = np.asarray(y_B, dtype=float)[self._order_B]
        self._decision_B = np.asarray(decision_B, dtype=float)[self._order_B]
        # Equal scores share one point of the curves: the last recording that has the score.
        self._ends = np.flatnonzero(np.append(np.diff(np.asarray(score_B, dtype=float)[self._order_B]) != 0, True))

    def __call__(self, weight_B: np.ndarray) -> dict[str, float]:
        """As `classification` of the repeated recordings, both classes among them."""
        weight_B = weight_B[self._order_B].astype(float)
        positive_B = weight_B * self._y_B
        total, positives = weight_B.sum(), positive_B.sum()
        true_K = np.append(0.0, positive_B.cumsum()[self._ends])  # at or above each score
        false_K = np.append(0.0, weight_B.cumsum()[self._ends]) - true_K
        gained_K = np.diff(true_K)
        tp = float(positive_B @ self._decision_B)
        fp = float(weight_B @ self._decision_B) - tp
        fn, tn = positives - tp, total - positives - fp
        spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return {
            "auroc": float(np.diff(false_K) @ (true_K[1:] + true_K[:-1])) / (2 * positives * (total - positives)),
            "auprc": float((gained_K * true_K[1:] / np.maximum(true_K + false_K, 1)[1:]).sum() / positives),
            "mcc": float((tp * tn - fp * fn) / np.sqrt(spread)) if spread else 0.0,
            "f1": float(2 * tp / (2 * tp + fp + fn)),
            "accuracy": float((tp + tn) / total),
        }
