"""`beside`: how long `/v1/explain` takes, and whether scores wait while explanations are made.

The endpoint with one model and one replica; the process that explains runs beside it on the same cores. Scores are
measured in turn without and with a continuous stream of explanations, which two clients ask for.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.load import Found, Run, generator
from benchmarks.measure import Row, less_is_better
from benchmarks.model import SIZES
from benchmarks.serve import LEAD_SETS, endpoint, make_bodies, recordings
from lsemvae.bundle import Bundle, save
from lsemvae.errors import LsemvaeError
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.preprocess import PreprocessConfig

WARM_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--size", default="full", choices=SIZES, help="size of the model")
    parser.add_argument("--leads", default="12", choices=LEAD_SETS, help="leads of the model and the recordings")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="numbers of clients that ask for scores")
    parser.add_argument("--seconds", type=float, default=10, help="seconds of each measurement")


def bench_beside(args: argparse.Namespace) -> list[Row]:
    """Scores without and with explanations beside them, in turn."""
    leads, config = LEAD_SETS[args.leads], ClassifierConfig(encoder=SIZES[args.size])
    torch.manual_seed(0)
    model = Classifier(config, leads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
        save(Bundle.of(model.eval(), preprocessing, task="ph", threshold=0.5), model, folder / "bundle")
        del model
        server = running.enter_context(endpoint(folder, leads, make_bodies(leads, recordings(leads))))
        explain = []
        for path in map(Path, server.requests["json"]):
            explain.append(str(path.with_name(f"explain-{path.name}")))
            Path(explain[-1]).write_bytes(path.read_bytes().replace(b"POST /v1/score ", b"POST /v1/explain ", 1))
        ask, ask_beside = running.enter_context(generator()), running.enter_context(generator())
        ask(Run(server.port, explain, 1, 1.0))  # the process starts
        alone = ask(Run(server.port, explain, 1, 3 * args.seconds))
        if not alone.answers or alone.failed:
            raise LsemvaeError(f"explanations: {alone.failed} in place of answers")
        print(f"/v1/explain, nothing else to do: p50 {alone.p50_ms:.0f} ms, p95 {alone.p95_ms:.0f} ms")
        table: dict[tuple[int, bool], list[Found]] = defaultdict(list)
        others = running.enter_context(ThreadPoolExecutor(1))
        for _ in range(args.rounds or 3):
            for clients in args.clients:
                scores = Run(server.port, server.requests["npy"], clients, args.seconds, WARM_S)
                table[clients, False].append(ask(scores))
                stream = others.submit(ask_beside, Run(server.port, explain, 2, args.seconds + WARM_S))
                table[clients, True].append(ask(scores))
                beside = stream.result()
                print(f"/v1/explain beside c{clients}: {beside.answers} answers, {beside.failed} failed")
    return rows_of(table)


def rows_of(table: dict[tuple[int, bool], list[Found]]) -> list[Row]:
    """Rows of scores with explanations beside them against those without; a ratio of 1 means that nothing waits."""
    rows = []
    for clients in dict.fromkeys(clients for clients, _ in table):
        for name in ("p50_ms", "p99_ms"):
            beside, alone = (
                statistics.median(getattr(found, name) for found in table[clients, with_others])
                for with_others in (True, False)
            )
            rows.append(less_is_better(f"c{clients} {name.removesuffix('_ms')}", beside, alone, "ms"))
    return rows
