"""What a run goes on from: checkpoints that describe themselves, of which the newest whole one counts.

A checkpoint is a folder with the bundle, the optimiser's tensors, and `state.json`, which comes last and has the
digests of both. So a part of one, or one that was altered, is known as such wherever it comes from.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, load, save
from lsemvae.config import PretrainRecipe
from lsemvae.data.order import ORDER_VERSION, Order
from lsemvae.errors import BundleError, LsemvaeError, StorageError
from lsemvae.models import build
from lsemvae.storage import Storage, explained
from lsemvae.training.fit import make_optimizer

log = logging.getLogger(__name__)

BUNDLE = "bundle"
_FULL = ("No space left", "quota exceeded", "File too large")


@dataclass
class Progress:
    """What a checkpoint remembers beside weights: where to go on, and how well the run did so far."""

    epoch: int = 0
    step: int = 0
    """The step to go on with in this epoch."""
    best: float = float("inf")
    """Lowest validation loss."""
    best_epoch: int = -1
    metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """Of this epoch's steps before `step`, see `lsemvae.training.fit`."""
    damaged: int = 0
    """Records that could not be read in these steps, on all workers."""


Started = tuple[Progress, nn.Module, torch.optim.Optimizer]


def start(place: Storage, recipe: PretrainRecipe, order: Order, rank: int, device: torch.device) -> Started:
    """From the newest whole checkpoint in the run's folder, or a new model where there is none.

    Rank 0 chooses for all, loudly where one is damaged. Raises LsemvaeError where all are, or where the run began
    with another model or order, and StorageError.
    """
    from ray.train.collective import broadcast_from_rank_zero

    if rank == 0:
        name, started = newest_whole(place, recipe, order, device)
        broadcast_from_rank_zero(name)
        return started
    return _load(place, broadcast_from_rank_zero(None), recipe, order, device)


def newest_whole(
    place: Storage, recipe: PretrainRecipe, order: Order, device: torch.device
) -> tuple[str | None, Started]:
    """Its name, and what is in it. What is in the storage counts, not what was reported: a machine can be lost
    between the two."""
    names = {path.split("/")[0] for path in place.list() if path.startswith("checkpoint_") and "/" in path}
    for name in sorted(names, reverse=True):  # they are named by their time
        try:
            started = _load(place, name, recipe, order, device)
        except BundleError as error:
            log.error(f"checkpoint {name} is damaged and passed over: {error}")
            continue
        log.info(f"going on at epoch {started[0].epoch}, step {started[0].step}, from {name}")
        return name, started
    if names:
        raise LsemvaeError(f"every checkpoint of {place.uri} is damaged: give another --name to start anew")
    return None, _load(place, None, recipe, order, device)


def _load(place: Storage, name: str | None, recipe: PretrainRecipe, order: Order, device: torch.device) -> Started:
    """A checkpoint, or a new model. Raises BundleError for a damaged one."""
    from ray.train import Checkpoint

    if name is None:
        torch.manual_seed(recipe.optim.seed)  # the same weights everywhere before DDP broadcasts them
        model = build(recipe.model, recipe.leads).to(device)
        return Progress(), model, make_optimizer(model, recipe.optim)
    kept = Checkpoint(place.path(name), place.filesystem)
    with explained(f"{place.uri}/{name}"), kept.as_directory() as path:
        folder = Path(path)
        state = read_state(folder)
        bundle, model = load(folder / BUNDLE)
        if bundle.digest != state["bundle"]:
            raise BundleError(f"{folder / BUNDLE} is not the one of this checkpoint")
        model = model.train().to(device)
        optimizer = make_optimizer(model, recipe.optim)
        load_optimizer(optimizer, folder)
    began = state["order"]
    now = _meaning_of(order)
    changed = [f"{key}={began.get(key)}, not {value}" for key, value in now.items() if began.get(key) != value]
    if changed:
        raise LsemvaeError(f"the run began with {'; '.join(changed)}: go on with the same, or give another --name")
    if model.config != recipe.model or model.leads != recipe.leads:
        raise LsemvaeError("the run began with another model: go on with the same, or give another --name")
    return Progress(**{name: state[name] for name in vars(Progress()) if name in state}), model, optimizer


def save_checkpoint(
    folder: Path,
    bundle: Bundle,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    order: Order,
    workers: int,
) -> None:
    """Writes all of it into an empty folder."""
    digest = save(bundle, model, folder / BUNDLE).digest
    save_optimizer(optimizer, folder, **vars(progress), workers=workers, order=_meaning_of(order), bundle=digest)


def keep_as_best(folder: Path, place: Storage) -> None:
    """Puts a checkpoint's bundle into the run's folder, in place of the one of the best epoch before."""
    for file in (WEIGHTS, CONFIG):
        place.write_bytes(f"{BUNDLE}/{file}", (folder / BUNDLE / file).read_bytes())


@contextlib.contextmanager
def writing_to(place: Storage) -> Iterator[None]:
    """Raises LsemvaeError where there is no room; anything else that the storage does is a StorageError."""
    try:
        with explained(place.uri):
            yield
    except (StorageError, SafetensorError) as error:
        if any(sign in str(error) for sign in _FULL):
            raise LsemvaeError(
                f"no checkpoint can be written ({error}): make room there, or in {tempfile.gettempdir()} on the "
                "worker's machine, and give the same command again"
            ) from error
        raise


def _meaning_of(order: Order) -> dict[str, int]:
    """What decides which records (epoch, step) stands for."""
    settings = asdict(order)
    fixed = {"order_version": ORDER_VERSION, "records": order.records}
    return fixed | {name: settings[name] for name in ("batch_size", "streams", "buffer", "seed")}


OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, **state: Any) -> None:
    """Tensors as safetensors and numbers as JSON: a checkpoint that never has to be unpickled.

    `state.json` comes last and holds the SHA-256 of the tensors and of itself, so that a part of a checkpoint, and one
    that was altered, is known as such.
    """
    tensors = {
        f"{index}.{name}": value.detach().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    with (folder / OPTIMIZER).open("rb") as stream:
        state["optimizer_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    state["state_sha256"] = _digest(state)
    (folder / STATE).write_text(json.dumps(state))


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `save_optimizer` was given. Raises BundleError unless the checkpoint is whole."""
    try:
        state = json.loads((folder / STATE).read_text())
        with (folder / OPTIMIZER).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is no whole checkpoint: {type(error).__name__}") from None
    if not isinstance(state, dict) or state.pop("state_sha256", None) != _digest(state):
        raise BundleError(f"{folder / STATE} is not the file that was saved (its SHA-256 differs)")
    if digest != state.get("optimizer_sha256"):
        raise BundleError(f"{folder / OPTIMIZER} is not the file that was saved (its SHA-256 differs)")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restores what `save_optimizer` wrote. Raises BundleError."""
    state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        tensors = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch raises the last where the file has just gone
        raise BundleError(f"{folder / OPTIMIZER} cannot be read: {error}") from None
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": dict(state), "param_groups": current["param_groups"]})
