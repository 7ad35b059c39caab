"""`checkpoint`: how long training waits for a checkpoint at the end of an epoch, against writing it at once.

The baseline is what a training worker did before checkpoints were written in a thread: save all files, replace the
bundle of the best epoch, and copy the checkpoint to the storage.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from pyarrow import fs as pafs

from benchmarks.measure import Row, less_is_better, timed
from lsemvae.bundle import Bundle
from lsemvae.data.order import Order
from lsemvae.models import build
from lsemvae.recipes import PRETRAIN
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import Progress, keep_as_best, save_checkpoint
from lsemvae.training.fit import make_optimizer
from lsemvae.training.writer import Writer

ORDER = Order((1024,), 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--recipe", default="paper", choices=PRETRAIN)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; by default the temporary one")


def bench_checkpoint(args: argparse.Namespace) -> list[Row]:
    """Seconds of a checkpoint, median over rounds; those of the two sides alternate."""
    recipe = PRETRAIN[args.recipe]
    model = build(recipe.model, recipe.leads).to(args.device)
    optimizer = make_optimizer(model, recipe.optim)
    for weights in model.parameters():
        weights.grad = torch.zeros_like(weights)
    optimizer.step()  # it has its tensors now
    bundle = Bundle.of(model, recipe.preprocess)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Storage.open(folder)

        def before() -> None:
            with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
                save_checkpoint(Path(temporary), bundle, model, optimizer, Progress(), ORDER, 1)
                keep_as_best(Path(temporary), place)
                (Path(folder) / "checkpoint_0").mkdir()
                pafs.copy_files(temporary, str(Path(folder) / "checkpoint_0"))
            shutil.rmtree(Path(folder) / "checkpoint_0")

        writer = Writer(place)
        writer.prepare(model, optimizer)  # as at the first step of a run
        waits_s: list[tuple[float, float, float]] = []
        for _ in range(args.rounds or 3):
            began = time.perf_counter()
            name, written = writer.write(bundle, model, optimizer, Progress(), ORDER, 1, best=True)
            wait_s = time.perf_counter() - began
            written.result()
            waits_s.append((wait_s, time.perf_counter() - began, timed(before, args.device)))
            shutil.rmtree(Path(folder) / name)
    wait_s, written_s, before_s = (statistics.median(column) for column in zip(*waits_s, strict=True))
    return [
        less_is_better(f"checkpoint {args.recipe}, training waits", wait_s, before_s, "s"),
        less_is_better(f"checkpoint {args.recipe}, until it is in the storage", written_s, before_s, "s"),
    ]
