"""JSON bodies without a Python object for each sample, where simdjson is installed.

This reads only bodies that are valid without doubt, and gives what `inputs.from_json` gives for them. For any other
body `read` returns None. `inputs.from_json` then reads it again: it accepts the body, or says what is wrong.
"""

import json
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from serve.schema import MAX_RECORDS, MAX_SAMPLES, ReconstructRequest

try:
    import simdjson
except ImportError:  # no wheel for this Python: pydantic reads every body
    AVAILABLE = False
else:
    AVAILABLE = True

BYTES_PER_SAMPLE = 48
"""Memory while a body without null is read, measured: simdjson's two tapes, the doubles, and float32."""
MOST_LEADS = 12

Asked = TypeVar("Asked", bound=ReconstructRequest)
_INSTEAD = [0]
"""Stands for the samples of a lead while pydantic validates the rest of a body."""


class Quick(NamedTuple, Generic[Asked]):
    """The validated request, whose leads hold no samples, and the samples of each recording as float64, null as NaN."""

    request: Asked
    leads: list[dict[str, np.ndarray]]


def read(body: bytes, kind: type[Asked]) -> Quick[Asked] | None:
    """The request; None where the body is invalid or unusual, or simdjson is not installed."""
    if not AVAILABLE or not body.lstrip(b" \t\r\n").startswith(b"{"):  # simdjson skips a byte order mark
        return None
    try:
        rest, leads = _split(simdjson.Parser().parse(body))
        text = json.dumps(rest)  # TypeError where a list or object is left, which belongs nowhere
    except (_Unusual, ValueError, TypeError, KeyError, RuntimeError):  # simdjson raises the last four
        return None
    # `as_buffer` flattens nested lists. A bracket in a text counts too, so such a body is read by pydantic.
    if body.count(b"[") != 1 + sum(map(len, leads)):
        return None
    try:  # as JSON, for which pydantic's rules differ from those for Python objects
        return Quick(kind.model_validate_json(text), leads)
    except ValidationError:
        return None


class _Unusual(Exception):
    """Something that pydantic has to judge."""


def _split(document: Any) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """A parsed body -> the body with `_INSTEAD` in place of samples, and the samples. Raises _Unusual."""
    rest = _members(document)
    records = rest.get("records")
    if not isinstance(records, simdjson.Array) or len(records) > MAX_RECORDS:
        raise _Unusual
    rest["records"], leads = [], []
    for document in records:
        record = _members(document)
        rows = _members(record.get("leads"))
        if len(rows) > MOST_LEADS:
            raise _Unusual
        leads.append({name: _samples(row) for name, row in rows.items()})
        rest["records"].append(record | {"leads": dict.fromkeys(rows, _INSTEAD)})
    return rest, leads


def _members(found: Any) -> dict[str, Any]:
    """The members of an object. Raises _Unusual on another value, and on a name that is given twice."""
    if not isinstance(found, simdjson.Object) or len(found) > MOST_LEADS:
        raise _Unusual
    names = list(found.keys())
    # simdjson looks a name up as C text, which ends at NUL.
    if len(set(names)) < len(names) or any("\0" in name for name in names):
        raise _Unusual
    return {name: found[name] for name in names}


def _samples(row: Any) -> np.ndarray:
    """A list of numbers and null -> float64, NaN for null. Raises _Unusual on anything else."""
    if not isinstance(row, simdjson.Array) or not 0 < len(row) <= MAX_SAMPLES:
        raise _Unusual
    try:
        return np.frombuffer(row.as_buffer(of_type="d"))
    except TypeError:  # not all are numbers
        values = row.as_list()
    if not {type(value) for value in values} <= {float, int, type(None)}:
        raise _Unusual
    return np.array(values, dtype=np.float64)
