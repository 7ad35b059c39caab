"""A request's body -> its recordings, and the answer. Parsing and writing are done beside the event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from fastapi import Request
from fastapi.exceptions import HTTPException
from fastapi.responses import Response
from pydantic import BaseModel

from lsemvae.errors import LsemvaeError, Refused
from lsemvae.record import Record
from serve import quick_json
from serve.inputs import (
    FILE_EXPANSION,
    JSON_BYTES_PER_SAMPLE,
    from_files,
    from_json,
    json_samples,
    require_samples,
    to_record,
    uploaded,
    with_leads,
)
from serve.schema import ReconstructRequest
from serve.security import charge


@dataclass(frozen=True)
class Asked:
    """What remains of a request once its samples are records."""

    ids: list[str]
    model: str | None


Parsed = tuple[Asked, list[Record | LsemvaeError]]
P = ParamSpec("P")


async def json_records(request: Request, kind: type[ReconstructRequest]) -> Parsed:
    """The records of a JSON body, parsed beside the event loop; the parsed numbers are freed at once."""
    body = await body_of(request, "application/json")
    samples = json_samples(body)
    charged = JSON_BYTES_PER_SAMPLE * samples
    if quick_json.AVAILABLE:
        # A list with null becomes Python objects, which take as much as pydantic's.
        quick = charged if b"null" in body else quick_json.BYTES_PER_SAMPLE * samples
        charge(request.scope, quick)
        if found := await asyncio.to_thread(_parse_quickly, body, kind):
            return found
        charged -= quick
    charge(request.scope, charged)
    return await asyncio.to_thread(_parse, body, kind)


async def form_records(request: Request) -> list[tuple[str, Record | LsemvaeError]]:
    """The recordings among uploaded files, each with the name of its main file."""
    require_type(request, "multipart/form-data")
    files = await uploaded(request)
    charge(request.scope, FILE_EXPANSION * sum(map(len, files.values())))
    return await asyncio.to_thread(from_files, files)


def _parse_quickly(body: bytes, kind: type[ReconstructRequest]) -> Parsed | None:
    """As `_parse`, several times as fast; None where that has to decide."""
    found = quick_json.read(body, kind)
    if found is None:
        return None
    given = zip(found.request.records, found.leads, strict=True)
    return _parsed(found.request, [_or_error(with_leads, record, leads) for record, leads in given])


def _parse(body: bytes, kind: type[ReconstructRequest]) -> Parsed:
    request = from_json(body, kind)
    return _parsed(request, [_or_error(to_record, given) for given in request.records])


def _parsed(request: ReconstructRequest, records: list[Record | LsemvaeError]) -> Parsed:
    require_samples(records)
    return Asked([given.id for given in request.records], getattr(request, "model", None)), records


def _or_error(read: Callable[P, Record], *given: P.args, **named: P.kwargs) -> Record | LsemvaeError:
    try:
        return read(*given, **named)
    except LsemvaeError as error:
        return error


def refusal_code(error: object) -> str:
    return error.code if isinstance(error, Refused) else "record"


async def as_response(response: BaseModel, status: int, *, is_large: bool) -> Response:
    """`is_large` answers are written beside the event loop, on which other requests wait."""
    text = await asyncio.to_thread(response.model_dump_json) if is_large else response.model_dump_json()
    return Response(text, status, media_type="application/json")


def require_type(request: Request, *types: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in types:
        raise HTTPException(415, f"the content type is {given[:100]!r}: send {' or '.join(types)}")


async def body_of(request: Request, *types: str) -> bytes:
    require_type(request, *types)
    return await request.body()
