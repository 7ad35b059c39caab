"""The environment that commands prepare, and what of it they hand to Ray's workers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import command
import pytest
from support.session import ROOT
from support.terminal import in_terminal

WORKFLOWS = ("ingest", "pretrain", "tune", "finetune", "promote", "score", "simulate", "scale", "demo", "bench")
PASSWORD = "hunter2-of-the-tests"


def run(program: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "workflows")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_workflows_import_neither_ray_nor_mlflow_before_the_environment_is_prepared():
    """Both read some of the variables when they are imported."""
    program = f"import sys, {', '.join(WORKFLOWS)}; print([name for name in ('ray', 'mlflow') if name in sys.modules])"
    assert run(program) == "[]"


def test_importing_command_changes_nothing():
    bare = {name: value for name, value in os.environ.items() if name not in command.DEFAULTS}
    program = "import os; before = dict(os.environ); import command; print(dict(os.environ) == before)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=bare | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'workflows'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr[-3000:]


@pytest.fixture
def restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_what_the_user_has_set_wins(restored: None):
    for name in (*command.DEFAULTS, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.environ["RAY_DATA_LOG_LEVEL"] = "DEBUG"
    command.prepare_environment()
    assert {name: os.environ[name] for name in command.DEFAULTS} == command.DEFAULTS | {"RAY_DATA_LOG_LEVEL": "DEBUG"}
    assert os.environ.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0"
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    command.prepare_environment()
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ


@pytest.mark.parametrize(
    "uri", ["https://ecg:{}@mlflow.example.org", "postgresql://ecg:{}@db/mlflow", "https://{}@host"]
)
def test_a_uri_with_a_password_is_not_passed_to_a_cluster(uri: str, restored: None, caplog: pytest.LogCaptureFixture):
    os.environ |= {"MLFLOW_TRACKING_URI": uri.format(PASSWORD), "RAY_ADDRESS": "10.0.0.1:6379"}
    passed = command.workers_environment()
    assert PASSWORD not in json.dumps(passed) and "MLFLOW_TRACKING_URI" not in passed
    assert "MLFLOW_TRACKING_USERNAME" in caplog.text and PASSWORD not in caplog.text
    os.environ["MLFLOW_TRACKING_URI"] = "https://mlflow.example.org"
    assert command.workers_environment()["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"


@pytest.mark.ray
def test_ray_shows_no_password_of_mlflow_and_workers_have_it():
    """A real cluster, with everything that its state API and its dashboard list."""
    program = """
import json, os, urllib.error, urllib.request
from command import prepare_environment, start_ray
prepare_environment()
start_ray()
import ray
from lsemvae.tracking import tracking_uri

@ray.remote
class Worker:
    def uri(self):
        return tracking_uri()

@ray.remote
def task():
    return tracking_uri()

worker = Worker.remote()
uris = ray.get([worker.uri.remote(), task.remote()])
address = "http://" + ray._private.worker.global_worker.node.address_info["webui_url"]
bearer = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
shown = ""
for path in ("v0/actors", "v0/tasks", "v0/workers", "v0/runtime_envs", "jobs/"):
    request = urllib.request.Request(f"{address}/api/{path}?detail=1&limit=1000", headers=bearer)
    try:
        with urllib.request.urlopen(request) as answer:
            shown += path + answer.read().decode()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: {error}: {error.read().decode()}")
print(json.dumps([uris, shown]))
"""
    uri = f"http://ecg:{PASSWORD}@127.0.0.1:9"
    uris, shown = json.loads(run(program, RAY_ADDRESS="local", MLFLOW_TRACKING_URI=uri))
    assert uris == [uri, uri]
    assert "MALLOC_ARENA_MAX" in shown  # what is passed is listed
    assert PASSWORD not in shown


WRITES = """
import os, subprocess, sys
from dataclasses import dataclass
import command

@dataclass
class Args: pass

def main(args):
    os.write(2, b"E] core.cc: an actor has constructor arguments in the object store and max_restarts > 0. If\\n")
    os.write(2, b"E] core_worker.cc: another error of native code\\nand the last, without an e")
    os.write(2, b"nd")
    subprocess.run(["sh", "-c", "echo from a program >&2"])
    print("terminal", sys.stderr.isatty(), file=sys.stderr)
    raise RuntimeError("a bug")

command.run_command(main, Args)
"""


def test_of_what_native_code_writes_only_ray_s_known_noise_is_left_out():
    status, shown = in_terminal("-c", WRITES)
    assert status == 1
    assert "object store" not in shown
    for kept in ("another error of native code", "without an end", "from a program", "terminal True", "a bug"):
        assert kept in shown


INTERRUPTED = """
import atexit, os, threading
from dataclasses import dataclass
import command

@dataclass
class Args: pass

atexit.register(lambda: os.write(2, b"E] at the very end\\n"))

def main(args):
    os.write(2, b"E] before\\n")
    threading.Timer(0.5, lambda: os.write(2, b"E] Failed to push error to driver\\n")).start()
    threading.Event().wait(0.2)
    raise KeyboardInterrupt

command.run_command(main, Args)
"""


def test_after_ctrl_c_nothing_that_native_code_writes_follows_the_last_line():
    status, shown = in_terminal("-c", INTERRUPTED)
    assert (status, shown.split()) == (130, ["E]", "before", *command.INTERRUPTED.split()])
