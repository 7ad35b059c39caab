"""What a run is made of: frozen dataclasses. The command line may override every field."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.fields import as_json, read
from lsemvae.leads import LEADS
from lsemvae.models.contract import EncoderConfig
from lsemvae.preprocess import PreprocessConfig

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and how long training takes."""

    epochs: int
    batch_size: int
    """Records in one step, over all workers together."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Split each worker's batch into so many parts, which go through the model one after another: less memory, the same
    gradient."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its full value."""
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    """Use torch.compile. It takes a minute to start, and pays on a GPU."""
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

    model: EncoderConfig
    optim: OptimConfig
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    preprocess_on: Literal["cpu", "device"] = "cpu"
    """Where records are filtered and scaled. On the device the result is equal within 1e-4 of a standard deviation,
    and the CPUs only decode."""
    leads: tuple[str, ...] = LEADS
    kl_warmup_epochs: float = 10.0
    """Epochs over which the weight of the KL term rises from 0 to its full value (beta annealing)."""
    streams: int = 8
    """Streams that the recordings are dealt to; each worker reads some of them. Must be at least the number of workers
    and divide the batch size. With the same streams, any number of workers sees the same batches."""
    shuffle_buffer: int = 1024
    """Shuffle-buffer size in recordings (0.24 MB each), over all streams."""
    checkpoint_steps: int = 0
    """Write a checkpoint every so many steps within an epoch; 0 for none. Each epoch ends with one."""
    early_stop_epochs: int = 0
    """Stop when the validation loss has not improved for so many epochs; 0 never stops early."""
    max_damaged_share: float = 0.01
    """Stop when a larger share of an epoch's recordings is unreadable because shards are damaged."""
    plot_every: int = 5
    """Draw reconstructions every so many epochs."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Cross-validation and refit of a head on a frozen encoder's embeddings."""

    optim: OptimConfig
    folds: int = 5
    hidden: int = 128
    dropout: float = 0.5
    focal_gamma: float = 2.0
    balance: bool = True
    """Weight each class in the focal loss by the share of the other, so that both count the same."""
    bootstrap_draws: int = 300
    embed_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise LsemvaeError(f"folds={self.folds}: cross-validation needs at least 2")


def recipe_from(kind: type[Recipe], values: Mapping[str, Any]) -> Recipe:
    """The recipe that `fields.as_json` turned into `values`.

    Raises LsemvaeError naming a field that is unknown, missing, of another type or out of range.
    """
    try:
        return read(kind, values, "recipe")
    except BundleError as error:
        raise LsemvaeError(str(error)) from None


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields set, named as in `{"model.beta": 0.5}`. Raises LsemvaeError as `recipe_from`."""
    values = as_json(recipe, every_tag=True)
    for name, value in settings.items():
        *outer, last = name.split(".")
        place = values
        for part in outer:
            place = place[part]
        place[last] = value
    return recipe_from(type(recipe), values)
