"""Read hostile files in a process of its own: a reader that hangs fails the test and does not block the others."""

import multiprocessing
import re
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import Fetch, read_record

BOUND_S = 60.0
"""A read takes milliseconds. On a busy machine it still takes much less than this."""


class Hung(BaseException):
    """A read that did not end. It is no Exception, so that hypothesis does not search for a smaller example: each
    attempt would take as long."""


class Apart:
    """Calls a function in another process, one call at a time."""

    def __init__(self, function: Callable[..., Any], bound_s: float = BOUND_S) -> None:
        self._function, self._bound_s = function, bound_s
        self._process: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns. Raises Hung with the arguments when it takes longer than the bound."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_answer, args=(self._function, theirs), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # it has started, which is not counted
        self._pipe.send(arguments)
        if self._pipe.poll(self._bound_s):
            return self._pipe.recv()
        self.close()
        raise Hung(f"no answer within {self._bound_s:g} s to {arguments!r}")

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None


def _answer(function: Callable[..., Any], pipe: Connection) -> None:
    pipe.send("started")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*arguments))


def in_memory(files: Mapping[str, bytes]) -> Fetch:
    """The files as `read_record` fetches them."""

    def fetch(name: str) -> bytes:
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    return fetch


def read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A few facts of the record, or why it was refused, or the traceback of what else the reader raised."""

    try:
        record = read_record(name, in_memory(files))
    except UnreadableRecording as error:
        return {"code": error.code, "text": str(error)}
    except BaseException:
        return {"raised": traceback.format_exc()}
    signal_mv_LT = record.signal_mv_LT
    return {"dtype": signal_mv_LT.dtype.name, "infinite": bool(np.isinf(signal_mv_LT).any()), "rate_hz": record.rate_hz}


@cache
def reader() -> Apart:
    """The process that reads for all tests of this run."""
    return Apart(read)


def reads_or_refuses(files: Mapping[str, bytes], name: str | None = None) -> None:
    """Fails when a reader hangs, or raises anything but its own error: a line with a code, without "SECRET"."""
    found = reader()(dict(files), next(iter(files)) if name is None else name)
    assert "raised" not in found, found["raised"]
    if "code" in found:
        assert re.fullmatch(r"[a-z_]+", found["code"])
        assert "\n" not in found["text"] and len(found["text"]) < 1000
        assert "SECRET" not in found["text"]
    else:
        assert found["dtype"] == "float32" and not found["infinite"] and found["rate_hz"] > 0
