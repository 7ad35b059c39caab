"""Probabilities from scores: Platt's sigmoid, fitted to out-of-fold scores, and the error of probabilities.

The focal loss and the balanced classes of fine-tuning make scores that rank recordings; they are not probabilities. A
few hundred patients, of whom a few are ill, can support two parameters. Isotonic regression would fit many more
steps, and give one probability to patients whom the score distinguishes; it pays from some thousand cases on
(Niculescu-Mizil and Caruana 2005, "Predicting good probabilities with supervised learning").

Each subject has the same weight, however many recordings it has: a probability is about a person, and ill people are
recorded more often. A probability holds where the disease is as frequent as among the subjects it was fitted on.
"""

from typing import NamedTuple

import numpy as np

from lsemvae.bundle import Calibration, logit

MIN_SLOPE = 1e-3
"""With a smaller slope, all recordings have about the same probability."""


def subject_weights(subject_B: np.ndarray) -> np.ndarray:
    """1 / the subject's number of recordings."""
    _, subject_of_B, count = np.unique(subject_B, return_inverse=True, return_counts=True)
    return 1.0 / count[subject_of_B]


def fit_sigmoid(y_B: np.ndarray, score_B: np.ndarray, weight_B: np.ndarray) -> Calibration | None:
    """Labels, out-of-fold scores and weights -> the calibration; None when higher scores are not more often positive.

    Platt (1999), "Probabilistic outputs for support vector machines": the targets are not 0 and 1 but (N+ + 1) /
    (N+ + 2) and 1 / (N- + 2), so that few or perfectly separated recordings do not give certainty.
    """
    from sklearn.linear_model import LogisticRegression

    positive, negative = weight_B[y_B == 1].sum(), weight_B[y_B == 0].sum()
    target_B = np.where(y_B == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    # A target between 0 and 1 is the same as the recording twice, once with each label, weighted.
    logit_B = logit(score_B)
    centre = logit_B.mean()  # without centring, a constant score could get any slope, compensated by the intercept
    regression = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.concatenate([logit_B, logit_B])[:, None] - centre,
        np.repeat([1, 0], len(y_B)),
        sample_weight=np.concatenate([weight_B * target_B, weight_B * (1 - target_B)]),
    )
    slope, intercept = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    return Calibration(slope, intercept - slope * float(centre)) if slope > MIN_SLOPE else None


def cross_fitted(
    y_B: np.ndarray, score_B: np.ndarray, weight_B: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray | None:
    """Each fold's probabilities by a calibration fitted on the other folds; None when one of them has none."""
    probability_B = np.full(len(y_B), np.nan)
    for train, test in folds:
        calibration = fit_sigmoid(y_B[train], score_B[train], weight_B[train])
        if calibration is None:
            return None
        probability_B[test] = calibration.probability(score_B[test])
    return probability_B


def brier(y_B: np.ndarray, probability_B: np.ndarray, weight_B: np.ndarray) -> float:
    """The mean squared error of the probabilities: 0 is best; giving everybody the share of positives p: p (1 - p)."""
    return float(np.average((probability_B - y_B) ** 2, weights=weight_B))


class Diagram(NamedTuple):
    """A reliability diagram; a value for each bin."""

    probability: np.ndarray
    positive: np.ndarray
    """The share of positives."""
    weight: np.ndarray


def diagram(y_B: np.ndarray, probability_B: np.ndarray, weight_B: np.ndarray, bins: int = 10) -> Diagram:
    """At most so many bins with about equally many recordings: most of equally wide bins would be nearly empty.

    Equal probabilities stay in one bin.
    """
    edges = np.unique(np.quantile(probability_B, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_B = np.searchsorted(edges, probability_B, side="right")
    weight = np.bincount(bin_B, weight_B, len(edges) + 1)
    filled = weight > 0
    mean = np.bincount(bin_B, weight_B * probability_B, len(edges) + 1)[filled] / weight[filled]
    share = np.bincount(bin_B, weight_B * y_B, len(edges) + 1)[filled] / weight[filled]
    return Diagram(mean, share, weight[filled])


def expected_calibration_error(y_B: np.ndarray, probability_B: np.ndarray, weight_B: np.ndarray) -> float:
    """The mean distance of a diagram's columns (Naeini et al. 2015). With few recordings it is too high by chance."""
    drawn = diagram(y_B, probability_B, weight_B)
    return float(np.average(np.abs(drawn.probability - drawn.positive), weights=drawn.weight))
