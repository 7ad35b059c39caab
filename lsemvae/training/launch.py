"""What a command needs to start a pre-training run on Ray Train: its feeds, its job, its trainer and its resources."""

import contextlib
import logging
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsemvae import __version__
from lsemvae.bundle import load
from lsemvae.config import PretrainRecipe
from lsemvae.data.feed import Feed
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage
from lsemvae.tracking import Run, fetch
from lsemvae.training.checkpoints import BUNDLE
from lsemvae.training.failures import end_at_once
from lsemvae.training.pretrain import PretrainJob, pretrain_worker

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)


def parse_workers(text: str) -> tuple[int, int]:
    """`"4"` -> (4, 4), `"2-8"` -> (2, 8)."""
    fewest, _, most = text.partition("-")
    try:
        found = int(fewest), int(most or fewest)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise LsemvaeError(f"num_workers is {text!r}: give a number such as 4, or a range such as 2-8")
    return found


def make_feeds(
    data: ShardedDataset, recipe: PretrainRecipe, everything: bool = False, cache: str | None = None
) -> dict[str, Feed | None]:
    """The `train` and `val` feeds of a recipe; with `everything` all recordings are to train on."""
    settings = {
        "on_device": recipe.preprocess_on == "device",
        "cache": cache,
        "batch_size": recipe.optim.batch_size,
        "streams": recipe.streams,
        "buffer": recipe.shuffle_buffer,
        "seed": recipe.optim.seed,
    }
    split = "all" if everything else "train"
    if not everything and data.manifest.subjects == 1 and not data.manifest.rows_in("train"):
        raise LsemvaeError(
            f"{data.storage.uri} has recordings of one subject, who is held out: ingest others too, or give --all to "
            "train without validation"
        )
    data.require_rows(split, at_least=recipe.optim.batch_size)
    train = Feed.of(data, split, recipe.leads, recipe.preprocess, **settings)
    if everything:
        return {"train": train, "val": None}
    if not data.manifest.rows_in("val"):
        raise LsemvaeError(
            f"{data.storage.uri} holds out no subject to validate on: ingest again with --val-share, with recordings "
            "of two subjects at least, or give --all to train without validation"
        )
    data.require_rows("val", at_least=recipe.streams)
    return {"train": train, "val": Feed.of(data, "val", recipe.leads, recipe.preprocess, **settings, shuffle=False)}


def make_job(
    data: ShardedDataset, recipe: PretrainRecipe, feeds: dict[str, Feed | None], run_id: str | None
) -> PretrainJob:
    """What the workers are told, with where the bundle will have come from."""
    provenance = {
        "recipe": asdict(recipe),
        "data": {
            "uri": data.storage.uri,
            "digest": data.manifest.digest,
            "rows": {split: feed.order.records for split, feed in feeds.items() if feed},
        },
        "mlflow_run": run_id,
        "lsemvae": __version__,
    }
    return PretrainJob(recipe, feeds["train"], feeds["val"], run_id, provenance)


def make_trainer(
    job: PretrainJob,
    storage: Storage,
    name: str,
    workers: tuple[int, int],
    use_gpu: bool,
    max_failures: int,
    callbacks: "list[ray.train.UserCallback] | None" = None,
) -> "TorchTrainer":
    """The run `name` in the storage: its `fit` goes on from the newest checkpoint that is there."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        pretrain_worker,
        train_loop_config={"job": replace(job, place=storage / name)},
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers, use_gpu=use_gpu
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.base,
            storage_filesystem=storage.filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            # The newest, and the one before in case that is damaged; the best epoch is in the run's bundle.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[end_at_once(), *(callbacks or [])],
        ),
    )


def keep_bundle(place: Storage, run: Run | None = None) -> tuple[str, dict[str, Any]]:
    """Checks the best epoch's bundle, which the workers put into `place`; puts it into the run -> digest, metrics.

    The metrics are that epoch's. Raises BundleError where the bundle is not whole.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = fetch((place / BUNDLE).uri, Path(name)).folder
        bundle, _ = load(folder)
        if run:
            run.bundle(folder)
    return bundle.digest, bundle.provenance["metrics"]


def require_resources(workers: int, use_gpu: bool, wait_s: float, drivers: int = 0) -> None:
    """Wait until the cluster has what the workers need; raises LsemvaeError that says what is missing.

    `drivers` are the CPUs that something beside them needs.
    """
    import ray

    needed = {"CPU": drivers + 1 + (0 if use_gpu else workers)}  # one CPU reads and preprocesses
    if use_gpu:
        needed["GPU"] = workers
    deadline, said = time.monotonic() + wait_s, False
    while True:
        there = ray.cluster_resources()
        missing = {name: count - there.get(name, 0) for name, count in needed.items() if there.get(name, 0) < count}
        if not missing:
            return
        what = ", ".join(f"{there.get(name, 0):g} {name}, {needed[name]:g} are needed" for name in missing)
        if time.monotonic() > deadline:
            raise LsemvaeError(
                f"{workers} workers cannot be had: the cluster has {what} (waited {wait_s:g} s, see --wait-s): "
                "ask for fewer --num-workers, or add machines"
            )
        if not said:
            log.info(f"waiting for machines: the cluster has {what}")
        said = True
        time.sleep(min(5.0, max(wait_s / 10, 0.1)))


def require_writable(place: Storage) -> None:
    """Fails before anything expensive starts, and leaves nothing behind."""
    try:
        place.write_bytes("writable", b"")
    except (LsemvaeError, OSError) as error:
        raise LsemvaeError(f"--storage {place.uri} cannot be written to: {error}") from None
    with contextlib.suppress(LsemvaeError, OSError):  # who may write need not be allowed to delete
        place.remove("writable")
