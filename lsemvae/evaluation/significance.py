"""Whether two AUROCs on the same recordings differ by more than chance: DeLong's test, and Holm's correction."""

from collections.abc import Sequence

import numpy as np


def placements(y_B: np.ndarray, score_NB: np.ndarray) -> np.ndarray:
    """For each recording the share of the other class that it is ordered rightly against, equal scores counting half.

    Their mean over either class is the AUROC. Scores are [B], or [N, B] of N trainings, over which the answer [B] is
    the mean. By midranks, in n log n (Sun and Xu 2014).

    A positive's rank among all recordings minus its rank among the positives is the number of negatives below it. Of
    the scores 1 2 2 3 let the second and the last be positive: their ranks are 2.5 and 4 among all, 1 and 2 among the
    positives, so that 1.5 and 2 of the two negatives are below.
    """
    from scipy.stats import rankdata

    positive_B = np.asarray(y_B, dtype=bool)
    found_NB = []
    for score_B in np.atleast_2d(score_NB):
        beaten_B = rankdata(score_B)  # by how many of the other class, first
        for of_class_B in (positive_B, ~positive_B):
            beaten_B[of_class_B] -= rankdata(score_B[of_class_B])
        share_B = beaten_B / np.where(positive_B, (~positive_B).sum(), positive_B.sum())
        found_NB.append(np.where(positive_B, share_B, 1 - share_B))
    return np.mean(found_NB, axis=0)


def delong(y_B: np.ndarray, one_NB: np.ndarray, other_NB: np.ndarray, subject_B: np.ndarray) -> tuple[float, float]:
    """The standard error of AUROC(one) - AUROC(other), and the two-sided p that there is no difference.

    DeLong, DeLong and Clarke-Pearson (1988); a subject may have several recordings, of both classes (Obuchowski 1997),
    and with one recording each the two are the same. Scores of several trainings as in `placements`.
    """
    from scipy.stats import norm

    positive_B = np.asarray(y_B, dtype=bool)
    gain_B = placements(y_B, one_NB) - placements(y_B, other_NB)
    difference = float(gain_B[positive_B].mean())
    _, subject_of_B = np.unique(subject_B, return_inverse=True)
    subjects = int(subject_of_B.max()) + 1
    # Each subject's sum of deviations over its positive, and over its negative recordings.
    sums_2S = [
        np.bincount(subject_of_B[of_B], gain_B[of_B] - difference, subjects) for of_B in (positive_B, ~positive_B)
    ]
    counts = [len(np.unique(subject_of_B[of_B])) for of_B in (positive_B, ~positive_B)]
    sizes = [int(positive_B.sum()), int((~positive_B).sum())]
    if min(*counts, subjects) < 2:
        return np.nan, np.nan
    variance = 2 * subjects / (subjects - 1) * float(sums_2S[0] @ sums_2S[1]) / (sizes[0] * sizes[1])
    for sum_S, count, size in zip(sums_2S, counts, sizes, strict=True):
        variance += count / (count - 1) * float(sum_S @ sum_S) / size**2
    error = float(np.sqrt(max(variance, 0.0)))
    if error < 1e-12:  # the same order of all recordings
        return 0.0, 1.0 if abs(difference) < 1e-12 else 0.0
    return error, float(2 * norm.sf(abs(difference) / error))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): below 0.05, the difference stands at that level.

    The smallest is multiplied by the number of values, the next by one less, and so on; none gets smaller than one
    before it. NaN stays NaN and does not count.
    """
    values_N = np.asarray(p, dtype=float)
    adjusted_N = np.full(len(values_N), np.nan)
    known = np.flatnonzero(np.isfinite(values_N))
    order = known[np.argsort(values_N[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted_N[order] = np.minimum(np.maximum.accumulate(values_N[order] * factors), 1)
    return adjusted_N.tolist()
