"""What happens to the service during the soak: killed processes, promotions, and an MLflow or a store that fails.

Strikes come one after another, each with its recovery. The weather, faults of MLflow and of the store that last for
some seconds, comes independently of them, so that a replica may have to start while MLflow is away.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from servers import mlflow_starting

from benchmarks.faults import Between, Fault
from benchmarks.soak.cases import Known
from benchmarks.soak.ledger import Event, Ledger
from benchmarks.soak.processes import processes
from lsemvae.errors import LsemvaeError
from lsemvae.tracking import promote

RECOVERY_LIMIT_S = 240.0
"""What is not whole again after this time counts as a fault of the service."""
ALL = ("",)
LOOKS = 12
"""So many answers of /readyz in a row must say the same, because each comes from one replica."""


class Tracking:
    """An MLflow server that can be killed, started again and stopped."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port, self._stack = folder, port, ExitStack()
        self.uri = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        _, wait = self._stack.enter_context(mlflow_starting(self._folder, self._port))
        wait()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._stack.close()

    def close(self) -> None:
        self._stack.close()

    def signal(self, number: int) -> None:
        for pid in processes().get("mlflow", []):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@dataclass
class Rig:
    """The service under test and everything beside it.

    known    model -> version -> the scores that it must give
    damaged  model -> the version whose weights are not those that were registered
    """

    url: str
    dashboard: str
    bearer: Mapping[str, str]
    token: str
    replicas: int
    tracking: Tracking
    between_mlflow: Between
    between_store: Between
    known: Mapping[str, Mapping[int, Known]]
    damaged: Mapping[str, int]
    champions: dict[str, int] = field(default_factory=dict)
    previous: dict[str, int] = field(default_factory=dict)
    cohort: int = 0
    """Recordings of the cohort in the store."""
    jobs: int = 0
    """Cohort jobs in progress."""

    def running(self) -> int:
        """Replicas that Ray Serve calls running; 0 where it does not answer."""
        try:
            answer = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=dict(self.bearer), timeout=10)
            replicas = answer.json()["applications"]["ecg"]["deployments"]["ecg"]["replicas"]
            return [replica["state"] for replica in replicas].count("RUNNING")
        except (httpx.HTTPError, ValueError, KeyError):
            return 0

    def ready(self) -> dict[str, Any] | None:
        """What /readyz says; None where it does not say that the service is ready."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=10)
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def says(self, true: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether every replica's /readyz says this."""
        return all((state := self.ready()) is not None and true(state) for _ in range(LOOKS))

    def whole(self) -> bool:
        return self.running() == self.replicas and self.says(lambda state: True)


def until(true: Callable[[], bool], event: Event, what: str) -> None:
    """Wait until the condition holds, or note after `RECOVERY_LIMIT_S` that it does not."""
    end_s = time.monotonic() + RECOVERY_LIMIT_S
    while not true():
        if time.monotonic() > end_s:
            event.failed = f"not {what} within {RECOVERY_LIMIT_S:.0f} s"
            return
        time.sleep(0.2)


# --- strikes ----------------------------------------------------------------------------------------------------------


def _kill(kind: str, breaks: tuple[str, ...] = ALL) -> Callable[[Rig, Ledger, random.Random], None]:
    def strike(rig: Rig, ledger: Ledger, rng: random.Random) -> None:
        """Kill the youngest of this kind, so that the oldest one shows what leaks."""
        before = processes().get(kind, [])
        if not before:
            return
        with ledger.event(f"kill {kind}", f"process {before[-1]}", breaks) as event:
            os.kill(before[-1], signal.SIGKILL)
            if kind == "explains":  # the next explanation starts another one
                return
            until(lambda: bool(set(processes().get(kind, [])) - set(before)), event, "started anew")
            until(rig.whole, event, "whole")

    return strike


def _promotion(back: bool) -> Callable[[Rig, Ledger, random.Random], None]:
    def strike(rig: Rig, ledger: Ledger, rng: random.Random) -> None:
        name = rng.choice(sorted(rig.known))
        others = [number for number in rig.known[name] if number != rig.champions[name]]
        number = rig.previous.get(name, others[0]) if back else rng.choice(others)
        with ledger.event("roll back" if back else "promote", f"{name} to version {number}") as event:
            _promote(rig, name, number, event)

    return strike


def _promote(rig: Rig, name: str, number: int, event: Event) -> None:
    """Move the alias and wait until every replica answers with the version."""
    try:
        promote(name, str(number))
    except LsemvaeError as error:
        event.detail += f": {str(error)[:80]}"
        return
    if rig.champions[name] != number:
        rig.previous[name], rig.champions[name] = rig.champions[name], number
    until(lambda: rig.says(lambda state: f"{name}/{number}" in state["models"]), event, "followed")


def _promote_damaged(rig: Rig, ledger: Ledger, rng: random.Random) -> None:
    """A version whose weights were altered must not answer; then the alias goes back."""
    name = rng.choice(sorted(rig.known))
    with ledger.event("promote damaged", f"{name} to version {rig.damaged[name]}") as event:
        try:
            promote(name, str(rig.damaged[name]))
        except LsemvaeError as error:
            event.detail += f": {str(error)[:80]}"
            return
        until(lambda: rig.says(lambda state: name in state["problems"]), event, "refused")
        for _ in range(20):  # MLflow may be away at this moment
            with suppress(LsemvaeError):
                promote(name, str(rig.champions[name]))
                break
            time.sleep(1)
        until(lambda: rig.says(lambda state: name not in state["problems"]), event, "healed")


STRIKES: dict[str, Callable[[Rig, Ledger, random.Random], None]] = {
    "kill replica": _kill("replica"),
    "kill HAProxy": _kill("HAProxy"),
    "kill proxy": _kill("proxy"),
    "kill fallback proxy": _kill("fallback proxy"),
    "kill controller": _kill("controller"),
    "kill explains": _kill("explains", ("explanation",)),
    "promote": _promotion(back=False),
    "roll back": _promotion(back=True),
    "promote damaged": _promote_damaged,
}


# --- the weather ------------------------------------------------------------------------------------------------------


def _mlflow_stopped(rig: Rig, event: Event, wait: Callable[[], object]) -> None:
    rig.tracking.signal(signal.SIGSTOP)
    try:
        wait()
    finally:
        rig.tracking.signal(signal.SIGCONT)


def _mlflow_killed(rig: Rig, event: Event, wait: Callable[[], object]) -> None:
    rig.tracking.kill()
    wait()
    rig.tracking.start()


def _faulty(where: str, kind: str) -> Callable[[Rig, Event, Callable[[], object]], None]:
    def weather(rig: Rig, event: Event, wait: Callable[[], object]) -> None:
        between = rig.between_mlflow if where == "MLflow" else rig.between_store
        between.heal()
        between.faults.append(Fault(kind))
        wait()
        event.detail = f"{len(between.requests)} requests"
        between.heal()

    return weather


WEATHER: dict[str, Callable[[Rig, Event, Callable[[], object]], None]] = {
    "MLflow stopped": _mlflow_stopped,
    "MLflow killed": _mlflow_killed,
    "MLflow 503": _faulty("MLflow", "503"),
    "MLflow reset": _faulty("MLflow", "reset"),
    "MLflow silent": _faulty("MLflow", "silence"),
    "store 503": _faulty("store", "503"),
    "store reset in mid-body": _faulty("store", "reset in mid-body"),
    "store silent": _faulty("store", "silence"),
    "store cut": _faulty("store", "cut"),
}


@dataclass
class Course:
    """Goes through the kinds in a random order, again and again, with random pauses, until `stop` is set."""

    rig: Rig
    ledger: Ledger
    rng: random.Random
    pause_s: float
    stop: threading.Event
    tell: Callable[[str], None]

    def strike(self) -> None:
        for kind in self._kinds(STRIKES):
            count = len(self.ledger.events)
            STRIKES[kind](self.rig, self.ledger, self.rng)
            for event in self.ledger.events[count:]:
                if event.kind == kind:
                    self._say(event)

    def change_weather(self) -> None:
        for kind in self._kinds(WEATHER):
            if kind.startswith("store"):  # only a cohort job uses it
                while not self.rig.jobs and not self.stop.wait(0.5):
                    pass
            if self.stop.is_set():
                return
            with self.ledger.event(kind, breaks=("cohort",)) as event:
                WEATHER[kind](self.rig, event, lambda: self.stop.wait(self.rng.uniform(0.3, 1) * self.pause_s))
            self._say(event)

    def _kinds(self, known: Mapping[str, object]) -> Any:
        while True:
            for kind in self.rng.sample(sorted(known), len(known)):
                if self.stop.wait(self.rng.uniform(0.5, 1.5) * self.pause_s):
                    return
                yield kind

    def _say(self, event: Event) -> None:
        took_s = (event.ended_s or self.ledger.now_s()) - event.began_s
        result = event.failed or f"over after {took_s:.1f} s"
        self.tell(f"{event.began_s:7.1f} s  {event.kind:<24} {result}{', ' if event.detail else ''}{event.detail}")
