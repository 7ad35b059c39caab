"""Occlusion: how the logit changes where a lead or a wave is taken away. It needs no gradient of the model."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsemvae.explain.attribution import START, logits
from lsemvae.explain.waves import WAVES

REST = WAVES.index("rest")
AT_ONCE = 256  # altered recordings in memory at a time


def without_leads(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor) -> np.ndarray:
    """drop_BL: the logit less the logit of the same recording without that lead; NaN for an absent lead.

    The lead is taken away as for a recording that lacks it, by the mask. A recording with one lead alone would then
    have none, which no model scores: there the lead's signal is scaled down to almost zero instead.
    """
    logit_B = logits(model, x_BLT, lead_mask_BL)
    drop_BL = np.full(lead_mask_BL.shape, np.nan, dtype=np.float32)
    for row in range(lead_mask_BL.shape[1]):
        there_B = lead_mask_BL[:, row]
        if not there_B.any():
            continue
        x_NLT, mask_NL = x_BLT[there_B], lead_mask_BL[there_B].clone()
        alone_N = mask_NL.sum(dim=1) == 1
        x_NLT[alone_N] *= START
        mask_NL[~alone_N, row] = False
        rows = torch.nonzero(there_B).flatten().cpu().numpy()
        drop_BL[rows, row] = logit_B[rows] - logits(model, x_NLT, mask_NL)
    return drop_BL


def without_waves(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, wave_BT: np.ndarray) -> np.ndarray:
    """drop_BLW: the logit less that with a wave of one lead replaced by straight lines, at all its places.

    A line joins the samples before and after the wave. `wave_BT` holds for each sample its position in `WAVES`. NaN for
    an absent lead, where the recording does not have the wave, and for "rest", which is never replaced.
    """
    drop_BLW = np.full((*lead_mask_BL.shape, len(WAVES)), np.nan, dtype=np.float32)
    logit_B = logits(model, x_BLT, lead_mask_BL)
    mask_BL = lead_mask_BL.cpu().numpy()
    waves_of = [[wave for wave in np.unique(wave_T) if wave != REST] for wave_T in wave_BT]
    cells = [
        (b, lead, wave) for b, waves in enumerate(waves_of) for lead in np.flatnonzero(mask_BL[b]) for wave in waves
    ]
    for start in range(0, len(cells), AT_ONCE):
        some = cells[start : start + AT_ONCE]
        rows = [b for b, _, _ in some]
        x_NLT = x_BLT[rows]
        for n, (b, lead, wave) in enumerate(some):
            x_NLT[n, lead] = _straight(x_BLT[b, lead], wave_BT[b] == wave)
        found_N = logits(model, x_NLT, lead_mask_BL[rows])
        for (b, lead, wave), found in zip(some, found_N, strict=True):
            drop_BLW[b, lead, wave] = logit_B[b] - found
    return drop_BLW


def _straight(x_T: Tensor, there_T: np.ndarray) -> Tensor:
    """The signal with a straight line wherever this is True; at the ends of the window, the nearest other sample."""
    at_T = np.arange(len(there_T))
    signal_T = x_T.cpu().numpy()
    if there_T.all():
        return torch.zeros_like(x_T)
    line_T = np.where(there_T, np.interp(at_T, at_T[~there_T], signal_T[~there_T]), signal_T)
    return torch.from_numpy(line_T.astype(signal_T.dtype)).to(x_T.device)
