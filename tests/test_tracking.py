"""Bundles that are fetched from elsewhere, and secrets of MLflow that stay where they are."""

import tempfile
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient
from support import bundles

from lsemvae.tracking import Run
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
    assert service.reconstructor is not None and not service.reconstructor_problem
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
