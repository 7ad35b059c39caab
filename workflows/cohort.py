"""What commands on whole cohorts share: the arguments, the model, and a Ray Data job that is resumed where it ended."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from command import start_ray
from options import RARE

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError
from lsemvae.progress import Bar
from lsemvae.scoring.drift import SCORE_BINS
from lsemvae.scoring.inputs import Recordings, Shards, open_recordings, open_shards
from lsemvae.scoring.output import claim, finished
from lsemvae.scoring.parts import MODEL_FIELDS, Failure, Job, PartMaker
from lsemvae.scoring.progress import Progress
from lsemvae.storage import Storage
from lsemvae.tracking import fetched

TOO_MANY_UNREADABLE = 3  # exit status
MODEL_COLUMNS = tuple(field.name for field in MODEL_FIELDS)


@dataclass(frozen=True)
class CohortArgs:
    model: str
    """models:/NAME@champion, models:/NAME/VERSION, a bundle's folder or s3:// URI."""
    output: str
    """Where the result goes (folder or s3:// URI)."""
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
    max_unreadable: Annotated[float, RARE] = 0.05
    """Of --source: the command stops with status 3 as soon as more than this share of the recordings is unreadable.
    Finished parts are kept: give the command again with a larger share, or with corrected recordings, to continue."""
    withdrawn: Annotated[str | None, RARE] = None
    """A list of subjects who have withdrawn, an identifier a line. They are left out, as are those of a withdrawn.csv
    in the source or beside the shards."""
    threads: Annotated[int, RARE] = 8
    """Of --source: concurrent reads in each process."""
    patience_s: Annotated[float, RARE] = 300
    """Of --source: how long a read waits for an object store that is overloaded before the command ends."""
    actors: int = 1
    """Number of processes, each with a copy of the model."""
    use_gpu: bool = False
    """Give each of these processes a GPU."""
    digest: Annotated[str | None, RARE] = None
    """The digest that the model must have; with another one the command ends."""

    def require_sense(self) -> None:
        """Raises LsemvaeError."""
        if (self.data is None) == (self.source is None):
            raise LsemvaeError("give either --data (shards) or --source (recordings)")
        if not 0 <= self.max_unreadable <= 1 or self.actors < 1 or self.threads < 1:
            raise LsemvaeError(
                f"max_unreadable={self.max_unreadable}, actors={self.actors}, threads={self.threads}: give a share, "
                "and 1 or more"
            )

    def open(self) -> Shards | Recordings:
        """The recordings. Raises LsemvaeError."""
        if self.data is not None:
            return open_shards(self.data, self.withdrawn)
        assert self.source is not None  # see `require_sense`
        return open_recordings(
            self.source,
            self.cohort,
            self.labels,
            self.limit,
            self.threads,
            withdrawn=self.withdrawn,
            patience_s=self.patience_s,
        )


def describe_model(model: str, digest: str | None, done: str = "scored") -> tuple[str, dict[str, Any]]:
    """The URI of exactly this version, and its description. Raises LsemvaeError unless the model can score."""
    with fetched(model) as found:
        bundle = describe(found.folder)
        name = found.name or Storage.open(model).base.rsplit("/", 1)[-1]
    if bundle.task is None:
        raise LsemvaeError(f"{model} is a pre-trained encoder, it has no task: fine-tune it first")
    if digest is not None and digest != bundle.digest:
        raise LsemvaeError(f"{model} has the digest {bundle.digest}, not {digest}: nothing is {done}")
    return f"models:/{found.name}/{found.version}" if found.name else model, {
        "model": name,
        "version": found.version,
        "digest": bundle.digest,
        "preprocess_digest": bundle.preprocess.digest,
        "task": bundle.task,
        "leads": list(bundle.leads),
        "threshold": bundle.threshold,
        "calibrated": bundle.calibration is not None,
        SCORE_BINS: bundle.provenance.get(SCORE_BINS),
    }


def complete(
    job: Job, about: dict[str, Any], make: Callable[[Progress], list[str]], commit: Callable[[list[str]], dict]
) -> tuple[dict[str, Any], Progress | None]:
    """The summary of the output, which is made where it is not complete, and then the progress, too.

    `make` gives the digests of all parts, `commit` writes what is made of them, summary.json last. Raises LsemvaeError
    where the output belongs to another plan, also when another command takes it meanwhile.
    """
    output = job.output
    claim(output, about)
    if (summary := finished(output, job.plan)) is not None:
        return summary, None
    with Progress(output, about, job.source.records) as progress:
        claim(output, about)  # while this one waited, another may have taken or finished the output
        if (summary := finished(output, job.plan)) is not None:
            return summary, None
        parts = make(progress)
        claim(output, about)
        summary = commit(parts)
        claim(output, about)
    return summary, progress


def make_parts(job: Job, args: CohortArgs, progress: Progress, verb: str, calls_per_actor: int) -> list[str]:
    """Makes every part on Ray Data -> the SHA-256 of each, in order. Finished parts are not made again."""
    start_ray(max(4, args.actors + 1))
    import ray.data

    count = len(job.source.parts)
    print(f"{job.source.records} recordings in {count} parts with {job.uri} (digest {job.model['digest']})", flush=True)
    dataset = ray.data.from_items([{"number": n} for n in range(count)], override_num_blocks=count).map(
        PartMaker,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(
            size=min(args.actors, count),
            max_concurrent_calls_per_actor=calls_per_actor,
            enable_true_multi_threading=True,
        ),
        num_gpus=1 if args.use_gpu else None,
    )
    digests = {}
    with Bar(job.source.records, verb, "records") as bar:
        for row in dataset.iter_rows():
            part = json.loads(row["result"])
            if "failure" in part:
                bar.close()
                raise Failure(**part).error()
            progress.add(part)
            bar.update(part["records"])
            digests[part["number"]] = part["sha256"]
            if progress.unreadable > args.max_unreadable * job.source.records:
                bar.close()
                _too_many_unreadable(job, args, progress)
    assert sorted(digests) == list(range(count)) and progress.done == job.source.records
    return [digests[number] for number in range(count)]


def _too_many_unreadable(job: Job, args: CohortArgs, progress: Progress) -> None:
    codes = ", ".join(f"{code} {count}" for code, count in sorted(progress.unreadable_codes.items()))
    progress.stop("failed")
    print(
        f"error: {progress.unreadable} of {job.source.records} recordings are unreadable, more than --max-unreadable "
        f"{args.max_unreadable:g} ({codes}): see {job.output.uri}/parts. Correct them, or allow more, and give the "
        "same command again",
        file=sys.stderr,
    )
    raise SystemExit(TOO_MANY_UNREADABLE)


def without_a_score(summary: dict[str, Any]) -> str:
    """How many recordings have no score and why, for people."""
    unreadable = Counter(summary["unreadable_codes"])
    refused = Counter(summary["refused"]) - unreadable
    return (
        f"{refused.total()} refused by the model's preprocessing{_counted(refused)}, "
        f"{unreadable.total()} unreadable{_counted(unreadable)}"
    )


def _counted(codes: Counter[str]) -> str:
    shown = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    return f" ({shown})" if shown else ""
