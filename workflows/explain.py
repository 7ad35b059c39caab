"""Explain the scores of a cohort: which leads and which waves they depend on, and whether that is true.

The input is shards (--data) or original recordings (--source), as for workflows/score.py. Each recording is explained
once, in parts; the driver then summarises them, checks the explanations, and draws some of them.

    python workflows/explain.py --model models:/ph-12L@champion --data shards --output explained
    python workflows/explain.py --model models:/ph-12L@champion --data shards --output three --records 101,102,103

The output is report.html, which needs no other file; explanations-PLAN.parquet and .csv, a row for each recording;
summary.csv, means over subjects by label and subgroup; checks-….csv; pictures/RECORD-….png and .svg; and
summary.json, which is written last: without it the output is not complete. The same command again continues where it
was interrupted. Explanations of another model, of other recordings or with other settings are refused there. Research
use only: not a medical device.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import numpy as np
import pandas as pd
from cohort import MODEL_COLUMNS, CohortArgs, complete, describe_model, make_parts, without_a_score
from command import run_command
from options import RARE

from lsemvae.bundle import describe
from lsemvae.data.shards import LABEL_PREFIX
from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Baseline, Settings
from lsemvae.explain.checks import Effort
from lsemvae.progress import Bar
from lsemvae.reports.explained import REPORT, commit
from lsemvae.scoring import chosen, explaining
from lsemvae.scoring.inputs import CohortInput, Recordings, Shards, open_shards
from lsemvae.scoring.parts import Failure, Job
from lsemvae.storage import Storage
from lsemvae.tracking import fetched

REFERENCES = {"mean-beat": 32, "expected": Settings.references}
"""How many recordings a baseline is made of."""


@dataclass(frozen=True)
class Args(CohortArgs):
    limit: int | None = None
    """Explain only the first recordings, this many."""
    records: str | None = None
    """Explain only these recordings: their ids, separated by commas, or a file with one on each line."""
    task: str | None = None
    """The label that the table and its groups have. By default the model's task, if the data has such a label."""
    baseline: Baseline = "zero"
    """What a recording is compared with: no signal (zero), the mean beat of reference recordings at each of its beats
    (mean-beat), or reference recordings (expected; one after the other, and then the mean)."""
    reference: Annotated[str | None, RARE] = None
    """Of --baseline mean-beat and expected: shards with the reference recordings, by default --data. A seeded sample of
    its recordings without the label is used, or of all if the label is not known."""
    bound: Annotated[float, RARE] = Settings.bound
    """The largest convergence delta, as a share of the explained difference: more steps are taken to meet it."""
    steps: Annotated[int, RARE] = Settings.steps
    """Points between the baseline and the recording, at least."""
    most_steps: Annotated[int, RARE] = Settings.most_steps
    """Where the bound does not hold with so many, the recording's notes say what is left."""
    encoder: Annotated[str | None, RARE] = None
    """The pre-trained encoder of the model, as models:/NAME@candidate: the rows then have each lead's gate weight and
    share of the precision. A model with the features `fused` needs none."""
    igar: Annotated[bool, RARE] = False
    """Compute the authors' attribution ratio too, which takes 50 more steps a recording."""
    pictures: int = 6
    """How many recordings are drawn: the first of --records, otherwise those with the highest scores."""
    checks: int = 32
    """How many recordings the checks use, a seeded sample; 0 for none. They take much longer than explaining."""
    simulated: Annotated[bool, RARE] = False
    """The model was trained on the label `ph` of a simulated cohort (workflows/simulate.py): check, too, whether
    attributions find the leads and waves that this label depends on."""
    effort: Annotated[Effort, RARE] = field(default_factory=Effort)


def main(args: Args) -> None:
    require_sense(args)
    cohort = replace(args, limit=None).open()
    job, about, asked = planned(args, cohort)
    summary, progress = complete(
        job,
        about,
        make=lambda progress: make_parts(job, args, progress, "explain", calls_per_actor=1),
        commit=lambda parts: commit(job, about, parts, cohort, partial(explained_again, job, asked)),
    )
    if progress is None:
        print(f"{job.output.uri} is complete: nothing to do.")
    else:
        took = f"{progress.made} recordings explained in {progress.seconds:.0f} s"
        print(f"{took}, {progress.rate:.1f} recordings/s, after {progress.startup_s:.0f} s of starting")
    show(summary, job.output)


def planned(args: Args, cohort: Shards | Recordings) -> tuple[Job, dict[str, Any], explaining.Asked]:
    """What is explained, with what, and how. Raises LsemvaeError."""
    uri, description = describe_model(args.model, args.digest, "explained")
    if args.simulated and (description["task"] != "ph" or not args.checks):
        raise LsemvaeError("--simulated is one of the --checks of a model for the label ph: leave it out")
    table = chosen.table_of(cohort)
    ids = record_ids(args.records) if args.records is not None else []
    rows = chosen.rows_of(table, ids, cohort.uri) if ids else list(range(len(table)))
    rows = rows[: args.limit]
    label = label_of(table.iloc[rows], args.task, description["task"], cohort.uri)
    reference, which = reference_of(args, cohort, label)
    settings = Settings(args.baseline, args.steps, args.bound, args.most_steps)
    encoder, encoder_digest = encoder_of(args.encoder)
    people = explaining.people_in(table.columns)
    asked = explaining.Asked(settings, label, people, reference, encoder, args.igar, args.effort, args.simulated)
    source = chosen.choose(cohort, rows, asked.labels, explaining.PART_RECORDS)
    product = explaining.explanations(description["leads"], asked)
    columns = {key: description[key] for key in MODEL_COLUMNS}
    told = asdict(settings) | {"label": label, "reference": which, "records": ids}
    told |= {"encoder": encoder_digest, "igar": args.igar, "simulated": args.simulated}
    told |= {"pictures": args.pictures, "checks": args.checks, "effort": asdict(args.effort)}
    plan = hashlib.sha256(json.dumps([product.schema.names, columns, source.digest, told]).encode()).hexdigest()[:16]
    about = {"plan": plan, "holds": product.name, **description}
    about |= {"input": source.uri, "input_digest": source.digest, "settings": told}
    return Job(plan, uri, columns, source, Storage.open(args.output), args.use_gpu, product), about, asked


def explained_again(
    job: Job, asked: explaining.Asked, shown: CohortInput | None, checked: CohortInput | None
) -> explaining.Again:
    """`explain_again` in a Ray worker, as the parts: a GPU, and numbers that are the same at every start."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if job.use_gpu else 0)(with_progress)
    with Bar(None, "check", "steps") as bar:
        for told in task.remote(job, asked, shown, checked):
            made = ray.get(told)
            if isinstance(made, dict):
                bar.set_total(made["of"])
                bar.update(made["done"] - bar.done)
    if isinstance(made, Failure):
        raise made.error()
    return made


def with_progress(
    job: Job, asked: explaining.Asked, shown: CohortInput | None, checked: CohortInput | None
) -> Iterator[dict[str, int] | explaining.Again | Failure]:
    """How far the checks are, each second, and at last what `explain_again` returns."""
    said: SimpleQueue[dict[str, int]] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(
            explaining.explain_again, job, asked, shown, checked, lambda done, of: said.put({"done": done, "of": of})
        )
        while not wait([made], timeout=1).done:
            latest = None
            while not said.empty():
                latest = said.get()
            if latest:
                yield latest
    yield made.result()


def require_sense(args: Args) -> None:
    """Raises LsemvaeError."""
    args.require_sense()
    if min(args.pictures, args.checks) < 0 or (args.limit is not None and args.limit < 1):
        raise LsemvaeError(
            f"pictures={args.pictures}, checks={args.checks}, limit={args.limit}: give 0 or more, and a limit of at "
            "least 1"
        )
    if args.reference is not None and args.baseline == "zero":
        raise LsemvaeError("--reference is for --baseline mean-beat and expected: the baseline zero needs none")


def record_ids(records: str) -> list[str]:
    """The ids of --records, each once. Raises LsemvaeError."""
    text, is_file = records, records.startswith(("s3://", "file://"))
    with suppress(OSError):  # an id can be longer than any name of a file
        is_file = is_file or ("," not in records and Path(records).is_file())
    if is_file:
        try:
            text = Storage.open(records).read_bytes("").decode()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            raise LsemvaeError(f"--records {records} is no text file: give one with an id on each line") from None
    found = dict.fromkeys(part.strip() for part in text.replace("\n", ",").split(","))
    found.pop("", None)
    if not found:
        raise LsemvaeError(f"--records {records!r} names no recording: give ids separated by commas, or a file")
    return list(found)


def label_of(table: pd.DataFrame, asked: str | None, task: str, where: str) -> str | None:
    """The label that the rows have: the one asked for, else the model's task where it is known. Raises LsemvaeError."""
    name = asked if asked is not None else task
    if LABEL_PREFIX + name not in table.columns:
        if asked is None:
            return None
        known = ", ".join(column.removeprefix(LABEL_PREFIX) for column in table.columns[1:]) or "none"
        raise LsemvaeError(f"{where} has no label {name!r}: it has {known}")
    values = table[LABEL_PREFIX + name].dropna()
    if values.isin([0, 1]).all() and len(values):
        return name
    if asked is None:
        return None
    said = "is known of none of them" if values.empty else "has other values than 0 and 1"
    raise LsemvaeError(
        f"{where}: of {len(table)} recordings to explain, the label {name!r} {said}: choose another --task"
    )


def encoder_of(model: str | None) -> tuple[str | None, str | None]:
    """The URI of exactly this version, and its digest. Raises LsemvaeError where it is no encoder."""
    if model is None:
        return None, None
    with fetched(model) as found:
        bundle = describe(found.folder)
    if bundle.task is not None:
        raise LsemvaeError(
            f"--encoder {model} is a classifier ({bundle.task}): give the pre-trained encoder of --model"
        )
    return f"models:/{found.name}/{found.version}" if found.name else model, bundle.digest


def reference_of(args: Args, cohort: Shards | Recordings, label: str | None) -> tuple[CohortInput | None, str | None]:
    """The recordings of the baseline, and which they are: a sample of those without the label where it is known."""
    if args.baseline == "zero":
        return None, None
    source = open_shards(args.reference, args.withdrawn) if args.reference is not None else cohort
    table = chosen.table_of(source)
    column = f"{LABEL_PREFIX}{label}"
    negative = np.flatnonzero(table[column] == 0).tolist() if column in table.columns else []
    rows = chosen.sample(negative or list(range(len(table))), REFERENCES[args.baseline])
    reference = chosen.choose(source, rows, (), explaining.PART_RECORDS)
    which = f" of those whose label {label} is 0" if negative else ""
    return reference, f"{len(rows)} recordings{which} in {source.uri} ({reference.digest})"


def show(summary: Mapping[str, Any], output: Storage) -> None:
    print(
        f"{summary['records']} recordings: {summary['scored']} explained, {summary['without_beats']} of them by lead "
        f"only, for want of a beat; not explained: {without_a_score(summary)}"
    )
    if summary["unreadable_at_ingest"]:
        print(f"unreadable at ingest, and in no row: {summary['unreadable_at_ingest']}, see {summary['input']}")
    if summary["matters"]:
        print("share of the attribution, means over subjects with 95 % intervals:")
    for row in summary["matters"]:
        name = row["wave"] if row["lead"] == "all" else row["lead"]
        absolute, signed = (
            f"{100 * row[kind]:.1f} % ({100 * row[f'{kind}_low']:.1f} to {100 * row[f'{kind}_high']:.1f})"
            for kind in ("absolute", "signed")
        )
        print(f"  {name:5s} {absolute:28s} with sign {signed}")
    if summary["settings"]["label"] is None:
        print(f"the label {summary['task']} is not known here, so there are no groups by label: see --task")
    files = list(summary["files"])
    if summary["scored"]:
        print(f"report: {output.uri}/{REPORT}; {summary['checked']} recordings in its checks")
    else:
        print("no recording was explained, so there is no report: the column reason of the table says why")
    print(f"tables: {', '.join(f'{output.uri}/{name}' for name in files if name.endswith(('.parquet', '.csv')))}")
    if summary["drawn"]:
        print(f"pictures of {summary['drawn']} recordings: {output.uri}/pictures")
    print("Research use only: not a medical device.")


if __name__ == "__main__":
    run_command(main, Args)
