"""What the VAEs with one encoder a lead share: sizes, encoders, targets, weighted loss terms, validation, embedding.

A model adds its decoder, its fusion (`LeadVAEConfig.fuse`) and its loss terms (`LeadVAE._objective`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, in_order
from lsemvae.models.contract import EncoderConfig, Features
from lsemvae.models.parts import objectives
from lsemvae.models.parts.blocks import Decoder, LeadEncoders, require_sizes
from lsemvae.models.parts.diagnostics import Evaluated, ReconstructionPass
from lsemvae.models.parts.embedders import FusedEncoders, PooledEncoders
from lsemvae.models.parts.fusion import Gaussian, Posterior


@dataclass(frozen=True)
class LeadVAEConfig(EncoderConfig):
    """Sizes and weights that these models have in common. The defaults are the sizes of the LS-EMVAE paper."""

    samples: int = 5000
    """Time points of a record; a multiple of 8."""
    latent: int = 256
    """D, the number of latent units."""
    channels: tuple[int, int, int] = (16, 32, 64)
    """Output channels of the three convolutions."""
    decoder_leads: tuple[str, ...] = ()
    """Leads to reconstruct; by default the leads that the encoders read."""
    # All models are compared with the same weight. At 1 the posterior collapses, see docs/performance.md.
    reconstruction_weight: float = 1000.0
    """lambda, the weight of a lead's mean squared error, the same for every lead."""
    beta: float = 1.0
    """Weight of the KL term, after it has risen to its full value."""

    def __post_init__(self) -> None:
        require_sizes(self.samples, self.latent, self.channels)
        if self.decoder_leads and in_order(self.decoder_leads) != self.decoder_leads:
            raise LsemvaeError(f"decoder_leads is {self.decoder_leads}: give names in the order {', '.join(LEADS)}")
        self._require_weights("reconstruction_weight", "beta")

    def _require_weights(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < float("inf"):
                raise LsemvaeError(f"{name} is {getattr(self, name)}: give a finite number, 0 or more")

    @property
    def sizes(self) -> dict[str, Any]:
        """What encoders and decoder are built with."""
        return {"samples": self.samples, "latent": self.latent, "channels": self.channels}

    def fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
        """The model's posterior given the observed leads among these."""
        raise AssertionError(f"{type(self).__name__} has no fusion")

    def embedder(self, leads: Sequence[str], features: Features = "means") -> LeadEncoders:
        """Untrained lead encoders; only `fused` features need their log-variance heads."""
        leads = in_order(leads)
        match features:
            case "means":
                return LeadEncoders(leads, **self.sizes, log_variance=False)
            case "pooled":
                return PooledEncoders(leads, **self.sizes, log_variance=False)
            case "fused":
                return FusedEncoders(leads, **self.sizes, fuse=self.fuse)


class Outcome(NamedTuple):
    """What a model found in a batch.

    `terms_B` are the unweighted loss terms, one value a record. `posterior` is that of all leads which the encoders
    saw, and `code` what the decoder reads for its mean.
    """

    terms_B: Mapping[str, Tensor]
    posterior: Gaussian
    code: Tensor


class _Pass(NamedTuple):
    """What a batch gave: the terms' means and which records are finite, the outcome, targets with their mask."""

    terms: tuple[dict[str, Tensor], Tensor]
    outcome: Outcome
    targets: tuple[Tensor, Tensor]


class LeadVAE(nn.Module, ABC):
    """A VAE over `leads`, by name, in the fixed order I … V6. Inputs as in `lsemvae.models.contract`."""

    decoder: Decoder

    def __init__(self, config: LeadVAEConfig, leads: Sequence[str], *, noise_size: int) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)
        self.noise_size = noise_size
        self.encoders = LeadEncoders(self.leads, **config.sizes)

    @abstractmethod
    def _objective(self, batch: Mapping[str, Tensor], target_BLT: Tensor, target_mask_BL: Tensor) -> Outcome:
        """The loss terms of a batch: the names are those of `_weights`."""

    def _weights(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The weight of each loss term."""
        return {
            "reconstruction": self.config.reconstruction_weight,
            "kl": self.config.beta * batch.get("kl_scale", 1.0),
        }

    @property
    def decoder_leads(self) -> tuple[str, ...]:
        """The leads that `reconstruct` gives, in order."""
        return self.decoder.leads

    @property
    def embedding_size(self) -> int:
        """F = L x D."""
        return self.encoders.embedding_size

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: the lead means mu_i one after another, zeros for an absent lead."""
        return self.encoders.embed(x_BLT, lead_mask_BL)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features belong to an observed lead, [B, F] bool."""
        return self.encoders.observed(lead_mask_BL)

    def embedder(self, leads: Sequence[str], features: Features = "means") -> LeadEncoders:
        """The named leads' encoders, as they give these features. See LeadEncoders.select."""
        chosen = self.encoders.select(leads, log_variance=features == "fused")
        if features == "means":
            return chosen
        with torch.device("meta"):
            embedder = self.config.embedder(leads, features)
        embedder.load_state_dict(chosen.state_dict(), assign=True)
        return embedder.train(self.training)

    def posterior(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Posterior:
        """q(z given the observed leads), with its experts and their weights."""
        return self.config.fuse(*self._experts(x_BLT, lead_mask_BL), lead_mask_BL, self.leads)

    def reconstruct(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """x_BLT over `decoder_leads`, from the posterior mean: six limb leads in, V1-V6 among those out."""
        return self.decoder(self.posterior(x_BLT, lead_mask_BL).mu_BD)

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """The loss of a batch and its terms, as in `lsemvae.models.contract.Trains`.

        batch: `x_BLT`, `lead_mask_BL`; optionally `target_BLT` and `target_mask_BL` over the decoder's leads, by
        default the input and its mask (a lead that is decoded but not read is then no target); `share_B`; `kl_scale`,
        how far beta has risen; and `noise_BD`, in training and in evaluation.

        Returns "loss", the unweighted terms, among them "reconstruction" and "kl" (nats), and each as "weighted_…",
        which sum to the loss. A record with no lead at all is not finite.
        """
        return objectives.checked(*self._evaluate(batch).terms, "NaN, infinity or no lead at all", check=check)

    def validation(self) -> ReconstructionPass:
        """Loss terms, active units and how well each lead is reconstructed from the posterior mean."""
        device = self.decoder.fc.weight.device
        names = [*self._weights({})]

        def evaluate(batch: Mapping[str, Tensor]) -> Evaluated:
            now = self._evaluate({name: values for name, values in batch.items() if name != "kl_scale"})
            found, good_B = now.terms
            objectives.require(good_B, "NaN, infinity or no lead at all")
            posterior, prediction_BLT = now.outcome.posterior, self.decoder(now.outcome.code)
            return Evaluated(found, posterior.mu, posterior.logvar, prediction_BLT, *now.targets)

        terms = ["loss", *names, *(f"weighted_{name}" for name in names)]
        return ReconstructionPass(evaluate, terms, self.config.latent, self.decoder_leads, device)

    def _evaluate(self, batch: Mapping[str, Tensor]) -> _Pass:
        target_BLT, target_mask_BL = self._targets(batch)
        outcome = self._objective(batch, target_BLT, target_mask_BL)
        terms, weighted = {}, {}
        loss = total_B = torch.zeros((), device=target_BLT.device)
        for name, weight in self._weights(batch).items():
            terms[name] = objectives.average(outcome.terms_B[name], batch.get("share_B"))
            weighted[f"weighted_{name}"] = weight * terms[name]
            loss = loss + weighted[f"weighted_{name}"]
            total_B = total_B + outcome.terms_B[name].detach()
        good_B = (
            objectives.finite_records(batch["x_BLT"], batch["lead_mask_BL"])
            & objectives.finite_records(target_BLT, target_mask_BL)
            & objectives.finite_records(total_B)
            & batch["lead_mask_BL"].any(dim=1)
        )
        found = {"loss": loss} | {name: term.detach() for name, term in (terms | weighted).items()}
        return _Pass((found, good_B), outcome, (target_BLT, target_mask_BL))

    def _experts(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoders(self.encoders.masked(x_BLT, lead_mask_BL))

    def _noise(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The standard normal numbers of a step, [B, noise_size], in float32 or better."""
        if "noise_BD" in batch:
            return batch["noise_BD"]
        x_BLT = batch["x_BLT"]
        dtype = torch.promote_types(x_BLT.dtype, torch.float32)
        return torch.randn(len(x_BLT), self.noise_size, dtype=dtype, device=x_BLT.device)

    def _targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Targets and their mask over the decoder's leads."""
        shape = (len(batch["x_BLT"]), len(self.decoder_leads), self.config.samples)
        if "target_BLT" in batch:
            target_BLT, mask_BL = batch["target_BLT"], batch["target_mask_BL"]
        elif self.decoder_leads == self.leads:
            target_BLT, mask_BL = batch["x_BLT"], batch.get("target_mask_BL", batch["lead_mask_BL"])
        else:
            target_BLT, mask_BL = (self._to_decoder_leads(batch[name]) for name in ("x_BLT", "lead_mask_BL"))
        if target_BLT.shape != shape or mask_BL.shape != shape[:2]:
            raise LsemvaeError(
                f"targets are {list(target_BLT.shape)} with a mask {list(mask_BL.shape)}: "
                f"give {list(shape)} for {', '.join(self.decoder_leads)}"
            )
        return target_BLT, mask_BL

    def _to_decoder_leads(self, values_BL: Tensor) -> Tensor:
        """[B, leads, …] -> [B, decoder leads, …], zero (False) for a lead that is not read."""
        if self.decoder_leads == self.leads:
            return values_BL
        shape = (len(values_BL), len(self.decoder_leads), *values_BL.shape[2:])
        found_BL = values_BL.new_zeros(shape)
        for row, lead in enumerate(self.leads):
            if lead in self.decoder_leads:
                found_BL[:, self.decoder_leads.index(lead)] = values_BL[:, row]
        return found_BL
