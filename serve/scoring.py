"""From a recording to its answer: choose the model, score it in a batch, say what is doubtful about the recording."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from lsemvae.bundle import Bundle, Score, ready
from lsemvae.errors import LsemvaeError, Refused
from lsemvae.leads import LEADS
from lsemvae.preprocess import PART
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from serve.answers import answered, refused
from serve.model_thread import TORCH
from serve.observed import Metrics
from serve.registry import Served
from serve.schema import RecordOut, ScoreOut

MAX_BATCH = 32

Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass
class _Waiting(Generic[Job, Done]):
    """A job, and the future of what `run` makes of it."""

    job: Job
    future: asyncio.Future[Done]
    is_prepared: bool = False
    is_tried: bool = False
    """Preparing it failed, or that of a job beside it."""


class Batcher(Generic[Job, Done]):
    """Runs `run` in the models' thread on all jobs that arrived during the last run, `max_size` at most.

    `ray.serve.batch` closes a batch before its turn, so it needs a fixed wait: every lone request pays for it, and
    behind a slow batch it is too short to fill the next. Here a lone request does not wait. Under load, clients that
    were answered together ask again together. So the next batch waits until as many jobs are there as before, but at
    most half as long as the last batch took. Otherwise the first of them would become a batch of its own, which takes
    the model seven times as long as its share of a full batch.

    `prepare` does the part of the work that needs one core, and gives the jobs back in order. The models' thread
    prepares the first jobs of a batch while the event loop, on another core, still receives the others. That time does
    not count as waiting.

    When a batch fails, its jobs run again one by one, so that only those that fail alone get the exception.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], list[Done]],
        max_size: int = MAX_BATCH,
        prepare: Callable[[list[Job]], list[Job]] | None = None,
    ) -> None:
        self._run, self._max_size, self._prepare = run, max_size, prepare
        self._waiting: deque[_Waiting[Job, Done]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._wanted, self._wake = 0, asyncio.Event()

    async def __call__(self, job: Job) -> Done:
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(job, future))
        if len(self._waiting) >= self._wanted or self._to_prepare():
            self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        prepared_s = 0.0  # the time that preparing the batch took before its turn
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_size))]
            taken = [one for one in taken if not one.future.done()]  # its client is gone
            if not taken:
                continue
            began = time.perf_counter()
            await self._answer(taken)
            took_s = prepared_s + time.perf_counter() - began
            clients = len(taken) + len(self._waiting)
            prepared_s = await self._wait_for(clients, took_s / 2) if clients > 1 else 0.0

    async def _answer(self, taken: list[_Waiting[Job, Done]]) -> None:
        try:
            results = await TORCH.run(self._work, taken)
        except Exception as error:
            if len(taken) > 1:
                for one in taken:
                    await self._answer([one])
            elif not (future := taken[0].future).done():
                future.set_exception(error)
            return
        for one, result in zip(taken, results, strict=True):
            if not one.future.done():
                one.future.set_result(result)

    def _work(self, taken: list[_Waiting[Job, Done]]) -> list[Done]:
        self._prepare_now([one for one in taken if not one.is_prepared])
        return self._run([one.job for one in taken])

    def _prepare_now(self, taken: list[_Waiting[Job, Done]]) -> None:
        if self._prepare is None or not taken:
            return
        for one in taken:
            one.is_tried = True
        for one, job in zip(taken, self._prepare([one.job for one in taken]), strict=True):
            one.job, one.is_prepared = job, True

    def _to_prepare(self) -> list[_Waiting[Job, Done]]:
        """The next jobs to prepare before their batch, where there are enough to do it together."""
        raw = [] if self._prepare is None else [one for one in self._waiting if not one.is_tried]
        return raw[:PART] if len(raw) >= PART else []

    async def _wait_for(self, count: int, seconds: float) -> float:
        """Until so many jobs are there, at most so long; prepares those that come -> the seconds that this took."""
        self._wanted = min(count, self._max_size)
        prepared_s, began = 0.0, time.perf_counter()
        while len(self._waiting) < self._wanted and (left := seconds + prepared_s + began - time.perf_counter()) > 0:
            if raw := self._to_prepare():
                at = time.perf_counter()
                with suppress(Exception):  # `_answer` tries it again, and finds whose fault it is
                    await TORCH.run_without_model(self._prepare_now, raw)
                prepared_s += time.perf_counter() - at
                continue
            self._wake = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()
        return prepared_s


class NothingServed(Exception):
    """No model is loaded: the service is not ready."""


@dataclass(frozen=True)
class _Job:
    """A recording to score. `Scoring._prepared` adds the flags, and gives the record its model input."""

    served: Served
    record: Record
    flags: tuple[str, ...] = ()


class Scoring:
    """Answers for single recordings. Recordings that arrive together are scored together.

    `served` gives the models by name. It is called once a recording, and a batch goes to the objects chosen then, so a
    promotion in between does not mix two versions. A batch is scored within the context that `undisturbed` makes.
    """

    def __init__(
        self,
        served: Callable[[], Mapping[str, Served]],
        metrics: Metrics,
        undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._served, self._metrics, self._undisturbed = served, metrics, undisturbed
        self._scored = Batcher(self._score_batch, prepare=self._prepared)

    async def score(
        self, given: Record | LsemvaeError, *, id: str, model: str | None, signal: bool = False
    ) -> ScoreOut:
        """The answer for a recording, or for the error that reading it raised. Raises NothingServed."""
        out = await self.answer(given, id=id, model=model)
        if signal and isinstance(given, Record):
            out.record = await asyncio.to_thread(drawn, given)  # a second's work for a large recording
        self._metrics.result(out)
        return out

    def candidates(self, given: Record | LsemvaeError, model: str | None) -> list[Served]:
        """The models to try in turn; none where `answer` refuses the recording without one. Raises NothingServed."""
        served = self._served()
        if not served:
            raise NothingServed
        try:
            return choose(given, served, model) if isinstance(given, Record) else []
        except Refused:
            return []

    async def answer(self, given: Record | LsemvaeError, *, id: str, model: str | None) -> ScoreOut:
        """The same, not counted as a score."""
        served = self._served()
        if not served:
            raise NothingServed
        if isinstance(given, LsemvaeError):
            return refused(id, given)
        try:
            candidates = choose(given, served, model)
        except Refused as error:
            flags = await TORCH.run_without_model(quality_flags, given)
            return refused(id, error, [*given.flags, *flags])
        chosen, answer, flags = await self._first_to_accept(candidates, given)
        return answered(id, given, chosen.described, chosen.scorer, answer, flags)

    async def _first_to_accept(self, candidates: list[Served], record: Record) -> tuple[Served, Score, tuple[str, ...]]:
        for chosen in candidates:
            answer, flags = await self._scored(_Job(chosen, record))
            if not (answer.refused and answer.refused.code == "leads"):
                break  # the next model may need fewer leads
        return chosen, answer, flags

    def _prepared(self, jobs: list[_Job]) -> list[_Job]:
        """With flags and model input. Not while the model runs: its threads wait for each other, and one would share
        its core with this work."""
        records = {
            position: record
            for served, positions in _by_model(jobs)
            for position, record in zip(
                positions, ready([jobs[position].record for position in positions], served.scorer.bundle), strict=True
            )
        }
        return [_Job(job.served, records[k], quality_flags(job.record)) for k, job in enumerate(jobs)]

    def _score_batch(self, jobs: list[_Job]) -> list[tuple[Score, tuple[str, ...]]]:
        began = time.perf_counter()
        answers: dict[int, Score] = {}
        for served, positions in _by_model(jobs):
            with self._undisturbed():
                scores = served.scorer.score([jobs[position].record for position in positions])
            answers |= zip(positions, scores, strict=True)
            self._metrics.batch(served.described, len(positions))
        self._metrics.took("model", time.perf_counter() - began)
        return [(answers[position], job.flags) for position, job in enumerate(jobs)]


def _by_model(jobs: Sequence[_Job]) -> list[tuple[Served, list[int]]]:
    """The models of these jobs, each with the positions of its own."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for position, job in enumerate(jobs):
        found[id(job.served)].append(position)
    return [(jobs[positions[0]].served, positions) for positions in found.values()]


def min_leads(bundle: Bundle) -> int:
    """Preprocessing refuses a recording with fewer usable leads; `min_lead_share` of the model decides."""
    return max(1, math.ceil(bundle.preprocess.min_lead_share * len(bundle.leads)))


def choose(record: Record, served: Mapping[str, Served], name: str | None) -> list[Served]:
    """The named model, or all that take the recording: most leads in common first, then the smaller model.

    A lead without samples, or with one constant value, counts as absent. Raises Refused when no model takes it.
    """
    if name is not None:
        if name not in served:
            raise Refused("model", f"no model {name[:100]!r} is served: {', '.join(served)} are")
        return [served[name]]
    usable = usable_leads(record)
    shared = {key: len(usable & set(model.scorer.bundle.leads)) for key, model in served.items()}
    able = [key for key, model in served.items() if shared[key] >= min_leads(model.scorer.bundle)]
    if not able:
        wants = "; ".join(
            f"{key}: at least {min_leads(model.scorer.bundle)} of {', '.join(model.scorer.bundle.leads)}"
            for key, model in served.items()
        )
        held = ", ".join(lead for lead in LEADS if lead in usable) or "no lead that holds a signal"
        raise Refused("leads", f"the recording has {held}; models want {wants}")
    return [served[key] for key in sorted(able, key=lambda key: (-shared[key], len(served[key].scorer.bundle.leads)))]


def usable_leads(record: Record) -> set[str]:
    """The leads that hold more than one value."""
    low_L, high_L = np.fmin.reduce(record.signal_mv_LT, axis=1), np.fmax.reduce(record.signal_mv_LT, axis=1)
    return {lead for lead, low, high in zip(record.leads, low_L, high_L, strict=True) if low < high}


def drawn(record: Record) -> RecordOut:
    """The recording to draw it: millivolts rounded to 0.001."""
    leads = {
        lead: [None if value != value else value for value in np.round(row_mv.astype(np.float64), 3).tolist()]
        for lead, row_mv in zip(record.leads, record.signal_mv_LT, strict=True)
    }
    missing = [lead for lead in LEADS if lead not in record.leads]
    return RecordOut(rate_hz=record.rate_hz, leads=leads, derived=list(record.derived), missing=missing)
