"""The page at `/`: drop a recording, see it on ECG paper with its score. Serves static files and their data.

The page loads nothing from other sites, and `SECURITY_HEADERS` forbid it to.
"""

import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from lsemvae.formats.plain import as_csv
from lsemvae.leads import LEADS
from lsemvae.quality import FLAGS
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}  # not from the machine's own table

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a new version of the service brings its own page
}

EXAMPLE_SEED = 7

router = APIRouter(include_in_schema=False)


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, media_type=MEDIA_TYPES[name.rsplit(".")[-1]], headers=SECURITY_HEADERS)


@router.get("/")
def index() -> FileResponse:
    return _file("index.html")


for _name in ("page.css", "page.js", "elements.js", "explanation.js", "paper.js"):
    router.add_api_route(f"/page/{_name}", partial(_file, _name), name=_name)


@router.get("/page/flags.json")
def flags() -> Response:
    """Quality flag -> its meaning."""
    return Response(json.dumps(FLAGS), media_type="application/json", headers=SECURITY_HEADERS)


@router.get("/page/example.csv")
def example() -> Response:
    """A simulated recording for a first look."""
    return Response(example_csv(), media_type="text/csv", headers=SECURITY_HEADERS)


@lru_cache(maxsize=1)
def example_csv() -> str:
    """Ten simulated seconds of twelve leads as `formats/plain.py` reads them; always the same."""
    parameters = EcgParameters(severity=0.6, heart_rate_bpm=72.0)
    signal_mv_LT, _ = simulate_ecg(parameters, np.random.default_rng(EXAMPLE_SEED))
    return "# simulated: nobody's heart\n" + as_csv(signal_mv_LT, RATE_HZ, LEADS, decimals=3)
