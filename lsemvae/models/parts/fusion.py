"""Fuse one Gaussian per expert into one posterior: HiME (arXiv 2503.13470, section 2.2), its parts and its ablations.

HiME has three steps, and each is a function here:

    1. `product_of_experts`   the product of the leads' Gaussians is one more expert, the shared one
    2. `gate_weights`         a gate gives every expert, leads and shared, a weight w_k; the weights sum to 1
    3. `mixture`              the posterior is the Gaussian with the mean and variance of the weighted mixture

Worked example in one dimension: two leads, N(0, 1) and N(2, 1). Step 1: precisions 1 and 1, so the shared expert has
mean (0 + 2) / 2 = 1 and variance 1/2. Step 2: the log-precisions are 0, 0 and ln 2; their softmax is 1/4, 1/4, 1/2.
Step 3: mean 0/4 + 2/4 + 1/2 = 1; variance (1 + 1)/4 + (1 + 1)/4 + (1/2 + 0)/2 = 1.25.

All functions are pure. Means and log-variances are `mu_BKD` and `logvar_BKD`, with a mask `mask_BK` that is True where
the expert was observed. bfloat16 and float16 are raised to float32; float64 stays float64. Variances are handled as
logarithms, so that no intermediate value overflows. A masked expert is replaced before any arithmetic, so its gradient
is exactly zero, even where it holds NaN. A record without any observed expert gets the prior N(0, I).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lsemvae.leads import LEADS

# The released code multiplies within these groups and then averages over them.
RELEASED_GROUPS = (LEADS[0:3], LEADS[3:6], LEADS[6:9], LEADS[9:12])

Fusion = Literal["hime", "product", "mixture", "released"]
"""hime (the paper's); product and mixture, its ablations; released, that of the released code."""


class Gaussian(NamedTuple):
    """Diagonal Gaussians: means and log-variances of one shape."""

    mu: Tensor
    logvar: Tensor


class Posterior(NamedTuple):
    """The fused posterior `mu_BD`, `logvar_BD`, and its experts.

    `expert_mu_BKD`, `expert_logvar_BKD` and `expert_mask_BK` are the experts that were mixed: for HiME the leads in
    their order, then the shared expert. `weight_BK` is each expert's weight; the observed ones sum to 1.
    """

    mu_BD: Tensor
    logvar_BD: Tensor
    expert_mu_BKD: Tensor
    expert_logvar_BKD: Tensor
    expert_mask_BK: Tensor
    weight_BK: Tensor


def full_precision(values: Tensor) -> Tensor:
    """bfloat16 and float16 -> float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _observed(mu_BKD: Tensor, logvar_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and log-variances with zeros where masked, the mask to compute with, and which records have an expert.

    For a record without any expert the mask is True throughout: that keeps the arithmetic finite, and `_or_prior`
    replaces the result afterwards.
    """
    mask_BK1 = mask_BK.unsqueeze(-1)
    mu_BKD = full_precision(mu_BKD)
    logvar_BKD = full_precision(logvar_BKD)
    any_B1 = mask_BK.any(dim=1, keepdim=True)
    return (
        torch.where(mask_BK1, mu_BKD, torch.zeros_like(mu_BKD)),
        torch.where(mask_BK1, logvar_BKD, torch.zeros_like(logvar_BKD)),
        mask_BK | ~any_B1,
        any_B1,
    )


def _or_prior(mu_BD: Tensor, logvar_BD: Tensor, any_B1: Tensor) -> Gaussian:
    zeros_BD = torch.zeros_like(mu_BD)
    return Gaussian(torch.where(any_B1, mu_BD, zeros_BD), torch.where(any_B1, logvar_BD, zeros_BD))


def _precision_shares(logvar_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(1/s_k^2) / (sum_j 1/s_j^2) over the observed experts, and log(sum_j 1/s_j^2): [B, K, D] and [B, D]."""
    log_precision_BKD = (-logvar_BKD).masked_fill(~mask_BK.unsqueeze(-1), -torch.inf)
    return torch.softmax(log_precision_BKD, dim=1), torch.logsumexp(log_precision_BKD, dim=1)


def product_of_experts(mu_BKD: Tensor, logvar_BKD: Tensor, mask_BK: Tensor) -> Gaussian:
    """Step 1 of HiME: the product of the observed experts, mu [B, D] and log-variance [B, D].

    mu = (sum mu_k / s_k^2) / (sum 1 / s_k^2),  s^2 = 1 / (sum 1 / s_k^2). There is no prior expert.
    """
    mu_BKD, logvar_BKD, mask_BK, any_B1 = _observed(mu_BKD, logvar_BKD, mask_BK)
    share_BKD, log_precision_BD = _precision_shares(logvar_BKD, mask_BK)
    return _or_prior((share_BKD * mu_BKD).sum(dim=1), -log_precision_BD, any_B1)


def gate_weights(logvar_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    """Step 2 of HiME: the weight of each expert in the mixture, [B, K]; zero where masked, else they sum to 1.

    w_k = softmax over the observed experts of mean_d(-log s_kd^2), the expert's average log-precision.

    The paper does not specify its gate. Its published number of parameters, 256,150,577, is exactly twelve encoders
    and the decoder, which leaves none for a gate. So the gate must be a function of the experts themselves; this one
    gives more weight to more precise experts. With k equally precise leads, the shared expert (k times as precise) gets
    one half and each lead 1 / (2k).
    """
    return _log_gate(logvar_BKD, mask_BK).exp().masked_fill(~mask_BK, 0.0)


def _log_gate(logvar_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    _, logvar_BKD, mask_BK, _ = _observed(logvar_BKD, logvar_BKD, mask_BK)
    score_BK = (-logvar_BKD).mean(dim=-1).masked_fill(~mask_BK, -torch.inf)
    return torch.log_softmax(score_BK, dim=1)


def mixture(mu_BKD: Tensor, logvar_BKD: Tensor, log_weight_BK: Tensor, mask_BK: Tensor) -> Gaussian:
    """Step 3 of HiME: the Gaussian with the moments of a weighted mixture, mu [B, D] and log-variance [B, D].

    mu = sum w_k mu_k;  s^2 = sum w_k (s_k^2 + (mu_k - mu)^2). The paper writes the latter as
    sum w_k (s_k^2 + mu_k^2) - mu^2, which loses digits by cancellation. `log_weight_BK` are logarithms of weights that
    sum to 1 over the observed experts; those of the others are ignored.
    """
    mu_BKD, logvar_BKD, mask_BK, any_B1 = _observed(mu_BKD, logvar_BKD, mask_BK)
    log_weight_BK1 = full_precision(log_weight_BK).masked_fill(~mask_BK, -torch.inf).unsqueeze(-1)
    mu_BD = (log_weight_BK1.exp() * mu_BKD).sum(dim=1)

    # log(d^2) has no finite gradient at d = 0. Such terms are left out of the sum: they are zero.
    deviation_BKD = (mu_BKD - mu_BD.unsqueeze(1)).abs()
    apart_BKD = deviation_BKD > torch.finfo(deviation_BKD.dtype).tiny
    log_square_BKD = 2 * torch.where(apart_BKD, deviation_BKD, torch.ones_like(deviation_BKD)).log()
    log_square_BKD = log_square_BKD.masked_fill(~apart_BKD, -torch.inf)
    parts = torch.cat([log_weight_BK1 + logvar_BKD, log_weight_BK1 + log_square_BKD], dim=1)
    return _or_prior(mu_BD, torch.logsumexp(parts, dim=1), any_B1)


def hime(mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor) -> Posterior:
    """The hierarchical modality expert, steps 1 to 3. K = L + 1: the leads in their order, then the shared expert."""
    shared = product_of_experts(mu_BLD, logvar_BLD, lead_mask_BL)
    return mixture_of_leads(
        torch.cat([full_precision(mu_BLD), shared.mu.unsqueeze(1)], dim=1),
        torch.cat([full_precision(logvar_BLD), shared.logvar.unsqueeze(1)], dim=1),
        torch.cat([lead_mask_BL, lead_mask_BL.any(dim=1, keepdim=True)], dim=1),
    )


def mixture_of_leads(mu_BKD: Tensor, logvar_BKD: Tensor, mask_BK: Tensor) -> Posterior:
    """Steps 2 and 3: gate and mixture over the given experts. On the leads alone it is the ablation without step 1."""
    log_weight_BK = _log_gate(logvar_BKD, mask_BK)
    mu_BD, logvar_BD = mixture(mu_BKD, logvar_BKD, log_weight_BK, mask_BK)
    weight_BK = log_weight_BK.exp().masked_fill(~mask_BK, 0.0)
    return Posterior(mu_BD, logvar_BD, mu_BKD, logvar_BKD, mask_BK, weight_BK)


def product_of_leads(mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor) -> Posterior:
    """Ablation: step 1 alone, the shared expert is the posterior. A lead's weight is its mean precision share."""
    mu_BD, logvar_BD = product_of_experts(mu_BLD, logvar_BLD, lead_mask_BL)
    _, observed_logvar_BLD, mask_BL, _ = _observed(mu_BLD, logvar_BLD, lead_mask_BL)
    weight_BL = _precision_shares(observed_logvar_BLD, mask_BL)[0].mean(dim=-1)
    return Posterior(mu_BD, logvar_BD, mu_BLD, logvar_BLD, lead_mask_BL, weight_BL.masked_fill(~lead_mask_BL, 0.0))


def released(mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
    """The fusion of the authors' released code (K = the groups that the model's leads touch, at most 4).

    A product within each of {I, II, III}, {aVR, aVL, aVF}, {V1-V3}, {V4-V6}; then the plain mean of the
    groups' means and of their log-variances. That code always has twelve leads. With fewer, a product takes the
    observed leads of its group, and a group without any is left out of the mean.
    """
    members = [[row for row, lead in enumerate(leads) if lead in group] for group in RELEASED_GROUPS]
    groups, masks = [], []
    for rows in members:
        if rows:
            mask_BG = lead_mask_BL[:, rows]
            groups.append(product_of_experts(mu_BLD[:, rows], logvar_BLD[:, rows], mask_BG))
            masks.append(mask_BG.any(dim=1))
    mu_BKD = torch.stack([group.mu for group in groups], dim=1)
    logvar_BKD = torch.stack([group.logvar for group in groups], dim=1)
    mask_BK = torch.stack(masks, dim=1)
    weight_BK = mask_BK / mask_BK.sum(dim=1, keepdim=True).clamp(min=1).to(mu_BKD.dtype)
    # A group without observed leads is N(0, I) with weight zero: it adds zero to both means.
    return Posterior(
        (weight_BK.unsqueeze(-1) * mu_BKD).sum(dim=1),
        (weight_BK.unsqueeze(-1) * logvar_BKD).sum(dim=1),
        mu_BKD,
        logvar_BKD,
        mask_BK,
        weight_BK,
    )


def fuse(kind: Fusion, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
    """The posterior of the named leads' experts by the fusion of that name."""
    match kind:
        case "hime":
            return hime(mu_BLD, logvar_BLD, lead_mask_BL)
        case "product":
            return product_of_leads(mu_BLD, logvar_BLD, lead_mask_BL)
        case "mixture":
            return mixture_of_leads(mu_BLD, logvar_BLD, lead_mask_BL)
        case "released":
            return released(mu_BLD, logvar_BLD, lead_mask_BL, leads)
