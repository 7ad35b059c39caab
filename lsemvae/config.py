"""What a run is made of: frozen dataclasses. The command line may override every field."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.fields import as_json, read
from lsemvae.leads import LEADS
from lsemvae.models.contract import EncoderConfig, Features
from lsemvae.preprocess import PreprocessConfig

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and how long training takes."""

    before: ClassVar[Mapping[str, Any]] = {
        "fused_encoder": False, "cuda_graphs": False, "gradient_exchange": "float32", "shard_optimizer": False,
    }  # fmt: skip

    epochs: int
    batch_size: int
    """Records in one step, over all workers together."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Split each worker's batch into so many parts, which go through the model one after another, in training and in
    validation: less memory, the same gradient and metrics."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its full value."""
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    """Use torch.compile. It takes a minute to start, and pays on a GPU."""
    cuda_graphs: bool = False
    """With `compile` on a GPU, replay each pass of a pre-training as CUDA graphs (torch's reduce-overhead). No GPU has
    timed it yet."""
    fused_encoder: bool = False
    """On a GPU, run the three convolutions of all lead encoders as one Triton kernel in pre-training. No GPU has timed
    it yet."""
    gradient_exchange: Literal["float32", "bf16"] = "float32"
    """Precision in which the workers of a pre-training exchange gradients. bf16 halves the bytes and rounds the sum."""
    shard_optimizer: bool = False
    """Spread AdamW's moments over the workers of a pre-training (ZeRO-1): each updates some parameters and sends them
    to the others. A parameter is never divided."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate, self.accumulate) <= 0:
            raise LsemvaeError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}, "
                f"accumulate={self.accumulate}: each must be above 0"
            )
        if self.cuda_graphs and (not self.compile or self.accumulate > 1):
            raise LsemvaeError(
                f"cuda_graphs needs compile and accumulate=1, but compile={self.compile}, accumulate={self.accumulate}"
            )


@dataclass(frozen=True)
class PretrainRecipe:
    """A pre-training run on unlabelled recordings."""

    before: ClassVar[Mapping[str, Any]] = {"circular_shifts": False}

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
    """Shuffle-buffer size in recordings (0.24 MB each, 0.12 with a cache), over all streams."""
    checkpoint_steps: int = 0
    """Write a checkpoint every so many steps within an epoch; 0 for none. Each epoch ends with one."""
    early_stop_epochs: int = 0
    """Stop when the validation loss has not improved for so many epochs; 0 never stops early."""
    max_damaged_share: float = 0.01
    """Stop when a larger share of an epoch's recordings is unreadable because shards are damaged."""
    plot_every: int = 5
    """Draw reconstructions every so many epochs."""
    circular_shifts: bool = False
    """Train on each recording under a random circular shift in time, another one each epoch, so that few recordings
    are worth more and the latent does not learn where windows begin."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Cross-validation and refit of a classifier on a pre-trained encoder."""

    before: ClassVar[Mapping[str, Any]] = {
        "trains": "head", "features": "means", "shifts": 1, "inner_folds": 5, "strengths": (1e-4, 1e-3, 1e-2, 1e-1),
        "encoder_rate": 3e-4, "early_stop": False, "lead_dropout": 0.0, "noise": 0.0, "amplitude": 0.0,
        "scratch_epochs": 100, "scratch_rate": 1e-3, "seeds": 1,
    }  # fmt: skip

    optim: OptimConfig
    """How a head is trained, and the encoder with it; `learning_rate` is the head's."""
    folds: int = 5
    hidden: int = 128
    """Units of the head's hidden layer; 0 is a linear head."""
    dropout: float = 0.5
    focal_gamma: float = 2.0
    balance: bool = True
    """Weight each class in the loss by the share of the other, so that both count the same."""
    bootstrap_draws: int = 300
    embed_batch_size: int = 64
    trains: Literal["head", "linear", "all"] = "head"
    """head: the head alone, on frozen features, as in the paper; linear: L2 logistic regression on frozen features;
    all: the head and every weight of the encoder, under random circular shifts in time."""
    features: Features = "means"
    """What the encoder gives to the head: the lead means; the mean of the fused posterior; or mean and deviation of the
    lead means over all circular shifts."""
    shifts: int = 1
    """In `all`: a score is the mean logit over so many circular shifts, in the table and in the bundle."""
    inner_folds: int = 5
    """Folds within each training set, by subject, that choose the strength of `linear` and the epochs of `all`."""
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Inverse regularisation strengths C (of scikit-learn's LogisticRegression) that `linear` chooses from."""
    encoder_rate: float = 3e-4
    """Learning rate of the encoder's weights in `all`."""
    early_stop: bool = False
    """`all` trains once with an inner fold held out, takes the number of epochs with the smallest loss there, and
    trains again on the whole training set for so many."""
    lead_dropout: float = 0.0
    """Mean share of the leads that training hides in `all`, up to 0.5."""
    noise: float = 0.0
    """Standard deviation of the white noise that training adds in `all`, in units of the model's input."""
    amplitude: float = 0.0
    """Standard deviation of the logarithm of a random factor on each recording's amplitude in `all`."""
    scratch_epochs: int = 100
    """Epochs of the row that trains all weights from scratch: it needs more than a pre-trained encoder."""
    scratch_rate: float = 1e-3
    """Learning rate of all weights in that row."""
    seeds: int = 1
    """Repeat the training of every row so often with other seeds: tables then show means over seeds."""

    def __post_init__(self) -> None:
        if self.folds < 2 or self.inner_folds < 2:
            raise LsemvaeError(f"folds={self.folds}, inner_folds={self.inner_folds}: cross-validation needs at least 2")
        if min(self.shifts, self.seeds, self.scratch_epochs) < 1:
            raise LsemvaeError(
                f"shifts={self.shifts}, seeds={self.seeds}, scratch_epochs={self.scratch_epochs}: give 1 or more"
            )
        if not self.strengths or min(*self.strengths, self.encoder_rate, self.scratch_rate) <= 0:
            raise LsemvaeError(
                f"strengths={self.strengths}, encoder_rate={self.encoder_rate}, scratch_rate={self.scratch_rate}: "
                "give numbers above 0"
            )
        if not 0 <= self.lead_dropout <= 0.5 or min(self.noise, self.amplitude) < 0:
            raise LsemvaeError(
                f"lead_dropout={self.lead_dropout}, noise={self.noise}, amplitude={self.amplitude}: give a share up to "
                "0.5, and deviations of 0 or more"
            )


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
