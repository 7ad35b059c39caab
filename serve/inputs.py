"""Request bodies -> recordings: JSON, NPY and uploaded files. Nothing is unpickled, and nothing else is read."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lsemvae.errors import LsemvaeError, Refused, UnreadableRecording
from lsemvae.formats import READERS, read_record
from lsemvae.formats.plain import npy_layout
from lsemvae.record import Record
from serve.schema import MAX_RECORDS, MAX_SAMPLES, ReconstructRequest, RecordIn

MAX_FILES = 2 * MAX_RECORDS  # a header and its signals
MAX_MV = 1e6  # 1,000 V: no quality flag is worth computing
NOT_RECORDED = np.iinfo(np.int16).min  # of 16-bit samples, as in WFDB and in the shards

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"(\s*:)?', re.DOTALL)

Asked = TypeVar("Asked", bound=ReconstructRequest)


def from_json(body: bytes, kind: type[Asked]) -> Asked:
    """The request; raises RequestValidationError, also where a name stands twice in an object."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
    # The parser keeps the last of two equal names: a lead that is given twice would pass. Names are counted instead.
    expected = len(request.model_fields_set) + sum(len(r.model_fields_set) + len(r.leads) for r in request.records)
    if sum(match[1] is not None for match in _STRING.finditer(body)) != expected:
        raise RequestValidationError([{"loc": ("body",), "msg": "a name is given twice in an object", "type": "json"}])
    return request


def to_record(given: RecordIn) -> Record:
    """A request's record as a `Record`, null as NaN, microvolts as millivolts; raises LsemvaeError."""
    factor = 1e-3 if given.unit == "uV" else 1.0
    with np.errstate(over="ignore"):  # beyond float32 it is infinite, and refused as such
        signal_mv = {
            name: np.array(values, dtype=np.float64).astype(np.float32) * np.float32(factor)
            for name, values in given.leads.items()
        }
    return _checked(Record.from_leads(signal_mv, given.rate_hz))


def from_npy(
    body: bytes, leads: Sequence[str], rate_hz: float, *, unit: str | None, uv_per_lsb: float | None
) -> list[Record | LsemvaeError]:
    """What np.save writes, float32 in mV or uV (NaN: not recorded) or int16 (-32768: not recorded) -> recordings.

    [L, T] or [B, L, T], rows in the order of `leads`. Raises LsemvaeError when the body is not that, or not whole.
    """
    values_BLT = _array(body)
    if values_BLT.dtype.kind == "i":
        if unit is not None or uv_per_lsb is None:
            raise LsemvaeError(
                "int16 samples are a recorder's counts: give uv_per_lsb, microvolts a count, and no unit"
            )
        signal_mv_BLT = values_BLT * np.float32(uv_per_lsb / 1000)
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
        return _checked(Record.from_leads(signal_mv, rate_hz))
    except LsemvaeError as error:
        return error


def _array(body: bytes) -> np.ndarray:
    """[B, L, T] that looks into `body`: nothing is allocated that is not there."""
    try:
        layout = npy_layout(body)
    except UnreadableRecording:
        raise LsemvaeError("the body is no NPY file: write it with np.save") from None
    shape, dtype = layout.shape, layout.dtype
    if dtype not in (np.dtype("<f4"), np.dtype("<i2")) or layout.is_fortran or len(shape) not in (2, 3):
        raise LsemvaeError(
            f"the array is {str(dtype)[:20]} with {len(shape)} axes{', in Fortran order' if layout.is_fortran else ''}: "
            "save little-endian float32 or int16, leads x samples or recordings x leads x samples, in C order"
        )
    shape = (1,) * (3 - len(shape)) + tuple(shape)
    if not (1 <= shape[0] <= MAX_RECORDS and 1 <= shape[1] <= 12 and 1 <= shape[2] <= MAX_SAMPLES):
        raise LsemvaeError(
            f"the array has shape {str(shape)[:60]}: 1 to {MAX_RECORDS} recordings, 12 leads and {MAX_SAMPLES} samples "
            "can be read"
        )
    there, needed = len(body) - layout.start, int(np.prod(shape)) * dtype.itemsize
    if there != needed:
        raise LsemvaeError(f"{there} bytes of samples, {needed} are declared: send the file whole")
    return np.frombuffer(body, dtype=dtype, offset=layout.start).reshape(shape)


class _InMemory(MultiPartParser):
    spool_max_size = 2**31  # the body is in memory already: recordings do not go to a disk


async def uploaded(request: Request) -> dict[str, bytes]:
    """The files of a multipart form, by name; raises LsemvaeError on no file, too many, or one name twice."""
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
    """The recordings among uploaded files, each with the name of its main file, or why it cannot be read.

    What a file is, its content says. A recording may ask for another file of the same upload, and for no other.
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
            found[name] = _checked(read_record(name, fetch))
        except LsemvaeError as error:
            found[name] = error
        of_others |= asked - {name}
    # A signal file may begin like some format, and belongs to the header that asked for it.
    results = [(name, result) for name, result in found.items() if isinstance(result, Record) or name not in of_others]
    for name in files.keys() - found.keys() - of_others:
        error = UnreadableRecording("format", f"{name[:200]!r} is of no known format, and no other file asked for it")
        results.append((name, error))
    if len(results) > MAX_RECORDS:
        raise LsemvaeError(f"{len(results)} recordings: {MAX_RECORDS} are the limit of one request")
    return sorted(results, key=lambda named: list(files).index(named[0]))


def _checked(record: Record) -> Record:
    largest_mv = float(np.fmax.reduce(np.abs(record.signal_mv_LT), axis=None))
    if largest_mv > MAX_MV:
        raise Refused("amplitude", f"a sample is {largest_mv:.3g} mV: check the unit, and leave out what is no number")
    if record.signal_mv_LT.shape[1] > MAX_SAMPLES:
        raise Refused(
            "too_long", f"the recording has {record.signal_mv_LT.shape[1]} samples a lead: {MAX_SAMPLES} are the limit"
        )
    return record
