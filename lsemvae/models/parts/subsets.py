"""Random subsets of a record's observed leads, chosen by one normal number, and the product of the experts in each.

A subset of n leads is a number from 1 to 2^n - 1, whose binary digits say which of the observed leads belong to it:
with I, III and V1 observed, 5 = 101 in binary is {I, V1}.

Several choices of a record are spread evenly (systematic sampling). Of N equally likely ones, choice s of S is
floor(u N + s N / S) mod N, with u = Phi(noise) uniform. So each choice alone is uniform, an average over them has the
expectation of the average over all N, and for S = N every one is chosen exactly once. Example: N = 7, S = 3 and u = 0.5
give floor(3.5), floor(5.83) and floor(8.17) mod 7, which are 3, 5 and 1.
"""

import torch
from torch import Tensor

from lsemvae.models.parts.fusion import Gaussian, product_of_experts


def random_subsets(noise_B: Tensor, count: int, lead_mask_BL: Tensor) -> Tensor:
    """So many non-empty subsets of each record's observed leads, [B, S, L] bool; empty where none is observed."""
    number_BS = 1 + _choices(noise_B, count, 2 ** lead_mask_BL.sum(dim=1) - 1)
    digit_BSL = number_BS.unsqueeze(-1) >> _place(lead_mask_BL).clamp(min=0).unsqueeze(1) & 1
    return digit_BSL.bool() & lead_mask_BL.unsqueeze(1)


def random_leads(noise_B: Tensor, count: int, lead_mask_BL: Tensor) -> Tensor:
    """So many of each record's observed leads, as rows, [B, S]; row 0 where none is observed."""
    place_BS = _choices(noise_B, count, lead_mask_BL.sum(dim=1))
    chosen_BSL = (_place(lead_mask_BL).unsqueeze(1) == place_BS.unsqueeze(-1)) & lead_mask_BL.unsqueeze(1)
    return chosen_BSL.to(torch.uint8).argmax(dim=-1)


def _place(lead_mask_BL: Tensor) -> Tensor:
    """The place of each observed lead among the observed ones, from 0."""
    return lead_mask_BL.cumsum(dim=1) - 1


def _choices(noise_B: Tensor, count: int, size_B: Tensor) -> Tensor:
    """Numbers from 0 to below `size_B`, [B, S]."""
    size_B1 = size_B.clamp(min=1).unsqueeze(1)
    share_B1 = torch.special.ndtr(noise_B.double()).unsqueeze(1)
    at_S = torch.arange(count, device=size_B.device)
    return (share_B1 * size_B1 + size_B1 * at_S / count).long() % size_B1


def products(mu_BLD: Tensor, logvar_BLD: Tensor, mask_BSL: Tensor) -> Gaussian:
    """The product of the experts in each subset, [B, S, D]. An empty one gives N(0, I)."""
    records, count = mask_BSL.shape[:2]
    mu, logvar = (values.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1) for values in (mu_BLD, logvar_BLD))
    mu, logvar = product_of_experts(mu, logvar, mask_BSL.flatten(0, 1))
    return Gaussian(mu.unflatten(0, (records, count)), logvar.unflatten(0, (records, count)))
