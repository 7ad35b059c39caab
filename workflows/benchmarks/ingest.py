"""`ingest` and `feed`: from recordings to shards, and from shards to model input, on one core.

The baseline is the usual loop: `wfdb.rdrecord`, then NeuroKit2's `ecg_clean` and a z-score for each lead.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import neurokit2
import numpy as np
import pandas as pd
import torch
import wfdb
from threadpoolctl import threadpool_limits

from benchmarks.measure import Row, alternate, less_is_better, more_is_better, peak_bytes, timed
from lsemvae.cohorts import COHORTS, detect
from lsemvae.data.feed import Feed, read_here
from lsemvae.data.ingest import Job, Task, make_plan, make_shard
from lsemvae.data.shards import MANIFEST, Manifest, Shard, ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.formats import read
from lsemvae.leads import LEADS, canonical
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.storage import Storage
from lsemvae.training.resident import widened

SHARD_RECORDS = 64
SIZES = (1, 4, 16)
CONFIG = PreprocessConfig(scale="lead")
ALL_OF_MIMIC = 800_035


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both cases."""
    parser.add_argument("--data", required=True, help="a folder of WFDB recordings at 500 Hz, such as PTB-XL")
    parser.add_argument("--records", type=int, default=128, help="how many recordings to use")


@threadpool_limits.wrap(limits=1)
def bench_ingest(args: argparse.Namespace) -> list[Row]:
    """Time recordings -> shards, and recordings -> model input without shards."""
    table, job = _recordings(args)
    paths = [Path(args.data, path) for path in table["path"]]
    _check_equal(_prepare_ours(paths), _prepare_usual(paths))
    count, rounds = len(paths), args.rounds or 3
    with tempfile.TemporaryDirectory() as folder:
        pack = partial(_pack, table, job, Storage.open(folder))
        rows = []
        for case, ours, baseline in (
            ("read", lambda: [read(path) for path in paths], lambda: [wfdb.rdrecord(_name(p)) for p in paths]),
            ("read + pack", pack, lambda: [_pack_usual(path) for path in paths]),
            ("wfdb -> model input", lambda: _prepare_ours(paths), lambda: _prepare_usual(paths)),
        ):
            seconds = alternate(ours, baseline, rounds, "cpu")
            rows.append(more_is_better(f"prepare {case}, per core", *(count / s for s in seconds), "records/s"))
        shards = pack()
        raw_bytes = sum(2 * len(LEADS) * read(path).signal_mv_LT.shape[1] for path in paths)
        packed_bytes = sum(shard.bytes for shard in shards)
        rows.append(less_is_better("prepare bytes a record", packed_bytes / count, raw_bytes / count, "bytes"))
        repeated = [(n * count, partial(_pack, pd.concat([table] * n), job, Storage.open(folder))) for n in SIZES]
        rows += _growth("prepare", repeated)
    settings: dict[str, Any] = {"shard_records": 256, "val_share": 0.1, "seed": 0}
    plan = partial(make_plan, cohort="mimic-iv-ecg", source_uri="source", **settings)
    part, whole = (partial(plan, _listed(size)) for size in (ALL_OF_MIMIC // 16, ALL_OF_MIMIC))
    case, linear_s = f"plan of {ALL_OF_MIMIC}", 16 * statistics.median(timed(part, "cpu") for _ in range(3))
    rows.append(less_is_better(f"{case}, against linear growth", timed(whole, "cpu"), linear_s, "s"))
    rows.append(less_is_better(f"{case}, memory against 2 GiB", peak_bytes(whole, 0, "cpu") / 2**20, 2048, "MiB"))
    return rows


@threadpool_limits.wrap(limits=1)
def bench_feed(args: argparse.Namespace) -> list[Row]:
    """Time shards -> batches of model input, in the process that asks for them."""
    table, job = _recordings(args)
    paths = [Path(args.data, path) for path in table["path"]]
    with tempfile.TemporaryDirectory() as folder:
        shards = _pack(table, job, Storage.open(folder))
        manifest = Manifest(args.data, "", "", len(table), len(table), 0, {}, shards)
        Path(folder, MANIFEST).write_text(manifest.to_json())
        order = {"batch_size": 32, "streams": 1, "shuffle": False}
        feed_of = partial(Feed.of, ShardedDataset.open(folder), "all", LEADS, CONFIG, **order)

        def feed_all(feed: Feed) -> list[dict[str, torch.Tensor]]:
            """All batches; those of the cache are made float32, as the training device does."""
            batches = feed.batches(0, read=read_here)
            return [widened(feed.layout, {name: torch.from_numpy(v) for name, v in b.items()}) for b in batches]

        batches = feed_all(feed_of())
        x_BLT, row_B = (np.concatenate([batch[name].numpy() for batch in batches]) for name in ("x_BLT", "row_B"))
        assert (row_B[: len(paths)] == np.arange(len(paths))).all()
        _check_equal(x_BLT[: len(paths)], _prepare_usual(paths))
        rows = []
        cached, device_cached = (feed_of(cache=Path(folder, "cache"), on_device=there) for there in (False, True))
        for case, feed in (
            ("shard -> batch", feed_of()),
            ("shard -> windows for a device", feed_of(on_device=True)),
            ("cache -> batch", cached),
            ("cache -> windows for a device", device_cached),
        ):
            seconds = alternate(partial(feed_all, feed), lambda: _prepare_usual(paths), args.rounds or 3, "cpu")
            rows.append(more_is_better(f"feed {case}, per core", *(len(paths) / s for s in seconds), "records/s"))
        wide = feed_of(cache=Path(folder, "float32"))
        wide = replace(wide, layout=replace(wide.layout, packed=False))

        def read_all(feed: Feed) -> None:
            for _ in feed.batches(0, read=read_here):
                pass

        for case, run in (("read", read_all), ("read and made float32", feed_all)):
            seconds = alternate(partial(run, cached), partial(run, wide), args.rounds or 3, "cpu")
            name = f"feed cache in int16, {case}, against float32"
            rows.append(more_is_better(name, *(len(paths) / s for s in seconds), "records/s"))
        bytes_read = sum(shard.bytes for shard in shards) / len(paths)
        cases = (("shards", bytes_read), ("cache", cached.record_bytes))
        rows += [less_is_better(f"feed {case}, read", size / 1e6, 0.12, "MB a record") for case, size in cases]
    return rows


def _recordings(args: argparse.Namespace) -> tuple[pd.DataFrame, Job]:
    """Recordings that the usual loop can read, with twelve usable leads: it does not handle others."""
    source = Storage.open(args.data).require()
    cohort = COHORTS[detect(source)]
    table = cohort.recordings(source, None)[["path", "record_id", "subject_id"]]
    usable = []
    for path in table["path"]:
        record = read(Path(args.data, path), uv_per_lsb=cohort.uv_per_lsb)
        whole = record.signal_mv_LT.shape[1] == CONFIG.samples and record.rate_hz == CONFIG.rate_hz
        usable.append(whole and bool(preprocess([record], LEADS, CONFIG).lead_mask_BL.all()))
        if sum(usable) == args.records:
            break
    table = table[: len(usable)][usable]
    if table.empty:
        raise LsemvaeError(f"{args.data}: no recording of 10 s at 500 Hz with 12 usable leads")
    return table, Job("bench", source, source, [], cohort.uv_per_lsb, threads=1)


def _name(path: Path) -> str:
    return str(path).removesuffix(".hea")


def _prepare_ours(paths: list[Path]) -> np.ndarray:
    return preprocess([read(path) for path in paths], LEADS, CONFIG).x_BLT


def _prepare_usual(paths: list[Path]) -> np.ndarray:
    prepared = []
    for path in paths:
        record = wfdb.rdrecord(_name(path), return_res=32)
        rows = {canonical(name): record.p_signal[:, i] for i, name in enumerate(record.sig_name)}
        cleaned = [neurokit2.ecg_clean(rows[lead], sampling_rate=record.fs, method="neurokit") for lead in LEADS]
        prepared.append(np.stack([(lead - lead.mean()) / lead.std(ddof=1) for lead in cleaned]).astype(np.float32))
    return np.stack(prepared)


def _pack(table: pd.DataFrame, job: Job, output: Storage) -> list[Shard]:
    """Write the shards as ingest does, one after another, again at each call."""
    recordings = table.to_dict("records")
    job, shards = replace(job, output=output), []
    for number, start in enumerate(range(0, len(recordings), SHARD_RECORDS)):
        chosen = recordings[start : start + SHARD_RECORDS]
        task = Task(f"train-{number:05d}.parquet", "train", start, start + len(chosen))
        Path(output.path(task.path)).unlink(missing_ok=True)
        shards.append(Shard(**make_shard(task, chosen, job)["shard"]))
    return shards


def _pack_usual(path: Path) -> int:
    record = wfdb.rdrecord(_name(path), physical=False)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, signal=record.d_signal.astype(np.int16), leads=record.sig_name)
    return buffer.tell()


def _listed(rows: int) -> pd.DataFrame:
    """A table like MIMIC-IV-ECG's, with `size` recordings."""
    numbers = np.arange(rows)
    table = pd.DataFrame({"record_id": (40_000_000 + numbers).astype(str)})
    table["subject_id"] = (10_000_000 + numbers // 5).astype(str)
    table["path"] = "files/p" + table["subject_id"].str[:4] + "/p" + table["subject_id"] + "/s" + table["record_id"]
    return table


def _growth(case: str, sizes: Sequence[tuple[int, Callable[[], object]]]) -> list[Row]:
    """Rows: seconds a record and additional memory, for several numbers of records, against the smallest."""
    (first, smallest), *larger = sizes
    smallest()
    once_s = statistics.median(timed(smallest, "cpu") for _ in range(5)) / first
    once_mib = peak_bytes(smallest, 0, "cpu") / 2**20
    rows = []
    for size, call in larger:
        times = f"{case}, {size // first}x the records"
        rows.append(less_is_better(f"{times}, time a record", 1e3 * timed(call, "cpu") / size, 1e3 * once_s, "ms"))
        rows.append(less_is_better(f"{times}, memory", peak_bytes(call, 0, "cpu") / 2**20, once_mib, "MiB"))
    return rows


def _check_equal(ours_BLT: np.ndarray, usual_BLT: np.ndarray) -> None:
    np.testing.assert_allclose(ours_BLT, usual_BLT, atol=1e-6)
    print(f"{len(ours_BLT)} recordings: equal to the usual loop within {np.abs(ours_BLT - usual_BLT).max():.1e}")
