"""A training step that does not fit the memory: the error says how many records do. It is not tried again unchanged."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lsemvae.config import OptimConfig
from lsemvae.errors import LsemvaeError
from lsemvae.memory import is_out_of_memory

Result = TypeVar("Result")


class OutOfMemory(LsemvaeError):
    """A batch that does not fit the memory."""


def explained(take_step: Callable[..., Result]) -> Callable[..., Result]:
    """The step, which raises OutOfMemory that names the number of records which fit."""

    @wraps(take_step)
    def step(
        model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, batch: Mapping[str, Tensor], *rest: Any
    ) -> Result:
        try:
            return take_step(model, optimizer, config, batch, *rest)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:150]
        # Here nothing refers to the step's tensors any longer: the exception had kept them.
        raise OutOfMemory(_message(model, optimizer, config, batch, said))

    return step


def _message(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, batch: Mapping[str, Tensor], said: str
) -> str:
    device = next(model.parameters()).device
    records = len(next(values for values in batch.values() if values.ndim))
    at_once = -(-records // config.accumulate)
    fits = _largest_that_fits(model, optimizer, config, batch, at_once)
    what = f"{at_once} records at once do not fit the memory of {device} ({said})"
    if not fits:
        return f"{what}, and not even one does: take a smaller model, or a machine with more memory"
    parts = -(-records // fits)
    return (
        f"{what}, {fits} do: give --optim.accumulate {parts}, which gives the same result in parts, a smaller "
        "--optim.batch-size, or more --num-workers"
    )


def _largest_that_fits(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, batch: Mapping[str, Tensor], records: int
) -> int:
    """The largest of records/2, records/4, … of which a step's forward and backward pass fit; 0 where none does."""
    while records > 1:
        records //= 2
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if _fits(model, optimizer, config, {n: v[:records] if v.ndim else v for n, v in batch.items()}):
            return records
    return 0


def _fits(model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, batch: Mapping[str, Tensor]) -> bool:
    device_type = next(model.parameters()).device.type
    alone: Any = getattr(model, "no_sync", nullcontext)  # of DDP: the other workers do not take part
    try:
        # Before its first step, AdamW has not yet allocated its two tensors for each parameter.
        kept = [] if optimizer.state else [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        with alone(), torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(batch, check=False)["loss"]
        with alone():
            loss.backward()
        del kept
    except (RuntimeError, MemoryError):  # with too little memory, libraries fail in many words
        return False
    finally:
        optimizer.zero_grad(set_to_none=True)
    return True
