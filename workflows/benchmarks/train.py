"""`train`: pre-training from shards, with Ray Data and Ray Train, against the bare step on a batch in memory."""

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from command import start_ray

from benchmarks.measure import Row, more_is_better
from lsemvae.feed import Feed
from lsemvae.fit import Batch, fit, make_optimizer
from lsemvae.models import build
from lsemvae.pretraining import batches_ahead
from lsemvae.recipes import PRETRAIN
from lsemvae.shards import ShardedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the case."""
    parser.add_argument("--data", required=True, help="shards, made by workflows/ingest.py")
    parser.add_argument("--recipe", default="small", choices=PRETRAIN)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12, help="of each measurement, after the first which is not timed")


def bench_train(args: argparse.Namespace) -> list[Row]:
    """Records per second of all workers together, over steps in turn: from memory, from shards, from memory, …"""
    start_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    data, recipe = ShardedDataset.open(args.data), PRETRAIN[args.recipe]
    settings = {"batch_size": recipe.optim.batch_size, "streams": recipe.streams, "buffer": recipe.shuffle_buffer}
    feed = Feed.of(data, "train", recipe.leads, recipe.preprocess, **settings)
    rows = []
    for workers in args.workers:
        trainer = TorchTrainer(
            measure,
            train_loop_config={"feed": feed, "recipe": recipe, "steps": args.steps, "rounds": args.rounds or 3},
            torch_config=TorchConfig(timeout_s=600),
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=args.device == "cuda"),
            run_config=ray.train.RunConfig(logging_config=ray.train.LoggingConfig(log_level="WARNING")),
        )
        fed, bare = trainer.fit().return_value
        rows.append(more_is_better(f"end to end {args.recipe}, {workers} workers", fed, bare, "records/s"))
    return rows


def measure(config: dict[str, Any]) -> tuple[float, float]:
    """Runs on each worker -> median records/s of all workers, from shards and from memory."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    feed, recipe, steps = config["feed"], config["recipe"], config["steps"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.manual_seed(0)
    model = prepare_model(build(recipe.model, recipe.leads).to(device))
    optimizer = make_optimizer(model, recipe.optim)

    def forever() -> Iterator[Batch]:
        epoch = 0
        while True:
            for batch in batches_ahead(feed.batches(epoch, rank, workers), device):
                batch.pop("damaged")
                yield batch
            epoch += 1

    def rate(batches: Iterable[Batch]) -> float:
        """Of `steps` steps after one that is not timed."""
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

        fit(model, optimizer, replace(recipe.optim, epochs=1), lambda epoch: timed(), lambda epoch: None)
        _wait(device)
        return records / (time.perf_counter() - began)

    stream = forever()
    in_memory = next(stream)
    rates = [(rate(stream), rate(repeat(in_memory))) for _ in range(config["rounds"])]
    return statistics.median(fed for fed, _ in rates), statistics.median(bare for _, bare in rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
