"""`score`: a whole cohort with workflows/score.py against the bare model in a loop in one process."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.measure import Row, less_is_better, more_is_better
from benchmarks.model import SIZES
from lsemvae.bundle import CHUNK, Bundle, Scorer, save
from lsemvae.data.shards import SIGNAL_COLUMNS, ShardedDataset, signals_mv
from lsemvae.errors import LsemvaeError
from lsemvae.formats import read
from lsemvae.leads import LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.scoring.progress import PROGRESS
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

WORKFLOWS = Path(__file__).parents[1]
UV_PER_LSB = 5
DIFFERENT = 64  # recordings that are simulated; the others are links to them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument(
        "--records", type=int, default=2048, help="number of recordings; four times as many are scored too"
    )
    parser.add_argument("--size", default="smoke", choices=SIZES, help="size of the model")
    parser.add_argument("--actors", type=int, default=os.cpu_count(), help="number of processes that hold the model")
    parser.add_argument("--inputs", nargs="+", default=["shards", "xml"], choices=("shards", "xml"))


def bench_score(args: argparse.Namespace) -> list[Row]:
    """Records/s from UK Biobank 20205 XML and from shards, with and without start-up, for N and 4 N recordings."""
    config = ClassifierConfig(encoder=SIZES[args.size])
    torch.manual_seed(0)
    model = Classifier(config, LEADS).eval()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
        save(Bundle.of(model, preprocessing, task="ph", threshold=0.5), model, folder / "bundle")
        del model
        scorer = Scorer(folder / "bundle", args.device)
        for times in (1, 4):
            write_xml(folder / f"xml-{times}", args.records * times)
            if "shards" in args.inputs:
                source = ["--source", folder / f"xml-{times}", "--output", folder / f"shards-{times}"]
                # Nothing of it is measured, so it may join a cluster that is there.
                run("ingest", *source, "--cohort", "ukb-20205", ray=os.environ.get("RAY_ADDRESS", "local"))
        for kind in args.inputs:
            loop = {"xml": bare_xml, "shards": bare_shards}[kind]
            small = folder / f"{kind}-1"
            for _ in bare_xml(folder / "xml-1", scorer, 2 * CHUNK):  # warm up
                pass
            before_s = timed(loop, small, scorer)
            ours = {times: cohort(folder, kind, times, args) for times in (1, 4)}
            bare = args.records * 2 / (before_s + timed(loop, small, scorer))
            rows += [
                more_is_better(f"score {kind}, warm", ours[1]["records_per_s"], bare, "records/s"),
                more_is_better(f"score {kind}, 4 x, warm", ours[4]["records_per_s"], bare, "records/s"),
                more_is_better(f"score {kind}, with start-up", args.records / ours[1]["wall_s"], bare, "records/s"),
                more_is_better(
                    f"score {kind}, 4 x, with start-up", 4 * args.records / ours[4]["wall_s"], bare, "records/s"
                ),
                less_is_better(f"peak memory {kind}, 4 x and 1 x", ours[4]["peak_mb"], ours[1]["peak_mb"], "MB"),
            ]
    return rows


def timed(loop: Callable[..., Iterator[float]], folder: Path, scorer: Scorer) -> float:
    began = time.perf_counter()
    for _ in loop(folder, scorer):
        pass
    return time.perf_counter() - began


def bare_xml(folder: Path, scorer: Scorer, limit: int | None = None) -> Iterator[float]:
    paths = sorted(folder.glob("*.xml"))[:limit]
    for start in range(0, len(paths), CHUNK):
        yield from (answer.score for answer in scorer.score([read(path) for path in paths[start : start + CHUNK]]))


def bare_shards(folder: Path, scorer: Scorer) -> Iterator[float]:
    for shard in ShardedDataset.open(str(folder)).manifest.of_split("all"):
        for batch in pq.ParquetFile(folder / shard.path).iter_batches(CHUNK, columns=SIGNAL_COLUMNS):
            columns = {name: batch.column(name).to_pylist() for name in SIGNAL_COLUMNS}
            answers = scorer.score_signals(signals_mv(columns, scorer.bundle.leads), columns["rate_hz"])
            yield from (answer.score for answer in answers)


def cohort(folder: Path, kind: str, times: int, args: argparse.Namespace) -> dict[str, float]:
    """Run workflows/score.py -> what it prints about itself, wall time, and peak memory of all its processes."""
    output = folder / f"scores-{kind}-{times}"
    source = ["--data" if kind == "shards" else "--source", folder / f"{kind}-{times}", "--output", output]
    began = time.perf_counter()
    gpu = ["--use-gpu"] if args.device == "cuda" else []
    peak_mb = run("score", "--model", folder / "bundle", *source, "--actors", args.actors, *gpu)
    wall_s = time.perf_counter() - began
    said = json.loads((output / PROGRESS).read_text())
    assert said["made"] == said["scored"] == args.records * times
    return {"records_per_s": said["records_per_s"], "wall_s": wall_s, "peak_mb": peak_mb}


def run(name: str, *arguments: object, ray: str = "local") -> float:
    """Run `python workflows/NAME.py …`, by default with a Ray of its own -> peak memory of all its processes, in MB."""
    command = [sys.executable, WORKFLOWS / f"{name}.py", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": ray}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak_mb, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak_mb
        while not ended.wait(0.5):
            peak_mb = max(peak_mb, tree_mb(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    printed = process.communicate()[0]
    ended.set()
    watcher.join()
    if process.returncode:
        raise LsemvaeError(f"workflows/{name}.py ended with {process.returncode}: {printed[-1000:]}")
    return peak_mb


def tree_mb(pid: int) -> float:
    """Memory of a process and its descendants; shared memory counts once (proportional set sizes)."""
    total_mb = 0.0
    with contextlib.suppress(OSError):  # it has ended in the meantime
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total_mb += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_mb += sum(tree_mb(int(child)) for child in (task / "children").read_text().split())
    return total_mb


def write_xml(folder: Path, count: int) -> None:
    """Write simulated recordings like UK Biobank's: CardioSoft XML, 12 leads of 5,000 samples at 500 Hz."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(min(count, DIFFERENT)):
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=number % 5 / 4), rng)
        counts_LT = np.rint(signal_mv_LT * 1000 / UV_PER_LSB).astype(int)
        waves = "".join(
            f'<WaveformData lead="{lead}">{",".join(map(str, row_T.tolist()))}</WaveformData>'
            for lead, row_T in zip(LEADS, counts_LT, strict=True)
        )
        xml_path(folder, number).write_text(
            '<?xml version="1.0" encoding="ISO8859-1" ?><CardiologyXML><ObservationType>RestECG</ObservationType>'
            f'<StripData><NumberOfLeads>{len(LEADS)}</NumberOfLeads><SampleRate units="Hz">{RATE_HZ}</SampleRate>'
            f"<ChannelSampleCountTotal>{counts_LT.shape[1]}</ChannelSampleCountTotal>"
            f'<Resolution units="uVperLsb">{UV_PER_LSB}</Resolution>{waves}</StripData></CardiologyXML>'
        )
    for number in range(DIFFERENT, count):
        xml_path(folder, number).hardlink_to(xml_path(folder, number % DIFFERENT))


def xml_path(folder: Path, number: int) -> Path:
    return folder / f"{1_000_000 + number}_20205_2_0.xml"
