"""Recordings -> shards: which recording goes into which shard, and the tasks that make the shards.

Shards are named for their plan, so equal plans write equal files, and different ones do not disturb each other.

A worked example of a plan: six recordings of subjects a, a, b, c, c, d with `val_share=0.25`. Each subject gets a
number in [0, 1) from its name and the seed; say that only b's is below 0.25. So b's recording is held out. In the order
of the plan the five training recordings come first, shuffled by a number from each path, then b's. With
`shard_records=2` the tasks are train [0, 2), [2, 4), [4, 5) and val [5, 6).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.data.reading import patiently, read_or_reason
from lsemvae.data.shards import LABEL_PREFIX, SCHEMA_VERSION, Shard, flag_kind, pack, shard_bytes
from lsemvae.errors import StorageError, UnreadableRecording
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from lsemvae.storage import Storage


@dataclass(frozen=True)
class Task:
    """One shard to make: the recordings [start, stop) of the table in the order of the plan."""

    path: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Job:
    """What every task needs to know. `patience_s`: how long a request waits for an overloaded object store."""

    plan: str
    source: Storage
    output: Storage
    label_names: list[str]
    uv_per_lsb: float | None
    threads: int
    patience_s: float = 0.0


@dataclass
class Made:
    """What the tasks made. `unreadable` has a row (path, code, reason) for each recording that is in no shard.

    `flags` counts leads with each kind of flag (and recordings, for flags of a whole recording); `flagged` counts
    recordings with at least one flag of the kind.
    """

    shards: list[Shard] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    flagged: Counter[str] = field(default_factory=Counter)

    def add(self, summary: dict[str, Any]) -> None:
        """Adds the summary that `make_shard` gives."""
        self.shards.append(Shard(**summary["shard"]))
        self.unreadable += summary["unreadable"]
        self.flags.update(summary["flags"])
        self.flagged.update(summary["flagged"])

    def in_order(self) -> "Made":
        """The same whatever the order in which the tasks ended."""
        shards = sorted(self.shards, key=lambda shard: shard.path)
        unreadable = sorted(self.unreadable, key=lambda row: row["path"])
        return Made(shards, unreadable, self.flags, self.flagged)


def make_plan(
    table: pd.DataFrame, cohort: str, source_uri: str, *, shard_records: int, val_share: float, seed: int
) -> tuple[pd.DataFrame, list[Task], str]:
    """The table in the order of the shards, the shards to make, and the plan's digest.

    Which recording goes into which shard depends on the seed, the path and the subject alone.
    """
    subjects, subject_of = np.unique(table["subject_id"].to_numpy(str), return_inverse=True)
    chance = np.array([_chance(seed, subject) for subject in subjects])[subject_of]
    held_out = chance < val_share
    if val_share > 0 and not held_out.any():  # with very few subjects, hold out one and not none
        held_out = chance == chance.min()
    # By split, then shuffled.
    order = np.lexsort((np.array([_chance(seed, path) for path in table["path"]]), held_out))
    table = table.iloc[order].reset_index(drop=True)

    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, cohort, source_uri, shard_records]).encode())
    digest.update(held_out[order].tobytes())
    for name, values in table.items():
        is_number = pd.api.types.is_float_dtype(values)
        digest.update(f"\n{name}\n".encode())
        digest.update(values.to_numpy("<f8").tobytes() if is_number else json.dumps(values.tolist()).encode())
    plan = digest.hexdigest()[:16]

    tasks, training = [], int((~held_out).sum())
    for split, first, last in (("train", 0, training), ("val", training, len(table))):
        for number, start in enumerate(range(first, last, shard_records)):
            stop = min(start + shard_records, last)
            tasks.append(Task(f"{split}-{number:05d}-{plan}.parquet", split, start, stop))
    return table, tasks, plan


def _chance(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def make_shards(table: pd.DataFrame, tasks: list[Task], job: Job, concurrent_reads: int) -> Iterator[dict[str, Any]]:
    """The summary of every task, in the order in which Ray Data finishes them; finished shards are not made again.

    At most `concurrent_reads` recordings are read at the same time on the whole cluster: with many CPUs each task gets
    fewer threads. Each worker holds one shard in memory. Raises StorageError when the source or the output fails.
    """
    import ray
    import ray.data

    threads, at_once = divide_reads(concurrent_reads, job.threads, int(ray.cluster_resources().get("CPU", 1)))
    job = replace(job, threads=threads)
    recordings = ray.put(pa.Table.from_pandas(table, preserve_index=False))  # once per node, however many tasks

    def work(row: dict[str, Any]) -> dict[str, Any]:
        task = tasks[row["number"]]
        try:
            result = make_shard(task, ray.get(recordings).slice(task.start, task.stop - task.start).to_pylist(), job)
        except (OSError, StorageError) as error:  # returned, because Ray would wrap it in pages of traceback
            result = {"failure": str(error)}
        return {"result": json.dumps(result)}

    items = [{"number": number} for number in range(len(tasks))]
    pool = ray.data.TaskPoolStrategy(min(at_once, len(items)))  # Ray warns of a limit that cannot be reached
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(work, compute=pool)
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if failure := result.get("failure"):
            raise StorageError(f"{failure}; finished shards are kept: give the same command again to continue")
        yield result


def divide_reads(concurrent_reads: int, threads: int, cpus: int) -> tuple[int, int]:
    """Threads of a task, and tasks at once, so that their product is at most `concurrent_reads`.

    256 reads on 4 CPUs: 16 threads each (if `threads` is 16), and 16 tasks at once if the cluster grows. On 64 CPUs: 4
    threads each, so that all CPUs have work. On 1,000 CPUs: 256 tasks of one thread.
    """
    of_task = max(1, min(threads, concurrent_reads // max(cpus, 1)))
    return of_task, max(1, concurrent_reads // of_task)


def make_shard(task: Task, recordings: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Reads a task's recordings and writes its shard, unless that was done before -> a summary.

    The summary has `shard`, `unreadable`, `flags` and `flagged`, see `Made`.
    """

    def read(entry: dict[str, Any]) -> dict[str, Any]:
        def packed(record: Record) -> dict[str, Any]:
            return pack(record, path=entry["path"], flags=quality_flags(record))

        row = read_or_reason(job.source, entry["path"], packed, uv_per_lsb=job.uv_per_lsb, patience_s=job.patience_s)
        if isinstance(row, UnreadableRecording):
            return {"path": entry["path"], "code": row.code, "reason": str(row)}
        row |= {"record_id": entry["record_id"], "subject_id": entry["subject_id"]}
        for name in job.label_names:
            value = entry[LABEL_PREFIX + name]
            row[LABEL_PREFIX + name] = None if pd.isna(value) else float(value)
        return row

    with ThreadPoolExecutor(job.threads) as pool:
        if (content := _finished(task, job)) is not None:
            metadata = _metadata(content)
            again = {row["path"] for row in metadata["unreadable"]}
            # Unreadable recordings may have been mended since. The others are not read again.
            if not any("signal" in row for row in pool.map(read, (r for r in recordings if r["path"] in again))):
                return _summary(task, content, metadata)
        read_rows = list(pool.map(read, recordings))
    rows = [row for row in read_rows if "signal" in row]
    unreadable = [row for row in read_rows if "signal" not in row]
    flags = Counter(flag.split(":")[0] for row in rows for flag in set(row["flags"]))
    # Sorted: the order of a set of words differs between processes, and equal shards must be equal bytes.
    metadata = {"plan": job.plan, "rows": len(rows), "unreadable": unreadable, "flags": dict(sorted(flags.items()))}
    content = shard_bytes(rows, job.label_names, metadata)
    patiently(lambda: job.output.write_bytes(task.path, content), job.patience_s)
    return _summary(task, content, metadata)


def _finished(task: Task, job: Job) -> bytes | None:
    """The shard's bytes, if it was written before and is whole."""
    try:
        content = patiently(lambda: job.output.read_bytes(task.path), job.patience_s)
        for _ in pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).iter_batches():
            pass
        return content if _metadata(content)["plan"] == job.plan else None
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None


def _metadata(content: bytes) -> dict[str, Any]:
    return json.loads(pq.read_schema(pa.BufferReader(content)).metadata[b"lsemvae"])


def _summary(task: Task, content: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
    shard = Shard(task.path, task.split, metadata["rows"], len(content), hashlib.sha256(content).hexdigest())
    flags_of_rows = pq.read_table(pa.BufferReader(content), columns=["flags"])["flags"].to_pylist()
    flagged = Counter(kind for flags in flags_of_rows for kind in {flag_kind(flag) for flag in flags})
    return {
        "shard": asdict(shard),
        "unreadable": metadata["unreadable"],
        "flags": metadata["flags"],
        "flagged": dict(sorted(flagged.items())),
    }
