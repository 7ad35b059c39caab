"""Recordings without a format of their own, CSV and NPY, with rate and unit declared beside the numbers.

CSV: a header row of lead names, then a row for each sample, separated by commas, semicolons or tabs, with decimal
points; an empty cell or `nan` where nothing was recorded. Rate and unit stand in comment lines above the header:

    # rate_hz: 500
    # unit: mV
    I,II,V1
    0.005,0.010,-0.020

or, for files that shall stay as they are, in NAME.json beside NAME.csv: `{"rate_hz": 500, "unit": "mV"}`.

NPY: an array of integers or floats, a row for each lead (or a column), NaN where nothing was recorded, and
beside NAME.npy a NAME.json that names the leads too: `{"rate_hz": 500, "unit": "mV", "leads": ["I", "II", "V1"]}`.

The unit is V, mV, uV or nV. Recorder's counts have `uv_per_lsb` instead, microvolts a count: `# uv_per_lsb: 4.88`.
Whole numbers come back from shards exactly; others to 1/32767 of the largest.
"""

import io
import math
import re
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import strict_json
from lsemvae.formats.counts import naming, to_record
from lsemvae.formats.limits import MAX_TOTAL_SAMPLES, UV_PER_UNIT
from lsemvae.leads import canonical
from lsemvae.record import Record

MAX_CSV_BYTES = 2**26

_MAGIC = b"\x93NUMPY"
_LARGEST = 1e30  # in the largest unit still far within float32
_SEPARATORS = "\t;,"
_DECLARED = re.compile(r"#\s*(rate_hz|unit|uv_per_lsb)\s*[:=]\s*(.*?)[\s,;]*", re.IGNORECASE)
_COMMENTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*+")
_MAX_HEADER = 4096  # as much as is looked at to recognise it
_EMPTY_CELL = re.compile(r"(?:(?<=[\t;,])|^)[ ]*(?=[\t;,]|$)", re.MULTILINE)


@dataclass(frozen=True)
class _Declaration:
    rate_hz: float
    uv_per_unit: float
    leads: tuple[str, ...] | None


def recognise_csv(head: bytes) -> bool:
    """The first line that is no comment is a row of names, at least one of them a lead."""
    lines = (line.strip() for line in _text(head).splitlines())
    header = next((line for line in lines if line and not line.startswith("#")), "")
    if not header.expandtabs().isprintable() or header.startswith(("{", "[", "<")):  # a side file names leads too
        return False
    return any(_is_lead(cell) for cell in _cells(header))


def read_csv(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the CSV file `name` -> Record; `fetch` is asked for NAME.json where no comment declares anything.

    `uv_per_lsb` replaces the unit. Raises UnreadableRecording: nothing declared, a column that is no lead, a cell
    that is no number, rows of unequal length.
    """
    with naming(name):
        if len(content) > MAX_CSV_BYTES:
            raise UnreadableRecording("too_large", f"{len(content)} bytes of CSV: {MAX_CSV_BYTES} are the limit")
        text = _text(content).replace("\r\n", "\n").replace("\r", "\n")
        start = _COMMENTS.match(text).end()
        header, _, rest = text[start:].partition("\n")
        if start > _MAX_HEADER or len(header) > _MAX_HEADER:
            raise UnreadableRecording("header", f"no header row in its first {_MAX_HEADER} characters: name the leads")
        declared = (_DECLARED.fullmatch(line.strip()) for line in text[:start].splitlines())
        pairs = [(match[1].lower(), match[2]) for match in declared if match]
        if len(comments := dict(pairs)) < len(pairs):
            raise UnreadableRecording("undeclared", "its comments declare something twice: leave one of the two out")
        leads = _cells(header)
        if unknown := [cell for cell in leads if not _is_lead(cell)]:
            raise UnreadableRecording("no_ecg_lead", f"column {unknown[0][:40]!r} is no lead: leave it out")
        declaration = _declaration(name, comments, fetch, uv_per_lsb)
        values_TL = _table(rest, _separator(header), len(leads))
        return _record(name, leads, values_TL.T, declaration)


def recognise_npy(head: bytes) -> bool:
    return head.startswith(_MAGIC)


def read_npy(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the NPY file `name`, with the NAME.json that `fetch` gives -> Record.

    Only plain integers and floats are read: nothing is unpickled, and nothing is allocated that the file does not
    hold. `uv_per_lsb` replaces the unit. Raises UnreadableRecording.
    """
    with naming(name):
        values_LT = _array(content)
        declaration = _declaration(name, {}, fetch, uv_per_lsb, with_leads=True)
        n_leads = len(declaration.leads)
        if values_LT.shape[0] != n_leads and values_LT.shape[1] == n_leads:
            values_LT = values_LT.T
        if values_LT.shape[0] != n_leads:
            raise UnreadableRecording(
                "length", f"its array has shape {values_LT.shape}, {n_leads} leads are declared: one row for each lead"
            )
        return _record(name, declaration.leads, values_LT, declaration)


def _record(name: str, leads: tuple[str, ...], values_LT: np.ndarray, declaration: _Declaration) -> Record:
    if len(set(map(canonical, leads))) < len(leads):
        raise UnreadableRecording("duplicate_lead", "a lead is named twice: give each lead once")
    if not leads:
        raise UnreadableRecording("no_ecg_lead", "it names no lead: name at least one")
    values_LT = values_LT.astype(np.float64)
    if (np.abs(values_LT) > _LARGEST).any():
        raise UnreadableRecording("sample", "a number is infinite or beyond 1e30: use NaN where nothing was recorded")
    is_whole = bool(np.all((values_LT == np.rint(values_LT)) | np.isnan(values_LT)))
    rows = dict(zip(leads, values_LT, strict=True))
    return to_record(name, rows, declaration.rate_hz, declaration.uv_per_unit, step_known=is_whole)


# --- what is declared ---------------------------------------------------------------------------------------


def _declaration(
    name: str,
    comments: Mapping[str, str],
    fetch: Callable[[str], bytes],
    uv_per_lsb: float | None,
    *,
    with_leads: bool = False,
) -> _Declaration:
    beside = f"{PurePath(name).stem}.json"
    example = '{"rate_hz": 500, "unit": "mV"' + (', "leads": ["I", "II"]}' if with_leads else "}")
    above = "" if with_leads else "write '# rate_hz: 500' and '# unit: mV' above its header row, or "
    mend = f"{above}put beside it {beside!r} with {example}"
    declared: Mapping[str, Any] = comments
    if not comments:
        try:
            declared = strict_json.parse(beside, fetch(beside))
        except (FileNotFoundError, IsADirectoryError):
            raise UnreadableRecording("undeclared", f"neither rate nor unit is declared: {mend}") from None
    rate_hz = _positive(declared.get("rate_hz"))
    if rate_hz is None:
        raise UnreadableRecording("undeclared", f"rate_hz is declared as {_shown(declared.get('rate_hz'))}: {mend}")
    uv_per_unit = uv_per_lsb if uv_per_lsb is not None else _uv_per_unit(declared)
    if uv_per_unit is None:
        raise UnreadableRecording(
            "undeclared",
            f"unit is declared as {_shown(declared.get('unit'))}, uv_per_lsb as {_shown(declared.get('uv_per_lsb'))}, "
            f"and it must be one of them, the unit V, mV, uV or nV: {mend}",
        )
    if not with_leads:
        return _Declaration(rate_hz, uv_per_unit, None)
    leads = declared.get("leads")
    if not isinstance(leads, list) or not all(isinstance(lead, str) for lead in leads):
        raise UnreadableRecording("undeclared", f"leads are declared as {_shown(leads)}: {mend}")
    if unknown := [lead for lead in leads if not _is_lead(lead)]:
        raise UnreadableRecording("no_ecg_lead", f"{beside!r} names {unknown[0][:40]!r}, which is no lead: {mend}")
    return _Declaration(rate_hz, uv_per_unit, tuple(leads))


def _uv_per_unit(declared: Mapping[str, Any]) -> float | None:
    """None unless the unit or the step is declared, and only one of them."""
    unit, step = declared.get("unit"), declared.get("uv_per_lsb")
    if (unit is None) == (step is None):
        return None
    return _positive(step) if unit is None else UV_PER_UNIT.get(str(unit).strip().casefold())


def _positive(value: object) -> float | None:
    """A positive, finite number, from JSON or from a comment."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _shown(value: object) -> str:
    return "absent" if value is None else repr(value)[:40] if isinstance(value, float | str) else type(value).__name__


# --- the numbers --------------------------------------------------------------------------------------------


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:  # a µ of another age, or a head that ends within a character
        return content.decode("latin-1")


def _separator(header: str) -> str:
    return next((mark for mark in _SEPARATORS if mark in header), ",")


def _cells(header: str) -> tuple[str, ...]:
    return tuple(cell.strip().strip("\"'") for cell in header.split(_separator(header)))


def _is_lead(name: str) -> bool:
    try:
        canonical(name)
    except LsemvaeError:
        return False
    return True


def _table(text: str, separator: str, n_leads: int) -> np.ndarray:
    text = text.rstrip("\n ")
    if not text:
        raise UnreadableRecording("length", "no row follows its header: give a row for each sample")
    text = _EMPTY_CELL.sub("nan", text)
    try:
        values_TL = np.loadtxt(io.StringIO(text), delimiter=separator, comments=None, ndmin=2)
    except ValueError as error:
        raise UnreadableRecording("sample", f"below its header: {' '.join(str(error).split())[:120]}") from None
    if values_TL.shape[1] != n_leads:
        raise UnreadableRecording(
            "length", f"its rows have {values_TL.shape[1]} cells, its header {n_leads}: give each lead a column"
        )
    return values_TL


@dataclass(frozen=True)
class NpyLayout:
    """What the header of an NPY file declares, and where its numbers begin (`start`, in bytes)."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    start: int


def npy_layout(content: bytes) -> NpyLayout:
    """The layout that an NPY file (version 1 or 2) declares; nothing is allocated and nothing is unpickled.

    `np.load` could be made to do both by a hostile header, so the caller checks shape and dtype against its own limits
    and then looks into `content` with `np.frombuffer`. Raises UnreadableRecording("header").
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](stream)
    # numpy parses the header as Python source, so it raises what the parser raises.
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UnreadableRecording("header", f"its NPY header cannot be read ({reason}): save it with np.save") from None
    return NpyLayout(shape, is_fortran, dtype, stream.tell())


def _array(content: bytes) -> np.ndarray:
    """What np.save wrote, at least two-dimensional, without a copy."""
    layout = npy_layout(content)
    shape, dtype = layout.shape, layout.dtype
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnreadableRecording(
            "format", f"its numbers are {str(dtype)[:40]}: save integers or floats, 64 bits at most"
        )
    if len(shape) not in (1, 2) or not 0 < math.prod(shape) <= MAX_TOTAL_SAMPLES or min(shape) < 1:
        code = "too_large" if math.prod(shape) > MAX_TOTAL_SAMPLES else "length"
        raise UnreadableRecording(
            code, f"its array has shape {str(shape)[:80]}: leads x samples can be read, {MAX_TOTAL_SAMPLES} in all"
        )
    there, needed = len(content) - layout.start, math.prod(shape) * dtype.itemsize
    if there != needed:
        raise UnreadableRecording("truncated", f"{there} bytes of numbers, {needed} are declared: copy it again, whole")
    values = np.frombuffer(content, dtype=dtype, offset=layout.start)
    return np.atleast_2d(values.reshape(shape, order="F" if layout.is_fortran else "C"))
