"""Random changes of training records that do not change what they show."""

import torch
from torch import Tensor


def hide_leads(lead_mask_BL: Tensor, share: float) -> Tensor:
    """Lead dropout: the mask with random observed leads hidden, never all of them, [B, L].

    Each record draws its own rate from U(0, 2 share), so that few observed leads are as frequent as many: at a share of
    0.5 every number of hidden leads is equally likely.
    """
    draws = torch.rand((len(lead_mask_BL), lead_mask_BL.shape[1] + 1), device=lead_mask_BL.device)
    chance_BL, rate_B1 = draws[:, 1:], 2 * share * draws[:, :1]
    kept_mask_BL = chance_BL >= rate_B1
    luckiest_B1 = chance_BL.masked_fill(~lead_mask_BL, -1.0).argmax(dim=1, keepdim=True)
    return lead_mask_BL & kept_mask_BL.scatter(1, luckiest_B1, True)


def rescaled(x_BLT: Tensor, spread: float) -> Tensor:
    """Each record times a random factor, the exponential of a normal number of this standard deviation."""
    return x_BLT * torch.exp(spread * torch.randn(len(x_BLT), 1, 1, device=x_BLT.device))


def noisy(x_BLT: Tensor, spread: float) -> Tensor:
    """White noise of this standard deviation added to the signal; zeros, which pad a recording, stay zeros."""
    return x_BLT + spread * torch.randn_like(x_BLT) * (x_BLT != 0)
