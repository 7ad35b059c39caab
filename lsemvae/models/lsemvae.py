"""LS-EMVAE: one encoder a lead, hierarchical fusion (HiME), one decoder (arXiv 2503.13470).

`LSEMVAEConfig()` is the paper's model with a decoder that knows which lead it writes. The released code's
model and the ablations are settings of the same class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.parts import objectives
from lsemvae.models.parts.augment import hide_leads
from lsemvae.models.parts.blocks import Decoder
from lsemvae.models.parts.fusion import Fusion, Gaussian, Posterior, fuse
from lsemvae.models.parts.lead_vae import LeadVAE, LeadVAEConfig, Outcome

DecoderKind = Literal["lead", "paper"]
Objective = Literal["paper", "released"]


@dataclass(frozen=True)
class LSEMVAEConfig(LeadVAEConfig):
    """Fusion and objective of the model, beside its sizes. The defaults are the paper's sizes."""

    architecture: ClassVar[str] = "lsemvae"
    title: ClassVar[str] = "LS-EMVAE"

    decoder: DecoderKind = "lead"
    """lead: each lead has its own reconstruction; paper: all leads get the same one."""
    fusion: Fusion = "hime"
    objective: Objective = "paper"
    """paper (eqs. 1 and 2), or released, that of the released code, whose terms have other units."""
    gamma: float = 0.01
    """Weight of the alignment term, eq. 1; 0 leaves it out."""
    lead_dropout: float = 0.0
    """Mean share of the observed leads that training hides from the encoders, up to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("decoder", DecoderKind), ("fusion", Fusion), ("objective", Objective)):
            if getattr(self, name) not in get_args(kinds):
                raise LsemvaeError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(get_args(kinds))}")
        self._require_weights("gamma")
        if not 0 <= self.lead_dropout <= 0.5:
            raise LsemvaeError(f"lead_dropout is {self.lead_dropout}: give a share between 0 and 0.5")

    def fuse(self, mu_BLD: Tensor, logvar_BLD: Tensor, lead_mask_BL: Tensor, leads: Sequence[str]) -> Posterior:
        """The posterior by the fusion of this name."""
        return fuse(self.fusion, mu_BLD, logvar_BLD, lead_mask_BL, leads)

    @classmethod
    def released(cls, **changes: Any) -> Self:
        """The authors' released code: its fusion, decoder, objective and weights."""
        preset = cls(decoder="paper", fusion="released", objective="released", reconstruction_weight=1e-3, gamma=0.1)
        return replace(preset, **changes)


class LSEMVAE(LeadVAE):
    """The model over `leads`. Loss terms: "reconstruction", "kl" (eq. 2) and "alignment" (eq. 1).

    Noise: `noise_BD` in z = mu + s * noise.
    """

    config: LSEMVAEConfig

    def __init__(self, config: LSEMVAEConfig, leads: Sequence[str] = LEADS) -> None:
        super().__init__(config, leads, noise_size=config.latent)
        self.decoder = Decoder(config.decoder_leads or self.leads, **config.sizes, kind=config.decoder)

    def select(self, leads: Sequence[str]) -> Self:
        """The model that reads only the named leads and reconstructs what this one does. See LeadEncoders.select."""
        with torch.device("meta"):
            chosen = type(self)(replace(self.config, decoder_leads=self.decoder_leads), leads)
        chosen.encoders = self.encoders.select(leads)
        chosen.decoder = self.decoder
        return chosen.train(self.training)

    def _weights(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return super()._weights(batch) | {"alignment": self.config.gamma}

    def _objective(self, batch: Mapping[str, Tensor], target_BLT: Tensor, target_mask_BL: Tensor) -> Outcome:
        seen_mask_BL = batch["lead_mask_BL"]
        if self.training and self.config.lead_dropout > 0:
            seen_mask_BL = hide_leads(seen_mask_BL, self.config.lead_dropout)
        mu_BLD, logvar_BLD = self._experts(batch["x_BLT"], seen_mask_BL)
        posterior = self.config.fuse(mu_BLD, logvar_BLD, seen_mask_BL, self.leads)
        prediction_BLT = self.decoder(posterior.mu_BD + (0.5 * posterior.logvar_BD).exp() * self._noise(batch))

        if self.config.objective == "paper":
            reconstruction_B = objectives.reconstruction(prediction_BLT, target_BLT, target_mask_BL)
            kl_B = objectives.kl_to_prior(posterior.mu_BD, posterior.logvar_BD).sum(dim=-1)
            alignment_B = objectives.alignment(posterior.expert_mu_BKD, posterior.expert_mask_BK, posterior.mu_BD)
        else:
            reconstruction_B = objectives.released_reconstruction(prediction_BLT, target_BLT, target_mask_BL)
            kl_B, alignment_B = objectives.released_kl_and_alignment(mu_BLD, logvar_BLD, seen_mask_BL)
        terms_B = {"reconstruction": reconstruction_B, "kl": kl_B, "alignment": alignment_B}
        return Outcome(terms_B, Gaussian(posterior.mu_BD, posterior.logvar_BD), posterior.mu_BD)


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
