"""Fixtures that all tests share: one Ray cluster, one MLflow server, and the models trained on one simulated cohort.

Everything is real and local. Each result is made once a session, by the command that a user would run.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import servers
from command import prepare_environment
from support import swift_server
from support.session import (
    ANY_WORKER_PORT,
    AUTHENTICATION,
    SHARED_DATA,
    Cluster,
    Trained,
    end_group,
    ray_folder,
    wait_for,
    workflow,
)

os.environ.update(AUTHENTICATION)
# Ray starts a worker a CPU for the first driver of a cluster. Ours pass their workers an environment of its own, so
# they would never use those.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"})
prepare_environment()
SERVERS = {"mlflow_server", "s3", "object_store", "ray_cluster", "proxy", "url", "running"}
"""Fixtures that start a server, a proxy or a browser."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures: `-m "not server"` can then start no server by way of a fixture."""
    for item in items:
        if SERVERS & set(item.fixturenames):
            item.add_marker("server")
        if "ray_cluster" in item.fixturenames:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real recordings of {SHARED_DATA} are not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on SQLite; `MLFLOW_TRACKING_URI` names it for the rest of the session."""
    # Not the preferred port: another process of this test run may be about to take it.
    with servers.mlflow_server(tmp_path_factory.mktemp("mlflow"), servers.free_port()) as uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        yield uri


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A mock of S3 with the bucket `ecg` -> its URL. The environment names it as it would name a user's endpoint."""
    log, port = tmp_path_factory.mktemp("moto") / "server.log", servers.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=stream, stderr=stream, start_new_session=True
        )
    wait_for(f"{endpoint}/moto-api/", process, log)
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": swift_server.ACCESS_KEY,  # the mock accepts any
        "AWS_SECRET_ACCESS_KEY": swift_server.SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(environment)
    boto3.client("s3").create_bucket(Bucket="ecg")
    yield endpoint
    end_group(process)
    for key in environment:
        os.environ.pop(key)


@pytest.fixture(scope="session")
def object_store(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[swift_server.ObjectStore]:
    """A production server with the bucket `ecg`. URIs name it by `?endpoint=`; `s3` has set the credentials of both."""
    store = swift_server.start(tmp_path_factory.mktemp("swift"))
    yield store
    store.end()


@pytest.fixture(scope="session")
def ray_cluster(mlflow_server: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with token authentication, as on a user's cluster."""
    port, dashboard_port = servers.free_port(), servers.free_port()
    place = ray_folder()
    environment = AUTHENTICATION | {
        "RAY_TMPDIR": str(place),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard_port}",  # what the `serve` command asks
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs run `python`
    }
    folder = tmp_path_factory.mktemp("ray")
    log = folder / "ray.log"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={port}", f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
    # The default ports are the same for every cluster of a machine: a second cluster would have no agent and no jobs.
    command += [f"--dashboard-agent-listen-port={servers.free_port()}"]
    command += [f"--ray-client-server-port={servers.free_port()}", *ANY_WORKER_PORT]
    command += [f"--object-store-memory={2 * 2**30}", "--node-ip-address=127.0.0.1"]
    start = {key: value for key, value in environment.items() if key not in ("RAY_ADDRESS",)}
    start |= {name: str(servers.free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=os.environ | start, cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    bearer = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    wait_for(f"{environment['RAY_API_SERVER_ADDRESS']}/api/version", process, log, headers=bearer)
    os.environ.update(environment)
    yield Cluster(environment["RAY_API_SERVER_ADDRESS"], environment)
    import ray

    ray.shutdown()
    end_group(process)
    shutil.rmtree(place, ignore_errors=True)
    for key in environment.keys() - {"PATH", *AUTHENTICATION}:
        os.environ.pop(key, None)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 simulated subjects in the layout of MIMIC-IV-ECG, with more NaN and flat leads than real recordings have."""
    from lsemvae.cohorts.simulated import CohortConfig, simulate_cohort

    folder = tmp_path_factory.mktemp("simulated") / "cohort"
    simulate_cohort(CohortConfig(subjects=60, seed=3, mean_studies=2.0, nan_share=0.05, flat_share=0.02), folder)
    return folder


@pytest.fixture(scope="session")
def shards(ray_cluster: Cluster, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    workflow("ingest", "--source", cohort, "--output", folder, "--shard-records", 48, "--val-share", 0.2)
    return folder


@pytest.fixture(scope="session")
def pretrained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    storage = tmp_path_factory.mktemp("runs")
    done = workflow("pretrain", "smoke", "--data", shards, "--storage", storage, "--name", "encoder", alone=True)
    return Trained(storage / "encoder", done.stdout)


@pytest.fixture(scope="session")
def finetuned(shards: Path, pretrained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A 6-lead and a 12-lead model, each promoted to champion."""
    trained = {}
    for leads in ("6", "12"):
        folder = tmp_path_factory.mktemp(f"finetune{leads}")
        done = workflow(
            "finetune", "smoke", "--data", shards, "--task", "ph", "--leads", leads, "--output", folder,
            "--encoder", pretrained.folder / "bundle",
        )  # fmt: skip
        workflow("promote", "--name", f"ph-{leads}L")
        trained[leads] = Trained(folder, done.stdout)
    return trained


@pytest.fixture(scope="session")
def truth(cohort: Path) -> dict:
    return json.loads((cohort / "truth.json").read_text())
