"""What every Ray Train worker runs: it streams its part of every batch, and rank 0 saves, tracks and shows progress."""

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsemvae.bundle import Bundle
from lsemvae.config import PretrainRecipe
from lsemvae.data.ahead import ahead
from lsemvae.data.feed import DAMAGED, Feed, Rows, require_room
from lsemvae.data.order import Order
from lsemvae.errors import LsemvaeError
from lsemvae.preprocess.on_device import DeviceFinish
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import Progress, keep_as_best, save_checkpoint, start, writing_to
from lsemvae.training.fit import Batch, Epoch, Step, fit, kl_scale, learning_rate, sum_over_workers
from lsemvae.training.validation import validate

log = logging.getLogger(__name__)

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class PretrainJob:
    """What travels to every worker. `val` is None when nothing is held out; `provenance` goes into the bundle."""

    recipe: PretrainRecipe
    train: Feed
    val: Feed | None
    tracking_run: str | None
    provenance: dict[str, Any]
    place: Storage | None = None
    """The run's folder, once there is one: checkpoints, and the bundle of the best epoch so far."""


def pretrain_worker(config: dict[str, PretrainJob]) -> None:
    """Train to the recipe's last epoch, from the newest whole checkpoint of the run if there is one.

    Every epoch ends with one report and a checkpoint; so does every `checkpoint_steps`-th step. Raises LsemvaeError
    where another try would not help, see `lsemvae.training.failures`.
    """
    import ray.train
    from ray.experimental import tqdm_ray
    from ray.train.torch import get_device, prepare_model

    _print_no_reports()
    job = config["job"]
    recipe, optim, order = job.recipe, job.recipe.optim, job.train.order
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if context.get_local_rank() == 0:
        require_room(job.train, job.val)
    finish = DeviceFinish(recipe.preprocess, recipe.leads, device) if job.train.on_device else None
    progress, model, optimizer = start(job.place, recipe, order, rank, device)
    if optim.compile:
        model.compile()
    ddp = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    run, bar, ending = None, None, contextlib.ExitStack()  # what is done at the end, a bad one too
    if rank == 0:
        from lsemvae.tracking import Run, system_metrics

        done = progress.epoch * order.records + progress.step * order.batch_size
        bar = tqdm_ray.tqdm(total=optim.epochs * order.records, desc="pre-training", unit="records")
        bar.update(done)
        ending.callback(bar.close)
        if job.tracking_run:
            run = Run(job.tracking_run)
            ending.enter_context(system_metrics(job.tracking_run))
            ending.callback(run.flush)
    damaged = 0
    last_shown = time.monotonic()

    def batches(feed: Feed, epoch: int, first: int = 0) -> Iterator[Batch]:
        nonlocal damaged
        split = 0 if feed is job.train else 1

        def with_noise() -> Iterator[Rows]:
            streams = list(feed.order.streams_of(rank, workers))
            for step, rows in enumerate(feed.batches(epoch, rank, workers, first), first):
                noise = _noise(feed.order, recipe.model.latent, (optim.seed, split, epoch, step))[streams]
                yield rows | {"noise_BD": noise.reshape(-1, recipe.model.latent)}

        for rows in batches_ahead(with_noise(), device):
            damaged += rows.pop("damaged")
            yield finish.batch(rows) if finish else rows

    def train_batches(epoch: int) -> Iterator[Batch]:
        nonlocal damaged
        damaged = progress.damaged if rank == 0 and epoch == progress.epoch else 0
        return batches(job.train, epoch, progress.step if epoch == progress.epoch else 0)

    def before_step(epoch: int, step: int) -> None:
        # What is drawn beside the noise depends on nothing that a restart would change either.
        torch.manual_seed(int(np.random.SeedSequence([optim.seed, epoch, step, rank]).generate_state(1)[0]))

    def forward_kwargs(epoch: int, step: int) -> dict[str, Any]:
        # A tensor: torch.compile would compile anew for each number.
        return {"kl_scale": torch.tensor(kl_scale(recipe, epoch, step, order.steps), device=device)}

    def on_step(step: Step) -> None:
        nonlocal last_shown
        if rank != 0:
            return
        number = step.epoch * order.steps + step.index
        now = time.monotonic()
        bar.set_description(
            f"pre-training  loss {step.terms['loss']:.3g}, reconstruction "
            f"{step.terms['weighted_reconstruction']:.3g}, KL {step.terms['kl']:.3g}"
        )
        bar.update(step.records)
        if run:
            run.metrics(
                {f"step.{name}": value for name, value in step.terms.items()}
                | {
                    "step.learning_rate": learning_rate(optim, number, optim.epochs * order.steps),
                    "step.kl_scale": kl_scale(recipe, step.epoch, step.index, order.steps),
                    "step.records_per_s": step.records / max(now - last_shown, 1e-9),
                },
                number,
            )
        last_shown = now

    def report(progress: Progress, metrics: dict[str, float], best: bool = False) -> None:
        if rank != 0:
            ray.train.report(metrics)
            return
        with writing_to(job.place), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundle = Bundle.of(model, recipe.preprocess, provenance=job.provenance | {"metrics": progress.metrics})
            save_checkpoint(folder, bundle, model, optimizer, progress, order, workers)
            if best:  # before the report: a run that is killed in between does this epoch's end again
                keep_as_best(folder, job.place)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def on_checkpoint(epoch: int, step: int, sums: dict[str, float]) -> None:
        unreadable = int(sum_over_workers(torch.tensor(damaged)))
        now = Progress(
            epoch, step + 1, progress.best, progress.best_epoch, progress.metrics, sums=sums, damaged=unreadable
        )
        report(now, {"epoch": epoch, "step": step})

    def on_epoch(epoch: Epoch) -> bool:
        nonlocal damaged
        left_out = _require_readable(damaged, order.records, recipe.max_damaged_share)
        last = epoch.index == optim.epochs - 1
        metrics = {f"train.{name}": value for name, value in epoch.terms.items()}
        metrics |= {
            "epoch": epoch.index,
            "kl_scale": kl_scale(recipe, epoch.index, order.steps - 1, order.steps),
            "records_per_s": epoch.records / epoch.seconds,
            "train.records": epoch.records,
            "train.damaged": left_out,
        }
        example, best = None, last  # where nothing is held out the last epoch is the result
        if job.val:
            damaged = 0
            validation, example = validate(model, batches(job.val, 0), recipe)
            metrics["val.damaged"] = _require_readable(damaged, job.val.order.records, recipe.max_damaged_share)
            metrics |= {f"val.{name}": value for name, value in validation.items()}
            best = metrics["val.loss"] < progress.best
            if best:
                progress.best, progress.best_epoch = metrics["val.loss"], epoch.index
        progress.metrics = metrics
        if run:
            run.metrics(metrics, epoch.index)
            if example and (last or epoch.index % recipe.plot_every == 0):
                _track_reconstructions(run, example, recipe, epoch.index)
        report(Progress(epoch.index + 1, 0, progress.best, progress.best_epoch, metrics), metrics, best)
        patience = recipe.early_stop_epochs
        return bool(job.val and patience and epoch.index - progress.best_epoch >= patience)

    with ending:
        fit(
            ddp,
            optimizer,
            optim,
            train_batches,
            on_epoch,
            start=(progress.epoch, progress.step),
            steps_per_epoch=order.steps,
            forward_kwargs=forward_kwargs,
            before_step=before_step,
            on_step=on_step,
            checkpoint_every=recipe.checkpoint_steps,
            on_checkpoint=on_checkpoint,
            sums=progress.sums,
        )


def _noise(order: Order, latent: int, seed: Sequence[int]) -> np.ndarray:
    """The noise of a step [streams, records of each, D]: a record's is the same whatever the number of workers."""
    return np.random.default_rng(seed).standard_normal((order.streams, order.per_stream, latent), dtype=np.float32)


def batches_ahead(parts: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as tensors on the device, put together in a thread while the device works on those before."""

    def together() -> Iterator[dict[str, Any]]:
        for part in parts:
            batch: dict[str, Any] = {"damaged": int((part.pop("row_B") == DAMAGED).sum())}
            for name, values in part.items():
                tensor = torch.from_numpy(values)
                batch[name] = tensor.pin_memory() if device.type == "cuda" else tensor
            yield batch

    for batch in ahead(together(), PREFETCHED_BATCHES):
        yield {
            name: values.to(device, non_blocking=True) if isinstance(values, torch.Tensor) else values
            for name, values in batch.items()
        }


def _require_readable(damaged: int, records: int, limit: float) -> int:
    """Of all workers together. Raises LsemvaeError above the limit."""
    total = int(sum_over_workers(torch.tensor(damaged)))
    if total > limit * records:
        raise LsemvaeError(
            f"{total} of {records} recordings cannot be read because their shards are damaged, more than "
            f"max_damaged_share={limit:g}: ingest these shards again"
        )
    if total:
        log.warning(f"{total} of {records} recordings were left out: their shards are damaged")
    return total


def _print_no_reports() -> None:
    """Ray Train prints every report with all its metrics, from a logger that only the root's level reaches."""
    logging.getLogger().setLevel(logging.WARNING)
    for noisy in ("ray.train", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("lsemvae").setLevel(logging.INFO)
    # A mistake is said in one line, by the driver; the trace of anything else is shown.
    logging.getLogger("ray.train.v2._internal.util").addFilter(lambda _: not isinstance(sys.exception(), LsemvaeError))


def _track_reconstructions(run: Any, example: dict[str, torch.Tensor], recipe: PretrainRecipe, epoch: int) -> None:
    from lsemvae.plots.curves import reconstructions

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
