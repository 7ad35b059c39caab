"""The second half of preprocessing on an accelerator: the numbers of `preprocess.finish`, for training.

The filter is linear, so over a window of fixed length it is a matrix. `lsemvae.preprocess.filters` factors it into
three small matrices and a band, which needs a fiftieth of the arithmetic. Where there is no such factorisation, the
whole matrix is used, made by filtering the identity with the one definition.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lsemvae.preprocess import FIXED_MV, PreprocessConfig, averaged_samples, filter_mv
from lsemvae.preprocess.filters import AVERAGED, slow_part, triangle

WINDOW_FIELDS = ("filled_mv_BLT", "nan_share_BL", "length_B")
"""The fields of a batch that `DeviceFinish.batch` turns into model input."""


class DeviceFinish:
    """`preprocess.finish` for tensors on one device, float32: equal to it within 1e-4 of a standard deviation."""

    def __init__(self, config: PreprocessConfig, leads: Sequence[str], device: torch.device | str) -> None:
        self._config, self._leads = config, tuple(leads)
        self._at_T = torch.arange(config.samples, device=device)
        self._taps = averaged_samples(config)

        def here(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)

        slow = slow_part(config.highpass_order, config.highpass_hz, config.rate_hz, config.samples)
        self._slow: tuple[Tensor, Tensor, Tensor] | None = None
        if slow is None:
            self._filter_TT = here(_operator(config))
        else:
            self._slow, self._edge = (here(slow.basis_KP), here(slow.into_CR), here(slow.out_RC)), slow.edge
            self._triangle = here(triangle(self._taps)) if self._taps > 1 else None

    @torch.no_grad()
    def __call__(self, filled_mv_BLT: Tensor, nan_share_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `preprocess.Windows` -> x_BLT float32, lead_mask_BL, accepted_B. Does not wait for the device.

        Records that `window_signals` refused are not known here: the caller leaves them out.
        """
        config = self._config
        inside_B1T = (self._at_T < length_B[:, None]).unsqueeze(1)
        # The filter turns a constant into zero; without it, float32 has more digits for the rest.
        centre_BL1 = filled_mv_BLT.double().mean(dim=2, keepdim=True)
        level_BLT = (filled_mv_BLT - centre_BL1).float()
        with torch.autocast(level_BLT.device.type, enabled=False):
            filtered_mv_BLT = self._filter(level_BLT) * inside_B1T
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
            case "fixed":
                x_BLT = centred_BLT / FIXED_MV
            case "none":
                x_BLT = filtered_mv_BLT
        return torch.where(lead_mask_BL[..., None], x_BLT, 0.0), lead_mask_BL, accepted_B

    def batch(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """A feed's batch of windows -> a batch of model input. A refused record gets weight 0 and a full lead mask."""
        rest = {name: values for name, values in rows.items() if name not in WINDOW_FIELDS}
        x_BLT, lead_mask_BL, accepted_B = self(*(rows[name] for name in WINDOW_FIELDS))
        accepted_B = accepted_B & (rest["weight_B"] > 0)
        return rest | {
            "x_BLT": torch.where(accepted_B[:, None, None], x_BLT, 0.0),
            "lead_mask_BL": lead_mask_BL | ~accepted_B[:, None],
            "weight_B": rest["weight_B"] * accepted_B,
        }

    def _filter(self, level_BLT: Tensor) -> Tensor:
        """`preprocess.filter_mv`."""
        if self._slow is None:
            return level_BLT @ self._filter_TT
        basis_KP, into_CR, out_RC = self._slow
        shape, samples, block = level_BLT.shape[:2], level_BLT.shape[2], len(basis_KP)
        whole_BLT = functional.pad(level_BLT, (0, -samples % block))
        described_BLC = (whole_BLT.reshape(*shape, -1, block) @ basis_KP).flatten(2)
        ends = [level_BLT[..., : self._edge], level_BLT[..., -self._edge :]]
        taken_BLC = torch.cat([described_BLC, *ends], dim=2) @ into_CR @ out_RC
        slow_BLT = (taken_BLC.reshape(*shape, -1, basis_KP.shape[1]) @ basis_KP.T).flatten(2)[..., :samples]
        fast_BLT = level_BLT - slow_BLT
        return fast_BLT if self._triangle is None else self._average(fast_BLT, self._triangle)

    def _average(self, x_BLT: Tensor, triangle: Tensor) -> Tensor:
        """`filters.moving_average`, as products of blocks: a convolution may round to TF32 on a GPU."""
        samples, edge = x_BLT.shape[2], self._taps - 1
        before = 2 * x_BLT[..., :1] - x_BLT[..., 1 : edge + 1].flip(2)
        after = 2 * x_BLT[..., -1:] - x_BLT[..., -edge - 1 : -1].flip(2)
        padded = functional.pad(torch.cat([before, x_BLT, after], dim=2), (0, -samples % AVERAGED))
        return (padded.unfold(2, AVERAGED + 2 * edge, AVERAGED) @ triangle).flatten(2)[..., :samples]


@lru_cache(maxsize=2)
def _operator(config: PreprocessConfig) -> np.ndarray:
    """[T, T] float32, by which rows of samples are multiplied from the right: 100 MB at 5,000 samples."""
    return filter_mv(np.eye(config.samples), config).astype(np.float32)
