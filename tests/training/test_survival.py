"""Pre-training survives faults on a cluster of two machines: each record is used once, and the losses stay the same."""

import contextlib
import copy
import json
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import servers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import checkpoints, saved
from support.checkpoints import newest as newest_step
from support.faults import Between, Fault
from support.mlflow_faults import kill_server, silent
from support.session import ANY_WORKER_PORT, ROOT, end_group, kept_signals, ray_folder, text_of
from support.watched import Attempt, Watched

from lsemvae import bundle as bundles
from lsemvae import storage, tracking
from lsemvae.config import with_settings
from lsemvae.data.feed import DAMAGED, Feed, Rows, read_here
from lsemvae.data.row_groups import footer as storage_footer
from lsemvae.data.shards import MANIFEST, Manifest, Shard, ShardedDataset, pack, shard_bytes
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.leads import LEADS
from lsemvae.models.parts.objectives import NonFiniteBatch
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import PRETRAIN
from lsemvae.record import Record
from lsemvae.storage import Storage
from lsemvae.tracking import Run
from lsemvae.training import resident
from lsemvae.training.checkpoints import Progress, newest_whole, writing_to
from lsemvae.training.failures import raise_lasting
from lsemvae.training.fit import Step
from lsemvae.training.pretrain import PretrainJob, Tracker, Worker, pretrain_worker

ROWS, VAL_ROWS, EPOCHS, STEPS = 160, 32, 4, 10
SAMPLES, PAIR = 512, ("I", "II")
FULL_BYTES = 2**16  # less than the weights, more than a log
HANGS_S = 600
"""A wait of this length has failed. It bounds waiting; it does not measure speed."""
WATCHED = str(ROOT / "tests" / "support" / "watched.py")
CURVES = ("step.loss", "step.kl", "train.loss", "train.records", "val.loss")
PREPROCESS = PreprocessConfig(samples=SAMPLES, min_seconds=1.0)
SETTINGS = {
    "leads": PAIR, "model.samples": SAMPLES, "model.latent": 32, "model.channels": (2, 4, 4),
    "preprocess.samples": SAMPLES,
    "preprocess.min_seconds": 1.0, "optim.epochs": EPOCHS, "optim.batch_size": 16, "streams": 4, "shuffle_buffer": 64,
    "checkpoint_steps": 4, "plot_every": 100,
}  # fmt: skip


def assert_every_record_once(attempt: Attempt, epochs: int = EPOCHS, damaged: int = 0) -> None:
    """A step always gets the same records, however often it is repeated, and an epoch has each record once."""
    given: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
    for line in attempt.lines():
        before = given[line["step"], line["workers"]].setdefault(line["worker"], line["rows"])
        assert before == line["rows"], line["step"]
    for epoch in range(epochs):
        rows: list[int] = []
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            whole = [
                sorted(row for part in parts.values() for row in part)
                for (number, workers), parts in given.items()
                if number == step and len(parts) == workers
            ]
            assert whole, f"no workers had all of step {step}"
            assert all(one == whole[0] for one in whole), step
            rows += whole[0]
        assert rows.count(DAMAGED) == damaged
        known = sorted(row for row in rows if row >= 0)
        assert len(set(known)) == len(known) == ROWS - damaged


def wait_until(condition: Callable[[], object], seen: Callable[[], str], alive: Callable[[], bool] = lambda: True):
    """Waits until the condition holds. Where it can no longer hold, the test fails and reports what is `seen`."""
    deadline = time.monotonic() + HANGS_S
    while not condition():
        if not alive():
            pytest.fail(f"it ended before the condition held:\n{seen()}")
        if time.monotonic() > deadline:
            pytest.fail(f"the condition did not hold within {HANGS_S} s:\n{seen()}")
        time.sleep(0.05)


def job_of(data: Path | str, changes: Mapping[str, object] | None = None) -> PretrainJob:
    import pretrain

    recipe, dataset = with_settings(PRETRAIN["smoke"], SETTINGS | (changes or {})), ShardedDataset.open(str(data))
    sources = [pretrain.Source(dataset)]
    return pretrain.make_job(sources, recipe, pretrain.make_feeds(sources, recipe), None)


def below(*pids: int) -> dict[int, str]:
    """These processes and all their descendants: id -> command line."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    commands = {}
    for pid in found:
        with contextlib.suppress(OSError):
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return commands


class Machines:
    """A Ray cluster of two machines: the head with one CPU, and another with two, which can be lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, dashboard = servers.free_port(), servers.free_port()
        self.ray_folder = ray_folder()
        self.environment = {
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            # Ray notices a lost machine, and one that cannot be had, in seconds rather than a minute.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
        }
        head = ["--head", f"--port={self.port}", f"--dashboard-port={dashboard}", "--num-cpus=1"]
        # Two heads on one machine would want the same port for Ray's client; the second would end.
        self.head: subprocess.Popen | None = None
        self.head = self._start(*head, f"--ray-client-server-port={servers.free_port()}")
        self.other: subprocess.Popen | None = None
        self.commands: list[Running] = []

    def _start(self, *options: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [*options, f"--object-store-memory={2**29}", *ANY_WORKER_PORT]
        command += [f"--dashboard-agent-listen-port={servers.free_port()}"]
        start = {name: value for name, value in (os.environ | self.environment).items() if name != "RAY_ADDRESS"}
        log = self.folder / f"node-{time.time_ns()}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=start, cwd=self.folder, stdout=stream, stderr=stream, start_new_session=True
            )
        wait_until(
            lambda: "Ray runtime started" in text_of(log),
            lambda: text_of(log)[-3000:],
            lambda: process.poll() is None and (self.head is None or self.head.poll() is None),
        )
        return process

    def add_other(self) -> None:
        self.other = self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def lose_other(self) -> None:
        """Kills every process of the machine, the raylet first."""
        for pid in below(self.other.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.other.wait()
        self.other = None

    def processes(self, title: str) -> list[int]:
        """The ids of Ray's processes on these machines whose title starts like this."""
        nodes = [node.pid for node in (self.head, self.other) if node]
        return [pid for pid, command in below(*nodes).items() if command.startswith(title)]

    def end(self) -> None:
        for command in self.commands:
            command.kill()
        every = self.processes("")  # a stopped one would not notice that the others are gone
        for node in (self.other, self.head):
            if node:
                end_group(node)
        for pid in every:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(mlflow_server: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    both = Machines(tmp_path_factory.mktemp("machines"))
    yield both
    both.end()


@pytest.fixture
def machines(cluster: Machines) -> Iterator[Machines]:
    """Both machines, whatever the previous test has left."""
    if not cluster.other:
        cluster.add_other()
    yield cluster
    for command in cluster.commands:
        command.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in three shards, one of them for validation."""
    folder, rng = tmp_path_factory.mktemp("survival"), np.random.default_rng(0)
    shards = []
    for path, split, count in (("train-0", "train", 96), ("train-1", "train", ROWS - 96), ("val-0", "val", VAL_ROWS)):
        rows = []
        for number in range(count):
            signal_mv = {lead: rng.integers(-400, 400, SAMPLES) / 200 for lead in LEADS}
            rows.append(pack(Record.from_leads(signal_mv, 500, record_id=f"{path}-{number}")))
        content = shard_bytes(rows, [], {"plan": "x"})
        (folder / f"{path}.parquet").write_bytes(content)
        shards.append(Shard(f"{path}.parquet", split, count, len(content), "0"))
    total = ROWS + VAL_ROWS
    (folder / MANIFEST).write_text(Manifest("here", "folder", "x", total, total, 0, {}, shards).to_json())
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system can be mounted by root alone: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(data: Path, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The curves of a run without faults, in one process without Ray."""
    place = tmp_path_factory.mktemp("undisturbed")
    run = Run.start("pretrain", "undisturbed", {})
    attempt = train_here(job_of(data), place, run)
    run.end()
    assert_every_record_once(attempt)
    assert bundles.load(place / "bundle")[0].leads == PAIR
    return curves(run)


def train_here(
    job: PretrainJob,
    place: Path,
    run: Run,
    *,
    until: int = 10**9,
    watched: Path | None = None,
) -> Attempt:
    """The run in this process, without a cluster, up to a step that another thread may put off."""
    import ray.train
    from ray.train.torch import TorchTrainer

    attempt = Attempt(watched or place / "watched")
    attempt.until(until)
    job = replace(
        job,
        train=Watched(**vars(job.train)),
        val=Watched(**vars(job.val)),
        place=Storage.open(place),
        tracking_run=run.run_id,
        step_metrics_s=0.0,
    )
    Watched.folder, Watched.read_with = str(attempt.folder), staticmethod(read_here)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with kept_signals():
            TorchTrainer(
                pretrain_worker, train_loop_config={"job": job}, scaling_config=ray.train.ScalingConfig(num_workers=0)
            ).fit()
    finally:
        Watched.read_with = None
        torch.set_num_threads(threads)
    return attempt


def curve(run: Run, name: str) -> dict[int, float]:
    """A metric by step or epoch; of each, the value that was logged last."""
    history = run._client.get_metric_history(run.run_id, name)
    return {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}


def curves(run: Run) -> dict[str, dict[int, float]]:
    return {name: curve(run, name) for name in CURVES}


def tracked(place: Path) -> Run:
    return Run(json.loads((place / "run.json").read_text())["run"])


def assert_nothing_happened(place: Path, undisturbed: dict[str, dict]) -> None:
    found = curves(tracked(place))
    for name, values in undisturbed.items():
        assert sorted(values) == list(range(EPOCHS * STEPS if name.startswith("step.") else EPOCHS)), name
        # The order in which workers' gradients are added differs.
        assert found[name] == pytest.approx(values, rel=1e-4), name
    assert bundles.load(place / "bundle")[0].leads == PAIR


class Command:
    """`pretrain.py` with a watched feed, which can be started again and again."""

    def __init__(self, machines: Machines, folder: Path, *words: object) -> None:
        self.attempt, self._machines, self._words = Attempt(folder), machines, words

    def start(self, **environment: str) -> "Running":
        settings = SETTINGS | {"step_metrics_s": 0}  # each step's numbers
        given = [str(word) for name, values in settings.items() for word in (f"--{name}", *np.atleast_1d(values))]
        running = Running(
            [sys.executable, WATCHED, "pretrain", "smoke", *given, *map(str, self._words)],
            os.environ | self._machines.environment | self.attempt.environment | environment,
            self.attempt,
        )
        self._machines.commands.append(running)
        return running


class Running:
    """A command that runs, and what it prints."""

    def __init__(self, command: list[str], environment: dict[str, str], attempt: Attempt) -> None:
        self._attempt, self._log = attempt, attempt.folder / f"{time.time_ns()}.txt"
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)

    @property
    def printed(self) -> str:
        return text_of(self._log)

    def seen(self) -> str:
        latest = [{name: line[name] for name in ("process", "step", "workers")} for line in self._attempt.lines()[-8:]]
        return f"last steps: {latest}\nprinted: …{self.printed[-6000:]}"

    def wait(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self.seen, lambda: self._process.poll() is None)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def finish(self, status: int = 0) -> str:
        """Waits for its end -> what it printed, or the one line of its error where it must fail."""
        wait_until(lambda: self._process.poll() is not None, self.seen)
        found, printed = self._process.wait(), self.printed
        assert found == status, self.seen()
        if status:
            lines = re.sub("\r|\x1b\\[[0-9;]*[A-Za-z]", "\n", printed).splitlines()  # a bar moves the cursor
            (printed,) = [line for line in lines if line.startswith("error: ")]
        return printed


def newest(place: Path) -> int:
    return newest_step(place, STEPS)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.ray
def test_a_machine_is_lost_and_returns(machines: Machines, data: Path, undisturbed: dict[str, dict], tmp_path: Path):
    """Two workers, then one on the machine that is left, which has a single CPU, then two again.

    This test comes first: for some minutes Ray keeps the resources that a killed driver has asked for, and an elastic
    run gets only the rest.
    """
    place = tmp_path / "elastic"
    words = ["--data", data, "--storage", tmp_path, "--name", "elastic", "--num-workers", "1-2"]
    command = Command(machines, tmp_path / "watched", *words)
    attempt = command.attempt

    attempt.until(7)
    process = command.start()
    # It may begin with one worker, and grow.
    process.wait(lambda: newest(place) == 4 and 2 in attempt.workers() and 3 in curve(tracked(place), "step.loss"))
    two = attempt.processes()
    machines.lose_other()
    process.wait(lambda: attempt.steps(after=two))
    attempt.until(17)
    process.wait(lambda: 16 in attempt.steps(after=two) and 13 in curve(tracked(place), "step.loss"))
    assert attempt.workers(after=two) == {1} and min(attempt.steps(after=two)) == 4
    before = attempt.processes()
    machines.add_other()
    process.wait(lambda: attempt.steps(after=before))
    attempt.until(10**9)
    process.finish()
    assert attempt.workers(after=before) == {2} and min(attempt.steps(after=before)) == 14
    assert_every_record_once(attempt)
    assert_nothing_happened(place, undisturbed)


@pytest.mark.ray
def test_killed_at_every_turn(machines, mlflow_server: str, data: Path, undisturbed: dict[str, dict], tmp_path: Path):
    """A worker is killed between writing and reporting; then a full disk, a killed driver, a damaged checkpoint, a
    worker that is stopped in the middle of an exchange, and an MLflow server that falls silent."""
    place = tmp_path / "killed"
    words = ["--data", data, "--storage", tmp_path, "--name", "killed"]
    command = Command(machines, tmp_path / "watched", *words)
    attempt = command.attempt
    attempt.until(13)
    process = command.start()
    process.wait(lambda: newest(place) == 10 and len(machines.processes("ray::RayTrainWorker")) == 2)
    (controller,) = machines.processes("ray::TrainController")
    os.kill(controller, signal.SIGSTOP)  # it does not learn of the next checkpoint
    before = attempt.processes()
    attempt.until(15)
    process.wait(lambda: newest(place) == 14 and 13 in curve(tracked(place), "step.loss"))
    unheard_of = checkpoints(place)[-1].name
    assert unheard_of not in (place / "checkpoint_manager_snapshot.json").read_text()
    os.kill(machines.processes("ray::RayTrainWorker")[0], signal.SIGKILL)  # the other worker waits for it in mid-epoch
    os.kill(controller, signal.SIGCONT)
    process.wait(lambda: attempt.steps(after=before))
    attempt.until(17)
    process.wait(lambda: 16 in attempt.steps(after=before))
    assert min(attempt.steps(after=before)) == 14
    # Ray brings what a worker logs to the command some time later.
    process.wait(lambda: f"resuming at epoch 1, step 4, from {unheard_of}" in process.printed)

    for worker in machines.processes("ray::RayTrainWorker"):
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))  # a disk without room
    attempt.until(25)
    assert re.search("no checkpoint can be written .*File too large.*: make room there", process.finish(status=2))

    before = attempt.processes()
    attempt.until(27)
    process = command.start()
    process.wait(lambda: newest(place) == 24 and 23 in curve(tracked(place), "step.loss"))
    assert min(attempt.steps(after=before)) == 14
    process.kill()
    for title in ("ray::RayTrainWorker", "ray::TrainController"):  # the latter deletes checkpoints
        wait_until(lambda title=title: not machines.processes(title), process.seen)

    latest, older = checkpoints(place)[-1], checkpoints(place)[-2]
    truncate(latest / "bundle" / "model.safetensors")
    assert saved(older, STEPS) == 20
    before = attempt.processes()
    attempt.until(33)
    process = command.start(RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="20")
    process.wait(lambda: 32 in attempt.steps(after=before))
    assert min(attempt.steps(after=before)) == 20
    stopped, before = machines.processes("ray::RayTrainWorker")[0], attempt.processes()
    os.kill(stopped, signal.SIGSTOP)
    attempt.until(35)  # the other worker takes the next step, and waits for the stopped one's gradient
    process.wait(lambda: 34 in attempt.steps(after=before))
    assert stopped not in machines.processes("ray::RayTrainWorker")  # it was replaced
    with silent(mlflow_server):
        attempt.until(10**9)
        process.wait(lambda: newest(place) >= 38)
    assert f"checkpoint {latest.name} is damaged and passed over" in process.finish()
    assert_every_record_once(attempt)
    assert_nothing_happened(place, undisturbed)

    def goes_on_from(**changes: object) -> str | None:
        job = job_of(data, changes)
        return newest_whole(Storage.open(place), job.recipe, job.train.order, torch.device("cpu"))[0]

    kept = [path.name for path in checkpoints(place)][::-1]
    assert goes_on_from() == kept[0]
    for file in ("state.json", "optimizer.safetensors", "bundle/config.json", "bundle/model.safetensors"):
        content = (place / kept[0] / file).read_bytes()
        middle = len(content) // 2
        (place / kept[0] / file).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert goes_on_from() == kept[1], file
        (place / kept[0] / file).write_bytes(content)
    with pytest.raises(
        LsemvaeError, match="began with batch_size=16, not 32: resume it with the same, or give another"
    ):
        goes_on_from(**{"optim.batch_size": 32})
    with pytest.raises(LsemvaeError, match="the run began with another model"):
        goes_on_from(**{"model.latent": 5})
    for name in kept:
        truncate(place / name / "state.json")
    with pytest.raises(LsemvaeError, match=r"every checkpoint of .* is damaged: give another --name to start anew"):
        goes_on_from()


@pytest.mark.ray
def test_an_object_store_that_fails_then_refuses_and_a_loss_that_is_not_finite(
    machines: Machines, data: Path, s3: str, tmp_path: Path
):
    """The run waits for a fault that may pass; one that cannot pass ends it at once, with one line."""
    client = boto3.client("s3")
    for path in data.iterdir():
        content = bytearray(path.read_bytes())
        if path.name == "train-0.parquet":
            content[1000] ^= 1  # in its first row group
        client.put_object(Bucket="ecg", Key=f"survival/data/{path.name}", Body=bytes(content))
    between = Between(s3)
    kinds = ("503", "reset", "reset in mid-body", "cut", "less")
    between.faults = [Fault(kind, 1, "GET", "train-") for kind in kinds]
    between.faults += [Fault(kind, 2, "PUT", "checkpoint_") for kind in ("503", "reset")]
    words = ["--data", between.uri("ecg/survival/data"), "--storage", between.uri("ecg/survival/runs")]
    words += ["--name", "s3", "--max-damaged-share", 0.5]
    command = Command(machines, tmp_path / "watched", *words)
    attempt = command.attempt
    attempt.until(15)
    process = command.start()
    process.wait(lambda: 14 in attempt.steps())
    assert not any(fault.times for fault in between.faults)
    between.faults = [Fault("403", method="GET", part="train-")]
    attempt.until(10**9)
    assert re.search(r"train-\d.parquet: access denied: check the credentials", process.finish(status=2))
    assert len(attempt.processes()) == 2  # nothing was tried again; the next epoch may have been read ahead
    assert_every_record_once(attempt, epochs=2, damaged=64)
    run = json.loads(client.get_object(Bucket="ecg", Key="survival/runs/s3/run.json")["Body"].read())["run"]
    damaged = curve(Run(run), "train.damaged")
    assert len(damaged) >= 2 and set(damaged.values()) == {64}

    between.heal()
    before = attempt.processes()
    process = Command(machines, attempt.folder, *words, "--optim.learning-rate", 1e30).start()
    error = process.finish(status=2)
    between.close()
    assert re.search(r"training failed: epoch [23], step \d: the loss or its gradient is not finite.*in a row", error)
    assert "--name s3 resumes this run from its newest checkpoint" in error
    assert len(attempt.processes() - before) == 2
    assert "Traceback" not in process.printed


def test_a_run_goes_on_from_a_checkpoint_by_time_in_mid_epoch(
    data: Path, mlflow_server: str, undisturbed: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint is asked for at every step, and taken when the one before is written; then a step fails."""
    before_step = Worker.before_step

    def lost(worker: Worker, epoch: int, step: int) -> None:
        worker.writer.wait()
        before_step(worker, epoch, step)
        if (epoch, step) == (1, 7):
            raise RuntimeError("lost")

    run = Run.start("pretrain", "by time", {})
    job = replace(job_of(data, {"checkpoint_steps": 0}), checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "before_step", lost)
        with pytest.raises(RuntimeError, match="lost"):
            train_here(job, tmp_path, run)
    reached = newest(tmp_path)
    assert reached == STEPS + 6  # taken after the step that follows the one that asked
    before = len(Attempt(tmp_path / "watched").lines())
    attempt = train_here(job, tmp_path, run)
    run.end()
    assert attempt.steps()[before] == reached
    assert_every_record_once(attempt)
    for name, values in undisturbed.items():
        assert curve(run, name) == pytest.approx(values, rel=1e-6), name


def test_a_device_that_holds_all_records_gives_the_same_losses(
    data: Path, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resident, "read_on_ray", read_here)
    losses = []
    for held in (False, True):
        run = Run.start("pretrain", f"held {held}", {})
        job = job_of(data, {"optim.epochs": 2, "checkpoint_steps": 0})
        train, val = (replace(feed, layout=replace(feed.layout, packed=True)) for feed in (job.train, job.val))
        job = replace(job, train=train, val=val, device_cache=held)
        assert_every_record_once(train_here(job, tmp_path / f"held {held}", run), epochs=2)
        run.end()
        losses.append(curves(run))
    assert losses[0] == losses[1]
    assert len(losses[0]["step.loss"]) == 2 * STEPS


def test_more_damage_than_is_allowed_ends_the_run(data: Path, mlflow_server: str, tmp_path: Path):
    for path in data.iterdir():
        content = bytearray(path.read_bytes())
        if path.name == "train-0.parquet":
            content[1000] ^= 1  # in its first row group
        (tmp_path / path.name).write_bytes(content)
    run = Run.start("pretrain", "damaged", {})
    with pytest.raises(LsemvaeError, match=r"64 of 160 recordings cannot be read .* more than max_damaged_share=0\.3"):
        train_here(job_of(tmp_path, {"max_damaged_share": 0.3}), tmp_path / "run", run)
    run.end("FAILED")
    assert not (tmp_path / "run" / "bundle").exists()


def in_bucket(data: Path, prefix: str) -> str:
    for path in data.iterdir():
        boto3.client("s3").put_object(Bucket="ecg", Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return f"ecg/{prefix}"


def test_a_store_that_falls_silent_in_training_is_asked_again_and_at_last_named(
    data: Path, s3: str, undisturbed: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It accepts the connection and the request, and never answers."""
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1)
    between, run = Between(s3), Run.start("pretrain", "silent store", {})
    uri = between.uri(in_bucket(data, "silent"))
    between.faults = [Fault("silence", 1, "GET", "train-"), Fault("silence", 1, "HEAD", "train-", spared=1)]
    attempt = train_here(job_of(uri), tmp_path / "run", run)
    run.end()
    assert not any(fault.times for fault in between.faults)
    assert_every_record_once(attempt)
    assert curves(run)["step.loss"] == pytest.approx(undisturbed["step.loss"], rel=1e-4)
    job = job_of(uri)
    between.faults = [Fault("silence", part="train-")]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage._s3_filesystem.cache_clear()
    storage_footer.cache_clear()
    with pytest.raises(StorageError, match=r"train-\d\.parquet: the object store does not answer, or breaks off"):
        train_here(job, tmp_path / "silent", run)
    storage._s3_filesystem.cache_clear()
    between.close()


KEYS = """
number=$(($(cat "$0.count" 2>/dev/null || echo 0) + 1))
echo $number > "$0.count"
printf '{"Version": 1, "AccessKeyId": "KEY%s", "SecretAccessKey": "tests-only", "SessionToken": "t", ' $number
printf '"Expiration": "%s"}' $(date -u -d '+5 seconds' +%Y-%m-%dT%H:%M:%SZ)
"""


def test_credentials_that_expire_in_training_are_renewed_by_aws_s_own_chain(
    data: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A `credential_process` gives keys for five seconds; the store refuses all that it has seen before some step."""
    between, run = Between(s3), Run.start("pretrain", "expiring", {})
    uri = between.uri(in_bucket(data, "expiring"))
    (tmp_path / "keys.sh").write_text(KEYS)
    profile = f"[default]\nregion = us-east-1\ncredential_process = /bin/sh {tmp_path}/keys.sh\n"
    (tmp_path / "config").write_text(profile)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._s3_filesystem.cache_clear()
    job, attempt = job_of(uri), Attempt(tmp_path / "run" / "watched")
    attempt.until(12)

    def expire() -> None:
        wait_until(lambda: 11 in attempt.steps(), str)
        between.refused_keys |= between.keys()
        attempt.until(10**9)

    expiring = threading.Thread(target=expire)
    expiring.start()
    assert_every_record_once(train_here(job, tmp_path / "run", run, until=12))
    expiring.join()
    run.end()
    assert between.refused_keys and between.keys() - between.refused_keys
    storage._s3_filesystem.cache_clear()
    between.refused_keys |= {f"KEY{number}" for number in range(1000)}  # for good: nobody renews them
    with pytest.raises(StorageError, match=r"access denied: check the credentials .* which may have expired") as raised:
        Storage.open(uri).read_bytes(MANIFEST)
    assert not raised.value.passing
    storage._s3_filesystem.cache_clear()
    between.close()


def test_mlflow_is_killed_in_mid_training_and_nothing_is_lost(
    data: Path, undisturbed: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """SIGKILL of the server; it is started again, on its database, before training ends."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, port, attempt = tmp_path / "mlflow", servers.free_port(), Attempt(tmp_path / "run" / "watched")
    folder.mkdir()
    with contextlib.ExitStack() as started:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", started.enter_context(servers.mlflow_server(folder, port)))
        run = Run.start("pretrain", "killed server", {})

        def kill_and_start() -> None:
            wait_until(lambda: 14 in attempt.steps(), str)
            kill_server(os.environ["MLFLOW_TRACKING_URI"])
            attempt.until(25)
            wait_until(lambda: 24 in attempt.steps() and "cannot write to MLflow" in caplog.text, lambda: caplog.text)
            started.enter_context(servers.mlflow_server(folder, port))
            attempt.until(10**9)

        killing = threading.Thread(target=kill_and_start)
        killing.start()
        assert_every_record_once(train_here(job_of(data), tmp_path / "run", run, until=15))
        killing.join()
        run.end()
        assert "are lost" not in caplog.text
        found = curves(run)
    for name, values in undisturbed.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


def test_mlflow_that_answers_503_for_a_while_loses_nothing(
    data: Path, mlflow_server: str, undisturbed: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    between = Between(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.endpoint)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_PAUSE_S", 0.05)
    run = Run.start("pretrain", "503", {})
    between.faults = [Fault("503", 3, "POST", "log-batch", spared=1), Fault("reset", 2, "POST", "log-batch", spared=1)]
    train_here(job_of(data), tmp_path / "run", run)
    run.end()
    assert not any(fault.times for fault in between.faults)
    found = curves(run)
    for name, values in undisturbed.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
    between.close()


def test_a_really_full_disk_ends_in_one_line_and_with_room_the_training_succeeds(
    data: Path, small_disk: Path, mlflow_server: str, tmp_path: Path
):
    """A file system of 64 kB, less than the weights take; the system itself refuses to write more."""
    run, place = Run.start("pretrain", "full disk", {}), small_disk / "run"
    place.mkdir()
    job = job_of(data)
    with pytest.raises(LsemvaeError, match=r"no checkpoint can be written .*: make room there") as raised:
        train_here(job, place, run, watched=tmp_path / "watched")
    assert not isinstance(raised.value, StorageError) and len(str(raised.value).splitlines()) == 1
    with pytest.raises(LsemvaeError):
        raise_lasting([raised.value])  # nothing is tried again
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size > 0]
    assert [path.name for path in left if "partial" in str(path) or path.suffix == ".safetensors"] == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train_here(job, place, run, watched=tmp_path / "watched")
    run.end()
    assert bundles.load(place / "bundle")[0].leads == PAIR


def test_a_full_temporary_folder_costs_a_picture_and_no_training(
    data: Path, small_disk: Path, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """Checkpoints are written where they belong; only pictures for MLflow go through the temporary folder."""
    run, place = Run.start("pretrain", "full temporary folder", {}), tmp_path / "run"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    train_here(job_of(data), place, run, watched=tmp_path / "watched")
    run.end()
    assert f"no picture of reconstructions in {small_disk}: No space left on device" in caplog.text
    assert list(small_disk.iterdir()) == []
    assert bundles.load(place / "bundle")[0].leads == PAIR


def ordered_batches(folder: Path) -> Iterator[Rows]:
    order = {"batch_size": 16, "streams": 4, "buffer": 64, "shuffle": False}
    feed = Feed.of(ShardedDataset.open(str(folder)), "train", LEADS, PREPROCESS, **order)
    return feed.batches(0, read=read_here)


@pytest.fixture(scope="module")
def whole_batches(data: Path) -> list[Rows]:
    return list(ordered_batches(data))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.data())
def test_damage_anywhere_in_a_shard_costs_its_row_groups_and_no_more(
    data: Path, whole_batches: list[Rows], tmp_path: Path, damage: st.DataObject
):
    """A changed byte, a missing piece, a file that ends early: the records are right, or set aside."""
    whole = (data / "train-0.parquet").read_bytes()
    place = damage.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(len(whole) - 4000, len(whole) - 1)))
    gone = damage.draw(st.sampled_from([0, 1, 500, len(whole)]))
    other = b"" if gone else bytes([whole[place] ^ damage.draw(st.integers(1, 255))])
    content = whole[:place] + other + whole[place + (gone or 1) :]
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(content if path.name == "train-0.parquet" else path.read_bytes())
    storage_footer.cache_clear()
    for right, found in zip(whole_batches, ordered_batches(tmp_path), strict=True):
        known = found["row_B"] >= 0
        np.testing.assert_array_equal(found["row_B"][known], right["row_B"][known])
        np.testing.assert_array_equal(found["x_BLT"][known], right["x_BLT"][known])
        assert (found["row_B"][~known] == DAMAGED).all() and not found["weight_B"][~known].any()
        assert known[right["row_B"] >= 96].all()


def test_a_shard_that_is_gone_is_named(data: Path, tmp_path: Path):
    for path in data.iterdir():
        if path.name != "train-1.parquet":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    feed = Feed.of(ShardedDataset.open(str(tmp_path)), "train", LEADS, PREPROCESS, batch_size=16)
    with pytest.raises(LsemvaeError, match=r"train-1\.parquet is gone, though the manifest names it"):
        list(feed.batches(0, read=read_here))


def test_numbers_wait_while_mlflow_is_away(mlflow_server: str, monkeypatch: pytest.MonkeyPatch, caplog):
    run = Run.start("pretrain", "away", {})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with silent(mlflow_server):
        run.metrics({"loss": 3.0}, 0)
        run._sender.join()
        assert "cannot write to MLflow, continuing without it" in caplog.text
        run.metrics({"loss": 2.0}, 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    run.metrics({"loss": 1.0}, 2)
    run.end()
    assert curve(run, "loss") == {0: 3.0, 1: 2.0, 2: 1.0}
    assert "are lost" not in caplog.text


def test_mlflow_gets_means_over_the_steps_of_an_interval(mlflow_server: str, data: Path):
    run = Run.start("pretrain", "means", {})
    job = replace(job_of(data), tracking_run=run.run_id, step_metrics_s=3600.0)
    with Tracker(job, Progress()) as tracker:
        tracker.step(Step(0, 0, {"loss": 1.0}, 16))
        tracker.step(Step(0, 1, {"loss": 4.0}, 8))
        tracker.flush()  # as where a checkpoint is taken
        tracker.step(Step(0, 2, {"loss": 7.0}, 16))
    run.end()
    assert curve(run, "step.loss") == pytest.approx({1: 2.0, 2: 7.0})
    assert curve(run, "step.learning_rate").keys() == {1, 2}


def test_a_full_disk_is_no_failure_that_passes(tmp_path: Path):
    says = r"no checkpoint can be written .*No space left.*: make room"
    with pytest.raises(LsemvaeError, match=says) as caught, writing_to(Storage.open(tmp_path)):
        Path("/dev/full").write_bytes(b"x")
    assert not isinstance(caught.value, StorageError)
    with pytest.raises(StorageError), writing_to(Storage.open(tmp_path)):
        raise OSError("AWS Error SLOW_DOWN")


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (NonFiniteBatch("a", (3,)), True),
        (StorageError("denied", passing=False), True),
        (StorageError("overloaded"), False),
        (RuntimeError("the other worker is gone"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, lasting: bool):
    error = copy.deepcopy(error)  # copied from its arguments and attributes, like an error that comes from a worker
    with pytest.raises(type(error)) if lasting else contextlib.nullcontext():
        raise_lasting([RuntimeError("lost"), error])
