"""What a run is made of: frozen dataclasses, every field of which the command line may override."""

from dataclasses import dataclass, field
from typing import Literal

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and how long it runs."""

    epochs: int
    batch_size: int
    """Records in one step, over all workers together."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise LsemvaeError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}: "
                "each must be above 0"
            )


@dataclass(frozen=True)
class PretrainRecipe:
    """A pre-training run on unlabelled recordings."""

    model: LSEMVAEConfig
    optim: OptimConfig
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    leads: tuple[str, ...] = LEADS
    kl_warmup_epochs: float = 10.0
    """Beta annealing: the KL term's weight rises from 0 to its full value over so many epochs."""
    shuffle_buffer: int = 1024
    """Recordings each worker holds preprocessed (0.24 MB each) and draws from, on top of the shards' own order."""
    plot_every: int = 5
    """Epochs between two pictures of reconstructions."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Cross-validation and refit of a head on a frozen encoder's embeddings."""

    optim: OptimConfig
    folds: int = 5
    hidden: int = 128
    dropout: float = 0.5
    focal_gamma: float = 2.0
    balance: bool = True
    """Weigh the classes of the focal loss by the other's share, so that both count alike."""
    bootstrap_draws: int = 300
    embed_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise LsemvaeError(f"folds={self.folds}: cross-validation needs at least 2")
