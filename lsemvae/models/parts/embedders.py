"""What stands under a head: lead encoders that give other features than the lead means.

`means` are the lead encoders themselves (`lsemvae.models.parts.blocks.LeadEncoders`). `pooled` and `fused` are here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsemvae.models.parts import shifts
from lsemvae.models.parts.blocks import STRIDE, LeadEncoders
from lsemvae.models.parts.fusion import Posterior, full_precision, product_of_leads


class PooledEncoders(LeadEncoders):
    """Mean and standard deviation of each lead mean over all circular shifts of the recording by whole strides.

    So the features do not depend on where the beats fall in the window. F = 2 x L x D: first all means, lead by lead,
    then all deviations.

    A lead mean under a shift of s positions is mu(s) = b + sum_p W[p] h[p + s], a circular cross-correlation of the
    convolutions' output h with the head's weights W. Its Fourier transform over s is H(f) conj(W(f)). So

        mean over s      = b + H(0) conj(W(0)) / P
        variance over s  = sum over f != 0 of |H(f) conj(W(f))|^2 / P^2      (Parseval)

    and all P shifts cost about two products with the head's weights, where 16 explicit shifts cost 16. Worked example
    with P = 2, h = (1, 3), W = (1, 0), b = 0: mu = 1 and 3, mean 2, variance 1. H = (4, -2), W(f) = (1, 1):
    4 / 2 = 2, and |-2|^2 / 4 = 1.

    Only the recorded part of a short recording is shifted; the padding after it adds its constant part of the mean.
    """

    @property
    def embedding_size(self) -> int:
        return 2 * super().embedding_size

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features belong to an observed lead, [B, F] bool."""
        return super().observed(lead_mask_BL).repeat(1, 2)

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF; zeros for an absent lead."""
        x_BLT = self.masked(x_BLT, lead_mask_BL)
        size_B = shifts.recorded_samples(x_BLT) // STRIDE
        h_LBCP = self.features(x_BLT).unflatten(2, (self.channels[2], -1))
        weight_LCPD = self.fc_mu.weight.unflatten(1, (self.channels[2], -1))
        with torch.autocast(x_BLT.device.type, enabled=False):
            h_LBCP, weight_LCPD = full_precision(h_LBCP), full_precision(weight_LCPD)
            sizes = size_B.unique().tolist()
            if len(sizes) == 1:
                mean_LBD, variance_LBD = _moments(h_LBCP, weight_LCPD, sizes[0])
            else:
                mean_LBD = h_LBCP.new_empty(*h_LBCP.shape[:2], self.latent)
                variance_LBD = torch.empty_like(mean_LBD)
                for size in sizes:
                    rows = size_B == size
                    mean_LBD[:, rows], variance_LBD[:, rows] = _moments(h_LBCP[:, rows], weight_LCPD, size)
            mean_LBD = mean_LBD + full_precision(self.fc_mu.bias).unsqueeze(1)
            both = [mean_LBD.transpose(0, 1), (variance_LBD + shifts.LEAST_VARIANCE).sqrt().transpose(0, 1)]
        mask_BL1 = lead_mask_BL.unsqueeze(-1)
        return torch.cat([torch.where(mask_BL1, part, torch.zeros_like(part)).flatten(1) for part in both], dim=1)

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        """h_SBF, the same for each shift: the features are those of all shifts."""
        return self.embed(x_BLT, lead_mask_BL).expand(len(shift_S), -1, -1)


def _moments(h_LBCP: Tensor, weight_LCPD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean, without bias, and variance over all circular shifts within the first `size` positions, [L, B, D] each."""
    recorded_LBCF = torch.fft.rfft(h_LBCP[..., :size])
    weights_LCFD = torch.fft.rfft(weight_LCPD[:, :, :size], dim=2)
    # |sum_c H_c conj(W_c)|^2, as one real product a frequency: (re, im) of H times (re, im) of conj(W).
    real, imaginary = weights_LCFD.real.transpose(1, 2), weights_LCFD.imag.transpose(1, 2)
    right = torch.cat([torch.cat([real, -imaginary], dim=3), torch.cat([imaginary, real], dim=3)], dim=2)
    left = torch.cat([recorded_LBCF.real, recorded_LBCF.imag], dim=2).permute(0, 3, 1, 2)
    product_LFBE = left @ right  # E: the real parts of all D units, then their imaginary parts
    # A real signal's spectrum is symmetric: every frequency but 0, and the highest of an even size, stands for two.
    twice_F = torch.full((product_LFBE.shape[1],), 2.0, device=h_LBCP.device)
    twice_F[0] = 0.0
    if size % 2 == 0:
        twice_F[-1] = 1.0
    units = weight_LCPD.shape[-1]
    power_LBE = (twice_F @ product_LFBE.square().flatten(2)).unflatten(1, product_LFBE.shape[2:]) / size**2
    mean_LBD = product_LFBE[:, 0, :, :units] / size
    if size < h_LBCP.shape[-1]:
        mean_LBD = mean_LBD + torch.einsum("lbcp,lcpd->lbd", h_LBCP[..., size:], weight_LCPD[:, :, size:])
    return mean_LBD, power_LBE[..., :units] + power_LBE[..., units:]


class FusedEncoders(LeadEncoders):
    """The mean of the fused posterior q(z given the observed leads), F = D: what the paper's text fine-tunes.

    `fuse` is the model's own fusion: means, log-variances, mask and names of the leads -> posterior.
    """

    def __init__(
        self,
        leads: Sequence[str],
        *,
        fuse: Callable[[Tensor, Tensor, Tensor, Sequence[str]], Posterior],
        **sizes: Any,
    ) -> None:
        super().__init__(leads, **sizes)
        self.fuse = fuse

    @property
    def embedding_size(self) -> int:
        return self.latent

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """[B, F] bool: every feature holds something of a recording with any lead."""
        return lead_mask_BL.any(dim=1, keepdim=True).expand(-1, self.latent)

    def embedding(self, h_LBF: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """What `features` gives -> h_BF."""
        assert self.fc_logvar is not None
        mu_BLD, logvar_BLD = (head(h_LBF).transpose(0, 1) for head in (self.fc_mu, self.fc_logvar))
        return self.fuse(mu_BLD, logvar_BLD, lead_mask_BL, self.leads).mu_BD

    def lead_weights(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `lsemvae.models.contract.Weighs`. None where the fusion mixes groups of leads."""
        mu_BLD, logvar_BLD = self(self.masked(x_BLT, lead_mask_BL))
        weight_BK = self.fuse(mu_BLD, logvar_BLD, lead_mask_BL, self.leads).weight_BK
        leads = len(self.leads)
        if weight_BK.shape[1] not in (leads, leads + 1):  # one more: HiME's shared expert, or MVAE's prior
            return None
        return weight_BK[:, :leads], product_of_leads(mu_BLD, logvar_BLD, lead_mask_BL).weight_BK
