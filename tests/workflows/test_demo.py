"""`make demo`, small: every stage by one command, and a second run that keeps the results of the first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import demo
import pandas as pd
import pytest
from support.session import ROOT, Cluster, workflow

from lsemvae.data.shards import Manifest, ShardedDataset, label_counts
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "workflows" / "demo.py"), "--folder", str(folder), *arguments]
    # It starts its own MLflow server, and joins the cluster of the test session.
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


@pytest.mark.ray
def test_the_whole_way_and_again(
    ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    small = ("--subjects", "50", "--pretrain-recipe", "smoke", "--finetune-recipe", "smoke")
    before = os.environ["MLFLOW_TRACKING_URI"]
    first = run(tmp_path / "demo", *small)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    place = tmp_path / "demo" / "simulated"
    for leads in ("6L", "12L"):
        results = pd.read_csv(place / f"ph-{leads}" / "results.csv")
        assert results.iloc[0]["AUROC"] in first.stdout
    assert " 6 leads -> simulated-ph-6L version 1: score 0." in first.stdout
    assert "12 leads -> simulated-ph-12L version 1: score 0." in first.stdout
    (scores,) = place.glob("scores-*")
    records = ShardedDataset.open(str(place / "shards")).manifest.records
    assert json.loads((scores / "summary.json").read_text())["records"] == records
    assert "make ui" in first.stdout
    assert os.environ["MLFLOW_TRACKING_URI"] == before

    # The second run starts the same commands in this process: only the first has to show that they are programs.
    said: list[str] = []
    for name in ("MLFLOW_TRACKING_URI", "PYTHONWARNINGS"):  # the demo sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(demo, "workflow", lambda name, *words: said.append(workflow(name, *words).stdout))
    demo.main(demo.Args(tmp_path / "demo", subjects=50, pretrain_recipe="smoke", finetune_recipe="smoke"))
    second = "".join(said) + capsys.readouterr().out
    for kept in ("already holds this data set", "pretrain is finished", "is already fine-tuned", "is complete"):
        assert kept in second
    assert " 6 leads -> simulated-ph-6L version 1: score 0." in second


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
