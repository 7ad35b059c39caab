"""Write checkpoints in a thread while training goes on.

Training waits only while the tensors are copied into the host's memory. One checkpoint is written at a time: the next
one waits until the one before is in the storage. A checkpoint is whole or absent there. In a folder it appears under
its name in one step; in an object store its `state.json`, without which it does not count, is uploaded last.
"""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lsemvae.bundle import Bundle
from lsemvae.data.order import Order
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import (
    STATE,
    Progress,
    folders,
    keep_as_best,
    optimizer_tensors,
    save_checkpoint,
    writing_to,
)
from lsemvae.training.reported import LIST

log = logging.getLogger(__name__)

PARTIAL = ".checkpoint_partial_"
_PART_BYTES = 2**24


class Writer:
    """The checkpoints of one run, written by one of its workers. Leaving it waits for the last one."""

    def __init__(self, place: Storage) -> None:
        self._place = place
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._latest: Future[None] | None = None
        self._memory: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last checkpoint. Raises what made it fail, unless another error is on its way."""
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and self._latest is not None:
            failure = self._latest.exception()
            if failure is not None and failure is not error:
                log.error(f"the last checkpoint is not written: {failure}")
        self._pool.shutdown()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._latest is not None and not self._latest.done()

    def check(self) -> None:
        """Raises what made the latest checkpoint fail, if it has failed by now."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until the latest checkpoint is in the storage. Raises LsemvaeError or StorageError if it failed."""
        if self._latest is not None:
            self._latest.result()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Allocate the memory of the copies in a thread: the first use of 3 GB takes seconds.

        Nothing is done where the optimiser's state is sharded: its tensors are not known before they are collected.
        """
        if self._memory is None and not hasattr(optimizer, "collect"):
            kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(model, optimizer).items()}
            self._memory = self._pool.submit(self._allocate, kinds)

    def write(
        self,
        bundle: Bundle,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        order: Order,
        workers: int,
        best: bool,
    ) -> tuple[str, Future[None]]:
        """Copy the tensors and begin to write -> the checkpoint's name, and what is done once it is in the storage.

        Waits first for the checkpoint before, and raises what made that one fail. The bundle of the run's best epoch is
        replaced before the checkpoint appears: a run that is killed in between repeats the end of the epoch.
        """
        self.wait()
        model_names = model.state_dict().keys()
        copies = self._copied(_tensors(model, optimizer))
        weights = {name: copies[_MODEL + name] for name in model_names}
        state = {name.removeprefix(_OPTIMIZER): t for name, t in copies.items() if name.startswith(_OPTIMIZER)}
        name = f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"  # as Ray Train names them

        def work() -> None:
            with writing_to(self._place), _appears_whole(self._place, name) as folder:
                save_checkpoint(folder, bundle, weights, state, progress, order, workers)
                if best:
                    keep_as_best(folder, self._place)

        self._latest = self._pool.submit(work)
        return name, self._latest

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory, which the next checkpoint overwrites."""
        if self._memory is not None:
            self._memory.result()
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if kinds != {name: (tensor.shape, tensor.dtype) for name, tensor in self._copies.items()}:
            self._allocate(kinds)
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._copies

    def _allocate(self, kinds: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        pinned = torch.cuda.is_available()  # copied to at the full speed of the bus
        self._copies = {
            name: torch.empty(shape, dtype=dtype, pin_memory=pinned).zero_() for name, (shape, dtype) in kinds.items()
        }


_MODEL, _OPTIMIZER = "model ", "optimizer "


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {_MODEL + name: tensor.detach() for name, tensor in model.state_dict().items()}
    return found | {_OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(optimizer).items()}


@contextlib.contextmanager
def _appears_whole(place: Storage, name: str) -> Iterator[Path]:
    """An empty folder whose content is in the place, under this name, when the block ends without an error."""
    if not place.is_local:
        with tempfile.TemporaryDirectory(prefix="lsemvae-checkpoint-") as temporary:
            yield Path(temporary)
            _upload(Path(temporary), place, name)
        return
    folder = Path(place.path(f"{PARTIAL}{secrets.token_hex(4)}"))
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):  # a power cut must not keep the name and lose the content
            _sync(path)
        folder.rename(place.path(name))
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upload(folder: Path, place: Storage, name: str) -> None:
    """Copy a folder's files to an object store, `state.json` last."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == STATE)
    for path in paths:
        # pyarrow.fs.copy_files, which Ray Train uses, returns as if all were well where the last part is refused.
        target = place.filesystem.open_output_stream(place.path(f"{name}/{path.relative_to(folder)}"))
        with path.open("rb") as source, target:
            shutil.copyfileobj(source, target, _PART_BYTES)


def remove_unfinished(place: Storage) -> None:
    """Remove what killed workers have left of checkpoints that they were writing."""
    if place.is_local:
        for folder in Path(place.base).glob(f"{PARTIAL}*"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    whole = {path.split("/")[0] for path in place.list("", STATE)}
    reported = place.read_bytes(LIST).decode(errors="replace") if place.exists(LIST) else ""
    for name in sorted(folders(place) - whole):
        if name not in reported:  # what was whole once is not removed
            log.warning(f"removed {name} of {place.uri}, which was not written to its end")
            place.filesystem.delete_dir(place.path(name))


def report(place: Storage, metrics: Mapping[str, float], name: str, written: "Future[None]") -> None:
    """Tell Ray Train the metrics and the checkpoint, which it takes to its list when that is written.

    All workers must report in the same order. Ray deletes older checkpoints when it has a newer one.
    """
    import ray.train

    def wait(_: Any, name: str) -> Any:
        written.result()
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    ray.train.report(
        dict(metrics),
        checkpoint=ray.train.Checkpoint(place.path(name), place.filesystem),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=wait,
    )
