"""Pre-train a recipe on shards with Ray Train; the result is a bundle, in the storage and in MLflow.

The same command again continues an unfinished run from its newest checkpoint, and says so when it is finished.
"""

import contextlib
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from command import run_recipe_command, start_ray

from lsemvae import __version__
from lsemvae.bundle import load
from lsemvae.checkpoints import BUNDLE
from lsemvae.config import PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.failures import end_at_once, root_cause
from lsemvae.feed import Feed
from lsemvae.pretraining import PretrainJob, pretrain_worker
from lsemvae.recipes import PRETRAIN
from lsemvae.shards import ShardedDataset
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run, fetch

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchTrainer

RESULT = "result.json"


@dataclass(frozen=True)
class Args:
    """Pre-train on shards."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name="")]
    data: str
    """Shards: the --output of workflows/ingest.py (folder or s3:// URI)."""
    storage: str
    """Where checkpoints and the bundle go (folder or s3:// URI that every worker can reach)."""
    num_workers: str = "2"
    """Training workers, or a range such as 4-8: as many as the cluster has, fewer when machines are lost and more when
    they return. The batches, and what they hold, are the same for any number."""
    use_gpu: bool = False
    """One GPU for each worker."""
    name: str | None = None
    """The run's name; by default it follows from recipe and data, so that the same command resumes."""
    model_name: str = "lsemvae-encoder"
    """The MLflow model that the bundle becomes a version of."""
    max_failures: int = 3
    """How often lost workers are replaced before the run gives up."""
    all: bool = False
    """Train on validation subjects too, without validation: the paper's last step, with settings chosen before."""
    cache: str | None = None
    """A folder on the local disk of each training machine for prepared recordings, 240 kB each: what the first epoch
    decodes and preprocesses, those after it read."""
    wait_s: float = 600
    """How long to wait for a cluster that has too few free processors or GPUs."""


def main(args: Args) -> None:
    data = ShardedDataset.open(args.data)
    recipe = args.recipe
    workers = parse_workers(args.num_workers)
    feeds = make_feeds(data, recipe, args.all, args.cache)
    feeds["train"].order.streams_of(0, workers[1])
    storage = Storage.open(args.storage)
    name = args.name or f"pretrain-{_digest(recipe, data, args.all)}"
    place = storage / name
    if place.exists(RESULT):
        result = json.loads(place.read_bytes(RESULT))
        print(f"{name} is finished: nothing to do. Give another --name to train again.")
        _say_where(result)
        return

    require_writable(place)

    start_ray()
    import ray.train

    require_resources(workers[0], args.use_gpu, args.wait_s)
    params = asdict(recipe)
    previous = json.loads(place.read_bytes("run.json"))["run"] if place.exists("run.json") else None
    run = Run.start("pretrain", name, params, resume=previous)
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "storage": place.uri})
    place.write_bytes("run.json", json.dumps({"run": run.run_id}).encode())
    job = make_job(data, recipe, feeds, run.run_id)
    rows = job.provenance["data"]["rows"]
    print(
        f"{name}: {rows['train']} recordings to train on, {rows.get('val', 0)} to validate, "
        f"{args.num_workers} workers, {feeds['train'].order.steps} steps an epoch"
    )
    print(f"MLflow: {run.url}", flush=True)
    try:
        make_trainer(job, storage, name, workers, args.use_gpu, args.max_failures).fit()
    except ray.train.TrainingFailedError as error:
        run.end("FAILED")
        raise LsemvaeError(f"training failed: {root_cause(error)}") from error
    digest, metrics = keep_bundle(place, run)
    version = run.register(args.model_name, {"digest": digest, "kind": "encoder"}, alias=CANDIDATE)
    run.end()
    result = {
        "bundle": (place / "bundle").uri,
        "digest": digest,
        "model": f"models:/{args.model_name}/{version}",
        "run": run.url,
        "metrics": metrics,
    }
    place.write_bytes(RESULT, json.dumps(result, indent=2).encode())
    _say_where(result)


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
            print(f"waiting for machines: the cluster has {what}", flush=True)
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


def _digest(recipe: PretrainRecipe, data: ShardedDataset, everything: bool) -> str:
    text = json.dumps([asdict(recipe), data.manifest.digest, everything], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _say_where(result: dict[str, object]) -> None:
    metrics = result["metrics"]
    if "val.active_units" in metrics:
        print(
            f"epoch {metrics['epoch']}: validation loss {metrics['val.loss']:.4g}, "
            f"{metrics['val.active_units']:.0f} active units, mean Pearson r {metrics['val.pearson_r']:.3f}"
        )
    else:
        print(f"epoch {metrics['epoch']}: training loss {metrics['train.loss']:.4g}, nothing was held out")
    if metrics.get("val.collapsed"):
        print("warning: the posterior has collapsed, z says nothing of the recordings:")
        print("         raise --model.reconstruction-weight, lower --model.beta, or train longer")
    print(f"bundle:  {result['bundle']} (digest {result['digest']})")
    print(f"model:   {result['model']}")
    print(f"MLflow:  {result['run']}")


if __name__ == "__main__":
    run_recipe_command(main, Args, PRETRAIN, storage=tyro.MISSING)
