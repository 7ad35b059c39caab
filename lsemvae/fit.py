"""One training loop for everything that is trained, and the Ray Train worker that pre-trains with it.

`fit` knows nothing of Ray or MLflow: it takes batches and calls back after each epoch. `pretrain_worker` is what
every Ray Train worker runs: it streams its share of the shards, and rank 0 saves checkpoints and tracks.
"""

import json
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lsemvae.bundle import Bundle, load, save
from lsemvae.config import OptimConfig, PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.models import build
from lsemvae.models.diagnostics import Diagnostics

log = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
EXAMPLES = 3  # recordings in a picture of reconstructions


@dataclass(frozen=True)
class Epoch:
    """What `fit` hands back after each epoch: mean training terms, weighted by the records of each batch."""

    index: int
    terms: dict[str, float]
    records: int
    seconds: float


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    batches: Callable[[int], Iterable[Batch]],
    on_epoch: Callable[[Epoch], None],
    *,
    start_epoch: int = 0,
    forward_kwargs: Callable[[int, int], dict[str, Any]] = lambda epoch, step: {},
    on_step: Callable[[dict[str, float]], None] = lambda terms: None,
) -> None:
    """Train to `config.epochs`. `batches(epoch)` gives that epoch's batches; `forward_kwargs(epoch, step)` what
    the model's `forward` takes beside a batch.

    `model(batch)` returns `{"loss": …, other named terms}` and raises NonFiniteBatch, so before any step, when a
    record or its loss is not finite. Raises LsemvaeError when an epoch has no batch.
    """
    device_type = next(model.parameters()).device.type
    for epoch in range(start_epoch, config.epochs):
        model.train()
        sums: defaultdict[str, float] = defaultdict(float)
        records, began = 0, time.monotonic()
        for step, batch in enumerate(batches(epoch)):
            with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
                terms = model(batch, **forward_kwargs(epoch, step))
            loss = terms["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            optimizer.step()
            size = len(next(iter(batch.values())))
            values = {name: float(term.detach()) for name, term in terms.items()} | {"grad_norm": float(norm)}
            for name, value in values.items():
                sums[name] += value * size
            records += size
            on_step(values)
        if records == 0:
            raise LsemvaeError(f"epoch {epoch} has no training recordings: all were refused, or the split is empty")
        means = {name: total / records for name, total in sums.items()}
        on_epoch(Epoch(epoch, means, records, time.monotonic() - began))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, **state: Any) -> None:
    """Tensors as safetensors and numbers as JSON: a checkpoint that never has to be unpickled."""
    tensors = {
        f"{index}.{name}": value.detach().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Restores what `save_optimizer` wrote -> its `state`."""
    state: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(folder / OPTIMIZER).items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": dict(state), "param_groups": current["param_groups"]})
    return json.loads((folder / STATE).read_text())


# --- pre-training on Ray Train -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainJob:
    """What travels to every worker. `rows` are those of the splits; `provenance` goes into the bundle."""

    recipe: PretrainRecipe
    rows: dict[str, int]
    tracking_run: str | None
    provenance: dict[str, Any]


def pretrain_worker(config: dict[str, PretrainJob]) -> None:
    """Runs on each Ray Train worker; every epoch ends with one report and, from rank 0, one checkpoint."""
    import ray.train
    from ray.experimental import tqdm_ray
    from ray.train.torch import get_device, prepare_model

    _print_no_reports()
    job = config["job"]
    recipe = job.recipe
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = get_device()
    start_epoch = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            model = load(Path(folder) / "bundle")[1].to(device)
            optimizer = make_optimizer(model, recipe.optim)
            start_epoch = load_optimizer(optimizer, Path(folder))["epoch"] + 1
        log.info(f"resuming after epoch {start_epoch}")
    else:
        torch.manual_seed(recipe.optim.seed)  # the same weights everywhere before DDP broadcasts them
        model = build(recipe.model, recipe.leads).to(device)
        optimizer = make_optimizer(model, recipe.optim)
    torch.manual_seed(recipe.optim.seed * 1_000_003 + rank + workers * start_epoch)  # other noise on each worker
    ddp = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    run = None
    if rank == 0 and job.tracking_run:
        from lsemvae.tracking import Run

        run = Run(job.tracking_run)
    batch_size = max(1, recipe.optim.batch_size // workers)
    steps = math.ceil(math.ceil(job.rows["train"] / workers) / batch_size)
    bar = (
        tqdm_ray.tqdm(total=recipe.optim.epochs * job.rows["train"], desc="pre-training", unit="records")
        if rank == 0
        else None
    )
    if bar:
        bar.update(start_epoch * job.rows["train"])

    def batches(split: str, epoch: int) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard(split)
        shuffle = {}
        if split == "train":
            shuffle = {
                "local_shuffle_buffer_size": max(recipe.shuffle_buffer, batch_size),
                "local_shuffle_seed": recipe.optim.seed + 1009 * epoch,
            }
        for columns in shard.iter_torch_batches(batch_size=batch_size, device=device, prefetch_batches=2, **shuffle):
            yield {"x_BLT": columns["x_LT"].float(), "lead_mask_BL": columns["lead_mask_L"].bool()}

    def on_step(terms: dict[str, float]) -> None:
        if bar:
            bar.set_description(f"pre-training  loss {terms['loss']:.3g}")
            bar.update(batch_size * workers)

    def on_epoch(epoch: Epoch) -> None:
        validation, example = validate(model, batches("val", epoch.index), recipe, workers)
        metrics = {f"train.{name}": value for name, value in epoch.terms.items()}
        metrics |= {f"val.{name}": value for name, value in validation.items()}
        metrics |= {
            "epoch": epoch.index,
            "kl_scale": kl_scale(recipe, epoch.index, steps - 1, steps),
            "records_per_s": epoch.records * workers / epoch.seconds,
            "train.records": float(_sum_over_workers(torch.tensor(float(epoch.records), device=device), workers)),
        }
        if rank != 0:
            ray.train.report(metrics)
            return
        if run:
            run.metrics(metrics, epoch.index)
            if epoch.index % recipe.plot_every == 0 or epoch.index == recipe.optim.epochs - 1:
                _track_reconstructions(run, example, recipe, epoch.index)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundle = Bundle.of(model, recipe.preprocess, provenance=job.provenance | {"metrics": metrics})
            save(bundle, model, folder / "bundle")
            save_optimizer(optimizer, folder, epoch=epoch.index)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    fit(
        ddp,
        optimizer,
        recipe.optim,
        lambda epoch: batches("train", epoch),
        on_epoch,
        start_epoch=start_epoch,
        forward_kwargs=lambda epoch, step: {"kl_scale": kl_scale(recipe, epoch, step, steps)},
        on_step=on_step,
    )
    if bar:
        bar.close()


def _print_no_reports() -> None:
    """Ray Train prints every report with all its metrics, from a logger that only the root's level reaches."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("lsemvae").setLevel(logging.INFO)


def kl_scale(recipe: PretrainRecipe, epoch: int, step: int, steps: int) -> float:
    """Beta annealing: from 0 to 1, linear in steps over `recipe.kl_warmup_epochs`, then 1."""
    if recipe.kl_warmup_epochs <= 0:
        return 1.0
    return min(1.0, (epoch + step / max(steps, 1)) / recipe.kl_warmup_epochs)


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], recipe: PretrainRecipe, workers: int = 1
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms with the full KL weight and the model's diagnostics over held-out subjects, over all workers.

    Also the first records with their reconstructions, for a picture.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    diagnostics = Diagnostics.empty(model.config.latent, len(model.decoder_leads), device)
    sums: defaultdict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    example = None
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.precision == "bf16"):
            terms = model(batch, kl_scale=1.0, diagnostics=diagnostics)
            if example is None:
                seen = {name: values[:EXAMPLES] for name, values in batch.items()}
                reconstruction_BLT = model.reconstruct(**seen)
                example = {
                    "x_BLT": seen["x_BLT"].cpu(),
                    "reconstruction_BLT": reconstruction_BLT.float().cpu(),
                }
        size = len(batch["x_BLT"])
        for name, value in terms.items():
            sums[name] += value.float() * size
        sums["records"] += size
    model.train(was_training)
    # Ray Data splits a dataset into equal shares, so either every worker is here with sums or none is.
    for tensor in (*sums.values(), *diagnostics.tensors()):
        _sum_over_workers(tensor, workers)
    records = float(sums.pop("records", torch.zeros(())))
    if not records:
        raise LsemvaeError("there are no validation recordings: all were refused, or too few subjects are held out")
    values = {name: float(total) / records for name, total in sums.items()} | diagnostics.summary(model.decoder_leads)
    by_lead = [value for name, value in values.items() if name.startswith("r/")]
    values["pearson_r"] = sum(by_lead) / max(len(by_lead), 1)
    values["collapsed"] = float(diagnostics.collapsed() is not None)
    return values, example


def _sum_over_workers(tensor: torch.Tensor, workers: int) -> torch.Tensor:
    if workers > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def _track_reconstructions(run: Any, example: dict[str, torch.Tensor], recipe: PretrainRecipe, epoch: int) -> None:
    from lsemvae.plots import reconstructions

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"epoch_{epoch:03d}.png"
        reconstructions(
            example["x_BLT"].numpy(),
            example["reconstruction_BLT"].numpy(),
            recipe.leads,
            recipe.preprocess.rate_hz,
            path,
        )
        run.file(path, "reconstructions")
