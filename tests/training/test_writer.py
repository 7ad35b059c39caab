"""Checkpoints that are written while training goes on: whole or absent, one at a time, equal to the moment they were
taken at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoints
from support.faults import Between, Fault
from support.session import ROOT
from support.writing import ORDER, Training, small

from lsemvae import bundle as bundles
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import BUNDLE, newest_whole
from lsemvae.training.writer import PARTIAL, Writer, remove_unfinished

CPU = torch.device("cpu")


@pytest.fixture
def training() -> Training:
    torch.manual_seed(0)
    found = Training(small())
    found.step()
    return found


def resumed(place: Storage) -> tuple[str | None, int, dict[str, torch.Tensor], dict]:
    name, (progress, model, optimizer) = newest_whole(place, small(), ORDER, CPU)
    return name, progress.epoch, model.state_dict(), optimizer.state_dict()["state"]


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def started(folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "writing.py"), str(folder), str(limit)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_checkpoint_is_that_of_its_step_whatever_comes_after(training: Training, tmp_path: Path):
    place = Storage.open(tmp_path / "run")
    with Writer(place) as writer:
        writer.prepare(training.model, training.optimizer)
        for epoch in (1, 2):
            training.step()
            wanted, moments = weights_of(training), training.optimizer.state_dict()["state"][0]["exp_avg"].clone()
            name = training.write(writer, epoch, best=epoch == 1)
            training.step()  # while it is written
            writer.wait()
            found = resumed(place)
            assert found[:2] == (name, epoch)
            assert_same(found[2], wanted)
            torch.testing.assert_close(found[3][0]["exp_avg"], moments, rtol=0, atol=0)
    best, _ = bundles.load(tmp_path / "run" / BUNDLE)
    assert best.provenance["metrics"] == {"epoch": 1}
    assert not list((tmp_path / "run").glob(f"{PARTIAL}*"))


def test_a_killed_write_leaves_the_checkpoint_before(tmp_path: Path):
    """SIGKILL while a checkpoint is being written; the next start removes what there is of it."""
    process = started(tmp_path)

    def partial() -> list[str]:
        return [path.name for path in tmp_path.iterdir() if path.name.startswith(PARTIAL)]

    while True:
        assert process.poll() is None, process.communicate()
        if partial() and len(checkpoints(tmp_path)) >= 2:
            process.send_signal(signal.SIGSTOP)
            if partial():
                break
            process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert partial()
    kept = checkpoints(tmp_path)
    place = Storage.open(tmp_path)
    remove_unfinished(place)
    assert not partial()
    assert resumed(place)[0] == kept[-1].name  # all that have a name are whole
    assert bundles.load(tmp_path / BUNDLE)[0].leads == small().leads


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path):
    process = started(tmp_path, limit=2**16)
    printed, _ = process.communicate()
    *_, error = printed.splitlines()
    assert error.startswith("error: no checkpoint can be written") and "make room there" in error
    assert "Traceback" not in printed
    assert len(checkpoints(tmp_path)) == 1 and not list(tmp_path.glob(f"{PARTIAL}*"))
    assert resumed(Storage.open(tmp_path))[1] == 1


@pytest.mark.ray
def test_a_slow_store_is_never_more_than_one_behind_and_a_failing_one_ends_the_next_step(
    training: Training, s3: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    between = Between(s3)
    place = Storage.open(between.uri("ecg/writer"))
    between.bytes_per_s = 20_000_000
    between.faults = [Fault("slow", method="PUT")]
    writer = Writer(place)
    first = training.write(writer, 1, best=False)
    assert writer.busy and not any("state.json" in path for _, path, _ in between.requests)  # it did not wait
    wanted = weights_of(training)
    training.step()
    second = training.write(writer, 2, best=False)
    writer.wait()
    puts = [path for method, path, _ in between.requests if method == "PUT" and "checkpoint_" in path]
    assert [first in path for path in puts] == sorted((first in path for path in puts), reverse=True)
    for name in (first, second):
        states = ["state.json" in path for path in puts if name in path]
        assert states == sorted(states) and states[-1]  # it comes last
    assert resumed(place)[:2] == (second, 2)
    place.filesystem.delete_dir(place.path(second))
    assert resumed(place)[:2] == (first, 1)
    assert_same(resumed(place)[2], wanted)

    for kind, passing in (("403", False), ("reset", True)):
        between.faults = [Fault(kind, method="PUT", part="checkpoint_", spared=1)]
        training.write(writer, 3, best=False)
        while writer.busy:
            time.sleep(0.01)
        with pytest.raises(StorageError) as caught:
            writer.check()  # at the next step
        assert caught.value.passing == passing
        with pytest.raises(StorageError):
            training.write(writer, 4, best=False)
        writer = Writer(place)
    between.heal()
    names = {path.split("/")[0] for path in place.list()}
    assert len(names) > 1
    remove_unfinished(place)
    assert {path.split("/")[0] for path in place.list()} == {first}
    assert resumed(place)[:2] == (first, 1)
    between.close()


def test_another_error_waits_for_the_checkpoint_too(training: Training, tmp_path: Path):
    place = Storage.open(tmp_path)
    names = []

    def train() -> None:
        with Writer(place) as writer:
            names.append(training.write(writer, 1))
            raise LsemvaeError("too many damaged")

    with pytest.raises(LsemvaeError, match="too many damaged"):
        train()
    assert resumed(place)[0] == names[0]
