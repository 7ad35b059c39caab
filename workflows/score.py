"""Score a whole cohort with a registered model: each recording once, into one Parquet file and one CSV.

From shards (--data), or from the recordings themselves (--source, --cohort): a folder or bucket of UK Biobank's
20205 XML, DICOM, WFDB and what else workflows/ingest.py reads, chosen by the same rules. Reader, preprocessing and
model are the same on both ways.

    python workflows/score.py --model models:/ph-12L@champion --data shards --output scores
    python workflows/score.py --model models:/ph-12L@champion --source s3://bucket/20205 --output s3://bucket/scores

The output holds scores-PLAN.parquet and .csv, and summary.json, which is written last: without it the output is not
finished. The same command again goes on where it was interrupted, and does nothing when all is there. Scores of
another model, or of other recordings, are never put beside them. Research use only: not a medical device.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from command import run_command, start_ray
from scoring.inputs import open_recordings, open_shards
from scoring.parts import SCHEMA, Job, PartScorer, part_path, unreadable_in
from scoring.progress import Progress
from tqdm import tqdm

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.storage import Storage, explained
from lsemvae.tracking import fetch

JOB, SUMMARY = "job.json", "summary.json"
TOO_MANY_UNREADABLE = 3  # exit status
CALLS_PER_ACTOR = 2  # one part is read while another is scored


@dataclass(frozen=True)
class Args:
    model: str
    """models:/NAME@champion, models:/NAME/VERSION, a bundle's folder or s3:// URI."""
    output: str
    """Where the scores go (folder or s3:// URI)."""
    data: str | None = None
    """Shards: the --output of workflows/ingest.py."""
    source: str | None = None
    """In place of --data, recordings: a folder or s3:// URI."""
    cohort: str = "auto"
    """Of --source: ukb-20205 (one recording a participant, without who has withdrawn), mimic-iv-ecg, ptb-xl, ludb,
    aspire, kardia, folder, or auto: recognised by the files that are there."""
    labels: str | None = None
    """Of --source: a CSV that says whose a recording is, or for ukb-20205 who belongs to the cohort."""
    limit: int | None = None
    """Of --source: only the first so many recordings."""
    max_unreadable: float = 0.05
    """Of --source: as soon as more than this share of the recordings is unreadable the command stops with status 3.
    What is finished is kept: with a larger share, or with recordings mended, the same command goes on."""
    threads: int = 8
    """Of --source: concurrent reads in each process."""
    actors: int = 1
    """Processes that hold the model."""
    use_gpu: bool = False
    """One GPU for each of them."""
    digest: str | None = None
    """The digest that the model must have, else nothing is scored."""


def main(args: Args) -> None:
    if (args.data is None) == (args.source is None):
        raise LsemvaeError("give either --data (shards) or --source (recordings)")
    if not 0 <= args.max_unreadable <= 1 or args.actors < 1 or args.threads < 1:
        raise LsemvaeError(
            f"max_unreadable={args.max_unreadable}, actors={args.actors}, threads={args.threads}: give a share, and "
            "1 or more"
        )
    output = Storage.open(args.output)
    uri, description = describe_model(args.model, args.digest)
    if args.data is not None:
        source = open_shards(args.data)
    else:
        source = open_recordings(args.source, args.cohort, args.labels, args.limit, args.threads)
    columns = {key: description[key] for key in ("model", "version", "digest", "preprocess_digest")}
    plan = hashlib.sha256(json.dumps([SCHEMA.names, columns, source.digest]).encode()).hexdigest()[:16]
    about = {"plan": plan, **description, "input": source.uri, "input_digest": source.digest}
    claim(output, about)
    if (summary := finished(output, plan)) is None:
        with Progress(output, about, source.records) as progress:
            claim(output, about)  # while this one waited, another may have taken the output, or finished
            if (summary := finished(output, plan)) is None:
                job = Job(plan, uri, columns, source, output, args.use_gpu)
                parts = score_parts(job, args, progress)
                claim(output, about)
                summary = commit(job, about, parts)
                claim(output, about)
                took = f"{progress.made} recordings scored in {progress.seconds:.0f} s"
                print(f"{took}, {progress.rate:.1f} recordings/s, after {progress.startup_s:.0f} s of starting")
    else:
        print(f"{output.uri} is complete: nothing to do.")
    show(summary, output)


def describe_model(model: str, digest: str | None) -> tuple[str, dict[str, Any]]:
    """The URI of exactly this version, and what names it. Raises LsemvaeError unless it can score."""
    with tempfile.TemporaryDirectory() as folder:
        fetched = fetch(model, Path(folder))
        bundle = describe(fetched.folder)
        name = fetched.name or Storage.open(model).base.rsplit("/", 1)[-1]
    if bundle.task is None:
        raise LsemvaeError(f"{model} is a pre-trained encoder, it has no task: fine-tune it first")
    if digest is not None and digest != bundle.digest:
        raise LsemvaeError(f"{model} has the digest {bundle.digest}, not {digest}: nothing is scored")
    return f"models:/{fetched.name}/{fetched.version}" if fetched.name else model, {
        "model": name,
        "version": fetched.version,
        "digest": bundle.digest,
        "preprocess_digest": bundle.preprocess.digest,
        "task": bundle.task,
        "leads": list(bundle.leads),
        "threshold": bundle.threshold,
        "calibrated": bundle.calibration is not None,
    }


def claim(output: Storage, about: dict[str, Any]) -> None:
    """The output is for this model on these recordings; raises LsemvaeError when it is another's.

    Files are named for the plan, so that not even two commands that look here at the same moment mix their scores:
    the one that writes summary.json last has the output, and the other hears it here.
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
    """The summary, if everything it names is there and whole."""
    try:
        summary = json.loads(output.read_bytes(SUMMARY))
        whole = all(sha256_of(output, name) == digest for name, digest in summary["files"].items())
    except FileNotFoundError:
        return None
    return summary if whole and summary["plan"] == plan else None


def sha256_of(output: Storage, name: str) -> str:
    with explained(output.path(name)), output.filesystem.open_input_stream(output.path(name)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def score_parts(job: Job, args: Args, progress: Progress) -> list[str]:
    """Every part on Ray Data -> their SHA-256 in order. Parts that were finished before are not made again."""
    start_ray(max(4, args.actors + 1))
    import ray.data

    count = len(job.source.parts)
    print(f"{job.source.records} recordings in {count} parts with {job.uri} (digest {job.model['digest']})", flush=True)
    dataset = ray.data.from_items([{"number": n} for n in range(count)], override_num_blocks=count).map(
        PartScorer,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(
            size=min(args.actors, count),
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        num_gpus=1 if args.use_gpu else None,
    )
    digests = {}
    with tqdm(total=job.source.records, desc="score", unit="records") as bar:
        for row in dataset.iter_rows():
            part = json.loads(row["result"])
            if failure := part.get("failure"):
                bar.close()
                raise StorageError(f"{failure}; what is finished is kept: the same command again goes on from there")
            progress.add(part)
            bar.update(part["records"])
            digests[part["number"]] = part["sha256"]
            if progress.unreadable > args.max_unreadable * job.source.records:
                bar.close()
                too_many(job, args, progress)
    assert sorted(digests) == list(range(count)) and progress.done == job.source.records
    return [digests[number] for number in range(count)]


def too_many(job: Job, args: Args, progress: Progress) -> None:
    codes = ", ".join(f"{code} {count}" for code, count in sorted(progress.refused.items()))
    progress.stop("failed")
    print(
        f"error: {progress.unreadable} of {job.source.records} recordings are unreadable, more than --max-unreadable "
        f"{args.max_unreadable:g} ({codes}): see {job.output.uri}/parts. Mend them, or allow more, and give the same "
        "command again",
        file=sys.stderr,
    )
    raise SystemExit(TOO_MANY_UNREADABLE)


def commit(job: Job, about: dict[str, Any], digests: list[str]) -> dict[str, Any]:
    """The parts as one Parquet file and one CSV, a part at a time, then the summary that makes them count."""
    names = [part_path(job.plan, number) for number in range(len(digests))]
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    scores: list[np.ndarray] = []
    parquet, csv = f"scores-{job.plan}.parquet", f"scores-{job.plan}.csv"
    with (
        ThreadPoolExecutor(8) as pool,
        whole_file(job.output, parquet) as parquet_stream,
        whole_file(job.output, csv) as csv_stream,
        pq.ParquetWriter(parquet_stream, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        pacsv.CSVWriter(csv_stream, SCHEMA) as csv_writer,
    ):
        for start in range(0, len(names), 64):  # read ahead, but not everything at once
            batch = slice(start, start + 64)
            for digest, content in zip(digests[batch], pool.map(job.output.read_bytes, names[batch]), strict=True):
                if hashlib.sha256(content).hexdigest() != digest:
                    raise LsemvaeError(f"a part in {job.output.uri}/parts changed: give the same command again")
                table = pq.read_table(pa.BufferReader(content)).replace_schema_metadata(None)
                writer.write_table(table)
                csv_writer.write_table(table)
                known = table["score"].drop_null().to_numpy()
                scores.append(known)
                refused.update(code for code in table["refused"].to_pylist() if code)
                positive = sum(table["decision"].drop_null().to_pylist())
                counts.update(records=table.num_rows, scored=len(known), positive=positive)
                counts["unreadable"] += len(unreadable_in(content))
    summary = about | {
        "records": counts["records"],
        "scored": counts["scored"],
        "positive": counts["positive"],
        "unreadable": counts["unreadable"],
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


@contextmanager
def whole_file(output: Storage, name: str) -> Iterator[IO[bytes]]:
    """A stream that becomes the file when the block ends without an error, in one step."""
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        with explained(output.path(name)):
            if not output.is_local:  # an S3 object appears when its upload is complete
                with output.filesystem.open_output_stream(output.path(name)) as stream:
                    shutil.copyfileobj(spool, stream, 2**20)
                return
            target = Path(output.path(name))
            partial = target.with_name(f".{name}.{secrets.token_hex(4)}.partial")
            with partial.open("wb") as stream:
                shutil.copyfileobj(spool, stream, 2**20)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)


def show(summary: dict[str, Any], output: Storage) -> None:
    refused = ", ".join(f"{code} {count}" for code, count in summary["refused"].items()) or "none"
    print(
        f"{summary['records']} recordings: {summary['scored']} scored, {summary['positive']} at or above the threshold "
        f"{summary['threshold']:.3f}; without a score: {refused}"
    )
    if summary["unreadable_at_ingest"]:
        print(f"unreadable at ingest, and in no row: {summary['unreadable_at_ingest']}, see {summary['input']}")
    histogram = summary["distribution"]["histogram"]
    tallest = max(histogram) or 1
    for tenth, count in enumerate(histogram):
        print(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {'█' * round(30 * count / tallest):30s} {count}")
    print(f"scores: {', '.join(f'{output.uri}/{name}' for name in summary['files'])}")
    print("Research use only: not a medical device.")


if __name__ == "__main__":
    run_command(main, Args)
