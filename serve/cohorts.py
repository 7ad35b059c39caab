"""Scores whole cohorts: a Ray job that runs workflows/score.py and outlives the replica that started it.

Set where Ray starts, on every node:

    LSEMVAE_COHORT_PREFIXES   where cohorts may be read and scores written: folders or s3://bucket/prefix, separated by
                              commas, such as `s3://example-bucket/cohorts,/data/scores`. Without it, cohorts are off.
    LSEMVAE_COHORT_ARGS       further options of workflows/score.py, such as `--actors 8 --use-gpu`
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import ray
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi import Path as PathParameter
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from lsemvae.data.shards import MANIFEST
from lsemvae.errors import LsemvaeError
from lsemvae.scoring.progress import PROGRESS
from lsemvae.storage import Storage
from lsemvae.tracking import shown
from serve.registry import Served
from serve.schema import RESEARCH_ONLY, ModelOut, Problem

log = logging.getLogger("ray.serve")

Answer = TypeVar("Answer")

PREFIXES, ARGS = "LSEMVAE_COHORT_PREFIXES", "LSEMVAE_COHORT_ARGS"
ROOT = Path(__file__).parents[1]
Status = Literal["waiting", "running", "done", "failed", "stopped"]
STATUS: dict[JobStatus, Status] = {
    JobStatus.PENDING: "waiting",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "done",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "stopped",
}
# What the job needs from this process. No secret, since Ray's dashboard shows a job's environment.
_HANDED_ON = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_QUIET = {"PYTHONUNBUFFERED": "1"}

Place = Annotated[str, Field(min_length=1, max_length=1000, examples=["s3://example-bucket/cohorts/20205"])]
JobId = Annotated[str, PathParameter(pattern="^cohort-[0-9a-f]{16}$")]


class CohortRequest(BaseModel):
    """A cohort to score, and the place for its scores."""

    model_config = ConfigDict(extra="forbid")

    input: Place = Field(description="Shards of workflows/ingest.py, or recordings: UK Biobank's 20205 XML, WFDB, …")
    output: Place
    model: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="A served model's name. By default, the model with most leads."
    )
    leads: Annotated[int, Field(ge=1, le=12)] | None = Field(
        default=None, description="Instead of `model`: the number of leads of a served model."
    )


class CohortOut(BaseModel):
    """The progress of a cohort. Counts are of recordings. Research use only: not a medical device."""

    id: str
    status: Status
    model: str
    version: int
    digest: str
    input: str
    output: str
    records: int | None = Field(default=None, description="Null until the job has read its input.")
    done: int = 0
    scored: int = 0
    refused: dict[str, int] = Field(default={}, description="Recordings without a score, by reason.")
    records_per_s: float | None = None
    time_left_s: float | None = None
    error: str | None = None
    note: str = RESEARCH_ONLY


router = APIRouter(
    prefix="/v1/cohorts",
    tags=["cohorts"],
    dependencies=[Depends(HTTPBearer(auto_error=False))],
    responses={status: {"model": Problem} for status in (401, 503)},
)
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such cohort job."}}


@router.post(
    "",
    status_code=202,
    responses={
        403: {"model": Problem, "description": "Input or output is not below a configured prefix."},
        422: {"model": Problem, "description": "No such model, or the input does not exist."},
    },
)
def start(request: Request, asked: CohortRequest) -> CohortOut:
    """Score a whole cohort in the background. The same request again is the same job, and continues it if stopped."""
    source, output = allowed(asked.input, "input"), allowed(asked.output, "output")
    if source == output:
        raise HTTPException(422, "input and output are the same: write the scores somewhere else")
    model = choose(request.app.state.service.registry.served, asked.model, asked.leads)
    kind = "--data" if source.exists(MANIFEST) else "--source"
    if kind == "--source":
        source.require()
    named = {"model": model.name, "version": str(model.version), "digest": model.digest}
    about = named | {"input": source.uri, "output": output.uri}
    job_id = f"cohort-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"
    client = jobs()
    number, latest = _latest(client, job_id)
    if latest is None or latest.status in (JobStatus.FAILED, JobStatus.STOPPED):
        uri = f"models:/{model.name}/{model.version}"
        words = ["--model", uri, "--digest", model.digest, kind, source.uri, "--output", output.uri]
        latest = _submit(client, job_id, number + 1, words, about)
    return described(client, job_id, latest)


@router.get("/{job_id}", responses=_NOT_FOUND)
def status(job_id: JobId) -> CohortOut:
    """Counts, rate, time left, and refusals by reason."""
    client = jobs()
    return described(client, job_id, _existing(client, job_id)[1])


@router.delete("/{job_id}", responses=_NOT_FOUND)
def stop(job_id: JobId) -> CohortOut:
    """Stop a job. Its finished parts stay, and the same request as before continues from there."""
    client = jobs()
    number, latest = _existing(client, job_id)
    if not latest.status.is_terminal():
        _ask(client.stop_job, f"{job_id}-{number}")
        log.info(f"{job_id}-{number}: asked to stop")
    return described(client, job_id, _existing(client, job_id)[1])


def allowed(uri: str, what: str) -> Storage:
    """The place, if it is below a configured prefix. Raises HTTPException 403.

    Paths are compared as text, name by name; anything that a storage, a URL or a shell could interpret is refused. A
    local path is compared again with all links resolved.
    """
    prefixes = [prefix.strip().rstrip("/") for prefix in os.environ.get(PREFIXES, "").split(",") if prefix.strip()]
    if not prefixes:
        raise HTTPException(
            403, f"cohorts are switched off: set {PREFIXES}=s3://bucket/prefix,/folder where Ray starts"
        )
    refused = HTTPException(403, f"the {what} is not below a prefix that {PREFIXES} allows")
    if not re.fullmatch(r"[\w.,=+@ /:-]+", uri) or any(part in (".", "..") for part in uri.split("/")):
        raise refused
    for prefix in prefixes:
        uri = uri.rstrip("/")
        if uri != prefix and not uri.startswith(prefix + "/"):
            continue
        relative = uri[len(prefix) :].lstrip("/")
        if "//" in uri[len(prefix) :] or ":" in relative:
            break
        place = Storage.open(uri)
        if place.is_local and not Path(place.base).resolve().is_relative_to(Path(Storage.open(prefix).base).resolve()):
            break
        return place
    raise refused


def choose(served: Mapping[str, Served], name: str | None, leads: int | None) -> ModelOut:
    """The requested served model. Raises HTTPException 422 when there is none, or several."""
    models = [model.described for model in served.values()]
    known = ", ".join(f"{model.name} ({len(model.leads)} leads)" for model in models) or "none"
    if name is not None:
        models = [model for model in models if model.name == name]
    if leads is not None:
        models = [model for model in models if len(model.leads) == leads]
    if not models:
        raise HTTPException(422, f"no such model is served: there is {known}")
    if leads is not None and len(models) > 1:
        raise HTTPException(422, f"several models take {leads} leads: name one of {known}")
    chosen = max(models, key=lambda model: len(model.leads))
    if chosen.version is None:
        raise HTTPException(422, f"{chosen.name} is served from a folder: a cohort is scored by a registered version")
    return chosen


def jobs() -> JobSubmissionClient:
    """The jobs API of this replica's cluster, with its token. Raises HTTPException 503."""
    return _ask(JobSubmissionClient, ray.get_runtime_context().gcs_address)


def _ask(call: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
    """Ray's answer. Raises HTTPException 503 when there is none, and RuntimeError for an unknown or repeated id."""
    try:
        return call(*arguments, **named)
    except (OSError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError) and ("does not exist" in said or "already exists" in said):
            raise
        log.error(f"Ray's jobs API: {type(error).__name__}: {(said.splitlines() or [''])[-1][:300]}")
        raise HTTPException(
            503, "Ray's jobs API does not take the request: try again, or see the service's log", {"Retry-After": "10"}
        ) from None


def _latest(client: JobSubmissionClient, job_id: str) -> tuple[int, JobDetails | None]:
    """The number and state of the last attempt, (0, None) when there was none. Each attempt has a job id of its own."""
    latest = None
    for number in itertools.count():
        try:
            latest = _ask(client.get_job_info, f"{job_id}-{number + 1}")
        except RuntimeError:  # it does not exist
            return number, latest
    raise AssertionError("there is always a next number")


def _existing(client: JobSubmissionClient, job_id: str) -> tuple[int, JobDetails]:
    number, latest = _latest(client, job_id)
    if latest is None:
        raise HTTPException(404, "there is no such job on this cluster: POST the same request again to see it")
    return number, latest


def _submit(
    client: JobSubmissionClient, job_id: str, number: int, words: list[str], about: dict[str, str]
) -> JobDetails:
    """Starts another attempt. Where another replica was quicker, returns that one."""
    environment = _QUIET | handed_on()
    runtime_env: dict[str, Any] = {"env_vars": environment}
    script = str(ROOT / "workflows" / "score.py")  # in the image, or the repository on one machine
    if working_dir := ray.get_runtime_context().runtime_env.get("working_dir"):
        runtime_env["working_dir"] = working_dir
        script = "workflows/score.py"
    # Ray gives a job the address of the first cluster it finds, which on a machine with two may be the other one.
    address = f"RAY_ADDRESS={ray.get_runtime_context().gcs_address}"
    command = ["env", address, sys.executable, script, *words, *shlex.split(os.environ.get(ARGS, ""))]
    submission_id = f"{job_id}-{number}"
    try:
        _ask(
            client.submit_job,
            entrypoint=shlex.join(command),
            submission_id=submission_id,
            runtime_env=runtime_env,
            metadata=about,
        )
        log.info(f"{submission_id}: started with {about['model']} version {about['version']}")
    except RuntimeError:  # it already exists
        pass
    return _existing(client, job_id)[1]


def handed_on() -> dict[str, str]:
    """The variables of `_HANDED_ON` for the job, without a URI that holds a password: its node has that of its own."""
    return {name: value for name in _HANDED_ON if (value := os.environ.get(name)) and shown(value) == value}


def described(client: JobSubmissionClient, job_id: str, details: JobDetails) -> CohortOut:
    """The job's state from Ray, its counts from progress.json in its output."""
    about = details.metadata
    out = CohortOut(
        id=job_id,
        status=STATUS[details.status],
        model=about["model"],
        version=int(about["version"]),
        digest=about["digest"],
        input=about["input"],
        output=about["output"],
    )
    progress = _progress(about)
    out.records, out.done, out.scored = progress.get("records"), progress.get("done", 0), progress.get("scored", 0)
    out.refused, out.records_per_s = progress.get("refused", {}), progress.get("records_per_s")
    if out.status == "running":
        out.time_left_s = progress.get("time_left_s")
    if out.status == "failed":
        # Only these lines, because they name no recording.
        lines = _ask(client.get_job_logs, details.submission_id).splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        out.error = said[-1][:2000] if said else "it ended unexpectedly: see the job's log in Ray's dashboard"
    return out


def _progress(about: Mapping[str, str]) -> dict[str, Any]:
    """The content of progress.json. Empty when there is none yet, or when it belongs to another job."""
    try:
        progress = Storage.open(about["output"]).read_json(PROGRESS, "It is written again", ("digest", "input"))
    except (OSError, LsemvaeError):  # also a damaged file: the command that runs writes it again
        return {}
    return progress if (progress["digest"], progress["input"]) == (about["digest"], about["input"]) else {}
