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
from dataclasses import dataclass
from typing import Any

from cohort import MODEL_COLUMNS, CohortArgs, complete, describe_model, make_parts, without_a_score
from command import run_command

from lsemvae.scoring.drift import DRIFT, LEAST_SCORES
from lsemvae.scoring.output import commit
from lsemvae.scoring.parts import Job
from lsemvae.scoring.scores import SCORES
from lsemvae.storage import Storage

CALLS_PER_ACTOR = 2  # one part is read while another is scored


@dataclass(frozen=True)
class Args(CohortArgs):
    pass


def main(args: Args) -> None:
    args.require_sense()
    output = Storage.open(args.output)
    uri, description = describe_model(args.model, args.digest)
    source = args.open()
    columns = {key: description[key] for key in MODEL_COLUMNS}
    plan = hashlib.sha256(json.dumps([SCORES.schema.names, columns, source.digest]).encode()).hexdigest()[:16]
    about = {"plan": plan, **description, "input": source.uri, "input_digest": source.digest}
    job = Job(plan, uri, columns, source, output, args.use_gpu, SCORES)
    summary, progress = complete(
        job,
        about,
        make=lambda progress: make_parts(job, args, progress, "score", CALLS_PER_ACTOR),
        commit=lambda parts: commit(job, about, parts),
    )
    if progress is None:
        print(f"{output.uri} is complete: nothing to do.")
    else:
        took = f"{progress.made} recordings scored in {progress.seconds:.0f} s"
        print(f"{took}, {progress.rate:.1f} recordings/s, after {progress.startup_s:.0f} s of starting")
    show(summary, output)
    given = f"--data {args.data}" if args.data else f"--source {args.source}"
    print(f"next: python workflows/explain.py --model {args.model} {given} --output …")
    print("Research use only: not a medical device.")


def show(summary: dict[str, Any], output: Storage) -> None:
    print(
        f"{summary['records']} recordings: {summary['scored']} scored, {summary['positive']} at or above the threshold "
        f"{summary['threshold']:.3f}; without a score: {without_a_score(summary)}"
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
    print(drift(summary["drift"]))
    print(f"scores: {', '.join(f'{output.uri}/{name}' for name in summary['files'])}, summary.json")


def drift(found: dict[str, Any] | None) -> str:
    """How far the scores are from those of the model's training cohort, as a line."""
    if found is None:
        return "drift: not measured, because the model does not say how its training cohort scored"
    counted = sum(found["counts"])
    if not found["judged"]:
        return f"drift: not judged, because {counted} scores are fewer than {LEAST_SCORES}"
    verdict = (
        "the scores have another distribution: do not trust threshold and probabilities here before you have checked "
        "them, see docs/monitoring.md"
        if found["index"] >= DRIFT
        else "the scores are distributed like those"
    )
    return f"drift: index {found['index']:.2f} against the training cohort (limit {DRIFT:g}): {verdict}"


if __name__ == "__main__":
    run_command(main, Args)
