"""Checkpoints: a run resumes from the newest intact one.

A checkpoint is a folder with the bundle, the optimiser's tensors, and `state.json`, which is written last and holds the
digests of both. So an incomplete or altered checkpoint is recognised, wherever it comes from.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from lsemvae.training.fit import Start, make_optimizer, sum_over_workers

log = logging.getLogger(__name__)

BUNDLE = "bundle"
_FULL = ("No space left", "quota exceeded", "File too large")


@dataclass
class Progress:
    """What a checkpoint holds beside the weights: where to resume, and the best result so far."""

    epoch: int = 0
    step: int = 0
    """The next step of this epoch."""
    best: float = float("inf")
    """Lowest validation loss."""
    best_epoch: int = -1
    metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """Of this epoch's steps before `step`, see `lsemvae.training.fit`."""
    damaged: int = 0
    """Records that could not be read in these steps, on all workers."""

    @property
    def start(self) -> Start:
        """Where `fit` resumes."""
        return Start(self.epoch, self.step, self.sums)


Started = tuple[Progress, Any, torch.optim.Optimizer]


def start(place: Storage, recipe: PretrainRecipe, order: Order, rank: int, device: torch.device) -> Started:
    """From the newest whole checkpoint in the run's folder, or a new model where there is none.

    Every worker calls this. Rank 0 lists the checkpoints, and all agree on the newest that each of them finds whole;
    rank 0 logs those that are damaged. The workers of one machine share one download. Raises LsemvaeError where all
    checkpoints are damaged, or where the run began with another model or order; StorageError.
    """
    from ray.train.collective import broadcast_from_rank_zero

    # The Checkpoint objects themselves are sent: processes of a machine that hold copies of one share its download.
    kept = broadcast_from_rank_zero(_checkpoints(place) if rank == 0 else None)
    return _newest(place, kept, recipe, order, device, loud=rank == 0)[1]


def newest_whole(
    place: Storage, recipe: PretrainRecipe, order: Order, device: torch.device
) -> tuple[str | None, Started]:
    """The name of the newest whole checkpoint and what is in it; (None, a new model) where there is no checkpoint.

    This looks at the storage, not at Ray Train's reports: a machine can be lost between writing and reporting.
    """
    return _newest(place, _checkpoints(place), recipe, order, device)


def _checkpoints(place: Storage) -> list[tuple[str, Any]]:
    """Names and Ray's Checkpoint of each, newest first: they are named by their time."""
    from ray.train import Checkpoint

    names = {path.split("/")[0] for path in place.list() if path.startswith("checkpoint_") and "/" in path}
    return [(name, Checkpoint(place.path(name), place.filesystem)) for name in sorted(names, reverse=True)]


def _newest(
    place: Storage,
    kept: Sequence[tuple[str, Any]],
    recipe: PretrainRecipe,
    order: Order,
    device: torch.device,
    *,
    loud: bool = True,
) -> tuple[str | None, Started]:
    for name, checkpoint in kept:
        started, damage = None, None
        try:
            with explained(f"{place.uri}/{name}"), checkpoint.as_directory() as path:
                started = _load(Path(path), recipe, order, device)
        except BundleError as error:
            damage = error
        if sum_over_workers(torch.tensor(float(damage is not None))) > 0:  # of any worker
            if loud:
                log.error(f"checkpoint {name} is damaged and passed over: {damage or 'another worker found it so'}")
            continue
        assert started is not None
        if loud:
            log.info(f"resuming at epoch {started[0].epoch}, step {started[0].step}, from {name}")
        return name, started
    if kept:
        raise LsemvaeError(f"every checkpoint of {place.uri} is damaged: give another --name to start anew")
    torch.manual_seed(recipe.optim.seed)  # the same weights everywhere before DDP broadcasts them
    model = build(recipe.model, recipe.leads).to(device)
    return None, (Progress(), model, make_optimizer(model, recipe.optim))


def _load(folder: Path, recipe: PretrainRecipe, order: Order, device: torch.device) -> Started:
    """A checkpoint's folder. Raises BundleError for a damaged one, LsemvaeError for one of another run."""
    state = read_state(folder)
    bundle, model = load(folder / BUNDLE)
    if bundle.digest != state["bundle"]:
        raise BundleError(f"{folder / BUNDLE} is not the one of this checkpoint")
    model = model.train().to(device)
    optimizer = make_optimizer(model, recipe.optim)
    load_optimizer(optimizer, folder)
    began, now = state["order"], _meaning_of(order)
    changed = [f"{key}={began.get(key)}, not {value}" for key, value in now.items() if began.get(key) != value]
    if changed:
        raise LsemvaeError(f"the run began with {'; '.join(changed)}: resume it with the same, or give another --name")
    if model.config != recipe.model or model.leads != recipe.leads:
        raise LsemvaeError("the run began with another model: resume it with the same, or give another --name")
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
    """Replace the bundle in the run's folder, the best so far, by this checkpoint's."""
    for file in (WEIGHTS, CONFIG):
        place.write_bytes(f"{BUNDLE}/{file}", (folder / BUNDLE / file).read_bytes())


@contextlib.contextmanager
def writing_to(place: Storage) -> Iterator[None]:
    """Raises LsemvaeError where there is no room, StorageError where the storage fails in another way."""
    try:
        with explained(place.uri):
            yield
    except (StorageError, SafetensorError) as error:
        if any(sign in str(error) for sign in _FULL):
            raise LsemvaeError(
                f"no checkpoint can be written ({error}): make room there, or in {tempfile.gettempdir()} on the "
                "worker's machine, and run the same command again"
            ) from error
        raise


def _meaning_of(order: Order) -> dict[str, Any]:
    """The settings that decide which records belong to (epoch, step)."""
    settings = asdict(order)
    fixed = {"order_version": ORDER_VERSION, "records": order.records}
    found = fixed | {name: settings[name] for name in ("batch_size", "streams", "buffer", "seed")}
    if any(repeats != 1 for repeats in order.repeats):  # omitted otherwise, so that older checkpoints compare equal
        found["repeats"] = list(order.repeats)
    return found


OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, **state: Any) -> None:
    """Write tensors as safetensors and numbers as JSON: nothing has to be unpickled to read them.

    `state.json` is written last and holds the SHA-256 of the tensors and of itself, so that an incomplete or altered
    checkpoint is recognised.
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
