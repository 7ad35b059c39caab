"""The clients of the soak: scores, explanations, cohort jobs, bad input, and clients that send slowly or not at all."""

import asyncio
import itertools
import json
import random
import re
from collections.abc import Awaitable, Callable
from pathlib import PurePosixPath

import httpx
import numpy as np
import pyarrow.parquet as pq

from benchmarks.soak.cases import Case, bad, explained, fault_of, fault_of_row, good
from benchmarks.soak.events import Rig
from benchmarks.soak.ledger import Ledger, Verdict
from lsemvae.storage import Storage

Call = Callable[[random.Random], Awaitable[None]]

TIMEOUT_S = 60.0
BUCKET = "s3://soak"
JOB_ATTEMPTS, JOB_LIMIT_S = 8, 900
BODY_TIMEOUT_S = 3
"""`body_timeout_s` of the service: a client that stops in the middle is told so after this time."""


class Clients:
    """Clients of an endpoint, until `stop` is set. What comes back goes to the ledger."""

    def __init__(self, rig: Rig, ledger: Ledger, counts_NLT: np.ndarray, pause_s: float) -> None:
        self._rig, self._ledger, self._pause_s = rig, ledger, pause_s
        self._good, self._bad = good(counts_NLT), bad(counts_NLT)
        self._explained = explained(counts_NLT[:2])
        self._host, self._port = rig.url.removeprefix("http://").split(":")
        self.stop = asyncio.Event()

    async def run(self, scoring: int, seed: int, job_pause_s: float) -> None:
        """`scoring` clients that ask for scores, and one of each other kind."""
        headers = {"Authorization": f"Bearer {self._rig.token}"}
        rngs = (random.Random(f"{seed} {number}") for number in itertools.count())
        async with httpx.AsyncClient(base_url=self._rig.url, timeout=TIMEOUT_S, headers=headers) as client:
            repeated: list[tuple[float, Call]] = [
                *[(self._pause_s, lambda rng: self._ask(client, rng.choice(self._good)))] * scoring,
                (4 * self._pause_s, lambda rng: self._ask(client, rng.choice(self._bad))),
                (20 * self._pause_s, lambda rng: self._ask(client, rng.choice(self._explained))),
                (4 * self._pause_s, self._send_slowly),
            ]
            async with asyncio.TaskGroup() as tasks:
                for pause_s, call in repeated:
                    tasks.create_task(self._repeat(call, pause_s, next(rngs)))
                tasks.create_task(self._score_cohorts(client, job_pause_s, next(rngs)))

    async def _repeat(
        self, call: Callable[[random.Random], Awaitable[None]], pause_s: float, rng: random.Random
    ) -> None:
        while not self.stop.is_set():
            await call(rng)
            await self._pause(rng.uniform(0.5, 1.5) * pause_s)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass

    async def _ask(self, client: httpx.AsyncClient, case: Case) -> None:
        began_s = self._ledger.now_s()
        try:
            answer = await client.post(case.path, **case.sends)
        except httpx.HTTPError as error:
            self._ledger.add(began_s, case.kind, type(error).__name__, "failed")
            return
        self._judge(began_s, case, answer)

    def _judge(self, began_s: float, case: Case, answer: httpx.Response) -> None:
        status, fault = answer.status_code, ""
        verdict: Verdict
        if status == 200:
            fault = fault_of(answer, case, self._rig.known) or ""
            verdict = "wrong" if fault else "right"
        else:
            verdict = "as it must" if status in case.statuses else "failed"
        self._ledger.add(began_s, case.kind, str(status), verdict, fault)

    # --- slow clients ---------------------------------------------------------------------------------------------

    async def _send_slowly(self, rng: random.Random) -> None:
        """A client that sends in small parts, stops in its headers or its body, or goes away."""
        kind = rng.choice(("parts", "stops in its body", "stops in its headers", "goes away"))
        case = rng.choice([case for case in self._good if case.kind.startswith("JSON")])
        body = case.sends["content"]
        lines = [f"POST {case.path} HTTP/1.1", "Host: soak", "Connection: close", "Content-Type: application/json"]
        lines += [f"Authorization: Bearer {self._rig.token}", f"Content-Length: {len(body)}", "", ""]
        head = "\r\n".join(lines).encode()
        sent = {"stops in its headers": head[:60], "parts": head + body}.get(kind, head + body[: len(body) // 2])
        began_s, answered = self._ledger.now_s(), b""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._host, int(self._port))
                try:
                    for start in range(0, len(sent), len(sent) // 8):
                        writer.write(sent[start : start + len(sent) // 8])
                        await writer.drain()
                        await asyncio.sleep(0.05)
                    if kind != "goes away":
                        answered = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            self._ledger.add(began_s, f"slow: {kind}", type(error).__name__, "failed")
            return
        if kind == "parts" and answered.startswith(b"HTTP/1.1 200"):
            answer = httpx.Response(200, content=answered.partition(b"\r\n\r\n")[2])
            self._judge(began_s, Case("slow: parts", case.path, {}, case.model, case.recordings), answer)
            return
        status = answered[9:12].decode() or "closed"
        expected = {"stops in its body": ("408",), "stops in its headers": ("408", "closed"), "goes away": ("closed",)}
        verdict: Verdict = "as it must" if status in expected.get(kind, ()) else "failed"
        self._ledger.add(began_s, f"slow: {kind}", status, verdict)

    # --- cohorts --------------------------------------------------------------------------------------------------

    async def _score_cohorts(self, client: httpx.AsyncClient, pause_s: float, rng: random.Random) -> None:
        number = 0
        while not self.stop.is_set():
            await self._pause(rng.uniform(0.5, 1.5) * pause_s)
            if self.stop.is_set():
                return
            number += 1
            self._rig.jobs += 1
            try:
                await self._score_cohort(client, f"{BUCKET}/scores/{number}", rng.choice((6, 12)))
            finally:
                self._rig.jobs -= 1

    async def _score_cohort(self, client: httpx.AsyncClient, output: str, leads: int) -> None:
        """A cohort until its scores are complete: a job that has failed is asked for again."""
        began_s, attempt = self._ledger.now_s(), 0
        while attempt < JOB_ATTEMPTS and not self.stop.is_set():
            # A promotion in between makes it another job, which the same output would refuse.
            place = f"{output}-{attempt}"
            sends = {"json": {"input": f"{BUCKET}/cohort", "output": place, "leads": leads}}
            job = await self._about_job(client, "POST", "/v1/cohorts", **sends)
            if job is None:
                await self._pause(1)
                continue
            attempt_s = self._ledger.now_s()
            while job["status"] in ("waiting", "running") and self._ledger.now_s() - attempt_s < JOB_LIMIT_S:
                await asyncio.sleep(1)
                job = await self._about_job(client, "GET", f"/v1/cohorts/{job['id']}") or job
            if job["status"] == "done":
                fault = await asyncio.to_thread(self._fault_of_scores, place, f"soak-{leads}L")
                self._ledger.add(began_s, "cohort job", "done", "wrong" if fault else "right", fault or "")
                return
            self._ledger.add(attempt_s, "cohort job", job["status"], "failed", job.get("error") or "")
            attempt += 1
        if attempt == JOB_ATTEMPTS:
            self._ledger.add(began_s, "cohort job", f"not done in {JOB_ATTEMPTS} attempts", "wrong", output)

    async def _about_job(self, client: httpx.AsyncClient, method: str, path: str, **sends: object) -> dict | None:
        began_s = self._ledger.now_s()
        try:
            answer = await client.request(method, path, **sends)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self._ledger.add(began_s, "cohort request", type(error).__name__, "failed")
            return None
        is_right = answer.status_code in (200, 202)
        self._ledger.add(began_s, "cohort request", str(answer.status_code), "as it must" if is_right else "failed")
        return answer.json() if is_right else None

    def _fault_of_scores(self, place: str, model: str) -> str | None:
        """What is wrong with the scores of a finished cohort: each recording once, each with its version's score."""
        storage = Storage.open(place)
        summary = json.loads(storage.read_bytes("summary.json"))
        (name,) = [PurePosixPath(file).name for file in summary["files"] if file.endswith(".parquet")]
        rows = pq.read_table(storage.path(name), filesystem=storage.filesystem).to_pylist()
        numbers = [int(re.sub(r"\D", "", row["record_id"].split("-")[0])) for row in rows]
        if len({row["record_id"] for row in rows}) != len(rows) or len(rows) != self._rig.cohort:
            return f"{len(rows)} rows for {self._rig.cohort} recordings"
        for number, row in zip(numbers, rows, strict=True):
            named = {"name": row["model"], "version": row["version"], "digest": row["digest"]}
            if fault := fault_of_row(named, row, model, number, self._rig.known):
                return fault
        return None
