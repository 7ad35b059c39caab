"""95 % bootstrap intervals over subjects, for explanations of a cohort and their checks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value and its percentile interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def resampled(subject_B: Sequence[str] | np.ndarray, draws: int, seed: int) -> np.ndarray:
    """times_DB: how often each recording counts in each resampling of subjects with replacement.

    NaN for a single subject, of whom there is no interval.
    """
    _, subject_of_B = np.unique(np.asarray(subject_B), return_inverse=True)
    subjects = int(subject_of_B.max()) + 1
    if subjects < 2:
        return np.full((draws, len(subject_of_B)), np.nan)
    return times(subjects, draws, np.random.default_rng(seed))[:, subject_of_B].astype(float)


def times(subjects: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """times_DS: how often each draw, with replacement, takes each subject."""
    return rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=draws)


def interval(value: float, drawn_D: np.ndarray) -> Interval:
    """The value with the interval of what the resamplings gave; none where most of them gave nothing."""
    there_D = drawn_D[np.isfinite(drawn_D)]
    if len(there_D) < 0.9 * len(drawn_D) or not np.isfinite(value):
        return Interval(float(value), np.nan, np.nan)
    return Interval(float(value), *np.percentile(there_D, (2.5, 97.5)).tolist())


def mean(values_B: np.ndarray, times_DB: np.ndarray) -> Interval:
    """The mean over the recordings that have a value."""
    return ratio(np.nan_to_num(values_B), np.isfinite(values_B).astype(float), times_DB)


def ratio(above_B: np.ndarray, below_B: np.ndarray, times_DB: np.ndarray, least: float = 0.0) -> Interval:
    """The sum of one over the sum of the other; NaN where the mean of the latter is not above `least`."""

    def of(above_D: np.ndarray, below_D: np.ndarray) -> np.ndarray:
        there_D = below_D > least * len(below_B)
        return np.where(there_D, above_D / np.where(there_D, below_D, 1.0), np.nan)

    value = of(np.array([above_B.sum()]), np.array([below_B.sum()]))[0]
    return interval(float(value), of(times_DB @ above_B, times_DB @ below_B))
