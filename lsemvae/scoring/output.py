"""The output of a cohort: one Parquet file, one CSV, and the summary that makes them valid."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lsemvae.errors import LsemvaeError
from lsemvae.progress import over
from lsemvae.scoring.drift import ScoreBins, drift_of
from lsemvae.scoring.parts import Job, part_path, unreadable_in
from lsemvae.storage import Storage, explained

JOB, SUMMARY = "job.json", "summary.json"
_DELETE = "Delete it and give the same command again: finished parts are kept"


def claim(output: Storage, about: dict[str, Any]) -> None:
    """Reserve the output for this model on these recordings; raises LsemvaeError when it belongs to another plan.

    Files are named for the plan, so two commands that call this at the same moment do not mix their rows: the one
    that writes summary.json last owns the output, and the other one gets the error at its next call.
    """
    for name in (SUMMARY, JOB):
        try:
            before = output.read_json(name, _DELETE, ("plan",))
        except FileNotFoundError:
            continue
        if before.get("plan") != about["plan"]:
            raise LsemvaeError(
                f"{output.uri} holds {before.get('holds', 'scores')} of {_named(before)} on {before.get('input')}, "
                f"{_difference(before, about)}: choose another --output"
            )
        return
    output.write_bytes(JOB, json.dumps(about, indent=2).encode())


def _difference(before: dict[str, Any], about: dict[str, Any]) -> str:
    if before.get("holds") != about.get("holds"):
        return f"and no {about.get('holds', 'scores')}"
    if _named(before) != _named(about):
        return f"this is {_named(about)}"
    if before.get("input_digest") != about.get("input_digest") or "settings" not in about:
        return "whose recordings were others"
    one, other = before.get("settings", {}), about["settings"]
    changed = [
        f"{name} was {one.get(name)!s:.60}, is {other[name]!s:.60}" for name in other if one.get(name) != other[name]
    ]
    return f"with other settings ({'; '.join(changed)})"


def _named(about: dict[str, Any]) -> str:
    version = f" version {about['version']}" if about.get("version") else ""
    return f"{about.get('model')}{version} (digest {about.get('digest')})"


def finished(output: Storage, plan: str) -> dict[str, Any] | None:
    """The summary, if every file that it names is there and whole; otherwise None."""
    try:
        summary = output.read_json(SUMMARY, _DELETE, ("plan", "files"))
        whole = all(sha256_of(output, name) == digest for name, digest in summary["files"].items())
    except FileNotFoundError:
        return None
    return summary if whole and summary["plan"] == plan else None


def sha256_of(output: Storage, name: str) -> str:
    with explained(output.path(name)), output.filesystem.open_input_stream(output.path(name)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def commit(job: Job, about: dict[str, Any], digests: list[str]) -> dict[str, Any]:
    """Writes the tables, then the summary that makes them valid."""
    names, counts = write_tables(job, digests, ScoreBins.read(about))
    return write_summary(job.output, about | counts, names)


def write_tables(job: Job, digests: list[str], bins: ScoreBins | None = None) -> tuple[list[str], dict[str, Any]]:
    """Writes the parts as one Parquet file and one CSV, a part at a time -> their names, and the counts of all rows.

    With the model's `bins` the counts say how far the scores are from those of its training cohort.
    """
    parts = [part_path(job.plan, number) for number in range(len(digests))]
    schema, counts = job.product.schema, _Counts()
    parquet, csv = (f"{job.product.name}-{job.plan}.{suffix}" for suffix in ("parquet", "csv"))
    with (
        ThreadPoolExecutor(8) as pool,
        job.output.writing(parquet) as parquet_stream,
        job.output.writing(csv) as csv_stream,
        pq.ParquetWriter(parquet_stream, schema, compression="zstd", write_page_checksum=True) as writer,
        pacsv.CSVWriter(csv_stream, schema) as csv_writer,
    ):
        for start in over(range(0, len(parts), 64), "write tables", "batches"):  # read ahead, but not all parts at once
            batch = slice(start, start + 64)
            for digest, content in zip(digests[batch], pool.map(job.output.read_bytes, parts[batch]), strict=True):
                if hashlib.sha256(content).hexdigest() != digest:
                    raise LsemvaeError(f"a part in {job.output.uri}/parts changed: give the same command again")
                table = pq.read_table(pa.BufferReader(content)).replace_schema_metadata(None)
                writer.write_table(table)
                csv_writer.write_table(table)
                counts.add(table, unreadable_in(content))
    return [parquet, csv], counts.facts(job.source.unreadable_before, bins)


def write_summary(output: Storage, about: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Writes summary.json, with the digests of these files: the output is complete."""
    summary = about | {"files": {name: sha256_of(output, name) for name in names}}
    output.write_bytes(SUMMARY, json.dumps(summary, indent=2).encode())
    return summary


class _Counts:
    """Counts of rows."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()  # every recording without a score, by reason
        self._unreadable: Counter[str] = Counter()  # those of them that no reader could read
        self._limited: int | None = None  # scores of recordings whose reliability is limited, where it is known
        self._scores: list[np.ndarray] = []

    def add(self, table: pa.Table, unreadable: Sequence[int]) -> None:
        known = table["score"].drop_null().to_numpy()
        self._scores.append(known)
        codes = table["refused"].to_pylist()
        self._refused.update(code for code in codes if code)
        self._unreadable.update(codes[row] for row in unreadable)
        if "reliability" in table.column_names:
            limited = table["reliability"].to_pylist().count("limited") - sum(code is not None for code in codes)
            self._limited = (self._limited or 0) + limited
        positive = sum(table["decision"].drop_null().to_pylist())
        self._counts.update(records=table.num_rows, scored=len(known), positive=positive)

    def facts(self, unreadable_before: int, bins: ScoreBins | None) -> dict[str, Any]:
        scores = np.concatenate(self._scores)
        return {
            "records": self._counts["records"],
            "scored": self._counts["scored"],
            "positive": self._counts["positive"],
            **({} if self._limited is None else {"limited": self._limited}),
            "unreadable": self._unreadable.total(),
            "unreadable_codes": dict(sorted(self._unreadable.items())),
            "unreadable_at_ingest": unreadable_before,
            "refused": dict(sorted(self._refused.items())),
            "distribution": distribution(scores),
            "drift": drift_of(scores, bins),
        }


def distribution(scores: np.ndarray) -> dict[str, Any]:
    quantiles = (0, 5, 25, 50, 75, 95, 100)
    return {
        "histogram": np.histogram(scores, bins=10, range=(0, 1))[0].tolist(),
        "quantiles": {q: float(np.percentile(scores, q)) for q in quantiles} if len(scores) else {},
    }
