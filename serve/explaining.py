"""Explains scores in a process of its own, one recording at a time, with a short queue.

The process (`explain_process.py`) has the lowest priority; docs/performance.md says what it still costs the scores
beside it. It computes on the CPU also where scores are computed on a GPU. It is started by the first request.
`concurrent.futures` has pools of processes, too, but it pickles what it sends, cannot end a task that takes too long,
and its processes may outlive a killed parent. Here the two exchange JSON and arrays through pipes: the process ends
when its input does, and is killed and started again when it takes too long.
"""

import asyncio
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.messages import receive, send

if TYPE_CHECKING:
    from lsemvae.record import Record
    from serve.registry import Served
    from serve.schema import ScoreOut

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
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], bytes, Future[bytes]]] = queue.SimpleQueue()
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
        self, record: "Record", answer: "ScoreOut", chosen: "Served", served: Collection[str], *, with_signal: bool
    ) -> bytes:
        """The body that answers the request: an `ExplainResponse` with the answer and its explanation, as JSON.

        `answer` is that of the model `chosen`, and `served` are the digests of all models: others are forgotten.
        Raises NotExplained. A recording whose request is cancelled before its turn is left out.
        """
        signal_mv_LT = record.signal_for(chosen.described.leads)
        question = {
            "folder": str(chosen.folder.resolve()),
            "digest": chosen.described.digest,
            "served": [*served],
            "rate_hz": record.rate_hz,
            "shape": signal_mv_LT.shape,
            "with_signal": with_signal,
            "answer": answer.model_dump(),
        }
        return await asyncio.wrap_future(self._admit(question, signal_mv_LT.tobytes()))

    def close(self) -> None:
        """Ends the process. The next explanation starts another one."""
        if process := self._process:
            process.kill()
            process.wait()

    # --- the thread that waits for the process ------------------------------------------------------------------

    def _admit(self, question: dict[str, Any], signal: bytes) -> "Future[bytes]":
        future: Future[bytes] = Future()
        with self._lock:
            self.require_room()
            self._there += 1
            if not self._worker:  # a daemon: it must not hold up the end of the replica
                threading.Thread(target=self._work, daemon=True, name="explaining").start()
                self._worker = True
        future.add_done_callback(self._leave)  # at once when it is cancelled while it waits
        self._jobs.put((question, signal, future))
        return future

    def _leave(self, future: "Future[bytes]") -> None:
        with self._lock:
            self._there -= 1

    def _work(self) -> None:
        while True:
            question, signal, future = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue  # its client is gone
            began = time.perf_counter()
            try:
                body = self._ask(question, signal)
            except Exception as error:
                future.set_exception(error)
            else:
                self._last_s = time.perf_counter() - began
                future.set_result(body)

    def _ask(self, question: dict[str, Any], signal: bytes) -> bytes:
        process = self._running()
        assert process.stdin and process.stdout
        too_long = threading.Event()

        def end() -> None:
            too_long.set()
            process.kill()

        timer = threading.Timer(self._limit_s, end)
        timer.start()
        try:
            send(process.stdin, question, signal)
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
                f"the explanation took longer than {self._limit_s:g} s: send a shorter recording, or explain it with "
                "workflows/explain.py",
            )
        if message is None:
            log.error("the process that explains has ended; another one is started")
            raise NotExplained("ended", 503, "the process that explains has ended: try again later", 1)
        return _body(*message)

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


def _body(header: dict[str, Any], body: bytes) -> bytes:
    """Raises NotExplained, and RuntimeError for a fault of the explanation, where there is no body."""
    match header["outcome"]:
        case "replaced":
            raise NotExplained("replaced", 503, "the model was replaced meanwhile: send the request again", 1)
        case "no_gradient":
            raise NotExplained("no_gradient", 409, f"this model's scores cannot be explained: {header['detail']}")
        case "failed":
            log.error(f"an explanation failed: {header['detail']}")
            raise RuntimeError("an explanation failed")
    return body
