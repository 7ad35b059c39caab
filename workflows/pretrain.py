"""Pre-train a recipe on shards with Ray Train; the result is a bundle, in the storage and in MLflow.

The same command again resumes an unfinished run from its newest checkpoint. A finished run is not run again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from command import run_recipe_command, start_ray
from options import RARE

from lsemvae.config import PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.lease import Lease
from lsemvae.progress import Bar
from lsemvae.recipes import PRETRAIN
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run
from lsemvae.training.failures import root_cause
from lsemvae.training.launch import (
    Feeds,
    Source,
    data_digest,
    data_uri,
    keep_bundle,
    make_feeds,
    make_job,
    make_trainer,
    open_sources,
    parse_workers,
    require_resources,
    require_writable,
    train,
)

RESULT, RUN, TRAINED = "result.json", "run.json", "bundle/config.json"
AGAIN = "Delete it and give the same command again: it is made from the run's newest checkpoint"
AGAIN_ANOTHER_RUN = (
    "Delete it and give the same command again: the training goes on from its newest checkpoint, in a new MLflow run"
)


@dataclass(frozen=True)
class Args:
    """Pre-train on shards."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name=""), RARE]
    data: tuple[str, ...]
    """Shards: the --output of workflows/ingest.py (folder or s3:// URI). Several data sets, each with its repeats in an
    epoch after a colon: --data s3://bucket/mimic s3://bucket/own:12."""
    storage: str
    """Where checkpoints and the bundle go (folder or s3:// URI that every worker can reach)."""
    exclude: tuple[str, ...] = ()
    """Leave out the subjects of these shards: a labelled cohort that is part of --data, so that no recording of its
    test folds is seen before."""
    num_workers: str = "2"
    """Training workers, or a range such as 4-8: as many as the cluster has, fewer when machines are lost, more when
    they return. The batches are the same for any number."""
    use_gpu: bool = False
    """One GPU for each worker."""
    name: str | None = None
    """The run's name; by default derived from recipe and data, so that the same command resumes."""
    model_name: str = "lsemvae-encoder"
    """The MLflow model that the bundle becomes a version of."""
    max_failures: Annotated[int, RARE] = 3
    """How often lost workers are replaced before the run gives up."""
    all: bool = False
    """Train on all subjects, without validation: the paper's last step, with settings chosen before."""
    cache: Annotated[str | None, RARE] = None
    """A folder on the local disk of each training machine for prepared recordings, 120 kB each. The first epoch decodes
    and preprocesses; later epochs read from here."""
    device_cache: Annotated[bool, RARE] = False
    """Keep all prepared recordings in the memory of each GPU, 120 kB each, where they fit beside the model. They are
    read once, before the first step, from --cache if it has them."""
    checkpoint_minutes: Annotated[float, RARE] = 0.0
    """Write a checkpoint this many minutes after the one before, also in the middle of an epoch; 0 for none. Each epoch
    ends with one."""
    step_metrics_s: Annotated[float, RARE] = 5
    """How often MLflow gets the steps' numbers, in seconds: each row is the mean over the steps since the row before. 0
    sends every step."""
    wait_s: Annotated[float, RARE] = 600
    """How long to wait for machines when the cluster has too few CPUs or GPUs."""


def main(args: Args) -> None:
    sources = open_sources(args.data, args.exclude)
    recipe = args.recipe
    workers = parse_workers(args.num_workers)
    feeds = make_feeds(sources, recipe, args.all, args.cache, packed=args.device_cache)
    feeds.train.order.streams_of(0, workers[1])
    storage = Storage.open(args.storage)
    name = args.name or f"pretrain-{_digest(recipe, sources, args.all, args.exclude)}"
    place = storage / name
    if _is_finished(place, name):
        _say_if_others_have_withdrawn(place, sources)
        return
    require_writable(place)
    with Lease(place) as lease:
        if not _is_finished(place, name):  # by now, by another command
            _run(args, sources, feeds, storage, name, lease)


def _say_if_others_have_withdrawn(place: Storage, sources: Sequence[Source]) -> None:
    """A finished run is not trained again: say that its model was trained on subjects who have withdrawn since."""
    if not place.exists(TRAINED):
        return
    trained_on = place.read_json(TRAINED, AGAIN, ("provenance",))["provenance"].get("data", {}).get("since_ingest", {})
    for source in sources:
        before = trained_on.get(source.data.storage.uri, {}).get("withdrawn")
        if source.data.since_ingest.get("withdrawn") not in (before, None):
            print(
                f"The list of who has withdrawn from {source.data.storage.uri} has changed since this model was "
                "trained: give another --name to train without them. python workflows/withdrawn.py finds what else "
                "holds them."
            )


def _is_finished(place: Storage, name: str) -> bool:
    """Whether the run has its result; then says where it is."""
    if not place.exists(RESULT):
        return False
    result = place.read_json(RESULT, AGAIN, ("bundle", "digest", "model", "run", "metrics"))
    print(f"{name} is finished: nothing to do. Give another --name to train again.")
    _say_where(result)
    return True


def _run(args: Args, sources: Sequence[Source], feeds: Feeds, storage: Storage, name: str, lease: Lease) -> None:
    """Train from the newest checkpoint, register the bundle and write the result."""
    recipe, workers, place = args.recipe, parse_workers(args.num_workers), storage / name
    previous = place.read_json(RUN, AGAIN_ANOTHER_RUN, ("run",))["run"] if place.exists(RUN) else None

    start_ray()
    import ray.train

    require_resources(workers[0], args.use_gpu, args.wait_s)
    params = as_json(recipe, every_tag=True)
    run = Run.start("pretrain", name, params, resume=previous, place=place.uri)
    run.tags({"data": data_uri(sources), "data_digest": data_digest(sources), "storage": place.uri})
    for source in sources:
        run.reads(source.data)
    place.write_bytes(RUN, json.dumps({"run": run.run_id}).encode())
    job = replace(
        make_job(sources, recipe, feeds, run.run_id),
        checkpoint_minutes=args.checkpoint_minutes,
        device_cache=args.device_cache,
        step_metrics_s=args.step_metrics_s,
    )
    rows = job.provenance["data"]["rows"]
    print(
        f"{name}: {rows['train']} recordings to train on, {rows.get('val', 0)} to validate, "
        f"{args.num_workers} workers, {feeds.train.order.steps} steps an epoch"
    )
    print(f"MLflow: {run.url}", flush=True)
    try:
        train(make_trainer(job, storage, name, workers, args.use_gpu, args.max_failures), lease.require)
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except ray.train.TrainingFailedError as error:
        run.end("FAILED")
        raise LsemvaeError(
            f"training failed: {root_cause(error)} (--name {name} resumes this run from its newest checkpoint, with "
            "another learning rate too)"
        ) from error
    with Bar(None, "register"):
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


def _digest(recipe: PretrainRecipe, sources: Sequence[Source], everything: bool, exclude: Sequence[str]) -> str:
    parts = [as_json(recipe), data_digest(sources), everything]
    if exclude:
        parts.append([source.data.withdrawn.digest for source in sources])
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _say_where(result: dict[str, object]) -> None:
    metrics = result["metrics"]
    if "val.loss" in metrics:
        said = [f"validation loss {metrics['val.loss']:.4g}"]
        if "val.active_units" in metrics:  # not every architecture has a latent and a decoder
            said.append(f"{metrics['val.active_units']:.0f} active units")
            said.append(f"mean Pearson r {metrics['val.pearson_r']:.3f}")
        print(f"epoch {metrics['epoch']}: {', '.join(said)}")
    else:
        print(f"epoch {metrics['epoch']}: training loss {metrics['train.loss']:.4g}, nothing was held out")
    if metrics.get("val.collapsed"):
        print("warning: the posterior has collapsed, z holds no information about the recordings:")
        print("         raise --model.reconstruction-weight, lower --model.beta, or train longer")
    print(f"bundle:  {result['bundle']} (digest {result['digest']})")
    print(f"model:   {result['model']}")
    print(f"MLflow:  {result['run']}")
    print(f"next:    python workflows/finetune.py RECIPE --encoder {result['model']} --data … --task …")


if __name__ == "__main__":
    run_recipe_command(main, Args, PRETRAIN, storage=tyro.MISSING)
