"""MoPoE-VAE: a mixture over products of lead subsets (Sutter, Daunhawer and Vogt 2021, arXiv 2105.02470).

q(z given X) is the mixture, with equal weights, of the products q_S over all non-empty subsets S of the observed leads.
A product multiplies the leads' experts alone: the paper's has no prior expert. So the empty subset is left out, and
n leads have 2^n - 1 subsets.

The bound replaces the KL of the mixture, which has no closed form, by the mean of the subsets' KLs, which is at least
as large (the generalised Jensen-Shannon divergence in the paper, or Jensen's inequality):

    loss = lambda E_q[sum over all targets of MSE_i] + beta mean over S of KL(q_S || N(0, I))

Twelve leads have 4,095 subsets, so a step draws a few for each record. They estimate the mean without bias, and exactly
where there are as many as the record has subsets. z comes from the first of them, and reconstructs all targets. The
embedding `fused` is the mean of the product of all observed leads, as the paper infers z.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import objectives, subsets
from lsemvae.models.parts.blocks import Decoder
from lsemvae.models.parts.fusion import Gaussian, Posterior, product_of_leads
from lsemvae.models.parts.lead_vae import LeadVAE, LeadVAEConfig, Outcome


@dataclass(frozen=True)
class MoPoEConfig(LeadVAEConfig):
    """Sizes, weights, and how many subsets a step draws."""

    architecture: ClassVar[str] = "mopoe-vae"
    title: ClassVar[str] = "MoPoE-VAE"

    sampled_subsets: int = 16
    """Subsets of a record's leads whose KL a step computes; all non-empty subsets are equally likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampled_subsets < 1:
            raise LsemvaeError(f"sampled_subsets is {self.sampled_subsets}: give 1 or more")

    def fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
        """The mixture's member of all observed leads: their product."""
        return product_of_leads(mu_BLD, logvar_BLD, lead_mask_BL)


class MoPoEVAE(LeadVAE):
    """The model over `leads`. Loss terms: "reconstruction", and "kl", the mean over the drawn subsets.

    Noise: D numbers for z, then one that draws the subsets.
    """

    config: MoPoEConfig

    def __init__(self, config: MoPoEConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads, noise_size=config.latent + 1)
        self.decoder = Decoder(config.decoder_leads or self.leads, **config.sizes, kind="lead")

    def _objective(self, batch: Mapping[str, Tensor], target_BLT: Tensor, target_mask_BL: Tensor) -> Outcome:
        lead_mask_BL, noise = batch["lead_mask_BL"], self._noise(batch)
        mu_BLD, logvar_BLD = self._experts(batch["x_BLT"], lead_mask_BL)
        drawn_BSL = subsets.random_subsets(noise[:, -1], self.config.sampled_subsets, lead_mask_BL)
        q = subsets.products(mu_BLD, logvar_BLD, drawn_BSL)
        z_BD = q.mu[:, 0] + (0.5 * q.logvar[:, 0]).exp() * noise[:, :-1]
        terms_B = {
            "reconstruction": objectives.reconstruction(self.decoder(z_BD), target_BLT, target_mask_BL),
            "kl": objectives.kl_to_prior(q.mu, q.logvar).sum(dim=2).mean(dim=1),
        }
        whole = self.config.fuse(mu_BLD, logvar_BLD, lead_mask_BL, self.leads)
        return Outcome(terms_B, Gaussian(whole.mu_BD, whole.logvar_BD), whole.mu_BD)


PRESETS = {
    "full": MoPoEConfig(),
    "cpu": MoPoEConfig(samples=2496, latent=64, channels=(8, 16, 16)),
    "smoke": MoPoEConfig(latent=16, channels=(4, 8, 8)),
}
"""Configurations that recipes name."""
