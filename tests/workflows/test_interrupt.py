"""Ctrl-C ends a command with one line and status 130, leaves nothing half-written, and the same command goes on."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import pytest
from support.session import ROOT, Trained, workflow
from support.terminal import in_terminal

from lsemvae.data.shards import ShardedDataset


def test_in_a_terminal_every_process_gets_it(tmp_path: Path):
    """Simulating on Ray is interrupted in tests/test_simulate.py."""
    words = ("workflows/simulate.py", "--output", str(tmp_path / "cohort"), "--subjects", "900")
    status, shown = in_terminal(*words, interrupt_at="simulate:")
    assert status == 130 and "Traceback" not in shown, shown
    assert shown.rstrip().splitlines()[-1] == command.INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_while_a_program_imports_what_it_needs():
    program = "import command; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "workflows", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, f"{command.INTERRUPTED}\n")  # a shell says 130


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a program of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(when: Callable[[], object], name: str, *words: object) -> None:
    """Runs the command in this process, which gets SIGINT as soon as `when` is true."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            if when():
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = workflow(name, *words, check=False)
    finally:
        ended.set()
        watcher.join()
    assert done.returncode == 130, done.stdout + done.stderr
    assert done.stderr.rstrip().splitlines()[-1] == command.INTERRUPTED and "Traceback" not in done.stderr


def test_promote_while_mlflow_does_not_answer(heard: None, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked: list[socket.socket] = []
        threading.Thread(target=lambda: asked.append(silent.accept()[0]), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        interrupted(lambda: asked, "promote", "--name", "ph-6L")
        asked[0].close()


def interrupted_in_a_terminal(at: str, *words: object) -> None:
    """A process of its own, whose end ends what it has on the cluster."""
    status, shown = in_terminal(*map(str, words), interrupt_at=at)
    assert status == 130 and command.INTERRUPTED in shown and "Traceback" not in shown, shown


@pytest.mark.ray
def test_ingest_goes_on(ray_cluster: object, cohort: Path, tmp_path: Path):
    words = ("--source", cohort, "--output", tmp_path / "shards", "--shard-records", 8)
    interrupted_in_a_terminal("ingest:", "workflows/ingest.py", *words)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    workflow("ingest", *words)
    ShardedDataset.open(str(tmp_path / "shards")).verify()


@pytest.mark.ray
def test_scoring_goes_on(finetuned: dict[str, Trained], shards: Path, tmp_path: Path):
    words = ("--model", finetuned["6"].folder / "bundle", "--data", shards, "--output", tmp_path / "out")
    interrupted_in_a_terminal("parts with", "workflows/score.py", *words)
    assert not (tmp_path / "out" / "summary.json").exists()
    workflow("score", *words)
    assert "nothing to do" in workflow("score", *words).stdout


@pytest.mark.ray
def test_pre_training_goes_on(shards: Path, tmp_path: Path):
    words = ["smoke", "--data", shards, "--storage", tmp_path, "--name", "one", "--num-workers", 1]
    words += ["--optim.epochs", 6]
    interrupted_in_a_terminal("pre-training, loss", "workflows/pretrain.py", *words)
    workflow("pretrain", *words)
    assert "nothing to do" in workflow("pretrain", *words).stdout
