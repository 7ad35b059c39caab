"""Classical features of an ECG: intervals, axes and amplitudes of the median beat, and amplitude quantiles.

They are the row of the table that needs no neural network. Both read the filtered signal in millivolts.

Beats are found as in Pan and Tompkins 1985 ("A real-time QRS detection algorithm", IEEE Trans Biomed Eng 32:230): the
slope's energy over a QRS complex, here of all leads together. Amplitudes are read from the median of the aligned beats,
as in the 12-lead programs that Macfarlane et al. describe (Comprehensive Electrocardiology, 2nd ed. 2010, chapter 37).
Onset and offset of the QRS complex are where the slope of all leads together falls below a tenth of its maximum. A
feature that cannot be measured is NaN; the classifier then uses its average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lsemvae.leads import LEADS

QUANTILES = (0.002, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.998)

GLOBAL = (
    "heart_rate_bpm", "rr_sd_ms", "qrs_ms", "pr_ms", "qt_ms",
    "p_axis_cos", "p_axis_sin", "qrs_axis_cos", "qrs_axis_sin", "t_axis_cos", "t_axis_sin",
)  # fmt: skip
"""Features of the whole recording. An axis is that of the frontal plane, as cosine and sine of its angle: 0 degrees is
lead I, 90 degrees is lead aVF."""
PER_LEAD = ("p_mv", "q_mv", "r_mv", "s_mv", "qrs_area_uvs", "st_mv", "t_mv")
"""Features of each lead's median beat, relative to the level before the QRS complex: the largest deflection of P and T
with its sign, the smallest value before and after the largest of the QRS complex, its area in microvolt seconds, and
the level 60 ms after it."""

_BEFORE_S, _AFTER_S = 0.35, 0.50
_LEAST_BEATS = 2


def names(leads: Sequence[str]) -> list[str]:
    """Names of what `beat_features` gives, in order."""
    return [*GLOBAL, *(f"{lead}.{name}" for lead in leads for name in PER_LEAD)]


def quantile_features(signal_mv_LT: np.ndarray, lead_mask_L: np.ndarray) -> np.ndarray:
    """Nine quantiles of each lead's deviation from its median, mV, [9 L] lead by lead; NaN for an absent lead."""
    deviation_mv_LT = signal_mv_LT - np.median(signal_mv_LT, axis=1, keepdims=True)
    found_LQ = np.quantile(deviation_mv_LT, QUANTILES, axis=1).T
    return np.where(lead_mask_L[:, None], found_LQ, np.nan).ravel().astype(np.float32)


def beat_features(
    signal_mv_LT: np.ndarray, lead_mask_L: np.ndarray, rate_hz: float, leads: Sequence[str]
) -> np.ndarray:
    """`GLOBAL`, then `PER_LEAD` for each lead, float32 [11 + 7 L]; NaN where something cannot be measured.

    `signal_mv_LT` is filtered. In a recording with fewer than two whole beats everything is NaN.
    """
    found = np.full((len(leads), len(PER_LEAD)), np.nan)
    whole = dict.fromkeys(GLOBAL, np.nan)
    beats = find_beats(signal_mv_LT[lead_mask_L], rate_hz) if lead_mask_L.any() else np.empty(0, dtype=int)
    if len(beats) >= _LEAST_BEATS:
        rr_s = np.diff(beats) / rate_hz
        whole["heart_rate_bpm"], whole["rr_sd_ms"] = 60 / np.median(rr_s), 1000 * float(np.std(rr_s))
        before, after = round(_BEFORE_S * rate_hz), round(_AFTER_S * rate_hz)
        inside = [beat for beat in beats if before <= beat < signal_mv_LT.shape[1] - after]
        if len(inside) >= _LEAST_BEATS:
            cuts = np.stack([signal_mv_LT[:, beat - before : beat + after] for beat in inside])
            found, of_beat = _measure(np.median(cuts, axis=0), lead_mask_L, rate_hz, float(np.median(rr_s)), leads)
            whole |= of_beat
    found[~lead_mask_L] = np.nan
    return np.concatenate([list(whole.values()), found.ravel()]).astype(np.float32)


def find_beats(signal_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Positions of the QRS complexes, found in all leads together: the energy of the slope within 100 ms."""
    from scipy.ndimage import uniform_filter1d
    from scipy.signal import find_peaks

    slope_LT = np.gradient(signal_mv_LT, axis=1)
    spread_L1 = np.maximum(slope_LT.std(axis=1, keepdims=True), 1e-9)  # so that no lead decides alone
    energy_T = uniform_filter1d(np.square(slope_LT / spread_L1).mean(axis=0), max(round(0.1 * rate_hz), 1))
    peaks, _ = find_peaks(energy_T, distance=max(round(0.28 * rate_hz), 1))
    if not len(peaks):
        return peaks
    return peaks[energy_T[peaks] > 0.3 * np.quantile(energy_T[peaks], 0.8)]


class _Bounds(NamedTuple):
    """Positions in a median beat."""

    onset: int
    offset: int


def _measure(
    beat_mv_LT: np.ndarray, lead_mask_L: np.ndarray, rate_hz: float, rr_s: float, leads: Sequence[str]
) -> tuple[np.ndarray, dict[str, float]]:
    """The features of a median beat whose QRS complex is `_BEFORE_S` after its start."""

    def samples(seconds: float) -> int:
        return round(seconds * rate_hz)

    bounds = _qrs_bounds(beat_mv_LT[lead_mask_L], samples(_BEFORE_S), rate_hz)
    onset, offset = bounds
    level_L1 = beat_mv_LT[:, max(onset - samples(0.016), 0) : max(onset - samples(0.004), 1)].mean(axis=1)[:, None]
    level_mv_LT = beat_mv_LT - level_L1
    qrs_LT = level_mv_LT[:, onset : offset + 1]
    p_LT = level_mv_LT[:, max(onset - samples(0.22), 0) : max(onset - samples(0.03), 1)]
    t_end = min(offset + samples(min(0.42, 0.6 * rr_s)), beat_mv_LT.shape[1])
    t_start = min(offset + samples(0.08), t_end - 1)
    t_LT = level_mv_LT[:, t_start:t_end]
    r_at_L = qrs_LT.argmax(axis=1)
    at_T = np.arange(qrs_LT.shape[1])
    q_L = np.where(at_T <= r_at_L[:, None], qrs_LT, np.inf).min(axis=1)
    s_L = np.where(at_T >= r_at_L[:, None], qrs_LT, np.inf).min(axis=1)
    area_uvs_L = 1000 * qrs_LT.sum(axis=1) / rate_hz
    st_L = level_mv_LT[:, min(offset + samples(0.06), beat_mv_LT.shape[1] - 1)]
    found = np.stack([_largest(p_LT), q_L, qrs_LT.max(axis=1), s_L, area_uvs_L, st_L, _largest(t_LT)], axis=1)

    p_T, t_T = (np.abs(part[lead_mask_L]).mean(axis=0) for part in (p_LT, t_LT))
    before_p = np.flatnonzero(p_T[: p_T.argmax()] < 0.3 * p_T.max())
    p_start = max(onset - samples(0.22), 0) + (int(before_p[-1]) + 1 if len(before_p) else 0)
    whole = {
        "qrs_ms": 1000 * (offset - onset) / rate_hz,
        "pr_ms": 1000 * (onset - p_start) / rate_hz,
        "qt_ms": 1000 * (t_start + _end_of_t(t_T) - onset) / rate_hz,
    }
    for name, values_L in (("p", _largest(p_LT)), ("qrs", area_uvs_L), ("t", _largest(t_LT))):
        whole[f"{name}_axis_cos"], whole[f"{name}_axis_sin"] = _axis(values_L, lead_mask_L, leads)
    return found, whole


def _qrs_bounds(beat_mv_LT: np.ndarray, centre: int, rate_hz: float) -> _Bounds:
    """First and last position round the centre where the leads' mean absolute slope is above a tenth of its maximum.

    A pause of up to 12 ms within the complex does not end it.
    """
    slope_T = np.abs(np.gradient(beat_mv_LT, axis=1)).mean(axis=0)
    reach, pause = round(0.12 * rate_hz), max(round(0.012 * rate_hz), 1)
    low, high = max(centre - reach, 0), min(centre + reach + 1, len(slope_T))
    peak = low + int(slope_T[low:high].argmax())
    steep = slope_T > 0.1 * slope_T[peak]
    onset = offset = peak
    while onset > low and steep[max(onset - pause, low) : onset].any():
        onset -= 1
    while offset < high - 1 and steep[offset + 1 : offset + 1 + pause].any():
        offset += 1
    return _Bounds(onset, offset)


def _largest(part_mv_LT: np.ndarray) -> np.ndarray:
    """Each lead's value that is farthest from zero, with its sign."""
    return np.take_along_axis(part_mv_LT, np.abs(part_mv_LT).argmax(axis=1)[:, None], axis=1)[:, 0]


def _end_of_t(t_T: np.ndarray) -> int:
    """Where the steepest tangent after the T wave's peak meets zero (Lepeschkin and Surawicz 1952)."""
    peak = int(t_T.argmax())
    fall_T = -np.diff(t_T[peak:])
    if not len(fall_T) or fall_T.max() <= 0:
        return peak
    steepest = peak + int(fall_T.argmax())
    return min(steepest + round(float(t_T[steepest] / fall_T.max())), len(t_T) - 1)


def _axis(values_L: np.ndarray, lead_mask_L: np.ndarray, leads: Sequence[str]) -> tuple[float, float]:
    """Cosine and sine of the frontal axis from leads I and II; NaN where one is absent or both are zero.

    Lead II lies at 60 degrees: with I = cos a and II = cos(a - 60), sin a = (2 II - I) / sqrt(3).
    """
    rows = [leads.index(lead) for lead in LEADS[:2] if lead in leads]
    if len(rows) < 2 or not lead_mask_L[rows].all():
        return np.nan, np.nan
    one, two = values_L[rows]
    x, y = float(one), float((2 * two - one) / np.sqrt(3))
    length = float(np.hypot(x, y))
    return (x / length, y / length) if length > 0 else (np.nan, np.nan)
