"""Onset, peak and offset of P, QRS and T in every beat, from all leads together.

1. QRS is where the speed of the heart's vector peaks: the root mean square over leads of the slope. Onset and offset
   are where the speed falls below a share of that peak.
2. P and T: QRS is replaced by a straight line. Then a filter as wide as the wave (a second derivative of a Gaussian,
   "Mexican hat") gives a vector over leads at each sample. Its length peaks at waves, and is small on slopes.
3. Most beats of a recording look alike. So a second pass looks where most beats have the wave, for their median vector.
   There is no P where its distance from QRS differs from beat to beat, as in atrial fibrillation.
4. In each lead where the wave is large, its ends are corners of the largest trapezium under it (Vázquez-Seisdedos et
   al. 2011, BioMed Eng OnLine 10:77, who do so for the end of T). Over leads, values somewhat outside of the median
   count, more so for P, whose two atria are seen by different leads.

The constants were chosen on LUDB: those of onsets and offsets on its odd-numbered recordings, that of QRS on all
(docs/explanations.md, "Waves").
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import convolve1d, uniform_filter1d
from scipy.signal import find_peaks

QRS_SPACING_S = 0.2  # no two QRS are nearer: 300 beats a minute
QRS_SHARE = 0.45  # of the recording's usual peak speed, which QRS must reach
QRS_CONTRAST = 2.5  # peak speed over median speed of a recording with beats; noise of one lead has about 2
T_AFTER_QRS_S, T_SHARE = 0.36, 0.5  # a peak so soon after QRS, and so much slower, is T
ONSET_SHARE, OFFSET_SHARE = 0.06, 0.09  # of the peak speed: where QRS starts and ends
QUIET_TIMES, MOST_SHARE = 1.5, 0.2  # at least so many times the median speed, which is noise; at most this share
QUIET_S = 0.010  # for so long the speed must stay low


@dataclass(frozen=True)
class Wave:
    """How P or T is looked for. Seconds.

    width   standard deviation of the filter's Gaussian
    smooth  length of the moving average of the wave along its vector
    before, after  how far from the peak the onset and the offset may be
    foot    how far beyond the steepest slope the trapezium reaches
    nearby  how far from its usual distance to QRS the wave is looked for in the second pass
    share   of the usual vector, which the wave must have along it
    outwards  how far from the median over leads, as a share of the leads, the onset and the offset are
    """

    width: float
    smooth: float
    before: float
    after: float
    foot: float
    nearby: float
    share: float
    outwards: float


P = Wave(width=0.022, smooth=0.012, before=0.11, after=0.11, foot=0.05, nearby=0.05, share=0.4, outwards=0.25)
T = Wave(width=0.045, smooth=0.020, before=0.16, after=0.22, foot=0.12, nearby=0.08, share=0.4, outwards=0.1)
LARGE = 0.4  # of the largest lead, in the wave's vector: the leads whose onset and offset count
P_REGULAR_S = 0.016  # largest median deviation of the distance from P to QRS


def find_beats(x_LT: np.ndarray, rate_hz: float) -> dict[str, np.ndarray]:
    """Samples [N, 3] of onset, peak and offset of P, QRS and T; NaN where not found. No two waves overlap."""
    centres = _qrs_centres(x_LT, rate_hz)
    if not centres:
        return dict.fromkeys(("P", "QRS", "T"), np.zeros((0, 3)))
    qrs_N3 = _qrs(x_LT, centres, rate_hz)
    quiet_LT = _without_qrs(x_LT, qrs_N3)
    t_N3 = _t(quiet_LT, qrs_N3, rate_hz)
    p_N3 = _p(quiet_LT, qrs_N3, t_N3, rate_hz)
    return {"P": p_N3, "QRS": qrs_N3, "T": t_N3}


def _samples(seconds: float, rate_hz: float) -> int:
    return max(round(seconds * rate_hz), 1)


def _speed(x_LT: np.ndarray, smooth_s: float, rate_hz: float) -> np.ndarray:
    slope_LT = np.gradient(x_LT, axis=1)
    return uniform_filter1d(np.sqrt(np.mean(slope_LT**2, axis=0)), _samples(smooth_s, rate_hz))


def _qrs_centres(x_LT: np.ndarray, rate_hz: float) -> list[int]:
    """Where the speed, over 60 ms, peaks. None where no peak stands out: noise, or nothing."""
    if x_LT.shape[1] < _samples(0.5, rate_hz):
        return []
    speed_T = _speed(x_LT, 0.06, rate_hz)
    peaks, found = find_peaks(speed_T, distance=_samples(QRS_SPACING_S, rate_hz), prominence=0)
    usual = _usual_peak(speed_T, rate_hz)
    if usual < QRS_CONTRAST * np.median(speed_T):
        return []
    high = (speed_T[peaks] > QRS_SHARE * usual) & (found["prominences"] > 0.5 * speed_T[peaks])
    centres: list[int] = []
    for peak in peaks[high]:
        soon = bool(centres) and peak - centres[-1] < T_AFTER_QRS_S * rate_hz
        if not (soon and speed_T[peak] < T_SHARE * speed_T[centres[-1]]):
            centres.append(int(peak))
    return centres


def _usual_peak(speed_T: np.ndarray, rate_hz: float) -> float:
    """Median over 2 s of the largest speed: of those with a signal, and whatever one artefact reaches."""
    parts = np.array_split(speed_T, max(len(speed_T) // _samples(2, rate_hz), 1))
    largest = np.sort([part.max() for part in parts])
    return float(np.median(largest[largest >= 0.2 * largest[-2:][0]]))


def _qrs(x_LT: np.ndarray, centres: list[int], rate_hz: float) -> np.ndarray:
    """Onset, peak and offset round each centre. The peak is the largest departure from the onset's level."""
    speed_T = _speed(x_LT, 0.012, rate_hz)
    usual = float(np.median(speed_T))
    core, before, after = (_samples(seconds, rate_hz) for seconds in (0.08, 0.16, 0.22))
    rows: list[tuple[int, int, int]] = []
    for centre in centres:
        start = max(centre - core, 0)
        top = speed_T[start : centre + core + 1].max()
        fast = start + np.flatnonzero(speed_T[start : centre + core + 1] > 0.4 * top)
        backwards = speed_T[max(centre - before, 0) : fast[0] + 1][::-1]
        onset = fast[0] - _first_low(backwards, _limit(ONSET_SHARE, top, usual), rate_hz)
        onwards = speed_T[fast[-1] : centre + after + 1]
        offset = fast[-1] + _first_low(onwards, _limit(OFFSET_SHARE, top, usual), rate_hz)
        if rows:
            onset = max(onset, rows[-1][2])
        departure_T = np.sum((x_LT[:, onset : offset + 1] - x_LT[:, onset : onset + 1]) ** 2, axis=0)
        rows.append((onset, onset + int(departure_T.argmax()), offset))
    return np.array(rows, dtype=float)


def _limit(share: float, top: float, usual: float) -> float:
    return min(max(share * top, QUIET_TIMES * usual), MOST_SHARE * top)


def _first_low(speed_T: np.ndarray, limit: float, rate_hz: float) -> int:
    """Where the speed first stays below the limit; where it is lowest, if it never does."""
    length = min(_samples(QUIET_S, rate_hz), len(speed_T))
    low = np.convolve(speed_T < limit, np.ones(length), "valid") > length - 0.5
    return int(low.argmax()) if low.any() else int(speed_T.argmin())


def _without_qrs(x_LT: np.ndarray, qrs_N3: np.ndarray) -> np.ndarray:
    quiet_LT = x_LT.copy()
    for onset, offset in qrs_N3[:, ::2].astype(int):
        last = min(offset, x_LT.shape[1] - 1)
        quiet_LT[:, onset : last + 1] = np.linspace(x_LT[:, onset], x_LT[:, last], last - onset + 1, axis=1)
    return quiet_LT


def _filtered(x_LT: np.ndarray, width_s: float, rate_hz: float) -> np.ndarray:
    """A Mexican hat of this width over each lead."""
    reach = _samples(4 * width_s, rate_hz)
    at = np.arange(-reach, reach + 1) / (rate_hz * width_s)
    hat = (1 - at**2) * np.exp(-(at**2) / 2)
    hat -= hat.mean()
    return convolve1d(x_LT, 2 * hat / np.abs(hat).sum(), axis=1)


def _largest(length_T: np.ndarray, start: int, end: int) -> int | None:
    """The largest peak in [start, end)."""
    if end - start < 3:
        return None
    peaks, _ = find_peaks(length_T[start:end])
    return start + int(peaks[length_T[start + peaks].argmax()]) if len(peaks) else None


def _t(quiet_LT: np.ndarray, qrs_N3: np.ndarray, rate_hz: float) -> np.ndarray:
    following = np.append(qrs_N3[1:, 0], quiet_LT.shape[1])
    rr_s = np.clip((following - qrs_N3[:, 0]) / rate_hz, 0, 0.5 / 0.7)
    starts = qrs_N3[:, 2] + _samples(0.05, rate_hz)
    ends = np.minimum(qrs_N3[:, 2] + 0.7 * rr_s * rate_hz, following - _samples(0.02, rate_hz))
    filtered_LT = _filtered(quiet_LT, T.width, rate_hz)
    peaks, _ = _peaks(filtered_LT, qrs_N3[:, 2], starts, ends, T, rate_hz)
    return _bounds(quiet_LT, filtered_LT, peaks, qrs_N3[:, 2], following, T, rate_hz)


def _p(quiet_LT: np.ndarray, qrs_N3: np.ndarray, t_N3: np.ndarray, rate_hz: float) -> np.ndarray:
    """P of the beats that have one, in the same place before QRS as in the others."""
    after_qrs = np.append(0, qrs_N3[:-1, 2] + _samples(0.05, rate_hz))
    after_t = np.append(np.nan, t_N3[:-1, 2])
    starts = np.fmax(np.fmax(after_qrs, after_t), qrs_N3[:, 0] - _samples(0.3, rate_hz))
    ends = qrs_N3[:, 0] - _samples(0.02, rate_hz)
    filtered_LT = _filtered(quiet_LT, P.width, rate_hz)
    peaks, spread_s = _peaks(filtered_LT, qrs_N3[:, 0], starts, ends, P, rate_hz)
    if spread_s > P_REGULAR_S:
        peaks = np.full(len(peaks), np.nan)
    return _bounds(quiet_LT, filtered_LT, peaks, np.fmax(after_qrs, after_t), qrs_N3[:, 0], P, rate_hz)


def _peaks(
    filtered_LT: np.ndarray, qrs_N: np.ndarray, starts: np.ndarray, ends: np.ndarray, wave: Wave, rate_hz: float
) -> tuple[np.ndarray, float]:
    """The wave's peak in each beat, NaN where there is none, and how much its distance from `qrs_N` varies, in s.

    The latter is the median deviation from the median, before the second pass.
    """
    length_T = np.sqrt(np.mean(filtered_LT**2, axis=0))
    bounds = np.stack([starts, ends], axis=1).astype(int)
    first = [_largest(length_T, start, end) for start, end in bounds]
    peaks = np.array([np.nan if peak is None else peak for peak in first], dtype=float)
    there = ~np.isnan(peaks)
    if not there.any():
        return peaks, np.inf
    vectors_NL = filtered_LT[:, peaks[there].astype(int)].T
    distance = np.median((peaks - qrs_N)[there])
    spread_s = float(np.median(np.abs((peaks - qrs_N)[there] - distance))) / rate_hz
    at_usual = np.abs((peaks - qrs_N)[there] - distance) <= wave.nearby * rate_hz
    usual_L = np.median(vectors_NL[at_usual] if at_usual.any() else vectors_NL, axis=0)
    along_T = usual_L @ filtered_LT / max(float(usual_L @ usual_L), 1e-12)
    reach = wave.nearby * rate_hz
    for beat, (start, end) in enumerate(bounds):
        near = max(start, int(qrs_N[beat] + distance - reach)), min(end, int(qrs_N[beat] + distance + reach))
        peak = _largest(along_T, *near)
        if peak is not None and along_T[peak] > wave.share:
            peaks[beat] = peak
        elif wave is P:
            peaks[beat] = np.nan
    return peaks, spread_s


def _bounds(
    quiet_LT: np.ndarray,
    filtered_LT: np.ndarray,
    peaks: np.ndarray,
    earliest: np.ndarray,
    latest: np.ndarray,
    wave: Wave,
    rate_hz: float,
) -> np.ndarray:
    """Onset, peak and offset of each wave: the peak along its vector; the others from the leads where it is large."""
    edges_N3 = np.full((len(peaks), 3), np.nan)
    shift, foot, smooth = (_samples(seconds, rate_hz) for seconds in (0.7 * wave.width, wave.foot, wave.smooth))
    for beat in np.flatnonzero(~np.isnan(peaks)):
        peak = int(peaks[beat])
        first = max(int(earliest[beat]), peak - _samples(wave.before, rate_hz), 0)
        last = min(int(latest[beat]), peak + _samples(wave.after, rate_hz), quiet_LT.shape[1])
        near = slice(max(peak - shift - first, 0), peak + shift + 1 - first)
        vector_L = filtered_LT[:, peak]
        large = np.abs(vector_L) >= LARGE * np.abs(vector_L).max()
        upright_LT = np.sign(vector_L[large, None]) * quiet_LT[large, first:last]
        along_T = vector_L[large] @ quiet_LT[large, first:last]
        curves_KT = uniform_filter1d(np.vstack([along_T, upright_LT]), smooth, axis=1)
        tops = near.start + curves_KT[:, near].argmax(axis=1)
        onsets = [top - _foot(curve_T[top::-1], foot) for curve_T, top in zip(curves_KT[1:], tops[1:], strict=True)]
        offsets = [top + _foot(curve_T[top:], foot) for curve_T, top in zip(curves_KT[1:], tops[1:], strict=True)]
        onset, offset = np.quantile(onsets, 0.5 - wave.outwards), np.quantile(offsets, 0.5 + wave.outwards)
        if onset < tops[0] < offset:
            edges_N3[beat] = first + np.round([onset, tops[0], offset])
    return edges_N3


def _foot(fall_T: np.ndarray, reach: int) -> int:
    """Where a wave that starts at its peak ends: the corner of the trapezium of the largest area.

    Two corners are at the steepest point s and at a reference r = s + reach beyond the end; the area at t is
    (fall[s] - fall[t]) * (2 r - s - t) / 2. It grows while the wave falls, and shrinks on the flat.
    """
    if len(fall_T) < 3:
        return len(fall_T) - 1
    steepest = int(np.gradient(fall_T).argmin())
    at = np.arange(steepest, len(fall_T))
    area = (fall_T[steepest] - fall_T[steepest:]) * (2 * (steepest + reach) - steepest - at)
    return steepest + int(area.argmax())
