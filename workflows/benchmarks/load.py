"""The load generator of `serve`, a process of its own: each line of input is a `Run`, each line of output a `Found`.

It uses little CPU time beside what it measures: requests are built once and sent unchanged on open connections.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Run:
    """One measurement. The loop is closed, or with `rate` open: `rate` requests a second, whatever the answers.

    port      on 127.0.0.1
    requests  files with complete HTTP/1.1 requests, sent in turn
    clients   connections; each waits for its answer before it sends again
    seconds   of counting, after `warm_s` seconds that are not counted
    """

    port: int
    requests: Sequence[str]
    clients: int
    seconds: float
    warm_s: float = 0.0
    rate: float | None = None


@dataclass(frozen=True)
class Found:
    """Answers with status 200 a second, and the 50th, 95th and 99th percentile of their latency in milliseconds.

    In an open loop, latency counts from the moment when the request was due, so it includes the wait for a free
    connection. `failed` counts other answers by status. `answers` is their number in the whole run, `cpu_s` the CPU
    time of this process.
    """

    per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failed: dict[str, int]
    answers: int
    cpu_s: float


class Connection(asyncio.Protocol):
    """A connection with one request at a time. Answers must have a Content-Length."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> int:
        """Send a request -> the status of its answer; the body is read and dropped."""
        self._received, self._answer = b"", asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and self._answer and not self._answer.done():
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(body) >= length:
                self._answer.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


async def measure(run: Run) -> Found:
    """Send requests, and count the answers between `warm_s` and `warm_s + seconds`."""
    requests = itertools.cycle([Path(name).read_bytes() for name in run.requests])
    began = time.perf_counter()
    counting, end = began + run.warm_s, began + run.warm_s + run.seconds
    due = (began + n / run.rate for n in itertools.count()) if run.rate else iter(time.perf_counter, None)
    latencies_s: list[float] = []
    failed: Counter[str] = Counter()
    answers, last = 0, end

    def over() -> bool:
        """Whether the time is over. A slow server is waited for until its first answer: a rate of 0 has no ratio."""
        now = time.perf_counter()
        return now > end + (0 if latencies_s else PATIENCE_S)

    async def client() -> None:
        nonlocal answers, last
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", run.port)
        for at in due:
            if at > time.perf_counter():
                await asyncio.sleep(at - time.perf_counter())
            if over():
                break
            try:
                status = await connection.ask(next(requests))
            except OSError as error:
                failed[type(error).__name__] += 1
                _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", run.port)
                continue
            now, answers = time.perf_counter(), answers + 1
            if counting <= now and (now <= end or not latencies_s):
                if status == 200:
                    latencies_s.append(now - at)
                    last = max(end, now)
                else:
                    failed[str(status)] += 1
        connection.close()

    cpu_s = time.process_time()
    await asyncio.gather(*(client() for _ in range(run.clients)))
    cpu_s = time.process_time() - cpu_s
    p50, p95, p99 = np.percentile(latencies_s or [np.nan], (50, 95, 99)) * 1000
    return Found(len(latencies_s) / (last - counting), p50, p95, p99, dict(failed), answers, cpu_s)


class Generator:
    """This file as a child process of the benchmark."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, run: Run) -> Found:
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        return Found(**json.loads(self._process.stdout.readline()))


@contextmanager
def generator() -> Iterator[Generator]:
    """Run the process while the context lasts."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Generator(process)
        process.stdin.close()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asdict(asyncio.run(measure(Run(**json.loads(line)))))), flush=True)
