"""Explains scores in a process of its own, one recording at a time, with a short queue.

The process (`explain_process.py`) computes the score that it explains, too, so that an explanation takes no turn of the
replica's model. It computes on the CPU also where scores are computed on a GPU. It has the lowest priority, and stands
still while the replica's model runs; docs/performance.md says what it still costs the scores beside it. It is started
by the first request.

`concurrent.futures` has pools of processes, too, but it pickles what it sends, cannot end a task that takes too long,
and its processes may outlive a killed parent. Here the two exchange JSON and arrays through pipes: the process ends
when its input does, and is killed and started again when it takes too long.
"""

import asyncio
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.messages import receive, send

if TYPE_CHECKING:
    from lsemvae.record import Record
    from serve.registry import Served

log = logging.getLogger("ray.serve")

ROOT = Path(__file__).parents[1]
_NOT_HANDED_ON = ("LSEMVAE_", "MLFLOW_", "AWS_", "RAY_")  # tokens and passwords, which the process does not need


class NotExplained(Exception):
    """There is no explanation. `outcome` names the reason in the metrics; answered with `status` and `detail`."""

    def __init__(self, outcome: str, status: int, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.outcome, self.status, self.detail, self.retry_after_s = outcome, status, detail, retry_after_s


class Explaining:
    """A queue of `waiting` recordings behind the one that is explained within `limit_s`, and the process for them."""

    def __init__(self, waiting: int, limit_s: float, threads: int | None = None) -> None:
        self._waiting, self._limit_s, self._last_s = waiting, limit_s, 1.0
        self._threads = threads or len(os.sched_getaffinity(0))
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], bytes, Future[tuple[str, bytes]]]] = queue.SimpleQueue()
        self._lock, self._there, self._worker = threading.Lock(), 0, False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def there(self) -> int:
        """Explanations in progress and waiting."""
        return self._there

    @property
    def pid(self) -> int | None:
        """The process that explains, if one runs."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def require_room(self) -> None:
        """Raises NotExplained when the queue is full."""
        if self._there > self._waiting:
            raise NotExplained(
                "busy", 503, "too many explanations at once: try again later", max(1, math.ceil(self._last_s))
            )

    async def explain(
        self, record: "Record", id: str, candidates: "Sequence[Served]", served: Collection[str], *, with_signal: bool
    ) -> tuple[str, bytes]:
        """The outcome, `done` or `refused`, and the body that answers the request: an `ExplainResponse` as JSON.

        The first of the models `candidates` that accepts the recording's leads is explained. `served` are the digests
        of all models: others are forgotten. Raises NotExplained. A recording whose request is cancelled before its turn
        is left out.
        """
        question = {
            "id": id,
            "candidates": [
                {"folder": str(one.folder.resolve()), "described": one.described.model_dump()} for one in candidates
            ],
            "served": [*served],
            "record": {
                "leads": record.leads,
                "rate_hz": record.rate_hz,
                "derived": record.derived,
                "flags": record.flags,
                "shape": record.signal_mv_LT.shape,
            },
            "with_signal": with_signal,
        }
        return await asyncio.wrap_future(self._admit(question, record.signal_mv_LT.tobytes()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The process stands still in this context, if an explanation is in progress.

        The lowest priority is not enough: the process would still get a part of each core, more where the replica has a
        niceness, and all threads of a model wait for the one that gave up its core.
        """
        process = self._process
        if process is None or not self._there:
            yield
            return
        process.send_signal(signal.SIGSTOP)  # it does nothing where the process has ended
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the process. The next explanation starts another one."""
        if process := self._process:
            process.kill()
            process.wait()

    # --- the thread that waits for the process ------------------------------------------------------------------

    def _admit(self, question: dict[str, Any], samples: bytes) -> "Future[tuple[str, bytes]]":
        future: Future[tuple[str, bytes]] = Future()
        with self._lock:
            self.require_room()
            self._there += 1
            if not self._worker:  # a daemon: it must not hold up the end of the replica
                threading.Thread(target=self._work, daemon=True, name="explaining").start()
                self._worker = True
        future.add_done_callback(self._leave)  # at once when it is cancelled while it waits
        self._jobs.put((question, samples, future))
        return future

    def _leave(self, future: "Future[tuple[str, bytes]]") -> None:
        with self._lock:
            self._there -= 1

    def _work(self) -> None:
        while True:
            question, samples, future = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue  # its client is gone
            began = time.perf_counter()
            try:
                answer = self._ask(question, samples)
            except Exception as error:
                future.set_exception(error)
            else:
                self._last_s = time.perf_counter() - began
                future.set_result(answer)

    def _ask(self, question: dict[str, Any], samples: bytes) -> tuple[str, bytes]:
        process = self._running()
        assert process.stdin and process.stdout
        too_long = threading.Event()

        def end() -> None:
            too_long.set()
            process.kill()

        timer = threading.Timer(self._limit_s, end)
        timer.start()
        try:
            send(process.stdin, question, samples)
            message = receive(process.stdout)
        except OSError:
            message = None
        finally:
            timer.cancel()
        if message is None or too_long.is_set():
            process.kill()
            process.wait()
        if message is None and too_long.is_set():
            raise NotExplained(
                "too_long",
                504,
                f"the explanation took longer than {self._limit_s:g} s: ask again when fewer recordings are scored, or "
                "explain it with workflows/explain.py",
            )
        if message is None:
            log.error("the process that explains has ended; another one is started")
            raise NotExplained("ended", 503, "the process that explains has ended: try again later", 1)
        return _answer(*message)

    def _running(self) -> "subprocess.Popen[bytes]":
        process = self._process
        if process is None or process.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)}
            environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serve.explain_process", str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=ROOT,
            )
            _yield_to_others(process.pid)  # before it imports anything
        return process


def _yield_to_others(pid: int) -> None:
    """Lets the process compute only while nothing else wants its core.

    Ray gives its workers a niceness of 15, beside which one of 19 still gets a third of a core. `SCHED_IDLE` gets less,
    and gives its core up as soon as another process wants it.
    """
    os.setpriority(os.PRIO_PROCESS, pid, 19)
    if hasattr(os, "SCHED_IDLE"):  # on Linux
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def _answer(header: dict[str, Any], body: bytes) -> tuple[str, bytes]:
    """The outcome and the body. Raises NotExplained where there is none, and RuntimeError for a fault."""
    match header["outcome"]:
        case "replaced":
            raise NotExplained("replaced", 503, "the model was replaced meanwhile: send the request again", 1)
        case "no_gradient":
            raise NotExplained("no_gradient", 409, f"this model's scores cannot be explained: {header['detail']}")
        case "failed":
            log.error(f"an explanation failed: {header['detail']}")
            raise RuntimeError("an explanation failed")
    return header["outcome"], body
