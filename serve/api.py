"""The HTTP interface: `make_api(service)` is a FastAPI app that knows nothing of Ray, so tests call it in-process."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import FiniteFloat
from starlette.middleware.cors import CORSMiddleware

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS, canonical
from lsemvae.record import Record
from serve import about, cohorts, explain, page
from serve.bodies import as_response, body_of, form_records, json_records, refusal_code, require_type
from serve.explaining import NotExplained
from serve.inputs import (
    DRAWN_BYTES_PER_SAMPLE,
    TooLarge,
    from_npy,
    require_samples,
)
from serve.openapi import EXAMPLE, FILES_BODY, NPY_BODY, PROBLEMS, TOKEN_IN_OPENAPI, json_body, openapi
from serve.schema import (
    Problem,
    Rate,
    ReconstructOut,
    ReconstructRequest,
    ReconstructResponse,
    RefusedOut,
    ScoreOut,
    ScoreRequest,
    ScoreResponse,
    Unit,
)
from serve.scoring import NothingServed, Scoring
from serve.security import Guard, charge
from serve.service import Service, TheService

log = logging.getLogger("ray.serve")


def make_api(service: Service) -> FastAPI:
    """The application with all its routes, inside its guard."""
    api = FastAPI(title="LS-EMVAE", version="1", docs_url=None, redoc_url=None)  # those pages load from other sites
    api.state.service = service
    undisturbed = service.explaining.paused if service.explaining else nullcontext
    api.state.scoring = Scoring(lambda: service.registry.served, service.metrics, undisturbed)
    for router in (v1, explain.router, about.router, cohorts.router, page.router):
        api.include_router(router)
    api.add_exception_handler(RequestValidationError, _malformed)
    api.add_exception_handler(LsemvaeError, _unusable)
    api.add_exception_handler(NothingServed, _nothing_served)
    api.add_exception_handler(NotExplained, _not_explained)
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
    api.openapi = lambda: openapi(api)  # type: ignore[method-assign]  # as FastAPI's documentation says
    return api


# --- scoring --------------------------------------------------------------------------------------------------

_REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": ScoreResponse | Problem, "description": "The body is unreadable, or every recording is refused."}
}

v1 = APIRouter(prefix="/v1", dependencies=[TOKEN_IN_OPENAPI], responses=PROBLEMS)


@v1.post("/score", response_model=ScoreResponse, responses=_REFUSALS, openapi_extra=json_body(ScoreRequest, EXAMPLE))
async def score(request: Request) -> Response:
    """Score recordings given as JSON: leads by name, in mV or uV; each model takes the leads it knows."""
    began = time.perf_counter()
    asked, records = await json_records(request, ScoreRequest)
    return await _respond(request, asked.ids, records, asked.model, began)


@v1.post("/score/npy", response_model=ScoreResponse, responses=_REFUSALS, openapi_extra=NPY_BODY)
async def score_npy(
    request: Request,
    leads: Annotated[
        str, Query(max_length=200, description="The rows' names, as in `I,II,V1`, or `12` or `6` for the fixed order.")
    ],
    rate_hz: Annotated[Rate, Query()],
    unit: Annotated[Unit | None, Query(description="Of float32 samples.")] = None,
    uv_per_lsb: Annotated[FiniteFloat | None, Query(gt=0, le=1e6, description="Of int16 samples.")] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Score recordings given as an array that np.save wrote: half the size of JSON, or a quarter as int16.

    float32 in millivolts (or `unit=uV`), NaN where nothing was recorded; or int16 with `uv_per_lsb`, -32768 where
    nothing was recorded. [leads, samples] or [recordings, leads, samples].
    """
    began = time.perf_counter()
    body = await body_of(request, "application/x-npy", "application/octet-stream")
    charge(request.scope, 4 * len(body))  # int16 becomes float32 twice, as a batch and as its recordings
    names = {"12": LEADS, "6": LIMB_LEADS}.get(leads) or [canonical(name) for name in leads.split(",")]
    records = from_npy(body, names, rate_hz, unit=unit, uv_per_lsb=uv_per_lsb)
    return await _respond(request, [""] * len(records), records, model, began)


@v1.post("/score/file", response_model=ScoreResponse, responses=_REFUSALS, openapi_extra=FILES_BODY)
async def score_file(
    request: Request,
    signal: Annotated[bool, Query(description="Answer with the recording too, to draw it.")] = False,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Score uploaded recordings. Their content decides the format; `id` is the name of each one's main file.

    CardioSoft XML, DICOM, AliveCor .atc, WFDB (header and signals), CSV or NPY (with their JSON), and where its
    reader is installed MUSE, Philips, aECG and SCP-ECG.
    """
    began = time.perf_counter()
    read = await form_records(request)
    ids, records = [name for name, _ in read], [record for _, record in read]
    if signal:
        charge(request.scope, DRAWN_BYTES_PER_SAMPLE * require_samples(records))
    return await _respond(request, ids, records, model, began, signal)


async def _respond(
    request: Request,
    ids: Sequence[str],
    records: Sequence[Record | LsemvaeError],
    model: str | None,
    began: float,
    signal: bool = False,
) -> Response:
    """Scores the recordings, all at once -> the answer; status 422 when every recording is refused."""
    scoring: Scoring = request.app.state.scoring
    request.app.state.service.metrics.took("parse", time.perf_counter() - began)
    results: list[ScoreOut] = await asyncio.gather(
        *(scoring.score(record, id=id, model=model, signal=signal) for id, record in zip(ids, records, strict=True))
    )
    status = 422 if all(result.refused for result in results) else 200
    return await as_response(ScoreResponse(results=results), status, is_large=signal)


# --- reconstruction -------------------------------------------------------------------------------------------


@v1.post(
    "/reconstruct",
    response_model=ReconstructResponse,
    responses={
        404: {"model": Problem, "description": "No encoder is configured."},
        409: {"model": Problem, "description": "The configured encoder cannot be loaded."},
        422: {
            "model": ReconstructResponse | Problem,
            "description": "The body is unreadable, or every recording is refused.",
        },
    },
    openapi_extra=json_body(ReconstructRequest, EXAMPLE),
)
async def reconstruct(request: Request, service: TheService) -> Response:
    """Estimate the leads that were not recorded from those that were. An estimate is not a measurement."""
    require_type(request, "application/json")
    if service.encoder is None:
        raise HTTPException(404, "no encoder is configured: name one as `encoder` in serve/config.yaml")
    reconstructor = service.encoder.reconstructor  # one for the whole request: another version may replace it meanwhile
    if reconstructor is None:
        raise HTTPException(409, service.encoder.problem)
    asked, records = await json_records(request, ReconstructRequest)
    good = {b: record for b, record in enumerate(records) if isinstance(record, Record)}
    made = await reconstructor.reconstruct(list(good.values()), [asked.ids[b] for b in good])
    results = [
        ReconstructOut(id=id, refused=RefusedOut(code=refusal_code(record), reason=str(record)))
        for id, record in zip(asked.ids, records, strict=True)
    ]
    for b, out in zip(good, made, strict=True):
        results[b] = out
    response = ReconstructResponse(model=reconstructor.bundle.digest, results=results)
    return await as_response(response, 422 if all(result.refused for result in results) else 200, is_large=True)


# --- errors ---------------------------------------------------------------------------------------------------


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """Where and why, without the input: a signal may not come back in an error, and NaN is no JSON."""
    assert isinstance(error, RequestValidationError)
    detail = [
        {"loc": [str(part)[:40] for part in entry["loc"]], "msg": entry["msg"], "type": entry["type"]}
        for entry in error.errors()[:20]
    ]
    return JSONResponse({"detail": detail}, status_code=422)


async def _unusable(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=413 if isinstance(error, TooLarge) else 422)


async def _nothing_served(request: Request, error: Exception) -> JSONResponse:
    detail = "no model is loaded: GET /readyz says why"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "10"})


async def _not_explained(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NotExplained)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    return JSONResponse({"detail": error.detail}, status_code=error.status, headers=headers)
