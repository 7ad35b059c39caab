"""Recordings as CSV and NPY, with rate and unit declared beside the numbers.

CSV: a header row of lead names, then a row for each sample. Cells are separated by commas, semicolons, tabs or blanks;
numbers have decimal points. A cell is empty or `nan` where nothing was recorded. Comment lines above the header declare
rate and unit:

    # rate_hz: 500
    # unit: mV
    I,II,V1
    0.005,0.010,-0.020

A file that must not be changed has NAME.json beside NAME.csv instead: `{"rate_hz": 500, "unit": "mV"}`.

NPY: an array of integers or floats with a row (or a column) for each lead, NaN where nothing was recorded. NAME.json
beside NAME.npy also names the leads: `{"rate_hz": 500, "unit": "mV", "leads": ["I", "II", "V1"]}`.

The unit is V, mV, uV or nV. For the counts of a recorder, give `uv_per_lsb` instead of the unit, in microvolts a count:
`# uv_per_lsb: 4.88`. Shards keep whole numbers exactly, and others to 1/32767 of the largest.
"""

import io
import math
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import strict_json
from lsemvae.formats.counts import naming, to_record
from lsemvae.formats.limits import MAX_TOTAL_SAMPLES, UV_PER_UNIT
from lsemvae.leads import canonical, identify
from lsemvae.record import Record

MAX_CSV_BYTES = 2**26

_MAGIC = b"\x93NUMPY"
_LARGEST = 1e30  # far within float32, even in the largest unit
_SEPARATORS = "\t;, "  # the first of these that the header row holds
_DECLARED = re.compile(r"#\s*(rate_hz|unit|uv_per_lsb)\s*[:=]\s*(.*?)[\s,;]*", re.IGNORECASE)
_COMMENTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*+")
_MAX_HEADER = 4096  # characters; no more are read to recognise the file
_DECIMAL_COMMA = re.compile(r"\d,\d")
_EMPTY_CELL = re.compile(r"(?:(?<=[\t;,])|^)[ ]*(?=[\t;,]|$)", re.MULTILINE)


@dataclass(frozen=True)
class _Declaration:
    rate_hz: float
    uv_per_unit: float
    leads: tuple[str, ...] = ()


def as_csv(signal_mv_LT: np.ndarray, rate_hz: float, leads: Sequence[str], decimals: int) -> str:
    """The text of a CSV that `read_csv` reads, of a signal [L, T] in mV whose rows are these leads."""
    rows = "\n".join(",".join(f"{value:.{decimals}f}" for value in row) for row in signal_mv_LT.T)
    return f"# rate_hz: {rate_hz:g}\n# unit: mV\n{','.join(leads)}\n{rows}\n"


def recognise_csv(head: bytes) -> bool:
    """Whether the first line that is no comment is a row of names, and a lead is among them.

    Above a table that declares no rate, at least half of the names must be leads: a table of results may have a column
    "I" too.
    """
    lines = [line.strip() for line in _text(head).splitlines()]
    header = next((line for line in lines if line and not line.startswith("#")), "")
    if not header.expandtabs().isprintable() or header.startswith(("{", "[", "<")):  # a side file names leads too
        return False
    cells = _cells(header)
    n_leads = sum(lead is not None for lead in identify(cells))
    is_declared = any(_DECLARED.fullmatch(line) for line in lines)
    return n_leads > 0 and (is_declared or 2 * n_leads >= len(cells))


def read_csv(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the CSV file `name` -> Record. `fetch` gives NAME.json if no comment declares anything.

    `uv_per_lsb` replaces the unit. Raises UnreadableRecording if rate or unit is not declared, a column is no lead, a
    cell is no number, or rows differ in length.
    """
    with naming(name):
        if len(content) > MAX_CSV_BYTES:
            raise UnreadableRecording("too_large", f"it has {len(content)} bytes of CSV: {MAX_CSV_BYTES} are the limit")
        text = _text(content).replace("\r\n", "\n").replace("\r", "\n")
        comments_end = _COMMENTS.match(text)
        start = comments_end.end() if comments_end else 0
        header, _, rest = text[start:].partition("\n")
        if start > _MAX_HEADER or len(header) > _MAX_HEADER:
            raise UnreadableRecording(
                "header", f"it has no header row in its first {_MAX_HEADER} characters: name the leads"
            )
        declared = (_DECLARED.fullmatch(line.strip()) for line in text[:start].splitlines())
        pairs = [(match[1].lower(), match[2]) for match in declared if match]
        if len(comments := dict(pairs)) < len(pairs):
            raise UnreadableRecording("undeclared", "its comments declare something twice: remove one of the two")
        leads = _cells(header)
        if unknown := [cell for cell, lead in zip(leads, identify(leads), strict=True) if lead is None]:
            raise UnreadableRecording("no_ecg_lead", f"column {unknown[0][:40]!r} is no lead: remove it")
        declaration = _declaration(name, comments, fetch, uv_per_lsb)
        values_TL = _table(rest, _separator(header), len(leads))
        return _record(name, leads, values_TL.T, declaration)


def recognise_npy(head: bytes) -> bool:
    return head.startswith(_MAGIC)


def read_npy(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the NPY file `name`, `fetch` gives its NAME.json -> Record.

    Only integers and floats are read. Nothing is unpickled, and no more is allocated than the file holds. `uv_per_lsb`
    replaces the unit. Raises UnreadableRecording.
    """
    with naming(name):
        values_LT = _array(content)
        declaration = _declaration(name, {}, fetch, uv_per_lsb, with_leads=True)
        n_leads = len(declaration.leads)
        if values_LT.shape[0] != n_leads and values_LT.shape[1] == n_leads:
            values_LT = values_LT.T
        if values_LT.shape[0] != n_leads:
            raise UnreadableRecording(
                "length", f"its array has shape {values_LT.shape} and {n_leads} leads are declared: give a row a lead"
            )
        return _record(name, declaration.leads, values_LT, declaration)


def _record(name: str, leads: tuple[str, ...], values_LT: np.ndarray, declaration: _Declaration) -> Record:
    if len(set(map(canonical, leads))) < len(leads):
        raise UnreadableRecording("duplicate_lead", "it names a lead twice: give each lead once")
    if not leads:
        raise UnreadableRecording("no_ecg_lead", "it names no lead: name at least one")
    values_LT = values_LT.astype(np.float64)
    if (np.abs(values_LT) > _LARGEST).any():
        raise UnreadableRecording(
            "sample", "it has a number that is infinite or beyond 1e30: use NaN where nothing was recorded"
        )
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
            f"unit is declared as {_shown(declared.get('unit'))}, uv_per_lsb as {_shown(declared.get('uv_per_lsb'))}: "
            f"declare one of the two, the unit as V, mV, uV or nV; {mend}",
        )
    if not with_leads:
        return _Declaration(rate_hz, uv_per_unit)
    leads = declared.get("leads")
    if not isinstance(leads, list) or not all(isinstance(lead, str) for lead in leads):
        raise UnreadableRecording("undeclared", f"leads are declared as {_shown(leads)}: {mend}")
    if unknown := [name for name, lead in zip(leads, identify(leads), strict=True) if lead is None]:
        raise UnreadableRecording("no_ecg_lead", f"{beside!r} names {unknown[0][:40]!r}, which is no lead: {mend}")
    return _Declaration(rate_hz, uv_per_unit, tuple(leads))


def _uv_per_unit(declared: Mapping[str, Any]) -> float | None:
    """Microvolts a number; None unless exactly one of unit and step is declared."""
    unit, step = declared.get("unit"), declared.get("uv_per_lsb")
    if (unit is None) == (step is None):
        return None
    return _positive(step) if unit is None else UV_PER_UNIT.get(str(unit).strip().casefold())


def _positive(value: object) -> float | None:
    """The positive, finite number in JSON or a comment; None for anything else."""
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
    except UnicodeDecodeError:  # a µ in Latin-1, or a head that ends within a character
        return content.decode("latin-1")


def _separator(header: str) -> str:
    if identify([header])[0]:  # a single column such as "Lead I"
        return ","
    return next((mark for mark in _SEPARATORS if mark in header), ",")


def _cells(header: str) -> tuple[str, ...]:
    separator = _separator(header)
    cells = header.split() if separator == " " else header.split(separator)
    return tuple(cell.strip().strip("\"'").strip() for cell in cells)


def _table(text: str, separator: str, n_leads: int) -> np.ndarray:
    text = text.rstrip("\n ")
    if not text:
        raise UnreadableRecording("length", "no row follows its header: give a row for each sample")
    if separator != " ":  # blanks cannot leave a cell empty
        text = _EMPTY_CELL.sub("nan", text)
    try:
        delimiter = None if separator == " " else separator
        values_TL = np.loadtxt(io.StringIO(text), delimiter=delimiter, comments=None, ndmin=2)
    except ValueError as error:
        if separator != "," and _DECIMAL_COMMA.search(text):
            raise UnreadableRecording("sample", "its numbers have decimal commas: write decimal points") from None
        raise UnreadableRecording("sample", f"below its header: {' '.join(str(error).split())[:120]}") from None
    if values_TL.shape[1] != n_leads:
        raise UnreadableRecording(
            "length", f"its rows have {values_TL.shape[1]} cells and its header {n_leads}: give each lead a column"
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
            "format", f"its numbers are {str(dtype)[:40]}: save integers or floats of at most 64 bits"
        )
    if len(shape) not in (1, 2) or not 0 < math.prod(shape) <= MAX_TOTAL_SAMPLES or min(shape) < 1:
        code = "too_large" if math.prod(shape) > MAX_TOTAL_SAMPLES else "length"
        raise UnreadableRecording(
            code, f"its array has shape {str(shape)[:80]}: give leads x samples, at most {MAX_TOTAL_SAMPLES} in all"
        )
    there, needed = len(content) - layout.start, math.prod(shape) * dtype.itemsize
    if there != needed:
        raise UnreadableRecording(
            "truncated", f"it has {there} bytes of numbers, {needed} are declared: copy the whole file again"
        )
    values = np.frombuffer(content, dtype=dtype, offset=layout.start)
    return np.atleast_2d(values.reshape(shape, order="F" if layout.is_fortran else "C"))
