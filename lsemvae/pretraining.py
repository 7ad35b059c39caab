"""What every Ray Train worker runs: it streams its part of every batch, and rank 0 saves, tracks and shows progress."""

import contextlib
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lsemvae.bundle import Bundle, load, save
from lsemvae.config import PretrainRecipe
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.feed import DAMAGED, Feed
from lsemvae.fit import (
    Batch,
    Epoch,
    Step,
    fit,
    kl_scale,
    learning_rate,
    load_optimizer,
    make_optimizer,
    read_state,
    save_optimizer,
    sum_over_workers,
    validate,
)
from lsemvae.models import build

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


@dataclass
class Progress:
    """What a checkpoint remembers beside weights: where to go on, and how well the run did so far."""

    epoch: int = 0
    step: int = 0
    """The step to go on with in this epoch."""
    best: float = float("inf")
    """Lowest validation loss."""
    best_epoch: int = -1
    metrics: dict[str, float] = field(default_factory=dict)


def pretrain_worker(config: dict[str, PretrainJob]) -> None:
    """Train to the recipe's last epoch, from the newest whole checkpoint of the run if there is one.

    Every epoch ends with one report and a checkpoint; so does every `checkpoint_steps`-th step.
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
    progress, model, optimizer = _start(job, ray.train.get_checkpoint(), device)
    if optim.compile:
        model.compile()
    ddp = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    run, bar, monitor = None, None, contextlib.nullcontext()
    if rank == 0:
        from lsemvae.tracking import Run, system_metrics

        done = progress.epoch * order.records + progress.step * order.batch_size
        bar = tqdm_ray.tqdm(total=optim.epochs * order.records, desc="pre-training", unit="records")
        bar.update(done)
        if job.tracking_run:
            run, monitor = Run(job.tracking_run), system_metrics(job.tracking_run)
    damaged = 0
    last_shown = time.monotonic()

    def batches(feed: Feed, epoch: int, first: int = 0) -> Iterator[Batch]:
        nonlocal damaged
        for rows in _ahead(feed.batches(epoch, rank, workers, first), device):
            damaged += rows.pop("damaged")
            yield rows

    def train_batches(epoch: int) -> Iterator[Batch]:
        nonlocal damaged
        damaged = 0
        return batches(job.train, epoch, progress.step if epoch == progress.epoch else 0)

    def before_step(epoch: int, step: int) -> None:
        # A step's noise depends on nothing that a restart would change.
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

    def report(progress: Progress, metrics: dict[str, float]) -> None:
        if rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundle = Bundle.of(model, recipe.preprocess, provenance=job.provenance | {"metrics": progress.metrics})
            save(bundle, model, folder / "bundle")
            save_optimizer(optimizer, folder, **vars(progress), workers=workers, streams=order.streams)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def on_checkpoint(epoch: int, step: int) -> None:
        # Within an epoch there is no validation: such a checkpoint is to go on from, never the best.
        now = Progress(epoch, step + 1, progress.best, progress.best_epoch, progress.metrics)
        report(now, {"epoch": epoch, "step": step, "val.loss": float("inf")})

    def on_epoch(epoch: Epoch) -> bool:
        _require_readable(damaged, order.records, recipe.max_damaged_share)
        metrics = {f"train.{name}": value for name, value in epoch.terms.items()}
        metrics |= {
            "epoch": epoch.index,
            "kl_scale": kl_scale(recipe, epoch.index, order.steps - 1, order.steps),
            "records_per_s": epoch.records / epoch.seconds,
            "train.records": epoch.records,
        }
        example = None
        if job.val:
            validation, example = validate(model, batches(job.val, 0), recipe)
            metrics |= {f"val.{name}": value for name, value in validation.items()}
            if metrics["val.loss"] < progress.best:
                progress.best, progress.best_epoch = metrics["val.loss"], epoch.index
        else:
            metrics["val.loss"] = -float(epoch.index)  # nothing is held out: the last epoch is the result
        progress.metrics = metrics
        if run:
            run.metrics({name: value for name, value in metrics.items() if job.val or name != "val.loss"}, epoch.index)
            last = epoch.index == optim.epochs - 1
            if example and (last or epoch.index % recipe.plot_every == 0):
                _track_reconstructions(run, example, recipe, epoch.index)
        report(Progress(epoch.index + 1, 0, progress.best, progress.best_epoch, metrics), metrics)
        patience = recipe.early_stop_epochs
        return bool(job.val and patience and epoch.index - progress.best_epoch >= patience)

    with monitor:
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
        )
    if bar:
        bar.close()
    if run:
        run.flush()


def _start(
    job: PretrainJob, checkpoint: Any, device: torch.device
) -> tuple[Progress, nn.Module, torch.optim.Optimizer]:
    """The newest whole checkpoint, or a new model. A damaged one is passed over, loudly; raises where all are."""
    recipe = job.recipe
    if checkpoint is not None:
        for candidate in _newest_first(checkpoint):
            try:
                with candidate.as_directory() as name:
                    folder = Path(name)
                    state = read_state(folder)
                    model = load(folder / "bundle")[1].train().to(device)
                    optimizer = make_optimizer(model, recipe.optim)
                    load_optimizer(optimizer, folder)
            except (BundleError, OSError) as error:
                log.error(f"checkpoint {candidate.path} is damaged and passed over: {error}")
                continue
            if state["streams"] != job.train.order.streams:
                raise LsemvaeError(f"the run began with streams={state['streams']}: go on with the same number")
            progress = Progress(**{name: state[name] for name in vars(Progress())})
            log.info(f"going on at epoch {progress.epoch}, step {progress.step}")
            return progress, model, optimizer
        raise LsemvaeError(
            f"every checkpoint of {Path(checkpoint.path).parent} is damaged: give another --name to start anew"
        )
    torch.manual_seed(recipe.optim.seed)  # the same weights everywhere before DDP broadcasts them
    model = build(recipe.model, recipe.leads).to(device)
    return Progress(), model, make_optimizer(model, recipe.optim)


def _newest_first(checkpoint: Any) -> list[Any]:
    """The newest reported checkpoint, then the others that are still kept, by the time in their names."""
    from pyarrow import fs as pafs
    from ray.train import Checkpoint

    newest = Path(checkpoint.path)
    found = checkpoint.filesystem.get_file_info(pafs.FileSelector(str(newest.parent)))
    names = sorted(info.path for info in found if info.base_name.startswith("checkpoint_"))
    older = [path for path in names if Path(path).name < newest.name]
    return [checkpoint, *(Checkpoint(path, checkpoint.filesystem) for path in reversed(older))]


def _ahead(parts: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as tensors on the device, put together in a thread while the device works on those before."""
    ready: queue.Queue[Any] = queue.Queue(PREFETCHED_BATCHES)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return True
        return False

    def work() -> None:
        try:
            for part in parts:
                batch: dict[str, Any] = {"damaged": int((part.pop("row_B") == DAMAGED).sum())}
                for name, values in part.items():
                    tensor = torch.from_numpy(values)
                    batch[name] = tensor.pin_memory() if device.type == "cuda" else tensor
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # raised again where the batches are used
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="feed")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield {
                name: values.to(device, non_blocking=True) if isinstance(values, torch.Tensor) else values
                for name, values in item.items()
            }
    finally:
        stopped.set()
        thread.join()


def _require_readable(damaged: int, records: int, limit: float) -> None:
    total = int(sum_over_workers(torch.tensor(damaged)))
    if total > limit * records:
        raise LsemvaeError(
            f"{total} of {records} recordings cannot be read because their shards are damaged, more than "
            f"max_damaged_share={limit:g}: ingest these shards again"
        )
    if total:
        log.warning(f"{total} of {records} recordings were left out: their shards are damaged")


def _print_no_reports() -> None:
    """Ray Train prints every report with all its metrics, from a logger that only the root's level reaches."""
    logging.getLogger().setLevel(logging.WARNING)
    for noisy in ("ray.train", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("lsemvae").setLevel(logging.INFO)


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
