"""How well scores separate two classes, with bootstrap intervals that draw subjects, not recordings."""

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
    score_B: np.ndarray,
    decision_B: np.ndarray,
    subject_B: np.ndarray,
    *,
    draws: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Each metric with its interval over `draws` resamplings of subjects with replacement."""
    point = classification(y_B, score_B, decision_B)
    _, subject_of_B = np.unique(subject_B, return_inverse=True)
    subjects = subject_of_B.max() + 1
    order = np.argsort(subject_of_B, kind="stable")
    bounds = np.searchsorted(subject_of_B[order], np.arange(subjects + 1))
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < draws:
        picks = rng.integers(0, subjects, subjects)
        rows = np.concatenate([order[bounds[pick] : bounds[pick + 1]] for pick in picks])
        if len(np.unique(y_B[rows])) == 2:
            drawn.append(classification(y_B[rows], score_B[rows], decision_B[rows]))
    tail = (1 - level) / 2
    return {
        name: Estimate(value, *np.quantile([d[name] for d in drawn], [tail, 1 - tail]).tolist())
        for name, value in point.items()
    }
