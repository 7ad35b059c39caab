"""Request bodies -> recordings: JSON, NPY and uploaded files. Nothing is unpickled, and no other file is read.

A request is limited by its size alone: what a recording may be like, preprocessing decides, as it does for cohorts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import READERS, read_record
from lsemvae.formats.plain import npy_layout
from lsemvae.leads import LEADS
from lsemvae.record import Record
from serve.schema import MAX_RECORDS, MAX_SAMPLES, ReconstructRequest, RecordIn

MAX_FILES = 2 * MAX_RECORDS  # a header and its signals
NOT_RECORDED = np.iinfo(np.int16).min  # of 16-bit samples, as in WFDB and in the shards

JSON_BYTES_PER_SAMPLE = 80
"""Memory while a body is parsed, measured: the parser's value, Python's float and its place in a list."""
MAX_NAMES = MAX_RECORDS * 220
"""Colons in a body: 17 names a recording at most, and 200 in its id."""
FILE_EXPANSION = 10
"""Memory that a reader needs, for each byte of a file: an XML tree, or float64 of 12 bits a sample."""
DRAWN_BYTES_PER_SAMPLE = 64
"""Memory of an answer that holds the recording: Python's float, its places in two lists, and its text."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"(\s*:)?', re.DOTALL)

Asked = TypeVar("Asked", bound=ReconstructRequest)


class TooLarge(LsemvaeError):
    """The request holds more than the endpoint reads at once: answered with status 413."""


def json_memory(body: bytes) -> int:
    """Bytes that parsing the body takes. Raises TooLarge before anything is parsed."""
    return JSON_BYTES_PER_SAMPLE * json_samples(body)


def json_samples(body: bytes) -> int:
    """About as many samples as the body has. Raises TooLarge before anything is parsed."""
    samples = _commas(body)  # commas in texts count too, but these are few
    if samples > MAX_SAMPLES + MAX_NAMES or body.count(b":") > MAX_NAMES:
        raise too_large()
    return samples


def _commas(body: bytes) -> int:
    """In blocks that stay in the cache numpy counts them ten times as fast as bytes.count."""
    bytes_N = np.frombuffer(body, dtype=np.uint8)
    return sum(int(np.count_nonzero(bytes_N[k : k + 2**16] == ord(","))) for k in range(0, len(body), 2**16))


def require_samples(records: Iterable[Record | LsemvaeError]) -> int:
    """The number of samples in all leads of the recordings. Raises TooLarge beyond `MAX_SAMPLES`."""
    samples = sum(record.signal_mv_LT.size for record in records if isinstance(record, Record))
    if samples > MAX_SAMPLES:
        raise too_large()
    return samples


def too_large() -> TooLarge:
    return TooLarge(
        f"the request has more than {MAX_SAMPLES} samples in all: send fewer recordings, or score them as a cohort"
    )


def from_json(body: bytes, kind: type[Asked]) -> Asked:
    """The request. Raises RequestValidationError, also where an object names something twice."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)[:20]) from None
    # The parser keeps the last of two equal names, so that a lead given twice would pass. So names are counted.
    expected = len(request.model_fields_set) + sum(len(r.model_fields_set) + len(r.leads) for r in request.records)
    if sum(match[1] is not None for match in _STRING.finditer(body)) != expected:
        raise RequestValidationError([{"loc": ("body",), "msg": "a name is given twice in an object", "type": "json"}])
    return request


def to_record(given: RecordIn) -> Record:
    """A request's record as a `Record`, null as NaN, microvolts as millivolts. Raises LsemvaeError."""
    return with_leads(given, {name: np.array(values, dtype=np.float64) for name, values in given.leads.items()})


def with_leads(given: RecordIn, leads: Mapping[str, np.ndarray]) -> Record:
    """The same with these samples, float64, instead of its own."""
    factor = np.float32(1e-3 if given.unit == "uV" else 1.0)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is refused as such
        signal_mv = {name: values.astype(np.float32) * factor for name, values in leads.items()}
    return Record.from_leads(signal_mv, given.rate_hz)


def from_npy(
    body: bytes, leads: Sequence[str], rate_hz: float, *, unit: str | None, uv_per_lsb: float | None
) -> list[Record | LsemvaeError]:
    """An array that np.save wrote, [L, T] or [B, L, T] with rows in the order of `leads` -> recordings.

    float32 in mV or uV, NaN where nothing was recorded; or int16, -32768 where nothing was recorded. Raises
    LsemvaeError on any other body, or one that is cut.
    """
    values_BLT = _array(body)
    if values_BLT.dtype.kind == "i":
        if unit is not None or uv_per_lsb is None:
            raise LsemvaeError(
                "int16 samples are a recorder's counts: give uv_per_lsb, microvolts a count, and no unit"
            )
        signal_mv_BLT = values_BLT * np.float32(uv_per_lsb / 1000)
        if values_BLT.min() == NOT_RECORDED:
            signal_mv_BLT[values_BLT == NOT_RECORDED] = np.nan
    else:
        if uv_per_lsb is not None:
            raise LsemvaeError("float32 samples are voltages: give unit=mV or unit=uV, and no uv_per_lsb")
        signal_mv_BLT = values_BLT * np.float32(1e-3) if unit == "uV" else values_BLT
    if values_BLT.shape[1] != len(leads):
        raise LsemvaeError(f"the array has {values_BLT.shape[1]} rows a recording, {len(leads)} leads are named")
    if len(set(leads)) < len(leads):
        raise LsemvaeError("a lead is named twice: name each row's lead")
    return [_made(dict(zip(leads, signal_mv_LT, strict=True)), rate_hz) for signal_mv_LT in signal_mv_BLT]


def _made(signal_mv: Mapping[str, np.ndarray], rate_hz: float) -> Record | LsemvaeError:
    try:
        return Record.from_leads(signal_mv, rate_hz)
    except LsemvaeError as error:
        return error


def _array(body: bytes) -> np.ndarray:
    """[B, L, T], a view of `body`: nothing is allocated for what the header claims."""
    try:
        layout = npy_layout(body)
    except UnreadableRecording:
        raise LsemvaeError("the body is no NPY file: write it with np.save") from None
    shape, dtype = layout.shape, layout.dtype
    order = ", in Fortran order" if layout.is_fortran else ""
    if dtype not in (np.dtype("<f4"), np.dtype("<i2")) or layout.is_fortran or len(shape) not in (2, 3):
        order = ", in Fortran order" if layout.is_fortran else ""
        raise LsemvaeError(
            f"the array is {str(dtype)[:20]} with {len(shape)} axes{order}: "
            "save little-endian float32 or int16, leads x samples or recordings x leads x samples, in C order"
        )
    shape = (1,) * (3 - len(shape)) + tuple(shape)
    if not (1 <= shape[0] <= MAX_RECORDS and 1 <= shape[1] <= len(LEADS) and shape[2] >= 1):
        raise LsemvaeError(
            f"the array has shape {str(shape)[:60]}: give 1 to {MAX_RECORDS} recordings, 1 to {len(LEADS)} leads and "
            "at least 1 sample"
        )
    there, needed = len(body) - layout.start, math.prod(shape) * dtype.itemsize
    if there != needed:
        raise LsemvaeError(f"{there} bytes of samples, {needed} are declared: send the file whole")
    if needed > MAX_SAMPLES * dtype.itemsize:
        raise too_large()
    return np.frombuffer(body, dtype=dtype, offset=layout.start).reshape(shape)


class _InMemory(MultiPartParser):
    spool_max_size = 2**31  # the body is in memory already: recordings are not written to a disk


async def uploaded(request: Request) -> dict[str, bytes]:
    """The files of a multipart form by name. Raises LsemvaeError on no file, too many files, or a repeated name."""
    try:
        form = await _InMemory(request.headers, request.stream(), max_files=MAX_FILES, max_fields=0).parse()
    except (MultiPartException, KeyError, ValueError):
        raise LsemvaeError(f"the form cannot be read: send at most {MAX_FILES} files, and nothing else") from None
    files: dict[str, bytes] = {}
    for _, part in form.multi_items():
        if not isinstance(part, UploadFile) or not part.filename:
            raise LsemvaeError("a part of the form is no file: send each with its name")
        if part.filename in files:
            raise LsemvaeError("two files have the same name: give each its own")
        files[part.filename] = await part.read()
        await part.close()
    if not files:
        raise LsemvaeError("the form holds no file: send one recording's files at least")
    return files


def from_files(files: Mapping[str, bytes]) -> list[tuple[str, Record | LsemvaeError]]:
    """The recordings among uploaded files, each as the name of its main file with its record or error.

    The content decides the format. A recording may refer to other files of the same upload, and to nothing else.
    Raises TooLarge.
    """
    asked: set[str] = set()

    def fetch(name: str) -> bytes:
        asked.add(name)
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    found: dict[str, Record | LsemvaeError] = {}
    known = [name for name, content in files.items() if any(recognise(content[:4096]) for recognise, _ in READERS)]
    of_others: set[str] = set()
    for name in known:
        asked.clear()
        try:
            found[name] = read_record(name, fetch)
            require_samples(found.values())
        except TooLarge:
            raise
        except LsemvaeError as error:
            found[name] = error
        of_others |= asked - {name}
    # A signal file may begin like some other format; it belongs to the header that refers to it.
    results = [(name, result) for name, result in found.items() if isinstance(result, Record) or name not in of_others]
    for name in files.keys() - found.keys() - of_others:
        unknown = UnreadableRecording("format", f"{name[:200]!r} is of no known format, and no other file asked for it")
        results.append((name, unknown))
    if len(results) > MAX_RECORDS:
        raise LsemvaeError(f"{len(results)} recordings: {MAX_RECORDS} are the limit of one request")
    return sorted(results, key=lambda named: list(files).index(named[0]))
