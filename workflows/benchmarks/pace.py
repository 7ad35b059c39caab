"""`pace`: whether the cache keeps up with a device that takes batches at a given rate, measured without the device.

Training on a GPU leaves the CPUs idle most of the time, so a pause takes the place of the device's step.
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
from lsemvae.training.launch import Source, make_feeds
from lsemvae.training.pretrain import batches_ahead

DEVICE = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--data", required=True, help="shards, preferably several times the recipe's shuffle buffer")
    parser.add_argument("--recipe", default="paper", choices=PRETRAIN)
    parser.add_argument(
        "--records-per-s", type=float, nargs="+", default=[9400.0], help="records/s that the device takes"
    )


def bench_pace(args: argparse.Namespace) -> list[Row]:
    """Records/s that arrive, against the device's rate: the median epoch, without its first step."""
    data, recipe = ShardedDataset.open(args.data), PRETRAIN[args.recipe]
    size = recipe.optim.batch_size
    data.require_rows("train", at_least=2 * size)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        feed = make_feeds([Source(data)], recipe, cache=folder).train
        print(f"filling the cache: {feed.order.records} recordings, {feed.record_bytes / 1e3:g} kB each", flush=True)
        for _ in feed.batches(0, read=read_here):
            pass
        for rate in args.records_per_s:
            epochs = [list(_waits_s(feed, epoch, size / rate)) for epoch in range(1 + (args.rounds or 3))]
            begins_s = [waits_s[0] for waits_s in epochs[1:]]
            # The first epoch also allocates memory, so it is not counted.
            wait_s = statistics.median(statistics.mean(waits_s[1:]) for waits_s in epochs[1:])
            reached = size / (size / rate + wait_s)
            print(f"at {rate:g}/s: an epoch begins after {statistics.median(begins_s):.2f} s", flush=True)
            rows.append(more_is_better(f"pace cache, a device of {rate:g}/s", reached, rate, "records/s"))
    return rows


def _waits_s(feed: Feed, epoch: int, step_s: float) -> Iterator[float]:
    """Seconds that each step of an epoch waits for its batch."""
    batches = batches_ahead(feed.batches(epoch), DEVICE)
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            return
        yield time.perf_counter() - asked
        time.sleep(step_s)
