"""Ingest as a command: every recording once, every unreadable one listed, in a folder or in S3."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.echo_files import measurements_csv, rows, write_echonext
from support.session import ROOT, workflow

from lsemvae.data.ingest import divide_reads, make_plan
from lsemvae.data.shards import ShardedDataset, unpack
from lsemvae.formats import read
from lsemvae.formats.echonext import NOMINAL_MV

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
    assert "its shards are whole: nothing to do" in workflow("ingest", *arguments).stdout
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
        listed = {row["path"]: row for row in csv.DictReader(stream)}
    assert {path: row["code"] for path, row in listed.items()} == expected
    assert all(len(row["reason"]) > 20 for row in listed.values())
    assert f"unreadable: {len(expected)}, listed in" in done.stdout
    total = len(pd.read_csv(folder / "record_list.csv"))
    assert ShardedDataset.open(str(output)).manifest.records == total - len(expected)
    page = (output / "report.html").read_text()
    assert "<html" in page and "truncated" in page
    assert not any(path in page for path in expected)


def test_too_many_unreadable_recordings_stop_it_and_mended_ones_are_read(cohort, ray_cluster, damaged, tmp_path: Path):
    folder, expected = damaged
    output = tmp_path / "shards"
    arguments = ("--source", folder, "--output", output, "--shard-records", 16, "--max-unreadable", 0.001)
    stopped = workflow("ingest", *arguments, check=False)
    assert stopped.returncode == 3
    last = stopped.stderr.strip().splitlines()[-1]
    assert "recordings are unreadable, more than --max-unreadable 0.001" in last and "the first: " in last
    assert (output / "unreadable.csv").is_file() and not (output / "manifest.json").exists()
    for path in expected:
        for suffix in (".hea", ".dat"):
            shutil.copy2(cohort / f"{path}{suffix}", folder / f"{path}{suffix}")
    # What was finished, and had nothing unreadable, is not read again: it may even be gone.
    shards = [pq.read_table(shard) for shard in output.glob("*.parquet")]
    finished = [s["path"].to_pylist() for s in shards if not json.loads(s.schema.metadata[b"lsemvae"])["unreadable"]]
    for path in (path for paths in finished for path in paths):
        (folder / f"{path}.dat").unlink()
    workflow("ingest", *arguments)
    manifest = ShardedDataset.open(str(output)).manifest
    assert (manifest.records, manifest.unreadable) == (len(pd.read_csv(folder / "record_list.csv")), 0)


def test_an_interrupted_run_keeps_what_it_finished(ray_cluster, cohort: Path, shards: Path, tmp_path: Path):
    """As if the command had been killed before its manifest: shards that are there and whole are not made again."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    whole = ShardedDataset.open(str(shards)).manifest
    (folder / "manifest.json").unlink()
    absent, altered = [folder / shard.path for shard in whole.shards[-2:]]
    absent.unlink()
    content = bytearray(altered.read_bytes())
    content[len(content) // 3] ^= 255
    altered.write_bytes(content)
    (folder / f".{absent.name}.0.partial").write_bytes(b"PAR1")
    kept = {shard.path: (folder / shard.path).stat().st_mtime_ns for shard in whole.shards[:-2]}
    assert kept
    arguments = ("--output", folder, "--shard-records", 48, "--val-share", 0.2)
    workflow("ingest", "--source", cohort, *arguments)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert ShardedDataset.open(str(folder)).manifest == whole
    ShardedDataset.open(str(folder)).verify()

    altered.write_bytes(content)
    noticed = workflow("ingest", "--source", cohort, *arguments, check=False)
    assert noticed.returncode == 2 and f"{altered.name} is not what was ingested" in noticed.stderr


def test_ingests_into_one_output_at_once(ray_cluster, cohort: Path, tmp_path: Path):
    """Two equal ones and another: one data set results, and whoever wanted another one is told."""
    folder = tmp_path / "shards"
    command = [sys.executable, str(ROOT / "workflows" / "ingest.py"), "--source", str(cohort), "--output", str(folder)]
    command += ["--shard-records", "16"]
    started = [
        subprocess.Popen(
            [*command, "--seed", seed], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in ("0", "0", "1")
    ]
    stderr = [process.communicate()[1] for process in started]
    ended = [process.returncode for process in started]
    assert ended in ([0, 0, 2], [2, 2, 0]), stderr
    for number, status in enumerate(ended):
        assert status == 0 or "already holds another data set" in stderr[number].splitlines()[-1]
    data = ShardedDataset.open(str(folder))
    data.verify()
    assert data.manifest.config["seed"] == (0 if ended[0] == 0 else 1)
    listed = pd.read_csv(cohort / "record_list.csv", dtype=str)["study_id"]
    assert sorted(data.read(["record_id"])["record_id"].to_pylist()) == sorted(listed)


def test_a_plan_stays_what_it_was():
    """The digest is in the names of shards on users' disks: another one would ingest everything again."""
    table = pd.DataFrame({"path": [f"p/{i}" for i in range(12)]})
    table["record_id"] = [str(i) for i in range(12)]
    table["subject_id"] = [f"s{i // 2}" for i in range(12)]
    table["label.ph"] = [0.0, 1.0, np.nan] * 4
    plan = make_plan(table, "folder", "/in", shard_records=4, val_share=0.3, seed=5)[2]
    assert plan == "c8818716f5e965fa"


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 5000))
def test_reads_are_bounded_over_the_cluster_and_every_cpu_has_a_task(reads: int, threads: int, cpus: int):
    of_task, at_once = divide_reads(reads, threads, cpus)
    assert 1 <= of_task <= threads and of_task * at_once <= reads
    assert at_once >= min(cpus, reads)


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=30, deadline=None)
def test_a_plan_has_every_recording_once_and_no_subject_in_two_splits(seed, recordings, shard_records, val_share):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"path": [f"p/{i}" for i in range(recordings)]})
    table["record_id"] = table["path"]
    table["subject_id"] = [f"s{i}" for i in rng.integers(0, 1 + recordings // 2, recordings)]
    table["label.ph"] = rng.choice([0.0, 1.0, np.nan], recordings)
    make = partial(
        make_plan, cohort="folder", source_uri="/in", seed=seed, shard_records=shard_records, val_share=val_share
    )
    ordered, tasks, plan = make(table)
    assert sorted(ordered["path"]) == sorted(table["path"])
    assert [task.start for task in tasks] == [0, *(task.stop for task in tasks[:-1])]
    assert tasks[-1].stop == recordings and max(task.stop - task.start for task in tasks) <= shard_records
    subjects = {split: set() for split in ("train", "val")}
    for task in tasks:
        subjects[task.split] |= set(ordered["subject_id"][task.start : task.stop])
    assert not subjects["train"] & subjects["val"]
    assert bool(subjects["val"]) == (val_share > 0)

    shuffled = table.sample(frac=1, random_state=seed % 1000)
    again, same_tasks, same_plan = make(shuffled)
    assert (same_plan, same_tasks) == (plan, tasks)
    pd.testing.assert_frame_equal(again, ordered)
    table.loc[0, "label.ph"] = 2.0
    assert make(table)[2] != plan


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
        (["--source", "{cohort}", "--max-unreadable", "5"], "max_unreadable=5"),
        (["--source", "{twice}"], "1 recordings have the id of another"),
        (["--source", "{cohort}", "--cohort", "ludb"], "lacks a table of the cohort ludb"),
        (["--source", "{cohort}", "--echo-days", "30"], "--echo-days and --echo-columns are for mimic-iv-echo only"),
        (["--source", "{cohort}", "--echo-columns", "speed=v"], "--echo-columns is speed=v: give pairs such as"),
    ],
)
def test_mistakes_are_one_line_and_status_2(ray_cluster, cohort, tmp_path, arguments, says):
    source = tmp_path / "in"
    source.mkdir()
    (source / "odd.csv").write_text("who,ph\na,1\n")
    twice = tmp_path / "twice"  # a PTB-XL whose table has one recording in two rows
    (twice / "records").mkdir(parents=True)
    shutil.copy(next(cohort.rglob("*.hea")), twice / "records" / "1_hr.hea")
    (twice / "scp_statements.csv").write_text(",diagnostic,rhythm,diagnostic_class\nNORM,1,,NORM\n")
    row = "1,7,{'NORM': 100.0},records/1_hr,\n"
    (twice / "ptbxl_database.csv").write_text("ecg_id,patient_id,scp_codes,filename_hr,heart_axis\n" + row + row)
    filled = [argument.format(tmp=source, cohort=cohort, twice=twice) for argument in arguments]
    done = workflow("ingest", *filled, "--output", tmp_path / "out", check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_from_s3_and_to_s3(ray_cluster, s3: str, cohort: Path):
    """Against a mock of S3, which lets anybody in; tests/test_object_store.py has a production server."""
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
    own = f"s3://ecg/mimic?anonymous=true&endpoint={s3}"  # without an endpoint it would go to AWS
    anonymous = ("--source", own, "--output", "s3://ecg/anonymous", "--limit", 3)
    assert "3 recordings" in workflow("ingest", *anonymous).stdout
    absent = workflow("ingest", "--source", "s3://nobody/x", "--output", "s3://ecg/y", check=False)
    assert absent.returncode == 2 and len(absent.stderr.strip().splitlines()) == 1, absent.stderr


def test_echonext_from_its_large_files(ray_cluster, tmp_path: Path):
    measured = {0: {"pasp_value": 50, "pasp_gte_45_flag": 1}, 1: {"pasp_value": 30}}
    arrays = write_echonext(tmp_path / "in", rows(measured=measured))
    done = workflow("ingest", "--source", tmp_path / "in", "--output", tmp_path / "out", "--shard-records", 5)
    assert "echonext: 12 recordings of 6 subjects" in done.stdout and "left out" not in done.stdout
    assert "label pasp_ge_45: 1 at 0, 1 at 1, 0 at other values, 10 absent" in done.stdout
    assert "no_millivolts 12" in done.stdout
    assert "12 recordings are no millivolts" in (tmp_path / "out" / "report.html").read_text()
    stored = {row["path"]: row for row in all_rows(tmp_path / "out")}
    for split, values in arrays.items():
        for number, value in enumerate(values):
            signal_mv_LT = unpack(stored[f"EchoNext_{split}_waveforms.npy#{number}"]).signal_mv_LT
            np.testing.assert_allclose(signal_mv_LT, value[0].T * NOMINAL_MV, atol=np.abs(value).max() / 2**15)


def test_mimic_iv_echo_with_names_of_its_own(ray_cluster, cohort: Path, tmp_path: Path):
    source = tmp_path / "in"
    shutil.copytree(cohort, source)
    ecgs = pd.read_csv(cohort / "record_list.csv", dtype=str).drop_duplicates("subject_id").head(3)
    days = pd.to_timedelta([10, -10, 40], unit="D")
    times = (pd.to_datetime(ecgs["ecg_time"]) + days).astype(str)
    studies = zip(ecgs["subject_id"], times, ("3.4", "2.0", "4.0"), strict=True)
    measured = [(subject, time, "TR Vmax", value, "m/s") for subject, time, value in studies]
    (source / "structured_measurement.csv").write_text(measurements_csv(measured).replace("result", "finding"))
    options = ("--echo-days", 30, "--echo-columns", "value=finding", "tr_velocity=TR Vmax")
    done = workflow("ingest", "--source", source, "--output", tmp_path / "out", *options)
    assert "mimic-iv-echo: " in done.stdout
    found = {row["record_id"]: row["label.tr_velocity_ge_3_2"] for row in all_rows(tmp_path / "out")}
    assert [found[study] for study in ecgs["study_id"]] == [1, 0, None]


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
