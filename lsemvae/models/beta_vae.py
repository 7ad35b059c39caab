"""beta-VAE: one encoder over all leads, one latent (Higgins et al. 2017; for ECGs van der Valk et al. 2023).

The ECG papers model single averaged beats. Here the input is the whole recording, so encoder and decoder have the
layers and sizes of one lead of LS-EMVAE, with all leads as channels: how leads are combined is what differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts import objectives
from lsemvae.models.parts.blocks import STRIDE, Decoder, require_sizes
from lsemvae.models.parts.diagnostics import Evaluated, ReconstructionPass
from lsemvae.models.parts.whole import WholeEncoder, WholeModel, as_features

Objective = Literal["beta", "capacity"]


@dataclass(frozen=True)
class BetaVAEConfig(EncoderConfig):
    """Sizes and objective of the model."""

    architecture: ClassVar[str] = "beta-vae"
    title: ClassVar[str] = "β-VAE"

    samples: int = 5000
    """Time points of a record; a multiple of 8."""
    latent: int = 256
    """D, the number of latent units."""
    channels: tuple[int, int, int] = (16, 32, 64)
    """Output channels of the three convolutions."""
    objective: Objective = "beta"
    """beta: beta x KL (Higgins et al. 2017). capacity: gamma x |KL - C|, where C rises to `capacity` (Burgess et al.
    2018)."""
    reconstruction_weight: float = 1000.0
    """Weight of the reconstruction error, as in LS-EMVAE."""
    beta: float = 4.0
    """Weight of the KL in `beta`, after it has risen to its full value."""
    gamma: float = 1000.0
    """Weight of the KL's distance to C in `capacity`."""
    capacity: float = 25.0
    """C in nats, after it has risen to its full value."""

    def __post_init__(self) -> None:
        require_sizes(self.samples, self.latent, self.channels)
        if self.objective not in get_args(Objective):
            raise LsemvaeError(f"objective is {self.objective!r}: choose from {', '.join(get_args(Objective))}")
        for name in ("reconstruction_weight", "beta", "gamma", "capacity"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise LsemvaeError(f"{name} is {getattr(self, name)}: give a finite number, 0 or more")

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder, without the log-variance."""
        return as_features(BetaVAEEncoder(self, leads, log_variance=False), features)


class BetaVAEEncoder(WholeEncoder):
    """q(z given all leads): three convolutions that each halve the time points, then a mean and a log-variance."""

    by_lead: ClassVar[Mapping[str, int]] = {"convs.0.weight": 1}

    def __init__(self, config: BetaVAEConfig, leads: Sequence[str], *, log_variance: bool = True) -> None:
        super().__init__(config, leads)
        first, second, third = config.channels
        self.convs = nn.Sequential(
            *(nn.Conv1d(len(self.leads), first, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(first, second, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(second, third, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        )
        flat = third * config.samples // STRIDE
        self.fc_mu = nn.Linear(flat, config.latent)
        self.fc_logvar = nn.Linear(flat, config.latent) if log_variance else None

    @property
    def embedding_size(self) -> int:
        """F = D."""
        return self.config.latent

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF, the posterior mean."""
        return self.fc_mu(self.convs(x_BLT))

    def forward(self, x_BLT: Tensor) -> tuple[Tensor, Tensor]:
        """x_BLT -> mu_BD, logvar_BD."""
        assert self.fc_logvar is not None, "built without log-variance: only embed() can be computed"
        h_BF = self.convs(x_BLT)
        return self.fc_mu(h_BF), self.fc_logvar(h_BF)


TERMS = ("loss", "reconstruction", "kl", "weighted_reconstruction", "weighted_kl")
"""What `BetaVAE.forward` returns."""


class BetaVAE(WholeModel):
    """The model over `leads`. Inputs as in `lsemvae.models.contract`."""

    encoder: BetaVAEEncoder

    def __init__(self, config: BetaVAEConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        self.noise_size = config.latent
        self.encoder = BetaVAEEncoder(config, leads)
        self.decoder = Decoder(
            self.leads, samples=config.samples, latent=config.latent, channels=config.channels, kind="lead"
        )

    @property
    def decoder_leads(self) -> tuple[str, ...]:
        """The leads that `reconstruct` gives, in order."""
        return self.decoder.leads

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The trained encoder of the named leads, which gives the posterior mean with the other leads absent."""
        return as_features(self.encoder.select(leads, log_variance=False), features)

    def reconstruct(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """x_BLT over `decoder_leads`, from the posterior mean."""
        return self.decoder(self.encoder(self.encoder.masked(x_BLT, lead_mask_BL))[0])

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """The loss of a batch and its terms, as in `lsemvae.models.contract.Trains`.

        batch: `x_BLT`, `lead_mask_BL`; optionally `share_B`; `kl_scale`, how far beta or C has risen; `noise_BD`, with
        z = mu + s * noise. Returns "loss", "reconstruction" (the sum over leads of the mean squared error), "kl" in
        nats, and "weighted_reconstruction" and "weighted_kl", which sum to the loss.
        """
        return objectives.checked(*self._evaluate(batch)[0], "NaN, infinity or no lead at all", check=check)

    def validation(self) -> ReconstructionPass:
        """Loss terms, active units and how well each lead is reconstructed from the posterior mean."""
        device = self.decoder.fc.weight.device

        def evaluate(batch: Mapping[str, Tensor]) -> Evaluated:
            given = {name: values for name, values in batch.items() if name != "kl_scale"}
            (found, good_B), mu_BD, logvar_BD = self._evaluate(given)
            objectives.require(good_B, "NaN, infinity or no lead at all")
            return Evaluated(found, mu_BD, logvar_BD, self.decoder(mu_BD), batch["x_BLT"], batch["lead_mask_BL"])

        return ReconstructionPass(evaluate, TERMS, self.config.latent, self.decoder_leads, device)

    def _evaluate(self, batch: Mapping[str, Tensor]) -> tuple[tuple[dict[str, Tensor], Tensor], Tensor, Tensor]:
        """The terms and which records are finite; mu_BD; logvar_BD."""
        x_BLT, lead_mask_BL, share_B = batch["x_BLT"], batch["lead_mask_BL"], batch.get("share_B")
        mu_BD, logvar_BD = self.encoder(self.encoder.masked(x_BLT, lead_mask_BL))
        noise_BD = batch["noise_BD"] if "noise_BD" in batch else torch.randn_like(mu_BD)
        prediction_BLT = self.decoder(mu_BD + (0.5 * logvar_BD).exp() * noise_BD)

        reconstruction_B = objectives.reconstruction(prediction_BLT, x_BLT, lead_mask_BL)
        kl_B = objectives.kl_to_prior(mu_BD, logvar_BD).sum(dim=-1)
        weighted_B = {
            "weighted_reconstruction": self.config.reconstruction_weight * reconstruction_B,
            "weighted_kl": self._kl_penalty(kl_B, batch.get("kl_scale", 1.0)),
        }
        of_record = {"reconstruction": reconstruction_B, "kl": kl_B} | weighted_B
        terms = {name: objectives.average(values_B, share_B) for name, values_B in of_record.items()}
        loss = terms["weighted_reconstruction"] + terms["weighted_kl"]
        good_B = (
            objectives.finite_records(x_BLT, lead_mask_BL)
            & objectives.finite_records((reconstruction_B + kl_B).detach())
            & lead_mask_BL.any(dim=1)
        )
        found = {"loss": loss} | {name: term.detach() for name, term in terms.items()}
        return (found, good_B), mu_BD, logvar_BD

    def _kl_penalty(self, kl_B: Tensor, kl_scale: Any) -> Tensor:
        if self.config.objective == "beta":
            return self.config.beta * kl_scale * kl_B
        return self.config.gamma * (kl_B - self.config.capacity * kl_scale).abs()


PRESETS = {
    "full": BetaVAEConfig(),
    "cpu": BetaVAEConfig(samples=2496, latent=64, channels=(8, 16, 16)),
    "smoke": BetaVAEConfig(latent=16, channels=(4, 8, 8)),
}
"""Configurations that recipes name."""
