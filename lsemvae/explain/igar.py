"""IGAR, the integrated-gradient attribution ratio of the authors of LS-EMVAE, as they published it.

Each lead's attributions are scaled from their least to their largest value, 0 to 1. A lead's ratio is the share of its
samples at 0.7 or above; IGAR is that ratio divided by the sum over leads. Of one lead, a wave's ratio counts the
samples at 0.6 or above that are within 40 ms of one of its peaks; it is divided by the sum over P, Q, R, S and T.

It is here so that tables can be compared. Its weaknesses:
- Scaling takes away the size: a lead with hardly any attribution counts as much as any other. A lead with one large
  spike has a small ratio, one with many moderate values a large one.
- Scaling takes away the sign: where all attributions speak against the class, the least of them are "important".
- The windows of Q, R and S overlap, so that a sample can count two or three times.
- The sum over the five waves leaves out ST and all else, and the zeros that pad short recordings count as samples.
- It is the same whether the integrated gradients have converged or not.
`lsemvae.explain.shares` has none of them. Where it differs from the publication: peaks are those of
`lsemvae.explain.waves`, which are the same for all leads for P and T, not those of NeuroKit2 in each lead alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lsemvae.explain.attribution import Settings
from lsemvae.explain.waves import Delineation

PEAKS = ("P", "Q", "R", "S", "T")
SETTINGS = Settings(baseline="zero", steps=50, most_steps=50)
"""The attributions that IGAR is defined on, whatever their convergence delta is."""
LEAD_THRESHOLD, WAVE_THRESHOLD, REACH_S = 0.7, 0.6, 0.04


class Igar(NamedTuple):
    """Shares that sum to 1, or are all 0 where no sample is at the threshold. NaN for an absent lead.

    lead_L   of each lead
    wave_LP  within each lead, of each of `PEAKS`
    """

    lead_L: np.ndarray
    wave_LP: np.ndarray


def igar(values_LT: np.ndarray, lead_mask_L: np.ndarray, peaks: Mapping[str, np.ndarray], rate_hz: float) -> Igar:
    """Attributions toward the predicted class and the samples of each of `PEAKS`, [L, N] with NaN -> IGAR.

    The predicted class of a binary score is "positive" or "negative". Attributions explain the logit of "positive":
    where the decision is negative, pass minus the attributions.
    """
    lead_L = np.full(len(values_LT), np.nan)
    wave_LP = np.full((len(values_LT), len(PEAKS)), np.nan)
    for lead in np.flatnonzero(lead_mask_L):
        value_T = values_LT[lead].astype(np.float64)
        spread = np.ptp(value_T)
        scaled_T = (value_T - value_T.min()) / spread if spread > 0 else np.zeros_like(value_T)
        lead_L[lead] = np.mean(scaled_T >= LEAD_THRESHOLD)
        important_T = scaled_T >= WAVE_THRESHOLD
        for wave, name in enumerate(PEAKS):
            near_T = _near(peaks[name][lead], len(value_T), rate_hz)
            wave_LP[lead, wave] = np.count_nonzero(important_T & near_T)
    return Igar(_share(lead_L), np.apply_along_axis(_share, 1, wave_LP))


def _near(peak_N: np.ndarray, samples: int, rate_hz: float) -> np.ndarray:
    """Which samples are within 40 ms of a peak."""
    reach = int(REACH_S * rate_hz)
    near_T = np.zeros(samples, dtype=bool)
    for peak in peak_N[~np.isnan(peak_N)].astype(int):
        near_T[max(peak - reach, 0) : peak + reach + 1] = True
    return near_T


def _share(ratio: np.ndarray) -> np.ndarray:
    total = np.nansum(ratio)
    return ratio / total if total > 0 else ratio


def peaks(x_LT: np.ndarray, waves: Delineation) -> dict[str, np.ndarray]:
    """The samples of each of `PEAKS` in each lead, [L, N]; NaN where a beat lacks the wave.

    P and T are those of the delineation. R is the lead's largest value within QRS, Q its least before and S its least
    after that.
    """
    count = len(x_LT)
    if not waves.beats:
        return {name: np.full((count, 0), np.nan) for name in PEAKS}
    found = {name: np.tile(waves.edges[name][:, 1], (count, 1)) for name in ("P", "T")}
    found |= {name: np.full((count, waves.beats), np.nan) for name in ("Q", "R", "S")}
    for beat, (onset, offset) in enumerate(waves.edges["QRS"][:, ::2].astype(int)):
        for lead, qrs_T in enumerate(x_LT[:, onset : offset + 1]):
            r = int(qrs_T.argmax())
            found["R"][lead, beat] = onset + r
            found["Q"][lead, beat] = onset + qrs_T[: r + 1].argmin()
            found["S"][lead, beat] = onset + r + qrs_T[r:].argmin()
    return found
