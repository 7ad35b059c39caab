"""MMVAE+: a shared latent and a private one for each lead (Palumbo, Daunhawer and Vogt, ICLR 2023).

Every lead i has two posteriors: q_i(z) of the shared latent z, and q_i(w_i) of its private latent w_i. The posterior
q(z) is the mixture of q_i(z) over the n observed leads, with equal weights. Lead i is decoded from (z, w_i). The bound
is the mean over the observed leads m, from which z and w_m are drawn, of

    log 1/K sum over k of  p(z) p(w_m) p(x_m | z, w_m)  times the product over i != m of p(x_i | z, v_i)
                           divided by q(z) q_m(w_m),       z, w_m from lead m's posteriors, v_i from r_i

with K importance samples. A lead reconstructs another one with a private latent v_i that is drawn from an auxiliary
prior r_i = N(0, scale_i^2), so that only z carries what leads have in common. Here log p(x_i | .) is -lambda MSE_i,
and the log-ratio of priors and posteriors has the weight beta. With a_k the log of term k, and w = softmax(a),

    -log mean exp(a) = lambda sum_k w_k MSE_k + beta sum_k w_k log(q/p)_k + KL(w || equal weights)

which are the three loss terms. Their gradient is that of the bound when w counts as constant (plain IWAE, no DReG).

Cost: each of n leads as source, with K samples, decodes each of n leads. So a step draws the source of z, by default
one of the observed leads for each record, which gives the mean over m without bias. With that and K = 2 a step at the
sizes of the `cpu` recipe takes about three times as long as one of LS-EMVAE.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import objectives, subsets
from lsemvae.models.parts.blocks import STRIDE, Decoder, LeadLinear
from lsemvae.models.parts.fusion import Gaussian, Posterior, full_precision, mixture
from lsemvae.models.parts.lead_vae import LeadVAE, LeadVAEConfig, Outcome


@dataclass(frozen=True)
class MMVAEPlusConfig(LeadVAEConfig):
    """Sizes and weights; `latent` is the size of the shared latent."""

    architecture: ClassVar[str] = "mmvae-plus"
    title: ClassVar[str] = "MMVAE+"

    private: int = 64
    """W, the number of private latent units of a lead."""
    importance_samples: int = 2
    """K, samples of the importance-weighted bound."""
    sources: int = 1
    """Leads of a record from which z is drawn in a step; with as many as are observed the bound is not sampled."""
    learn_scale: bool = True
    """Whether the scale of the auxiliary priors is learned; otherwise it stays 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("private", "importance_samples", "sources"):
            if getattr(self, name) < 1:
                raise LsemvaeError(f"{name} is {getattr(self, name)}: give 1 or more")

    def fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
        """The Gaussian with the moments of the equal mixture."""
        count_B1 = lead_mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
        mu_BD, logvar_BD = mixture(mu_BLD, logvar_BLD, -count_B1.log().expand_as(lead_mask_BL), lead_mask_BL)
        return Posterior(mu_BD, logvar_BD, mu_BLD, logvar_BLD, lead_mask_BL, lead_mask_BL / count_B1)


class MMVAEPlus(LeadVAE):
    """The model over `leads`. Embeddings are of the shared latent: `means` those of the leads, `fused` the mixture's.

    Loss terms: "reconstruction" and "kl", means with the importance weights, and "importance", the KL of these weights
    from equal ones. Noise: for each source and each sample D numbers for z, W for the source's own private latent and W
    for the auxiliary prior of each decoded lead; then one number that draws the sources.
    """

    config: MMVAEPlusConfig

    def __init__(self, config: MMVAEPlusConfig, leads: Sequence[str]) -> None:
        decoded = config.decoder_leads or tuple(leads)
        a_draw = config.latent + (1 + len(decoded)) * config.private
        super().__init__(config, leads, noise_size=config.sources * config.importance_samples * a_draw + 1)
        features = config.channels[2] * config.samples // STRIDE
        self.private_mu = LeadLinear(len(self.leads), features, config.private)
        self.private_logvar = LeadLinear(len(self.leads), features, config.private)
        sizes = config.sizes | {"latent": config.latent + config.private}
        self.decoder = Decoder(config.decoder_leads or self.leads, **sizes, kind="lead")
        log_scale_LW = torch.zeros(len(self.decoder.leads), config.private)
        self.log_scale = nn.Parameter(log_scale_LW, requires_grad=config.learn_scale)

    def reconstruct(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """x_BLT over `decoder_leads`, from the mean of the mixture and each lead's own private mean.

        A lead that was not observed is decoded from the mean of its auxiliary prior, 0.
        """
        shared, private = self._posteriors(x_BLT, lead_mask_BL)
        mu_BD = self.config.fuse(*shared, lead_mask_BL, self.leads).mu_BD
        return self.decoder(self._mean_code(mu_BD, private.mu, lead_mask_BL))

    def _posteriors(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> tuple[Gaussian, Gaussian]:
        """Each lead's posteriors of the shared latent, [B, L, D], and of its private one, [B, L, W]."""
        assert self.encoders.fc_logvar is not None
        h_LBF = self.encoders.features(self.encoders.masked(x_BLT, lead_mask_BL))
        heads = (self.encoders.fc_mu, self.encoders.fc_logvar, self.private_mu, self.private_logvar)
        mu, logvar, private_mu, private_logvar = (full_precision(head(h_LBF)).transpose(0, 1) for head in heads)
        return Gaussian(mu, logvar), Gaussian(private_mu, private_logvar)

    def _mean_code(self, mu_BD: Tensor, private_mu_BLW: Tensor, lead_mask_BL: Tensor) -> Tensor:
        observed_BLW = torch.where(lead_mask_BL.unsqueeze(-1), private_mu_BLW, torch.zeros_like(private_mu_BLW))
        private_BLW = self._to_decoder_leads(observed_BLW)
        return torch.cat([mu_BD.unsqueeze(1).expand(-1, private_BLW.shape[1], -1), private_BLW], dim=-1)

    def _weights(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return super()._weights(batch) | {"importance": 1.0}

    def _objective(self, batch: Mapping[str, Tensor], target_BLT: Tensor, target_mask_BL: Tensor) -> Outcome:
        lead_mask_BL, noise = batch["lead_mask_BL"], self._noise(batch)
        sources, samples = self.config.sources, self.config.importance_samples
        shared, private = self._posteriors(batch["x_BLT"], lead_mask_BL)
        source_BJ = subsets.random_leads(noise[:, -1], sources, lead_mask_BL)
        noise_BJK = noise[:, :-1].unflatten(1, (sources, samples, -1))
        code_BJKLC, kl_BJK = self._draw(shared, private, source_BJ, noise_BJK, lead_mask_BL)

        prediction_BSLT = self.decoder(code_BJKLC.flatten(0, 2)).unflatten(0, (-1, sources * samples))
        mask_BSL = target_mask_BL.unsqueeze(1).expand(-1, sources * samples, -1)
        reconstruction_BS = objectives.reconstruction(prediction_BSLT, target_BLT.unsqueeze(1), mask_BSL)
        reconstruction_BJK = reconstruction_BS.unflatten(1, (sources, samples))

        weights = self._weights(batch)
        log_BJK = -(weights["reconstruction"] * reconstruction_BJK + weights["kl"] * kl_BJK).detach()
        weight_BJK = torch.softmax(log_BJK, dim=2)
        entropy_BJ = torch.special.entr(weight_BJK).sum(dim=2)
        terms_B = {
            "reconstruction": (weight_BJK * reconstruction_BJK).sum(dim=2).mean(dim=1),
            "kl": (weight_BJK * kl_BJK).sum(dim=2).mean(dim=1),
            "importance": (math.log(samples) - entropy_BJ).mean(dim=1),
        }
        whole = self.config.fuse(*shared, lead_mask_BL, self.leads)
        code_BLC = self._mean_code(whole.mu_BD, private.mu, lead_mask_BL)
        return Outcome(terms_B, Gaussian(whole.mu_BD, whole.logvar_BD), code_BLC)

    def _draw(
        self, shared: Gaussian, private: Gaussian, source_BJ: Tensor, noise_BJK: Tensor, lead_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The decoded leads' codes (z, w_i), [B, J, K, L, D + W], and log q(z) q_m(w_m) / p(z) p(w_m), [B, J, K]."""
        latent, width, rows = self.config.latent, self.config.private, len(self.decoder_leads)
        noise_z, noise_own, noise_others = noise_BJK.split([latent, width, rows * width], dim=-1)
        z_BJKD, own_BJKW = (
            _of(q.mu, source_BJ) + (0.5 * _of(q.logvar, source_BJ)).exp() * normal
            for q, normal in ((shared, noise_z), (private, noise_own))
        )
        others_BJKLW = self.log_scale.exp() * noise_others.unflatten(-1, (rows, width))
        own_BJL = F.one_hot(source_BJ, len(self.leads)).bool()
        own_BJL = self._to_decoder_leads(own_BJL.mT).mT
        private_BJKLW = torch.where(own_BJL[:, :, None, :, None], own_BJKW.unsqueeze(3), others_BJKLW)
        code = torch.cat([z_BJKD.unsqueeze(3).expand(-1, -1, -1, rows, -1), private_BJKLW], dim=-1)

        log_q_BJK = _log_mixture(z_BJKD, shared, lead_mask_BL)
        log_own_BJK = _log_normal(own_BJKW, _of(private.mu, source_BJ), _of(private.logvar, source_BJ))
        zero = torch.zeros((), device=z_BJKD.device)
        return code, log_q_BJK + log_own_BJK - _log_normal(z_BJKD, zero, zero) - _log_normal(own_BJKW, zero, zero)


def _of(values_BLD: Tensor, source_BJ: Tensor) -> Tensor:
    """The values of each source, [B, J, 1, D]."""
    return torch.take_along_dim(values_BLD, source_BJ.unsqueeze(-1), dim=1).unsqueeze(2)


def _log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, s^2), summed over the last dimension."""
    return -0.5 * ((z - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(dim=-1)


def _log_mixture(z_BJKD: Tensor, q: Gaussian, lead_mask_BL: Tensor) -> Tensor:
    """log of the mean over the observed leads of q_i(z), [B, J, K]."""
    mask_BL = lead_mask_BL | ~lead_mask_BL.any(dim=1, keepdim=True)  # keeps a record without leads finite
    log_BJKL = _log_normal(z_BJKD.unsqueeze(3), q.mu[:, None, None], q.logvar[:, None, None])
    log_BJKL = log_BJKL.masked_fill(~mask_BL[:, None, None], -torch.inf)
    return torch.logsumexp(log_BJKL, dim=-1) - mask_BL.sum(dim=1).log()[:, None, None]


PRESETS = {
    "full": MMVAEPlusConfig(),
    "cpu": MMVAEPlusConfig(samples=2496, latent=64, channels=(8, 16, 16), private=16),
    "smoke": MMVAEPlusConfig(latent=16, channels=(4, 8, 8), private=4),
}
"""Configurations that recipes name."""
