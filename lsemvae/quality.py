"""What is doubtful about a recording, as short flags. Nothing is refused here: `preprocess` decides.

A flag is a kind, or a kind and a lead, such as "nan:V1" or "swapped:arms". `FLAGS` says what each kind means. The
limits were set on 500 recordings of PTB-XL and 200 of LUDB; what each flags there is said beside it.
"""

from functools import lru_cache

import numpy as np

from lsemvae.leads import LIMB_FROM_I_II
from lsemvae.record import Record

FLAGS = {
    "nan": "Samples are missing.",
    "flat": "The lead holds one value for a second, or hardly moves at all.",
    "rail": "The lead is cut off: at the ends of 16 bits, or at plateaus of its own extreme values.",
    "out_of_range": "The lead exceeds 10 mV: an artefact, or microvolts taken for millivolts.",
    "mains": "A hum of 50 or 60 Hz goes through the lead, 0.05 mV or more from peak to peak.",
    "wander": "The baseline of the lead wanders by 2 mV or more, slower than 0.5 Hz.",
    "einthoven": "The limb leads contradict each other, so at least one of them is wrong.",
    "swapped:aVL-aVF": "aVL and aVF contradict the other limb leads in a way that exchanging the two mends.",
    "swapped:arms": "Lead I looks upside down: arm electrodes exchanged, dextrocardia, or an extreme right axis, which "
    "pulmonary hypertension can cause. No reason to leave a recording out.",
    "swapped:arm-leg": "Lead II looks upside down: right arm and left leg electrodes exchanged, or an extreme left "
    "axis. No reason to leave a recording out.",
    "length": "The recording does not last 10 s.",
    "rate": "The recording does not have 500 samples a second.",
    "checksum": "The samples do not have the checksum that the file gives: some may have been altered.",
    "enhanced": "Only the recording that the app has filtered is there, not the raw one.",
}
"""Kind -> what it means, for `quality_flags` and what readers notice; where kinds share a word, kind:detail."""

EXPECTED_S = 10.0
LENGTH_TOLERANCE_S = 0.1
EXPECTED_HZ = 500.0

FLAT_S = 1.0
"""One value through a whole second, counted from the start. The longest hold in 700 recordings is 0.58 s."""
FLAT_MV = 0.03
"""Peak to peak; the smallest lead in 700 recordings has 0.235 mV."""

RAIL_COUNT = 32767
"""16 bits: a lead whose recorder has a known step reaches this count only when it is cut off."""
RAIL_SHARE = 0.005
RAIL_DISTANCE_MV = 0.5
"""Plateaus (three equal samples or more) at the extreme value, this far from the mean, with this share of the
samples. Held ends do not count, PTB-XL's are padded. Flags 1 of 700 recordings."""

MAX_AMPLITUDE_MV = 10.0
"""Flags 1 of 700 recordings."""

EINTHOVEN_MV = 0.025
"""I + III - II reaches 20 uV where each lead is rounded to 5 uV; the augmented leads less. Flags 1 of 700."""
EINTHOVEN_STEPS = 4.0
"""The same for coarser recorders: four times the largest step of the leads compared."""

MAINS_HZ = (50.0, 60.0)
MAINS_MV = 0.025
"""Amplitude, half of peak to peak. Flags 1 of 700 recordings."""
MAINS_BESIDE_HZ = 4.0
"""What a lead has this far from the mains on either side it has at the mains too: QRS complexes and muscle."""

WANDER_HZ = 0.5
WANDER_MV = 2.0
"""Peak to peak: 20 mm of paper. Flags 35 of 700 recordings (5 %); 1 mV would flag 110."""

SWAPPED_CORRELATION = -0.5
"""Of the steepness of lead I, or II, with that of V6. `swapped:arms` flags 2 of 700 recordings and 90 % of them
once their arm leads are exchanged, `swapped:arm-leg` 1 and 94 % with right arm and left leg exchanged."""
SWAPPED_STEP_S = 0.01
"""Steepness is the change over this time: the QRS complexes count, the baseline does not."""
SWAPPED_SKEWNESS = (-1.0, 0.5)
"""Without V6: lead I below, aVR above. Flags 1 of 700, and 62 % of them once the arms are exchanged."""

BEAT_REFRACTORY_S = 0.25
BEAT_MIN_HZ = 100.0


@np.errstate(invalid="ignore")  # an infinite sample counts as missing
def quality_flags(record: Record) -> tuple[str, ...]:
    """Flags in the order of `FLAGS`; those of `record.flags` are not repeated. 0.3 ms.

    Two exchanges of electrodes are not looked for. Left arm with left leg: the best rule tried, limb leads
    predicted from chest leads, found 23 % at 1.4 % false alarms. The right leg with another: lead I, II or III
    nearly vanishes, which `flat` says where it does so wholly; no recording here has that electrode to exchange.
    """
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

    flags = []
    kinds = {
        "nan": ~complete_L,  # any missing sample; how many are too many, `preprocess` says
        "flat": flat_L,
        "rail": rail_L,
        "out_of_range": beyond_L,
        "mains": ~flat_L & (_mains_mv(centred_mv_LT, record.rate_hz) > MAINS_MV),
        "wander": ~flat_L & (_wander_mv(centred_mv_LT, record.rate_hz) > WANDER_MV),
    }
    for kind, flagged_L in kinds.items():
        flags += [f"{kind}:{lead}" for lead, flagged in zip(record.leads, flagged_L, strict=True) if flagged]
    flags += _limb_lead_flags(record)
    flags += _electrode_flags(record, usable_L=~flat_L & complete_L)
    if abs(signal_mv_LT.shape[1] / record.rate_hz - EXPECTED_S) > LENGTH_TOLERANCE_S:
        flags.append("length")
    if record.rate_hz != EXPECTED_HZ:
        flags.append("rate")
    return tuple(flags)


def heart_rate_bpm(record: Record) -> float:
    """An estimate: 60 s over the median time between QRS complexes, NaN with fewer than three of them.

    A complex is where the change over 20 ms, summed over the measured leads and averaged over 0.1 s, exceeds half
    of what it usually peaks at (the median of its highest value in each 2 s). Leads with NaN are left out; below
    100 samples a second there is no estimate. On 199 of LUDB's 200 recordings it is within 5 % of the rate of the
    annotated beats.
    """
    measured_L = np.array([lead not in record.derived for lead in record.leads])
    signal_mv_LT = record.signal_mv_LT[measured_L & np.isfinite(record.signal_mv_LT).all(axis=1)]
    step, width, window = (round(seconds * record.rate_hz) for seconds in (0.02, 0.1, 2.0))
    if not len(signal_mv_LT) or record.rate_hz < BEAT_MIN_HZ or signal_mv_LT.shape[1] < window + step + width:
        return np.nan
    change_T = np.abs(signal_mv_LT[:, step:] - signal_mv_LT[:, :-step]).sum(axis=0, dtype=np.float64)
    total_T = np.concatenate([[0.0], np.cumsum(change_T)])
    smooth_T = (total_T[width:] - total_T[:-width]) / width
    peaks_N = smooth_T[: len(smooth_T) // window * window].reshape(-1, window).max(axis=1)
    edges = np.flatnonzero(np.diff(smooth_T > np.median(peaks_N) / 2, prepend=False, append=False))
    rises, falls = edges[::2], edges[1::2]
    beats = [rises[0]] if len(rises) else []
    for rise, fall_before in zip(rises[1:], falls[:-1], strict=True):
        if rise - fall_before >= 0.02 * record.rate_hz and rise - beats[-1] >= BEAT_REFRACTORY_S * record.rate_hz:
            beats.append(rise)
    return float(60 * record.rate_hz / np.median(np.diff(beats))) if len(beats) >= 3 else np.nan


def _mains_mv(centred_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Amplitude of the louder of 50 and 60 Hz in each lead: the median of its seconds, so a burst does not count."""
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
    """Hann-windowed cosines and sines of a second, at the mains and on both sides, where the rate allows it."""
    audible_hz = [hz for hz in MAINS_HZ if hz + MAINS_BESIDE_HZ < rate_hz / 2]
    beside_hz = np.array([0, -MAINS_BESIDE_HZ, MAINS_BESIDE_HZ])
    phase_FT = 2 * np.pi * np.add.outer(audible_hz, beside_hz).reshape(-1, 1) * np.arange(block) / rate_hz
    window_T = np.hanning(block + 1)[:block]
    waves_TF = np.stack([np.cos(phase_FT), np.sin(phase_FT)], axis=1).reshape(-1, block).T
    return (waves_TF * (2 / max(window_T.sum(), 1)) * window_T[:, None]).astype(np.float32)


def _wander_mv(centred_mv_LT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Peak to peak of each lead's part below `WANDER_HZ`, in the worst of its stretches of about 10 s."""
    samples = centred_mv_LT.shape[1]
    stretches = min(samples, max(1, round(samples / rate_hz / EXPECTED_S)))
    block = samples // stretches
    basis_TK = _wander_basis(block, rate_hz)
    coefficients_LNK = _blocks(centred_mv_LT, stretches, block) @ basis_TK
    slow_mv_LNT = coefficients_LNK @ (basis_TK[:: max(1, block // 100)].T * np.float32(2 / block))
    return np.ptp(slow_mv_LNT, axis=2).max(axis=1)


def _blocks(signal_mv_LT: np.ndarray, count: int, block: int) -> np.ndarray:
    """[L, N, T / N]: three axes, because products small enough for one thread do not wait for others."""
    return signal_mv_LT[:, : count * block].reshape(len(signal_mv_LT), count, block)


@lru_cache(maxsize=8)
def _wander_basis(block: int, rate_hz: float) -> np.ndarray:
    """Cosines of up to `WANDER_HZ` over a stretch (DCT-II), which follow a slope better than a Fourier series."""
    k_K = np.arange(1, min(block, int(2 * WANDER_HZ * block / rate_hz)) + 1)
    # Column by column in memory: 0.04 ms a recording in place of 0.1.
    return np.asfortranarray(np.cos(np.pi * np.outer(np.arange(block) + 0.5, k_K) / block), dtype=np.float32)


def _extremes(signal_mv_LT: np.ndarray, rate_hz: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest value of each lead, NaN apart, and whether it holds one for a whole second."""
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
    signal_mv_LT = record.signal_mv_LT
    rails_L = np.zeros(len(record.leads), dtype=bool)
    if record.uv_per_lsb_L is not None:
        rails_L |= np.maximum(-low_mv_L, high_mv_L) * 1000 > (RAIL_COUNT - 0.5) * record.uv_per_lsb_L
    enough = RAIL_SHARE * signal_mv_LT.shape[1]
    for extreme_mv_L in (low_mv_L, high_mv_L):
        at_LT = signal_mv_LT == extreme_mv_L[:, None]
        n_at_L = np.array([np.count_nonzero(at_T) for at_T in at_LT])  # three times as fast as along an axis
        for lead in np.flatnonzero(n_at_L >= enough):
            if abs(extreme_mv_L[lead] - np.nanmean(signal_mv_LT[lead])) < RAIL_DISTANCE_MV:
                continue
            edges = np.flatnonzero(np.diff(at_LT[lead], prepend=False, append=False))
            starts, ends = edges[::2], edges[1::2]
            plateau = (ends - starts >= 3) & (starts > 0) & (ends < signal_mv_LT.shape[1])
            rails_L[lead] |= (ends - starts)[plateau].sum() >= enough
    return rails_L


def _limb_lead_flags(record: Record) -> list[str]:
    """Einthoven's and Goldberger's relations among measured leads; derived ones fulfil them anyway."""
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
    """Exchanged electrodes turn a lead upside down, and every relation among the limb leads still holds.

    The arms turn I over; right arm and left leg turn II over. V6, which they do not touch, looks at the heart from
    the same side as both.
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
