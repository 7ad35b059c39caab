"""A head on frozen lead encoders: what is fine-tuned, scored and served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import in_order
from lsemvae.models import objectives
from lsemvae.models.blocks import LeadEncoders
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig, embed_leads


@dataclass(frozen=True)
class ClassifierConfig:
    """The encoder's configuration and the head's (section 2.3 of the paper).

    focal_gamma   focusing of the focal loss; 0 is the cross-entropy
    focal_alpha   weight of the positives, 1 - alpha that of the negatives; None weighs neither
    """

    architecture: ClassVar[str] = "classifier"

    encoder: LSEMVAEConfig = field(default_factory=LSEMVAEConfig)
    hidden: int = 128
    dropout: float = 0.5
    focal_gamma: float = 2.0
    focal_alpha: float | None = None

    def __post_init__(self) -> None:
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            raise LsemvaeError(
                f"hidden is {self.hidden} and dropout {self.dropout}: give 1 or more, and a share below 1"
            )
        if not 0 <= self.focal_gamma < float("inf"):
            raise LsemvaeError(f"focal_gamma is {self.focal_gamma}: give a finite number, 0 or more")
        if self.focal_alpha is not None and not 0 < self.focal_alpha < 1:
            raise LsemvaeError(f"focal_alpha is {self.focal_alpha}: give a share between 0 and 1, or nothing")


class Head(nn.Module):
    """Standardisation and two fully connected layers on an embedding: h_BF -> logit_B.

    Trains alone on embeddings that were computed once, since the encoders are frozen. Where a lead mask is
    given, an absent lead counts as that lead's average, not as the embedding's zeros.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 128,
        dropout: float = 0.5,
        focal_gamma: float = 2.0,
        focal_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("scale_F", torch.ones(features))
        self.fc1 = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, 1)

    @torch.no_grad()
    def standardise_from(self, h_BF: Tensor, lead_mask_BL: Tensor | None = None) -> None:
        """Set mean and scale from the training embeddings; with a mask, from the observed leads alone."""
        there_BF = torch.ones_like(h_BF, dtype=torch.bool)
        if lead_mask_BL is not None:
            there_BF = self._features_of(lead_mask_BL)
        count_F = there_BF.sum(dim=0).clamp(min=1)
        values_BF = torch.where(there_BF, h_BF, 0).double()
        mean_F = values_BF.sum(dim=0) / count_F
        variance_F = torch.where(there_BF, values_BF - mean_F, 0).square().sum(dim=0) / count_F
        self.mean_F.copy_(mean_F)
        # A feature that never varies says nothing: it is centred and left at its own scale.
        self.scale_F.copy_(torch.where(variance_F > 1e-12, variance_F, 1.0).sqrt())

    def logit(self, h_BF: Tensor, lead_mask_BL: Tensor | None = None) -> Tensor:
        """h_BF -> logit_B."""
        if h_BF.ndim != 2 or h_BF.shape[1] != len(self.mean_F):
            raise LsemvaeError(f"the embedding is {list(h_BF.shape)}: give [batch, {len(self.mean_F)}]")
        standard_BF = (h_BF - self.mean_F) / self.scale_F
        if lead_mask_BL is not None:
            standard_BF = torch.where(self._features_of(lead_mask_BL), standard_BF, torch.zeros_like(standard_BF))
        return self.fc2(self.dropout(F.relu(self.fc1(standard_BF)))).squeeze(-1)

    def predict(self, h_BF: Tensor, lead_mask_BL: Tensor | None = None) -> Tensor:
        """h_BF -> probability_B of the positive class."""
        return torch.sigmoid(self.logit(h_BF, lead_mask_BL).float())

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """batch: `h_BF`, `y_B` (0 or 1), optionally `lead_mask_BL` -> "loss", and "focal", the same detached.

        `share_B` and `check` as for LSEMVAE. Raises NonFiniteBatch with the positions of records whose loss is
        not finite.
        """
        logit_B = self.logit(batch["h_BF"], batch.get("lead_mask_BL"))
        loss_B = objectives.binary_focal(logit_B, batch["y_B"], self.focal_gamma, self.focal_alpha)
        good_B = objectives.finite_records(loss_B.detach())
        loss = objectives.average(loss_B, batch.get("share_B"))
        found = {"loss": loss, "focal": loss.detach()}
        if not check:
            return found | {"good_B": good_B}
        objectives.require(good_B, "NaN or infinity")
        return found

    def _features_of(self, lead_mask_BL: Tensor) -> Tensor:
        """The mask of the leads, repeated over each lead's features: [B, F]."""
        return lead_mask_BL.repeat_interleave(len(self.mean_F) // lead_mask_BL.shape[1], dim=1)


class Classifier(nn.Module):
    """Lead encoders without log-variance heads, and a head: x_BLT, lead_mask_BL -> probability_B.

    Inputs as for LSEMVAE, over this model's `leads`.
    """

    def __init__(self, config: ClassifierConfig, leads: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)
        self.encoders = LeadEncoders(
            self.leads,
            samples=config.encoder.samples,
            latent=config.encoder.latent,
            channels=config.encoder.channels,
            log_variance=False,
        )
        self.head = Head(
            self.embedding_size,
            hidden=config.hidden,
            dropout=config.dropout,
            focal_gamma=config.focal_gamma,
            focal_alpha=config.focal_alpha,
        )

    @classmethod
    def from_encoder(cls, model: LSEMVAE, leads: Sequence[str], head: Head) -> Self:
        """The encoders of the named leads of a pre-trained model under a head trained on their embeddings.

        Memory is shared with `model` where LeadEncoders.select can, and with `head`.
        """
        config = ClassifierConfig(
            encoder=model.config,
            hidden=head.fc1.out_features,
            dropout=head.dropout.p,
            focal_gamma=head.focal_gamma,
            focal_alpha=head.focal_alpha,
        )
        with torch.device("meta"):
            classifier = cls(config, leads)
        if len(head.mean_F) != classifier.embedding_size:
            raise LsemvaeError(
                f"the head reads {len(head.mean_F)} features and {', '.join(classifier.leads)} give "
                f"{classifier.embedding_size}: train it on embeddings of these leads"
            )
        classifier.encoders = model.encoders.select(leads, log_variance=False)
        classifier.head = head
        return classifier.train(head.training)

    @property
    def embedding_size(self) -> int:
        """F = L x D."""
        return len(self.leads) * self.config.encoder.latent

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: the lead means one after another, zeros for an absent lead."""
        return embed_leads(self.encoders, x_BLT, lead_mask_BL)

    def predict(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """probability_B of the positive class."""
        return self.head.predict(self.embed(x_BLT, lead_mask_BL), lead_mask_BL)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """batch: `x_BLT`, `lead_mask_BL`, `y_B` -> what Head.forward gives: training end to end."""
        h_BF = self.embed(batch["x_BLT"], batch["lead_mask_BL"])
        return self.head({"h_BF": h_BF, "y_B": batch["y_B"], "lead_mask_BL": batch["lead_mask_BL"]})
