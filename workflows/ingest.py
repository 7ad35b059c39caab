"""Turn recordings into shards: any cohort, from a folder or S3, into Parquet in a folder or S3.

Nothing is rejected for its quality here, it is flagged. What cannot be read is listed with its reason in
unreadable.csv beside the shards; report.html shows what there is. The same command again continues where it stopped.

Shards are named for their plan, and a data set is what its manifest names. So several ingests into one output do not
disturb each other: equal ones write equal files, and of different ones the first to finish has the output.
"""

import csv
import hashlib
import io
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from command import run_command, start_ray
from tqdm import tqdm

from lsemvae.cohorts import COHORTS, detect, read_labels
from lsemvae.data.shards import (
    LABEL_PREFIX,
    MANIFEST,
    SCHEMA_VERSION,
    UNREADABLE,
    Manifest,
    Shard,
    ShardedDataset,
    label_counts,
    pack,
    shard_bytes,
)
from lsemvae.errors import LsemvaeError, StorageError, UnreadableRecording
from lsemvae.formats import read_relative
from lsemvae.quality import quality_flags
from lsemvae.storage import Storage

REPORT = "report.html"
TOO_MANY_UNREADABLE = 3  # exit status


@dataclass(frozen=True)
class Args:
    source: str
    """Recordings: a folder, file:// or s3:// URI (add ?anonymous=true for a public bucket)."""
    output: str
    """Where shards, manifest.json and unreadable.csv go (folder or s3:// URI)."""
    cohort: str = "auto"
    """mimic-iv-ecg, ptb-xl, ludb, folder, or auto: recognised by the files that are there."""
    labels: str | None = None
    """A CSV with a key column (path, record_id, study_id, file, ecg_id or subject_id) and numeric label columns."""
    val_share: float = 0.1
    """Share of subjects held out for validation in pre-training."""
    seed: int = 0
    """Decides which subjects are held out and the order of recordings in the shards."""
    shard_records: int = 256
    limit: int | None = None
    """Only the first so many recordings of the source."""
    max_unreadable: float = 0.05
    """As soon as more than this share of all recordings is unreadable the command stops with status 3. Finished shards
    are kept: with a larger share, or with recordings mended, it goes on."""
    threads: int = 16
    """Concurrent reads in each task."""


@dataclass(frozen=True)
class Task:
    """One shard to make: the recordings [start, stop) of the table in the order of the plan."""

    path: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Job:
    """What every task is told."""

    plan: str
    source: Storage
    output: Storage
    label_names: list[str]
    uv_per_lsb: float | None
    threads: int


def main(args: Args) -> None:
    source, output = Storage.open(args.source).require(), Storage.open(args.output)
    if not 0 <= args.val_share < 1 or args.shard_records < 1 or not 0 <= args.max_unreadable <= 1 or args.threads < 1:
        raise LsemvaeError(
            f"val_share={args.val_share}, shard_records={args.shard_records}, max_unreadable={args.max_unreadable}, "
            f"threads={args.threads}: give a share below 1, 1 or more, a share, and 1 or more"
        )
    labels = read_labels(args.labels) if args.labels else None
    cohort_name = detect(source) if args.cohort == "auto" else args.cohort
    if cohort_name not in COHORTS:
        raise LsemvaeError(f"there is no cohort {cohort_name!r}: choose one of {', '.join(COHORTS)}")
    cohort = COHORTS[cohort_name]
    table = cohort.recordings(source, labels)
    if args.limit is not None:
        table = table.head(args.limit)
    if table.empty:
        raise LsemvaeError(f"{source.uri} has no recordings of the cohort {cohort_name!r}")
    if repeated := table["record_id"].duplicated().sum():
        raise LsemvaeError(f"{source.uri}: {repeated} recordings have the id of another: give each its own")
    label_names = [name.removeprefix(LABEL_PREFIX) for name in table.columns if name.startswith(LABEL_PREFIX)]
    table, tasks, plan = make_plan(table, args, cohort_name, source)

    if _already_holds(output, plan):
        if not output.exists(REPORT):  # the command was killed between manifest and report
            write_report(output)
        ShardedDataset.open(output.uri).verify()
        print(f"{output.uri} already holds this data set, and its shards are whole: nothing to do.")
        return

    print(
        f"{cohort_name}: {len(table)} recordings of {table['subject_id'].nunique()} subjects into {len(tasks)} shards"
    )
    started = time.monotonic()
    job = Job(plan, source, output, label_names, cohort.uv_per_lsb, args.threads)
    shards, unreadable, flags = make_shards(table, tasks, job, args.max_unreadable)
    done = _already_holds(output, plan)  # another ingest may have come first
    write_unreadable(output, unreadable)
    if len(unreadable) > args.max_unreadable * len(table):
        print(
            f"error: {len(unreadable)} of {len(table)} recordings are unreadable, more than --max-unreadable "
            f"{args.max_unreadable:g}: see {output.uri}/{UNREADABLE}. Mend them, or allow more, and give the same "
            f"command again; the first: {unreadable[0]['reason']}",
            file=sys.stderr,
        )
        raise SystemExit(TOO_MANY_UNREADABLE)
    if len(unreadable) == len(table):
        raise LsemvaeError(
            f"none of the {len(table)} recordings of {source.uri} can be read, the first because "
            f"{unreadable[0]['reason']}; all are listed in {output.uri}/{UNREADABLE}"
        )
    readable = table[~table["path"].isin([row["path"] for row in unreadable])]
    manifest = Manifest(
        source=source.uri,
        cohort=cohort_name,
        plan=plan,
        records=sum(shard.rows for shard in shards),
        subjects=int(readable["subject_id"].nunique()),
        unreadable=len(unreadable),
        labels={name: label_counts(readable[LABEL_PREFIX + name].to_numpy(float)) for name in label_names},
        shards=shards,
        config={k: v for k, v in asdict(args).items() if k not in ("source", "output")},
        flags=dict(flags),
    )
    if not done:
        output.write_bytes(MANIFEST, manifest.to_json().encode())
        _already_holds(output, plan)  # … or at the same moment: the one written last counts
    write_report(output)
    summarise(manifest, unreadable, output, time.monotonic() - started)


def _already_holds(output: Storage, plan: str) -> bool:
    """Whether the data set of this plan is there; raises LsemvaeError when another one is."""
    if not output.exists(MANIFEST):
        return False
    if ShardedDataset.open(output.uri).manifest.plan != plan:
        raise LsemvaeError(f"{output.uri} already holds another data set: choose another --output")
    return True


def make_plan(table: pd.DataFrame, args: Args, cohort: str, source: Storage) -> tuple[pd.DataFrame, list[Task], str]:
    """The table in the order of the shards, the shards to make, and the plan's digest.

    Which recording goes into which shard depends on the seed, the path and the subject alone.
    """
    subjects, subject_of = np.unique(table["subject_id"].to_numpy(str), return_inverse=True)
    chance = np.array([_chance(args.seed, subject) for subject in subjects])[subject_of]
    held_out = chance < args.val_share
    if args.val_share > 0 and not held_out.any():  # very few subjects: hold out one, not none
        held_out = chance == chance.min()
    # By split, then shuffled.
    order = np.lexsort([[_chance(args.seed, path) for path in table["path"]], held_out])
    table = table.iloc[order].reset_index(drop=True)

    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, cohort, source.uri, args.shard_records]).encode())
    digest.update(held_out[order].tobytes())
    for name, values in table.items():
        is_number = pd.api.types.is_float_dtype(values)
        digest.update(f"\n{name}\n".encode())
        digest.update(values.to_numpy("<f8").tobytes() if is_number else json.dumps(values.tolist()).encode())
    plan = digest.hexdigest()[:16]

    tasks, training = [], int((~held_out).sum())
    for split, first, last in (("train", 0, training), ("val", training, len(table))):
        for number, start in enumerate(range(first, last, args.shard_records)):
            stop = min(start + args.shard_records, last)
            tasks.append(Task(f"{split}-{number:05d}-{plan}.parquet", split, start, stop))
    return table, tasks, plan


def _chance(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def make_shards(
    table: pd.DataFrame, tasks: list[Task], job: Job, max_unreadable: float
) -> tuple[list[Shard], list[dict[str, str]], Counter[str]]:
    """Every task on Ray Data, one shard held in memory a worker; shards finished before are not made again.

    It ends early when more than the share `max_unreadable` of the recordings cannot be read. Raises StorageError when
    source or output fails.
    """
    start_ray()
    import ray
    import ray.data

    recordings = ray.put(pa.Table.from_pandas(table, preserve_index=False))  # once a node, whatever the tasks

    def work(row: dict[str, Any]) -> dict[str, Any]:
        task = tasks[row["number"]]
        try:
            result = make_shard(task, ray.get(recordings).slice(task.start, task.stop - task.start).to_pylist(), job)
        except (OSError, StorageError) as error:  # said here, for Ray would wrap it in pages
            result = {"failure": str(error)}
        return {"result": json.dumps(result)}

    items = [{"number": number} for number in range(len(tasks))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(work)
    shards, unreadable, flags = [], [], Counter()
    with tqdm(total=len(table), desc="ingest", unit="records") as bar:
        for row in dataset.iter_rows():
            result = json.loads(row["result"])
            if failure := result.get("failure"):
                bar.close()
                raise StorageError(f"{failure}; what is finished is kept: the same command again goes on from there")
            shards.append(Shard(**result["shard"]))
            unreadable += result["unreadable"]
            flags.update(result["flags"])
            bar.update(result["shard"]["rows"] + len(result["unreadable"]))
            if len(unreadable) > max_unreadable * len(table):
                break
    return sorted(shards, key=lambda s: s.path), sorted(unreadable, key=lambda u: u["path"]), flags


def make_shard(task: Task, recordings: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Reads a task's recordings and writes its shard, unless that was done before -> a summary."""

    def read(entry: dict[str, Any]) -> dict[str, Any]:
        try:
            record = read_relative(entry["path"], job.source.read_bytes, uv_per_lsb=job.uv_per_lsb)
            row = pack(record, path=entry["path"], flags=quality_flags(record))
        except UnreadableRecording as error:
            return {"path": entry["path"], "code": error.code, "reason": str(error)}
        except (NotADirectoryError, IsADirectoryError) as error:
            return {"path": entry["path"], "code": "missing_file", "reason": str(error)}
        except (OSError, StorageError, MemoryError):
            raise
        except Exception as error:  # a reader that fails on one recording must not end a day's work on the others
            return {"path": entry["path"], "code": "reader_failed", "reason": f"{type(error).__name__}: {error}"}
        row |= {"record_id": entry["record_id"], "subject_id": entry["subject_id"]}
        for name in job.label_names:
            value = entry[LABEL_PREFIX + name]
            row[LABEL_PREFIX + name] = None if pd.isna(value) else float(value)
        return row

    with ThreadPoolExecutor(job.threads) as pool:
        if (content := _finished(task, job)) is not None:
            metadata = _metadata(content)
            again = {row["path"] for row in metadata["unreadable"]}
            # What could not be read may have been mended since. The rest is not read again.
            if not any("signal" in row for row in pool.map(read, (r for r in recordings if r["path"] in again))):
                return _summary(task, content, metadata)
        read_rows = list(pool.map(read, recordings))
    rows = [row for row in read_rows if "signal" in row]
    unreadable = [row for row in read_rows if "signal" not in row]
    flags = Counter(flag.split(":")[0] for row in rows for flag in set(row["flags"]))
    # Sorted: the order of a set of words differs between processes, and equal shards must be equal bytes.
    metadata = {"plan": job.plan, "rows": len(rows), "unreadable": unreadable, "flags": dict(sorted(flags.items()))}
    content = shard_bytes(rows, job.label_names, metadata)
    job.output.write_bytes(task.path, content)
    return _summary(task, content, metadata)


def _finished(task: Task, job: Job) -> bytes | None:
    """The shard's bytes, if it was written before and is whole."""
    try:
        content = job.output.read_bytes(task.path)
        for _ in pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).iter_batches():
            pass
        return content if _metadata(content)["plan"] == job.plan else None
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None


def _metadata(content: bytes) -> dict[str, Any]:
    return json.loads(pq.read_schema(pa.BufferReader(content)).metadata[b"lsemvae"])


def _summary(task: Task, content: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
    shard = Shard(task.path, task.split, metadata["rows"], len(content), hashlib.sha256(content).hexdigest())
    return {"shard": asdict(shard), "unreadable": metadata["unreadable"], "flags": metadata["flags"]}


def write_unreadable(output: Storage, unreadable: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "code", "reason"])
    writer.writeheader()
    writer.writerows(unreadable)
    output.write_bytes(UNREADABLE, text.getvalue().encode())


def write_report(output: Storage) -> None:
    from lsemvae.reports.ingest import ingest_report  # matplotlib and scipy, for this alone

    unreadable = list(csv.DictReader(io.StringIO(output.read_bytes(UNREADABLE).decode())))
    output.write_bytes(REPORT, ingest_report(ShardedDataset.open(output.uri), unreadable).encode())


def summarise(manifest: Manifest, unreadable: list[dict[str, str]], output: Storage, seconds: float) -> None:
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{manifest.records} recordings of {manifest.subjects} subjects in {len(manifest.shards)} shards, "
        f"{megabytes:.1f} MB: {manifest.rows_in('train')} to train on, {manifest.rows_in('val')} to validate"
    )
    print(f"unreadable: {manifest.unreadable}" + (f", listed in {output.uri}/{UNREADABLE}" if unreadable else ""))
    for code, count in Counter(row["code"] for row in unreadable).most_common():
        print(f"  {count:6d}  {code}")
    if manifest.flags:
        print("flagged:    " + ", ".join(f"{name} {count}" for name, count in sorted(manifest.flags.items())))
    for name, counts in manifest.labels.items():
        print(
            f"label {name}: {counts['0']} at 0, {counts['1']} at 1, "
            f"{counts['other']} at other values, {counts['null']} absent"
        )
    print(f"took:       {seconds:.0f} s, {(manifest.records + len(unreadable)) / seconds:.0f} recordings/s")
    print(f"shards:     {output.uri}, described in {REPORT}")


if __name__ == "__main__":
    run_command(main, Args)
