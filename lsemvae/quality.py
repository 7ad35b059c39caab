"""What is doubtful about a recording, as short flags. Nothing is refused here: `preprocess` decides.

    nan:LEAD           samples are missing
    flat:LEAD          the lead holds one value for a second, or hardly moves at all
    rail:LEAD          it is cut off: at the ends of 16 bits, or at plateaus of its own extreme values
    out_of_range:LEAD  it exceeds 10 mV: an artefact, or microvolts sent as millivolts
    einthoven          the limb leads contradict each other, so at least one of them is wrong
    swapped:aVL-aVF    they contradict each other in a way that exchanging these two mends
    swapped:arms       lead I looks upside down: arm electrodes exchanged, dextrocardia, or an extreme axis
    length, rate       it does not last 10 s, or does not have 500 samples a second

The limits were set on 500 recordings of PTB-XL and 200 of LUDB; what each flags there is said beside it.
"""

import numpy as np

from lsemvae.record import Record

EXPECTED_S = 10.0
LENGTH_TOLERANCE_S = 0.1
EXPECTED_HZ = 500.0

MAX_NAN_SHARE = 0.0
"""Any missing sample is flagged; how many are too many, `preprocess` says."""

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

SWAPPED_CORRELATION = -0.5
"""Of lead I with V6. Flags 3 of 700 recordings, and 83 % of them once their arm leads are exchanged."""
SWAPPED_SKEWNESS = (-1.0, 0.5)
"""Without V6: lead I below, aVR above. Flags 1 of 700, and 62 % of them once the arms are exchanged."""


def quality_flags(record: Record) -> tuple[str, ...]:
    """Flags in the order of the list above; those of `record.flags` are not repeated. 0.2 ms."""
    signal_mv_LT = record.signal_mv_LT
    nan_share_L = 1 - np.isfinite(signal_mv_LT).mean(axis=1)
    low_mv_L, high_mv_L, holds_L = _extremes(signal_mv_LT, record.rate_hz)
    flat_L = holds_L | (high_mv_L - low_mv_L < FLAT_MV)
    beyond_L = np.maximum(-low_mv_L, high_mv_L) > MAX_AMPLITUDE_MV
    rail_L = _rails(record, low_mv_L, high_mv_L) & ~flat_L

    flags = []
    kinds = {"nan": nan_share_L > MAX_NAN_SHARE, "flat": flat_L, "rail": rail_L, "out_of_range": beyond_L}
    for kind, flagged_L in kinds.items():
        flags += [f"{kind}:{lead}" for lead, flagged in zip(record.leads, flagged_L, strict=True) if flagged]
    flags += _limb_lead_flags(record)
    if _arms_look_swapped(record, usable_L=~flat_L & (nan_share_L == 0)):
        flags.append("swapped:arms")
    if abs(signal_mv_LT.shape[1] / record.rate_hz - EXPECTED_S) > LENGTH_TOLERANCE_S:
        flags.append("length")
    if record.rate_hz != EXPECTED_HZ:
        flags.append("rate")
    return tuple(flags)


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
        for lead in np.flatnonzero(np.count_nonzero(at_LT, axis=1) >= enough):
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
        "III": ii_T - i_T,
        "aVR": (i_T + ii_T) * np.float32(-0.5),
        "aVL": i_T - ii_T * np.float32(0.5),
        "aVF": ii_T - i_T * np.float32(0.5),
    }

    def agree(lead: str, other: str) -> bool:
        residual_mv_T = np.abs(record.signal_mv_LT[measured[lead]] - expected_T[other])
        return not np.fmax.reduce(residual_mv_T) > tolerance_mv  # all NaN: nothing to contradict

    wrong = {lead for lead in expected_T.keys() & measured.keys() if not agree(lead, lead)}
    if wrong == {"aVL", "aVF"} and agree("aVL", "aVF") and agree("aVF", "aVL"):
        return ["swapped:aVL-aVF"]
    return ["einthoven"] if wrong else []


def _arms_look_swapped(record: Record, usable_L: np.ndarray) -> bool:
    """Exchanged arm electrodes turn lead I upside down, and every relation among the limb leads still holds.

    V6, which they do not touch, looks at the heart from the same side as I.
    """
    usable = {lead: record.signal_mv_LT[row] for row, lead in enumerate(record.leads) if usable_L[row]}
    if {"I", "V6"} <= usable.keys():
        i_T, v6_T = usable["I"] - usable["I"].mean(), usable["V6"] - usable["V6"].mean()
        return bool(i_T @ v6_T < SWAPPED_CORRELATION * np.sqrt((i_T @ i_T) * (v6_T @ v6_T)))
    if {"I", "aVR"} <= usable.keys():
        i_below, avr_above = SWAPPED_SKEWNESS
        return bool(_skewness(usable["I"]) < i_below and _skewness(usable["aVR"]) > avr_above)
    return False


def _skewness(signal_T: np.ndarray) -> float:
    centred_T = signal_T - signal_T.mean()
    square_T = centred_T * centred_T
    return float((square_T @ centred_T) / len(signal_T) / square_T.mean() ** 1.5)
