"""Stops one thread of another process, as a call that never returns would. Linux only; needs the right to trace it."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SEIZE, _INTERRUPT, _DETACH, _WALL = 0x4206, 0x4207, 17, 0x40000000


def busiest_thread(pid: int, work: Callable[[], None]) -> int:
    """The thread of this process that computed most while `work` ran."""
    before = _run_ns(pid)
    work()
    took = {thread: ns - before.get(thread, 0) for thread, ns in _run_ns(pid).items()}
    first, second = sorted(took, key=lambda thread: -took[thread])[:2]
    assert took[first] > 2 * took[second], took
    return first


def _run_ns(pid: int) -> dict[int, int]:
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    }


@contextmanager
def stopped(thread: int) -> Iterator[Callable[[], bool]]:
    """The thread stands still in this block -> whether it has ended.

    Ask that regularly where its process is killed meanwhile: it cannot end entirely before its tracer has taken note.
    """
    if sys.platform != "linux":
        pytest.skip("threads are stopped with Linux's ptrace")
    _trace(_SEIZE, thread)
    try:
        _trace(_INTERRUPT, thread)
        os.waitpid(thread, _WALL)
        yield lambda: _has_ended(thread)
    finally:
        with suppress(ProcessLookupError):  # it has ended with its process
            _trace(_DETACH, thread)


def _has_ended(thread: int) -> bool:
    with suppress(ChildProcessError):
        found, status = os.waitpid(thread, os.WNOHANG | _WALL)
        return found != 0 and (os.WIFEXITED(status) or os.WIFSIGNALED(status))
    return True


def _trace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, None, None) == -1:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            pytest.skip("this machine does not let a process trace another one")
        raise OSError(number, os.strerror(number))
