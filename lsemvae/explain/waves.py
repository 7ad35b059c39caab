"""Where the waves of a recording are: P, QRS and T of each beat, found on the signal that the model sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lsemvae.explain.beats import find_beats

WAVES = ("P", "QRS", "ST", "T", "rest")
"""The parts of time that attributions are summed over. ST is from the end of QRS to the onset of T. Each sample belongs
to exactly one of them."""
DELINEATED = ("P", "QRS", "T")
"""Those whose onset, peak and offset are found. The others are what lies between them."""


@dataclass(frozen=True)
class Delineation:
    """The beats of one window, in samples at `rate_hz`.

    wave_T    for each sample the position of its wave in `WAVES`
    edges     for P, QRS and T: onset, peak and offset of each beat, [N, 3], NaN where not found
    failures  how many of the beats lack each wave; those that the start or the end of the window cuts off count, too
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
    """The waves of one window of model input, the same for all leads. Without a beat, `reason` says why."""
    rest_T = np.full(x_LT.shape[1], WAVES.index("rest"), dtype=np.int8)
    present_LT = np.asarray(x_LT, dtype=np.float64)[np.asarray(lead_mask_L, dtype=bool)]
    if not np.isfinite(present_LT).all():
        return Delineation(rate_hz, rest_T, reason="the signal is not finite")
    used = np.flatnonzero(np.any(present_LT != 0, axis=0))  # zeros pad a short recording
    if not len(used):
        return Delineation(rate_hz, rest_T, reason="the signal is flat")
    edges = find_beats(present_LT[:, : used[-1] + 1], rate_hz)
    if not len(edges["QRS"]):
        return Delineation(rate_hz, rest_T, reason="no beat was found")
    failures = {wave: int(np.isnan(found_N3[:, 1]).sum()) for wave, found_N3 in edges.items()}
    return Delineation(rate_hz, _labelled(edges, rest_T), edges, failures)


def _labelled(edges: Mapping[str, np.ndarray], rest_T: np.ndarray) -> np.ndarray:
    """The wave of each sample. A window starts with its onset and ends before its offset."""
    wave_T = rest_T.copy()
    st_N2 = np.stack([edges["QRS"][:, 2], edges["T"][:, 0]], axis=1)
    windows = {wave: found_N3[:, ::2] for wave, found_N3 in edges.items()} | {"ST": st_N2}
    for wave, bounds_N2 in windows.items():
        for onset, offset in bounds_N2[~np.isnan(bounds_N2).any(axis=1)].astype(int):
            wave_T[onset:offset] = WAVES.index(wave)
    return wave_T
