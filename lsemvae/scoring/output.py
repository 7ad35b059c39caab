"""The output of scoring a cohort: one Parquet file, one CSV, and the summary that makes them valid."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lsemvae.errors import LsemvaeError
from lsemvae.scoring.parts import SCHEMA, Job, part_path, unreadable_in
from lsemvae.storage import Storage, explained

JOB, SUMMARY = "job.json", "summary.json"


def claim(output: Storage, about: dict[str, Any]) -> None:
    """Reserve the output for this model on these recordings; raises LsemvaeError when it belongs to another plan.

    Files are named for the plan, so two commands that call this at the same moment do not mix their scores: the one
    that writes summary.json last owns the output, and the other one gets the error at its next call.
    """
    for name in (SUMMARY, JOB):
        try:
            before = json.loads(output.read_bytes(name))
        except FileNotFoundError:
            continue
        if before.get("plan") != about["plan"]:
            one, other = (_named(a) for a in (before, about))
            raise LsemvaeError(
                f"{output.uri} holds scores of {one} on {before.get('input')}, "
                + ("whose recordings were others" if one == other else f"this is {other}")
                + ": choose another --output"
            )
        return
    output.write_bytes(JOB, json.dumps(about, indent=2).encode())


def _named(about: dict[str, Any]) -> str:
    version = f" version {about['version']}" if about.get("version") else ""
    return f"{about.get('model')}{version} (digest {about.get('digest')})"


def finished(output: Storage, plan: str) -> dict[str, Any] | None:
    """The summary, if every file that it names is there and whole; otherwise None."""
    try:
        summary = json.loads(output.read_bytes(SUMMARY))
        whole = all(sha256_of(output, name) == digest for name, digest in summary["files"].items())
    except FileNotFoundError:
        return None
    return summary if whole and summary["plan"] == plan else None


def sha256_of(output: Storage, name: str) -> str:
    with explained(output.path(name)), output.filesystem.open_input_stream(output.path(name)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def commit(job: Job, about: dict[str, Any], digests: list[str]) -> dict[str, Any]:
    """Writes the parts as one Parquet file and one CSV, a part at a time, then the summary that makes them valid."""
    names = [part_path(job.plan, number) for number in range(len(digests))]
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()  # every recording without a score, by reason
    unreadable: Counter[str] = Counter()  # those of them that no reader could read
    limited = 0  # scores of recordings whose reliability is limited
    scores: list[np.ndarray] = []
    parquet, csv = f"scores-{job.plan}.parquet", f"scores-{job.plan}.csv"
    with (
        ThreadPoolExecutor(8) as pool,
        job.output.writing(parquet) as parquet_stream,
        job.output.writing(csv) as csv_stream,
        pq.ParquetWriter(parquet_stream, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        pacsv.CSVWriter(csv_stream, SCHEMA) as csv_writer,
    ):
        for start in range(0, len(names), 64):  # read ahead, but not all parts at once
            batch = slice(start, start + 64)
            for digest, content in zip(digests[batch], pool.map(job.output.read_bytes, names[batch]), strict=True):
                if hashlib.sha256(content).hexdigest() != digest:
                    raise LsemvaeError(f"a part in {job.output.uri}/parts changed: give the same command again")
                table = pq.read_table(pa.BufferReader(content)).replace_schema_metadata(None)
                writer.write_table(table)
                csv_writer.write_table(table)
                known = table["score"].drop_null().to_numpy()
                scores.append(known)
                codes, rows = table["refused"].to_pylist(), unreadable_in(content)
                refused.update(code for code in codes if code)
                unreadable.update(codes[row] for row in rows)
                limited += table["reliability"].to_pylist().count("limited") - sum(code is not None for code in codes)
                positive = sum(table["decision"].drop_null().to_pylist())
                counts.update(records=table.num_rows, scored=len(known), positive=positive)
    summary = about | {
        "records": counts["records"],
        "scored": counts["scored"],
        "positive": counts["positive"],
        "limited": limited,
        "unreadable": unreadable.total(),
        "unreadable_codes": dict(sorted(unreadable.items())),
        "unreadable_at_ingest": job.source.unreadable_before,
        "refused": dict(sorted(refused.items())),
        "distribution": distribution(np.concatenate(scores)),
        "files": {name: sha256_of(job.output, name) for name in (parquet, csv)},
    }
    job.output.write_bytes(SUMMARY, json.dumps(summary, indent=2).encode())
    return summary


def distribution(scores: np.ndarray) -> dict[str, Any]:
    quantiles = (0, 5, 25, 50, 75, 95, 100)
    return {
        "histogram": np.histogram(scores, bins=10, range=(0, 1))[0].tolist(),
        "quantiles": {q: float(np.percentile(scores, q)) for q in quantiles} if len(scores) else {},
    }
