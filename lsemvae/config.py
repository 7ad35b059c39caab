"""What a run is made of: frozen dataclasses, every field of which the command line may override."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.fields import read_fields
from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig

Recipe = TypeVar("Recipe")


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
    accumulate: int = 1
    """Parts that a worker's batch goes through the model in, for one step: less memory, the same gradient."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    """torch.compile: worth its minute on a GPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate, self.accumulate) <= 0:
            raise LsemvaeError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}, "
                f"accumulate={self.accumulate}: each must be above 0"
            )


@dataclass(frozen=True)
class PretrainRecipe:
    """A pre-training run on unlabelled recordings."""

    model: LSEMVAEConfig
    optim: OptimConfig
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    preprocess_on: Literal["cpu", "device"] = "cpu"
    """Where records are filtered and scaled. On the device they are equal within 1e-4 of a standard deviation, and the
    processors only decode."""
    leads: tuple[str, ...] = LEADS
    kl_warmup_epochs: float = 10.0
    """Beta annealing: the KL term's weight rises from 0 to its full value over so many epochs."""
    streams: int = 8
    """Parts that the recordings are dealt to; each worker reads some of them. At least the number of workers, a
    divisor of the batch size; with the same streams, other numbers of workers see the same batches."""
    shuffle_buffer: int = 1024
    """Recordings that are mixed at any time (0.24 MB each), over all streams, on top of the shards' own order."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints within an epoch; 0 for none. Each epoch ends with one."""
    early_stop_epochs: int = 0
    """Stop when the validation loss has not improved for so many epochs; 0 for never."""
    max_damaged_share: float = 0.01
    """Stop when more of an epoch's recordings than this cannot be read from damaged shards."""
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


def recipe_from(kind: type[Recipe], values: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict`, and perhaps JSON, made `values` of.

    Raises LsemvaeError naming a field that is unknown, missing, of another type or out of range.
    """
    try:
        return read_fields(kind, values, "recipe")
    except BundleError as error:
        raise LsemvaeError(str(error)) from None


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields set, named as in `{"model.beta": 0.5}`. Raises LsemvaeError as `recipe_from`."""
    values = asdict(recipe)
    for name, value in settings.items():
        *outer, last = name.split(".")
        place = values
        for part in outer:
            place = place[part]
        place[last] = value
    return recipe_from(type(recipe), values)
