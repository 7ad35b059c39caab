"""What a job runs on another node finds this repository's modules: they travel with the job and are nowhere else."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import servers
from support import bundles
from support.labelled import write_labelled
from support.session import ROOT, end_group, text_of

from lsemvae.leads import LIMB_LEADS

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head without CPUs and a node with four, each with its own folder -> the environment of clients.

    On both, `lsemvae` and the modules of workflows that are found first outside a job's files refuse to be imported.
    """
    for name in ("lsemvae", "command", "cohort"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "__init__.py").write_text(
            f"raise ImportError('{name} of the node, not the job')"
        )
    port, dashboard = servers.free_port(), servers.free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | token | {"PYTHONPATH": str(tmp_path / "elsewhere"), "PATH": path}
    environment.pop("RAY_ADDRESS", None)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={servers.free_port()}"]
    started: list[subprocess.Popen] = []
    short = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the path of a socket has at most 107 characters
    try:
        for name, options in (("head", ["--head", *ports, "--num-cpus=0"]), ("other", ["--num-cpus=4"])):
            if name == "other":
                options = [*options, f"--address=127.0.0.1:{port}"]
            options += [f"--temp-dir={short}/{name}", f"--dashboard-agent-listen-port={servers.free_port()}"]
            command = [
                RAY,
                "start",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--object-store-memory={2**28}",
                *options,
            ]
            log = tmp_path / f"{name}.log"
            with log.open("w") as stream:
                started.append(
                    subprocess.Popen(
                        command, env=environment, cwd=tmp_path, stdout=stream, stderr=stream, start_new_session=True
                    )
                )
            while "Ray runtime started" not in text_of(log):
                assert started[-1].poll() is None, text_of(log)
                time.sleep(0.2)
        yield environment | {
            "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
    finally:
        for node in reversed(started):
            end_group(node)
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.ray
def test_a_job_scores_and_searches_on_another_node(two_nodes: dict[str, str], mlflow_server: str, tmp_path: Path):
    data = write_labelled(tmp_path / "shards", 24)
    bundles.save(tmp_path / "ph-6L", leads=LIMB_LEADS)
    score = f"python workflows/score.py --model {tmp_path}/ph-6L --data {data} --output {tmp_path}/scores"
    tune = f"python workflows/tune.py smoke --grid beta=0.5 --data {data} --storage {tmp_path}/search --optim.epochs 1"
    command = [RAY, "job", "submit", "--working-dir", ".", "--runtime-env", "infra/runtime_env.yaml"]
    done = subprocess.run(
        [*command, "--", "sh", "-c", f"{score} && {tune}"],
        cwd=ROOT,
        env=two_nodes | {"MLFLOW_TRACKING_URI": mlflow_server},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (scores,) = (tmp_path / "scores").glob("scores-*.parquet")
    assert pq.read_metadata(scores).num_rows == 48
    # One epoch is too short for a best recipe: what counts is that the trial ran to its end.
    (trial,) = (tmp_path / "search").glob("*/trials/*")
    assert json.loads((trial / "result.json").read_text())["state"] == "finished"
    assert len(list((trial / "bundle").iterdir())) >= 2
