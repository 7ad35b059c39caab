"""Doubts about the quality of a recording, as short flags. Nothing is refused here: `preprocess` decides.

A flag is a kind, or a kind and a lead, such as "nan:V1" or "swapped:arms". `FLAGS` explains each kind. The limits were
chosen on 500 recordings of PTB-XL and 200 of LUDB; a comment beside each says how many of these 700 it flags.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from lsemvae.leads import LIMB_FROM_I_II
from lsemvae.record import Record

FLAGS = {
    "nan": "Samples are missing.",
    "flat": "The lead keeps one value for a second, or hardly moves at all.",
    "rail": "The lead is cut off: at the ends of 16 bits, or at plateaus of its own extreme values.",
    "out_of_range": "The lead exceeds 10 mV: an artefact, or microvolts read as millivolts.",
    "mains": "The lead has a hum of 50 or 60 Hz of 0.05 mV or more from peak to peak.",
    "wander": "The baseline of the lead wanders by 2 mV or more, slower than 0.5 Hz.",
    "scale": "All leads are about a thousand times too small or too large: check the gain and its unit (mV or uV).",
    "einthoven": "The limb leads contradict each other, so at least one of them is wrong.",
    "swapped:aVL-aVF": "aVL and aVF contradict the other limb leads, and would agree if exchanged.",
    "swapped:arms": "Lead I looks upside down: arm electrodes exchanged, dextrocardia, or an extreme right axis, which "
    "pulmonary hypertension can cause. This is no reason to leave the recording out.",
    "swapped:arm-leg": "Lead II looks upside down: right arm and left leg electrodes exchanged, or an extreme left "
    "axis. This is no reason to leave the recording out.",
    "length": "The recording does not last 10 s.",
    "rate": "The recording does not have 500 samples a second.",
    "time_scale": "The heart beats too fast with narrow QRS complexes, or too slowly with wide ones: check the "
    "sampling rate. Small children, and adults with such a tachycardia or bradycardia, have this flag too.",
    "checksum": "The samples do not match the checksum in the file: some may have been altered.",
    "enhanced": "The file holds only the signal after the app's filters, not the raw one.",
    "no_millivolts": "The source gives standardised numbers, no millivolts: 0.15 mV stands for one standard deviation "
    "of the data set. No limit in mV is checked.",
    "unknown_lead": "The file has a signal that is none of the twelve leads, or has an unknown name. It was left out.",
}
"""Kind -> its meaning, for the flags of `quality_flags` and of readers; kind:detail where details differ in meaning."""

EXPECTED_S = 10.0
LENGTH_TOLERANCE_S = 0.1
EXPECTED_HZ = 500.0

FLAT_S = 1.0
"""One value through a whole second, counted from the start. The longest in 700 recordings lasts 0.58 s."""
FLAT_MV = 0.03
"""Peak to peak; the smallest lead in 700 recordings has 0.235 mV."""

RAIL_COUNT = 32767
"""The end of 16 bits. A larger count comes from more bits, so it does not mean that the lead is cut off."""
RAIL_SHARE = 0.005
RAIL_EXCESS = 2.0
RAIL_DISTANCE_MV = 0.5
"""Plateaus (three equal samples or more) at the extreme value, this far from the mean. They must hold this share of all
samples, and this many times the samples within three steps of the extreme value: where a recorder has coarse steps,
rounded peaks have plateaus too. Plateaus at the ends do not count, since PTB-XL's recordings are padded. Flags 1 of 700
recordings, which is cut off; in steps of 25, 50 or 100 uV 2, 1 and 1."""

SCALE_MV = (0.03, 100.0)
"""Peak to peak: a lead of ordinary size, 0.3 to 30 mV, a thousand times too small or too large. Flags none of 700."""

MAX_AMPLITUDE_MV = 10.0
"""Flags 1 of 700 recordings."""

EINTHOVEN_MV = 0.025
"""If each lead is rounded to 5 uV, I + III - II reaches 20 uV, and the augmented leads less. Flags 1 of 700."""
EINTHOVEN_STEPS = 4.0
"""The same limit for coarser recorders: four times the largest step of the leads compared."""

MAINS_HZ = (50.0, 60.0)
MAINS_MV = 0.025
"""Amplitude, half of the peak-to-peak value. Flags 1 of 700 recordings."""
MAINS_BESIDE_HZ = 4.0
"""Power this far from the mains frequency on either side is subtracted: it comes from QRS complexes and muscle."""

WANDER_HZ = 0.5
WANDER_MV = 2.0
"""Peak to peak: 20 mm of paper. Flags 35 of 700 recordings (5 %); 1 mV would flag 110."""

SWAPPED_CORRELATION = -0.5
"""Correlation of the steepness of lead I, or II, with that of V6. `swapped:arms` flags 2 of 700 recordings, and 90 % of
them after exchanging the arms; `swapped:arm-leg` flags 1, and 94 % after exchanging right arm and left leg."""
SWAPPED_STEP_S = 0.01
"""Steepness is the change over this time, so QRS complexes count and the baseline does not."""
SWAPPED_SKEWNESS = (-1.0, 0.5)
"""Without V6: lead I is below, aVR above. Flags 1 of 700, and 62 % of them after exchanging the arms."""

BEAT_REFRACTORY_S = 0.25
BEAT_MIN_HZ = 100.0

TIME_SCALE = (400.0, 2200.0)
"""Heart rate in bpm times the frequency of the QRS complex in Hz (`_qrs_hz`): about 1000 in adults. Where the sampling
rate is labelled twice as high as it is, both double and the product is four times as large; half as high, a quarter.
Flags 6 of 700 recordings, with rates of 31 to 50 and of 117 to 172 bpm. Finds 94 % of them at twice their rate, and
92 % at half of it (94 % and 88 % by the limb leads alone). Of 700 simulated ones it flags none, and finds 99 % each."""
TIME_SCALE_BPM = (52.0, 88.0)
"""Between these heart rates the QRS complex is not measured, which takes longer than finding beats. Misses 3 and 4 more
of the 700, and flags 3 fewer."""
TIME_SCALE_LEADS = frozenset({"I", "II", "V1", "V2", "V5"})
"""Measured in these leads, or in all where none of these is there: the product is the same with all twelve."""
QRS_HALF_S = 0.1
QRS_STEP_S = 0.004


@np.errstate(invalid="ignore")  # an infinite sample counts as missing
def quality_flags(record: Record) -> tuple[str, ...]:
    """Flags in the order of `FLAGS`, without those of `record.flags`. Takes 0.5 ms.

    A record with the flag "no_millivolts" is checked only for what needs no voltage: missing samples, a lead that keeps
    one value, exchanged electrodes, length and rate.

    Two exchanges of electrodes are not detected. Left arm and left leg: the best rule tried, which predicts limb leads
    from chest leads, found 23 % at 1.4 % false alarms. The right leg and another: lead I, II or III nearly vanishes.
    `flat` reports it if it vanishes completely; there are no recordings to test more.
    """
    if "no_millivolts" in record.flags:
        return _flags_without_unit(record)
    signal_mv_LT = record.signal_mv_LT
    finite_LT = np.isfinite(signal_mv_LT)
    complete_L = finite_LT.all(axis=1)
    low_mv_L, high_mv_L, holds_L = _extremes(signal_mv_LT, record.rate_hz)
    flat_L = holds_L | (high_mv_L - low_mv_L < FLAT_MV)
    beyond_L = np.maximum(-low_mv_L, high_mv_L) > MAX_AMPLITUDE_MV
    rail_L = _rails(record, low_mv_L, high_mv_L) & ~flat_L
    if complete_L.all():
        centred_mv_LT = signal_mv_LT - signal_mv_LT.mean(axis=1, keepdims=True)
    else:
        mean_mv_L1 = np.mean(signal_mv_LT, axis=1, keepdims=True, where=finite_LT | ~finite_LT.any(axis=1)[:, None])
        centred_mv_LT = np.where(finite_LT, signal_mv_LT - mean_mv_L1, np.float32(0))

    kinds = {
        "nan": ~complete_L,  # any missing sample; `preprocess` decides how many are too many
        "flat": flat_L,
        "rail": rail_L,
        "out_of_range": beyond_L,
        "mains": ~flat_L & (_mains_mv(centred_mv_LT, record.rate_hz) > MAINS_MV),
        "wander": ~flat_L & (_wander_mv(centred_mv_LT, record.rate_hz) > WANDER_MV),
    }
    flags = _by_lead(record, kinds)
    flags += _scale_flags(record, high_mv_L - low_mv_L)
    flags += _limb_lead_flags(record)
    usable_L = ~flat_L & complete_L
    flags += _electrode_flags(record, usable_L)
    return (*flags, *_time_flags(record, usable_L))


def _flags_without_unit(record: Record) -> tuple[str, ...]:
    complete_L = np.isfinite(record.signal_mv_LT).all(axis=1)
    _, _, holds_L = _extremes(record.signal_mv_LT, record.rate_hz)
    flags, usable_L = _by_lead(record, {"nan": ~complete_L, "flat": holds_L}), ~holds_L & complete_L
    return (*flags, *_electrode_flags(record, usable_L), *_time_flags(record, usable_L))


def _by_lead(record: Record, kinds: Mapping[str, np.ndarray]) -> list[str]:
    return [
        f"{kind}:{lead}"
        for kind, flagged_L in kinds.items()
        for lead, flagged in zip(record.leads, flagged_L, strict=True)
        if flagged
    ]


def _time_flags(record: Record, usable_L: np.ndarray) -> list[str]:
    is_other = abs(record.signal_mv_LT.shape[1] / record.rate_hz - EXPECTED_S) > LENGTH_TOLERANCE_S
    flags = ["length"] * is_other + ["rate"] * (record.rate_hz != EXPECTED_HZ)
    return flags + ["time_scale"] * _has_odd_time_scale(record, usable_L)


def heart_rate_bpm(record: Record) -> float:
    """An estimate: 60 s over the median time between QRS complexes, NaN with fewer than three of them.

    Leads with NaN are left out; below 100 samples a second there is no estimate. On 199 of LUDB's 200 recordings it is
    within 5 % of the rate of the annotated beats.
    """
    measured_L = np.array([lead not in record.derived for lead in record.leads])
    beats = _beats(record.signal_mv_LT[measured_L & np.isfinite(record.signal_mv_LT).all(axis=1)], record.rate_hz)
    return _bpm(beats, record.rate_hz)


def _bpm(beats: np.ndarray, rate_hz: float) -> float:
    return float(60 * rate_hz / np.median(np.diff(beats))) if len(beats) >= 3 else np.nan


def _beats(signal_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """The first sample of each QRS complex.

    The change over 20 ms is summed over the leads and averaged over 0.1 s. A complex is where it exceeds half of its
    usual peak, the median of its highest values in each 2 s.
    """
    step, width, window = (round(seconds * rate_hz) for seconds in (0.02, 0.1, 2.0))
    if not len(signal_mv_LT) or rate_hz < BEAT_MIN_HZ or signal_mv_LT.shape[1] < window + step + width:
        return np.empty(0, dtype=int)
    change_T = np.abs(signal_mv_LT[:, step:] - signal_mv_LT[:, :-step]).sum(axis=0, dtype=np.float64)
    total_T = np.concatenate([[0.0], np.cumsum(change_T)])
    smooth_T = (total_T[width:] - total_T[:-width]) / width
    peaks_N = smooth_T[: len(smooth_T) // window * window].reshape(-1, window).max(axis=1)
    edges = np.flatnonzero(np.diff(smooth_T > np.median(peaks_N) / 2, prepend=False, append=False))
    rises, falls = edges[::2], edges[1::2]
    beats = [rises[0]] if len(rises) else []
    for rise, fall_before in zip(rises[1:], falls[:-1], strict=True):
        if rise - fall_before >= 0.02 * rate_hz and rise - beats[-1] >= BEAT_REFRACTORY_S * rate_hz:
            beats.append(rise)
    return np.array(beats, dtype=int)


def _has_odd_time_scale(record: Record, usable_L: np.ndarray) -> bool:
    measured_L = np.array([lead not in record.derived for lead in record.leads]) & usable_L
    chosen_L = measured_L & np.array([lead in TIME_SCALE_LEADS for lead in record.leads])
    signal_mv_LT = record.signal_mv_LT[chosen_L if chosen_L.any() else measured_L]
    beats = _beats(signal_mv_LT, record.rate_hz)
    bpm, (slow_bpm, fast_bpm), (low, high) = _bpm(beats, record.rate_hz), TIME_SCALE_BPM, TIME_SCALE
    if not (bpm < slow_bpm or bpm > fast_bpm):
        return False
    product = bpm * _qrs_hz(signal_mv_LT, beats, record.rate_hz)
    return product < low if bpm < slow_bpm else product > high


def _qrs_hz(signal_mv_LT: np.ndarray, beats: np.ndarray, rate_hz: float) -> float:
    """The root mean square frequency of the median QRS complex, NaN with fewer than two complexes.

    It is rms(ds/dt) / (2 pi rms(s)) of the signal s in all leads together: 10 Hz for a sine of 10 Hz of any size. A
    narrow complex has a high one, 15 Hz in most adults.
    """
    half, step = round(QRS_HALF_S * rate_hz), max(1, round(QRS_STEP_S * rate_hz))
    energy_T = np.square(signal_mv_LT[:, step:] - signal_mv_LT[:, :-step]).sum(axis=0)
    energy_T = np.maximum(energy_T - 2 * np.median(energy_T), 0)  # without noise and slow waves
    cuts = []
    for beat in beats:
        start = max(beat - half // 2, 0)
        around_T = energy_T[start : beat + 2 * half]
        if around_T.any():
            centre = start + round(float(around_T @ np.arange(len(around_T)) / around_T.sum()))
            if half <= centre < signal_mv_LT.shape[1] - half:
                cuts.append(signal_mv_LT[:, centre - half : centre + half])
    if len(cuts) < 2:
        return np.nan
    beat_mv_LT = np.median(cuts, axis=0)
    beat_mv_LT -= beat_mv_LT.mean(axis=1, keepdims=True)
    slope_LT = (beat_mv_LT[:, step:] - beat_mv_LT[:, :-step]) * (rate_hz / step)
    return float(np.sqrt(np.square(slope_LT).mean() / np.square(beat_mv_LT).mean()) / (2 * np.pi))


def _mains_mv(centred_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Amplitude of the stronger of 50 and 60 Hz in each lead: the median over seconds, which ignores a burst."""
    block = int(rate_hz)
    seconds = centred_mv_LT.shape[1] // block if block else 0
    if not seconds:
        return np.zeros(len(centred_mv_LT))
    basis_TF = _mains_basis(block, rate_hz)
    if not basis_TF.size:
        return np.zeros(len(centred_mv_LT))
    parts_LNF = _blocks(centred_mv_LT, seconds, block) @ basis_TF
    power = np.square(parts_LNF).reshape(len(centred_mv_LT), seconds, -1, 3, 2).sum(axis=-1)  # at, below, above
    excess = np.median(power[..., 0] - power[..., 1:].mean(axis=-1), axis=1)
    return np.sqrt(np.maximum(excess, 0)).max(axis=-1)


@lru_cache(maxsize=8)
def _mains_basis(block: int, rate_hz: float) -> np.ndarray:
    """Hann-windowed cosines and sines of one second, at and beside the mains frequencies that the rate allows."""
    audible_hz = [hz for hz in MAINS_HZ if hz + MAINS_BESIDE_HZ < rate_hz / 2]
    beside_hz = np.array([0, -MAINS_BESIDE_HZ, MAINS_BESIDE_HZ])
    phase_FT = 2 * np.pi * np.add.outer(audible_hz, beside_hz).reshape(-1, 1) * np.arange(block) / rate_hz
    window_T = np.hanning(block + 1)[:block]
    waves_TF = np.stack([np.cos(phase_FT), np.sin(phase_FT)], axis=1).reshape(-1, block).T
    return (waves_TF * (2 / max(window_T.sum(), 1)) * window_T[:, None]).astype(np.float32)


def _wander_mv(centred_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Peak-to-peak value of each lead below `WANDER_HZ`, in the worst of its stretches of about 10 s."""
    samples = centred_mv_LT.shape[1]
    stretches = min(samples, max(1, round(samples / rate_hz / EXPECTED_S)))
    block = samples // stretches
    basis_TK = _wander_basis(block, rate_hz)
    coefficients_LNK = _blocks(centred_mv_LT, stretches, block) @ basis_TK
    slow_mv_LNT = coefficients_LNK @ (basis_TK[:: max(1, block // 100)].T * np.float32(2 / block))
    return np.ptp(slow_mv_LNT, axis=2).max(axis=1)


def _blocks(signal_mv_LT: np.ndarray, count: int, block: int) -> np.ndarray:
    """[L, N, T / N]. Three axes make small matrix products, which numpy computes in one thread without waiting."""
    return signal_mv_LT[:, : count * block].reshape(len(signal_mv_LT), count, block)


@lru_cache(maxsize=8)
def _wander_basis(block: int, rate_hz: float) -> np.ndarray:
    """Cosines up to `WANDER_HZ` over a stretch (DCT-II); they follow a slope better than a Fourier series."""
    k_K = np.arange(1, min(block, int(2 * WANDER_HZ * block / rate_hz)) + 1)
    # Column-major memory takes 0.04 ms a recording instead of 0.1.
    return np.asfortranarray(np.cos(np.pi * np.outer(np.arange(block) + 0.5, k_K) / block), dtype=np.float32)


def _extremes(signal_mv_LT: np.ndarray, rate_hz: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest value of each lead, ignoring NaN, and whether it keeps one value for a whole second."""
    n_leads, n_samples = signal_mv_LT.shape
    block = min(max(int(FLAT_S * rate_hz), 1), n_samples)
    whole = n_samples - n_samples % block
    blocks_LNT = signal_mv_LT[:, :whole].reshape(n_leads, -1, block)
    low_LN, high_LN = np.fmin.reduce(blocks_LNT, axis=2), np.fmax.reduce(blocks_LNT, axis=2)
    holds_L = (low_LN == high_LN).any(axis=1)
    rest_LT = signal_mv_LT[:, whole:]
    low_L = np.fmin.reduce(np.concatenate([low_LN, rest_LT], axis=1), axis=1)
    high_L = np.fmax.reduce(np.concatenate([high_LN, rest_LT], axis=1), axis=1)
    return low_L, high_L, holds_L


def _rails(record: Record, low_mv_L: np.ndarray, high_mv_L: np.ndarray) -> np.ndarray:
    """Which leads are cut off: exactly at the end of 16 bits, or at plateaus of an extreme value."""
    signal_mv_LT = record.signal_mv_LT
    rails_L = np.zeros(len(record.leads), dtype=bool)
    if record.uv_per_lsb_L is not None:
        counts_L = np.maximum(-low_mv_L, high_mv_L) * 1000 / record.uv_per_lsb_L
        rails_L |= (np.abs(counts_L - RAIL_COUNT) < 1.5) | np.isinf(counts_L)
    enough = RAIL_SHARE * signal_mv_LT.shape[1]
    for extreme_mv_L in (low_mv_L, high_mv_L):
        at_LT = signal_mv_LT == extreme_mv_L[:, None]
        n_at_L = np.array([np.count_nonzero(at_T) for at_T in at_LT])  # three times as fast as along an axis
        for lead in np.flatnonzero(n_at_L >= enough):
            if abs(extreme_mv_L[lead] - np.nanmean(signal_mv_LT[lead])) >= RAIL_DISTANCE_MV:
                n_on_plateaus = _on_plateaus(at_LT[lead])
                n_beside = _just_beside(signal_mv_LT[lead], extreme_mv_L[lead])
                rails_L[lead] |= n_on_plateaus >= max(enough, RAIL_EXCESS * n_beside)
    return rails_L


def _on_plateaus(at_T: np.ndarray) -> int:
    """Samples in runs of three or more, except runs at the ends of the recording."""
    edges = np.flatnonzero(np.diff(at_T, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    is_plateau = (ends - starts >= 3) & (starts > 0) & (ends < len(at_T))
    return int((ends - starts)[is_plateau].sum())


def _just_beside(signal_T: np.ndarray, extreme: float) -> int:
    """Samples that differ from the extreme value by one to three of the smallest steps in the lead.

    Example: in steps of 0.1 mV a rounded peak 0.8 0.9 1.0 1.0 1.0 0.9 0.8 has three samples at the extreme value and
    four beside it. A peak that is cut off, 0.2 0.7 1.0 1.0 1.0 0.6 0.1, has one at the most.
    """
    values = np.unique(signal_T[np.isfinite(signal_T)])
    step = np.diff(values).min(initial=np.inf)
    away_T = np.abs(signal_T - extreme)
    return int(np.count_nonzero((away_T > step / 2) & (away_T < 3.5 * step)))


def _scale_flags(record: Record, range_mv_L: np.ndarray) -> list[str]:
    """A gain per mV that is read as one per uV, or the reverse, changes every lead a thousandfold."""
    measured_L = np.array([lead not in record.derived for lead in record.leads])
    smallest, largest = range_mv_L[measured_L].min(), range_mv_L[measured_L].max()
    (low, high) = SCALE_MV
    return ["scale"] if 0.01 * low < largest < low or high < smallest < 100 * high else []


def _limb_lead_flags(record: Record) -> list[str]:
    """Checks Einthoven's and Goldberger's relations among measured leads; derived leads always fulfil them."""
    measured = {lead: row for row, lead in enumerate(record.leads) if lead not in record.derived}
    if not {"I", "II"} <= measured.keys():
        return []
    i_T, ii_T = (record.signal_mv_LT[measured[lead]] for lead in ("I", "II"))
    steps_uv = [0.0] if record.uv_per_lsb_L is None else [record.uv_per_lsb_L[row] for row in measured.values()]
    tolerance_mv = max(EINTHOVEN_MV, EINTHOVEN_STEPS * max(steps_uv) / 1000)
    expected_T = {
        lead: np.float32(of_i) * i_T + np.float32(of_ii) * ii_T for lead, (of_i, of_ii) in LIMB_FROM_I_II.items()
    }

    def agree(lead: str, other: str) -> bool:
        residual_mv_T = np.abs(record.signal_mv_LT[measured[lead]] - expected_T[other])
        return not np.fmax.reduce(residual_mv_T) > tolerance_mv  # all NaN: nothing to contradict

    wrong = {lead for lead in expected_T.keys() & measured.keys() if not agree(lead, lead)}
    if wrong == {"aVL", "aVF"} and agree("aVL", "aVF") and agree("aVF", "aVL"):
        return ["swapped:aVL-aVF"]
    return ["einthoven"] if wrong else []


def _electrode_flags(record: Record, usable_L: np.ndarray) -> list[str]:
    """Exchanged electrodes turn a lead upside down without breaking the relations among the limb leads.

    Exchanging the arms inverts I; exchanging right arm and left leg inverts II. V6 does not change and normally has the
    same direction as both.
    """
    usable = {lead: record.signal_mv_LT[row] for row, lead in enumerate(record.leads) if usable_L[row]}
    step = max(1, round(SWAPPED_STEP_S * record.rate_hz))
    if {"I", "II", "V6"} <= usable.keys() and record.signal_mv_LT.shape[1] > step:
        i_T, ii_T, v6_T = (usable[lead][step:] - usable[lead][:-step] for lead in ("I", "II", "V6"))
        v6_norm = np.sqrt(v6_T @ v6_T)
        i_v6, ii_v6 = (float(lead_T @ v6_T / (np.sqrt(lead_T @ lead_T) * v6_norm)) for lead_T in (i_T, ii_T))
        if min(i_v6, ii_v6) >= SWAPPED_CORRELATION:
            return []
        return ["swapped:arms"] if i_v6 <= ii_v6 else ["swapped:arm-leg"]
    if {"I", "aVR"} <= usable.keys():
        i_below, avr_above = SWAPPED_SKEWNESS
        if _skewness(usable["I"]) < i_below and _skewness(usable["aVR"]) > avr_above:
            return ["swapped:arms"]
    return []


def _skewness(signal_T: np.ndarray) -> float:
    centred_T = signal_T - signal_T.mean()
    square_T = centred_T * centred_T
    return float((square_T @ centred_T) / len(signal_T) / square_T.mean() ** 1.5)
