"""Ingest as a command: every recording once, every unreadable one listed, in a folder or in S3."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
from conftest import workflow

from lsemvae.formats import read
from lsemvae.shards import ShardedDataset, unpack

pytestmark = pytest.mark.ray


def all_rows(folder: Path) -> list[dict]:
    data = ShardedDataset.open(str(folder))
    names = ["record_id", "subject_id", "path", "rate_hz", "samples", "signal", "uv_per_lsb", "offset"]
    names += ["measured", "derived", "flags", *(f"label.{name}" for name in data.manifest.labels)]
    return data.read(names).to_pylist()


def test_every_recording_is_there_once_with_its_own_signal(cohort: Path, shards: Path):
    listed = pd.read_csv(cohort / "record_list.csv", dtype=str)
    labels = pd.read_csv(cohort / "labels.csv", dtype={"study_id": str}).set_index("study_id")
    stored = {row["record_id"]: row for row in all_rows(shards)}
    assert sorted(stored) == sorted(listed["study_id"])
    for entry in listed.itertuples():
        row = stored[entry.study_id]
        assert row["subject_id"] == entry.subject_id
        assert row["label.ph"] == labels.loc[entry.study_id, "ph"]
        original, back = read(cohort / entry.path), unpack(row)
        assert back.leads == original.leads  # aVF before aVL in the file, by name here
        np.testing.assert_array_equal(back.signal_mv_LT, original.signal_mv_LT)


def test_no_subject_is_in_two_splits_and_the_manifest_is_true(cohort: Path, shards: Path):
    data = ShardedDataset.open(str(shards))
    subjects = {split: set(data.read(["subject_id"], split)["subject_id"].to_pylist()) for split in ("train", "val")}
    assert subjects["train"] and subjects["val"]
    assert not subjects["train"] & subjects["val"]
    assert data.manifest.records == sum(shard.rows for shard in data.manifest.shards) == len(all_rows(shards))
    assert data.manifest.subjects == len(subjects["train"] | subjects["val"])
    assert data.manifest.cohort == "mimic-iv-ecg"
    for shard in data.manifest.shards:
        content = (shards / shard.path).read_bytes()
        assert (shard.bytes, shard.digest) == (len(content), hashlib.sha256(content).hexdigest())
    flags = json.loads((cohort / "truth.json").read_text())
    assert data.manifest.flags["nan"] >= 1 and data.manifest.flags["flat"] >= 1, flags


def test_the_same_command_again_does_nothing_and_another_one_is_refused(cohort: Path, shards: Path):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    arguments = ("--source", cohort, "--output", shards, "--shard-records", 48, "--val-share", 0.2)
    assert "nothing to do" in workflow("ingest", *arguments).stdout
    other = workflow("ingest", *arguments, "--seed", 1, check=False)
    assert (other.returncode, other.stderr.strip().count("\n")) == (2, 0)
    assert "already holds another data set" in other.stderr
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.fixture
def damaged(cohort: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the cohort in which some recordings cannot be read, and why."""
    folder = tmp_path / "damaged"
    shutil.copytree(cohort, folder)
    paths = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.hea"))
    whole = (folder / paths[0]).with_suffix(".dat").read_bytes()
    (folder / paths[0]).with_suffix(".dat").write_bytes(whole[:1000])
    (folder / paths[1]).with_suffix(".dat").unlink()
    (folder / paths[2]).with_suffix(".hea").unlink()
    header = (folder / paths[3]).with_suffix(".hea")
    header.write_text(header.read_text().replace(f"{paths[3].name}.dat", "../../../../../etc/passwd"))
    return folder, {
        str(paths[0]): "truncated", str(paths[1]): "missing_file", str(paths[2]): "missing_file",
        str(paths[3]): "unsafe_name",
    }  # fmt: skip


def test_unreadable_recordings_are_listed_and_the_rest_goes_on(ray_cluster, damaged, tmp_path: Path):
    folder, expected = damaged
    output = tmp_path / "shards"
    done = workflow("ingest", "--source", folder, "--output", output, "--max-unreadable", 0.5)
    with (output / "unreadable.csv").open() as stream:
        listed = {row["path"]: row["code"] for row in csv.DictReader(stream)}
    assert listed == expected
    assert f"unreadable: {len(expected)}, listed in" in done.stdout
    total = len(pd.read_csv(folder / "record_list.csv"))
    assert ShardedDataset.open(str(output)).manifest.records == total - len(expected)
    too_many = workflow(
        "ingest", "--source", folder, "--output", tmp_path / "b", "--max-unreadable", 0.001, check=False
    )
    assert too_many.returncode == 3
    assert "--max-unreadable" in too_many.stderr


def test_an_interrupted_run_keeps_what_it_finished(ray_cluster, cohort: Path, shards: Path, tmp_path: Path):
    """As if the command had been killed before its manifest: the shards that are there are not made again."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    (folder / "manifest.json").unlink()
    (folder / "train-00001.parquet").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    arguments = ("--output", folder, "--shard-records", 48, "--val-share", 0.2)
    workflow("ingest", "--source", cohort, *arguments)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet") if path.name in kept} == kept
    whole = ShardedDataset.open(str(shards)).manifest
    assert ShardedDataset.open(str(folder)).manifest == whole


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--source", "{tmp}"], "has no recordings"),
        (["--source", "ftp://host/data"], "only folders, file:// and s3://"),
        (["--source", "s3://"], "names no bucket"),
        (["--source", "{cohort}", "--cohort", "mimic"], "there is no cohort 'mimic': choose one of mimic-iv-ecg"),
        (["--source", "{cohort}", "--labels", "{tmp}/none.csv"], "none.csv"),
        (["--source", "{cohort}", "--labels", "{tmp}/odd.csv"], "the labels have no key"),
        (["--source", "{cohort}", "--val-share", "1"], "val_share=1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(ray_cluster, cohort, tmp_path, arguments, says):
    source = tmp_path / "in"
    source.mkdir()
    (source / "odd.csv").write_text("who,ph\na,1\n")
    filled = [argument.format(tmp=source, cohort=cohort) for argument in arguments]
    done = workflow("ingest", *filled, "--output", tmp_path / "out", check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_from_s3_and_to_s3(ray_cluster, s3: str, cohort: Path):
    """Against a mock of S3; production servers are the business of a later station."""
    client = boto3.client("s3")
    listed = pd.read_csv(cohort / "record_list.csv", dtype=str).head(20)
    for name in ("record_list.csv", "labels.csv", *listed["path"] + ".hea", *listed["path"] + ".dat"):
        client.upload_file(str(cohort / name), "ecg", f"mimic/{name}")
    arguments = ("--source", "s3://ecg/mimic", "--output", "s3://ecg/shards", "--limit", 20)
    assert "20 recordings" in workflow("ingest", *arguments).stdout
    assert "nothing to do" in workflow("ingest", *arguments).stdout
    data = ShardedDataset.open("s3://ecg/shards")
    assert sorted(data.read(["record_id"])["record_id"].to_pylist()) == sorted(listed["study_id"])
    client.put_bucket_policy(
        Bucket="ecg",
        Policy=json.dumps(
            {"Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::ecg/*"}]}
        ),
    )
    anonymous = ("--source", "s3://ecg/mimic?anonymous=true", "--output", "s3://ecg/anonymous", "--limit", 3)
    assert "3 recordings" in workflow("ingest", *anonymous).stdout
    absent = workflow("ingest", "--source", "s3://nobody/x", "--output", "s3://ecg/y", check=False)
    assert absent.returncode == 2 and len(absent.stderr.strip().splitlines()) == 1, absent.stderr


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("source", "cohort_name", "records", "label", "counts"),
    [("ptbxl500", "ptb-xl", 500, "norm", (191, 297)), ("ludb", "ludb", 200, "lvh", (92, 108))],
)
def test_real_cohorts(ray_cluster, shared_data, tmp_path, source, cohort_name, records, label, counts):
    done = workflow("ingest", "--source", shared_data / source, "--output", tmp_path / "out")
    assert f"{cohort_name}: {records} recordings" in done.stdout
    manifest = ShardedDataset.open(str(tmp_path / "out")).manifest
    assert manifest.records == records and manifest.unreadable == 0
    assert (manifest.labels[label]["0"], manifest.labels[label]["1"]) == counts
    raw_bytes = records * 12 * 5000 * 2
    assert sum(shard.bytes for shard in manifest.shards) < 0.45 * raw_bytes
    for row in all_rows(tmp_path / "out")[:20]:
        record = unpack(row)
        residual_uv = 1000 * (record.signal_for(["I"]) + record.signal_for(["III"]) - record.signal_for(["II"]))
        assert np.abs(residual_uv).max() < 60  # LUDB keeps the relation only when its counts are read raw
