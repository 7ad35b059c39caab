"""Checkpoints: a run resumes from the newest intact one.

A checkpoint is a folder with the bundle, the optimiser's tensors, and `state.json`, which is written last and holds the
digests of both. So an incomplete or altered checkpoint is recognised, wherever it comes from. The newest is the one
with the highest epoch and step: folders are named by the local time of the machine that wrote them, whose clock may be
wrong.
"""

import contextlib
import hashlib
import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lsemvae import __version__
from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, is_unaltered, load, save
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
    """Names and Ray's Checkpoint of each: first those whose state cannot be read, then by epoch and step, newest first.

    Ray names them by local time, which a wrong clock, another time zone or daylight saving puts into another order.
    """
    from ray.train import Checkpoint

    def position(name: str) -> tuple[float, float, str]:
        try:
            state = _whole_state(place.read_bytes(f"{name}/{STATE}"), f"{place.uri}/{name}/{STATE}")
        except (BundleError, FileNotFoundError):  # `_load` says what is wrong
            return math.inf, 0, name
        return state.get("epoch", math.inf), state.get("step", 0), name

    names = sorted(folders(place), key=position, reverse=True)
    return [(name, Checkpoint(place.path(name), place.filesystem)) for name in names]


def folders(place: Storage) -> set[str]:
    """The names of the checkpoints in a run's folder, whole or not."""
    return {path.split("/")[0] for path in place.list() if path.startswith("checkpoint_") and "/" in path}


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
        started, damage, written_by = None, None, None
        with explained(f"{place.uri}/{name}"), checkpoint.as_directory() as path:
            try:
                started, written_by = _load(Path(path), recipe, order, device)
            except BundleError as error:
                damage = error
            # Within the block: the workers of a machine share one download, which the last that leaves removes.
            damaged = sum_over_workers(torch.tensor(float(damage is not None))) > 0  # for any worker
        if damaged:
            if loud:
                log.error(f"checkpoint {name} is damaged and passed over: {damage or 'another worker found it so'}")
            continue
        assert started is not None
        if loud:
            log.info(f"resuming at epoch {started[0].epoch}, step {started[0].step}, from {name}")
            if written_by and written_by != versions():
                log.warning(f"{name} was written by {_as_words(written_by)}; this is {_as_words(versions())}")
        return name, started
    if kept:
        raise LsemvaeError(f"every checkpoint of {place.uri} is damaged: give another --name to start anew")
    torch.manual_seed(recipe.optim.seed)  # the same weights everywhere before DDP broadcasts them
    model = build(recipe.model, recipe.leads).to(device)
    return None, (Progress(), model, make_optimizer(model, recipe.optim))


def _load(
    folder: Path, recipe: PretrainRecipe, order: Order, device: torch.device
) -> tuple[Started, dict[str, str] | None]:
    """A checkpoint's folder -> what is in it, and the versions that wrote it if it says so.

    Raises BundleError for a damaged one, LsemvaeError for one of another run, or of a version that cannot be read.
    """
    state = read_state(folder)
    if "bundle" in state and not is_unaltered(folder / BUNDLE, state["bundle"]):
        raise BundleError(f"{folder / BUNDLE} is not the one of this checkpoint, or was altered")
    try:  # the files are those that were written, so what fails now is no damage
        began = state["order"]
        model = load(folder / BUNDLE)[1].train().to(device)
        optimizer = make_optimizer(model, recipe.optim)
        load_optimizer(optimizer, folder)
    except (ValueError, KeyError) as error:
        raise LsemvaeError(
            f"the checkpoint is whole, but {_as_words(state.get('written_by'))} wrote it and "
            f"{_as_words(versions())} cannot read it ({error}): resume with the versions that wrote it, or give "
            "another --name to start anew"
        ) from error
    now = _meaning_of(order)
    changed = [f"{key}={began.get(key)}, not {value}" for key, value in now.items() if began.get(key) != value]
    if changed:
        raise LsemvaeError(f"the run began with {'; '.join(changed)}: resume it with the same, or give another --name")
    if model.config != recipe.model or model.leads != recipe.leads:
        raise LsemvaeError("the run began with another model: resume it with the same, or give another --name")
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    return (progress, model, optimizer), state.get("written_by")


def save_checkpoint(
    folder: Path,
    bundle: Bundle,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Mapping[str, Tensor],
    progress: Progress,
    order: Order,
    workers: int,
) -> None:
    """Writes all of it into an empty folder. `model` may be its `state_dict()`, `optimizer` its `optimizer_tensors`."""
    digest = save(bundle, model, folder / BUNDLE).digest
    about = {"workers": workers, "order": _meaning_of(order), "bundle": digest, "written_by": versions()}
    save_optimizer(optimizer, folder, **vars(progress), **about)


def versions() -> dict[str, str]:
    """What decides how a checkpoint is written and read."""
    return {"lsemvae": __version__, "torch": str(torch.__version__), "ray": version("ray")}


def _as_words(written_by: Mapping[str, str] | None) -> str:
    if not written_by:
        return "an earlier release of lsemvae"
    return ", ".join(f"{name} {number}" for name, number in written_by.items())


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by the names that a checkpoint gives them."""
    return {
        f"{index}.{name}": value.detach()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def save_optimizer(optimizer: torch.optim.Optimizer | Mapping[str, Tensor], folder: Path, **state: Any) -> None:
    """Write tensors as safetensors and numbers as JSON: nothing has to be unpickled to read them.

    `state.json` is written last and holds the SHA-256 of the tensors and of itself, so that an incomplete or altered
    checkpoint is recognised.
    """
    tensors = optimizer if isinstance(optimizer, Mapping) else optimizer_tensors(optimizer)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    with (folder / OPTIMIZER).open("rb") as stream:
        state["optimizer_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    state["state_sha256"] = _digest(state)
    (folder / STATE).write_text(json.dumps(state))


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `save_optimizer` was given. Raises BundleError unless the checkpoint is whole."""
    try:
        content = (folder / STATE).read_bytes()
        with (folder / OPTIMIZER).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        gone = f": {Path(error.filename).name} is gone" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise BundleError(f"{folder} is no whole checkpoint{gone}") from None
    state = _whole_state(content, str(folder / STATE))
    if digest != state.get("optimizer_sha256"):
        raise BundleError(f"{folder / OPTIMIZER} is not the file that was saved (its SHA-256 differs)")
    return state


def _whole_state(content: bytes, shown: str) -> dict[str, Any]:
    """The content of a `state.json`. Raises BundleError unless it is what was saved."""
    try:
        state = json.loads(content)
    except ValueError:
        raise BundleError(f"{shown} is cut or altered: it is no JSON") from None
    if not isinstance(state, dict) or state.pop("state_sha256", None) != _digest(state):
        raise BundleError(f"{shown} is not the file that was saved (its SHA-256 differs)")
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
