"""Pre-train a recipe on shards with Ray Train; the result is a bundle, in the storage and in MLflow.

The same command again continues an unfinished run from its newest checkpoint, and says so when it is finished.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from command import run_recipe_command, start_ray

from lsemvae import __version__
from lsemvae.bundle import CONFIG, WEIGHTS, describe
from lsemvae.config import PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.fit import PretrainJob, pretrain_worker
from lsemvae.recipes import PRETRAIN
from lsemvae.shards import ShardedDataset
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run

RESULT = "result.json"


@dataclass(frozen=True)
class Args:
    """Pre-train on shards."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name="")]
    data: str
    """Shards: the --output of workflows/ingest.py (folder or s3:// URI)."""
    storage: str
    """Where checkpoints and the bundle go (folder or s3:// URI that every worker can reach)."""
    num_workers: int = 2
    """Training workers; each gets one share of the data."""
    use_gpu: bool = False
    """One GPU for each worker."""
    name: str | None = None
    """The run's name; by default it follows from recipe and data, so that the same command resumes."""
    model_name: str = "lsemvae-encoder"
    """The MLflow model that the bundle becomes a version of."""
    max_failures: int = 3
    """How often lost workers are replaced before the run gives up."""


def main(args: Args) -> None:
    data = ShardedDataset.open(args.data)
    recipe = args.recipe
    rows = {
        "train": data.require_rows("train", at_least=args.num_workers),
        "val": data.require_rows("val", at_least=args.num_workers),
    }
    storage = Storage.open(args.storage)
    name = args.name or f"pretrain-{_digest(recipe, data)}"
    place = storage / name
    if place.exists(RESULT):
        result = json.loads(place.read_bytes(RESULT))
        print(f"{name} is finished: nothing to do. Give another --name to train again.")
        _say_where(result)
        return

    start_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    params = asdict(recipe)
    previous = json.loads(place.read_bytes("run.json"))["run"] if place.exists("run.json") else None
    run = Run.start("pretrain", name, params, resume=previous)
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "storage": place.uri})
    place.write_bytes("run.json", json.dumps({"run": run.run_id}).encode())
    print(f"{name}: {rows['train']} recordings to train on, {rows['val']} to validate, {args.num_workers} workers")
    print(f"MLflow: {run.url}", flush=True)

    provenance = {
        "recipe": params,
        "data": {"uri": data.storage.uri, "digest": data.manifest.digest, "rows": rows},
        "mlflow_run": run.run_id,
        "lsemvae": __version__,
    }
    accepted = {
        split: data.model_input(recipe.leads, recipe.preprocess, split, columns=(), keep_refused=False)
        for split in rows
    }
    trainer = TorchTrainer(
        pretrain_worker,
        train_loop_config={"job": PretrainJob(recipe, rows, run.run_id, provenance)},
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ray.train.ScalingConfig(num_workers=args.num_workers, use_gpu=args.use_gpu),
        datasets=accepted,
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.base,
            storage_filesystem=storage.filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=args.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val.loss", checkpoint_score_order="min"
            ),
        ),
    )
    try:
        fitted = trainer.fit()
    except ray.train.TrainingFailedError as error:
        run.end("FAILED")
        raise LsemvaeError(f"training failed: {_root_cause(error)}") from error
    best, metrics = min(fitted.best_checkpoints, key=lambda pair: pair[1]["val.loss"])

    with best.as_directory() as checkpoint:
        folder = Path(checkpoint) / "bundle"
        for file in (WEIGHTS, CONFIG):
            place.write_bytes(f"bundle/{file}", (folder / file).read_bytes())
        digest = describe(folder).digest
        run.bundle(folder)
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


def _digest(recipe: PretrainRecipe, data: ShardedDataset) -> str:
    text = json.dumps([asdict(recipe), data.manifest.digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _say_where(result: dict[str, object]) -> None:
    metrics = result["metrics"]
    print(
        f"epoch {metrics['epoch']}: validation loss {metrics['val.loss']:.4g}, "
        f"{metrics['val.active_units']:.0f} active units, mean Pearson r {metrics['val.pearson_r']:.3f}"
    )
    if metrics["val.collapsed"]:
        print("warning: the posterior has collapsed, z says nothing of the recordings:")
        print("         raise --model.reconstruction-weight, lower --model.beta, or train longer")
    print(f"bundle:  {result['bundle']} (digest {result['digest']})")
    print(f"model:   {result['model']}")
    print(f"MLflow:  {result['run']}")


if __name__ == "__main__":
    run_recipe_command(main, Args, PRETRAIN, storage=tyro.MISSING)
