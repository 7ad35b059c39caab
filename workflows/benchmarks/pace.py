"""`pace`: whether the cache keeps up with a device that takes batches at a given rate, without having the device.

Whoever trains on a GPU leaves the processors alone most of the time, so it is a pause here.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator

import torch

from benchmarks.measure import Row, more_is_better
from lsemvae.data.feed import Feed, read_here
from lsemvae.data.shards import ShardedDataset
from lsemvae.recipes import PRETRAIN
from lsemvae.training.launch import make_feeds
from lsemvae.training.pretrain import batches_ahead

DEVICE = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the case."""
    parser.add_argument("--data", required=True, help="shards, better of several shuffle buffers of the recipe")
    parser.add_argument("--recipe", default="paper", choices=PRETRAIN)
    parser.add_argument("--records-per-s", type=float, nargs="+", default=[9400.0], help="what the device takes")


def bench_pace(args: argparse.Namespace) -> list[Row]:
    """Records/s that come, against what a device would take: in the median epoch, its first step left out."""
    data, recipe = ShardedDataset.open(args.data), PRETRAIN[args.recipe]
    size = recipe.optim.batch_size
    data.require_rows("train", at_least=2 * size)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        feed = make_feeds(data, recipe, cache=folder)["train"]
        print(f"filling the cache: {feed.order.records} recordings, {feed.record_bytes / 1e3:g} kB each", flush=True)
        for _ in feed.batches(0, read=read_here):
            pass
        for rate in args.records_per_s:
            epochs = [list(_waits_s(feed, epoch, size / rate)) for epoch in range(1 + (args.rounds or 3))]
            begins_s = [waits_s[0] for waits_s in epochs[1:]]
            # Memory is taken in the first epoch.
            wait_s = statistics.median(statistics.mean(waits_s[1:]) for waits_s in epochs[1:])
            reached = size / (size / rate + wait_s)
            print(f"at {rate:g}/s: an epoch begins after {statistics.median(begins_s):.2f} s", flush=True)
            rows.append(more_is_better(f"pace cache, a device of {rate:g}/s", reached, rate, "records/s"))
    return rows


def _waits_s(feed: Feed, epoch: int, step_s: float) -> Iterator[float]:
    """How long each step of an epoch waits for its batch."""
    batches = batches_ahead(feed.batches(epoch), DEVICE)
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            return
        yield time.perf_counter() - asked
        time.sleep(step_s)
