"""The routes that explain a score: `explaining.py` has the queue and the process, `schema.py` the answer."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import Response

from lsemvae.errors import LsemvaeError
from lsemvae.record import Record
from serve.bodies import as_response, form_records, json_records
from serve.explaining import Explaining, NotExplained
from serve.openapi import EXAMPLE, FILES_BODY, PROBLEMS, TOKEN_IN_OPENAPI, json_body
from serve.registry import Served
from serve.schema import ExplainOut, ExplainRequest, ExplainResponse, Problem
from serve.scoring import Scoring
from serve.security import Rejected, charge
from serve.service import Service, TheService

SENT_BYTES_PER_SAMPLE = 8
"""float32, twice: as bytes, and in the pipe's buffer."""
DRAWN_BYTES_PER_SAMPLE = 48
"""Two numbers as text, twice: as they arrive and in the answer."""
_NOT_EXPLAINED: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "Explanations are switched off."},
    409: {"model": Problem, "description": "The model's scores cannot be explained: it gives no gradient."},
    422: {"model": ExplainResponse | Problem, "description": "The body is unreadable, or the recording is refused."},
    504: {"model": Problem, "description": "The explanation took too long."},
}
WithSignal = Annotated[
    bool, Query(description="Whether `windows` have the signal and the attribution of each sample, to draw them.")
]


def _explaining(service: TheService) -> Explaining:
    """Before anything is parsed: a request beyond the queue costs nothing."""
    if service.explaining is None:
        raise HTTPException(404, "explanations are switched off: set `explain_queue` in serve/config.yaml")
    try:
        service.explaining.require_room()
    except NotExplained as error:
        service.metrics.explained(error.outcome, 0.0)
        raise
    return service.explaining


router = APIRouter(prefix="/v1/explain", dependencies=[TOKEN_IN_OPENAPI], responses=PROBLEMS)

TheExplaining = Annotated[Explaining, Depends(_explaining)]


@router.post(
    "",
    response_model=ExplainResponse,
    responses=_NOT_EXPLAINED,
    openapi_extra=json_body(ExplainRequest, EXAMPLE),
)
async def explain(request: Request, explaining: TheExplaining, signal: WithSignal = True) -> Response:
    """Explain the score of one recording given as JSON: which of its leads and waves the score depends on.

    It takes seconds, and several requests wait for each other. The score is that of `/v1/score`.
    """
    asked, (record,) = await json_records(request, ExplainRequest)
    return await _explain(request, explaining, asked.ids[0], record, asked.model, signal)


@router.post("/file", response_model=ExplainResponse, responses=_NOT_EXPLAINED, openapi_extra=FILES_BODY)
async def explain_file(
    request: Request,
    explaining: TheExplaining,
    signal: WithSignal = True,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Explain the score of one uploaded recording, in a form as for `/v1/score/file`."""
    read = await form_records(request)
    if len(read) != 1:
        raise LsemvaeError(f"{len(read)} recordings: one at a time is explained")
    ((id, record),) = read
    return await _explain(request, explaining, id, record, model, signal)


async def _explain(
    request: Request,
    explaining: Explaining,
    id: str,
    given: Record | LsemvaeError,
    model: str | None,
    signal: bool,
) -> Response:
    """The answer of scoring where the recording is refused, else the answer with its explanation."""
    service: Service = request.app.state.service
    scoring: Scoring = request.app.state.scoring
    began, outcome = time.perf_counter(), "failed"
    try:
        candidates = scoring.candidates(given, model)
        if not candidates or not isinstance(given, Record):
            answer, outcome = await scoring.answer(given, id=id, model=model), "refused"
            response = ExplainResponse(results=[ExplainOut(**answer.model_dump())])
            return await as_response(response, 422, is_large=False)
        charge(request.scope, _memory(given, candidates, with_signal=signal))
        digests = {served.described.digest for served in [*service.registry.served.values(), *candidates]}
        asked = explaining.explain(given, id, candidates, digests, with_signal=signal)
        outcome, body = await _unless_gone(request, asked)
        return Response(body, 422 if outcome == "refused" else 200, media_type="application/json")
    except NotExplained as error:
        outcome = error.outcome
        raise
    except (Rejected, asyncio.CancelledError):
        outcome = "given_up"
        raise
    finally:
        service.metrics.explained(outcome, time.perf_counter() - began)
        service.metrics.explaining(explaining.there)


def _memory(record: Record, candidates: Sequence[Served], *, with_signal: bool) -> int:
    """Bytes of the recording on its way to the process that explains, and of the answer's text."""
    return SENT_BYTES_PER_SAMPLE * record.signal_mv_LT.size + max(
        (DRAWN_BYTES_PER_SAMPLE * _drawn_samples(record, served) for served in candidates if with_signal), default=0
    )


def _drawn_samples(record: Record, served: Served) -> int:
    config = served.scorer.bundle.preprocess
    drawn = round(record.signal_mv_LT.shape[1] / record.rate_hz * config.rate_hz)
    return len(served.described.leads) * (drawn if config.window == "all" else min(drawn, config.samples))


async def _unless_gone(request: Request, explanation: Coroutine[Any, Any, tuple[str, bytes]]) -> tuple[str, bytes]:
    """The explanation, which is left out of the queue when the client goes away. Raises Rejected then."""
    asked, gone = asyncio.create_task(explanation), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Rejected(400, "the client went away")
        return asked.result()
    finally:
        asked.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
