"""Run commands and servers in tests: where files are, wait for a server, end it with every process it started."""

import contextlib
import gc
import io
import os
import runpy
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


SHARED_DATA = ROOT.parent / "shared" / "data"


# Ray reads these when it is first imported, which may be long before a test asks for the cluster.
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


ANY_WORKER_PORT = ("--min-worker-port=0", "--max-worker-port=0")
"""For `ray start`, whose default is one range of ports for every cluster of a machine."""


def ray_folder() -> Path:
    """A value for RAY_TMPDIR, which each cluster needs for itself.

    Ray writes down there which cluster was started last. Ray Train's clean-up in a worker asks that cluster whether its
    run lives; another one that was started on the same machine would say that it does not. The path is short, because
    the names of Ray's sockets hold it and may have 107 characters.
    """
    return Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))


def text_of(path: Path) -> str:
    """What another process has written to a log so far. Empty where the log is gone; a character may be cut in two."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def lines_of(path: Path) -> list[str]:
    """The whole lines of a file that another process writes; the line that is being written is left out."""
    return text_of(path).rpartition("\n")[0].splitlines()


def wait_for(url: str, process: subprocess.Popen, log: Path, attempts: int = 3000, headers: dict | None = None) -> None:
    for _ in range(attempts):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"{url} did not come up:\n{text_of(log)[-3000:]}")


def end_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
    process.wait()


def end_serve(process: subprocess.Popen) -> None:
    """Ends `serve run` and Serve itself, whose proxies would otherwise keep their port."""
    end_group(process)
    subprocess.run(
        [str(Path(sys.executable).with_name("serve")), "shutdown", "-y"], cwd=ROOT, capture_output=True, check=True
    )


@dataclass(frozen=True)
class Cluster:
    """A running head node, and the environment that its clients need (it is set for the session)."""

    dashboard: str
    environment: dict[str, str]


def workflow(
    name: str, *arguments: object, check: bool = True, alone: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `workflows/NAME.py …`; with `check` a failure shows what it printed.

    It runs in this process, which saves the seconds in which a new one imports Ray, MLflow and torch. With `alone`, or
    an environment of its own, it runs in a process of its own, as a user would start it.
    """
    path, words = ROOT / "workflows" / f"{name}.py", list(map(str, arguments))
    if alone or environment:
        done = subprocess.run(
            [sys.executable, str(path), *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
        )
    else:
        done = _run_here(path, words)
    if check and done.returncode:
        pytest.fail(f"{name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Ray takes SIGINT and SIGTERM over and keeps them: without this, Ctrl-C would no longer end pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # else it was not Python's
                signal.signal(number, handler)


def _run_here(path: Path, words: list[str]) -> subprocess.CompletedProcess:
    """Run the program as `__main__` of this process; it stays connected to the Ray session that it joins."""
    out, err, status = _Written("stdout"), _Written("stderr"), 0
    environment, arguments = dict(os.environ), sys.argv
    sys.argv = [str(path), *words]
    try:
        with kept_signals(), contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as ended:
                status = ended.code or 0
            except Exception:
                status = 1
                traceback.print_exc()
    finally:
        sys.argv = arguments
        for name in {name for name, _ in environment.items() ^ os.environ.items()}:
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]
    gc.collect()  # what the program has left would keep its actors, and they their CPUs
    if not isinstance(status, int):
        status, _ = 1, err.write(f"{status}\n")
    return subprocess.CompletedProcess([str(path), *words], status, out.getvalue(), err.getvalue())


class _Written(io.StringIO):
    """What this thread writes to a stream of `sys`.

    Other threads keep the stream itself: Ray's bring what workers of earlier tests print. In another process, to which
    a progress bar may take it, it is that process's stream.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._thread, self._others = name, threading.get_ident(), getattr(sys, name)

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self._thread else self._others.write(text)

    def __reduce__(self) -> tuple:
        return getattr, (sys, self._name)


@dataclass(frozen=True)
class Trained:
    """The result of a command: where its files are, and what it printed."""

    folder: Path
    printed: str
