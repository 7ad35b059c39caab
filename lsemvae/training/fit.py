"""One training loop for everything that is trained. It knows nothing of Ray or MLflow.

`fit` takes batches and calls back: after each step with its numbers, after each epoch, and when a checkpoint is due.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsemvae.config import OptimConfig, PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.models.parts.objectives import NonFiniteBatch, require

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """What `fit` hands back after each epoch: terms are means over the records of all workers."""

    index: int
    terms: dict[str, float]
    records: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """The numbers of one step: terms are means over the records of all workers."""

    epoch: int
    index: int
    terms: dict[str, float]
    records: int


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    batches: Callable[[int], Iterable[Batch]],
    on_epoch: Callable[[Epoch], bool | None],
    *,
    start: tuple[int, int] = (0, 0),
    steps_per_epoch: int | None = None,
    forward_kwargs: Callable[[int, int], dict[str, Any]] = lambda epoch, step: {},
    before_step: Callable[[int, int], None] = lambda epoch, step: None,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpoint_every: int = 0,
    on_checkpoint: Callable[[int, int, dict[str, float]], None] = lambda epoch, step, sums: None,
    sums: Mapping[str, float] | None = None,
) -> None:
    """Train to `config.epochs`, or until `on_epoch` returns True.

    `batches(epoch)` gives that epoch's batches, from step `start[1]` on in the epoch `start[0]`. A batch may have
    `weight_B`: how much each record counts in the mean over the whole step, over all workers; 0 takes no part.
    `config.accumulate` parts of a batch go through the model one after another, for one step of the optimiser.
    `forward_kwargs(epoch, step)` is what the model's `forward` takes beside a batch. `on_checkpoint` is called
    after every `checkpoint_every` steps, once their numbers are known to be finite. Its third argument is what this
    epoch's numbers need of these steps: given as `sums` with `start`, they are those of the whole epoch.

    `model(batch)` returns `{"loss": …, "good_B": …, other named terms}`. Raises NonFiniteBatch when a record or the
    gradient is not finite: the weights are then those of the last good step (a fused AdamW leaves such a step out
    on the device, so that nothing has to wait for it). Raises LsemvaeError when an epoch has no batch, or the
    schedule needs `steps_per_epoch`.
    """
    workers = torch.distributed.get_world_size() if _distributed() else 1
    device_type = next(model.parameters()).device.type
    if config.schedule == "cosine" and steps_per_epoch is None:
        raise LsemvaeError("schedule='cosine' needs the number of steps: give steps_per_epoch")
    for epoch in range(start[0], config.epochs):
        model.train()
        before = dict(sums or {}) if epoch == start[0] else {}
        began = time.monotonic() - before.pop("seconds", 0.0)
        tally = _Tally(on_step, before)
        for step, batch in enumerate(batches(epoch), start=start[1] if epoch == start[0] else 0):
            before_step(epoch, step)
            if steps_per_epoch:
                rate = learning_rate(config, epoch * steps_per_epoch + step, config.epochs * steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            batch, total = _with_shares(batch, workers)
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = {}
            goods = []
            parts = _split(batch, config.accumulate)
            for number, part in enumerate(parts):
                with ExitStack() as stack:
                    if number < len(parts) - 1 and hasattr(model, "no_sync"):
                        stack.enter_context(model.no_sync())  # workers exchange gradients once a step
                    with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
                        of_part = model(part, check=False, **forward_kwargs(epoch, step))
                    of_part["loss"].backward()
                goods.append(of_part.pop("good_B"))
                for name, term in of_part.items():
                    terms[name] = terms[name] + term.detach() if name in terms else term.detach()
            tally.settle()  # the step before has ended by now; this one goes on, on an accelerator
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            optimizer.found_inf = (~norm.isfinite()).float()  # workers agree: the gradient is that of all
            optimizer.step()
            tally.add(_Later(epoch, step, {"grad_norm": norm, **terms}, total, torch.cat(goods), workers))
            if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 != steps_per_epoch:
                tally.settle()
                on_checkpoint(epoch, step, tally.sums | {"seconds": time.monotonic() - began})
        tally.settle()
        if tally.records == 0:
            raise LsemvaeError(f"epoch {epoch} has no training recordings: all were refused, or the split is empty")
        if on_epoch(Epoch(epoch, tally.means(), tally.records, time.monotonic() - began)):
            return


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """At a step of all: a linear rise over `warmup_steps`, then constant, or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


class _Later:
    """A step's numbers, copied while the device goes on: reading them at once would make it wait each step."""

    def __init__(
        self, epoch: int, step: int, terms: dict[str, Tensor], total: Tensor, good_B: Tensor, workers: int
    ) -> None:
        self._at, self._names, self._good_B = (epoch, step), [*terms], good_B
        # The loss of a step is that of its records, however many workers share them, and all see that it is not finite.
        values = sum_over_workers(torch.stack([term.float() for term in (*terms.values(), total)])) / workers
        self._event = None
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
        *values, total = self._values.tolist()
        epoch, index = self._at
        if not all(math.isfinite(value) for value in values):
            where = f"epoch {epoch}, step {index}: the loss or its gradient is not finite; NaN, infinity or no lead"
            require(self._good_B, where)
            raise NonFiniteBatch(f"{where}, on another worker or in the gradient alone: lower the learning rate", ())
        return Step(epoch, index, dict(zip(self._names, values, strict=True)), round(total))


class _Tally:
    """An epoch's sums. A step's numbers are read when the next one is under way."""

    def __init__(self, on_step: Callable[[Step], None], sums: dict[str, float]) -> None:
        self._on_step = on_step
        self._pending: _Later | None = None
        self.sums = {"records": 0.0} | sums

    def add(self, latest: _Later) -> None:
        self._pending = latest

    def settle(self) -> None:
        """Read the step that is not read yet. Raises NonFiniteBatch."""
        if self._pending is None:
            return
        step = self._pending.read()
        self._pending = None
        for name, value in step.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * step.records
        self.sums["records"] += step.records
        self._on_step(step)

    @property
    def records(self) -> int:
        return round(self.sums["records"])

    def means(self) -> dict[str, float]:
        return {name: total / self.records for name, total in self.sums.items() if name != "records"}


def _with_shares(batch: Batch, workers: int) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with `share_B`, each record's share in the mean, and the weight of all records of the step.

    DDP averages the workers' gradients, so a share is multiplied by their number.
    """
    first = next(iter(batch.values()))
    weight_B = batch["weight_B"] if "weight_B" in batch else torch.ones(len(first), device=first.device)
    total = sum_over_workers(weight_B.sum())
    return {**batch, "share_B": weight_B * (workers / total.clamp(min=1e-9))}, total


def _split(batch: Batch, parts: int) -> list[dict[str, Tensor]]:
    if parts == 1:
        return [dict(batch)]
    chunks = {name: values.chunk(parts) for name, values in batch.items()}
    return [{name: chunks[name][i] for name in chunks} for i in range(len(next(iter(chunks.values()))))]


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


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def kl_scale(recipe: PretrainRecipe, epoch: int, step: int, steps: int) -> float:
    """Beta annealing: from 0 to 1, linear in steps over `recipe.kl_warmup_epochs`, then 1."""
    if recipe.kl_warmup_epochs <= 0:
        return 1.0
    return min(1.0, (epoch + step / max(steps, 1)) / recipe.kl_warmup_epochs)
