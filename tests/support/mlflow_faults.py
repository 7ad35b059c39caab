"""Faults of a real MLflow server: stopped, killed, or its SQLite file locked by another process."""

import contextlib
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path


def _server(uri: str) -> tuple[int, str]:
    """The first process of the server, and its command line."""
    port = uri.rpartition(":")[2]
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return min((pid, words) for pid, words in found.items() if "mlflow server" in words and f"--port {port} " in words)


def kill_server(uri: str) -> None:
    """SIGKILL of the server and its workers."""
    os.killpg(os.getpgid(_server(uri)[0]), signal.SIGKILL)


@contextlib.contextmanager
def silent(uri: str) -> Iterator[None]:
    """The server neither answers nor refuses."""
    group = os.getpgid(_server(uri)[0])
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Another process writes to the server's database, and does not end."""
    (path,) = re.findall(r"sqlite:///(\S+)", _server(uri)[1])
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        database.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        database.close()
