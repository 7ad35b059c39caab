"""An encoder and a head: what is fine-tuned, scored and served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import in_order
from lsemvae.models.contract import EncoderConfig, Features
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.models.parts import doubt, shifts
from lsemvae.models.parts.head import Head


@dataclass(frozen=True)
class ClassifierConfig:
    """The encoder's configuration and the head's (section 2.3 of the paper).

    hidden        units of the head's hidden layer; 0 is a linear head, logistic regression
    focal_gamma   focusing of the focal loss; 0 is the cross-entropy
    focal_alpha   weight of the positives, 1 - alpha that of the negatives; None weighs neither
    features      what the encoder gives to the head
    shifts        a score is the mean logit over so many circular time shifts of the recording
    """

    architecture: ClassVar[str] = "classifier"
    before: ClassVar[Mapping[str, Any]] = {"features": "means", "shifts": 1}

    encoder: EncoderConfig = field(default_factory=LSEMVAEConfig)
    hidden: int = 128
    dropout: float = 0.5
    focal_gamma: float = 2.0
    focal_alpha: float | None = None
    features: Features = "means"
    shifts: int = 1

    def __post_init__(self) -> None:
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise LsemvaeError(
                f"hidden is {self.hidden} and dropout {self.dropout}: give 0 or more, and a share below 1"
            )
        if self.shifts < 1:
            raise LsemvaeError(f"shifts is {self.shifts}: give 1 or more")
        if not 0 <= self.focal_gamma < float("inf"):
            raise LsemvaeError(f"focal_gamma is {self.focal_gamma}: give a finite number, 0 or more")
        if self.focal_alpha is not None and not 0 < self.focal_alpha < 1:
            raise LsemvaeError(f"focal_alpha is {self.focal_alpha}: give a share between 0 and 1, or nothing")


class Classifier(nn.Module):
    """The part of an encoder that embeds, and a head. Inputs as in `lsemvae.models.contract`."""

    def __init__(self, config: ClassifierConfig, leads: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)
        # Bundles hold its weights by this name.
        self.encoders: Any = config.encoder.embedder(self.leads, config.features)
        self.head = Head(
            self.embedding_size,
            hidden=config.hidden,
            dropout=config.dropout,
            focal_gamma=config.focal_gamma,
            focal_alpha=config.focal_alpha,
        )

    @classmethod
    def from_encoder(
        cls, model: Any, leads: Sequence[str], head: Head, features: Features = "means", shifts: int = 1
    ) -> Self:
        """What embeds the named leads in a pre-trained model, under a head for its embeddings.

        `model` is a `lsemvae.models.contract.Embeds`. Memory is shared with it where its `embedder` can, and with
        `head`. Raises LsemvaeError where the head reads another number of features.
        """
        config = ClassifierConfig(
            encoder=model.config,
            hidden=head.hidden,
            dropout=head.dropout.p,
            focal_gamma=head.focal_gamma,
            focal_alpha=head.focal_alpha,
            features=features,
            shifts=shifts,
        )
        with torch.device("meta"):
            classifier = cls(config, leads)
        if len(head.mean_F) != classifier.embedding_size:
            raise LsemvaeError(
                f"the head reads {len(head.mean_F)} features and {', '.join(classifier.leads)} give "
                f"{classifier.embedding_size}: train it on embeddings of these leads"
            )
        classifier.encoders = model.embedder(classifier.leads, features)
        classifier.head = head
        return classifier.train(head.training)

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.encoders.embedding_size

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF."""
        return self.encoders.embed(x_BLT, lead_mask_BL)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features hold something of the recording, [B, F] bool."""
        return self.encoders.observed(lead_mask_BL)

    @property
    def doubts(self) -> tuple[doubt.Kind, ...]:
        """The measures of doubt that it gives. Pooled features are the same under every shift: nothing disagrees."""
        shifted = self.config.shifts > 1 and self.config.features != "pooled"
        return ("distance", "disagreement") if shifted else ("distance",)

    def logit(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """logit_B, the mean over so many circular shifts as the configuration has."""
        return self.logit_and_doubts(x_BLT, lead_mask_BL, ())[0]

    def logit_and_doubts(
        self, x_BLT: Tensor, lead_mask_BL: Tensor, kinds: Sequence[doubt.Kind]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logit_B, and each of these measures of doubt, [B], in one pass of the encoder. See `doubts`."""
        observed_BF = self.observed(lead_mask_BL)
        if self.config.shifts == 1:
            h_SBF = self.embed(x_BLT, lead_mask_BL).unsqueeze(0)
        else:
            h_SBF = self.encoders.embed_shifted(x_BLT, lead_mask_BL, shifts.evenly(self.config.shifts))
        standard_SBF = [self.head.standardised(h_BF, observed_BF) for h_BF in h_SBF]
        logit_SB = torch.stack([self.head.logit_of(standard_BF) for standard_BF in standard_SBF])
        found = {}
        if "distance" in kinds:
            distance_SB = [doubt.distance(standard_BF, observed_BF) for standard_BF in standard_SBF]
            found["distance"] = torch.stack(distance_SB).mean(dim=0)
        if "disagreement" in kinds:
            found["disagreement"] = doubt.disagreement(logit_SB)
        return logit_SB.mean(dim=0), found

    def predict(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """probability_B of the positive class."""
        return torch.sigmoid(self.logit(x_BLT, lead_mask_BL).float())

    def predict_with_doubt(self, x_BLT: Tensor, lead_mask_BL: Tensor, kind: doubt.Kind) -> tuple[Tensor, Tensor]:
        """What `predict` gives, and this measure of its doubt, [B], at no further pass."""
        logit_B, doubts = self.logit_and_doubts(x_BLT, lead_mask_BL, (kind,))
        return torch.sigmoid(logit_B.float()), doubts[kind]

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """batch: `x_BLT`, `lead_mask_BL`, `y_B`, optionally `share_B` -> what Head.forward gives, end to end."""
        given = {name: batch[name] for name in ("y_B", "share_B") if name in batch}
        given["h_BF"] = self.embed(batch["x_BLT"], batch["lead_mask_BL"])
        given["observed_BF"] = self.observed(batch["lead_mask_BL"])
        return self.head(given, check=check)
