"""A run resumes from its newest whole checkpoint, or says why it cannot; it never starts over without a word."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch
from golden import make
from mlflow import MlflowClient
from support.checkpoints import write_checkpoint
from support.faults import Between, Fault
from support.session import Trained, workflow

from lsemvae import bundle as bundles
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage
from lsemvae.training import checkpoints as checkpointing
from lsemvae.training.checkpoints import BUNDLE, OPTIMIZER, STATE, newest_whole, save_optimizer
from lsemvae.training.reported import LIST, require_checkpoints


def newest(run: Path) -> tuple[int, int]:
    """Epoch and step at which the run resumes."""
    place = Storage.open(run)
    progress = newest_whole(place, make.RECIPE, make.ORDER, torch.device("cpu"))[1][0]
    return progress.epoch, progress.step


# ---- clocks


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put this process into a time zone, as the system's C library knows it."""

    def put(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


def summer_time_that_ends_in(seconds: int) -> str:
    """A time zone for TZ whose daylight saving time ends so soon: its clocks are then put back by an hour."""
    end = time.time() + seconds + 3600  # the rule is written in the time before the change
    utc = time.gmtime(end)
    return f"STD0DST-1,J1/0,J{utc.tm_yday}/{utc.tm_hour}:{utc.tm_min:02d}:{utc.tm_sec:02d}"


@pytest.mark.parametrize("ahead", ["an hour ahead", "another continent", "the end of summer time"])
def test_the_newest_is_known_by_epoch_and_step_whatever_the_clocks_say(ahead: str, zone, tmp_path: Path):
    """A machine names its checkpoint by its own clock and dies; another one goes on, by a clock that is behind."""
    if ahead == "the end of summer time":
        zone(summer_time_that_ends_in(2))
        first = write_checkpoint(tmp_path, 1, 8)
        assert time.localtime().tm_isdst
        while time.localtime().tm_isdst:
            time.sleep(0.05)
    else:
        zone({"an hour ahead": "XYZ-1", "another continent": "Asia/Tokyo"}[ahead])
        first = write_checkpoint(tmp_path, 1, 8)
        zone("UTC")
    second, third = write_checkpoint(tmp_path, 1, 12), write_checkpoint(tmp_path, 2)
    assert first.name > third.name > second.name  # by name, the oldest would be the newest
    assert newest(tmp_path) == (2, 0)
    (third / OPTIMIZER).unlink()
    assert newest(tmp_path) == (1, 12)
    (second / STATE).write_bytes(b"")
    assert newest(tmp_path) == (1, 8)


def test_what_cannot_be_read_is_said_wherever_its_name_would_put_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_checkpoint(tmp_path, 2, name="checkpoint_2026-01-02")
    old = write_checkpoint(tmp_path, 1, name="checkpoint_2026-01-01")
    (old / STATE).write_text((old / STATE).read_text()[:20])
    assert newest(tmp_path) == (2, 0)
    assert "checkpoint_2026-01-01 is damaged and passed over" in caplog.text and "cut or altered" in caplog.text


# ---- other versions


def other_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "FORMAT", bundles.FORMAT + 1)


def other_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "PREPROCESS_VERSION", 99)
    monkeypatch.setattr(bundles, "READABLE", (99,))


def other_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(optimizer: torch.optim.Optimizer, folder: Path, **state: object) -> None:
        state["sequence"] = state.pop("order")
        save_optimizer(optimizer, folder, **state)

    monkeypatch.setattr(checkpointing, "save_optimizer", save)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (other_format, "has format 2, this version reads 1: update lsemvae"),
        (other_preprocessing, "was trained with preprocessing version 99, this release reads"),
        (other_state, "order"),
    ],
)
def test_a_whole_checkpoint_of_another_version_is_not_called_damaged(
    other: Callable, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Another release writes it, with its own constants; this one reads it."""
    write_checkpoint(tmp_path, 1)
    time.sleep(0.002)  # Ray's names have milliseconds
    with monkeypatch.context() as release:
        other(release)
        release.setattr(checkpointing, "__version__", "9.9.9")
        write_checkpoint(tmp_path, 2)
    with pytest.raises(LsemvaeError, match=r"the checkpoint is whole, but lsemvae 9\.9\.9, torch ") as raised:
        newest(tmp_path)
    assert says in str(raised.value) and "resume with the versions that wrote it" in str(raised.value)
    assert "damaged" not in str(raised.value) + caplog.text


def test_versions_that_can_be_read_are_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with monkeypatch.context() as release:
        release.setattr(torch, "__version__", "2.0.1")
        release.setattr(checkpointing, "version", lambda name: "2.59.0")
        write_checkpoint(tmp_path, 1)
    assert newest(tmp_path) == (1, 0)
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "was written by lsemvae" in said and "torch 2.0.1, ray 2.59.0; this is lsemvae" in said


# ---- checkpoints that are gone


def listing(run: Path, names: list[str], ray_version: str | None = None) -> None:
    """Ray's list, as its own class writes it."""
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager as of_ray

    entries = [of_ray._TrainingResultState(checkpoint_dir_name=name, metrics={}) for name in names]
    state = of_ray._CheckpointManagerState(
        checkpoint_results=entries, checkpoint_report_indices=list(range(len(names))),
        latest_checkpoint_result=entries[-1], pending_training_results=[], pending_validation_specs=[],
        current_report_index=len(names), validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[], failed_validation_checkpoint_dir_names=[],
    )  # fmt: skip
    content = json.loads(state.json())
    (run / LIST).write_text(json.dumps(content | ({"ray_version": ray_version} if ray_version else {})))


def test_a_list_that_ray_could_not_read_is_removed_and_the_run_goes_on(tmp_path: Path, caplog):
    name = write_checkpoint(tmp_path, 1).name
    listing(tmp_path, [name])
    require_checkpoints(Storage.open(tmp_path))
    assert (tmp_path / LIST).exists() and not caplog.records
    for content, says in (
        ((tmp_path / LIST).read_bytes()[:40], "is cut or altered, and is removed"),
        (b"\xff\x00", "is cut or altered, and is removed"),
        (b"[]", "is cut or altered, and is removed"),
        ((tmp_path / LIST).read_bytes().replace(b'"2.', b'"1.', 1), "is of Ray 1."),
    ):
        caplog.clear()
        (tmp_path / LIST).write_bytes(content)
        require_checkpoints(Storage.open(tmp_path))
        assert says in caplog.text and not (tmp_path / LIST).exists()
    assert newest(tmp_path) == (1, 0)


def test_a_run_that_had_no_checkpoint_yet_begins(tmp_path: Path):
    """Killed before its first checkpoint, or between the first bundle and its checkpoint."""
    require_checkpoints(Storage.open(tmp_path))
    checkpoint = write_checkpoint(tmp_path / "elsewhere", 1)
    (checkpoint / BUNDLE).rename(tmp_path / BUNDLE)
    require_checkpoints(Storage.open(tmp_path))


class InBucket:
    """A finished pre-training, copied to a bucket without its result: as if it had been killed at its end."""

    def __init__(self, trained: Path, name: str, shards: Path) -> None:
        self.prefix, self.client = f"resume/{name}/", boto3.client("s3")
        for path in sorted(trained.rglob("*")):
            if path.is_file() and path.name != "result.json":
                self.put(path.relative_to(trained).as_posix(), path.read_bytes())
        self.words = ["smoke", "--data", shards, "--storage", "s3://ecg/resume", "--name", name, "--model-name", name]

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket="ecg", Key=self.prefix + name, Body=content)

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket="ecg", Key=self.prefix + name)["Body"].read()

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket="ecg", Prefix=self.prefix)["Contents"]
        return sorted(item["Key"].removeprefix(self.prefix) for item in found)

    def expire(self, part: str) -> dict[str, bytes]:
        """Delete all objects with this in their name, as a lifecycle rule does -> what they held."""
        gone = {name: self.get(name) for name in self.names() if part in name}
        for name in gone:
            self.client.delete_object(Bucket="ecg", Key=self.prefix + name)
        return gone

    def refused(self) -> str:
        """The one line with which the command ends; it must change no checkpoint."""
        before = {name: self.get(name) for name in self.names() if "checkpoint_2" in name}
        done = workflow("pretrain", *self.words, check=False)
        assert done.returncode == 2, done.stderr
        after = {name: self.get(name) for name in self.names() if "checkpoint_2" in name}
        assert after == before and "result.json" not in self.names()
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line


@pytest.mark.ray
def test_in_a_bucket_checkpoints_expire_or_are_damaged_and_mlflow_fails_at_the_end(
    s3: str, mlflow_server: str, shards: Path, pretrained: Trained
):
    """By the command: it stops where nothing is whole, and goes on from the checkpoint before a damaged one."""
    run = InBucket(pretrained.folder, "expired", shards)
    client, about = MlflowClient(), json.loads(run.get("run.json"))
    tracked = client.create_run(
        client.get_run(about["run"]).info.experiment_id
    ).info.run_id  # the other's stays as it is
    run.put("run.json", json.dumps(about | {"run": tracked}).encode())
    older, newer = sorted({name.split("/")[0] for name in run.names() if name.startswith("checkpoint_2")})
    latest = run.expire(newer)
    assert f"{newer} is gone, though {LIST} names it: deleted by a lifecycle rule" in (said := run.refused())
    assert f"delete {LIST} to go on from {older}" in said
    others = run.expire("checkpoint_2")
    assert f"{older}, {newer} are gone" in run.refused()
    listed = run.expire(LIST)
    assert "the checkpoints are gone, though bundle/ shows that the run had some" in run.refused()

    for name, content in (latest | others | listed).items():
        run.put(name, content[: len(content) // 2] if name.endswith("model.safetensors") else content)
    assert "every checkpoint of s3://ecg/resume/expired is damaged: give another --name to start anew" in run.refused()
    assert client.get_metric_history(tracked, "train.loss") == []  # nothing was trained

    name = f"{older}/{BUNDLE}/model.safetensors"
    run.put(name, others[name])
    between = Between(mlflow_server)
    between.faults = [Fault("503", method="POST", part="model-versions/create")]
    away = {"MLFLOW_TRACKING_URI": between.endpoint, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = workflow("pretrain", *run.words, check=False, **away)
    between.close()
    assert f"checkpoint {newer} is damaged and passed over" in done.stderr and f"from {older}" in done.stderr
    assert done.returncode == 2 and "error: registering expired failed at" in done.stderr
    workflow("pretrain", *run.words)  # nothing is trained again
    assert "result.json" in run.names()
    assert [metric.step for metric in client.get_metric_history(tracked, "train.loss")] == [3]
    assert len(client.search_model_versions("name='expired'")) == 1
