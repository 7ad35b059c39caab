"""The processes of the soak: which there are, and their memory, threads and file handles over time.

Every process that this one has started, directly or not, counts. One that loses its parent comes to this one, as a
child (`adopt_orphans`), so that none is lost.
"""

import ctypes
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsemvae.errors import LsemvaeError

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KINDS = {
    "replica": "ray::ServeReplica",
    "controller": "ray::ServeController",
    "proxy": "ray::HAProxyManager",
    "fallback proxy": "ray::ProxyActor",
    "explains": "serve.explain_process",
    "mlflow": "mlflow",
    "store": "moto.server",
    "cohort job": "score.py",
    "GCS": "gcs_server",
    "raylet": "raylet/raylet",
    "dashboard": "dashboard",
    "serve run": "bin/serve",
}
"""Kind of process -> words of its command line; the first that fits counts. HAProxy is known by its program's name."""


@dataclass(frozen=True)
class Reading:
    """One process at one time. `memory_mb` is its proportional share (PSS): shared pages count once in all."""

    at_s: float
    kind: str
    pid: int
    memory_mb: float
    threads: int
    files: int


@dataclass(frozen=True)
class Trend:
    """A figure of one kind of process: at the start and the end of the run, of all its processes together, and the
    growth of a single process in an hour; `slope` is None where no process lived long enough to tell."""

    start: float
    end: float
    slope: float | None


def adopt_orphans() -> None:
    """From now on, a descendant whose parent ends becomes a child of this process. Linux only."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        raise LsemvaeError("the soak needs Linux: it follows every process that it has started") from None


def descendants() -> list[int]:
    """The processes below this one that run; ended ones that nobody has waited for are left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    children[int(parent)].append(int(entry.name))
    found, left = [], [os.getpid()]
    while left:
        found += (below := children[left.pop()])
        left += below
    return found


def kind_of(pid: int) -> str | None:
    """None where the process has ended, `ray::CLASS` for other actors, "other" where nothing is known of it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if Path(words[0]).name.startswith("haproxy"):
        return "HAProxy"
    line = " ".join(words).strip()
    if not line:
        return None
    of_ray = re.match(r"ray::(\w+)", line)
    return next((kind for kind, part in KINDS.items() if part in line), of_ray[0] if of_ray else "other")


def processes() -> dict[str, list[int]]:
    """Kind -> processes, the oldest first."""
    found: dict[str, list[int]] = defaultdict(list)
    for pid in sorted(descendants(), key=_started):
        if kind := kind_of(pid):
            found[kind].append(pid)
    return found


def _started(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def read_all(at_s: float) -> list[Reading]:
    """One reading of every process, this one included."""
    found = {"this load": [os.getpid()]} | processes()
    readings = []
    for kind, pids in found.items():
        for pid in pids:
            with suppress(OSError, StopIteration):  # it has ended in the meantime
                readings.append(_read(at_s, kind, pid))
    return readings


def _read(at_s: float, kind: str, pid: int) -> Reading:
    place = Path(f"/proc/{pid}")
    memory_kb = _number((place / "smaps_rollup").read_text(), "Pss:")
    threads = _number((place / "status").read_text(), "Threads:")
    return Reading(at_s, kind, pid, memory_kb / 1024, threads, len(list((place / "fd").iterdir())))


def _number(text: str, key: str) -> int:
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(key)))


FIGURES = ("memory_mb", "threads", "files")


def trends(readings: Iterable[Reading], warm_s: float, least_s: float) -> dict[str, dict[str, Trend]]:
    """Kind -> figure -> trend. The first `warm_s` of each process do not count, nor one observed for less than
    `least_s` after them."""
    by_kind: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        by_kind[reading.kind].append(reading)
    times = sorted({reading.at_s for found in by_kind.values() for reading in found})
    return {
        kind: {figure: _trend(found, figure, times, warm_s, least_s) for figure in FIGURES}
        for kind, found in by_kind.items()
    }


def _trend(found: list[Reading], figure: str, times: list[float], warm_s: float, least_s: float) -> Trend:
    total: dict[float, float] = dict.fromkeys(times, 0.0)
    for reading in found:
        total[reading.at_s] += getattr(reading, figure)
    values = [total[at_s] for at_s in times]
    tenth = max(1, len(values) // 10)
    return Trend(
        float(np.median(values[:tenth])), float(np.median(values[-tenth:])), _slope(found, figure, warm_s, least_s)
    )


def _slope(found: list[Reading], figure: str, warm_s: float, least_s: float) -> float | None:
    """The growth of a single process in an hour: one slope for all, each with a level of its own.

    Of two processes that lived 10 minutes each, one from 100 to 101 MB and one from 120 to 121 MB, the slope is 6 MB an
    hour, and the 20 MB between them do not count.
    """
    covariance = variance = 0.0
    by_pid: Mapping[int, list[Reading]] = defaultdict(list)
    for reading in found:
        by_pid[reading.pid].append(reading)
    for readings in by_pid.values():
        born_s = readings[0].at_s
        known = [reading for reading in readings if reading.at_s >= born_s + warm_s]
        if not known or known[-1].at_s - known[0].at_s < least_s:
            continue
        t = np.array([reading.at_s for reading in known]) / 3600
        y = np.array([getattr(reading, figure) for reading in known], dtype=float)
        covariance += float(((t - t.mean()) * (y - y.mean())).sum())
        variance += float(((t - t.mean()) ** 2).sum())
    return covariance / variance if variance else None


def end_all() -> None:
    """Kill what is left of the processes below this one."""
    for _ in range(50):
        if not (left := descendants()):
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
