"""The HTTP interface: `make_api(service)` is a FastAPI app that knows nothing of Ray, so tests call it in-process."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, FiniteFloat
from starlette.middleware.cors import CORSMiddleware

from lsemvae.errors import LsemvaeError, Refused
from lsemvae.leads import LEADS, LIMB_LEADS, canonical
from lsemvae.record import Record
from serve import cohorts, page
from serve.inputs import from_files, from_json, from_npy, to_record, uploaded
from serve.observed import Metrics
from serve.openapi import EXAMPLE, FILES_BODY, NPY_BODY, json_body, openapi
from serve.reconstruct import Reconstructor
from serve.registry import Registry, Served
from serve.schema import (
    Health,
    ModelCard,
    Problem,
    Readiness,
    ReconstructOut,
    ReconstructRequest,
    ReconstructResponse,
    RefusedOut,
    ScoreRequest,
    ScoreResponse,
    Unit,
)
from serve.scoring import NothingServed, Scoring, min_leads
from serve.security import Guard

log = logging.getLogger("ray.serve")

INTENDED_USE = (
    "Research on ECG models, by people who know how to judge them. Not a medical device: not evaluated for clinical "
    "use, and its scores must not guide anybody's care."
)
LIMITS = [
    "What the label means, and who was recorded, is what the training data says; elsewhere, score, probability and "
    "threshold mean something else: validate there first.",
    "A probability holds where the disease is as frequent as in the training cohort. Without calibration there is "
    "none, and a score of 0.7 is not a risk of 70 %.",
    "Reliability is about the recording. How sure the model is, no number here says.",
]


@dataclass(frozen=True)
class Service:
    """What answers the requests, and within which limits."""

    registry: Registry
    metrics: Metrics
    reconstructor: Reconstructor | None = None
    reconstructor_problem: str = ""
    """Why the configured encoder could not be loaded."""
    tokens: frozenset[str] = frozenset()
    cors_origins: list[str] = field(default_factory=list)
    max_body: int = 32 * 2**20
    max_held: int = 256 * 2**20
    body_timeout_s: float = 30.0


def make_api(service: Service) -> FastAPI:
    """The application, with its guard and all that it includes."""
    api = FastAPI(title="LS-EMVAE", version="1", docs_url=None, redoc_url=None)  # those pages load from other sites
    api.state.registry = service.registry  # for the cohorts
    for router in (_v1(service), cohorts.router, _health(service.registry), page.router):
        api.include_router(router)
    api.add_exception_handler(RequestValidationError, _malformed)
    api.add_exception_handler(LsemvaeError, _unusable)
    api.add_exception_handler(NothingServed, _nothing_served)
    api.add_middleware(
        Guard,
        tokens=service.tokens,
        metrics=service.metrics,
        max_body=service.max_body,
        max_held=service.max_held,
        body_timeout_s=service.body_timeout_s,
    )
    if service.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=service.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    api.openapi = lambda: openapi(api)
    return api


def _v1(service: Service) -> APIRouter:
    """What scores. The guard asks for the token; the dependency only tells OpenAPI so."""
    refusals = {422: {"model": ScoreResponse | Problem, "description": "Not readable, or every recording refused."}}
    problems = {status: {"model": Problem} for status in (400, 401, 408, 413, 415, 503)}
    router = APIRouter(prefix="/v1", dependencies=[Depends(HTTPBearer(auto_error=False))], responses=problems)
    scoring = Scoring(lambda: service.registry.served, service.metrics)

    @router.post(
        "/score", response_model=ScoreResponse, responses=refusals, openapi_extra=json_body(ScoreRequest, EXAMPLE)
    )
    async def score(request: Request) -> Response:
        """Score recordings given as JSON: leads by name, in mV or uV, each model taking those it knows."""
        began = time.perf_counter()
        body = await _body(request, "application/json")
        asked = from_json(body, ScoreRequest)
        records = [_or_error(to_record, given) for given in asked.records]
        return await respond([given.id for given in asked.records], records, asked.model, began)

    @router.post("/score/npy", response_model=ScoreResponse, responses=refusals, openapi_extra=NPY_BODY)
    async def score_npy(
        request: Request,
        leads: Annotated[str, Query(max_length=200, description="Rows' names, `I,II,V1`, or `12` or `6` in order.")],
        rate_hz: Annotated[FiniteFloat, Query(gt=0)],
        unit: Annotated[Unit | None, Query(description="Of float32 samples.")] = None,
        uv_per_lsb: Annotated[FiniteFloat | None, Query(gt=0, le=1e6, description="Of int16 samples.")] = None,
        model: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        """Score recordings given as an array that np.save wrote: half of the JSON, or a quarter as int16.

        float32 in millivolts (or `unit=uV`), NaN where nothing was recorded; or int16 with `uv_per_lsb`, -32768 where
        nothing was recorded. [leads, samples] or [recordings, leads, samples].
        """
        began = time.perf_counter()
        body = await _body(request, "application/x-npy", "application/octet-stream")
        names = {"12": LEADS, "6": LIMB_LEADS}.get(leads) or [canonical(name) for name in leads.split(",")]
        records = from_npy(body, names, rate_hz, unit=unit, uv_per_lsb=uv_per_lsb)
        return await respond([""] * len(records), records, model, began)

    @router.post("/score/file", response_model=ScoreResponse, responses=refusals, openapi_extra=FILES_BODY)
    async def score_file(
        request: Request,
        signal: Annotated[bool, Query(description="Answer with the recording too, for drawing.")] = False,
        model: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        """Score uploaded recordings, recognised by what they hold; `id` is the name of each one's main file.

        CardioSoft XML, DICOM, AliveCor .atc, WFDB (header and signals), CSV or NPY (with their JSON), and where its
        reader is installed MUSE, Philips, aECG and SCP-ECG.
        """
        began = time.perf_counter()
        _require_type(request, "multipart/form-data")
        read = await asyncio.to_thread(from_files, await uploaded(request))
        return await respond([name for name, _ in read], [record for _, record in read], model, began, signal)

    async def respond(
        ids: list[str], records: list[Record | LsemvaeError], model: str | None, began: float, signal: bool = False
    ) -> Response:
        service.metrics.took("parse", time.perf_counter() - began)
        named = zip(ids, records, strict=True)
        results = await asyncio.gather(
            *(scoring.score(record, id=id, model=model, signal=signal) for id, record in named)
        )
        return _answer(ScoreResponse(results=results), 422 if all(result.refused for result in results) else 200)

    @router.post(
        "/reconstruct",
        response_model=ReconstructResponse,
        responses={
            404: {"model": Problem, "description": "No encoder is configured."},
            409: {"model": Problem, "description": "The configured encoder cannot be loaded."},
            422: {"model": ReconstructResponse | Problem, "description": "Not readable, or every recording refused."},
        },
        openapi_extra=json_body(ReconstructRequest, EXAMPLE),
    )
    async def reconstruct(request: Request) -> Response:
        """Leads that were not recorded, as a model guesses them from those that were. Not a measurement."""
        body = await _body(request, "application/json")
        if service.reconstructor is None:
            if service.reconstructor_problem:
                raise HTTPException(409, service.reconstructor_problem)
            raise HTTPException(404, "no encoder is configured: name one as `encoder` in serve/config.yaml")
        asked = from_json(body, ReconstructRequest)
        records = [_or_error(to_record, given) for given in asked.records]
        good = [b for b, record in enumerate(records) if isinstance(record, Record)]
        made = await service.reconstructor.reconstruct([records[b] for b in good], [asked.records[b].id for b in good])
        results = [
            ReconstructOut(id=given.id, refused=RefusedOut(code=_code(record), reason=str(record)))
            for given, record in zip(asked.records, records, strict=True)
        ]
        for b, out in zip(good, made, strict=True):
            results[b] = out
        response = ReconstructResponse(model=service.reconstructor.bundle.digest, results=results)
        return _answer(response, 422 if all(result.refused for result in results) else 200)

    @router.get("/models")
    async def models() -> list[ModelCard]:
        """The model cards of what answers."""
        return [_card(served) for served in service.registry.served.values()]

    return router


def _health(registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> Health:
        """Answers while the process is alive."""
        return Health()

    @router.get("/readyz", responses={503: {"model": Readiness, "description": "No model is loaded."}})
    async def readyz() -> Readiness:
        """Whether recordings can be scored, and which promoted versions are not served, and why."""
        models = [f"{m.name}/{m.version}" if m.version else m.name for m in _described(registry.served)]
        # An address may hold a password, and everybody may ask here.
        problems = {name: re.sub(r"//[^/@\s]+@", "//", text) for name, text in registry.problems.items()}
        state = Readiness(ready=registry.ready, models=models, problems=problems)
        return state if state.ready else JSONResponse(state.model_dump(), 503)

    return router


def _described(served: Mapping[str, Served]) -> list[Any]:
    return [model.described for model in served.values()]


def _card(served: Served) -> ModelCard:
    bundle = served.scorer.bundle
    return ModelCard(
        **served.described.model_dump(),
        min_leads=min_leads(bundle),
        architecture=bundle.architecture,
        preprocess=asdict(bundle.preprocess),
        calibration=asdict(bundle.calibration) if bundle.calibration else None,
        provenance=_finite(bundle.provenance),
        intended_use=INTENDED_USE,
        limits=LIMITS,
    )


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_error(read: Any, given: Any) -> Record | LsemvaeError:
    try:
        return read(given)
    except LsemvaeError as error:
        return error


def _code(error: object) -> str:
    return error.code if isinstance(error, Refused) else "record"


def _answer(response: BaseModel, status: int) -> Response:
    return Response(response.model_dump_json(), status, media_type="application/json")


def _require_type(request: Request, *types: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in types:
        raise HTTPException(415, f"the content type is {given[:100]!r}: send {' or '.join(types)}")


async def _body(request: Request, *types: str) -> bytes:
    _require_type(request, *types)
    return await request.body()


async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    """Where and why, never the input itself: a signal may not come back in an error, and NaN is no JSON."""
    detail = [
        {"loc": [str(part)[:40] for part in entry["loc"]], "msg": entry["msg"], "type": entry["type"]}
        for entry in error.errors()[:20]
    ]
    return JSONResponse({"detail": detail}, status_code=422)


async def _unusable(request: Request, error: LsemvaeError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=422)


async def _nothing_served(request: Request, error: NothingServed) -> JSONResponse:
    detail = "no model is loaded: GET /readyz says why"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "10"})
