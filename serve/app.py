"""The online service: FastAPI on Ray Serve, one deployment whose replicas hold every served model.

Run it with `serve run serve/config.yaml`. Each replica pins the version that the alias named when it started, and
every answer says which version that was.
"""

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from ray import serve as ray_serve
from ray.serve import Application

from lsemvae.bundle import Score, Scorer
from lsemvae.errors import LsemvaeError, Refused
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from lsemvae.tracking import FetchedBundle, fetch
from serve.schema import ModelOut, RecordIn, RefusedOut, ScoreOut, ScoreRequest, ScoreResponse

log = logging.getLogger("ray.serve")

api = FastAPI(
    title="LS-EMVAE",
    description="Scores a 12-lead or 6-lead ECG. Research use only: not a medical device.",
    version="1",
)


class Config(BaseModel):
    """The `args` of serve/config.yaml."""

    models: list[str] = Field(min_length=1, description="models:/NAME@champion or a bundle's folder")


@dataclass(frozen=True)
class Served:
    """One loaded model and how answers name it."""

    scorer: Scorer
    described: ModelOut

    @classmethod
    def load(cls, uri: str) -> "Served":
        fetched: FetchedBundle = fetch(uri)
        scorer = Scorer(fetched.folder)
        bundle = scorer.bundle
        described = ModelOut(
            name=fetched.name or fetched.folder.name,
            version=fetched.version,
            digest=bundle.digest,
            preprocess_digest=bundle.preprocess.digest,
            task=bundle.task,
            leads=list(bundle.leads),
            threshold=bundle.threshold,
        )
        return cls(scorer, described)


# Ray Serve copies `api` and what it refers to when the class below is made: all that it needs stands above it.


def to_record(given: RecordIn) -> Record:
    """A request's record as a `Record`, null as NaN, microvolts as millivolts; raises LsemvaeError."""
    factor = 1e-3 if given.unit == "uV" else 1.0
    signal_mv = {
        name: np.array(values, dtype=np.float64).astype(np.float32) * np.float32(factor)
        for name, values in given.leads.items()
    }
    return Record.from_leads(signal_mv, given.rate_hz)


@api.exception_handler(RequestValidationError)
async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    """Where and why, never the input itself: a signal may not come back in an error, and NaN is no JSON."""
    detail = [{"loc": list(entry["loc"]), "msg": entry["msg"], "type": entry["type"]} for entry in error.errors()[:20]]
    return JSONResponse({"detail": detail}, status_code=422)


@api.exception_handler(Exception)
async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """No signal, identifier or stack in an answer; the log has the kind of error only."""
    log.error(f"{request.url.path}: {type(error).__name__}")
    return JSONResponse({"detail": "internal error"}, status_code=500)


@ray_serve.deployment(name="ecg")
@ray_serve.ingress(api)
class EcgService:
    """Turns requests into records, picks each record's model, and scores what arrives together in one batch."""

    def __init__(self, models: list[str]) -> None:
        loaded = [Served.load(uri) for uri in models]
        # Most leads first: a 12-lead recording goes to the 12-lead model, a 6-lead one to the 6-lead model.
        loaded.sort(key=lambda served: -len(served.described.leads))
        self._models = {served.described.name: served for served in loaded}
        for served in loaded:
            log.info(f"serving {served.described.name} version {served.described.version} {served.described.digest}")

    @api.post(
        "/v1/score",
        responses={422: {"description": "The request cannot be read, or every recording was refused."}},
    )
    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score recordings. A refused one has `refused` in place of a score; if all are refused the status is 422."""
        results = await asyncio.gather(*(self._score_one(record, request.model) for record in request.records))
        response = ScoreResponse(results=results)
        if all(result.refused for result in results):
            return JSONResponse(response.model_dump(mode="json"), status_code=422)
        return response

    @api.get("/v1/models")
    async def models(self) -> list[ModelOut]:
        """The models that this service answers with."""
        return [served.described for served in self._models.values()]

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Answers when the process is alive and its models are loaded."""
        return {"status": "ok"}

    async def _score_one(self, given: RecordIn, model: str | None) -> ScoreOut:
        try:
            record = to_record(given)
            served = self._choose(record, model)
        except LsemvaeError as error:
            code = error.code if isinstance(error, Refused) else "record"
            return ScoreOut(id=given.id, refused=RefusedOut(code=code, reason=str(error)))
        answer: Score = await self._batched((served.described.name, record))
        out = ScoreOut(
            id=given.id,
            leads_derived=[lead for lead in record.derived if lead in answer.leads_used],
            flags=list(quality_flags(record)),
            model=served.described,
        )
        if answer.refused:
            out.refused = RefusedOut(code=answer.refused.code, reason=str(answer.refused))
        else:
            out.score, out.decision, out.leads_used = answer.score, answer.decision, list(answer.leads_used)
        return out

    def _choose(self, record: Record, name: str | None) -> Served:
        """The named model, or the one with most leads of those whose leads the record all has."""
        if name is not None:
            if name not in self._models:
                raise Refused("model", f"no model {name[:100]!r} is served: {', '.join(self._models)} are")
            return self._models[name]
        for served in self._models.values():
            if set(served.described.leads) <= set(record.leads):
                return served
        wants = "; ".join(f"{n}: {', '.join(s.described.leads)}" for n, s in self._models.items())
        raise Refused("leads", f"the recording has {', '.join(record.leads)}; models want {wants}")

    @ray_serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def _batched(self, jobs: list[tuple[str, Record]]) -> list[Score]:
        by_model: defaultdict[str, list[int]] = defaultdict(list)
        for position, (name, _) in enumerate(jobs):
            by_model[name].append(position)
        answers: list[Score | None] = [None] * len(jobs)
        for name, positions in by_model.items():
            records = [jobs[position][1] for position in positions]
            scores = await asyncio.to_thread(self._models[name].scorer.score, records)
            for position, score in zip(positions, scores, strict=True):
                answers[position] = score
        return answers


def build(config: Config) -> Application:
    """What serve/config.yaml names as `import_path`."""
    return EcgService.bind(config.models)
