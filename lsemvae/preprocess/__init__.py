"""The one definition of what a model sees: resample, window, interpolate, filter, scale, refuse.

Training, batch scoring and online scoring all call `preprocess`; there is no second list of transforms.
The filter is what NeuroKit2's `ecg_clean(method="neurokit")` does (a zero-phase Butterworth high-pass and a
zero-phase moving average over one mains period), called on whole arrays instead of lead by lead.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from lsemvae.errors import LsemvaeError, Refused
from lsemvae.leads import LEADS
from lsemvae.preprocess.filters import highpass, moving_average
from lsemvae.preprocess.resample import ratio, resample
from lsemvae.record import Record

PART = 4  # records filtered at once: they fit into a core's cache
MAX_MV = 1e6
"""1,000 V: a recording with a larger sample in its window is refused, whatever its leads' standard deviations."""
VERSION = 2  # raised when the numbers of some setting change, or a setting is added
READABLE = (1, 2)
"""Versions of bundles that this one gives the same numbers. Version 1 had no scale "fixed", and "record" by default."""
FIXED_MV = 0.15
"""The unit of scale "fixed": about the median root mean square of the leads of filtered resting ECGs (PTB-XL: 0.14)."""


@dataclass(frozen=True)
class PreprocessConfig:
    """How a recording becomes model input, and which recordings are refused."""

    rate_hz: int = 500
    samples: int = 5000
    """Window length. Shorter recordings are padded with zeros."""
    window: Literal["first", "cleanest", "all"] = "first"
    """Of a longer recording: its first window, the cleanest of its consecutive windows, or in scoring the mean score
    of all of them (training then uses the first)."""
    highpass_hz: float = 0.5
    highpass_order: int = 5
    mains_hz: float = 50.0
    """The moving average spans one period of this frequency; 0 turns it off."""
    scale: Literal["fixed", "record", "lead", "none"] = "fixed"
    """fixed: in units of 0.15 mV, so that a lead is the same number whichever other leads are asked for, missing or
    masked, and voltages keep their meaning. record: all leads by the root mean square of those asked for. lead:
    standardise each lead alone. none: keep mV."""
    max_nan_share: float = 0.2
    """A lead with a larger share of missing samples counts as missing."""
    min_std_mv: float = 0.001
    """A lead with a smaller standard deviation after filtering is flat and counts as missing."""
    max_std_mv: float = 10.0
    """A recording with a lead of a larger standard deviation is refused: microvolts sent as millivolts."""
    min_lead_share: float = 0.5
    """A recording with fewer usable leads than this share of the model's is refused. A model for incomplete recordings
    is trained with a lower share; 1.0 accepts complete recordings only."""
    min_seconds: float = 2.5
    min_rate_hz: float = 100.0
    max_rate_hz: float = 4000.0

    def __post_init__(self) -> None:
        if self.rate_hz < 100 or self.samples < self.rate_hz:
            raise LsemvaeError(f"rate_hz={self.rate_hz}, samples={self.samples}: need 100 Hz and 1 s at least")
        if not 0 < self.highpass_hz < self.rate_hz / 2 or self.highpass_order < 1:
            raise LsemvaeError(f"highpass_hz={self.highpass_hz}: choose it between 0 and {self.rate_hz / 2}")

    @property
    def digest(self) -> str:
        """Identifies this definition and its version: equal digests mean equal numbers."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def unit_mv(self) -> float | None:
        """What 1 is in mV in model input; None where that differs from recording to recording."""
        return {"fixed": FIXED_MV, "none": 1.0}.get(self.scale)


class Prepared(NamedTuple):
    """x_BLT float32 (zeros where a lead is absent), lead_mask_BL bool, and for each record its refusal or None."""

    x_BLT: np.ndarray
    lead_mask_BL: np.ndarray
    refused_B: list[Refused | None]

    @property
    def accepted_B(self) -> np.ndarray:
        return np.array([reason is None for reason in self.refused_B], dtype=bool)

    @classmethod
    def joined(cls, parts: "Sequence[Prepared]") -> "Prepared":
        """The records of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        x_BLT, lead_mask_BL = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return cls(x_BLT, lead_mask_BL, [reason for part in parts for reason in part.refused_B])


def preprocess(records: Sequence[Record], leads: Sequence[str], config: PreprocessConfig) -> Prepared:
    """Records of any rate, length and lead order -> model input for the named leads, in that order."""
    return preprocess_signals(
        [record.signal_for(leads) for record in records],
        [record.rate_hz for record in records],
        leads,
        config,
    )


def preprocess_signals(
    signals_mv: Sequence[np.ndarray],
    rates_hz: Sequence[float],
    leads: Sequence[str],
    config: PreprocessConfig,
) -> Prepared:
    """Like `preprocess`, from arrays [L, T] in mV with NaN where a sample is missing; T may differ by record."""
    return Prepared.joined(
        [
            finish(window_signals(signals_mv[b : b + PART], rates_hz[b : b + PART], leads, config), leads, config)
            for b in range(0, max(len(signals_mv), 1), PART)
        ]
    )


class Windows(NamedTuple):
    """Records before filtering: gaps filled, at one rate and length. An accelerator continues from here."""

    filled_mv_BLT: np.ndarray
    nan_share_BL: np.ndarray
    length_B: np.ndarray
    """Samples of the recording; the zeros after them do not count in the scale."""
    refused_B: list[Refused | None]


def window_signals(
    signals_mv: Sequence[np.ndarray],
    rates_hz: Sequence[float],
    leads: Sequence[str],
    config: PreprocessConfig,
    dtype: type[np.floating] = np.float64,
) -> Windows:
    """The first half of the definition: checks rate, length and amplitude, resamples, cuts, and fills gaps.

    Signals are float32. `dtype` is float64 for `finish`, which computes in it, and float32 for an accelerator.
    """
    shape = (len(signals_mv), len(leads), config.samples)
    window_mv_BLT = np.full(shape, np.nan, dtype=np.float32)
    length_B = np.full(len(signals_mv), config.samples)
    refused_B: list[Refused | None] = [None] * len(signals_mv)
    for b, (signal_mv_LT, rate_hz) in enumerate(zip(signals_mv, rates_hz, strict=True)):
        try:
            resampled_mv_LT = _window(signal_mv_LT, rate_hz, config)
        except Refused as reason:
            refused_B[b] = reason
            continue
        length_B[b] = resampled_mv_LT.shape[1]
        window_mv_BLT[b, :, : length_B[b]] = resampled_mv_LT

    inside_BT = np.arange(config.samples) < length_B[:, None]
    with np.errstate(invalid="ignore"):
        missing_BLT = ~np.isfinite(window_mv_BLT)
    nan_share_BL = (missing_BLT & inside_BT[:, None]).sum(2) / length_B[:, None]
    return Windows(_interpolate(window_mv_BLT, missing_BLT, dtype), nan_share_BL, length_B, refused_B)


def finish(windows: Windows, leads: Sequence[str], config: PreprocessConfig) -> Prepared:
    """The second half: filter, scale, refuse. lsemvae/preprocess/on_device.py does the same on an accelerator."""
    filled_mv_BLT, nan_share_BL, length_B, refused_B = windows
    if not refused_B:  # a batch without any record
        return Prepared(filled_mv_BLT.astype(np.float32), np.zeros(nan_share_BL.shape, dtype=bool), [])
    inside_B1T = (np.arange(config.samples) < length_B[:, None])[:, None]
    whole = bool(inside_B1T.all())
    filtered_mv_BLT = filter_mv(filled_mv_BLT, config)
    if not whole:
        filtered_mv_BLT *= inside_B1T
    mean_mv_BL1 = filtered_mv_BLT.sum(2, keepdims=True) / length_B[:, None, None]
    centred_BLT = np.subtract(filtered_mv_BLT, mean_mv_BL1, out=None if config.scale == "none" else filtered_mv_BLT)
    if not whole:
        centred_BLT *= inside_B1T
    variance_BL = np.einsum("blt,blt->bl", centred_BLT, centred_BLT) / (length_B[:, None] - 1)
    std_mv_BL = np.sqrt(variance_BL)
    lead_mask_BL = (nan_share_BL <= config.max_nan_share) & (std_mv_BL >= config.min_std_mv)

    refused_B = [
        reason or refusal(std_mv_L, lead_mask_L, leads, config)
        for reason, std_mv_L, lead_mask_L in zip(refused_B, std_mv_BL, lead_mask_BL, strict=True)
    ]
    lead_mask_BL &= np.array([reason is None for reason in refused_B], dtype=bool)[:, None]

    match config.scale:
        case "lead":
            unit_mv_BL = std_mv_BL
        case "record":
            usable_B1 = np.maximum(lead_mask_BL.sum(1, keepdims=True), 1)
            unit_mv_BL = np.sqrt((variance_BL * lead_mask_BL).sum(1, keepdims=True) / usable_B1)
        case "fixed":
            unit_mv_BL = np.full_like(std_mv_BL, FIXED_MV)
        case "none":
            centred_BLT, unit_mv_BL = filtered_mv_BLT, np.ones_like(std_mv_BL)
    factor_BL = np.divide(1.0, unit_mv_BL, where=lead_mask_BL, out=np.zeros_like(std_mv_BL))
    x_BLT = np.multiply(
        centred_BLT,
        factor_BL[..., None],
        dtype=np.float64,
        out=np.empty(centred_BLT.shape, np.float32),
        casting="same_kind",
    )
    return Prepared(x_BLT, lead_mask_BL, refused_B)


def windows(signal_mv_LT: np.ndarray, rate_hz: float, config: PreprocessConfig) -> list[np.ndarray]:
    """The consecutive windows of a recording, [L, t] each. A recording too short for two windows is one window.

    The last may be 1 % short: 30 s of a handheld at 300 Hz are 8,999 samples in some files.
    """
    length = round(rate_hz * config.samples / config.rate_hz)
    if not config.min_rate_hz <= rate_hz <= config.max_rate_hz:  # refused as a whole
        return [signal_mv_LT]
    count = int(signal_mv_LT.shape[1] / length + 0.01)
    return [signal_mv_LT[:, i * length : (i + 1) * length] for i in range(count)] if count > 1 else [signal_mv_LT]


def cleanest(signal_mv_LT: np.ndarray, rate_hz: float, config: PreprocessConfig) -> int:
    """The position of the cleanest of the consecutive windows."""
    parts = windows(signal_mv_LT, rate_hz, config)
    return min(range(len(parts)), key=lambda i: _unrest(parts[i], rate_hz))


def _unrest(signal_mv_LT: np.ndarray, rate_hz: float) -> tuple[float, float]:
    """How bad a window is, to compare windows: its share of missing samples, then wander plus fast noise in mV.

    Wander is the deviation of 1 s means. Fast noise is the median absolute second difference, which the few
    steep samples of a QRS complex do not move. Both are the median over leads.
    """
    missing_LT = ~np.isfinite(signal_mv_LT)
    filled_mv_LT = np.where(missing_LT, 0.0, signal_mv_LT)
    second = max(int(rate_hz), 1)
    whole = max(filled_mv_LT.shape[1] // second * second, 1)
    means_mv_LN = filled_mv_LT[:, :whole].reshape(len(filled_mv_LT), -1, min(second, whole)).mean(axis=2)
    noise_mv_L = np.median(np.abs(np.diff(filled_mv_LT, n=2, axis=1)), axis=1)
    return float(missing_LT.mean()), float(np.median(means_mv_LN.std(axis=1)) + np.median(noise_mv_L))


def _window(signal_mv_LT: np.ndarray, rate_hz: float, config: PreprocessConfig) -> np.ndarray:
    """Resampled and cut to at most `config.samples`. Raises Refused on the rate, the length or an impossible sample."""
    if not config.min_rate_hz <= rate_hz <= config.max_rate_hz:
        raise Refused(
            "rate",
            f"the rate is {rate_hz:g} Hz: from {config.min_rate_hz:g} to {config.max_rate_hz:g} can be used",
        )
    seconds = signal_mv_LT.shape[1] / rate_hz
    if seconds < config.min_seconds:
        raise Refused("too_short", f"the recording lasts {seconds:.2f} s: {config.min_seconds:g} s are needed")
    if config.window == "cleanest":
        signal_mv_LT = windows(signal_mv_LT, rate_hz, config)[cleanest(signal_mv_LT, rate_hz, config)]
    if ratio(rate_hz, config.rate_hz) == (1, 1):
        return _checked(signal_mv_LT[:, : config.samples])
    # One second more than the window, so that the window does not contain the filter's edge.
    needed = int(np.ceil((config.samples / config.rate_hz + 1) * rate_hz))
    part_mv_LT = _checked(signal_mv_LT[:, :needed])
    missing_LT = ~np.isfinite(part_mv_LT)
    filled_mv_LT = _interpolate(part_mv_LT[None], missing_LT[None])[0]
    return resample(filled_mv_LT, missing_LT, rate_hz, config.rate_hz)[:, : config.samples]


def _checked(signal_mv_LT: np.ndarray) -> np.ndarray:
    """The signal itself; raises Refused where a sample is beyond `MAX_MV` or infinite."""
    largest_mv = max(np.fmax.reduce(signal_mv_LT, axis=None), -np.fmin.reduce(signal_mv_LT, axis=None))
    if largest_mv > MAX_MV:
        raise Refused("amplitude", f"a sample is {largest_mv:.3g} mV: check the unit, and leave out what is no number")
    return signal_mv_LT


def _interpolate(signal_BLT: np.ndarray, missing_BLT: np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """A copy with gaps filled: linearly, at the ends by the nearest value, in a row without samples by zeros."""
    filled_BLT = signal_BLT.astype(dtype)
    for b, lead in zip(*np.nonzero(missing_BLT.any(axis=2)), strict=True):
        missing_T = missing_BLT[b, lead]
        if missing_T.all():
            filled_BLT[b, lead] = 0.0
            continue
        at = np.arange(missing_T.size)
        filled_BLT[b, lead, missing_T] = np.interp(at[missing_T], at[~missing_T], filled_BLT[b, lead, ~missing_T])
    return filled_BLT


def filter_mv(signal_mv_BLT: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """Zero-phase high-pass and moving average along time. Both are linear, so they are a matrix over a window."""
    filtered_mv_BLT = highpass(signal_mv_BLT, config.highpass_order, config.highpass_hz, config.rate_hz)
    return moving_average(filtered_mv_BLT, averaged_samples(config))


def averaged_samples(config: PreprocessConfig) -> int:
    """Samples of the moving average: one period of the mains."""
    return int(config.rate_hz / config.mains_hz) if config.mains_hz > 0 else 1


def refusal(
    std_mv_L: np.ndarray, lead_mask_L: np.ndarray, leads: Sequence[str], config: PreprocessConfig
) -> Refused | None:
    """Why a filtered record is refused, if it is: from its leads' standard deviations and the mask of usable leads."""
    loudest = int(np.argmax(std_mv_L))
    if std_mv_L[loudest] > config.max_std_mv:
        return Refused(
            "amplitude",
            f"lead {leads[loudest]} varies by {std_mv_L[loudest]:.0f} mV (standard deviation), "
            f"{config.max_std_mv:g} is the limit: are these microvolts?",
        )
    if lead_mask_L.sum() < max(1, config.min_lead_share * len(leads)):
        unusable = ", ".join(lead for lead, usable in zip(leads, lead_mask_L, strict=True) if not usable)
        return Refused(
            "leads",
            f"{int(lead_mask_L.sum())} of {len(leads)} leads can be used; missing, flat or mostly NaN: {unusable}",
        )
    return None


def lead_positions(leads: Sequence[str]) -> list[int]:
    """The rows of the named leads in arrays that hold all twelve in the fixed order, as the shards do."""
    return [LEADS.index(lead) for lead in leads]
