"""One training loop for everything that is trained. It knows nothing of Ray, MLflow or any architecture.

`fit` takes batches and tells a `Watcher` of each step, of each epoch, and when a checkpoint is due.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsemvae.config import OptimConfig
from lsemvae.errors import LsemvaeError
from lsemvae.models.parts.blocks import fuse
from lsemvae.models.parts.objectives import NonFiniteBatch, require
from lsemvae.training.out_of_memory import explained

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
MAX_SKIPPED_STEPS, MAX_SKIPPED_IN_A_ROW = 10, 3
"""Steps of an epoch that may be left out because their loss or gradient was not finite. A bad record costs one step; a
run that diverges loses all that follow."""


@dataclass(frozen=True)
class Epoch:
    """The numbers of an epoch: terms are means over the records of all workers. Steps left out do not count."""

    index: int
    terms: dict[str, float]
    records: int
    seconds: float
    skipped: int = 0
    """Steps that were left out because they were not finite."""


@dataclass(frozen=True)
class Step:
    """The numbers of one step: terms are means over the records of all workers."""

    epoch: int
    index: int
    terms: dict[str, float]
    records: int


@dataclass(frozen=True)
class Start:
    """Where training resumes: the epoch, the step in it, and the sums over this epoch's earlier steps."""

    epoch: int = 0
    step: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)


class Watcher:
    """`fit` reports its progress to these methods. Override those that you need."""

    def before_step(self, epoch: int, step: int) -> None:
        """A step begins."""

    def on_step(self, step: Step) -> None:
        """The numbers of a step are known; the next one may be under way."""

    def wants_checkpoint(self) -> bool:
        """Whether this worker asks for a checkpoint in the middle of the epoch. It is asked at each step.

        The answer goes to all workers with the numbers of the step, so that all of them take the checkpoint after the
        step that follows.
        """
        return False

    def on_checkpoint(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        """A checkpoint is due. All steps up to this one have finite numbers.

        Give `sums` to `Start` when training resumes, so that the epoch's numbers cover the whole epoch.
        """

    def on_epoch(self, epoch: Epoch) -> bool | None:
        """An epoch has ended. True ends the training."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    batches: Callable[[int], Iterable[Batch]],
    watcher: Watcher | None = None,
    *,
    start: Start | None = None,
    steps_per_epoch: int | None = None,
    checkpoint_every: int = 0,
) -> None:
    """Train to `config.epochs`, or until `watcher.on_epoch` returns True.

    `model(batch)` follows `lsemvae.models.contract.Trains`; `optimizer` is one of `make_optimizer`. `batches(epoch)`
    gives that epoch's batches, in the epoch `start.epoch` from `start.step` on. A batch may have `weight_B`: how much
    each record counts in the mean over the whole step, over all workers; a record of weight 0 takes no part. A scalar
    in a batch is for the whole batch.
    `config.accumulate` parts of a batch go through the model one after another, for one step of the optimiser. After
    every `checkpoint_every` steps a checkpoint is due, and when `watcher.wants_checkpoint` asks for one.

    A step whose loss or gradient is not finite is left out: the weights stay those of the last good step (a fused
    AdamW does so on the device, so nothing has to wait for it). Raises NonFiniteBatch, with the positions of the bad
    records where they are known, when more than MAX_SKIPPED_STEPS of an epoch are left out, more than
    MAX_SKIPPED_IN_A_ROW one after another, or all of them. Raises OutOfMemory when a step does not fit the memory,
    LsemvaeError when an epoch has no batch, or the schedule needs `steps_per_epoch`.
    """
    watcher, start = watcher or Watcher(), start or Start()
    workers = torch.distributed.get_world_size() if _distributed() else 1
    if needs_steps(config) and steps_per_epoch is None:
        raise LsemvaeError("a cosine schedule and a warm-up need the number of steps: give steps_per_epoch")
    for epoch in range(start.epoch, config.epochs):
        model.train()
        resumed = epoch == start.epoch
        before = dict(start.sums) if resumed else {}
        began = time.monotonic() - before.pop("seconds", 0.0)
        tally = _Tally(watcher.on_step, before)
        for step, batch in enumerate(batches(epoch), start=start.step if resumed else 0):
            watcher.before_step(epoch, step)
            if steps_per_epoch:
                _set_rate(optimizer, config, epoch * steps_per_epoch + step, config.epochs * steps_per_epoch)
            wanted = watcher.wants_checkpoint()
            tally.pending(_take_step(model, optimizer, config, batch, workers, (epoch, step), tally, wanted))
            due = tally.checkpoint_wanted or (checkpoint_every and (step + 1) % checkpoint_every == 0)
            if due and step + 1 != steps_per_epoch:
                tally.settle()
                tally.checkpoint_wanted = False
                watcher.on_checkpoint(epoch, step, tally.sums | {"seconds": time.monotonic() - began})
        tally.settle()
        tally.require_records(epoch)
        if watcher.on_epoch(Epoch(epoch, tally.means(), tally.records, time.monotonic() - began, tally.skipped)):
            return


@explained
def _take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    batch: Batch,
    workers: int,
    at: tuple[int, int],
    tally: "_Tally",
    wants_checkpoint: bool,
) -> "_Later":
    """One step of the optimiser on a batch, in parts; its numbers are read later."""
    device_type = next(model.parameters()).device.type
    shared, total = _with_shares(batch, workers)
    optimizer.zero_grad(set_to_none=True)
    terms: dict[str, Tensor] = {}
    goods = []
    parts = split(shared, config.accumulate)
    no_sync: Any = getattr(model, "no_sync", None)  # of DDP
    for number, part in enumerate(parts):
        with ExitStack() as stack:
            if number < len(parts) - 1 and no_sync:
                stack.enter_context(no_sync())  # workers exchange gradients once a step
            with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
                of_part = model(part, check=False)
            of_part["loss"].backward()
            if config.cuda_graphs:  # the next replay overwrites what this one returned
                of_part = {name: value.detach().clone() for name, value in of_part.items()}
        goods.append(of_part.pop("good_B"))
        for name, term in of_part.items():
            terms[name] = terms[name] + term.detach() if name in terms else term.detach()
    tally.settle()  # the step before has ended by now; on an accelerator this one is still running
    norm = clip_in_step(model, optimizer, config.clip_norm)
    later = _Later(at, {"grad_norm": norm, **terms}, total, torch.cat(goods), workers, wants_checkpoint)
    # A fused optimiser leaves the step out where this is 1. `finite` is that of all workers, so they agree.
    optimizer.found_inf = (~later.finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    return later


def clip_in_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Let the next step of a fused optimiser clip the gradient to this norm, 0 for none -> the gradient's norm.

    It divides the gradient by `grad_scale` as it reads it. clip_grad_norm_ would read and write it once more.
    """
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    scale = ((norm + 1e-6) / clip_norm).clamp(min=1).float() if clip_norm else None
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    return norm


def needs_steps(config: OptimConfig) -> bool:
    """Whether the learning rate depends on how many steps an epoch has."""
    return config.schedule == "cosine" or config.warmup_steps > 0


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """At a step of all: a linear rise over `warmup_steps`, then constant, or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> None:
    rate = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


class _Later:
    """A step's numbers, copied while the device goes on: reading them at once would make it wait each step."""

    def __init__(
        self,
        at: tuple[int, int],
        terms: dict[str, Tensor],
        total: Tensor,
        good_B: Tensor,
        workers: int,
        wants_checkpoint: bool,
    ) -> None:
        self._at, self._names, self._good_B = at, [*terms], good_B
        # The loss of a step is that of its records, however many workers share them, and all see that it is not finite.
        asked = torch.full_like(total, float(wants_checkpoint))
        values = sum_over_workers(torch.stack([term.float() for term in (*terms.values(), total, asked)])) / workers
        self.checkpoint_wanted = False
        """Whether a worker asks for a checkpoint; known once the numbers are read."""
        self.finite = values.isfinite().all()
        """Whether the loss, its terms and the gradient are finite; on the device."""
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> Step:
        """Raises NonFiniteBatch."""
        if self._event is not None:
            self._event.synchronize()
        *values, total, asked = self._values.tolist()
        self.checkpoint_wanted = asked > 0
        epoch, index = self._at
        if not all(math.isfinite(value) for value in values):
            where = f"epoch {epoch}, step {index}: the loss or its gradient is not finite; NaN, infinity or no lead"
            require(self._good_B, where)
            raise NonFiniteBatch(f"{where}, on another worker or in the gradient alone", ())
        return Step(epoch, index, dict(zip(self._names, values, strict=True)), round(total))


class _Tally:
    """An epoch's sums. A step's numbers are read when the next one is under way."""

    def __init__(self, on_step: Callable[[Step], None], sums: dict[str, float]) -> None:
        self._on_step = on_step
        self._pending: _Later | None = None
        self._latest: NonFiniteBatch | None = None
        self._in_a_row = 0
        self.checkpoint_wanted = False
        """Whether a worker asks for a checkpoint. It is the same for all workers: it comes with a step's numbers."""
        self.sums = {"records": 0.0, "skipped": 0.0} | sums

    def pending(self, latest: _Later) -> None:
        self._pending = latest

    def settle(self) -> None:
        """Read the step that is not read yet. Raises NonFiniteBatch when too many of the epoch are left out."""
        if self._pending is None:
            return
        later, self._pending = self._pending, None
        try:
            step = later.read()
        except NonFiniteBatch as error:
            self._skip(error)
            return
        finally:
            self.checkpoint_wanted |= later.checkpoint_wanted
        self._in_a_row = 0
        for name, value in step.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * step.records
        self.sums["records"] += step.records
        self._on_step(step)

    def _skip(self, error: NonFiniteBatch) -> None:
        self.sums["skipped"] += 1
        self._in_a_row += 1
        self._latest = error
        if self.skipped > MAX_SKIPPED_STEPS or self._in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteBatch(
                f"{error}; {self.skipped} steps of this epoch were left out, at most {MAX_SKIPPED_STEPS} may be and "
                f"{MAX_SKIPPED_IN_A_ROW} in a row: lower the learning rate, or look at these records",
                error.positions,
            )
        log.warning(f"{error}: this step is left out ({self.skipped} of at most {MAX_SKIPPED_STEPS} in an epoch)")

    def require_records(self, epoch: int) -> None:
        """Raises LsemvaeError where the epoch had no record, NonFiniteBatch where all of its steps were left out."""
        if self.records:
            return
        if self._latest is not None:
            raise self._latest
        raise LsemvaeError(f"epoch {epoch} has no training recordings: all were refused, or the split is empty")

    @property
    def records(self) -> int:
        return round(self.sums["records"])

    @property
    def skipped(self) -> int:
        return round(self.sums["skipped"])

    def means(self) -> dict[str, float]:
        return {name: total / self.records for name, total in self.sums.items() if name not in ("records", "skipped")}


def _with_shares(batch: Batch, workers: int) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with `share_B`, each record's share in the mean, and the weight of all records of the step.

    DDP averages the workers' gradients, so a share is multiplied by their number.
    """
    first = next(values for values in batch.values() if values.ndim)
    weight_B = batch["weight_B"] if "weight_B" in batch else torch.ones(len(first), device=first.device)
    total = sum_over_workers(weight_B.sum())
    return {**batch, "share_B": weight_B * (workers / total.clamp(min=1e-9))}, total


def split(batch: Batch, parts: int) -> list[dict[str, Tensor]]:
    """The batch in so many parts; in fewer where it has fewer records. A scalar belongs to every part."""
    if parts == 1:
        return [dict(batch)]
    whole = {name: values for name, values in batch.items() if not values.ndim}
    chunks = {name: values.chunk(parts) for name, values in batch.items() if values.ndim}
    return [whole | {name: chunks[name][i] for name in chunks} for i in range(len(next(iter(chunks.values()))))]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of the workers' tensors, in place; the tensor itself where there is one process."""
    if _distributed() and torch.distributed.get_world_size() > 1:
        if torch.distributed.get_backend() == "nccl" and not tensor.is_cuda:
            on_device = tensor.cuda()
            torch.distributed.all_reduce(on_device)
            return tensor.copy_(on_device)
        torch.distributed.all_reduce(tensor)
    return tensor


def prepare(model: nn.Module, config: OptimConfig, device: torch.device) -> None:
    """Let the model run as `config.fused_encoder`, `compile` and `cuda_graphs` say, in place."""
    if config.fused_encoder:
        form = fuse(model, device)
        if not _distributed() or torch.distributed.get_rank() == 0:
            log.info(form)
    if config.compile:
        model.compile(mode="reduce-overhead" if config.cuda_graphs else None)


def make_optimizer(
    model: nn.Module, config: OptimConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW over all parameters; fused, so that it clips the gradient and leaves out a step that is not finite.

    `rates` are learning rates of parameters by the start of their name, such as {"encoders.": 3e-4}; all others have
    `config.learning_rate`. Each follows the schedule. With `config.shard_optimizer` the workers share its state.
    """
    groups: list[dict[str, Any]] = []
    rest = dict(model.named_parameters())
    for prefix, rate in (rates or {}).items():
        chosen = [rest.pop(name) for name in list(rest) if name.startswith(prefix)]
        groups.append({"params": chosen, "lr": rate, "share": rate / config.learning_rate})
    groups.append({"params": list(rest.values())})
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.shard_optimizer and _distributed() and torch.distributed.get_world_size() > 1:
        from lsemvae.training.sharded import ShardedAdamW

        return ShardedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, **settings)
