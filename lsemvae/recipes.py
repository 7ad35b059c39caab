"""The named recipes, and recipes in files. `python workflows/pretrain.py NAME` (or FILE.json) runs one.

Any field can be overridden after the name.
"""

import json
from dataclasses import replace

from lsemvae.config import FinetuneRecipe, OptimConfig, PretrainRecipe, Recipe, recipe_from
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.models import PRESETS
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
    ),
}

_PAPER_HEAD = FinetuneRecipe(optim=OptimConfig(epochs=50, batch_size=32, learning_rate=1e-4))

FINETUNE: dict[str, FinetuneRecipe] = {
    "paper": _PAPER_HEAD,
    "smoke": replace(
        _PAPER_HEAD,
        optim=replace(_PAPER_HEAD.optim, epochs=10, learning_rate=1e-3),
        folds=3,
        bootstrap_draws=100,
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
