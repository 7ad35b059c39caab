"""JSON as specified: numbers are finite and names are unique. Python's own parser is more lenient."""

import json
from typing import Any, NoReturn

from lsemvae.errors import UnreadableRecording

MAX_BYTES = 2**24
"""Twice the size of half an hour of six leads."""
MAX_CONTAINERS = 10_000
"""Lists and objects; each takes twenty times as many bytes in memory as in the file."""


def parse(name: str, content: bytes) -> dict[str, Any]:
    """The object in the file `name`; raises UnreadableRecording if the file holds no object, or is too large.

    Also refused are NaN, Infinity, names that occur twice in an object, and text that is not UTF-8. An integer may
    still have up to 4,300 digits, and 1e400 becomes infinite, so the caller must check the range of every number.
    """
    if len(content) > MAX_BYTES:
        raise UnreadableRecording(
            "too_large", f"{name}: it has {len(content)} bytes of JSON: {MAX_BYTES} are the limit"
        )
    if (containers := content.count(b"[") + content.count(b"{")) > MAX_CONTAINERS:
        raise UnreadableRecording(
            "too_large", f"{name}: it has {containers} lists and objects: {MAX_CONTAINERS} are the limit"
        )
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableRecording("json", f"{name}: it is no valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise UnreadableRecording("json", f"{name}: it holds a {type(value).__name__}, not an object such as {{…}}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in value if names.count(name) > 1)[:40]!r} occurs twice")
    return value
