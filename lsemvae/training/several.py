"""Several GPUs: how workers exchange gradients, and a checkpoint of what each of them keeps.

Both options of `OptimConfig` are torch's own: DDP's bf16 hook here, ZeRO in `lsemvae.training.sharded`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lsemvae.config import OptimConfig


def exchange_gradients(model: nn.Module, config: OptimConfig) -> None:
    """Let the workers of a DDP model exchange gradients as `config.gradient_exchange` says."""
    if config.gradient_exchange == "bf16" and isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, _in_bf16)


def _in_bf16(
    group: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP asks for this annotation; torch's stubs lack it
) -> torch.futures.Future[Tensor]:
    # DDP refuses torch's hook under its own name where there is no NCCL, though gloo adds bf16, too.
    return default_hooks.bf16_compress_hook(group, bucket)


def collect(optimizer: torch.optim.Optimizer) -> None:
    """On every worker before a checkpoint: rank 0 gets all of the optimiser's state, if it is sharded."""
    if sharded := getattr(optimizer, "collect", None):
        sharded()
