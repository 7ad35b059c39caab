"""Turn recordings into shards: any cohort, from a folder or S3, into Parquet in a folder or S3.

No recording is rejected for its quality; doubts become flags. Unreadable recordings are listed with their reason in
unreadable.csv beside the shards, other files that are left out in left_out.csv, and report.html describes the data
set. The same command again continues where it stopped.

A data set consists of the shards that its manifest names. Several ingests into one output do not disturb each other:
equal ones write equal files, and of different ones the first to finish keeps the output.
"""

import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import pandas as pd
from command import run_command, start_ray
from options import RARE

from lsemvae.cohorts import Selection, describe_left_out, select
from lsemvae.cohorts.mimic_iv_echo import EchoOptions
from lsemvae.data.ingest import Job, Made, Task, make_plan, make_shards
from lsemvae.data.shards import LABEL_PREFIX, MANIFEST, UNREADABLE, Manifest, ShardedDataset, label_counts
from lsemvae.errors import LsemvaeError
from lsemvae.progress import Bar
from lsemvae.storage import Storage

REPORT = "report.html"
LEFT_OUT = "left_out.csv"
TOO_MANY_UNREADABLE = 3  # exit status


@dataclass(frozen=True)
class Args:
    source: str
    """Recordings: a folder, file:// or s3:// URI. For a public bucket at AWS add ?anonymous=true."""
    output: str
    """Where the shards and their manifest go (folder or s3:// URI)."""
    cohort: str = "auto"
    """mimic-iv-ecg, mimic-iv-echo, echonext, ptb-xl, ludb, aspire, ukb-20205, kardia, folder, or auto: recognised by
    the files of the source."""
    labels: str | None = None
    """A CSV with a key column (path, record_id, study_id, file, ecg_id or subject_id) and columns of labels: numbers,
    yes and no, or true and false. Pressures (mpap_mmhg, pawp_mmhg) and other documented measurements give the labels
    of docs/labels.md. A column patient_id says whose a recording is."""
    withdrawn: str | None = None
    """A list of subjects who have withdrawn, an identifier a line. They are left out, as are those of a withdrawn.csv
    in the source."""
    echo_days: Annotated[float | None, RARE] = None
    """Of mimic-iv-echo: an ECG gets the labels of its patient's echocardiogram that is nearest in time, if that is at
    most this many days before or after it. 90 unless given."""
    echo_columns: Annotated[tuple[str, ...], RARE] = ()
    """Of mimic-iv-echo: what your release calls the columns and measurements of structured_measurement.csv, as pairs:
    subject=subject_id time=measurement_datetime name=measurement value=result unit=unit type=test_type pasp=pasp
    tr_velocity=tr_velocity tr_gradient=tr_mmhg rv_function=rv_function ivc=ivc. These are the defaults; give those that
    differ."""
    val_share: float = 0.1
    """Share of subjects held out for validation in pre-training."""
    seed: Annotated[int, RARE] = 0
    """Decides which subjects are held out and the order of recordings in the shards."""
    shard_records: Annotated[int, RARE] = 256
    """Recordings in each shard."""
    limit: int | None = None
    """Use only the first recordings of the source, this many."""
    max_unreadable: float = 0.05
    """The command stops with status 3 as soon as more than this share of all recordings is unreadable. Finished shards
    are kept: give the command again with a larger share, or with corrected recordings, to continue."""
    threads: Annotated[int, RARE] = 16
    """Concurrent reads in each task, at most."""
    concurrent_reads: Annotated[int, RARE] = 256
    """Concurrent reads on the whole cluster, at most. An object store that gets too many answers SlowDown."""
    patience_s: Annotated[float, RARE] = 300
    """How long a task waits for an object store that is overloaded before the command ends."""


def main(args: Args) -> None:
    source, output = Storage.open(args.source).require(), Storage.open(args.output)
    if not 0 <= args.val_share < 1 or not 0 <= args.max_unreadable <= 1:
        raise LsemvaeError(
            f"val_share={args.val_share}, max_unreadable={args.max_unreadable}: give shares from 0 to 1, val_share "
            "below 1"
        )
    if min(args.shard_records, args.threads, args.concurrent_reads) < 1 or args.patience_s < 0:
        raise LsemvaeError(
            f"shard_records={args.shard_records}, threads={args.threads}, concurrent_reads={args.concurrent_reads}, "
            f"patience_s={args.patience_s:g}: give 1 or more, and 0 or more seconds"
        )
    has_echo = args.echo_days is not None or args.echo_columns
    echo = EchoOptions.of(args.echo_days, args.echo_columns) if has_echo else None
    with Bar(None, "find recordings"):
        chosen = select(source, args.cohort, args.labels, args.limit, args.withdrawn, echo)
    table, tasks, plan = make_plan(
        chosen.table,
        chosen.name,
        source.uri,
        shard_records=args.shard_records,
        val_share=args.val_share,
        seed=args.seed,
    )
    if _already_holds(output, plan):
        if not output.exists(REPORT):  # the command was killed between manifest and report
            write_report(output)
        ShardedDataset.open(output.uri).verify()
        print(f"{output.uri} already holds this data set, and its shards are whole: nothing to do.")
        return
    subjects = table["subject_id"].nunique()
    print(f"{chosen.name}: {len(table)} recordings of {subjects} subjects into {len(tasks)} shards")
    if chosen.left_out:
        print(f"left out:   {describe_left_out(chosen.left_out)}; all are listed in {output.uri}/{LEFT_OUT}")
    started = time.monotonic()
    labels = [name.removeprefix(LABEL_PREFIX) for name in table.columns if name.startswith(LABEL_PREFIX)]
    job = Job(plan, source, output, labels, chosen.cohort.uv_per_lsb, args.threads, args.patience_s)
    made = make_all(table, tasks, job, args)
    done = _already_holds(output, plan)  # another ingest may have finished first
    write_csv(output, UNREADABLE, ["path", "code", "reason"], made.unreadable)
    write_csv(output, LEFT_OUT, ["path", "code", "reason"], [asdict(file) for file in chosen.left_out])
    require_readable(made, table, args, output)
    manifest = describe(chosen, table, made, plan, args)
    if not done:
        output.write_bytes(MANIFEST, manifest.to_json().encode())
        _already_holds(output, plan)  # or at the same moment: the one written last counts
    write_report(output)
    summarise(manifest, made.unreadable, output, time.monotonic() - started)


def require_readable(made: Made, table: pd.DataFrame, args: Args, output: Storage) -> None:
    """Ends the command when too many recordings, or all of them, are unreadable."""
    unreadable = made.unreadable
    if len(unreadable) > args.max_unreadable * len(table):
        print(
            f"error: {len(unreadable)} of {len(table)} recordings are unreadable, more than --max-unreadable "
            f"{args.max_unreadable:g}: see {output.uri}/{UNREADABLE}. Correct them, or allow more, and give the same "
            f"command again; the first: {unreadable[0]['reason']}",
            file=sys.stderr,
        )
        raise SystemExit(TOO_MANY_UNREADABLE)
    if len(unreadable) == len(table):
        raise LsemvaeError(
            f"none of the {len(table)} recordings of {args.source} can be read, the first because "
            f"{unreadable[0]['reason']}; all are listed in {output.uri}/{UNREADABLE}"
        )


def describe(chosen: Selection, table: pd.DataFrame, made: Made, plan: str, args: Args) -> Manifest:
    readable = table[~table["path"].isin([row["path"] for row in made.unreadable])]
    labels = [name for name in table.columns if name.startswith(LABEL_PREFIX)]
    return Manifest(
        source=Storage.open(args.source).uri,
        cohort=chosen.name,
        plan=plan,
        records=sum(shard.rows for shard in made.shards),
        subjects=int(readable["subject_id"].nunique()),
        unreadable=len(made.unreadable),
        labels={name.removeprefix(LABEL_PREFIX): label_counts(readable[name].to_numpy(float)) for name in labels},
        shards=made.shards,
        config={name: value for name, value in asdict(args).items() if name not in ("source", "output")},
        flags=dict(made.flags),
        flagged=dict(made.flagged),
    )


def _already_holds(output: Storage, plan: str) -> bool:
    """Whether the output holds the data set of this plan; raises LsemvaeError when it holds another one."""
    if not output.exists(MANIFEST):
        return False
    if ShardedDataset.open(output.uri).manifest.plan != plan:
        raise LsemvaeError(f"{output.uri} already holds another data set: choose another --output")
    return True


def make_all(table: pd.DataFrame, tasks: list[Task], job: Job, args: Args) -> Made:
    """Every task on Ray Data; it ends early when more than `max_unreadable` of the recordings cannot be read."""
    start_ray()
    made = Made()
    with Bar(len(table), "ingest", "records") as bar:
        for summary in make_shards(table, tasks, job, args.concurrent_reads):
            made.add(summary)
            bar.update(summary["shard"]["rows"] + len(summary["unreadable"]))
            if len(made.unreadable) > args.max_unreadable * len(table):
                break
    return made.in_order()


def write_csv(output: Storage, name: str, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    output.write_bytes(name, text.getvalue().encode())


def write_report(output: Storage) -> None:
    from lsemvae.reports.ingest import ingest_report  # imports matplotlib and scipy, which nothing else here needs

    unreadable = list(csv.DictReader(io.StringIO(output.read_bytes(UNREADABLE).decode())))
    with Bar(None, "write report"):
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
    if manifest.flagged:
        flagged = ", ".join(f"{kind} {count}" for kind, count in sorted(manifest.flagged.items()))
        print(f"flagged:    {flagged} (recordings; one recording can have several flags)")
    for name, counts in manifest.labels.items():
        print(
            f"label {name}: {counts['0']} at 0, {counts['1']} at 1, "
            f"{counts['other']} at other values, {counts['null']} absent"
        )
    print(f"took:       {seconds:.0f} s, {(manifest.records + len(unreadable)) / seconds:.0f} recordings/s")
    print(f"shards:     {output.uri}, described in {output.uri}/{REPORT}")
    print(f"next:       python workflows/pretrain.py RECIPE --data {output.uri} --storage …")


if __name__ == "__main__":
    run_command(main, Args)
