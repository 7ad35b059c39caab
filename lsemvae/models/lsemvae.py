"""LS-EMVAE: one encoder a lead, hierarchical fusion (HiME), one decoder (arXiv 2503.13470).

`LSEMVAEConfig()` is the paper's model with a decoder that knows which lead it writes. The released code's
model and the ablations are settings of the same class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS, in_order
from lsemvae.models.contract import EncoderConfig, Features
from lsemvae.models.parts import fusion, objectives
from lsemvae.models.parts.augment import hide_leads
from lsemvae.models.parts.blocks import Decoder, LeadEncoders
from lsemvae.models.parts.diagnostics import Evaluated, ReconstructionPass
from lsemvae.models.parts.embedders import FusedEncoders, PooledEncoders
from lsemvae.models.parts.fusion import Fusion

DecoderKind = Literal["lead", "paper"]
Objective = Literal["paper", "released"]


@dataclass(frozen=True)
class LSEMVAEConfig(EncoderConfig):
    """Sizes, fusion and objective of the model. The defaults are the paper's sizes."""

    architecture: ClassVar[str] = "lsemvae"
    title: ClassVar[str] = "LS-EMVAE"

    samples: int = 5000
    """Time points of a record; a multiple of 8."""
    latent: int = 256
    """D, the number of latent units."""
    channels: tuple[int, int, int] = (16, 32, 64)
    """Output channels of the three convolutions."""
    decoder: DecoderKind = "lead"
    """lead: each lead has its own reconstruction; paper: all leads get the same one."""
    decoder_leads: tuple[str, ...] = ()
    """Leads to reconstruct; by default the leads that the encoders read."""
    fusion: Fusion = "hime"
    objective: Objective = "paper"
    """paper (eqs. 1 and 2), or released, that of the released code, whose terms have other units."""
    reconstruction_weight: float = 1000.0
    """lambda of eq. 2, the same for every lead. At 1 the posterior collapses, see docs/performance.md."""
    beta: float = 1.0
    """Weight of the KL term of eq. 2, after it has risen to its full value."""
    gamma: float = 0.01
    """Weight of the alignment term, eq. 1; 0 leaves it out."""
    lead_dropout: float = 0.0
    """Mean share of the observed leads that training hides from the encoders, up to 0.5."""

    def __post_init__(self) -> None:
        if self.samples < 8 or self.samples % 8:
            raise LsemvaeError(f"samples is {self.samples}: give a positive multiple of 8")
        if self.latent < 1 or len(self.channels) != 3 or min(self.channels) < 1:
            raise LsemvaeError(
                f"latent is {self.latent} and channels {self.channels}: give one positive size and three"
            )
        for name, kinds in (("decoder", DecoderKind), ("fusion", Fusion), ("objective", Objective)):
            if getattr(self, name) not in get_args(kinds):
                raise LsemvaeError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(get_args(kinds))}")
        if self.decoder_leads and in_order(self.decoder_leads) != self.decoder_leads:
            raise LsemvaeError(f"decoder_leads is {self.decoder_leads}: give names in the order {', '.join(LEADS)}")
        for name in ("reconstruction_weight", "beta", "gamma"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise LsemvaeError(f"{name} is {getattr(self, name)}: give a finite number, 0 or more")
        if not 0 <= self.lead_dropout <= 0.5:
            raise LsemvaeError(f"lead_dropout is {self.lead_dropout}: give a share between 0 and 0.5")

    def embedder(self, leads: Sequence[str], features: Features = "means") -> LeadEncoders:
        """Untrained lead encoders; only `fused` features need their log-variance heads."""
        leads = in_order(leads)
        sizes: dict[str, Any] = {"samples": self.samples, "latent": self.latent, "channels": self.channels}
        match features:
            case "means":
                return LeadEncoders(leads, **sizes, log_variance=False)
            case "pooled":
                return PooledEncoders(leads, **sizes, log_variance=False)
            case "fused":
                return FusedEncoders(leads, **sizes, kind=self.fusion)

    @classmethod
    def released(cls, **changes: Any) -> Self:
        """The authors' released code: its fusion, decoder, objective and weights."""
        preset = cls(decoder="paper", fusion="released", objective="released", reconstruction_weight=1e-3, gamma=0.1)
        return replace(preset, **changes)


TERMS = (
    "loss", "reconstruction", "kl", "alignment", "weighted_reconstruction", "weighted_kl", "weighted_alignment",
)  # fmt: skip
"""What `LSEMVAE.forward` returns."""


class _Pass(NamedTuple):
    """What a batch gave: its terms and which records are finite, the posterior, targets with their mask."""

    terms: tuple[dict[str, Tensor], Tensor]
    posterior: fusion.Posterior
    targets: tuple[Tensor, Tensor]


class LSEMVAE(nn.Module):
    """The model over `leads`, by name, in the fixed order I … V6. Inputs as in `lsemvae.models.contract`."""

    def __init__(self, config: LSEMVAEConfig, leads: Sequence[str] = LEADS) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)
        self.noise_size = config.latent
        self.encoders = LeadEncoders(self.leads, samples=config.samples, latent=config.latent, channels=config.channels)
        self.decoder = Decoder(
            config.decoder_leads or self.leads,
            samples=config.samples,
            latent=config.latent,
            channels=config.channels,
            kind=config.decoder,
        )

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

    def posterior(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> fusion.Posterior:
        """q(z given the observed leads), with its experts and their weights."""
        return self._fuse(*self._experts(x_BLT, lead_mask_BL), lead_mask_BL)

    def reconstruct(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """x_BLT over `decoder_leads`, from the posterior mean: six limb leads in, V1-V6 among those out."""
        return self.decoder(self.posterior(x_BLT, lead_mask_BL).mu_BD)

    def select(self, leads: Sequence[str]) -> Self:
        """The model that reads only the named leads and reconstructs what this one does. See LeadEncoders.select."""
        with torch.device("meta"):
            chosen = type(self)(replace(self.config, decoder_leads=self.decoder_leads), leads)
        chosen.encoders = self.encoders.select(leads)
        chosen.decoder = self.decoder
        return chosen.train(self.training)

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """The loss of a batch and its terms (eqs. 1 and 2), as in `lsemvae.models.contract.Trains`.

        batch: `x_BLT`, `lead_mask_BL`; optionally `target_BLT` and `target_mask_BL` over the decoder's leads, by
        default the input and its mask (a lead that is decoded but not read is then no target); `share_B`; `kl_scale`,
        how far beta has risen; and `noise_BD`, with z = mu + s * noise, in training and in evaluation.

        Returns "loss", the unweighted "reconstruction", "kl" (nats) and "alignment", and "weighted_reconstruction",
        "weighted_kl" and "weighted_alignment", which sum to the loss. A record with no lead at all is not finite.
        """
        found, good_B = self._evaluate(batch).terms
        if not check:
            return found | {"good_B": good_B}
        objectives.require(good_B, "NaN, infinity or no lead at all")
        return found

    def validation(self) -> ReconstructionPass:
        """Loss terms, active units and how well each lead is reconstructed from the posterior mean."""
        device = self.decoder.fc.weight.device

        def evaluate(batch: Mapping[str, Tensor]) -> Evaluated:
            now = self._evaluate({name: values for name, values in batch.items() if name != "kl_scale"})
            found, good_B = now.terms
            objectives.require(good_B, "NaN, infinity or no lead at all")
            prediction_BLT = self.decoder(now.posterior.mu_BD)
            return Evaluated(found, now.posterior.mu_BD, now.posterior.logvar_BD, prediction_BLT, *now.targets)

        return ReconstructionPass(evaluate, TERMS, self.config.latent, self.decoder_leads, device)

    def _evaluate(self, batch: Mapping[str, Tensor]) -> _Pass:
        x_BLT, lead_mask_BL, share_B = batch["x_BLT"], batch["lead_mask_BL"], batch.get("share_B")
        target_BLT, target_mask_BL = self._targets(batch)
        seen_mask_BL = lead_mask_BL
        if self.training and self.config.lead_dropout > 0:
            seen_mask_BL = hide_leads(lead_mask_BL, self.config.lead_dropout)

        mu_BLD, logvar_BLD = self._experts(x_BLT, seen_mask_BL)
        posterior = self._fuse(mu_BLD, logvar_BLD, seen_mask_BL)
        noise_BD = batch["noise_BD"] if "noise_BD" in batch else torch.randn_like(posterior.mu_BD)
        prediction_BLT = self.decoder(posterior.mu_BD + (0.5 * posterior.logvar_BD).exp() * noise_BD)

        if self.config.objective == "paper":
            reconstruction_B = objectives.reconstruction(prediction_BLT, target_BLT, target_mask_BL)
            kl_B = objectives.kl_to_prior(posterior.mu_BD, posterior.logvar_BD).sum(dim=-1)
            alignment_B = objectives.alignment(posterior.expert_mu_BKD, posterior.expert_mask_BK, posterior.mu_BD)
        else:
            reconstruction_B = objectives.released_reconstruction(prediction_BLT, target_BLT, target_mask_BL)
            kl_B, alignment_B = objectives.released_kl_and_alignment(mu_BLD, logvar_BLD, seen_mask_BL)
        terms = {
            "reconstruction": objectives.average(reconstruction_B, share_B),
            "kl": objectives.average(kl_B, share_B),
            "alignment": objectives.average(alignment_B, share_B),
        }
        weights = {
            "reconstruction": self.config.reconstruction_weight,
            "kl": self.config.beta * batch.get("kl_scale", 1.0),
            "alignment": self.config.gamma,
        }
        weighted = {f"weighted_{name}": weights[name] * term for name, term in terms.items()}
        good_B = (
            objectives.finite_records(x_BLT, lead_mask_BL)
            & objectives.finite_records(target_BLT, target_mask_BL)
            & objectives.finite_records((reconstruction_B + kl_B + alignment_B).detach())
            & lead_mask_BL.any(dim=1)
        )
        loss = weighted["weighted_reconstruction"] + weighted["weighted_kl"] + weighted["weighted_alignment"]
        found = {"loss": loss} | {name: term.detach() for name, term in (terms | weighted).items()}
        return _Pass((found, good_B), posterior, (target_BLT, target_mask_BL))

    def _experts(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoders(self.encoders.masked(x_BLT, lead_mask_BL))

    def _fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor) -> fusion.Posterior:
        return fusion.fuse(self.config.fusion, mu_BLD, logvar_BLD, lead_mask_BL, self.leads)

    def _targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Targets and their mask over the decoder's leads."""
        shape = (len(batch["x_BLT"]), len(self.decoder_leads), self.config.samples)
        if "target_BLT" in batch:
            target_BLT, mask_BL = batch["target_BLT"], batch["target_mask_BL"]
        elif self.decoder_leads == self.leads:
            target_BLT, mask_BL = batch["x_BLT"], batch.get("target_mask_BL", batch["lead_mask_BL"])
        else:
            target_BLT = batch["x_BLT"].new_zeros(shape)
            mask_BL = batch["lead_mask_BL"].new_zeros(shape[:2])
            for row, lead in enumerate(self.leads):
                if lead in self.decoder_leads:
                    target_BLT[:, self.decoder_leads.index(lead)] = batch["x_BLT"][:, row]
                    mask_BL[:, self.decoder_leads.index(lead)] = batch["lead_mask_BL"][:, row]
        if target_BLT.shape != shape or mask_BL.shape != shape[:2]:
            raise LsemvaeError(
                f"targets are {list(target_BLT.shape)} with a mask {list(mask_BL.shape)}: "
                f"give {list(shape)} for {', '.join(self.decoder_leads)}"
            )
        return target_BLT, mask_BL


PRESETS = {
    "paper": LSEMVAEConfig(),
    "released": LSEMVAEConfig.released(),
    "cpu": LSEMVAEConfig(samples=2496, latent=64, channels=(8, 16, 16)),
    "small": LSEMVAEConfig(latent=128, channels=(4, 8, 8)),
    "smoke": LSEMVAEConfig(latent=16, channels=(4, 8, 8)),
}
"""Configurations that recipes name."""

_ENCODER_PARTS = ("conv1", "conv2", "conv3", "fc_mu", "fc_logvar")
_DECODER_PARTS = ("fc", "convtrans1", "convtrans2", "convtrans3")


def _released_parameters(model: LSEMVAE) -> dict[str, Tensor]:
    """This model's parameters, by the released code's keys: rows of tensors, sharing their memory."""
    named = {}
    for row, lead in enumerate(model.leads):
        for part in _ENCODER_PARTS:
            for kind in ("weight", "bias"):
                values = getattr(getattr(model.encoders, part), kind).detach()[row]
                if part.startswith("fc") and kind == "weight":
                    values = values.T  # LeadLinear keeps the transpose of nn.Linear's weight
                named[f"encoders.{LEADS.index(lead)}.{part}.{kind}"] = values
    for part in _DECODER_PARTS:
        for kind in ("weight", "bias"):
            named[f"shared_decoder.{part}.{kind}"] = getattr(getattr(model.decoder, part), kind).detach()
    return named


def to_released_state_dict(model: LSEMVAE) -> dict[str, Tensor]:
    """The model's parameters as the released code names and orders them. They share the model's memory.

    Raises LsemvaeError unless the model has all twelve leads and the paper's decoder.
    """
    if model.leads != LEADS or model.config.decoder != "paper":
        raise LsemvaeError(
            f"the released layout holds twelve leads and the decoder of the paper; this model reads "
            f"{', '.join(model.leads)} and has decoder={model.config.decoder!r}"
        )
    return _released_parameters(model)


@torch.no_grad()
def load_released_state_dict(model: LSEMVAE, state: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint of the released code into the model; lead names decide which encoder goes where.

    Keys may carry torch.compile's prefix `_orig_mod.`. A model with fewer leads takes those it has. Raises
    BundleError naming a key that is missing, not known, or of another shape; the model is then unchanged.
    """
    if model.config.decoder != "paper":
        raise LsemvaeError(f"decoder is {model.config.decoder!r}: a released checkpoint needs decoder='paper'")
    state = {key.removeprefix("_orig_mod."): values for key, values in state.items()}
    wanted = _released_parameters(model)
    known = {
        f"encoders.{row}.{part}.{kind}"
        for row in range(len(LEADS))
        for part in _ENCODER_PARTS
        for kind in ("weight", "bias")
    } | {f"shared_decoder.{part}.{kind}" for part in _DECODER_PARTS for kind in ("weight", "bias")}
    for trouble, keys in (("lacks", known - state.keys()), ("has the unknown", state.keys() - known)):
        if keys:
            raise BundleError(f"the released checkpoint {trouble} key {', '.join(sorted(keys)[:5])}")
    for key, values in wanted.items():
        if state[key].shape != values.shape:
            raise BundleError(
                f"{key} is {list(state[key].shape)} in the released checkpoint and {list(values.shape)} "
                "in this model: give it the same samples, latent and channels"
            )
    for key, values in wanted.items():
        values.copy_(state[key])
