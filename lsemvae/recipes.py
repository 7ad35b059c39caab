"""The named recipes, and recipes in files. `python workflows/pretrain.py NAME` (or FILE.json) runs one.

Any field can be overridden after the name.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lsemvae.config import FinetuneRecipe, OptimConfig, PretrainRecipe, Recipe, recipe_from
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.models import ARCHITECTURES, PRESETS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.storage import Storage

_MODELS = PRESETS["lsemvae"]

_PAPER = PretrainRecipe(
    model=_MODELS["paper"],
    optim=OptimConfig(epochs=100, batch_size=128, learning_rate=1e-4, precision="bf16"),
    kl_warmup_epochs=50,
    shuffle_buffer=4096,
)

PRETRAIN: dict[str, PretrainRecipe] = {
    # The paper's model and schedule: 256 M parameters, for GPUs.
    "paper": _PAPER,
    # The released code's fusion, objective, preprocessing and schedule, with every batch's gradient used.
    "released": replace(
        _PAPER,
        model=_MODELS["released"],
        optim=replace(_PAPER.optim, learning_rate=5e-4, weight_decay=1e-5),
        preprocess=PreprocessConfig(scale="lead"),
    ),
    # The paper's model and schedule on eight GPUs, 128 recordings each, with the rate and warm-up that are usual for
    # such a batch. A trial: nobody has trained with it yet. Compare its validation loss with that of `paper`.
    "eight-gpus": replace(
        _PAPER,
        optim=replace(_PAPER.optim, batch_size=1024, learning_rate=3e-4, warmup_steps=1000, compile=True),
        streams=8,
    ),
    # The paper's model in minutes on one GPU, for ten thousand to a million recordings: a larger batch and rate, which
    # rises and falls, and circular shifts. docs/results.md says what that gives.
    "minutes": replace(
        _PAPER,
        optim=OptimConfig(
            epochs=20, batch_size=256, learning_rate=3e-4, schedule="cosine", warmup_steps=100, precision="bf16"
        ),
        kl_warmup_epochs=8,
        preprocess_on="device",
        circular_shifts=True,
    ),
    # Eight million parameters at 250 Hz, in minutes on two CPU cores.
    "cpu": PretrainRecipe(
        model=_MODELS["cpu"],
        optim=OptimConfig(epochs=20, batch_size=64, learning_rate=1.5e-3, schedule="cosine", warmup_steps=30),
        preprocess=PreprocessConfig(rate_hz=250, samples=2496),
        kl_warmup_epochs=8,
        plot_every=10,
        circular_shifts=True,
    ),
    # Sixteen million parameters, for a few hundred or thousand recordings on a CPU.
    "small": PretrainRecipe(
        model=_MODELS["small"],
        optim=OptimConfig(epochs=10, batch_size=32, learning_rate=1e-3),
        kl_warmup_epochs=4,
        shuffle_buffer=256,
    ),
    # Seconds: for tests.
    "smoke": PretrainRecipe(
        model=_MODELS["smoke"],
        optim=OptimConfig(epochs=4, batch_size=32, learning_rate=2e-3),
        kl_warmup_epochs=2,
        shuffle_buffer=128,
        plot_every=2,
        circular_shifts=True,
    ),
}

SIZES = {"full": "minutes", "cpu": "cpu", "smoke": "smoke"}
"""The recipe whose schedule, preprocessing and shifts every compared method has at that size."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "lsemvae-no-alignment": {"gamma": 0.0},
    "lsemvae-product": {"fusion": "product"},
    "lsemvae-mixture": {"fusion": "mixture"},
    "lsemvae-released": {
        "decoder": "paper",
        "fusion": "released",
        "objective": "released",
        "reconstruction_weight": 1e-3,
        "gamma": 0.1,
    },
}
"""LS-EMVAE without one of its parts, and with the fusion, decoder and objective of the authors' released code."""


def _compared() -> dict[str, PretrainRecipe]:
    """Every other method that pre-trains, and the ablations, at every size: `NAME-SIZE`. Only the model differs."""
    found = {}
    for size, base in SIZES.items():
        recipe = PRETRAIN[base]
        for name, changes in ABLATIONS.items():
            found[f"{name}-{size}"] = replace(recipe, model=replace(recipe.model, **changes))
        for name, presets in PRESETS.items():
            if name != "lsemvae" and hasattr(ARCHITECTURES[type(presets[size])], "validation"):
                found[f"{name}-{size}"] = replace(recipe, model=presets[size])
    return found


COMPARED = _compared()
"""The methods that LS-EMVAE is compared with, by `NAME-SIZE`: each with the schedule of `SIZES`."""
PRETRAIN |= COMPARED

_PAPER_HEAD = FinetuneRecipe(optim=OptimConfig(epochs=50, batch_size=32, learning_rate=1e-4))

_FULL = FinetuneRecipe(
    optim=OptimConfig(epochs=40, batch_size=64, learning_rate=1e-3, weight_decay=0.05, schedule="cosine"),
    trains="all",
    shifts=8,
    early_stop=True,
)

FINETUNE: dict[str, FinetuneRecipe] = {
    # The paper's: its head on frozen lead means.
    "paper": _PAPER_HEAD,
    # Logistic regression on frozen features that do not depend on where the beats fall.
    "linear": replace(_PAPER_HEAD, trains="linear", features="pooled"),
    # All weights, for the full size on a GPU.
    "full": _FULL,
    # All weights of the small model that pre-training's `cpu` makes.
    "cpu": replace(_FULL, encoder_rate=1e-3, early_stop=False),
    "smoke": replace(
        _PAPER_HEAD,
        optim=replace(_PAPER_HEAD.optim, epochs=10, learning_rate=1e-3),
        folds=3,
        bootstrap_draws=100,
        inner_folds=2,
        strengths=(0.01,),
    ),
}


def recipe_json(recipe: PretrainRecipe | FinetuneRecipe) -> str:
    """A recipe as the text of a file that `read_recipe` reads: every field, and the architecture's name."""
    return json.dumps(as_json(recipe, every_tag=True), indent=2) + "\n"


def read_recipe(uri: str, kind: type[Recipe]) -> Recipe:
    """The recipe in a JSON file: a path, file:// or s3:// URI. Raises LsemvaeError naming the file and the field."""
    folder, _, name = uri.rpartition("/")
    try:
        values = json.loads(Storage.open(folder or ".").read_bytes(name))
    except FileNotFoundError:
        raise LsemvaeError(f"there is no recipe {uri}: check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LsemvaeError(f"{uri} is not JSON: {error}") from None
    try:
        return recipe_from(kind, values)
    except LsemvaeError as error:
        raise LsemvaeError(f"{uri}: {error}") from None
