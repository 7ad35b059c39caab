"""Additions to /openapi.json that FastAPI cannot know: the bodies that `inputs.py` reads, and working examples."""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from serve.inputs import MAX_FILES
from serve.schema import RESEARCH_ONLY, ExplainRequest, Problem, ReconstructRequest, ScoreRequest

DESCRIPTION = f"""Scores ECGs of 12 leads, 6 leads, or any subset that a model takes. {RESEARCH_ONLY}

Everything under `/v1` needs `Authorization: Bearer TOKEN`. Errors are `{{"detail": …}}` and never quote a recording.
A recording without a score has `refused` with a code and a reason; when all are refused, the status is 422. 401: no
valid token. 413: too large, in bytes, in samples or in memory. 415: wrong content type, or compressed. 408: the body
arrived too slowly. 503 with `Retry-After`: more load than capacity, or no model is loaded (`/readyz` says why).

`X-Request-ID` is logged as it is sent: do not put a person's identifier in it.
"""

_BEAT_MV = [0.0] * 10 + [0.05, 0.1, 0.1, 0.05] + [0.0] * 6 + [-0.1, 0.9, -0.3, 0.0] + [0.0] * 16
_BEAT_MV += [0.05, 0.1, 0.15, 0.2, 0.2, 0.15, 0.1, 0.05] + [0.0] * 35
_SIGNAL_MV = (_BEAT_MV * 4)[:250]
_LEADS_MV = {"I": _SIGNAL_MV, "II": [round(1.5 * value_mv, 3) for value_mv in _SIGNAL_MV]}
EXAMPLE = {"records": [{"id": "a-1", "rate_hz": 100, "unit": "mV", "leads": _LEADS_MV}]}
"""2.5 s at 100 Hz: the shortest recording and the lowest rate that are scored."""


def json_body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


# The guard checks the token; this dependency only adds it to the description.
TOKEN_IN_OPENAPI = Depends(HTTPBearer(auto_error=False))
PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 401, 408, 413, 415, 503)}

NPY_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/x-npy": {"schema": {"type": "string", "format": "binary"}}},
    }
}
FILES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_FILES,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            }
        },
    }
}


def openapi(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        api.openapi_schema = get_openapi(
            title=api.title, version=api.version, description=DESCRIPTION, routes=api.routes
        )
        for model in (ScoreRequest, ReconstructRequest, ExplainRequest):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            api.openapi_schema["components"]["schemas"] |= schema.pop("$defs") | {model.__name__: schema}
    return api.openapi_schema
