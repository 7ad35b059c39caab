"""The files of a run of explanations: tables, checks, pictures and the report, made when all parts are there."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.explain.checks import Checks
from lsemvae.explain.cohort import igar_summary, summary
from lsemvae.explain.explainer import Explanation
from lsemvae.reports.explanation import Image, Shown, explanation_report, record_pictures
from lsemvae.scoring import chosen
from lsemvae.scoring.explaining import PART_RECORDS, Again
from lsemvae.scoring.inputs import CohortInput, Recordings, Shards
from lsemvae.scoring.output import write_summary, write_tables
from lsemvae.scoring.parts import Job
from lsemvae.storage import Storage

REPORT, SUMMARY_TABLE = "report.html", "summary.csv"


def commit(
    job: Job,
    about: dict[str, Any],
    parts: list[str],
    cohort: Shards | Recordings,
    again: Callable[[CohortInput | None, CohortInput | None], Again],
) -> dict[str, Any]:
    """Writes the tables, the cohort's summary, the checks, pictures and the report, then summary.json.

    `again(shown, checked)` explains recordings once more, see `lsemvae.scoring.explaining.explain_again`.
    """
    names, counts = write_tables(job, parts)
    records = pq.read_table(pa.BufferReader(job.output.read_bytes(names[0]))).to_pandas()
    rows, told = records[records["score"].notna()], about["settings"]
    facts: dict[str, Any] = {"drawn": 0, "checked": 0, "without_beats": int((rows["beats"] == 0).sum()), "matters": []}
    if len(rows):
        means = summary(rows, about["leads"])
        to_draw, to_check = drawn(rows, told["records"], told["pictures"]), checked(rows, told["checks"])
        made = again(some_of(cohort, to_draw), some_of(cohort, to_check))
        names.append(write(job.output, SUMMARY_TABLE, csv(means)))
        names += [write(job.output, f"checks-{name}.csv", csv(table)) for name, table in tables_of(made.checks).items()]
        drawings = [
            draw(job.output, record_id, made.shown[record_id]) for record_id in to_draw if record_id in made.shown
        ]
        names += [name for _, files in drawings for name in files]
        igar = igar_summary(rows, about["leads"]) if told["igar"] else None
        names += [write(job.output, "igar.csv", csv(igar))] if igar is not None else []
        report = explanation_report(
            facts_of(about), records, means, made.checks, [shown for shown, _ in drawings], igar
        )
        names.append(write(job.output, REPORT, report.encode()))
        facts |= {"drawn": len(drawings), "checked": made.checks.records if made.checks else 0}
        facts["matters"] = what_matters(means)
    return write_summary(job.output, about | counts | facts, names)


def drawn(rows: pd.DataFrame, asked: Sequence[str], count: int) -> list[str]:
    """The ids of the recordings that are drawn: the first that were asked for, or those with the highest scores."""
    if asked:
        explained = set(rows["record_id"])
        return [record_id for record_id in asked if record_id in explained][:count]
    return rows.sort_values("score", ascending=False, kind="stable")["record_id"].head(count).tolist()


def checked(rows: pd.DataFrame, count: int) -> list[str]:
    """The ids of a seeded sample."""
    return rows["record_id"].iloc[chosen.sample(range(len(rows)), count)].tolist()


def some_of(cohort: Shards | Recordings, record_ids: Sequence[str]) -> CohortInput | None:
    if not record_ids:
        return None
    rows = chosen.rows_of(chosen.table_of(cohort), record_ids, cohort.uri)
    return chosen.choose(cohort, rows, (), PART_RECORDS)


def tables_of(checks: Checks | None) -> dict[str, pd.DataFrame]:
    """The tables of the checks that were made, by name."""
    return {name: table for name, table in vars(checks).items() if isinstance(table, pd.DataFrame)} if checks else {}


def write(output: Storage, name: str, content: bytes) -> str:
    output.write_bytes(name, content)
    return name


def csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def draw(output: Storage, record_id: str, explanation: Explanation) -> tuple[Shown, list[str]]:
    """Writes the pictures of one recording -> what the page shows of it, and the names of the files."""
    images, names = {}, []
    for kind, picture in record_pictures(explanation).items():
        name = f"pictures/{file_name(record_id)}-{kind}"
        images[kind] = Image.of(picture)
        names.append(write(output, f"{name}.png", images[kind].png))
        names.append(write(output, f"{name}.svg", picture.svg().encode()))
    return Shown(record_id, explanation, images), names


def file_name(record_id: str) -> str:
    """A name for files of this recording: its id as far as that is safe, and a digest that tells similar ids apart."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", record_id)[:40].strip("_") or "recording"
    return f"{safe}-{hashlib.sha256(record_id.encode()).hexdigest()[:8]}"


def facts_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of the run, in this order."""
    told = about["settings"]
    facts = {
        key: about[key] for key in ("model", "version", "digest", "preprocess_digest", "task", "leads", "threshold")
    }
    facts |= {key: told[key] for key in ("baseline", "bound", "steps", "most_steps", "reference", "label")}
    facts |= {"data": f"{about['input']} ({about['input_digest']})"}
    return {key: value for key, value in facts.items() if value is not None}


def what_matters(means: pd.DataFrame, count: int = 4) -> list[dict[str, Any]]:
    """The leads and the waves with the largest absolute shares of all recordings, as rows of `summary`."""
    of_all = means[means["group"] == "all"]
    leads = of_all[(of_all["wave"] == "all") & (of_all["lead"] != "all")]
    waves = of_all[(of_all["lead"] == "all") & (of_all["wave"] != "all")]
    largest = pd.concat([some.nlargest(count, "absolute") for some in (leads, waves)])
    values = largest.drop(columns="group").replace({np.nan: None})
    return values.to_dict("records")
