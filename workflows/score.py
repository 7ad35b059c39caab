"""Score a whole cohort with a registered model: each recording once, into one Parquet file and one CSV.

The input is shards (--data), or original recordings (--source, --cohort): a folder or bucket of UK Biobank's 20205 XML,
DICOM, WFDB and every other format that workflows/ingest.py reads, selected by the same rules. Readers, preprocessing
and model are the same for both.

    python workflows/score.py --model models:/ph-12L@champion --data shards --output scores
    python workflows/score.py --model models:/ph-12L@champion --source s3://bucket/20205 --output s3://bucket/scores

The output is scores-PLAN.parquet and .csv, and summary.json, which is written last: without it the output is not
complete. The same command again continues where it was interrupted, and does nothing when the output is complete.
Scores of another model, or of other recordings, are refused there. Research use only: not a medical device.
"""

import hashlib
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import run_command, start_ray
from tqdm import tqdm

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.scoring.inputs import CohortInput, open_recordings, open_shards
from lsemvae.scoring.output import claim, commit, finished
from lsemvae.scoring.parts import SCHEMA, Job, PartScorer
from lsemvae.scoring.progress import Progress
from lsemvae.storage import Storage
from lsemvae.tracking import fetch

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
    """Of --source: mimic-iv-ecg, mimic-iv-echo, echonext, ptb-xl, ludb, aspire, ukb-20205 (one recording for each
    participant), kardia, folder, or auto: recognised by the files of the source."""
    labels: str | None = None
    """Of --source: a CSV that says whose a recording is, or for ukb-20205 who belongs to the cohort."""
    limit: int | None = None
    """Of --source: use only the first recordings, this many."""
    max_unreadable: float = 0.05
    """Of --source: the command stops with status 3 as soon as more than this share of the recordings is unreadable.
    Finished parts are kept: give the command again with a larger share, or with corrected recordings, to continue."""
    withdrawn: str | None = None
    """A list of subjects who have withdrawn, an identifier a line. They are left out, as are those of a withdrawn.csv
    in the source or beside the shards."""
    threads: int = 8
    """Of --source: concurrent reads in each process."""
    patience_s: float = 300
    """Of --source: how long a read waits for an object store that is overloaded before the command ends."""
    actors: int = 1
    """Number of processes that score, each with a copy of the model."""
    use_gpu: bool = False
    """Give each of these processes a GPU."""
    digest: str | None = None
    """The digest that the model must have; with another one nothing is scored."""


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
    source: CohortInput
    if args.data is not None:
        source = open_shards(args.data, args.withdrawn)
    else:
        source = open_recordings(
            args.source,
            args.cohort,
            args.labels,
            args.limit,
            args.threads,
            withdrawn=args.withdrawn,
            patience_s=args.patience_s,
        )
    columns = {key: description[key] for key in ("model", "version", "digest", "preprocess_digest")}
    plan = hashlib.sha256(json.dumps([SCHEMA.names, columns, source.digest]).encode()).hexdigest()[:16]
    about = {"plan": plan, **description, "input": source.uri, "input_digest": source.digest}
    claim(output, about)
    if (summary := finished(output, plan)) is None:
        with Progress(output, about, source.records) as progress:
            claim(output, about)  # while this one waited, another may have taken or finished the output
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
    """The URI of exactly this version, and its description. Raises LsemvaeError unless the model can score."""
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


def score_parts(job: Job, args: Args, progress: Progress) -> list[str]:
    """Scores every part on Ray Data -> the SHA-256 of each, in order. Finished parts are not made again."""
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
                raise StorageError(f"{failure}; finished parts are kept: give the same command again to continue")
            progress.add(part)
            bar.update(part["records"])
            digests[part["number"]] = part["sha256"]
            if progress.unreadable > args.max_unreadable * job.source.records:
                bar.close()
                too_many(job, args, progress)
    assert sorted(digests) == list(range(count)) and progress.done == job.source.records
    return [digests[number] for number in range(count)]


def too_many(job: Job, args: Args, progress: Progress) -> None:
    codes = ", ".join(f"{code} {count}" for code, count in sorted(progress.unreadable_codes.items()))
    progress.stop("failed")
    print(
        f"error: {progress.unreadable} of {job.source.records} recordings are unreadable, more than --max-unreadable "
        f"{args.max_unreadable:g} ({codes}): see {job.output.uri}/parts. Correct them, or allow more, and give the "
        "same command again",
        file=sys.stderr,
    )
    raise SystemExit(TOO_MANY_UNREADABLE)


def counted(codes: Counter[str]) -> str:
    shown = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    return f" ({shown})" if shown else ""


def show(summary: dict[str, Any], output: Storage) -> None:
    unreadable = Counter(summary["unreadable_codes"])
    refused = Counter(summary["refused"]) - unreadable
    print(
        f"{summary['records']} recordings: {summary['scored']} scored, {summary['positive']} at or above the threshold "
        f"{summary['threshold']:.3f}; without a score: {refused.total()} refused by the model's preprocessing"
        f"{counted(refused)}, {unreadable.total()} unreadable{counted(unreadable)}"
    )
    if summary["limited"]:
        print(
            f"of limited reliability: {summary['limited']} of the scores, because of missing or derived leads or "
            "quality flags; see the columns reliability and reliability_reasons"
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
