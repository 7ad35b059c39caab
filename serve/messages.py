"""Messages between the service and the process that explains: a line of JSON, then bytes. Nothing is pickled."""

import json
from collections.abc import Mapping
from typing import IO, Any


def send(stream: IO[bytes], header: Mapping[str, Any], body: bytes = b"") -> None:
    """Raises OSError where the other side is gone."""
    stream.write(json.dumps({**header, "bytes": len(body)}).encode() + b"\n" + body)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None where the stream ends before it is whole."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    n_bytes = header.pop("bytes")
    body = stream.read(n_bytes)
    return (header, body) if len(body) == n_bytes else None
