"""Pre-training and fine-tuning as commands, on a real cluster with a real MLflow server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from sklearn.metrics import roc_auc_score
from support.checkpoints import newest
from support.session import ROOT, Cluster, Trained, text_of, workflow
from support.watched import Attempt

from lsemvae import bundle as bundles
from lsemvae import mlmodel
from lsemvae.data.shards import ShardedDataset
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.lease import RUNNING
from lsemvae.models import build
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import FINETUNE, PRETRAIN
from lsemvae.tracking import Run, fetch, promote, resolve

WATCHED = str(ROOT / "tests" / "support" / "watched.py")


def logged(run_name: str, experiment: str) -> tuple[MlflowClient, object]:
    client = MlflowClient()
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    (run,) = [r for r in client.search_runs([experiment_id]) if r.info.run_name == run_name][:1]
    return client, run


def losses_of(run_name: str) -> list[Metric]:
    client, run = logged(run_name, "pretrain")
    return client.get_metric_history(run.info.run_id, "train.loss")


@pytest.mark.ray
def test_pretraining_gives_a_bundle_and_tracks_what_it_did(shards: Path, pretrained: Trained):
    bundle, model = bundles.load(pretrained.folder / "bundle")
    assert bundle.task is None and bundle.leads == LEADS
    assert bundle.provenance["data"]["digest"] == ShardedDataset.open(str(shards)).manifest.digest
    assert model.config == PRETRAIN["smoke"].model

    client, run = logged("encoder", "pretrain")
    assert run.info.status == "FINISHED"
    epochs = PRETRAIN["smoke"].optim.epochs
    wanted = ["train.loss", "train.reconstruction", "train.kl", "train.alignment", "val.loss", "val.active_units"]
    wanted += ["train.skipped_steps", "val.collapsed", "records_per_s", *(f"val.r/{lead}" for lead in LEADS)]
    for name in wanted:
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == list(range(epochs)), name
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "val.loss")]
    assert losses[-1] < losses[0]
    assert run.data.metrics["train.skipped_steps"] == 0
    scales = [metric.value for metric in client.get_metric_history(run.info.run_id, "kl_scale")]
    assert scales == sorted(scales) and scales[-1] == 1
    manifest = ShardedDataset.open(str(shards)).manifest
    for split in ("train", "val"):  # recordings without enough leads are refused; all others are used
        assert 0.9 * manifest.rows_in(split) <= run.data.metrics[f"{split}.records"] <= manifest.rows_in(split)
    assert run.data.params["model.latent"] == "16"
    steps = -(-manifest.rows_in("train") // 32)
    for name in ("loss", "kl", "grad_norm", "learning_rate", "kl_scale", "records_per_s"):
        history = client.get_metric_history(run.info.run_id, f"step.{name}")
        rows = [metric.step for metric in history]
        # Means over a few seconds; an epoch's end, where the checkpoint is taken, ends a row.
        assert rows == sorted(set(rows)) and set(rows) >= {(epoch + 1) * steps - 1 for epoch in range(epochs)}, name
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "reconstructions")]
    assert pictures
    stored = {item.path for item in client.list_artifacts(run.info.run_id, "bundle")}
    assert stored == {f"bundle/{name}" for name in mlmodel.FILES - {mlmodel.WRITTEN_BY_MLFLOW}}
    (read,) = run.inputs.dataset_inputs
    assert read.dataset.digest == manifest.digest


@pytest.mark.ray
def test_pretraining_reads_and_writes_s3_and_says_when_it_collapses(
    s3: str, shards: Path, pretrained: Trained, tmp_path: Path
):
    """At a reconstruction weight of zero only the prior is left. Preprocessed on the device."""
    client = boto3.client("s3")
    for path in shards.iterdir():
        client.upload_file(str(path), "ecg", f"pretrain/shards/{path.name}")
    done = workflow(
        "pretrain", "smoke", "--data", "s3://ecg/pretrain/shards", "--storage", "s3://ecg/pretrain/runs",
        "--name", "s3", "--model-name", "s3", "--optim.epochs", 1, "--model.reconstruction-weight", 0,
        "--preprocess-on", "device", "--num-workers", 1,
    )  # fmt: skip
    on_device, on_cpu = (logged(name, "pretrain")[1].data.metrics for name in ("s3", "encoder"))
    assert {split: on_device[f"{split}.records"] for split in ("train", "val")} == {
        split: on_cpu[f"{split}.records"] for split in ("train", "val")
    }
    assert "warning: the posterior has collapsed" in done.stdout
    assert bundles.load(fetch("s3://ecg/pretrain/runs/s3/bundle", tmp_path / "bundle").folder)[0].leads == LEADS
    keys = {item["Key"] for item in client.list_objects_v2(Bucket="ecg", Prefix="pretrain/runs/s3/")["Contents"]}
    assert any("checkpoint_" in key and key.endswith("optimizer.safetensors") for key in keys)


@pytest.mark.ray
def test_the_same_command_again_says_it_is_finished(shards: Path, pretrained: Trained):
    done = workflow("pretrain", "smoke", "--data", shards, "--storage", pretrained.folder.parent, "--name", "encoder")
    assert "encoder is finished: nothing to do" in done.stdout
    assert str(pretrained.folder / "bundle") in done.stdout


@pytest.mark.ray
def test_a_killed_run_goes_on_from_its_checkpoint(ray_cluster: Cluster, shards: Path, tmp_path: Path):
    """SIGKILL of the driver after its first checkpoints; the same command then trains only the epochs that are left.

    It is given while the first one still runs, and waits for it. Both commands read what the first epoch has prepared
    from the cache.
    """
    options = ["smoke", "--data", str(shards), "--storage", str(tmp_path), "--name", "killed", "--model-name", "killed"]
    options += ["--optim.epochs", "5", "--cache", str(tmp_path / "cache"), "--num-workers", "1"]
    attempt, steps = Attempt(tmp_path / "watched"), -(-ShardedDataset.open(str(shards)).manifest.rows_in("train") // 32)
    attempt.until(2 * steps)  # there it waits until it is killed
    process = subprocess.Popen(
        [sys.executable, WATCHED, "pretrain", *options], cwd=ROOT, env=os.environ | attempt.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not newest(tmp_path / "killed", steps) or not losses_of("killed"):
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.1)
    log = tmp_path / "second.log"
    with log.open("w") as stream:
        second = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "pretrain.py"), *options], cwd=ROOT, stdout=stream, stderr=stream
        )
    while "another command works in" not in text_of(log):
        assert second.poll() is None, text_of(log)
        time.sleep(0.1)
    run = logged("killed", "pretrain")[1]
    assert 1 <= len(losses_of("killed")) < 5
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert second.wait() == 0, text_of(log)[-3000:]
    assert not (tmp_path / "killed" / RUNNING).exists()
    assert logged("killed", "pretrain")[1].info.run_id == run.info.run_id  # the same MLflow run goes on
    epochs = [metric.step for metric in losses_of("killed")]
    assert sorted(set(epochs)) == list(range(5))
    assert len(epochs) <= 6  # at most the epoch that was under way is done twice
    groups = [len(np.load(path, mmap_mode="r")) for path in (tmp_path / "cache").glob("*/*.npy")]
    assert sum(groups) == ShardedDataset.open(str(shards)).manifest.rows_in("all")
    assert bundles.load(tmp_path / "killed" / "bundle")[0].leads == LEADS


@pytest.mark.ray
def test_the_same_file_runs_as_a_ray_job(ray_cluster: Cluster, shards: Path, tmp_path: Path, mlflow_server: str):
    """`ray job submit --working-dir . -- python workflows/pretrain.py …` on a head made by `ray start --head`."""
    runtime_env = {"env_vars": {"MLFLOW_TRACKING_URI": mlflow_server}, "excludes": ["docs", "tests"]}
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps(runtime_env), "--", "python", "workflows/pretrain.py", "smoke"]
    command += ["--data", str(shards), "--storage", str(tmp_path), "--name", "job", "--model-name", "job"]
    command += ["--optim.epochs", "1", "--num-workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "succeeded" in done.stdout
    assert bundles.load(tmp_path / "job" / "bundle")[0].leads == LEADS
    assert logged("job", "pretrain")[1].info.status == "FINISHED"


@pytest.mark.ray
@pytest.mark.parametrize("leads", ["6", "12"])
def test_fine_tuning_is_out_of_fold_and_registered(
    shards: Path, finetuned: dict[str, Trained], leads: str, tmp_path: Path
):
    folder, printed = finetuned[leads].folder, finetuned[leads].printed
    scores = pd.read_csv(folder / "scores.csv", dtype={"record_id": str, "subject_id": str})
    data = ShardedDataset.open(str(shards))
    stored = data.read(["record_id", "label.ph"]).to_pylist()
    assert sorted(scores["record_id"]) == sorted(row["record_id"] for row in stored)  # each once
    assert dict(zip(scores["record_id"], scores["label"], strict=True)) == {
        row["record_id"]: row["label.ph"] for row in stored
    }
    assert scores.groupby("subject_id")["fold"].nunique().max() == 1
    assert sorted(scores["fold"].unique()) == list(range(FINETUNE["smoke"].folds))

    results = pd.read_csv(folder / "results.csv", index_col="scored by")
    rows = ["LS-EMVAE", "untrained encoder", "classical features", "amplitude quantiles"]
    assert list(results.index) == [*rows, "naive"]
    for row in rows:
        auroc = roc_auc_score(scores["label"], scores[row])
        assert results.loc[row, "AUROC"].startswith(f"{auroc:.3f} [")
        assert results.loc[row, "AUROC"] in printed
    assert results.loc["naive", "AUROC"] == "0.500 [0.500, 0.500]"
    assert results.loc["LS-EMVAE", "AUROC"] != results.loc["untrained encoder", "AUROC"]
    differences = pd.read_csv(folder / "differences.csv", index_col="compared with")
    assert list(differences.index) == rows[1:]
    found = differences.iloc[0, 0]
    auroc = {row: roc_auc_score(scores["label"], scores[row]) for row in rows}
    assert found.startswith(f"{auroc[rows[0]] - auroc[rows[1]]:+.3f} [") and found in printed

    bundle, model = bundles.load(folder / "bundle")
    assert bundle.task == "ph" and bundle.leads == (LIMB_LEADS if leads == "6" else LEADS)
    assert 0 < bundle.threshold < 1
    assert not any("logvar" in name or "decoder" in name for name in model.state_dict())
    name, version = resolve(f"models:/ph-{leads}L@candidate")
    fetched = fetch(f"models:/{name}/{version}", tmp_path)
    assert bundles.describe(fetched.folder).digest == bundle.digest
    assert resolve(f"models:/ph-{leads}L@champion") == (name, version)
    assert (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.ray
def test_every_weight_is_trained_over_shifts_and_an_interrupted_command_goes_on(
    shards: Path, pretrained: Trained, tmp_path: Path
):
    """`trains=all` with early stop. It is killed after five trainings; the same command does not repeat these."""
    command = [
        "finetune", "smoke", "--data", shards, "--task", "ph", "--leads", "6", "--encoder",
        pretrained.folder / "bundle", "--model-name", "whole", "--trains", "all", "--shifts", 3, "--optim.epochs", 2,
        "--scratch-epochs", 3, "--early-stop", "--seeds", 2, "--folds", 2, "--lead-dropout", 0.2, "--noise", 0.05,
        "--amplitude", 0.1,
    ]  # fmt: skip
    command = [*command, "--output", tmp_path / "out"]
    attempt = Attempt(tmp_path / "watched")
    attempt.until(5)
    log = tmp_path / "first.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, WATCHED, *map(str, command)], cwd=ROOT, env=os.environ | attempt.environment,
            stdout=stream, stderr=stream,
        )  # fmt: skip
    while len(finished := trainings(tmp_path / "out")) < 5:
        assert process.poll() is None, text_of(log)[-3000:]
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "results.csv").exists()
    done = workflow(*command)
    after = trainings(tmp_path / "out")
    assert len(finished) == 5 and len(after) == 2 * (2 + 1 + 2 + 2 + 1 + 1)
    assert {path: after[path] for path in finished} == finished
    client, experiment = MlflowClient(), MlflowClient().get_experiment_by_name("finetune").experiment_id
    (run,) = client.search_runs([experiment], "attributes.run_name = 'whole'")
    (version,) = client.search_model_versions("name = 'whole'")
    assert run.info.status == "FINISHED" and version.run_id == run.info.run_id
    results = pd.read_csv(tmp_path / "out" / "results.csv", index_col="scored by")
    assert list(results.index) == [
        "LS-EMVAE", "LS-EMVAE, frozen", "from scratch", "untrained encoder, frozen", "classical features",
        "amplitude quantiles", "naive",
    ]  # fmt: skip
    assert results.loc["from scratch", "seeds"].startswith("2 (SD ")
    bundle, model = bundles.load(tmp_path / "out" / "bundle")
    assert model.config.shifts == 3 and bundle.provenance["recipe"]["trains"] == "all"
    _, encoder = bundles.load(pretrained.folder / "bundle")
    for name, before in encoder.embedder(LIMB_LEADS).state_dict().items():
        assert not torch.equal(model.encoders.state_dict()[name], before), name
    scores = pd.read_csv(tmp_path / "out" / "scores.csv", dtype={"record_id": str, "subject_id": str})
    assert not np.allclose(scores["LS-EMVAE"], scores["LS-EMVAE (seed 1)"])

    assert results.loc["LS-EMVAE", "AUROC"] in done.stdout


def trainings(output: Path) -> dict[Path, int]:
    """The files of finished trainings, and when they were written."""
    files = (path for path in output.glob("folds-*/*.json") if path.name != "run.json")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.ray
def test_an_encoder_that_scales_each_record_has_the_same_classical_row(
    shards: Path, finetuned: dict[str, Trained], tmp_path: Path
):
    """Its model input has lost the voltages, so they are measured apart. Also: logistic regression on pooled features,
    which is a bundle too."""
    model = build(PRETRAIN["smoke"].model, LEADS)
    bundles.save(bundles.Bundle.of(model, PreprocessConfig(scale="record")), model, tmp_path / "encoder")
    workflow(
        "finetune", "smoke", "--data", shards, "--task", "ph", "--leads", "6", "--encoder", tmp_path / "encoder",
        "--output", tmp_path / "out", "--model-name", "record-scale", "--trains", "linear", "--features", "pooled",
    )  # fmt: skip
    one, other = (pd.read_csv(place / "scores.csv") for place in (finetuned["6"].folder, tmp_path / "out"))
    assert (one["record_id"] == other["record_id"]).all() and (one["fold"] == other["fold"]).all()
    np.testing.assert_allclose(one["classical features"], other["classical features"], atol=2e-3)
    bundle, classifier = bundles.load(tmp_path / "out" / "bundle")
    assert (classifier.config.features, classifier.config.hidden) == ("pooled", 0)
    assert bundle.preprocess.scale == "record" and bundle.example is not None


@pytest.mark.ray
def test_the_encoder_is_frozen_and_the_head_is_not(pretrained: Trained, finetuned: dict[str, Trained]):
    _, encoder = bundles.load(pretrained.folder / "bundle")
    _, classifier = bundles.load(finetuned["6"].folder / "bundle")
    for name, tensor in classifier.encoders.state_dict().items():
        torch.testing.assert_close(tensor, encoder.encoders.select(LIMB_LEADS).state_dict()[name], rtol=0, atol=0)
    assert classifier.head.fc2.weight.abs().sum() > 0
    assert not torch.equal(classifier.head.mean_F, torch.zeros_like(classifier.head.mean_F))


@pytest.mark.ray
def test_promotion_goes_forward_and_back(finetuned: dict[str, Trained]):
    run = Run.start("finetune", "again", {})
    run.bundle(finetuned["6"].folder / "bundle")
    first = run.register("moves", {}, alias="candidate")
    second = run.register("moves", {}, alias="candidate")
    run.end()
    assert promote("moves", str(first)) == (first, None)
    assert "is version 2 (before: version 1)" in workflow("promote", "--name", "moves").stdout
    assert resolve("models:/moves@champion") == ("moves", second)
    workflow("promote", "--name", "moves", "--source", first)
    assert resolve("models:/moves@champion") == ("moves", first)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["pretrain", "nope", "--data", "{shards}", "--storage", "{tmp}/s"], "choose one of paper, released, eight"),
        (["pretrain", "smoke", "--data", "{tmp}", "--storage", "{tmp}/s"], "holds no manifest.json"),
        (["pretrain", "smoke", "--data", "{shards}", "--storage", "gs://x/y"], "only folders, file:// and s3://"),
        (
            ["pretrain", "smoke", "--data", "{shards}", "--storage", "{tmp}/s", "--num-workers", "500"],
            "500 workers and 8 streams",
        ),
        (
            ["pretrain", "smoke", "--data", "{shards}", "--storage", "{tmp}", "--num-workers", "8", "--wait-s", "1"],
            "8 workers cannot be had: the cluster has 4 CPU, 9 are needed",
        ),
        (["finetune", "smoke", "--task", "sex", "--encoder", "{encoder}"], "no label 'sex': it has "),
        (["finetune", "smoke", "--task", "mpap_mmhg", "--encoder", "{encoder}"], "at other values"),
        (["finetune", "smoke", "--task", "ph", "--encoder", "{encoder}", "--leads", "I,V9"], "unknown lead 'V9'"),
        (["finetune", "smoke", "--task", "ph", "--encoder", "models:/no@champion"], "no model 'no' with alias"),
        (["finetune", "smoke", "--task", "ph", "--encoder", "{tmp}"], "is no bundle"),
        (["finetune", "smoke", "--task", "ph", "--encoder", "{classifier}"], "takes a pre-trained"),
        (["finetune", "smoke", "--task", "ph", "--encoder", "{encoder}", "--folds", "40"], "40 folds need 40 of each"),
        (
            [
                "finetune", "smoke", "--task", "ph", "--encoder", "{encoder}", "--strengths", "1", "2", "--inner-folds",
                "30",
            ],
            "30 folds need 30 of each; lower --inner-folds",
        ),
        (["finetune", "smoke", "--task", "ph", "--encoder", "{encoder}", "--shifts", "0"], "shifts=0"),
        (["score", "--model", "models:/ph-6L@nobody", "--data", "{shards}", "--output", "{tmp}/s"], "alias 'nobody'"),
        (["score", "--model", "{encoder}", "--data", "{shards}", "--output", "{tmp}/s"], "fine-tune it first"),
        (["promote", "--name", "nothing"], "no model 'nothing' with alias 'candidate'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(command, says, shards, pretrained, finetuned, tmp_path):
    words = {
        "shards": shards, "tmp": tmp_path, "encoder": pretrained.folder / "bundle",
        "classifier": finetuned["6"].folder / "bundle",
    }  # fmt: skip
    if command[0] == "finetune":
        command = [*command, "--data", "{shards}"]
    done = workflow(*[word.format(**words) for word in command], check=False, alone=command[0] == "promote")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.epochs", "0"], "epochs=0"),
        (["--optim.epoch", "3"], "--optim.epochs INT"),
        (["--preprocess.scale", "z"], "invalid choice 'z'"),
        (["--model.samples", "5001"], "samples is 5001"),
    ],
)
def test_what_the_command_line_cannot_mean_is_explained(words: list[str], says: str, tmp_path: Path):
    done = workflow("pretrain", "smoke", "--data", tmp_path, "--storage", tmp_path, *words, check=False)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.ray
def test_an_mlflow_server_that_is_away_is_named_before_anything_starts(shards: Path, tmp_path: Path):
    done = workflow(
        "pretrain", "smoke", "--data", shards, "--storage", tmp_path, check=False,
        MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: starting an MLflow run failed at http://127.0.0.1:9" in done.stderr
    assert not list(tmp_path.iterdir())
