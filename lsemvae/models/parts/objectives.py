"""What is minimised: the paper's ELBO and alignment, the released code's objective, the focal loss.

Every function returns one value a record, in float32 or better, and is averaged over the batch by its caller.
Masked values are replaced before any arithmetic, so they have no effect and their gradient is zero.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts.fusion import full_precision


class NonFiniteBatch(LsemvaeError):
    """NaN or infinity in a batch or in its loss. `positions` are the rows of the batch that have it."""

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:  # the default is for unpickling
        super().__init__(message)
        self.positions = tuple(positions)


def squared_error(prediction_BLT: Tensor, target_BLT: Tensor, target_mask_BL: Tensor) -> Tensor:
    """Mean squared error over time of each lead, [B, L]: MSE_i of eq. 2; zero where a lead is no target."""
    mask_BL1 = target_mask_BL.unsqueeze(-1)
    difference_BLT = full_precision(prediction_BLT) - full_precision(target_BLT)
    return torch.where(mask_BL1, difference_BLT, torch.zeros_like(difference_BLT)).square().mean(dim=-1)


def reconstruction(
    prediction_BLT: Tensor, target_BLT: Tensor, target_mask_BL: Tensor, weight_L: Tensor | float = 1.0
) -> Tensor:
    """sum_i lambda_i MSE_i over the leads that are targets, [B]: the first term of eq. 2."""
    return (weight_L * squared_error(prediction_BLT, target_BLT, target_mask_BL)).sum(dim=-1)


def kl_to_prior(mu_BD: Tensor, logvar_BD: Tensor) -> Tensor:
    """KL(N(mu, s^2) || N(0, I)) of each latent unit, in nats, [B, D]; its sum over D stands in eq. 2.

    1/2 (mu^2 + s^2 - 1 - log s^2). Overflows float32 above a log-variance of 88, which `finite_records` notices.
    """
    mu_BD, logvar_BD = full_precision(mu_BD), full_precision(logvar_BD)
    return 0.5 * (mu_BD.square() + (torch.expm1(logvar_BD) - logvar_BD))


def alignment(expert_mu_BKD: Tensor, expert_mask_BK: Tensor, mu_BD: Tensor) -> Tensor:
    """(1/K) sum_k ||mu_k - mu||_2^2 over the K observed experts, [B]: eq. 1 without its factor gamma."""
    distance_BKD = full_precision(expert_mu_BKD) - full_precision(mu_BD).unsqueeze(1)
    distance_BKD = torch.where(expert_mask_BK.unsqueeze(-1), distance_BKD, torch.zeros_like(distance_BKD))
    return distance_BKD.square().sum(dim=(1, 2)) / expert_mask_BK.sum(dim=1).clamp(min=1)


def released_reconstruction(prediction_BLT: Tensor, target_BLT: Tensor, target_mask_BL: Tensor) -> Tensor:
    """The squared error summed over time and leads, [B]: the released code's, before its factor 1e-3."""
    error_BL = squared_error(prediction_BLT, target_BLT, target_mask_BL)
    return error_BL.sum(dim=-1) * target_BLT.shape[-1]


def released_kl_and_alignment(mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The released code's KL in nats, [B], and its alignment before its factor 0.1, [B].

    Both look at the plain mean of the leads' means (and log-variances), not at the fused posterior: the KL of
    that Gaussian, and the mean over leads and units of the squared distance to it. With fewer leads the means
    are over those that are observed.
    """
    mask_BL1 = lead_mask_BL.unsqueeze(-1)
    mu_BLD, logvar_BLD = full_precision(mu_BLD), full_precision(logvar_BLD)
    count_B1 = lead_mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
    mean_mu_BD = torch.where(mask_BL1, mu_BLD, torch.zeros_like(mu_BLD)).sum(dim=1) / count_B1
    mean_logvar_BD = torch.where(mask_BL1, logvar_BLD, torch.zeros_like(logvar_BLD)).sum(dim=1) / count_B1
    spread_B = alignment(mu_BLD, lead_mask_BL, mean_mu_BD) / mu_BLD.shape[-1]
    return kl_to_prior(mean_mu_BD, mean_logvar_BD).sum(dim=-1), spread_B


def binary_focal(logit_B: Tensor, y_B: Tensor, gamma: float = 2.0, alpha: float | Tensor | None = None) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, [B] (Lin et al. 2017, eq. 5); p_t is the probability of the truth.

    `y_B` is 0 or 1. `alpha` weighs positives and 1 - alpha negatives; None weighs neither. gamma = 0 and
    no alpha is the cross-entropy.
    """
    logit_B = full_precision(logit_B)
    y_B = y_B.to(logit_B.dtype)
    cross_entropy_B = F.binary_cross_entropy_with_logits(logit_B, y_B, reduction="none")
    loss_B = torch.sigmoid(logit_B * (1 - 2 * y_B)) ** gamma * cross_entropy_B
    return loss_B if alpha is None else loss_B * (alpha * y_B + (1 - alpha) * (1 - y_B))


def average(values_B: Tensor, share_B: Tensor | None = None) -> Tensor:
    """The mean over the batch, or with `share_B` this batch's part of a mean over several batches or workers."""
    return values_B.mean() if share_B is None else (values_B * share_B).sum()


def finite_records(values: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Which records hold only finite values, [B] bool; with a mask [B, L], only its leads are looked at."""
    finite = values.isfinite()
    if mask_BL is not None:
        finite = finite | ~mask_BL.unsqueeze(-1)
    return finite.flatten(1).all(dim=1) if finite.ndim > 1 else finite


def checked(found: dict[str, Tensor], good_B: Tensor, what: str, *, check: bool) -> dict[str, Tensor]:
    """What `lsemvae.models.contract.Trains.forward` returns: without `check` also "good_B", else every record is good.

    Raises NonFiniteBatch as `require`.
    """
    if not check:
        return found | {"good_B": good_B}
    require(good_B, what)
    return found


def require(good_B: Tensor, what: str) -> None:
    """Raise NonFiniteBatch, with the positions, unless every record is good. Waits for the accelerator."""
    if good_B.all():
        return
    positions = (~good_B).nonzero().flatten().tolist()
    shown = ", ".join(str(position) for position in positions[:10]) + (", …" if len(positions) > 10 else "")
    raise NonFiniteBatch(
        f"{what} in {len(positions)} of {len(good_B)} records of the batch, at position {shown}: "
        "leave these records out, or mask the leads that hold no signal",
        positions,
    )
