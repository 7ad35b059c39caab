"""Serve follows the alias that a person sets in MLflow, and keeps what it has when that goes wrong."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import servers
import torch
import yaml
from mlflow import MlflowClient
from support.browser import browsing
from support.session import ROOT, Cluster, end_group, end_serve, lines_of, wait_for

from lsemvae import bundle as bundles
from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, Calibration, Scorer, example_record
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.mlmodel import CODE, write_model
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.tracking import BUNDLE_FOLDER, CHAMPION, Run, fetch, promote
from serve import registry as registries
from serve.app import Config
from serve.reconstruct import Encoder
from serve.registry import Registry, Served

ENCODER = LSEMVAEConfig(latent=4, channels=(2, 3, 4))


def make(folder: Path, seed: int, leads: tuple[str, ...] = LIMB_LEADS, task: str | None = "ph") -> Path:
    """A model that was never trained; each seed gives another score."""
    torch.manual_seed(seed)
    config = ClassifierConfig(encoder=ENCODER, hidden=8) if task else ENCODER
    rest = {"threshold": 0.5, "calibration": Calibration(2.0, -1.0)} if task else {}
    model = build(config, leads)
    bundles.save(Bundle.of(model, PreprocessConfig(), task=task, **rest), model, folder)
    return folder


def publish(name: str, folder: Path, digest: str | None = None, alias: str | None = CHAMPION) -> int:
    """Register the folder as a new version, as it is and unchecked -> the version's number.

    A version of two files is what this project registered before its versions were MLflow models.
    """
    run = Run.start("promotion", name, {})
    MlflowClient().log_artifacts(run.run_id, str(folder), BUNDLE_FOLDER)
    run.end()
    return run.register(name, {"digest": digest} if digest else {}, alias)


def set_champion(name: str, version: int) -> None:
    """What the MLflow UI does."""
    MlflowClient().set_registered_model_alias(name, CHAMPION, str(version))


def version_of(registry: Registry, name: str) -> int | None:
    """The version that answers; checks that its digest and score are those of its bundle."""
    if name not in registry.served:
        return None
    served = registry.served[name]
    assert served.described.digest == served.scorer.bundle.digest
    assert served.scorer.score([example_record()])[0].score == pytest.approx(served.scorer.bundle.example, abs=1e-6)
    return served.described.version


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*/*") if path.is_dir())


@dataclass
class Between:
    """A proxy between a client and the MLflow server: it counts requests, acts in mid-request, or stops answering."""

    server: str
    on_get: Callable[[str], None] = lambda path: None
    away: bool = False
    paths: list[str] = field(default_factory=list)

    def weights_fetched(self) -> int:
        return sum(path.endswith(f"/{WEIGHTS}") and "?" not in path for path in self.paths)

    def __enter__(self) -> "Between":
        between, client = self, httpx.Client(timeout=60)

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                if between.away:
                    self.close_connection = True
                    return
                between.paths.append(self.path)
                if self.command == "GET":
                    between.on_get(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kept = {key: self.headers[key] for key in ("Content-Type", "Accept") if key in self.headers}
                answer = client.request(self.command, between.server + self.path, headers=kept, content=body)
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *args) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def between(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # they only cost time here
    with Between(mlflow_server) as standing:
        yield standing


@pytest.fixture
def two(mlflow_server: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A registered model with two good versions, 1 promoted -> its name."""
    name = request.node.name
    publish(name, make(tmp_path / "one", 1))
    publish(name, make(tmp_path / "two", 2), alias=None)
    return name


def test_the_champion_is_followed_there_and_back(two: str, tmp_path: Path):
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    assert registry.ready and version_of(registry, two) == 1
    before = registry.served
    registry.refresh()
    assert registry.served is before  # nothing is loaded twice
    for version in (2, 1, 2):
        set_champion(two, version)
        registry.refresh()
        assert version_of(registry, two) == version
        assert registry.problems == {}
        (kept,) = on_disk(tmp_path / "kept")
        assert kept == f"{version}-{registry.served[two].described.digest}"
    assert before[two].described.version == 1  # whoever holds the old snapshot still has all of it
    digests = [bundles.describe(tmp_path / folder).digest for folder in ("one", "two")]
    assert before[two].described.digest == digests[0] != digests[1] == registry.served[two].described.digest


ALIASES = '[data-component-id*="modelversionviewaliaseditor"]'
ALIAS = '[role="dialog"] input[role="combobox"]'
SAVE = '[data-component-id="mlflow.edit-aliases-modal.save-button"]'


def test_a_person_promotes_a_version_on_its_page_in_mlflow(two: str, mlflow_server: str, tmp_path: Path):
    with browsing(tmp_path) as page:
        registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 1)
        assert version_of(registry, two) == 1
        page.size(1400)
        page.open(f"{mlflow_server}/#/models/{two}", f"document.body.innerText.includes({json.dumps(two)})")
        page.click(f'a[href$="/models/{two}/versions/2"]')
        page.click(ALIASES)
        page.click(ALIAS)
        page.call("Input.insertText", text=CHAMPION)
        page.press("Enter")
        page.click(SAVE)
        page.wait(f"document.querySelector({json.dumps(ALIASES)})?.parentElement.innerText.includes('champion')")
        page.screenshot(tmp_path / "promoted.png")
        while version_of(registry, two) != 2:
            time.sleep(0.2)
    assert registry.problems == {} and MlflowClient().get_model_version_by_alias(two, CHAMPION).version == "2"
    assert Config.model_fields["poll_s"].default <= 30


def test_two_promotions_in_a_row_load_the_last(two: str, tmp_path: Path, between: Between, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    third = publish(two, make(tmp_path / "three", 3), alias=None)
    set_champion(two, 2)
    set_champion(two, third)
    between.paths.clear()
    registry.refresh()
    assert version_of(registry, two) == third
    assert between.weights_fetched() == 1


def test_an_alias_that_moves_in_mid_load_is_followed_at_the_next_look(two: str, tmp_path: Path, between, monkeypatch):
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    third = publish(two, make(tmp_path / "three", 3), alias=None)
    set_champion(two, 2)
    moved = []

    def move(path: str) -> None:
        """While version 2's weights are on their way, a person promotes version 3."""
        if path.endswith(f"/{WEIGHTS}") and "?" not in path and not moved:
            moved.append(path)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", between.server)
            set_champion(two, third)

    between.on_get = move
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    registry.refresh()
    assert moved and version_of(registry, two) == 2
    registry.refresh()
    assert version_of(registry, two) == third
    assert len(on_disk(tmp_path / "kept")) == 1


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return change


PICKLE = b"cbuiltins\nexec\n(Vopen('/tmp/lsemvae-unpickled', 'w').close()\ntR."
"""Makes that file where it is unpickled."""


def with_pickle(folder: Path) -> None:
    (folder / "model.pkl").write_bytes(PICKLE)


def other_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def as_pickled_model(folder: Path) -> None:
    """As MLflow stores a PythonModel that is no file of code."""
    write_model(bundles.describe(folder), folder)
    (folder / "python_model.pkl").write_bytes(PICKLE)
    flavour = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl", "cloudpickle_version": "3"}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavour}}))


BROKEN = {
    "a pickled MLflow model": (as_pickled_model, "must hold config.json and model.safetensors"),
    "a pickle beside it": (with_pickle, "holds config.json, model.pkl, model.safetensors"),
    "a folder beside it": (
        lambda f: ((f / "code").mkdir(), (f / "code/a.py").write_text("")),
        "holds code, config.json",
    ),
    "a pickle in its place": (lambda f: ((f / WEIGHTS).unlink(), with_pickle(f)), "model.pkl, must hold"),
    "a pickle by its name": (lambda f: (with_pickle(f), (f / "model.pkl").rename(f / WEIGHTS)), "SHA-256 differs"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds config.json, must hold"),
    "half the weights": (lambda f: os.truncate(f / WEIGHTS, 1000), "SHA-256 differs"),
    "another byte": (other_byte, "SHA-256 differs"),
    "another threshold": (edit(threshold=0.01), "its config.json was altered"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "another architecture": (edit(architecture="resnet"), "resnet"),
    "a later format": (edit(format=2), "format 2"),
    "other preprocessing": (edit(preprocess_version=99), "preprocessing version 99"),
    "a wrong example": (edit(example=0.123), "scores its example"),
    "other leads": (lambda f: make(f, 5, LEADS), "register it under another name"),
    "another task": (lambda f: make(f, 5, task="af"), "finds af in I, II"),
    "no task": (lambda f: make(f, 5, task=None), "fine-tune it first"),
}
UNDIGESTED = {"a wrong example", "other leads", "another task", "no task"}
"""A bundle that is consistent in itself, as if someone had registered it like this."""


@pytest.fixture(scope="module")
def steady(mlflow_server: str, tmp_path_factory) -> tuple[Registry, Path]:
    """Version 1 of `steady` answers."""
    folder = tmp_path_factory.mktemp("steady")
    publish("steady", make(folder / "one", 1))
    registry = Registry(["models:/steady@champion"], folder / "kept", 0)
    assert version_of(registry, "steady") == 1
    return registry, folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_version_that_is_not_as_it_must_be_is_refused_and_the_old_one_answers(what: str, steady, tmp_path, caplog):
    registry, folder = steady
    damage, says = BROKEN[what]
    digest = bundles.describe(make(tmp_path / "bad", 4)).digest
    damage(tmp_path / "bad")
    before, kept = registry.served, on_disk(folder / "kept")
    bad = publish("steady", tmp_path / "bad", None if what in UNDIGESTED else digest)
    registry.refresh()
    registry.refresh()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]  # loudly, and once
    for text in (line, registry.problems["steady"]):
        assert f"models:/steady/{bad}" in text
        assert says in text and "version 1 answers" in text and "\n" not in text and str(folder) not in text
    assert registry.served is before and version_of(registry, "steady") == 1
    assert on_disk(folder / "kept") == kept
    assert not Path("/tmp/lsemvae-unpickled").exists()
    set_champion("steady", 1)
    registry.refresh()
    assert registry.problems == {} and registry.served is before
    if what == "a pickle beside it":  # nor do the workflows take it
        with pytest.raises(BundleError, match=r"model\.pkl"):
            fetch(f"models:/steady/{bad}", tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()


def test_what_was_refused_is_not_fetched_at_every_look_but_later(two, tmp_path, between, monkeypatch):
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    other_byte(make(tmp_path / "bad", 3))
    publish(two, tmp_path / "bad")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    for _ in range(3):
        registry.refresh()
    assert between.weights_fetched() == 1
    monkeypatch.setattr(registries, "RETRY_S", 0.0)
    registry._refused.clear()
    registry.refresh()
    registry.refresh()
    assert between.weights_fetched() == 3
    assert version_of(registry, two) == 1


def test_with_mlflow_away_the_last_good_bundle_answers(two: str, tmp_path: Path, between: Between, monkeypatch):
    uri, kept = f"models:/{two}@champion", tmp_path / "kept"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    registry = Registry([uri], kept, 0)
    set_champion(two, 2)
    registry.refresh()
    between.away = True
    registry.refresh()
    assert version_of(registry, two) == 2
    assert between.url in registry.problems[two] and "version 2 answers" in registry.problems[two]
    started = Registry([uri], kept, 0)
    assert version_of(started, two) == 2 and started.ready
    alone = Registry([uri, str(tmp_path / "one")], tmp_path / "empty", 0)
    assert list(alone.served) == ["one"] and alone.ready  # the other model answers
    assert "nothing answers in its place" in alone.problems[two]
    nothing = Registry([uri], tmp_path / "empty", 0)
    assert not nothing.ready and between.url in nothing.problems[two]
    between.away = False
    for each in (registry, started, alone, nothing):
        each.refresh()
        assert version_of(each, two) == 2 and each.problems == {}


def test_a_password_in_the_servers_address_is_not_shown(two: str, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:hunter2@127.0.0.1:{servers.free_port()}")
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    assert "127.0.0.1" in registry.problems[two]
    assert "hunter2" not in registry.problems[two] + caplog.text


def test_a_missing_alias_is_waited_for_and_a_removed_one_changes_nothing(two: str, tmp_path: Path):
    MlflowClient().delete_registered_model_alias(two, CHAMPION)
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    assert not registry.ready and "no model" in registry.problems[two] and "alias 'champion'" in registry.problems[two]
    promote(two, "2")
    registry.refresh()
    assert version_of(registry, two) == 2 and registry.problems == {}
    MlflowClient().delete_registered_model_alias(two, CHAMPION)
    registry.refresh()
    assert version_of(registry, two) == 2
    assert "alias 'champion'" in registry.problems[two] and "version 2 answers" in registry.problems[two]


def test_a_damaged_bundle_on_disk_is_fetched_again_or_refused(two: str, tmp_path: Path, between: Between, monkeypatch):
    uri, kept = f"models:/{two}@champion", tmp_path / "kept"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    Registry([uri], kept, 0)
    (folder,) = kept.glob("model-*/1-*")
    between.paths.clear()
    assert version_of(Registry([uri], kept, 0), two) == 1
    assert between.weights_fetched() == 0  # what is on disk is not fetched again
    edit(threshold=0.9)(folder)
    between.away = True
    registry = Registry([uri], kept, 0)
    assert not registry.ready and "was kept with" in registry.problems[two]
    other_byte(folder)
    registry.refresh()
    assert not registry.ready and "SHA-256 differs" in registry.problems[two]
    between.away = False
    registry.refresh()
    assert version_of(registry, two) == 1 and registry.served[two].described.threshold == 0.5
    assert len(on_disk(kept)) == 1


def test_the_code_of_an_mlflow_model_is_neither_fetched_nor_run(
    two: str, tmp_path: Path, between: Between, monkeypatch
):
    hostile = make(tmp_path / "hostile", 3)
    write_model(bundles.describe(hostile), hostile)
    (hostile / CODE).write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    (hostile / "MLmodel").write_bytes(PICKLE)
    version = publish(two, hostile)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    assert version_of(registry, two) == version and registry.problems == {}
    fetched = {path.rsplit("/", 1)[-1] for path in between.paths if f"/{BUNDLE_FOLDER}/" in path and "?" not in path}
    assert fetched == {CONFIG, WEIGHTS}
    assert not (tmp_path / "was-run").exists()
    assert {path.name for path in (tmp_path / "kept").glob("model-*/*-*/*")} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"version": 1}', b"\xff", b'{"version": {"a": 1}, "digest": 2}']
)
def test_a_damaged_note_of_the_last_version_costs_a_fetch(content: bytes, steady: tuple[Registry, Path]):
    _, folder = steady
    (folder / "kept" / "model-steady" / "last.json").write_bytes(content)
    assert version_of(Registry(["models:/steady@champion"], folder / "kept", 0), "steady") == 1


def test_two_replicas_on_one_machine_share_a_folder(two: str, tmp_path: Path, between: Between, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    uri, kept = f"models:/{two}@champion", tmp_path / "kept"
    (kept / f"model-{two}" / "partial-of-one-that-was-killed").mkdir(parents=True)
    replicas: list[Registry] = []
    starting = [threading.Thread(target=lambda: replicas.append(Registry([uri], kept, 0))) for _ in range(2)]
    together(starting)
    assert [version_of(replica, two) for replica in replicas] == [1, 1]
    set_champion(two, 2)
    together([threading.Thread(target=replica.refresh) for replica in replicas])
    assert [version_of(replica, two) for replica in replicas] == [2, 2]
    assert [replica.problems for replica in replicas] == [{}, {}]
    assert between.weights_fetched() == 2  # each version once for both
    assert on_disk(kept) == [f"2-{replicas[0].served[two].described.digest}"]
    set_champion(two, 1)
    replicas[0].refresh()  # its neighbour's bundle is gone from disk, and still answers
    assert version_of(replicas[1], two) == 2


def together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_same_number_of_another_model_is_another_version(two: str, tmp_path: Path):
    """The registered model is deleted and made anew: version 1 again, with other weights."""
    uri, kept = f"models:/{two}@champion", tmp_path / "kept"
    registry = Registry([uri], kept, 0)
    MlflowClient().delete_registered_model(two)
    assert publish(two, tmp_path / "two") == 1
    for each in (registry, Registry([uri], kept, 0)):
        each.refresh()
        assert version_of(each, two) == 1
        assert each.served[two].described.digest == bundles.describe(tmp_path / "two").digest


def test_at_most_two_versions_of_a_model_are_in_memory(two: str, tmp_path: Path, monkeypatch):
    import gc
    import weakref

    made: weakref.WeakSet[Scorer] = weakref.WeakSet()
    most = []
    load = Served.load.__func__

    def counted(cls, *args):
        served = load(cls, *args)
        made.add(served.scorer)
        most.append(len(made))
        return served

    monkeypatch.setattr(Served, "load", classmethod(counted))
    registry = Registry([f"models:/{two}@champion"], tmp_path / "kept", 0)
    publish(two, make(tmp_path / "three", 3, LEADS))  # is refused when it is loaded already
    registry.refresh()
    for version in (2, 1, 2):
        set_champion(two, version)
        registry.refresh()
    assert max(most) == 2
    gc.collect()
    assert len(made) == 1


def test_folders_and_names(tmp_path: Path):
    uris = [str(make(tmp_path / "six", 1)), (make(tmp_path / "twelve", 2, LEADS)).as_uri()]
    registry = Registry(uris, tmp_path / "kept", 0)
    assert list(registry.served) == ["twelve", "six"]  # most leads first
    assert registry.served["six"].described.version is None
    with pytest.raises(TypeError):
        registry.served["six"] = None
    for wrong, says in (
        ([uris[0], f"{tmp_path}/other/six"], "both 'six'"), (["models:/x"], "models:/NAME@alias"),
        (["models:/x/y"], "models:/NAME@alias"), (["ftp://x"], "s3://"),
    ):  # fmt: skip
        with pytest.raises(LsemvaeError, match=says):
            Registry(wrong, tmp_path / "kept", 0)
    later = Registry([f"{tmp_path}/later"], tmp_path / "kept", 0)
    assert not later.ready and "does not exist" in later.problems["later"]
    make(tmp_path / "later", 3)
    later.refresh()
    assert later.ready and later.problems == {}


def test_the_encoder_is_kept_like_the_models_and_nothing_is_left_in_the_temporary_folder(
    mlflow_server: str, tmp_path: Path, between: Between, monkeypatch, caplog
):
    name, kept = "encoder-of-a-replica", tmp_path / "kept"

    def promote_encoder(folder: Path) -> None:
        with monkeypatch.context() as direct:
            direct.setenv("MLFLOW_TRACKING_URI", mlflow_server)
            publish(name, folder)

    promote_encoder(make(tmp_path / "one", 1, LEADS, task=None))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    uri = f"models:/{name}@champion"
    digests = {
        number: bundles.describe(make(tmp_path / number, k, LEADS, task=None)).digest
        for k, number in enumerate(("one", "two", "three"), 1)
    }

    def started() -> Encoder:
        return Encoder(uri, kept, 0)

    def answers(encoder: Encoder) -> str:
        """Which of the bundles answers."""
        digest = encoder.reconstructor.bundle.digest
        return next(number for number in digests if digests[number] == digest)

    first = started()
    assert answers(first) == answers(started()) == "one"
    assert between.weights_fetched() == 1  # the second start took it from the disk
    between.away = True
    away = started()
    assert answers(away) == "one" and between.url in away.problem
    assert "version 1 answers /v1/reconstruct" in caplog.text
    between.away = False
    promote_encoder(tmp_path / "two")
    for encoder in (first, away):  # as two replicas on one machine: each follows, and the bundle is fetched once
        before = encoder.reconstructor
        encoder.refresh()
        assert answers(encoder) == "two" and not encoder.problem and encoder.reconstructor is not before
    assert between.weights_fetched() == 2
    (folder,) = (path for path in (kept / f"encoder-{name}").iterdir() if path.is_dir())
    (folder / WEIGHTS).write_bytes(b"damaged")
    assert answers(started()) == "two"
    promote_encoder(make(tmp_path / "classifier", 3, LEADS))  # refused, and the encoder that answered goes on
    fetched = between.weights_fetched()
    for encoder in (first, started()):
        for _ in range(2):
            encoder.refresh()
        assert answers(encoder) == "two" and "has no decoder" in encoder.problem
    assert between.weights_fetched() == fetched + 2  # not at every look
    promote_encoder(tmp_path / "three")
    first.refresh()
    assert answers(first) == "three" and not first.problem
    none = Encoder("models:/no-such@champion", kept, 0)
    assert none.reconstructor is None and "no model 'no-such'" in none.problem
    assert list(temporary.iterdir()) == []
    assert list(kept.rglob("partial-*")) == []


LOAD = """
import json, os, sys, threading, time
import httpx
body = open(sys.argv[2], "rb").read()
def ask():
    with httpx.Client(timeout=60) as client:
        while True:
            try:
                answer = client.post(sys.argv[1], content=body, headers={"Content-Type": "application/json"})
                result = answer.json()["results"][0]
                line = [answer.status_code, result["model"]["version"], result["model"]["digest"], result["score"]]
            except Exception as error:
                line = [type(error).__name__, None, None, None]
            os.write(1, (json.dumps([time.time(), *line]) + "\\n").encode())
            time.sleep(0.01)
for _ in range(4):
    threading.Thread(target=ask).start()
"""


@dataclass
class Load:
    """Another process sends requests without a pause -> its answers, in order."""

    log: Path

    def answers(self) -> list[list]:
        return [json.loads(line) for line in lines_of(self.log)]

    def wait_until(self, version: int) -> None:
        """Until 40 answers one after another, which two replicas share, are this version's."""
        began = time.time()
        for _ in range(2000):
            last = [answer[2] for answer in self.answers() if answer[0] >= began][-40:]
            if len(last) == 40 and set(last) == {version}:
                return
            time.sleep(0.3)
        pytest.fail(f"version {version} does not answer: {last[-10:]}")


@pytest.mark.ray
def test_replicas_follow_under_load_without_a_failed_or_mixed_answer(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
):
    name = "under-load"
    scores = {}
    for number in (1, 2, 3):
        folder = make(tmp_path / str(number), number)
        assert publish(name, folder, alias=CHAMPION if number == 1 else None) == number
        answer = Scorer(folder).score([example_record()])[0]
        scores[number] = (bundles.describe(folder).digest, answer.score)
    other_byte(make(tmp_path / "bad", 4))
    bad = publish(name, tmp_path / "bad", alias=None)
    encoder, encoders = f"{name}-encoder", [make(tmp_path / f"e{k}", k, LEADS, task=None) for k in (1, 2)]
    publish(encoder, encoders[0])
    publish(encoder, encoders[1], alias=None)
    assert len({round(score, 4) for _, score in scores.values()}) == 3

    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = servers.free_port()
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"], deployment["max_replicas_per_node"]
    deployment["num_replicas"] = 2
    record = example_record()
    rows = dict(zip(record.leads, record.signal_mv_LT, strict=True))
    leads = {lead: np.round(rows[lead].astype(float), 6).tolist() for lead in LIMB_LEADS}
    (tmp_path / "body.json").write_text(json.dumps({"records": [{"rate_hz": 500, "leads": leads}]}))
    with Between(mlflow_server) as between:
        application["args"] |= {
            "models": [f"models:/{name}@champion"], "bundles": str(tmp_path / "kept"), "poll_s": 1,
            "encoder": f"models:/{encoder}@champion",
            "allow_anonymous": True, "threads": 1,
        }  # fmt: skip
        application["runtime_env"] = {
            "env_vars": {"MLFLOW_TRACKING_URI": between.url, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        log, url = tmp_path / "serve.log", f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "config.yaml")]
        asked = Load(tmp_path / "answers.jsonl")
        load = None
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            wait_for(f"{url}/readyz", process, log)
            wait_for_replicas(ray_cluster, 2)
            with asked.log.open("w") as stream:
                command = [sys.executable, "-c", LOAD, f"{url}/v1/score", str(tmp_path / "body.json")]
                load = subprocess.Popen(command, stdout=stream, start_new_session=True)
            asked.wait_until(1)
            for version, folder in enumerate(encoders, 1):
                set_champion(encoder, version)
                wait_for_encoder(url, (tmp_path / "body.json").read_bytes(), bundles.describe(folder).digest)
            set_champion(name, 2)
            asked.wait_until(2)
            set_champion(name, bad)
            wait_for_problem(url, "SHA-256 differs", "version 2 answers")
            asked.wait_until(2)
            set_champion(name, 1)
            set_champion(name, 3)
            asked.wait_until(3)
            between.away = True  # the registry is down
            wait_for_problem(url, "version 3 answers", between.url)
            asked.wait_until(3)
            between.away = False
            set_champion(name, 1)
            asked.wait_until(1)
            wait_for_problem(url)
            # What answers has no more need of the files.
            assert len(on_disk(tmp_path / "kept")) == 1
        finally:
            if load:
                end_group(load)
            end_serve(process)
    answers = asked.answers()
    assert len(answers) > 400
    assert [answer for answer in answers if answer[1] != 200] == []
    for _, _, version, digest, score in answers:
        assert (digest, score) == (scores[version][0], pytest.approx(scores[version][1], abs=1e-5))
    assert {answer[2] for answer in answers} == {1, 2, 3}


def wait_for_replicas(cluster: Cluster, count: int) -> None:
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    for _ in range(3000):
        state = httpx.get(f"{cluster.dashboard}/api/serve/applications/", headers=headers, timeout=30).json()
        replicas = [
            replica["state"]
            for application in state["applications"].values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]
        if replicas.count("RUNNING") == count:
            return
        time.sleep(0.2)
    pytest.fail(f"the replicas are {replicas}")


def wait_for_encoder(url: str, body: bytes, digest: str) -> None:
    """Wait until every replica reconstructs with this encoder (15 answers in a row)."""
    inside, headers = 0, {"Content-Type": "application/json"}
    for _ in range(3000):
        answer = httpx.post(f"{url}/v1/reconstruct", content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        inside = inside + 1 if answer.json()["model"] == digest else 0
        if inside == 15:
            return
        time.sleep(0.05)
    pytest.fail(f"encoder {digest} does not answer: {answer.json()['model']}")


def wait_for_problem(url: str, *says: str) -> None:
    """Wait until every replica reports these words (15 answers in a row), or without words until none has a problem."""
    inside = 0
    for _ in range(12_000):
        state = httpx.get(f"{url}/readyz", timeout=60)
        assert state.status_code == 200, state.text
        problems = " ".join(state.json()["problems"].values())
        inside = inside + 1 if (all(word in problems for word in says) if says else not problems) else 0
        if inside == 15:
            return
        time.sleep(0.05)
    pytest.fail(f"/readyz does not say {says}: {state.text}")
