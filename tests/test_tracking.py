"""Bundles on their way to and from MLflow, what its pages show of runs and versions, and secrets that stay here."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import mlflow
import pytest
from mlflow import MlflowClient
from support import bundles
from support.faults import Between, Fault
from support.mlflow_faults import locked, silent

from lsemvae.bundle import CONFIG, WEIGHTS
from lsemvae.data.shards import MANIFEST, Manifest, ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.temporary import temporary_folder
from lsemvae.tracking import Run, fetch, fetched, promote, resolve
from serve.app import Config, make_service
from serve.cohorts import handed_on


def test_a_replica_with_a_fetched_encoder_leaves_nothing_in_the_temporary_folder(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundles.save(tmp_path / "encoder", bundles.SMALL)
    bundles.save(tmp_path / "model")
    for path in (tmp_path / "encoder").iterdir():
        boto3.client("s3").upload_file(str(path), "ecg", f"encoder/{path.name}")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    config = Config(
        models=[str(tmp_path / "model")],
        encoder="s3://ecg/encoder",
        bundles=tmp_path / "kept",
        allow_anonymous=True,
    )
    service = make_service(config)
    assert service.encoder is not None and service.encoder.reconstructor and not service.encoder.problem
    assert list(temporary.iterdir()) == []


def test_a_version_has_its_description_and_a_long_one_is_cut_after_a_line(mlflow_server: str, tmp_path: Path):
    bundles.save(tmp_path / "bundle")
    run = Run.start("describe", "described", {})
    run.bundle(tmp_path / "bundle")
    long = "\n".join(f"- line {number} of the card: ä" for number in range(400))
    texts = {"none": None, "short": "# Card\n\n| a | b |\n", "long": long}
    found = {}
    for name, text in texts.items():
        version = run.register("described", {}, alias=None, description=text)
        found[name] = MlflowClient(mlflow_server).get_model_version("described", str(version)).description
    run.end()
    assert not found["none"] and found["short"] == texts["short"]
    assert 4900 < len(found["long"]) <= 5000  # what MLflow's column holds
    *lines, last = found["long"].strip().splitlines()
    assert "provenance.model_card" in last and long.startswith("\n".join(lines).strip() + "\n")


def test_a_cohort_job_is_given_no_password_of_mlflow(monkeypatch: pytest.MonkeyPatch):
    """Ray's dashboard shows what a job is given."""
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert handed_on()["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ecg:hunter2-of-the-tests@mlflow.example.org")
    assert "hunter2-of-the-tests" not in str(handed_on()) and handed_on()["AWS_REGION"] == "eu-west-1"


@pytest.fixture
def between(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    """MLflow behind a proxy, and a client that waits 1 s for an answer and asks once."""
    between = Between(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.endpoint)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield between
    between.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_bundle_travels_longer_than_a_request_may_take(between: Between, tmp_path: Path, temporary: Path):
    saved = bundles.save(tmp_path / "bundle")
    between.bytes_per_s = (tmp_path / "bundle" / WEIGHTS).stat().st_size / 2  # the weights take 2 s
    between.faults.append(Fault("slow", part=f"/artifacts/bundle/{WEIGHTS}"))
    run = Run.start("slow", "slow", {})
    run.bundle(tmp_path / "bundle")
    version = run.register("slow", {"digest": saved.digest})
    with fetched(f"models:/slow/{version}") as found:
        assert sorted(path.name for path in found.folder.iterdir()) == [CONFIG, WEIGHTS]
    run.end()
    assert [method for method, path, _ in between.requests if path.endswith(f"/{WEIGHTS}")] == ["PUT", "GET"]
    assert list(temporary.iterdir()) == []
    between.faults.append(Fault("silence", method="POST"))  # what is no file keeps its short timeout
    with pytest.raises(LsemvaeError, match="registering slow failed") as caught:
        run.register("slow", {})
    assert "timed out. (read timeout=1)" in str(caught.value.__cause__)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1" and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_broken_transfer_is_repeated_and_leaves_nothing(between: Between, tmp_path: Path, temporary: Path):
    bundles.save(tmp_path / "bundle")
    run = Run.start("breaks", "breaks", {})
    between.faults.append(Fault("503", method="PUT", part=WEIGHTS, times=1))
    run.bundle(tmp_path / "bundle")
    version = run.register("breaks", {})
    run.end()
    between.faults.append(Fault("reset in mid-body", method="GET", part=f"/{WEIGHTS}", times=1))
    with fetched(f"models:/breaks/{version}") as found:
        assert (found.folder / WEIGHTS).read_bytes() == (tmp_path / "bundle" / WEIGHTS).read_bytes()
    between.faults.append(Fault("reset in mid-body", method="GET", part=f"/{WEIGHTS}"))
    with pytest.raises(LsemvaeError, match=f"fetching models:/breaks/{version} failed"):
        fetch(f"models:/breaks/{version}", tmp_path / "given")
    assert not (tmp_path / "given").exists()
    assert list(temporary.iterdir()) == []


def test_of_a_bundle_in_a_bucket_only_its_files_are_fetched(s3: str, tmp_path: Path, temporary: Path):
    bundles.save(tmp_path / "bundle")
    (tmp_path / "bundle" / "model.pkl").write_bytes(b"no")
    for path in (tmp_path / "bundle").iterdir():
        boto3.client("s3").upload_file(str(path), "ecg", f"with-others/{path.name}")
    with fetched("s3://ecg/with-others") as found:
        assert sorted(path.name for path in found.folder.iterdir()) == [CONFIG, WEIGHTS]
    boto3.client("s3").delete_object(Bucket="ecg", Key=f"with-others/{WEIGHTS}")
    with pytest.raises(LsemvaeError, match=f"it has no {WEIGHTS}"), fetched("s3://ecg/with-others"):
        pass
    assert list(temporary.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from lsemvae.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"a gigabyte")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_fetch(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in processes)
    processes[0].kill()
    processes[0].wait()
    assert killed.is_dir() and living.is_dir()
    with temporary_folder(tmp_path) as mine:
        assert not killed.exists() and living.is_dir()
    processes[1].send_signal(signal.SIGINT)
    processes[1].wait()
    assert not living.exists() and not mine.exists()


def test_a_run_names_its_data_its_table_and_its_encoder(mlflow_server: str, tmp_path: Path):
    (tmp_path / "shards").mkdir()
    manifest = Manifest("here", "folder", "x", 20, 10, 0, {"ph": {"0": 12, "1": 8, "other": 0, "absent": 0}}, [])
    (tmp_path / "shards" / MANIFEST).write_text(manifest.to_json())
    data = ShardedDataset.open(str(tmp_path / "shards"))
    encoder, client = bundles.save(tmp_path / "encoder", bundles.SMALL), MlflowClient(mlflow_server)
    run = Run.start("lineage", "encoder", {})
    run.bundle(tmp_path / "encoder")
    version = run.register("lineage-encoder", {"digest": encoder.digest}, "candidate")
    run.end()
    bundles.save(tmp_path / "model")
    run = Run.start("lineage", "model", {})
    run.reads(data)
    run.table("results.json", {"method": ["interrupted"], "AUROC": [0.1]})
    run.table("results.json", {"method": ["LS-EMVAE", "naive"], "AUROC": [0.8, float("nan")]})
    run.bundle(tmp_path / "model")
    made_from = {"uri": "models:/lineage-encoder@candidate", "digest": encoder.digest}
    run.register("lineage-6L", {}, description="# Card", encoder=made_from)
    unknown = {"uri": "s3://someone:secret@bucket/encoder", "digest": "0" * 16}
    run.register("lineage-6L", {}, encoder=unknown)
    run.end()
    mlflow.set_tracking_uri(mlflow_server)
    (used,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert used.dataset.name == "shards" and used.dataset.digest == data.manifest.digest
    assert json.loads(used.dataset.source) == {"uri": data.storage.uri}
    columns = {column["name"]: column["type"] for column in json.loads(used.dataset.schema)["mlflow_colspec"]}
    assert columns["signal"] == "binary" and columns["label.ph"] == "double"
    assert json.loads(used.dataset.profile)["subjects"] == data.manifest.subjects
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}
    table = mlflow.artifacts.load_dict(f"{client.get_run(run.run_id).info.artifact_uri}/results.json")
    assert table == {"columns": ["method", "AUROC"], "data": [["LS-EMVAE", 0.8], ["naive", None]]}
    shown = json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "results.json", "type": "table"}]
    link = f"[models:/lineage-encoder/{version}](#/models/lineage-encoder/versions/{version})"
    first, second = (client.get_model_version("lineage-6L", number) for number in ("1", "2"))
    assert first.description == f"Encoder: {link}, digest {encoder.digest}\n\n# Card"
    assert (
        first.tags["encoder_digest"] == encoder.digest and first.tags["encoder"] == f"models:/lineage-encoder/{version}"
    )
    assert second.tags["encoder"] == "s3://bucket/encoder"
    assert second.description == f"Encoder: s3://bucket/encoder, digest {'0' * 16}"
    assert "secret" not in str(second) + str(client.get_run(run.run_id))


# ---- a server that fails: one run for one training, and no version is lost or made twice


def runs_of(experiment: str) -> list[str]:
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    return [run.info.run_id for run in client.search_runs([found.experiment_id])] if found else []


def versions_of(name: str) -> list[str]:
    return [version.version for version in MlflowClient().search_model_versions(f"name = '{name}'")]


def test_a_run_whose_answer_is_lost_is_made_once(between: Between, monkeypatch: pytest.MonkeyPatch):
    lost = Fault("lost", times=1, method="POST", part="runs/create")
    between.faults.append(lost)
    with pytest.raises(LsemvaeError, match="starting an MLflow run failed"):
        Run.start("lost-run", "a", {"x": 1}, place="s3://bucket/a")
    run = Run.start("lost-run", "a", {"x": 1}, place="s3://bucket/a")  # the same command again
    assert runs_of("lost-run") == [run.run_id]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the client itself repeats the request
    lost.times = 1
    other = Run.start("lost-run", "b", {"x": 1}, place="s3://bucket/b")
    assert lost.times == 0 and sorted(runs_of("lost-run")) == sorted([run.run_id, other.run_id])


@contextlib.contextmanager
def fault(between: Between, kind: str) -> Iterator[None]:
    between.faults.append(Fault(kind))
    yield
    between.faults.clear()


FAILING: dict[str, Callable[[Between, str], contextlib.AbstractContextManager]] = {
    "503": lambda between, uri: fault(between, "503"),
    "away": lambda between, uri: fault(between, "reset"),
    "silent": lambda between, uri: silent(uri),
    "locked": lambda between, uri: locked(uri),
}


@pytest.mark.parametrize("kind", FAILING)
def test_while_mlflow_fails_no_second_run_is_started_and_no_version_is_lost(
    kind: str, between: Between, mlflow_server: str, tmp_path: Path
):
    """Resuming, registering and promoting end in one line; afterwards the same commands find what there is."""
    name, saved = f"failing-{kind}", bundles.save(tmp_path / "bundle")
    run = Run.start(name, name, {"x": 1}, place=f"s3://bucket/{kind}")
    run.metrics({"loss": 1.0})
    run.bundle(tmp_path / "bundle")
    run.end("KILLED")
    with FAILING[kind](between, mlflow_server), pytest.raises(LsemvaeError, match="starting an MLflow run failed at"):
        Run.start(name, name, {"x": 1}, resume=run.run_id, place=f"s3://bucket/{kind}")
    again = Run.start(name, name, {"x": 1}, resume=run.run_id, place=f"s3://bucket/{kind}")
    assert again.run_id == run.run_id and runs_of(name) == [run.run_id]

    with FAILING[kind](between, mlflow_server), pytest.raises(LsemvaeError, match=f"registering {name} failed at"):
        again.register(name, {"digest": saved.digest})
    assert again.register(name, {"digest": saved.digest}) == 1
    assert again.register(name, {"digest": saved.digest}) == 1  # the same command again
    assert versions_of(name) == ["1"] and resolve(f"models:/{name}@candidate") == (name, 1)

    with FAILING[kind](between, mlflow_server), pytest.raises(LsemvaeError, match=f"{name}.* failed at"):
        promote(name)
    assert promote(name)[0] == 1 and resolve(f"models:/{name}@champion") == (name, 1)
    again.end()


def test_a_version_whose_answer_is_lost_is_made_once(between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = bundles.save(tmp_path / "bundle")
    run = Run.start("lost", "lost", {})
    run.bundle(tmp_path / "bundle")
    lost = Fault("lost", times=1, method="POST", part="model-versions/create")
    between.faults.append(lost)
    with pytest.raises(LsemvaeError, match="registering lost-version failed"):
        run.register("lost-version", {"digest": saved.digest})
    assert run.register("lost-version", {"digest": saved.digest}) == 1
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the client itself repeats the request
    lost.times = 1
    assert run.register("lost-again", {"digest": saved.digest}) == 1
    assert lost.times == 0
    for name in ("lost-version", "lost-again"):
        assert versions_of(name) == ["1"] and resolve(f"models:/{name}@candidate") == (name, 1)
    run.end()


def test_a_promotion_that_cannot_say_what_was_before_changes_nothing(between: Between, tmp_path: Path):
    bundles.save(tmp_path / "bundle")
    run = Run.start("unknown-before", "unknown-before", {})
    run.bundle(tmp_path / "bundle")
    for _ in range(2):
        run.register("unknown-before", {})
    run.end()
    assert promote("unknown-before", "1") == (1, None)
    between.faults.append(Fault("503", times=1, method="GET", part="alias=champion"))
    with pytest.raises(LsemvaeError, match="looking up models:/unknown-before@champion failed"):
        promote("unknown-before")
    assert resolve("models:/unknown-before@champion") == ("unknown-before", 1)
    assert promote("unknown-before") == (2, 1)
