"""What of an attribution belongs to each lead and each wave: signed, and shares of the whole recording."""

from typing import NamedTuple

import numpy as np

from lsemvae.explain.waves import WAVES


class Shares(NamedTuple):
    """Of each lead and wave, [L, W] with W as `WAVES`: shares of the sum of all absolute attributions of a recording.

    signed_LW    the sum of the cell's attributions; at most 1 in all, less where attributions of both signs cancel
    absolute_LW  the sum of their absolute values; 1 in all
    """

    signed_LW: np.ndarray
    absolute_LW: np.ndarray


def shares(values_LT: np.ndarray, wave_T: np.ndarray) -> Shares:
    """Attributions [L, T] and the wave of each sample, its position in `WAVES`. No sample counts twice."""
    total = np.abs(values_LT).sum() or 1.0

    def cells(of_LT: np.ndarray) -> np.ndarray:
        return np.stack([of_LT[:, wave_T == wave].sum(axis=1) for wave in range(len(WAVES))], axis=1) / total

    return Shares(cells(values_LT), cells(np.abs(values_LT)))
