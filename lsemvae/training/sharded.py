"""AdamW's state spread over workers, by torch's ZeroRedundancyOptimizer (ZeRO-1).

Importing that takes seconds: only a run that asks for it imports this.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedAdamW(ZeroRedundancyOptimizer):
    """AdamW whose moments are spread over the workers: each updates its parameters and sends them to the others.

    A parameter is never divided. Its checkpoint is that of AdamW, so a run may resume with or without sharding and
    with any number of workers.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, torch.optim.AdamW, **settings)
        self._collected = False

    def __setattr__(self, name: str, value: Any) -> None:
        inner = name in ("grad_scale", "found_inf")  # which `fit` sets, and the AdamW inside reads
        object.__setattr__(self.optim if inner else self, name, value)

    def collect(self) -> None:
        """Bring all of the state to rank 0, for a checkpoint. Every worker calls this at the same step."""
        self.consolidate_state_dict(to=0)
        self._collected = dist.get_rank() == 0

    def state_dict(self) -> dict[str, Any]:
        """What `collect` brought, on rank 0; elsewhere, and before, the groups alone."""
        return super().state_dict() if self._collected else torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this worker's part of the whole state."""
        super().load_state_dict(state_dict)
        self.state.clear()  # a second copy of what `optim` holds
        for parameter, state in self.optim.state.items():  # torch left the step on the CPU: no place for a fused AdamW
            state["step"] = state["step"].to(parameter.device)
