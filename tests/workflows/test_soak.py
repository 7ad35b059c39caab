"""The parts of `bench.py soak`. The soak itself takes minutes and is not part of the tests: see docs/reliability.md."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from benchmarks import soak
from benchmarks.serve import recordings
from benchmarks.soak import cases, processes
from benchmarks.soak.events import STRIKES, WEATHER, Course
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.processes import Reading, trends
from benchmarks.soak.report import LIMITS, Report
from support.serving import TOKEN

from lsemvae.leads import LEADS
from serve.api import make_api
from serve.observed import Metrics
from serve.registry import Registry
from serve.security import Tokens
from serve.service import Service


@pytest.fixture(scope="module")
def counts_NLT() -> np.ndarray:
    return recordings(LEADS)[:2]


@pytest.fixture(scope="module")
def known(counts_NLT: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a bundle from a folder must answer: its version is None."""
    folder = tmp_path_factory.mktemp("soak")
    for seed, (name, leads) in enumerate(cases.MODELS.items()):
        soak.make(folder / name, leads, "smoke", seed)
    return {name: {None: cases.know(folder / name, counts_NLT)} for name in cases.MODELS} | {"folder": folder}


@pytest.fixture(scope="module")
def api(known: dict) -> object:
    uris = [str(known["folder"] / name) for name in cases.MODELS]
    return make_api(Service(Registry(uris, known["folder"] / "kept", 0), Metrics(), tokens=Tokens({TOKEN})))


def send(api: object, case: cases.Case) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            return await client.post(case.path, **case.sends)

    return asyncio.run(once())


def test_good_requests_have_the_expected_scores_and_other_scores_are_noticed(api, known, counts_NLT):
    seen = set()
    for case in cases.good(counts_NLT):
        answer = send(api, case)
        assert answer.status_code == 200, answer.text
        assert cases.fault_of(answer, case, known) is None
        right = known[case.model][None]
        for changed, fault in (
            (replace(right, scores_N=right.scores_N + 2e-5), "score"),
            (replace(right, digest="0"), "another digest"),
            (replace(right, threshold=0.0 if right.scores_N[case.recordings[0]] < 0.5 else 1.0), "decision"),
        ):
            assert fault in cases.fault_of(answer, case, known | {case.model: {None: changed}})
        assert "never may" in cases.fault_of(answer, case, known | {case.model: {7: right}})
        other = replace(case, recordings=tuple(1 - number for number in case.recordings))
        assert "score" in cases.fault_of(answer, other, known)  # two answers that were exchanged
        assert "results" in cases.fault_of(answer, replace(case, recordings=(0,) * 3), known)
        assert "in place of" in cases.fault_of(answer, replace(case, model="other"), known)
        seen.add(case.kind.partition(",")[0])
    assert seen == {"JSON", "NPY int16", "NPY float32", "file", "NPY"}


def test_bad_requests_are_refused_as_the_soak_expects(api, counts_NLT):
    bad = cases.bad(counts_NLT)
    found = {case.kind: send(api, case).status_code for case in bad}
    assert found == {case.kind: next(iter(case.statuses)) for case in bad}


def ledger_with(*asked: tuple[float, float, str, str, str]) -> Ledger:
    ledger = Ledger()
    for began_s, ended_s, kind, status, verdict in asked:
        ledger.add(began_s, kind, status, verdict)
        ledger.asked[-1] = replace(ledger.asked[-1], ended_s=ended_s)
    return ledger


def test_an_error_is_explained_by_an_event_of_its_kind_and_time_only():
    right = [(t, t + 0.1, "JSON", "200", "right") for t in (0.0, 1.0, 2.0, 9.0, 9.5)]
    ledger = ledger_with(
        *right,
        (2.5, 3.0, "JSON", "ReadError", "failed"),  # of the kill
        (8.0, 8.5, "JSON", "503", "failed"),  # too late
        (2.5, 3.0, "bad: flat leads", "500", "failed"),  # of the kill, too
        (20.0, 21.0, "explanation", "500", "failed"),  # of the other kill
        (20.0, 21.0, "JSON", "500", "failed"),  # which breaks no scores
    )
    with ledger.event("kill replica", breaks=("",)) as kill, ledger.event("kill explains", breaks=("explan",)) as other:
        pass
    kill.began_s, kill.ended_s, other.began_s, other.ended_s = 2.4, 5.0, 20.0, 22.0
    assert [(asked.kind, asked.ended_s) for asked in ledger.unexplained()] == [("JSON", 8.5), ("JSON", 21.0)]
    assert ledger.gaps(1)[0].seconds == pytest.approx(7.0) and ledger.gaps(1)[0].events == ("kill replica",)
    assert ledger.last_error_s(kill) == pytest.approx(0.6)
    assert ledger.longest_gap([kill]) == pytest.approx(7.0) and ledger.longest_gap([other]) == 0.0
    faults = Report(ledger, [], {}).faults
    assert len(faults) == 2 and all("no event explains it" in fault for fault in faults)


def test_a_wrong_answer_and_what_does_not_recover_are_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ledger = ledger_with((0.0, 0.1, "JSON", "200", "right"), (1.0, 1.1, "JSON", "200", "wrong"))
    assert Report(ledger, [], {}).faults == ["1 wrong answers"]
    with ledger.event("promote") as event:
        event.failed = "not followed within 240 s"
    report = Report(ledger, [Reading(0.0, "replica", 7, 100.0, 3, 9), Reading(1.0, "replica", 7, 101.0, 3, 9)], {})
    assert report.faults == ["1 wrong answers", "promote at 0 s: not followed within 240 s"]
    report.show()
    assert "not followed" in capsys.readouterr().out
    report.write(tmp_path / "soak.json")
    assert json.loads((tmp_path / "soak.json").read_text())["faults"] == report.faults
    assert [path.name for path in tmp_path.iterdir()] == ["soak.json"]
    for name in ("soak.png", "soak.svg"):
        report.draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def readings(pid: int, born_s: float, memory_mb: float, growth_mb_h: float, kind: str = "replica") -> list[Reading]:
    times = np.arange(born_s, born_s + 1200, 10.0)
    return [Reading(t, kind, pid, memory_mb + growth_mb_h * (t - born_s) / 3600, 3, 9) for t in times]


@pytest.mark.parametrize(("growth_mb_h", "leaks"), [(0.0, False), (LIMITS["memory_mb"] + 1, True)])
def test_growth_is_that_of_single_processes_and_above_a_limit_a_fault(growth_mb_h: float, leaks: bool):
    """The level of a process that replaced a killed one does not count, and a young process is no evidence."""
    found = readings(1, 0.0, 100.0, growth_mb_h) + readings(2, 1200.0, 400.0, growth_mb_h)
    young = [Reading(t, "replica", 3, 10 * t, 3, 9) for t in np.arange(0.0, 200.0, 10.0)]
    others = readings(4, 0.0, 50.0, 1000.0, kind="store")  # no process of the service
    trend = trends(found + young, warm_s=120, least_s=300)["replica"]
    assert trend["memory_mb"].slope == pytest.approx(growth_mb_h, abs=1e-6) and trend["threads"].slope == 0
    ledger = ledger_with((0.0, 0.1, "JSON", "200", "right"))
    assert bool(Report(ledger, found + young + others, {}).faults) == leaks


PARENT = "import subprocess as s; print(s.Popen(['sleep', '1000'], stdout=s.DEVNULL).pid, flush=True)"
ORPHANS = f"""
import subprocess, sys, time
from benchmarks.soak import processes
processes.adopt_orphans()
pid = int(subprocess.run([sys.executable, "-c", {PARENT!r}], stdout=subprocess.PIPE).stdout)
(reading,) = [one for one in processes.read_all(1.0) if one.pid == pid]
print(processes.descendants() == [pid], processes.processes())
print(reading.threads, 0 < reading.memory_mb < 50, reading.files)
processes.end_all()
print(processes.descendants())
"""


def test_a_process_without_its_parent_is_followed_and_ended():
    """The parent ends before its child: the child counts, and is killed in the end."""
    paths = os.pathsep.join([str(soak.ROOT), str(soak.ROOT / "workflows")])
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    found, figures, last = done.stdout.splitlines()
    assert "True" in found and "'other': [" in found, done.stderr
    threads, is_small, files = figures.split()
    assert (threads, is_small) == ("1", "True") and int(files) >= 3
    assert last == "[]"


def test_every_kind_of_process_is_known_by_its_command_line():
    """`exec -a` gives a process the name that Ray, MLflow and HAProxy give theirs."""
    names = {
        "ray::ServeReplica:ecg:ecg": "replica",
        "ray::ServeController.listen": "controller",
        "ray::HAProxyManager": "proxy",
        "/opt/haproxy": "HAProxy",
        "ray::JobSupervisor": "ray::JobSupervisor",
        "mlflow server": "mlflow",
    }
    started = {
        name: subprocess.Popen(["bash", "-c", f"exec -a {name.replace(' ', chr(92) + ' ')} sleep 1000"])
        for name in names
    }
    try:
        for name, process in started.items():
            while processes.kind_of(process.pid) != names[name]:  # at first it is bash, or between two programs
                assert process.poll() is None
                time.sleep(0.01)
    finally:
        for process in started.values():
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert processes.kind_of(process.pid) is None


def test_the_course_goes_through_every_kind_of_event():
    """Each kind once before any comes again, and the same seed gives the same order."""
    for known in (STRIKES, WEATHER):
        order = [kind for kind, _ in zip(_course(known), range(3 * len(known)), strict=False)]
        assert order == [kind for kind, _ in zip(_course(known), range(3 * len(known)), strict=False)]
        for round_ in range(3):
            assert sorted(order[round_ * len(known) : (round_ + 1) * len(known)]) == sorted(known)
    assert {"kill replica", "kill HAProxy", "kill controller", "promote", "roll back", "promote damaged"} <= set(
        STRIKES
    )


def _course(known: dict) -> Iterator[str]:
    course = Course(None, Ledger(), random.Random(3), 0.0, threading.Event(), print)
    return course._kinds(known)


def test_figures_are_kept_and_wrong_answers_told_while_it_runs(monkeypatch: pytest.MonkeyPatch):
    """A run that is killed leaves what it has found; a part that fails ends the run."""
    monkeypatch.setattr(soak, "KEEP_S", 0.5)
    ledger, kept, told = Ledger(), [], []
    ledger.add(0.0, "JSON", "200", "wrong", "score 1 for 0")

    class Told:
        done = 0
        update = set_description = staticmethod(lambda *_: None)
        write = staticmethod(told.append)

    async def watched(seconds: float, fails: bool) -> None:
        async def ask() -> None:
            if fails:
                raise RuntimeError("lost")
            await asyncio.sleep(60)

        asking = asyncio.create_task(ask())
        await soak.watch(asking, [], ledger, seconds, Told(), lambda: kept.append(len(ledger.asked)))
        asking.cancel()

    asyncio.run(watched(1.5, fails=False))
    assert len(told) == 1 and "score 1 for 0" in told[0] and kept and set(kept) == {1}
    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(watched(60, fails=True))
