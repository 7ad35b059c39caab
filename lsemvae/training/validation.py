"""A pass over the held-out subjects: loss terms, diagnostics and a few examples."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lsemvae.config import PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.models.lsemvae import TERMS
from lsemvae.models.parts.diagnostics import Diagnostics
from lsemvae.training.fit import Batch, sum_over_workers

EXAMPLES = 3  # recordings in a picture of reconstructions


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], recipe: PretrainRecipe
) -> tuple[dict[str, float], dict[str, Tensor] | None]:
    """Loss terms with the full KL weight and the model's diagnostics over held-out subjects, over all workers.

    Also the first records with their reconstructions, for a picture. Records of weight 0 take no part. Raises
    LsemvaeError when there is none.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    diagnostics = Diagnostics.empty(model.config.latent, len(model.decoder_leads), device)
    sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
    example = None
    for batch in batches:
        batch = dict(batch)
        kept_B = batch.pop("weight_B", torch.ones(len(batch["x_BLT"]), device=device)) > 0
        batch = {name: values[kept_B] for name, values in batch.items()}
        size = len(batch["x_BLT"])
        if not size:
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.precision == "bf16"):
            # `forward`, not the call: a compiled model would be compiled anew for each size.
            terms = model.forward(batch, kl_scale=1.0, diagnostics=diagnostics)
            if example is None:
                seen = {name: values[:EXAMPLES] for name, values in batch.items()}
                example = {
                    "x_BLT": seen["x_BLT"].cpu(),
                    "reconstruction_BLT": model.reconstruct(seen["x_BLT"], seen["lead_mask_BL"]).float().cpu(),
                }
        sums += torch.stack([terms[name].double() for name in TERMS] + [sums.new_ones(())]) * size
    model.train(was_training)
    for tensor in (sums, *diagnostics.tensors()):
        sum_over_workers(tensor)
    *totals, records = sums.tolist()
    if not records:
        raise LsemvaeError("there are no validation recordings: all were refused, or too few subjects are held out")
    values = {name: total / records for name, total in zip(TERMS, totals, strict=True)}
    values |= diagnostics.summary(model.decoder_leads)
    by_lead = [value for name, value in values.items() if name.startswith("r/")]
    values["pearson_r"] = sum(by_lead) / max(len(by_lead), 1)
    values["collapsed"] = float(diagnostics.collapsed() is not None)
    values["records"] = records
    return values, example
