"""Where the waves of a recording are: P, QRS and T, from NeuroKit2, found on the signal that the model sees."""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

WAVES = ("P", "QRS", "ST", "T", "rest")
"""The parts of time that attributions are summed over. ST is from the end of QRS to the onset of T. Each sample belongs
to exactly one of them."""


@dataclass(frozen=True)
class Delineation:
    """The beats of one window, in samples at `rate_hz`.

    wave_T    for each sample the position of its wave in `WAVES`
    edges     for P, QRS and T: onset, peak and offset of each beat, [N, 3], NaN where not found
    failures  how many of the beats lack each wave, and why no beat was found
    """

    rate_hz: float
    wave_T: np.ndarray
    edges: Mapping[str, np.ndarray] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    """Why there is no beat; None where there are beats."""

    @property
    def beats(self) -> int:
        """N."""
        return len(self.edges["QRS"]) if "QRS" in self.edges else 0


def delineate(x_LT: np.ndarray, lead_mask_L: np.ndarray, leads: Sequence[str], rate_hz: float) -> Delineation:
    """The waves of one window of model input. It never raises: without a beat, `reason` says why."""
    rest_T = np.full(x_LT.shape[1], WAVES.index("rest"), dtype=np.int8)
    try:
        import neurokit2
    except ImportError:
        return Delineation(rate_hz, rest_T, reason="NeuroKit2 is not installed: pip install 'lsemvae[explain]'")
    present_LT = x_LT[lead_mask_L].astype(np.float64)
    length = int(np.flatnonzero(np.any(present_LT != 0, axis=0)).max(initial=-1)) + 1
    edges: dict[str, np.ndarray] = {}
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # NeuroKit2 raises many things for signals of noise
        warnings.simplefilter("ignore")
        edges = _edges(neurokit2, present_LT[:, :length], rate_hz)
    if not edges or not len(edges["QRS"]):
        return Delineation(rate_hz, rest_T, reason="no beat was found")
    failures = {wave: int(np.isnan(found_N3).any(axis=1).sum()) for wave, found_N3 in edges.items()}
    return Delineation(rate_hz, _labelled(edges, rest_T), edges, failures)


def _edges(neurokit2: ModuleType, x_LT: np.ndarray, rate_hz: float) -> dict[str, np.ndarray]:
    """Onset, peak and offset of each wave of each beat: R peaks from all leads together, the rest from the median."""
    _, found = neurokit2.ecg_peaks(np.sqrt(np.mean(x_LT**2, axis=0)), sampling_rate=int(rate_hz))
    r_N = np.asarray(found["ECG_R_Peaks"], dtype=int)
    each: dict[str, list[np.ndarray]] = {"P": [], "QRS": [], "T": []}
    for x_T in x_LT:
        with contextlib.suppress(Exception):
            _, marks = neurokit2.ecg_delineate(x_T, r_N, sampling_rate=int(rate_hz), method="prominence")
            for wave, name in (("P", "P"), ("QRS", "R"), ("T", "T")):
                names = [f"ECG_{name}_{mark}" for mark in ("Onsets", "Peaks", "Offsets")]
                columns = [r_N if part == "ECG_R_Peaks" else np.asarray(marks[part], dtype=float) for part in names]
                each[wave].append(np.stack(columns, axis=1))
    return {wave: np.nanmedian(np.stack(found_N3), axis=0) for wave, found_N3 in each.items()}


def _labelled(edges: Mapping[str, np.ndarray], rest_T: np.ndarray) -> np.ndarray:
    """The wave of each sample. Where windows overlap, QRS goes before T, and T before P."""
    wave_T = rest_T.copy()
    ends_N2 = np.stack([edges["QRS"][:, 2], edges["T"][:, 0]], axis=1)
    for wave, bounds_N2 in (
        ("ST", ends_N2),
        ("P", edges["P"][:, ::2]),
        ("T", edges["T"][:, ::2]),
        ("QRS", edges["QRS"][:, ::2]),
    ):
        for start, end in bounds_N2[~np.isnan(bounds_N2).any(axis=1)]:
            wave_T[int(start) : int(end)] = WAVES.index(wave)
    return wave_T
