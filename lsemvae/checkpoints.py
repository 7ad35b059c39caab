"""What a run goes on from: checkpoints that describe themselves, of which the newest whole one counts.

A checkpoint is a folder with the bundle, the optimiser's tensors, and `state.json`, which comes last and has the
digests of both. So a part of one, or one that was altered, is known as such wherever it comes from.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, load, save
from lsemvae.config import PretrainRecipe
from lsemvae.errors import BundleError, LsemvaeError, StorageError
from lsemvae.feed import ORDER_VERSION, Order
from lsemvae.fit import load_optimizer, make_optimizer, read_state, save_optimizer
from lsemvae.models import build
from lsemvae.storage import Storage, explained

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
    """Of this epoch's steps before `step`, see `lsemvae.fit`."""
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
