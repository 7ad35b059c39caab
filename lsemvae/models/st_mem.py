"""ST-MEM: a Transformer over patches of single leads, pre-trained to fill in masked patches (Na et al., ICLR 2024).

Each lead is cut into patches. A token is a patch with the embeddings of its time and its lead; a SEP token stands at
both ends of each lead. In pre-training the encoder sees a quarter of the patches, and a light decoder fills in the
others, lead by lead. A classifier's encoder sees all patches of whatever leads there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts import objectives
from lsemvae.models.parts.diagnostics import pearson_r
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.whole import (
    PreNormLayers,
    WholeEncoder,
    WholeModel,
    as_features,
    require_attention,
    require_patches,
    sine_positions,
)

COLLAPSED_VARIANCE = 1e-6
"""Below this mean variance over records the encoder gives every record the same features."""


@dataclass(frozen=True)
class STMEMConfig(EncoderConfig):
    """Sizes and masking. The defaults are the paper's ViT-B with patches of 0.25 s: its 0.3 s do not divide 10 s."""

    architecture: ClassVar[str] = "st-mem"
    title: ClassVar[str] = "ST-MEM"

    samples: int = 5000
    """Time points of a record."""
    patch: int = 125
    """Time points of a token; it divides `samples`."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 256
    decoder_depth: int = 4
    decoder_heads: int = 4
    masked_share: float = 0.75
    """Share of each lead's patches that pre-training hides."""

    def __post_init__(self) -> None:
        require_patches(self.samples, self.patch)
        require_attention(self.width, self.depth, self.heads)
        require_attention(self.decoder_width, self.decoder_depth, self.decoder_heads)
        if not 0 < self.visible < self.patches:
            raise LsemvaeError(
                f"masked_share is {self.masked_share}: of {self.patches} patches some must be masked, and some not"
            )

    @property
    def patches(self) -> int:
        """N, the patches of a lead."""
        return self.samples // self.patch

    @property
    def visible(self) -> int:
        """V, the patches of a lead that the encoder sees in pre-training."""
        return self.patches - round(self.masked_share * self.patches)

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(STMEMEncoder(self, leads), features)


class STMEMEncoder(WholeEncoder):
    """The embeddings and the Transformer. h_BF is the mean over the patch tokens of the observed leads; F the width."""

    by_lead: ClassVar[Mapping[str, int]] = {"lead_LW": 0}
    position_NW: Tensor

    def __init__(self, config: STMEMConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        self.patch = nn.Linear(config.patch, config.width)
        self.register_buffer("position_NW", sine_positions(config.patches + 2, config.width))
        self.lead_LW = _embedding(len(self.leads), config.width)
        self.sep_W = _embedding(config.width)
        self.layers = PreNormLayers(config.width, config.depth, config.heads)

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.config.width

    def encode(self, patch_BLNP: Tensor, lead_mask_BL: Tensor, visible_BLV: Tensor | None = None) -> Tensor:
        """The tokens' outputs, lead by lead: SEP, the patches (of `visible_BLV` if given), SEP, [B, L, V + 2, W].

        Those of absent leads have no meaning; no other token attends to them.
        """
        h_BLNW = self.patch(patch_BLNP) + self.position_NW[1:-1] + self.lead_LW.unsqueeze(1)
        if visible_BLV is not None:
            h_BLNW = h_BLNW.gather(2, visible_BLV.unsqueeze(-1).expand(-1, -1, -1, h_BLNW.shape[-1]))
        ends_L2W = self.sep_W + self.position_NW[:: self.config.patches + 1] + self.lead_LW.unsqueeze(1)
        ends_BL2W = ends_L2W.to(h_BLNW.dtype).expand(len(h_BLNW), -1, -1, -1)
        h_BLNW = torch.cat([ends_BL2W[:, :, :1], h_BLNW, ends_BL2W[:, :, 1:]], dim=2)
        hidden_BS = ~lead_mask_BL.repeat_interleave(h_BLNW.shape[2], dim=1)
        return self.layers(h_BLNW.flatten(1, 2), hidden_BS).unflatten(1, (len(self.leads), -1))

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: no masking."""
        return self.average(self.encode(patches(x_BLT, self.config.patch), lead_mask_BL), lead_mask_BL)

    def average(self, h_BLNW: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF, the mean over the patch tokens of observed leads, without the SEP tokens."""
        of_lead_BLW = full_precision(h_BLNW[:, :, 1:-1]).mean(dim=2)
        kept_BLW = torch.where(lead_mask_BL.unsqueeze(-1), of_lead_BLW, torch.zeros_like(of_lead_BLW))
        return kept_BLW.sum(dim=1) / lead_mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


class LeadDecoder(nn.Module):
    """Fills in each lead by itself from its visible tokens and its SEP tokens; the same weights for all leads."""

    position_NW: Tensor

    def __init__(self, config: STMEMConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.enter = nn.Linear(config.width, width)
        self.mask_W = _embedding(width)
        self.register_buffer("position_NW", sine_positions(config.patches + 2, width))
        self.layers = PreNormLayers(width, config.decoder_depth, config.decoder_heads)
        self.leave = nn.Linear(width, config.patch)

    def forward(self, h_BLNW: Tensor, visible_BLV: Tensor) -> Tensor:
        """What `STMEMEncoder.encode` gives -> all patches, [B, L, N, P]."""
        h_BLNW = self.enter(h_BLNW)
        batch, leads, _, width = h_BLNW.shape
        places_BLVW = visible_BLV.unsqueeze(-1).expand(-1, -1, -1, width)
        blank_BLNW = self.mask_W.to(h_BLNW.dtype).expand(batch, leads, len(self.position_NW) - 2, width)
        filled_BLNW = blank_BLNW.scatter(2, places_BLVW, h_BLNW[:, :, 1:-1])
        h_BLNW = torch.cat([h_BLNW[:, :, :1], filled_BLNW, h_BLNW[:, :, -1:]], dim=2) + self.position_NW
        return self.leave(self.layers(h_BLNW.flatten(0, 1))[:, 1:-1]).unflatten(0, (batch, leads))


class Filled(NamedTuple):
    """What a batch gave. `masked_BLN` is True at masked patches of observed leads, where the loss is."""

    error_B: Tensor
    good_B: Tensor
    h_BF: Tensor
    prediction_BLNP: Tensor
    target_BLNP: Tensor
    masked_BLN: Tensor


class STMEM(WholeModel):
    """The masked autoencoder over `leads`. Inputs as in `lsemvae.models.contract`."""

    encoder: STMEMEncoder

    def __init__(self, config: STMEMConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        self.noise_size = len(self.leads) * config.patches
        self.encoder = STMEMEncoder(config, leads)
        self.decoder = LeadDecoder(config)

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The trained encoder with the embeddings of the named leads."""
        return as_features(self.encoder.select(leads), features)

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """The loss of a batch, as in `lsemvae.models.contract.Trains`: a mean over masked patches of observed leads.

        batch: `x_BLT`, `lead_mask_BL`; optionally `share_B`; and `noise_BD`, one number for each patch of each lead:
        the patches of a lead with the smallest numbers stay visible.
        """
        scores = batch["noise_BD"] if "noise_BD" in batch else torch.rand(
            (len(batch["x_BLT"]), self.noise_size), device=batch["x_BLT"].device
        )  # fmt: skip
        now = self.fill(batch, scores.unflatten(1, (len(self.leads), -1)))
        loss = objectives.average(now.error_B, batch.get("share_B"))
        found = {"loss": loss, "reconstruction": loss.detach()}
        return objectives.checked(found, now.good_B, "NaN, infinity or no lead at all", check=check)

    def validation(self) -> "MaskedPass":
        """The loss and how well each lead's masked patches are filled in, under the same masking in every epoch."""
        return MaskedPass(self)

    def fill(self, batch: Mapping[str, Tensor], score_BLN: Tensor) -> Filled:
        """Mask all patches of each lead but the V with the smallest scores, and fill them in."""
        lead_mask_BL = batch["lead_mask_BL"]
        patch_BLNP = patches(self.encoder.masked(batch["x_BLT"], lead_mask_BL), self.config.patch)
        # Each lead keeps the same number, so that records with absent leads fit into one tensor.
        visible_BLV = score_BLN.topk(self.config.visible, dim=2, largest=False).indices
        hidden_BLN = torch.ones_like(score_BLN, dtype=torch.bool).scatter(2, visible_BLV, False)
        masked_BLN = hidden_BLN & lead_mask_BL.unsqueeze(-1)
        h_BLVW = self.encoder.encode(patch_BLNP, lead_mask_BL, visible_BLV)
        prediction_BLNP = full_precision(self.decoder(h_BLVW, visible_BLV))
        target_BLNP = normalised(patch_BLNP)
        error_BLN = (prediction_BLNP - target_BLNP).square().mean(dim=3)
        error_BLN = torch.where(masked_BLN, error_BLN, torch.zeros_like(error_BLN))
        error_B = error_BLN.sum(dim=(1, 2)) / masked_BLN.sum(dim=(1, 2)).clamp(min=1)
        good_B = (
            objectives.finite_records(batch["x_BLT"], lead_mask_BL)
            & objectives.finite_records(error_B.detach())
            & lead_mask_BL.any(dim=1)
        )
        h_BF = self.encoder.average(h_BLVW, lead_mask_BL)
        return Filled(error_B, good_B, h_BF, prediction_BLNP, target_BLNP, masked_BLN)


class MaskedPass:
    """A validation pass of a masked autoencoder; see `lsemvae.models.contract.Validation`."""

    def __init__(self, model: STMEM) -> None:
        self._model = model
        device, leads, width = model.encoder.sep_W.device, len(model.leads), model.embedding_size
        sizes: dict[str, tuple[int, ...]] = {"records": (), "loss": (), "r_L": (leads,), "count_L": (leads,)}
        sizes |= {"h_F": (width,), "h_square_F": (width,)}
        self._sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        # For batches without noise, by lead and place in time: the same in every epoch and for every set of leads.
        generator = torch.Generator().manual_seed(0)
        score_LN = torch.rand((len(LEADS), model.config.patches), generator=generator)
        self._score_LN = score_LN[[LEADS.index(lead) for lead in model.leads]].to(device)

    @torch.no_grad()
    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Add a batch."""
        size, sums = len(batch["x_BLT"]), self._sums
        score_BLN = self._score_LN.expand(size, -1, -1)
        if "noise_BD" in batch:  # pre-training gives a held-out record the same numbers in every epoch
            score_BLN = batch["noise_BD"].unflatten(1, self._score_LN.shape)
        now = self._model.fill(batch, score_BLN)
        objectives.require(now.good_B, "NaN, infinity or no lead at all")
        # Each lead has the same number of masked patches. Those of an absent lead are zeros: r does not count there.
        hidden_BLM = score_BLN.argsort(dim=2)[:, :, self._model.config.visible :]
        at_BLMP = hidden_BLM.unsqueeze(-1).expand(-1, -1, -1, self._model.config.patch)
        pair = (values_BLNP.gather(2, at_BLMP).flatten(2) for values_BLNP in (now.prediction_BLNP, now.target_BLNP))
        r_BL, varies_BL = pearson_r(*pair)
        h_BF = now.h_BF.double()
        for name, total in (
            ("records", torch.tensor(size)),
            ("loss", now.error_B.double().sum()),
            ("r_L", torch.where(varies_BL, r_BL, 0.0).double().sum(dim=0)),
            ("count_L", varies_BL.sum(dim=0)),
            ("h_F", h_BF.sum(dim=0)),
            ("h_square_F", h_BF.square().sum(dim=0)),
        ):
            sums[name] += total

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, always in the same order."""
        return tuple(self._sums.values())

    def metrics(self) -> dict[str, float]:
        """The loss, Pearson's r over each lead's masked patches and its mean, and whether all features are constant."""
        sums, records = self._sums, self._sums["records"]
        loss = float(sums["loss"] / records)
        values = {"loss": loss, "reconstruction": loss}
        by_lead = {
            f"r/{lead}": float(sums["r_L"][row] / sums["count_L"][row])
            for row, lead in enumerate(self._model.leads)
            if sums["count_L"][row] > 0
        }
        variance_F = sums["h_square_F"] / records - (sums["h_F"] / records).square()
        values |= by_lead | {"pearson_r": sum(by_lead.values()) / max(len(by_lead), 1)}
        return values | {"collapsed": float(variance_F.mean() < COLLAPSED_VARIANCE)}


def patches(x_BLT: Tensor, patch: int) -> Tensor:
    """[B, L, N, P]."""
    return x_BLT.unflatten(2, (-1, patch))


def normalised(patch_BLNP: Tensor) -> Tensor:
    """Each patch minus its mean, by its standard deviation: what the decoder has to give."""
    variance, mean = torch.var_mean(full_precision(patch_BLNP), dim=3, keepdim=True)
    return (full_precision(patch_BLNP) - mean) / (variance + 1e-6).sqrt()


def _embedding(*shape: int) -> nn.Parameter:
    """U(-1, 1): of the size of an embedded patch of a signal with variance 1."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1))


PRESETS = {
    "full": STMEMConfig(),
    "cpu": STMEMConfig(samples=2496, patch=104, width=64, depth=2, heads=2, decoder_width=32, decoder_depth=1),
    "smoke": STMEMConfig(
        patch=250, width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2
    ),
}  # fmt: skip
"""Configurations that recipes name."""
