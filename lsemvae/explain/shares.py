"""What of an attribution belongs to each lead and each wave: signed, and shares of the whole recording."""

import numpy as np

from lsemvae.explain.waves import WAVES


def shares(values_LT: np.ndarray, wave_T: np.ndarray) -> np.ndarray:
    """Attributions [L, T] and the wave of each sample -> signed shares [L, W], W as `WAVES`.

    A share is the sum of the cell's attributions divided by the sum of all absolute attributions of the recording. So
    no sample counts twice, and the absolute shares sum to at most 1; less where attributions of both signs cancel.
    """
    total = np.abs(values_LT).sum()
    cells = np.stack([values_LT[:, wave_T == wave].sum(axis=1) for wave in range(len(WAVES))], axis=1)
    return cells / total if total > 0 else cells
