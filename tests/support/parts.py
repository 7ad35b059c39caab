"""The parts of a cohort's job, made in this process without Ray."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from cohort import describe_model

from lsemvae.scoring.inputs import CohortInput
from lsemvae.scoring.parts import Job, PartMaker, Product, part_path
from lsemvae.storage import Storage


def job_for(bundle: Path, source: CohortInput, output: Path, product: Product) -> Job:
    uri, about = describe_model(str(bundle), None)
    columns = {key: about[key] for key in ("model", "version", "digest", "preprocess_digest")}
    return Job("plan", uri, columns, source, Storage.open(output), False, product)


def made(job: Job) -> tuple[list[dict], list[dict]]:
    """All rows, and what the actor said of each part."""
    actor = PartMaker(job)
    said = [json.loads(actor({"number": n})["result"]) for n in range(len(job.source.parts))]
    paths = [job.output.path(part_path(job.plan, n)) for n in range(len(said))]
    return [row for path in paths for row in pq.read_table(path).to_pylist()], said
