"""`make demo`, small: every stage by one command, a second run that keeps the results of the first, and the page."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import demo
import httpx
import pandas as pd
import pytest
import yaml
from support.session import ROOT, Cluster, kept_signals, workflow

from lsemvae.data.shards import Manifest, ShardedDataset, label_counts
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "workflows" / "demo.py"), "--folder", str(folder), *arguments]
    # It starts its own MLflow server, and joins the cluster of the test session.
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


SMALL = ("--subjects", "50", "--pretrain-recipe", "smoke", "--finetune-recipe", "smoke")


@pytest.fixture(scope="module")
def demonstrated(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what it printed."""
    before = os.environ["MLFLOW_TRACKING_URI"]
    folder = tmp_path_factory.mktemp("demonstrated") / "demo"
    first = run(folder, *SMALL)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    assert os.environ["MLFLOW_TRACKING_URI"] == before
    assert not [line for line in first.stderr.splitlines() if "Warning" in line or "object store" in line]
    return folder, first.stdout


@pytest.mark.ray
def test_the_whole_way(demonstrated: tuple[Path, str]):
    folder, said = demonstrated
    place = folder / "simulated"
    last = said.partition("=== Where to look ===")[2]
    for leads in ("6L", "12L"):
        results = pd.read_csv(place / f"ph-{leads}" / "results.csv")
        for auroc in results["AUROC"]:
            assert auroc in last
    assert " 6 leads -> simulated-ph-6L version 1: score 0." in said
    assert "12 leads -> simulated-ph-12L version 1: score 0." in said
    (scores,) = place.glob("scores-*")
    records = ShardedDataset.open(str(place / "shards")).manifest.records
    assert json.loads((scores / "summary.json").read_text())["records"] == records
    picture = next(line.split()[-1] for line in last.splitlines() if line.startswith("picture:"))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "make ui" in last
    assert "make serve-demo" in last
    assert "reused" not in last
    made = "simulated recordings, shards, pre-training, fine-tuning on 6 leads, fine-tuning on 12 leads, scores of the"
    assert f"made anew: {made} cohort, the answers of the endpoint" in last


@pytest.mark.ray
def test_again_it_says_what_it_reused(
    demonstrated: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    # The same commands start in this process: the first run has shown that they are programs.
    said: list[str] = []
    for name in ("MLFLOW_TRACKING_URI", "PYTHONWARNINGS"):  # the demo sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(demo, "workflow", lambda name, *words: said.append(workflow(name, *words).stdout))
    with kept_signals():
        demo.main(demo.Args(demonstrated[0], subjects=50, pretrain_recipe="smoke", finetune_recipe="smoke"))
    second = "".join(said) + capsys.readouterr().out
    for kept in ("already holds this data set", "pretrain is finished", "is already fine-tuned", "is complete"):
        assert kept in second
    assert " 6 leads -> simulated-ph-6L version 1: score 0." in second
    assert "reused from an earlier run: simulated recordings, shards, pre-training, fine-tuning on 6 leads" in second
    assert "\nmade anew: the answers of the endpoint\n" in second


@pytest.mark.ray
def test_the_page_of_the_demo(demonstrated: tuple[Path, str]):
    """It asks for its token, scores the recording that it names, and ends with Ctrl-C, leaving nothing behind."""
    folder = demonstrated[0]
    command = [sys.executable, str(ROOT / "workflows" / "demo.py"), "--folder", str(folder), "--serve"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        told = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in said) if rest.strip()}
        recording = Path(told["an ECG"])
        assert "LS-EMVAE" in httpx.get(told["page"]).text
        files = {"files": (recording.name, recording.read_bytes())}
        assert httpx.post(f"{told['page']}v1/score/file", files=files).status_code == 401
        bearer = {"Authorization": f"Bearer {told['token']}"}
        answer = httpx.post(f"{told['page']}v1/score/file", files=files, headers=bearer, timeout=60).json()
        assert answer["results"][0]["model"]["name"] == "simulated-ph-12L"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 0, errors
    assert rest.strip() == "Stopped."
    assert not errors
    assert not (folder / "token").exists()
    settings = yaml.safe_load((folder / "serve-demo.yaml").read_text())["applications"][0]["runtime_env"]["env_vars"]
    for url in (told["page"], settings["MLFLOW_TRACKING_URI"]):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


@pytest.mark.ray
def test_a_wrong_folder_ends_it_with_one_line(ray_cluster: Cluster, tmp_path: Path):
    done = run(tmp_path / "demo", "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [f"error: {tmp_path}/nowhere does not exist: check the path or URI"]


def with_labels(**labels: list[float]) -> ShardedDataset:
    counts = {name: label_counts(pd.Series(values, dtype=float).to_numpy()) for name, values in labels.items()}
    manifest = Manifest("s", "folder", "p", 2, 2, 0, counts, [])
    return ShardedDataset(Storage.open("/nowhere"), manifest)


def test_the_task_is_chosen_among_labels_with_two_classes():
    assert demo.choose_task(with_labels(lvh=[0, 1], norm=[0, 1])) == "norm"
    assert demo.choose_task(with_labels(ph=[1, 1], lvh=[0, 1])) == "lvh"
    assert demo.choose_task(with_labels(female=[0, 1], split=[0, 1], strat_fold=[0, 1], lvh=[0, 1])) == "lvh"
    with pytest.raises(LsemvaeError, match="no label has both 0 and 1"):
        demo.choose_task(with_labels(ph=[1, 1], mpap=[20, 31], female=[0, 1], age_years=[0, 1]))
