"""MVAE: the posterior is the product of the leads' experts and the prior (Wu and Goodman 2018, arXiv 1802.05335).

q(z given the leads X) is proportional to N(0, I) times the product of N(mu_i, s_i^2) over the leads of X. An absent
lead is left out of the product. Training sums the ELBO of several subsets of the observed leads, each of which
reconstructs the leads of its own subset: all leads together, each lead alone, and some random subsets.

A step at the sizes of the `cpu` recipe takes about twice as long as one of LS-EMVAE: it decodes each lead alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import objectives, subsets
from lsemvae.models.parts.blocks import Decoder
from lsemvae.models.parts.fusion import Gaussian, Posterior, full_precision, product_of_leads
from lsemvae.models.parts.lead_vae import LeadVAE, LeadVAEConfig, Outcome


@dataclass(frozen=True)
class MVAEConfig(LeadVAEConfig):
    """Sizes, weights, and how many random subsets a step has."""

    architecture: ClassVar[str] = "mvae"
    title: ClassVar[str] = "MVAE"

    random_subsets: int = 1
    """k, the random subsets of a record's leads in a step; all non-empty subsets are equally likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_subsets < 0:
            raise LsemvaeError(f"random_subsets is {self.random_subsets}: give 0 or more")

    def fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
        """The product with the prior, which is the last expert."""
        return product_of_leads(*with_prior(mu_BLD, logvar_BLD, lead_mask_BL))


def with_prior(mu_BLD: Tensor, logvar_BLD: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The experts and after them the prior expert N(0, I), which every mask [..., L] has."""
    mu_BKD, logvar_BKD = (F.pad(full_precision(values), (0, 0, 0, 1)) for values in (mu_BLD, logvar_BLD))
    return mu_BKD, logvar_BKD, F.pad(mask, (0, 1), value=True)


class MVAE(LeadVAE):
    """The model over `leads`. Its loss terms "reconstruction" and "kl" are sums over the subsets.

    Noise: D numbers for z of all leads together, of each random subset, and of each lead alone; then one number that
    chooses the random subsets.
    """

    config: MVAEConfig

    def __init__(self, config: MVAEConfig, leads: Sequence[str]) -> None:
        draws = 1 + config.random_subsets + len(leads)
        super().__init__(config, leads, noise_size=draws * config.latent + 1)
        self.decoder = Decoder(config.decoder_leads or self.leads, **config.sizes, kind="lead")

    def _objective(self, batch: Mapping[str, Tensor], target_BLT: Tensor, target_mask_BL: Tensor) -> Outcome:
        lead_mask_BL, noise, k = batch["lead_mask_BL"], self._noise(batch), self.config.random_subsets
        random_BSL = subsets.random_subsets(noise[:, -1], k, lead_mask_BL)
        mask_BSL = torch.cat([lead_mask_BL.unsqueeze(1), random_BSL, torch.diag_embed(lead_mask_BL)], dim=1)
        q = subsets.products(*with_prior(*self._experts(batch["x_BLT"], lead_mask_BL), mask_BSL))
        z_BSD = q.mu + (0.5 * q.logvar).exp() * noise[:, :-1].unflatten(1, q.mu.shape[1:])

        # All leads together reconstruct every target; a random subset and a lead alone their own leads only.
        prediction_BSLT = self.decoder(z_BSD[:, : 1 + k].flatten(0, 1)).unflatten(0, (-1, 1 + k))
        random_BLS, own_BL = self._to_decoder_leads(random_BSL.mT), self._to_decoder_leads(lead_mask_BL)
        together_BSL = F.pad(random_BLS.mT, (0, 0, 1, 0), value=True) & target_mask_BL.unsqueeze(1)
        reconstruction_BS = objectives.reconstruction(prediction_BSLT, target_BLT.unsqueeze(1), together_BSL)
        alone_BLT = self.decoder(self._to_decoder_leads(z_BSD[:, 1 + k :]))
        alone_B = objectives.reconstruction(alone_BLT, target_BLT, target_mask_BL & own_BL)
        terms_B = {
            "reconstruction": reconstruction_BS.sum(dim=1) + alone_B,
            "kl": objectives.kl_to_prior(q.mu, q.logvar).sum(dim=(1, 2)),
        }
        return Outcome(terms_B, Gaussian(q.mu[:, 0], q.logvar[:, 0]), q.mu[:, 0])


PRESETS = {
    "full": MVAEConfig(),
    "cpu": MVAEConfig(samples=2496, latent=64, channels=(8, 16, 16)),
    "smoke": MVAEConfig(latent=16, channels=(4, 8, 8)),
}
"""Configurations that recipes name."""
