"""`/v1/explain`: the explanation of the score that is served, its queue, and the process that explains."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from support.bundles import SMALL
from support.bundles import save as save_classifier
from support.serving import TOKEN, Client, as_json, ask, npy, only, score, score_files
from support.session import ROOT

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle
from lsemvae.errors import LsemvaeError
from lsemvae.explain.explainer import Explainer
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record
from serve import explaining as explaining_module
from serve.api import make_api
from serve.app import Config, make_service
from serve.explaining import Explaining
from serve.explanation import Answers, as_explanation
from serve.observed import Metrics
from serve.registry import Registry, Served
from serve.schema import ExplanationOut
from serve.service import Service

WAVES = ["P", "QRS", "ST", "T", "rest"]


def explain(api: object, given: dict, **rest: object) -> httpx.Response:
    return ask(api, "POST", "/v1/explain", json={"records": [given]}, **rest)


def explain_files(api: object, files: dict[str, bytes], **query: object) -> httpx.Response:
    return ask(api, "POST", "/v1/explain/file", params=query, files=[("files", (name, files[name])) for name in files])


def as_files(record: Record) -> dict[str, bytes]:
    about = {"rate_hz": record.rate_hz, "unit": "mV", "leads": record.leads}
    return {"r.npy": npy(record.signal_mv_LT), "r.json": json.dumps(about).encode()}


def explained(explainer: Explainer, record: Record) -> ExplanationOut:
    """The explanation in this process."""
    (found,) = explainer.explain([record])
    return as_explanation(explainer, found, record, with_signal=True)


class Counted(Metrics):
    """Keeps the outcomes of explanations."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[str] = []
        self.scored, self.batches = 0, 0

    def batch(self, model: object, records: int) -> None:
        super().batch(model, records)
        self.batches += 1

    def explained(self, outcome: str, seconds: float) -> None:
        super().explained(outcome, seconds)
        self.outcomes.append(outcome)

    def result(self, out: object) -> None:
        super().result(out)
        self.scored += 1


@pytest.fixture
def metrics() -> Counted:
    return Counted()


@pytest.fixture
def counted(service: Service, metrics: Counted) -> object:
    return make_api(replace(service, metrics=metrics))


# --- what is answered -------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_scoring_with_its_explanation(counted, metrics, models: Path, record: Record):
    given = as_json(record, id="patient-77")
    found = explain(counted, given)
    assert found.status_code == 200
    assert "Research use only" in found.json()["note"]
    result = only(found)
    explanation = ExplanationOut.model_validate(result.pop("explanation"))
    # A look at a score is not another score, and takes no turn of the replica's model.
    assert (metrics.outcomes, metrics.scored, metrics.batches) == (["done"], 0, 0)
    assert result == only(score(counted, given))
    (window,) = explanation.windows
    assert window.logit == pytest.approx(float(bundles.logit(result["score"])), abs=1e-4)

    expected = explained(Explainer(models / "ph-12L"), record)
    assert list(explanation.leads) == list(explanation.cells) == list(window.leads) == list(LEADS)
    assert list(explanation.waves) == WAVES
    assert (window.beats, window.waves) == (expected.windows[0].beats, expected.windows[0].waves)
    assert window.beats >= 8 and list(window.waves) == ["P", "QRS", "T"]
    for lead in LEADS:
        near(explanation.leads[lead], expected.leads[lead])
        for wave in WAVES:
            near(explanation.cells[lead][wave], expected.cells[lead][wave])
        here, there = window.leads[lead], expected.windows[0].leads[lead]
        assert here.x_mv == there.x_mv
        np.testing.assert_allclose(here.attribution, there.attribution, atol=1e-6)
    for wave in WAVES:
        near(explanation.waves[wave], expected.waves[wave])


def near(found: object, expected: object) -> None:
    for (name, one), (_, other) in zip(found, expected, strict=True):
        assert one is other is None or one == pytest.approx(other, abs=1e-4), name


def test_the_numbers_fit_each_other(api, record: Record):
    explanation = only(explain(api, as_json(record)))["explanation"]
    (window,) = explanation["windows"]
    values_LT = np.array([window["leads"][lead]["attribution"] for lead in LEADS])
    total = window["logit"] - window["baseline_logit"] + window["delta"]
    assert values_LT.sum() == pytest.approx(total, abs=1e-3 * np.abs(values_LT).sum() + 1e-6)
    shares = explanation["leads"]
    assert sum(share["absolute"] for share in shares.values()) == pytest.approx(1, abs=1e-3)
    for lead, row_T in zip(LEADS, values_LT, strict=True):
        assert shares[lead]["absolute"] == pytest.approx(np.abs(row_T).sum() / np.abs(values_LT).sum(), abs=1e-3)
        assert shares[lead]["signed"] == pytest.approx(row_T.sum() / np.abs(values_LT).sum(), abs=1e-3)
        assert shares[lead]["signed"] == pytest.approx(
            sum(cell["signed"] for cell in explanation["cells"][lead].values()), abs=1e-4
        )
    view = preprocess([record], LEADS, PreprocessConfig(scale="none")).x_BLT[0]
    np.testing.assert_allclose([window["leads"][lead]["x_mv"] for lead in LEADS], view, atol=6e-4)
    assert (window["start_s"], window["rate_hz"], window["samples"]) == (0, 500, 5000)
    for onset, peak, offset in window["waves"]["QRS"]:
        assert onset is None or offset is None or 0 <= onset <= peak <= offset <= 10


def test_a_file_has_the_same_explanation_and_the_signal_may_be_left_out(api, record: Record):
    whole = only(explain(api, as_json(record, id="r.npy")))
    assert only(explain_files(api, as_files(record))) == whole
    for window in whole["explanation"]["windows"]:
        window["leads"] = None
    assert only(explain_files(api, as_files(record), signal=False)) == whole
    assert only(explain(api, as_json(record, id="r.npy"), params={"signal": "false"})) == whole


def test_the_model_that_scores_is_the_one_that_is_explained(api, record: Record):
    six = only(explain(api, as_json(record, ("I", "II")), params={"signal": "false"}))
    assert (six["model"]["name"], list(six["explanation"]["leads"])) == ("ph-6L", list(LIMB_LEADS))
    body = {"records": [as_json(record)], "model": "ph-6L"}
    named = only(ask(api, "POST", "/v1/explain", json=body, params={"signal": "false"}))
    assert (named["model"]["name"], list(named["explanation"]["leads"])) == ("ph-6L", list(LIMB_LEADS))
    assert only(explain_files(api, as_files(record), model="ph-6L", signal=False))["score"] == named["score"]
    few = only(explain(api, as_json(record, ("I", "III", "aVF"))))["explanation"]
    assert list(few["leads"]) == list(few["windows"][0]["leads"]) == ["I", "III", "aVF"]


def test_a_refused_recording_is_refused_as_by_scoring(counted, metrics: Counted, record: Record):
    spoilt = [
        as_json(record, ("V1",)), as_json(record) | {"unit": "uV"}, as_json(record) | {"rate_hz": 20},
        as_json(replace(record, signal_mv_LT=record.signal_mv_LT[:, :500])), as_json(record) | {"leads": {"X9": [1.0]}},
        as_json(replace(record, signal_mv_LT=record.signal_mv_LT * 1e4)),
    ]  # fmt: skip
    for given in spoilt:
        found, expected = explain(counted, given), score(counted, given)
        assert found.status_code == expected.status_code == 422
        assert only(found).pop("refused") == only(expected)["refused"] is not None
        assert only(found) == only(expected) | {"explanation": None}
    unreadable = {"r.hea": b"%d not a header" % 7}
    assert only(explain_files(counted, unreadable))["refused"] == only(score_files(counted, unreadable))["refused"]
    assert metrics.outcomes == ["refused"] * 7


def test_one_recording_at_a_time(api, record: Record):
    given = as_json(record, ("I", "II"))
    several = ask(api, "POST", "/v1/explain", json={"records": [given, given]})
    assert (several.status_code, several.json()["detail"][0]["loc"]) == (422, ["records"])
    files = as_files(record)
    files |= {f"other.{name.rpartition('.')[2]}": content for name, content in files.items()}
    several = explain_files(api, files)
    assert (several.status_code, several.json()["detail"]) == (422, "2 recordings: one at a time is explained")


def test_without_a_beat_it_is_explained_by_lead_only_and_says_so(api, record: Record):
    hum_mv_T = (0.2 * np.sin(2 * np.pi * 40 * np.arange(5000) / 500)).astype(np.float32)
    hum = replace(record, signal_mv_LT=np.tile(hum_mv_T, (12, 1)))
    explanation = only(explain(api, as_json(hum)))["explanation"]
    assert explanation["waves"] is explanation["cells"] is None
    assert len(explanation["leads"]) == 12
    assert any("by lead only" in note for note in explanation["notes"])
    assert explanation["windows"][0]["no_beat"] and explanation["windows"][0]["beats"] == 0


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (LsemvaeError("it gives no gradient"), {"outcome": "no_gradient", "detail": "it gives no gradient"}),
        (RuntimeError("of Patient-4711: -0.06 mV"), {"outcome": "failed", "detail": "RuntimeError at test_explain.py"}),
    ],
)
def test_a_model_that_cannot_be_explained_and_a_fault_are_told_apart(
    error: Exception, header: dict, monkeypatch: pytest.MonkeyPatch, models: Path, record: Record
):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Explainer, "explain_signals", fails)
    described = Served.load(models / "ph-12L", "ph-12L", None, "cpu").described.model_dump()
    signal_mv_LT = record.signal_for(LEADS)
    question = {
        "id": "", "candidates": [{"folder": str(models / "ph-12L"), "described": described}], "served": [],
        "record": {"leads": LEADS, "rate_hz": 500, "derived": [], "flags": [], "shape": signal_mv_LT.shape},
        "with_signal": False,
    }  # fmt: skip
    found, body = Answers()(question, signal_mv_LT.tobytes())
    found["detail"] = found["detail"].partition(":")[0]
    assert (found, body) == (header, b"")


def test_what_has_no_explanation_is_409_or_500_without_its_message(counted, metrics, monkeypatch, record, caplog):
    given = as_json(record, LIMB_LEADS)
    monkeypatch.setattr(Explaining, "_ask", lambda *_: explaining_module._answer(header, b""))
    header = {"outcome": "no_gradient", "detail": "it gives no gradient"}
    answer = explain(counted, given)
    assert answer.status_code == 409
    assert answer.json()["detail"] == "this model's scores cannot be explained: it gives no gradient"
    header = {"outcome": "failed", "detail": "KeyError at waves.py:7"}
    with caplog.at_level(logging.ERROR, "ray.serve"):
        answer = explain(counted, given)
    assert (answer.status_code, answer.json()) == (500, {"detail": "internal error"})
    assert "an explanation failed: KeyError at waves.py:7" in caplog.text
    assert metrics.outcomes == ["no_gradient", "failed"]


def test_switched_off_it_says_how_to_switch_it_on(service: Service, record: Record):
    api = make_api(replace(service, explaining=None))
    answer = explain(api, as_json(record))
    assert (answer.status_code, "explain_queue" in answer.json()["detail"]) == (404, True)
    assert score(api, as_json(record)).status_code == 200


def test_the_configuration_limits_the_queue_or_switches_it_off(models: Path, tmp_path: Path):
    config = Config(models=[str(models / "ph-6L")], bundles=tmp_path, allow_anonymous=True)
    assert make_service(config).explaining is not None
    assert make_service(config.model_copy(update={"explain_queue": 0})).explaining is None
    with pytest.raises(ValidationError):
        Config(models=["x"], explain_queue=-1)


# --- windows ----------------------------------------------------------------------------------------------------


def with_windows(folder: Path, which: str) -> Path:
    model = build(ClassifierConfig(encoder=SMALL, hidden=8), LIMB_LEADS)
    config = PreprocessConfig(window=which)
    bundles.save(Bundle.of(model, config, task="ph", threshold=0.5), model, folder)
    return folder


def long(record: Record, seconds: int) -> Record:
    return replace(record, signal_mv_LT=np.tile(record.signal_mv_LT, (1, seconds // 10)))


@pytest.mark.parametrize(("which", "starts_s"), [("all", [0.0, 20.0]), ("cleanest", [20.0])])
def test_windows_are_where_the_score_takes_them(which: str, starts_s: list[float], tmp_path: Path, record: Record):
    """The first of 30 s is quiet but for wander, and the second is refused."""
    explainer = Explainer(with_windows(tmp_path / which, which))
    given = long(record, 30)
    signal_mv_LT = given.signal_mv_LT
    signal_mv_LT[:, :5000] += np.sin(np.arange(5000) / 400).astype(np.float32)
    signal_mv_LT[:, 5000:10000] = np.nan
    explanation = explained(explainer, given)
    assert [window.start_s for window in explanation.windows] == starts_s
    (view,) = preprocess([record], LIMB_LEADS, PreprocessConfig(scale="none")).x_BLT
    last = explanation.windows[-1]
    np.testing.assert_allclose([last.leads[lead].x_mv for lead in LIMB_LEADS], view, atol=6e-4)


def test_a_short_recording_is_drawn_without_its_padding(api, record: Record):
    short = replace(record, signal_mv_LT=record.signal_mv_LT[:, :2000])
    (window,) = only(explain(api, as_json(short)))["explanation"]["windows"]
    assert window["samples"] == 2000 == len(window["leads"]["I"]["x_mv"]) == len(window["leads"]["I"]["attribution"])


# --- the queue --------------------------------------------------------------------------------------------------


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def asking(api: object) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://service", headers=headers)


@pytest.fixture
def warm(api, explaining: Explaining, record: Record) -> int:
    """The number of the process that explains, which runs."""
    assert explain(api, as_json(record, LIMB_LEADS)).status_code == 200
    return explaining.pid


@pytest.fixture
def hanging(tmp_path: Path, metrics: Counted, explaining: Explaining) -> tuple[Service, Callable[[], None]]:
    """A service whose first explanation hangs, as the process waits for a file that nobody writes; and what ends that.

    The first is then answered as that of a model that was replaced, and others are explained.
    """
    folder, kept = tmp_path / "ph-6L", tmp_path / "config.json"
    save_classifier(folder, note=tmp_path.name)  # a digest of its own, which the process does not hold
    service = Service(Registry([str(folder)], tmp_path / "kept", 0), metrics, explaining=explaining)
    config = folder / "config.json"
    config.rename(kept)
    os.mkfifo(config)

    def end() -> None:
        config.write_text("{}")  # as soon as the process reads it
        config.unlink()
        kept.rename(config)

    return service, end


def test_scores_are_answered_while_an_explanation_hangs_and_others_wait(
    hanging, metrics: Counted, explaining: Explaining, record: Record
):
    service, end = hanging
    body = {"records": [as_json(record, LIMB_LEADS)]}

    async def main() -> None:
        async with asking(make_api(service)) as client:
            waiting = [asyncio.create_task(client.post("/v1/explain", json=body)) for _ in range(5)]
            await until(lambda: explaining.there == 5)
            for _ in range(2):
                refused = await client.post("/v1/explain", json=body)
                assert (refused.status_code, refused.json()["detail"][:21]) == (503, "too many explanations")
                assert int(refused.headers["Retry-After"]) >= 1
                assert (await client.post("/v1/score", json=body)).status_code == 200
            assert not any(task.done() for task in waiting)
            await asyncio.to_thread(end)
            answers = [await task for task in waiting]
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [503]
            assert len({answer.text for answer in answers}) == 2

    asyncio.run(main())
    assert sorted(metrics.outcomes) == ["busy"] * 2 + ["done"] * 4 + ["replaced"]
    assert (explaining.there, metrics.scored) == (0, 2)


def test_the_process_stands_still_while_a_model_scores(hanging, warm: int, explaining: Explaining, record: Record):
    service, end = hanging
    scoring, told = threading.Event(), threading.Event()
    served = service.registry.served["ph-6L"]

    def score_when_told(records: list[Record]) -> list:
        scoring.set()
        told.wait()
        return served.scorer.score(records)

    scorer = SimpleNamespace(
        score=score_when_told, bundle=served.scorer.bundle, why_doubtful=served.scorer.why_doubtful
    )
    slow = SimpleNamespace(served={"ph-6L": replace(served, scorer=scorer)})
    body = {"records": [as_json(record, LIMB_LEADS)]}

    async def main() -> None:
        async with asking(make_api(replace(service, registry=slow))) as client:
            explanation = asyncio.create_task(client.post("/v1/explain", json=body))
            await until(lambda: explaining.there == 1)
            scored = asyncio.create_task(client.post("/v1/score", json=body))
            await until(scoring.is_set)
            await until(lambda: state(warm) == "T")
            told.set()
            assert (await scored).status_code == 200
            await until(lambda: state(warm) != "T")
            await asyncio.to_thread(end)
            assert (await explanation).status_code == 503  # the process goes on

    asyncio.run(main())
    assert explaining.pid == warm


def test_scores_come_while_a_real_explanation_takes_seconds(tmp_path: Path, explaining: Explaining, record: Record):
    folder = with_windows(tmp_path / "slow", "all")
    api = make_api(Service(Registry([str(folder)], tmp_path / "kept", 0), Metrics(), explaining=explaining))
    slow = {"records": [as_json(long(record, 120), LIMB_LEADS)]}
    quick = {"records": [as_json(record, LIMB_LEADS)]}

    async def main() -> None:
        async with asking(api) as client:
            explanation = asyncio.create_task(client.post("/v1/explain?signal=false", json=slow))
            await until(lambda: explaining.there == 1)
            for _ in range(3):
                assert (await client.post("/v1/score", json=quick)).status_code == 200
                assert not explanation.done()
            answer = await explanation
            assert answer.status_code == 200
            assert len(only(answer)["explanation"]["windows"]) == 12

    asyncio.run(main())


@pytest.mark.parametrize("how", ["hangs up", "is cancelled"])
def test_who_goes_away_loses_the_place(
    how: str, counted, metrics: Counted, warm: int, explaining: Explaining, record: Record
):
    """A client that hangs up, and a request that the server cancels."""
    body = json.dumps({"records": [as_json(record, LIMB_LEADS)]}).encode()

    async def main() -> None:
        os.kill(warm, signal.SIGSTOP)
        try:
            first, second = [Client(counted, {"content-length": str(len(body))}, "/v1/explain") for _ in range(2)]
            await first.part(body, more=False)
            await until(lambda: explaining.there == 1)
            await second.part(body, more=False)
            await until(lambda: explaining.there == 2)
            if how == "hangs up":
                await second.hang_up()
            else:
                second.task.cancel()
            await until(lambda: explaining.there == 1)
        finally:
            os.kill(warm, signal.SIGCONT)
        await first.task
        assert first.status == 200

    asyncio.run(main())
    assert metrics.outcomes == ["given_up", "done"]
    assert explaining.pid == warm


# --- the process ------------------------------------------------------------------------------------------------


def test_the_process_yields_to_all_others_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch):
    secrets = {"LSEMVAE_TOKENS": TOKEN, "MLFLOW_TRACKING_PASSWORD": "a-password", "AWS_SECRET_ACCESS_KEY": "a-key"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    explaining = Explaining(1, 600, threads=1)
    process = explaining._running()
    try:
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        environment = ""
        while not environment:  # until the new program has it
            environment = Path(f"/proc/{process.pid}/environ").read_text()
        assert "PYTHONPATH=" in environment
        assert not [secret for secret in secrets.values() if secret in environment]
    finally:
        explaining.close()


def test_a_killed_process_costs_one_503_and_a_slow_one_is_ended(
    counted, metrics: Counted, warm: int, explaining: Explaining, record: Record, monkeypatch: pytest.MonkeyPatch
):
    given = as_json(record, LIMB_LEADS)
    os.kill(warm, signal.SIGSTOP)  # in the middle of its work, as far as its parent knows

    async def main() -> None:
        async with asking(counted) as client:
            task = asyncio.create_task(client.post("/v1/explain", json={"records": [given]}))
            await until(lambda: explaining.there == 1)
            os.kill(warm, signal.SIGKILL)
            answer = await task
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert "has ended" in answer.json()["detail"]

    asyncio.run(main())
    monkeypatch.setattr(explaining, "_limit_s", 0.3)  # less than a start takes
    late = explain(counted, given)
    assert (late.status_code, "longer than 0.3 s" in late.json()["detail"]) == (504, True)
    assert explaining.pid is None
    monkeypatch.undo()
    assert explain(counted, given).status_code == 200
    assert metrics.outcomes == ["ended", "too_long", "done"]
    assert explaining.pid not in (None, warm)


def test_two_versions_are_never_mixed(tmp_path: Path, explaining: Explaining, record: Record):
    folder = tmp_path / "ph-6L"
    old = save_classifier(folder, note="a version")
    service = Service(Registry([str(folder)], tmp_path / "kept", 0), Metrics(), explaining=explaining)
    api = make_api(service)
    given = as_json(record, LIMB_LEADS)
    new = save_classifier(folder, note="another version")
    assert old.digest != new.digest
    replaced = explain(api, given)
    assert (replaced.status_code, replaced.headers["Retry-After"]) == (503, "1")
    assert "was replaced" in replaced.json()["detail"]
    promoted = make_api(replace(service, registry=Registry([str(folder)], tmp_path / "kept", 0)))
    answer = only(explain(promoted, given))
    assert (answer["model"]["digest"], "explanation" in answer) == (new.digest, True)
    folder.rename(tmp_path / "away")
    assert only(explain(promoted, given)) == answer  # the process has it in memory, as the service has
    assert explain(api, given).status_code == 503
    assert explain(promoted, given).status_code == 503  # what is no longer served was forgotten


PARENT = """
import asyncio, sys
from pathlib import Path
import numpy as np
from lsemvae.record import Record
from serve.explaining import Explaining
from serve.registry import Served

folder, digest, how, *leads = sys.argv[1:]
explaining = Explaining(1, 600)
served = Served.load(Path(folder), "slow", None, "cpu")

def explain(seconds):
    rows = np.random.default_rng(0).normal(size=(len(leads), 500 * seconds))
    record = Record.from_leads(dict(zip(leads, rows)), 500)
    return explaining.explain(record, "", [served], [digest], with_signal=False)

async def main():
    await explain(10)  # it has started, and holds the model
    asked = asyncio.create_task(explain(600))
    while explaining.there == 0:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    print(explaining.pid, flush=True)
    if how == "stopped":
        with explaining.paused():
            await asyncio.sleep(600)
    await asked

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["running", "stopped"])
def test_the_process_ends_with_its_parent_however_that_ends(how: str, tmp_path: Path):
    """In the middle of an explanation of minutes, and where it stands still for a score."""
    folder = with_windows(tmp_path / "slow", "all")
    words = [str(folder), bundles.describe(folder).digest, how, *LIMB_LEADS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        assert is_running(child)
        asyncio.run(until(lambda: how == "running" or state(child) == "T"))
        parent.kill()
    asyncio.run(until(lambda: not is_running(child)))


def state(pid: int) -> str:
    """R, S, T (stopped), Z and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_running(pid: int) -> bool:
    try:
        return state(pid) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
