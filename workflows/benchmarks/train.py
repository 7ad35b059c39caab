"""`train`: pre-training from shards, with Ray Data and Ray Train, against the bare step on a batch in memory.

It measures four ways: preprocessing in Ray Data tasks on the CPUs, preprocessing on the training device, reading
prepared recordings from the cache, as in every epoch after the first, and keeping them in the device's memory. On a GPU
it measures the last two, for one worker, unless told otherwise.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import torch
from command import prepare_environment, start_ray

from benchmarks.measure import Row, more_is_better
from lsemvae.data.feed import Feed, read_here
from lsemvae.data.shards import ShardedDataset
from lsemvae.models import build
from lsemvae.preprocess.on_device import DeviceFinish
from lsemvae.recipes import PRETRAIN
from lsemvae.training.fit import Batch, fit, make_optimizer, prepare
from lsemvae.training.pretrain import batches_ahead
from lsemvae.training.resident import Resident, widened

WAYS = {
    "cpu": "preprocessed on the CPUs",
    "device": "preprocessed on the device",
    "cache": "from the cache",
    "held": "from the device's memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--data", required=True, help="shards, made by workflows/ingest.py")
    parser.add_argument("--recipe", default="small", choices=PRETRAIN)
    parser.add_argument("--workers", type=int, nargs="+", help="1 and 2 by default, 1 on a GPU")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; that of the recipe by default")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="what to measure")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on both sides")
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of each measurement, after a first step that is not timed"
    )


def bench_train(args: argparse.Namespace) -> list[Row]:
    """Records/s of all workers together; steps from memory and from shards alternate."""
    prepare_environment()
    start_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    data, on_gpu, rows = ShardedDataset.open(args.data), args.device == "cuda", []
    ways = args.ways or (["cache", "held"] if on_gpu else list(WAYS))
    for size in args.batch or [PRETRAIN[args.recipe].optim.batch_size]:
        recipe = PRETRAIN[args.recipe]
        recipe = replace(recipe, optim=replace(recipe.optim, compile=args.compile, batch_size=size))
        order = {"batch_size": size, "streams": recipe.streams, "buffer": recipe.shuffle_buffer}
        with tempfile.TemporaryDirectory() as folder:
            how: dict[str, dict[str, Any]] = {
                "cpu": {}, "device": {"on_device": True}, "cache": {"cache": folder}, "held": {"cache": folder},
            }  # fmt: skip
            feeds = {way: Feed.of(data, "train", recipe.leads, recipe.preprocess, **how[way], **order) for way in ways}
            for feed in [feed for feed in feeds.values() if feed.cached][:1]:
                for _ in feed.batches(0, read=read_here):
                    pass
            for workers in args.workers or ([1] if on_gpu else [1, 2]):
                config = {"feeds": feeds, "recipe": recipe, "steps": args.steps, "rounds": args.rounds or 3}
                trainer = TorchTrainer(
                    measure,
                    train_loop_config=config,
                    torch_config=TorchConfig(timeout_s=600),
                    scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=on_gpu),
                    run_config=ray.train.RunConfig(logging_config=ray.train.LoggingConfig(log_level="WARNING")),
                )
                for way, (fed, bare) in trainer.fit().return_value.items():
                    case = f"end to end {args.recipe} b{size}, {workers} workers, {WAYS[way]}"
                    rows.append(more_is_better(case, fed, bare, "records/s"))
    return rows


def measure(config: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Run on each worker -> for each way, median records/s of all workers, fed and from memory."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    recipe, steps = config["recipe"], config["steps"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.manual_seed(0)
    model = build(recipe.model, recipe.leads).to(device)
    prepare(model, recipe.optim, device)
    model = prepare_model(model)
    optimizer = make_optimizer(model, recipe.optim)

    finish = DeviceFinish(recipe.preprocess, recipe.leads, device)

    def forever(feed: Feed, held: bool) -> Iterator[Batch]:
        resident = Resident(feed, device, workers) if held else None
        for epoch in count():
            parts = resident.rows(epoch, rank, workers, 0) if resident else feed.batches(epoch, rank, workers)
            for batch in batches_ahead(parts, device):
                batch.pop("damaged")
                wide = widened(feed.layout, resident.take(batch["at_B"]) if resident else batch)
                yield finish.batch(wide) if feed.on_device else wide

    def rate(batches: Iterable[Batch]) -> float:
        """Records/s of `steps` steps after one that is not timed."""
        began, records = 0.0, 0

        def timed() -> Iterator[Batch]:
            nonlocal began, records
            for step, batch in enumerate(batches):
                if step == 1:
                    _wait(device)
                    began = time.perf_counter()
                if step > steps:
                    return
                records += recipe.optim.batch_size if step else 0
                yield batch

        fit(model, optimizer, replace(recipe.optim, epochs=1), lambda epoch: timed())
        _wait(device)
        return records / (time.perf_counter() - began)

    found = {}
    for way, feed in config["feeds"].items():
        stream = forever(feed, way == "held")
        in_memory = next(stream)
        rates = [(rate(stream), rate(repeat(in_memory))) for _ in range(config["rounds"])]
        stream.close()
        found[way] = statistics.median(fed for fed, _ in rates), statistics.median(bare for _, bare in rates)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
