"""A foreign architecture: small, with features that belong to no lead. What follows the contract must work with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import in_order
from lsemvae.models import EncoderConfig, Features
from lsemvae.models.parts import objectives, shifts


@dataclass(frozen=True)
class TinyConfig(EncoderConfig):
    """A linear autoencoder of every tenth sample's mean over the observed leads."""

    architecture: ClassVar[str] = "tiny"
    title: ClassVar[str] = "Tiny"

    samples: int = 5000
    width: int = 3

    def embedder(self, leads: Sequence[str], features: Features = "means") -> "TinyEncoder":
        if features != "means":
            raise LsemvaeError(f"Tiny gives no {features} features: choose means")
        return TinyEncoder(self, leads)


class TinyEncoder(nn.Module):
    def __init__(self, config: TinyConfig, leads: Sequence[str]) -> None:
        super().__init__()
        self.leads, self.samples = in_order(leads), config.samples
        self.linear = nn.Linear(config.samples // 10, config.width)

    @property
    def embedding_size(self) -> int:
        return self.linear.out_features

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        if x_BLT.shape[1:] != (len(self.leads), self.samples) or lead_mask_BL.shape != x_BLT.shape[:2]:
            raise LsemvaeError(f"the input is {list(x_BLT.shape)}: give {len(self.leads)} leads")
        return self.linear(self.signal(x_BLT, lead_mask_BL))

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        size_B = shifts.recorded_samples(x_BLT)
        return torch.stack([self.embed(shifts.shifted(x_BLT, size_B, shift), lead_mask_BL) for shift in shift_S])

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        return torch.ones(len(lead_mask_BL), self.embedding_size, dtype=torch.bool, device=lead_mask_BL.device)

    def signal(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        kept_BLT = torch.where(lead_mask_BL.unsqueeze(-1), x_BLT, torch.zeros_like(x_BLT))[..., ::10]
        return kept_BLT.sum(dim=1) / lead_mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


class TinyPass:
    def __init__(self, model: "Tiny") -> None:
        self._model = model
        self._loss = torch.zeros((), dtype=torch.float64)
        self._records = torch.zeros((), dtype=torch.float64)

    def update(self, batch: Mapping[str, Tensor]) -> None:
        size = len(batch["x_BLT"])
        self._loss += self._model(batch)["loss"].double() * size
        self._records += size

    def tensors(self) -> tuple[Tensor, ...]:
        return self._loss, self._records

    def metrics(self) -> dict[str, float]:
        return {"loss": float(self._loss / self._records), "collapsed": 0.0}


class Tiny(nn.Module):
    noise_size = 0

    def __init__(self, config: TinyConfig, leads: Sequence[str]) -> None:
        super().__init__()
        self.config, self.leads = config, in_order(leads)
        self.encoder = config.embedder(leads)
        self.decode = nn.Linear(config.width, config.samples // 10)

    @property
    def embedding_size(self) -> int:
        return self.encoder.embedding_size

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        return self.encoder.embed(x_BLT, lead_mask_BL)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        return self.encoder.observed(lead_mask_BL)

    def embedder(self, leads: Sequence[str], features: Features = "means") -> TinyEncoder:
        if features != "means":
            raise LsemvaeError(f"Tiny gives no {features} features: choose means")
        if in_order(leads) != self.leads:
            raise LsemvaeError(f"this model reads {', '.join(self.leads)} together")
        return self.encoder

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        x_BLT, mask_BL = batch["x_BLT"], batch["lead_mask_BL"]
        difference_BT = self.decode(self.embed(x_BLT, mask_BL)) - self.encoder.signal(x_BLT, mask_BL)
        error_B = difference_BT.square().mean(dim=1)
        loss = objectives.average(error_B, batch.get("share_B"))
        good_B = objectives.finite_records(error_B.detach())
        if not check:
            return {"loss": loss, "good_B": good_B}
        objectives.require(good_B, "NaN or infinity")
        return {"loss": loss}

    def validation(self) -> TinyPass:
        return TinyPass(self)
