"""What every Ray Train worker runs: it streams its part of every batch, and rank 0 saves, tracks and shows progress."""

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsemvae.bundle import Bundle
from lsemvae.config import PretrainRecipe
from lsemvae.data.ahead import ahead
from lsemvae.data.feed import DAMAGED, Feed, require_room
from lsemvae.data.layouts import Rows
from lsemvae.data.order import Order
from lsemvae.errors import LsemvaeError
from lsemvae.models.parts.shifts import each_shifted
from lsemvae.preprocess.on_device import DeviceFinish
from lsemvae.progress import Bar
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import Progress, start
from lsemvae.training.fit import Batch, Epoch, Step, Watcher, fit, learning_rate, prepare, sum_over_workers
from lsemvae.training.resident import Resident, require_memory, rows_in, widened
from lsemvae.training.several import collect, exchange_gradients
from lsemvae.training.validation import validate
from lsemvae.training.writer import Writer, remove_unfinished, report

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
    terminal: bool = False
    """Whether the driver draws bars."""
    checkpoint_minutes: float = 0.0
    """Take a checkpoint this long after the one before, also within an epoch; 0 for none."""
    device_cache: bool = False
    """Keep all records in the memory of each worker's device."""
    step_metrics_s: float = 5.0
    """How often MLflow gets the steps' numbers: each row is the mean over the steps since the row before."""


def pretrain_worker(config: dict[str, PretrainJob]) -> None:
    """Train to the recipe's last epoch, from the newest whole checkpoint of the run if there is one.

    Every epoch ends with one report and a checkpoint; so does every `checkpoint_steps`-th step, and a step each
    `checkpoint_minutes`. Raises LsemvaeError where another try would not help, see `lsemvae.training.failures`.
    """
    _print_no_reports()
    Worker(config["job"]).train()


def kl_scale(recipe: PretrainRecipe, epoch: int, step: int, steps: int) -> float:
    """Beta annealing: from 0 to 1, linear in steps over `recipe.kl_warmup_epochs`, then 1."""
    if recipe.kl_warmup_epochs <= 0:
        return 1.0
    return min(1.0, (epoch + step / max(steps, 1)) / recipe.kl_warmup_epochs)


class Worker(Watcher):
    """One worker of a run: its model, its part of the data, and what happens at each step, checkpoint and epoch."""

    def __init__(self, job: PretrainJob) -> None:
        import ray.train
        from ray.train.torch import get_device, prepare_model

        self.job, self.recipe, self.order = job, job.recipe, job.train.order
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        assert job.place is not None, "make_trainer names the run's folder"
        self.place = job.place
        if context.get_local_rank() == 0:
            require_room(job.train, job.val)
        self.finish = None
        if job.train.on_device:
            self.finish = DeviceFinish(self.recipe.preprocess, self.recipe.leads, self.device)
        if self.rank == 0:
            _require_shared(self.place)
            remove_unfinished(self.place)
        self.progress, self.model, self.optimizer = start(self.place, self.recipe, self.order, self.rank, self.device)
        self.writer = Writer(self.place)
        """Of rank 0; the others write nothing."""
        self.checkpoint_at_s = time.monotonic()
        """When the last checkpoint was taken, or training began."""
        prepare(self.model, self.recipe.optim, self.device)
        self.shared_model = prepare_model(self.model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
        exchange_gradients(self.shared_model, self.recipe.optim)
        self.resident = self._on_device() if job.device_cache else {}
        """By the id of a feed, the records that this worker's device holds."""
        self.tracker = Tracker(job, self.progress) if self.rank == 0 else NoTracker()
        self.damaged = 0
        """Records of this epoch that this worker could not read."""

    def train(self) -> None:
        with self.tracker, self.writer:
            fit(
                self.shared_model,
                self.optimizer,
                self.recipe.optim,
                self.train_batches,
                self,
                start=self.progress.start,
                steps_per_epoch=self.order.steps,
                checkpoint_every=self.recipe.checkpoint_steps,
            )

    # --- batches -----------------------------------------------------------------------------------------------

    def _on_device(self) -> dict[int, Resident]:
        feeds = [feed for feed in (self.job.train, self.job.val) if feed]
        # Gradients and AdamW's two moments are not there yet.
        require_memory(feeds, self.device, 3 * sum(weights.nbytes for weights in self.model.parameters()))
        log.info(f"reading {sum(map(rows_in, feeds))} recordings into the memory of the device")
        return {id(feed): Resident(feed, self.device, self.workers) for feed in feeds}

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        resumed = epoch == self.progress.epoch
        self.damaged = self.progress.damaged if self.rank == 0 and resumed else 0
        first = self.progress.step if resumed else 0
        for step, batch in enumerate(self.batches(self.job.train, epoch, first), first):
            # A tensor: torch.compile would compile anew for each number.
            scale = torch.tensor(kl_scale(self.recipe, epoch, step, self.order.steps), device=self.device)
            yield {**batch, "kl_scale": scale}

    def batches(self, feed: Feed, epoch: int, first: int = 0) -> Iterator[Batch]:
        for rows in batches_ahead(self.rows(feed, epoch, first), self.device):
            self.damaged += rows.pop("damaged")
            shift_B = rows.pop("shift_B", None)
            if "at_B" in rows:
                rows |= self.resident[id(feed)].take(rows.pop("at_B"))
            rows = widened(feed.layout, rows)
            batch = self.finish.batch(rows) if self.finish else rows
            yield batch if shift_B is None else {**batch, "x_BLT": each_shifted(batch["x_BLT"], shift_B)}

    def rows(self, feed: Feed, epoch: int, first: int) -> Iterator[Rows]:
        """This worker's part of each step, with its random numbers: a record's are the same for any number of workers.

        They are the noise, and in training the circular shift.
        """
        streams = list(feed.order.streams_of(self.rank, self.workers))
        split = 0 if feed is self.job.train else 1
        size = self.model.noise_size
        resident = self.resident.get(id(feed))
        source = resident.rows if resident else feed.batches
        for step, rows in enumerate(source(epoch, self.rank, self.workers, first), first):
            if size:
                seed = (self.recipe.optim.seed, split, epoch, step)
                rows = rows | {"noise_BD": _noise(feed.order, size, seed)[streams].reshape(-1, size)}
            if split == 0 and self.recipe.circular_shifts:
                draws = np.random.default_rng((self.recipe.optim.seed, 2, epoch, step))
                shift_SN = draws.random((feed.order.streams, feed.order.per_stream), dtype=np.float32)
                rows = rows | {"shift_B": shift_SN[streams].reshape(-1)}
            yield rows

    # --- what fit tells ------------------------------------------------------------------------------------------

    def before_step(self, epoch: int, step: int) -> None:
        self.writer.check()
        # The model's other random numbers (lead dropout) must be the same after a restart, too.
        seed = [self.recipe.optim.seed, epoch, step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def on_step(self, step: Step) -> None:
        if self.rank == 0:
            self.writer.prepare(self.model, self.optimizer)
        self.tracker.step(step)

    def wants_checkpoint(self) -> bool:
        if self.rank != 0 or not self.job.checkpoint_minutes or self.writer.busy:
            return False
        return time.monotonic() - self.checkpoint_at_s >= 60 * self.job.checkpoint_minutes

    def on_checkpoint(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        before = self.progress
        unreadable = int(sum_over_workers(torch.tensor(self.damaged)))
        now = Progress(epoch, step + 1, before.best, before.best_epoch, before.metrics, sums=sums, damaged=unreadable)
        self.report(now, {"epoch": epoch, "step": step})

    def on_epoch(self, epoch: Epoch) -> bool:
        recipe, progress = self.recipe, self.progress
        last = epoch.index == recipe.optim.epochs - 1
        metrics = {f"train.{name}": value for name, value in epoch.terms.items()}
        metrics |= {
            "epoch": epoch.index,
            "kl_scale": kl_scale(recipe, epoch.index, self.order.steps - 1, self.order.steps),
            "records_per_s": epoch.records / epoch.seconds,
            "train.records": epoch.records,
            "train.damaged": _require_readable(self.damaged, self.order.records, recipe.max_damaged_share),
            "train.skipped_steps": epoch.skipped,
        }
        example, best = None, last  # where nothing is held out the last epoch is the result
        if self.job.val:
            validation, example = self.validate(self.job.val)
            metrics |= validation
            best = metrics["val.loss"] < progress.best
            if best:
                progress.best, progress.best_epoch = metrics["val.loss"], epoch.index
        progress.metrics = metrics
        self.tracker.epoch(epoch.index, metrics, example if last or epoch.index % recipe.plot_every == 0 else None)
        self.report(Progress(epoch.index + 1, 0, progress.best, progress.best_epoch, metrics), metrics, best)
        patience = recipe.early_stop_epochs
        return bool(self.job.val and patience and epoch.index - progress.best_epoch >= patience)

    def validate(self, feed: Feed) -> tuple[dict[str, float], dict[str, torch.Tensor] | None]:
        """Metrics named `val.…` over all workers, and an example for a picture."""
        self.damaged = 0
        optim = self.recipe.optim
        found, example = validate(self.model, self.batches(feed, 0), optim.precision, optim.accumulate)
        unreadable = _require_readable(self.damaged, feed.order.records, self.recipe.max_damaged_share)
        return {f"val.{name}": value for name, value in (found | {"damaged": unreadable}).items()}, example

    def report(self, progress: Progress, metrics: dict[str, float], best: bool = False) -> None:
        """Tells Ray Train; rank 0 begins to write the checkpoint, and its bundle where it is the best."""
        import ray.train

        collect(self.optimizer)
        self.checkpoint_at_s = time.monotonic()
        self.tracker.flush()  # so that a run that resumes here goes on with a new row
        if self.rank != 0:
            ray.train.report(metrics)
            return
        provenance = self.job.provenance | {"metrics": progress.metrics}
        bundle = Bundle.of(self.model, self.recipe.preprocess, provenance=provenance)
        name, written = self.writer.write(bundle, self.model, self.optimizer, progress, self.order, self.workers, best)
        report(self.place, metrics, name, written)


class Means:
    """Means of the numbers of several steps, each weighted by its records."""

    def __init__(self) -> None:
        self.records = 0
        self._sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float], records: int) -> None:
        self.records += records
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * records

    def values(self) -> dict[str, float]:
        return {name: total / self.records for name, total in self._sums.items()} if self.records else {}


class NoTracker(contextlib.ExitStack):
    """What workers other than rank 0 tell of their steps and epochs: nothing."""

    def step(self, step: Step) -> None:
        """The numbers of a step."""

    def flush(self) -> None:
        """A checkpoint is taken."""

    def epoch(self, index: int, metrics: dict[str, float], example: dict[str, torch.Tensor] | None) -> None:
        """The numbers of an epoch, and recordings to draw with their reconstructions."""


class Tracker(NoTracker):
    """Rank 0's progress bar and MLflow run; leaving it ends both."""

    def __init__(self, job: PretrainJob, progress: Progress) -> None:
        super().__init__()
        self._recipe, self._order = job.recipe, job.train.order
        done = progress.epoch * self._order.records + progress.step * self._order.batch_size
        total = self._recipe.optim.epochs * self._order.records
        self._bar = _bar(total, done, job.terminal)
        self.callback(self._bar.close)
        self._run = None
        if job.tracking_run:
            from lsemvae.tracking import Run, system_metrics

            self._run = Run(job.tracking_run)
            self.enter_context(system_metrics(job.tracking_run))
            self.callback(self._run.flush)
            self.callback(self.flush)  # before the run's, since callbacks are called in reverse
        self._means = Means()
        self._every_s, self._last_s, self._number = job.step_metrics_s, time.monotonic(), 0

    def step(self, step: Step) -> None:
        optim, steps = self._recipe.optim, self._order.steps
        number = step.epoch * steps + step.index
        # All terms are in MLflow: beside them here, a terminal of 100 columns would have no room for the time left.
        self._bar.set_description(f"pre-training, loss {step.terms['loss']:.4g}")
        self._bar.update(step.records)
        if self._run:
            rates = {
                "learning_rate": learning_rate(optim, number, optim.epochs * steps),
                "kl_scale": kl_scale(self._recipe, step.epoch, step.index, steps),
            }
            self._means.add(step.terms | rates, step.records)
            self._number = number
            if time.monotonic() - self._last_s >= self._every_s:
                self.flush()

    def flush(self) -> None:
        """Send the means over the steps since the last time, under the number of the last step."""
        means, records, now_s = self._means.values(), self._means.records, time.monotonic()
        if self._run and records:
            numbers = {f"step.{name}": value for name, value in means.items()}
            self._run.metrics(numbers | {"step.records_per_s": records / max(now_s - self._last_s, 1e-9)}, self._number)
        self._means, self._last_s = Means(), now_s

    def epoch(self, index: int, metrics: dict[str, float], example: dict[str, torch.Tensor] | None) -> None:
        if not self._run:
            return
        self._run.metrics(metrics, index)
        if example:
            _track_reconstructions(self._run, example, self._recipe, index)


def _bar(total: int, done: int, terminal: bool) -> Any:
    """The driver draws the bars of its workers in a terminal; in a job's log they write lines."""
    if not terminal:
        return Bar(total, "pre-training", "records", done)
    from ray.experimental import tqdm_ray

    bar = tqdm_ray.tqdm(total=total, desc="pre-training", unit="records")
    bar.update(done)
    return bar


def _noise(order: Order, size: int, seed: Sequence[int]) -> np.ndarray:
    """The noise of a step [streams, records of each, D]."""
    return np.random.default_rng(seed).standard_normal((order.streams, order.per_stream, size), dtype=np.float32)


def batches_ahead(parts: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as tensors on the device, put together in a thread while the device works on earlier ones."""

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
    """Unreadable records of all workers together. Raises LsemvaeError above the limit."""
    total = int(sum_over_workers(torch.tensor(damaged)))
    if total > limit * records:
        raise LsemvaeError(
            f"{total} of {records} recordings cannot be read because their shards are damaged, more than "
            f"max_damaged_share={limit:g}: ingest these shards again"
        )
    if total:
        log.warning(f"{total} of {records} recordings were left out: their shards are damaged")
    return total


def _require_shared(place: Storage) -> None:
    """Raises LsemvaeError on a machine that does not see the run's folder, which the driver has made."""
    if place.is_local and not place.exists():
        raise LsemvaeError(
            f"--storage: {place.uri} is not there on the machine of a training worker: give a folder that all machines "
            "share, or an s3:// URI"
        )


def _print_no_reports() -> None:
    """Silence Ray Train, which prints every report with all its metrics. Only the root's level reaches that logger."""
    import ray.train

    logging.getLogger().setLevel(logging.WARNING)
    for noisy in ("ray.train", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("lsemvae").setLevel(logging.INFO)
    # The driver reports a user's mistake in one line; the traceback of anything else is shown.
    uploads = str(Path(ray.train.__file__).parent / "v2" / "_internal" / "execution" / "context.py")  # named so by Ray
    for name in ("ray.train.v2._internal.util", uploads):
        logging.getLogger(name).addFilter(lambda _: not isinstance(sys.exception(), LsemvaeError))


def _track_reconstructions(run: Any, example: dict[str, torch.Tensor], recipe: PretrainRecipe, epoch: int) -> None:
    from lsemvae.plots.curves import reconstructions

    try:
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
    except OSError as error:  # a full disk: training goes on without the picture
        log.warning(f"no picture of reconstructions in {tempfile.gettempdir()}: {error.strerror or error}")
