"""Occlusion: how the logit changes where a lead or a wave is taken away. It needs no gradient of the model."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsemvae.explain.waves import WAVES


@torch.inference_mode()
def without_leads(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor) -> np.ndarray:
    """drop_BL: the logit less the logit of the same recording without that lead; NaN for an absent lead.

    The lead is taken away as for a recording that lacks it, by the mask. NaN, too, where it is the only lead.
    """
    logit_B = model.logit(x_BLT, lead_mask_BL)
    drop_BL = torch.full(lead_mask_BL.shape, torch.nan)
    for row in range(lead_mask_BL.shape[1]):
        mask_BL = lead_mask_BL.clone()
        mask_BL[:, row] = False
        there_B = lead_mask_BL[:, row] & mask_BL.any(dim=1)
        if there_B.any():
            drop_BL[there_B.cpu(), row] = (logit_B - model.logit(x_BLT, mask_BL))[there_B].float().cpu()
    return drop_BL.numpy()


@torch.inference_mode()
def without_waves(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, wave_BT: np.ndarray) -> np.ndarray:
    """drop_BLW: the logit less that with the wave of one lead replaced by a straight line; NaN for an absent lead.

    `wave_BT` holds for each sample its position in `WAVES`. "rest" is never replaced: NaN.
    """
    return np.full((*lead_mask_BL.shape, len(WAVES)), np.nan, dtype=np.float32)
