"""What every architecture offers, as protocols; nothing outside `lsemvae.models` knows one by name.

- An `Encoder` turns a recording into features: `embed(x_BLT, lead_mask_BL) -> h_BF`.
- A model that `Embeds` has learned without labels and gives away its embedding part, which a head is put on.
- One that also `Pretrains` computes a loss on unlabelled recordings and validates itself: it learns here. One that
  also `Reconstructs` outputs leads.
- A model that `Predicts` gives the probability of a class.

Inputs: `x_BLT` holds the model's leads in the order of `.leads`, preprocessed; `lead_mask_BL` is True where a lead was
observed. The samples of a masked lead, NaN included, have no effect. A wrong shape raises LsemvaeError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

Batch = Mapping[str, Tensor]

Features = Literal["means", "fused", "pooled"]
"""What an encoder gives to a head. means: the lead means, or an architecture's own features; fused: the mean of the
fused posterior; pooled: mean and deviation of the means over all circular time shifts."""


class Encoder(Protocol):
    """The model under a head."""

    leads: tuple[str, ...]

    @property
    def embedding_size(self) -> int:
        """F."""

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF in float32 or better; zero where a feature depends on an absent lead alone."""

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features hold something of the recording, [B, F] bool.

        False for those of an absent lead, where features belong to leads; a head replaces them by their average.
        """

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        """As `embed` under each circular shift in time, h_SBF. See `lsemvae.models.parts.shifts`."""


@dataclass(frozen=True)
class EncoderConfig:
    """Base of the configurations of all architectures that embed. JSON names the member, see `lsemvae.fields`."""

    architecture: ClassVar[str]
    title: ClassVar[str]
    """Its name in tables, as its paper writes it."""
    untagged: ClassVar[str] = "lsemvae"
    """The architecture of a configuration that names none, as in bundles from before this field."""

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The part of the architecture that embeds these leads, freshly initialised: what a classifier holds.

        Raises LsemvaeError on features that the architecture does not give.
        """
        raise AssertionError(f"{type(self).__name__} has no embedder")


@runtime_checkable
class Trains(Protocol):
    """What `lsemvae.training.fit` trains."""

    def forward(self, batch: Batch, *, check: bool = True) -> dict[str, Tensor]:
        """The loss of a batch and its terms, each a scalar: means over the records. Only "loss" has a gradient.

        `batch["share_B"]` is each record's share in the means, by default 1 / B; a record of share 0 takes no part.
        `batch["kl_scale"]`, a scalar, is how far a loss term that is phased in has risen, from 0 to 1 (default 1).
        Raises NonFiniteBatch with the positions of records whose input or loss is not finite. With `check=False` it
        does not look, since that would make an accelerator wait, and also returns "good_B": which records are finite.
        """


class Validation(Protocol):
    """Sums over a validation pass, to add up over workers."""

    def update(self, batch: Batch) -> None:
        """Add a batch, without gradient, with all loss terms at their full weight."""

    def tensors(self) -> Sequence[Tensor]:
        """The sums themselves, always in the same order: all-reduce each in place."""

    def metrics(self) -> dict[str, float]:
        """Means by name. "loss" decides which epoch is the best; "collapsed" is 1.0 where the latent is not used."""


@runtime_checkable
class Embeds(Protocol):
    """A model that has learned without labels, here or elsewhere: what the commands take as `--encoder`."""

    config: Any
    leads: tuple[str, ...]

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """As `Encoder.embed`."""

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The trained part that embeds these leads. Shares memory with the model where it can.

        Raises LsemvaeError on a lead that the model does not read, and on features that it does not give.
        """


@runtime_checkable
class Pretrains(Trains, Embeds, Protocol):
    """A model that learns here from recordings without labels."""

    noise_size: int
    """Standard normal numbers that a record needs in a step, given as `batch["noise_BD"]`; 0 for none. The caller
    draws them, so that they do not depend on the number of workers. Without them the model draws its own."""

    def validation(self) -> Validation:
        """An empty pass of this model on its device."""


@runtime_checkable
class Reconstructs(Protocol):
    """A model that writes leads."""

    @property
    def decoder_leads(self) -> tuple[str, ...]:
        """The leads that `reconstruct` gives, in order."""

    def reconstruct(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """x_BLT over `decoder_leads`, without noise."""


@runtime_checkable
class Weighs(Protocol):
    """An embedder that fuses one expert a lead."""

    def lead_weights(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> tuple[Tensor, Tensor] | None:
        """gate_BL, the weight of each lead's expert in the posterior, and precision_BL, 0 for absent leads.

        What the gates lack of 1 is the weight of the expert that belongs to no lead, if there is one. precision_BL is
        the lead's share (1 / s_l^2) / (sum 1 / s_j^2) of the leads' precisions, the mean over latent units. None where
        leads have no weights of their own.
        """


@runtime_checkable
class Predicts(Protocol):
    """A model that scores."""

    leads: tuple[str, ...]

    def predict(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """probability_B of the positive class."""

    def predict_with_doubt(self, x_BLT: Tensor, lead_mask_BL: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
        """The same, and its doubt [B] by a measure of `lsemvae.models.parts.doubt`: larger is more doubtful."""
