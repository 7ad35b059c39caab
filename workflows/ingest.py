"""Turn recordings into shards: any cohort, from a folder or S3, into Parquet in a folder or S3.

Nothing is rejected for its quality here, it is flagged. What cannot be read is listed with its reason in
unreadable.csv beside the shards. The same command again continues where it stopped.
"""

import csv
import hashlib
import io
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from command import run_command, start_ray
from tqdm import tqdm

from lsemvae.cohorts import COHORTS, detect, read_labels
from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import read_relative
from lsemvae.quality import quality_flags
from lsemvae.shards import (
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
    shard_metadata,
)
from lsemvae.storage import Storage

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
    """With a larger share of unreadable recordings the command stops with status 3; what could be read is kept."""
    threads: int = 8
    """Concurrent reads in each task."""


@dataclass(frozen=True)
class Task:
    """One shard to make. `recordings` carry their labels, NaN where there is none."""

    path: str
    split: str
    recordings: list[dict[str, Any]]


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
    if not 0 <= args.val_share < 1 or args.shard_records < 1:
        raise LsemvaeError(
            f"val_share={args.val_share}, shard_records={args.shard_records}: give a share below 1, and 1 or more"
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
    label_names = [name.removeprefix(LABEL_PREFIX) for name in table.columns if name.startswith(LABEL_PREFIX)]
    tasks, plan = make_plan(table, args, cohort_name, source)

    if output.exists(MANIFEST):
        if ShardedDataset.open(args.output).manifest.plan != plan:
            raise LsemvaeError(f"{output.uri} already holds another data set: choose another --output")
        print(f"{output.uri} already holds this data set: nothing to do.")
        return

    print(
        f"{cohort_name}: {len(table)} recordings of {table['subject_id'].nunique()} subjects into {len(tasks)} shards"
    )
    job = Job(plan, source, output, label_names, cohort.uv_per_lsb, args.threads)
    shards, unreadable, flags = make_shards(tasks, job)
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
    write_unreadable(output, unreadable)
    if manifest.records == 0:
        raise LsemvaeError(
            f"none of the {len(table)} recordings of {source.uri} can be read, the first because "
            f"{unreadable[0]['reason']}; all are listed in {output.uri}/{UNREADABLE}"
        )
    output.write_bytes(MANIFEST, manifest.to_json().encode())
    report(manifest, unreadable, output)
    if len(unreadable) > args.max_unreadable * len(table):
        print(
            f"error: {len(unreadable)} of {len(table)} recordings are unreadable, more than "
            f"--max-unreadable {args.max_unreadable:g}: see {output.uri}/{UNREADABLE}",
            file=sys.stderr,
        )
        raise SystemExit(TOO_MANY_UNREADABLE)


def make_plan(table: pd.DataFrame, args: Args, cohort: str, source: Storage) -> tuple[list[Task], str]:
    """Which recording goes into which shard, from the seed and the subjects alone, and the plan's digest."""
    chance = np.array([_chance(args.seed, subject) for subject in table["subject_id"]])
    held_out = chance < args.val_share
    if args.val_share > 0 and not held_out.any():  # very few subjects: hold out one, not none
        held_out = chance == chance.min()
    order = np.argsort([_chance(args.seed, path) for path in table["path"]], kind="stable")
    rows = table.iloc[order].to_dict("records")
    split_of = np.where(held_out[order], "val", "train")
    tasks = []
    for split in ("train", "val"):
        chosen = [row for row, row_split in zip(rows, split_of, strict=True) if row_split == split]
        for number, start in enumerate(range(0, len(chosen), args.shard_records)):
            tasks.append(Task(f"{split}-{number:05d}.parquet", split, chosen[start : start + args.shard_records]))
    text = json.dumps([SCHEMA_VERSION, cohort, source.uri, [[t.path, t.recordings] for t in tasks]], default=str)
    return tasks, hashlib.sha256(text.encode()).hexdigest()[:16]


def _chance(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def make_shards(tasks: list[Task], job: Job) -> tuple[list[Shard], list[dict[str, str]], Counter[str]]:
    """Every task on Ray Data, one shard held in memory a worker; shards finished before are not made again."""
    start_ray()
    import ray.data

    def work(row: dict[str, Any]) -> dict[str, Any]:
        result = make_shard(Task(**json.loads(row["task"])), job)
        return {"result": json.dumps(result)}

    items = [{"task": json.dumps(asdict(task))} for task in tasks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(work)
    shards, unreadable, flags = [], [], Counter()
    total = sum(len(task.recordings) for task in tasks)
    with tqdm(total=total, desc="ingest", unit="records") as bar:
        for row in dataset.iter_rows():
            result = json.loads(row["result"])
            shards.append(Shard(**result["shard"]))
            unreadable += result["unreadable"]
            flags.update(result["flags"])
            bar.update(result["shard"]["rows"] + len(result["unreadable"]))
    return sorted(shards, key=lambda s: s.path), sorted(unreadable, key=lambda u: u["path"]), flags


def make_shard(task: Task, job: Job) -> dict[str, Any]:
    """Reads a task's recordings and writes its shard, unless the same plan wrote it before -> a summary."""
    if job.output.exists(task.path):
        metadata = shard_metadata(job.output, task.path)
        if metadata.get("plan") == job.plan:
            content = job.output.read_bytes(task.path)
            return _summary(task, content, metadata["rows"], metadata["unreadable"], metadata["flags"])

    def read(entry: dict[str, Any]) -> dict[str, Any] | dict[str, str]:
        try:
            record = read_relative(entry["path"], job.source.read_bytes, uv_per_lsb=job.uv_per_lsb)
        except UnreadableRecording as error:
            return {"path": entry["path"], "code": error.code, "reason": str(error)}
        row = pack(record, path=entry["path"], flags=quality_flags(record))
        row |= {"record_id": entry["record_id"], "subject_id": entry["subject_id"]}
        for name in job.label_names:
            value = entry[LABEL_PREFIX + name]
            row[LABEL_PREFIX + name] = None if pd.isna(value) else float(value)
        return row

    with ThreadPoolExecutor(job.threads) as pool:
        read_rows = list(pool.map(read, task.recordings))
    rows = [row for row in read_rows if "signal" in row]
    unreadable = [row for row in read_rows if "signal" not in row]
    flags = Counter(flag.split(":")[0] for row in rows for flag in set(row["flags"]))
    # Sorted: the order of a set of words differs between processes, and equal shards must be equal bytes.
    metadata = {"plan": job.plan, "rows": len(rows), "unreadable": unreadable, "flags": dict(sorted(flags.items()))}
    content = shard_bytes(rows, job.label_names, metadata)
    job.output.write_bytes(task.path, content)
    return _summary(task, content, len(rows), unreadable, metadata["flags"])


def _summary(
    task: Task, content: bytes, rows: int, unreadable: list[dict[str, str]], flags: dict[str, int]
) -> dict[str, Any]:
    shard = Shard(task.path, task.split, rows, len(content), hashlib.sha256(content).hexdigest())
    return {"shard": asdict(shard), "unreadable": unreadable, "flags": flags}


def write_unreadable(output: Storage, unreadable: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "code", "reason"])
    writer.writeheader()
    writer.writerows(unreadable)
    output.write_bytes(UNREADABLE, text.getvalue().encode())


def report(manifest: Manifest, unreadable: list[dict[str, str]], output: Storage) -> None:
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
    print(f"shards:     {output.uri}")


if __name__ == "__main__":
    run_command(main, Args)
