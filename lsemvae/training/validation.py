"""A pass over the held-out subjects: loss terms, diagnostics and a few examples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Reconstructs
from lsemvae.training.fit import Batch, split, sum_over_workers

EXAMPLES = 3
"""Recordings in a picture of reconstructions."""


@torch.no_grad()
def validate(
    model: Any, batches: Iterable[Batch], precision: str = "float32", accumulate: int = 1
) -> tuple[dict[str, float], dict[str, Tensor] | None]:
    """Metrics of the model's own validation over the held-out records of all workers, and "records", their number.

    `model` is a `lsemvae.models.contract.Pretrains`. Each batch goes through it in `accumulate` parts: less memory, the
    same metrics. Also gives the first records with their reconstructions, for a picture, where it can reconstruct.
    Records of weight 0 take no part. Raises LsemvaeError when there is no other.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    validation = model.validation()
    records = torch.zeros((), dtype=torch.float64, device=device)
    example = None
    for batch in batches:
        kept = _kept(batch)
        if not len(kept["x_BLT"]):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for part in split(kept, accumulate):
                validation.update(part)
            if example is None and isinstance(model, Reconstructs):
                example = _example(model, kept)
        records += len(kept["x_BLT"])
    model.train(was_training)
    for tensor in (records, *validation.tensors()):
        sum_over_workers(tensor)
    if not records:
        raise LsemvaeError("there are no validation recordings: all were refused, or too few subjects are held out")
    return validation.metrics() | {"records": float(records)}, example


def _kept(batch: Batch) -> dict[str, Tensor]:
    """The records that count."""
    if "weight_B" not in batch:
        return dict(batch)
    kept_B = batch["weight_B"] > 0
    return {name: values[kept_B] for name, values in batch.items() if name != "weight_B"}


def _example(model: Reconstructs, batch: Batch) -> dict[str, Tensor]:
    x_BLT, mask_BL = (batch[name][:EXAMPLES] for name in ("x_BLT", "lead_mask_BL"))
    return {"x_BLT": x_BLT.cpu(), "reconstruction_BLT": model.reconstruct(x_BLT, mask_BL).float().cpu()}
