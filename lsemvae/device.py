"""The second half of preprocessing on an accelerator: the numbers of `preprocess.finish`, for training.

The filter is linear, so over a window of fixed length it is one matrix, made by filtering the identity with the one
definition. A GPU multiplies by it faster than any CPU filters.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lsemvae.preprocess import PreprocessConfig, filter_mv


class DeviceFinish:
    """`preprocess.finish` for tensors on one device, float32: equal to it within 1e-4 of a standard deviation."""

    def __init__(self, config: PreprocessConfig, leads: Sequence[str], device: torch.device | str) -> None:
        self._config, self._leads = config, tuple(leads)
        self._filter_TT = torch.from_numpy(_operator(config)).to(device)
        self._at_T = torch.arange(config.samples, device=device)

    @torch.no_grad()
    def __call__(self, filled_mv_BLT: Tensor, nan_share_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `preprocess.Windows` holds -> x_BLT float32, lead_mask_BL, accepted_B; nothing waits for the device.

        The caller knows of records that were refused before: they are no longer among them.
        """
        config = self._config
        inside_B1T = (self._at_T < length_B[:, None]).unsqueeze(1)
        # A constant comes out as zero; without it, float32 has more digits for the rest.
        centre_BL1 = filled_mv_BLT.double().mean(dim=2, keepdim=True)
        level_BLT = (filled_mv_BLT - centre_BL1).float()
        with torch.autocast(level_BLT.device.type, enabled=False):
            filtered_mv_BLT = (level_BLT @ self._filter_TT) * inside_B1T
        count_B11 = length_B[:, None, None]
        mean_BL1 = filtered_mv_BLT.sum(dim=2, keepdim=True) / count_B11
        centred_BLT = (filtered_mv_BLT - mean_BL1) * inside_B1T
        variance_BL = centred_BLT.square().sum(dim=2) / (length_B[:, None] - 1)
        std_mv_BL = variance_BL.sqrt()
        lead_mask_BL = (nan_share_BL <= config.max_nan_share) & (std_mv_BL >= config.min_std_mv)
        enough_B = lead_mask_BL.sum(dim=1) >= max(1, config.min_lead_share * len(self._leads))
        accepted_B = enough_B & (std_mv_BL.amax(dim=1) <= config.max_std_mv)
        lead_mask_BL = lead_mask_BL & accepted_B[:, None]
        match config.scale:
            case "lead":
                x_BLT = centred_BLT / torch.where(lead_mask_BL, std_mv_BL, 1.0)[..., None]
            case "record":
                usable_B = lead_mask_BL.sum(dim=1).clamp(min=1)
                rms_B = ((variance_BL * lead_mask_BL).sum(dim=1) / usable_B).sqrt()
                x_BLT = centred_BLT / torch.where(rms_B > 0, rms_B, 1.0)[:, None, None]
            case "none":
                x_BLT = filtered_mv_BLT
        return torch.where(lead_mask_BL[..., None], x_BLT, 0.0), lead_mask_BL, accepted_B


@lru_cache(maxsize=2)
def _operator(config: PreprocessConfig) -> np.ndarray:
    """[T, T] float32, by which a row of samples is multiplied from the right: 100 MB at 5,000 samples."""
    return filter_mv(np.eye(config.samples), config).astype(np.float32)
