"""JSON as it is specified: numbers are finite, a name stands once. Python's own reader is more lenient."""

import json
from typing import Any, NoReturn

from lsemvae.errors import UnreadableRecording

MAX_BYTES = 2**24
"""Half an hour of six leads, twice."""
MAX_CONTAINERS = 10_000
"""Lists and objects: they cost twenty times the bytes that they are written in."""


def parse(name: str, content: bytes) -> dict[str, Any]:
    """The object in the file `name`; raises UnreadableRecording when it is not one, or one too large.

    Refused are NaN, Infinity, names that stand twice in an object, and what is no UTF-8. An integer may still
    be of any size up to 4,300 digits, and 1e400 is infinite: whoever uses a number checks its range.
    """
    if len(content) > MAX_BYTES:
        raise UnreadableRecording("too_large", f"{name}: {len(content)} bytes of JSON: {MAX_BYTES} are the limit")
    if (containers := content.count(b"[") + content.count(b"{")) > MAX_CONTAINERS:
        raise UnreadableRecording("too_large", f"{name}: {containers} lists and objects: {MAX_CONTAINERS} are allowed")
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableRecording("json", f"{name}: no JSON that can be read ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise UnreadableRecording("json", f"{name}: holds a {type(value).__name__}, not an object such as {{…}}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in value if names.count(name) > 1)[:40]!r} stands twice")
    return value
