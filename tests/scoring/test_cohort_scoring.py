"""Whole cohorts, by command and over HTTP: each recording is scored once, also with killed or concurrent commands."""

import contextlib
import csv
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import score
import servers
import yaml
from cohort import TOO_MANY_UNREADABLE, describe_model
from fastapi import HTTPException
from support import parts
from support.bundles import save
from support.cardiosoft_files import document, strip
from support.session import ROOT, Cluster, end_serve, wait_for, workflow

from lsemvae.bundle import Scorer
from lsemvae.data.shards import MANIFEST, Manifest, Shard, pack, shard_bytes
from lsemvae.errors import BundleError, LsemvaeError, StorageError
from lsemvae.formats import read
from lsemvae.leads import LEADS
from lsemvae.quality import quality_flags
from lsemvae.scoring import inputs, progress
from lsemvae.scoring.inputs import open_recordings, open_shards
from lsemvae.scoring.output import JOB, SUMMARY, claim, commit, finished
from lsemvae.scoring.parts import Failure, PartMaker, finished_part
from lsemvae.scoring.progress import Progress
from lsemvae.scoring.scores import SCORES
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.storage import Storage
from lsemvae.tracking import Run, promote
from serve.cohorts import PREFIXES, allowed, choose

WITHDRAWN, TRUNCATED, FLAT = "1000003", "1000004", "1000005"
REPEATED = "1000006"
SCORE = ROOT / "workflows" / "score.py"


def xml(seed: int) -> bytes:
    signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=seed % 5 / 4), np.random.default_rng(seed))
    return document(
        strip({lead: np.rint(row * 200).astype(int).tolist() for lead, row in zip(LEADS, signal_mv_LT, strict=True)})
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Untrained models of 12 and of 6 leads."""
    folder = tmp_path_factory.mktemp("bundles")
    for count in (12, 6):
        save(folder / f"ph-{count}L", leads=LEADS[:count])
    return {count: folder / f"ph-{count}L" for count in (12, 6)}


@pytest.fixture(scope="module")
def ukb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 participants of UK Biobank's field 20205: more than one part."""
    folder = tmp_path_factory.mktemp("ukb")
    different = [xml(seed) for seed in range(12)]
    for number in range(300):
        (folder / f"{1000001 + number}_20205_2_0.xml").write_bytes(different[number % len(different)])
    (folder / f"{REPEATED}_20205_3_0.xml").write_bytes(different[0])
    (folder / f"{REPEATED}_20205_2_1.xml").write_bytes(different[0])
    (folder / f"{TRUNCATED}_20205_2_0.xml").write_bytes(different[0][:5000])
    (folder / f"{FLAT}_20205_2_0.xml").write_bytes(document(strip(dict.fromkeys(LEADS, [7] * 5000))))
    (folder / "withdrawn.csv").write_text(f"{WITHDRAWN}\n")
    return folder


@pytest.fixture
def few(ukb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first twelve of them, in parts of five."""
    monkeypatch.setattr(inputs, "PART_RECORDS", 5)
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(ukb.iterdir()):
        if path.name == "withdrawn.csv" or path.name < "1000013":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


job_for = partial(parts.job_for, product=SCORES)
made = parts.made


def ukb_source(folder: Path) -> inputs.Recordings:
    return open_recordings(str(folder), "auto", None, None, threads=2)


# --- one process, no Ray -------------------------------------------------------------------------------------


def test_rows_are_what_reader_and_scorer_say_of_each_file(few: Path, bundles: dict[int, Path], tmp_path: Path):
    job = job_for(bundles[6], ukb_source(few), tmp_path / "out")
    rows, said = made(job)
    assert [row["subject_id"] for row in rows] == [str(n) for n in range(1000001, 1000013) if str(n) != WITHDRAWN]
    assert [row["record_id"] for row in rows] == [f"{row['subject_id']}_20205_2_0" for row in rows]
    scorer = Scorer(bundles[6])
    for row in rows:
        path = few / f"{row['record_id']}.xml"
        if row["subject_id"] == TRUNCATED:
            assert (row["refused"], row["score"], row["decision"]) == ("xml", None, None) and row["reason"]
            continue
        record = read(path)
        (answer,) = scorer.score([record])
        assert row["flags"] == ",".join(quality_flags(record))
        if row["subject_id"] == FLAT:
            assert (row["refused"], row["score"]) == ("leads", None) and "0 of 6" in row["reason"]
            continue
        assert row["score"] == pytest.approx(answer.score, abs=1e-6)
        assert row["probability"] == pytest.approx(answer.probability, abs=1e-6)
        assert row["decision"] == answer.decision and row["leads_used"] == ",".join(answer.leads_used)
        bundle = scorer.bundle
        assert (row["digest"], row["preprocess_digest"]) == (bundle.digest, bundle.preprocess.digest)
        assert (row["model"], row["version"]) == ("ph-6L", None)
    assert sum(part["unreadable"] for part in said) == 1
    assert {key for part in said for key in part["refused"]} == {"xml", "leads"}


def write_shards(folder: Path, paths: list[Path], size: int) -> Path:
    shards = []
    for start in range(0, len(paths), size):
        records = [read(path) for path in paths[start : start + size]]
        rows = [pack(record, flags=quality_flags(record)) for record in records]
        content = shard_bytes(rows, [], {"plan": "p", "rows": len(rows), "unreadable": [], "flags": {}})
        name = f"train-{start:05d}.parquet"
        Storage.open(folder).write_bytes(name, content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(name, "train", len(rows), len(content), digest))
    manifest = Manifest("made up", "folder", "p", len(paths), len(paths), 2, {}, shards)
    Storage.open(folder).write_bytes(MANIFEST, manifest.to_json().encode())
    return folder


def test_shards_and_recordings_give_the_same_scores(few: Path, bundles: dict[int, Path], tmp_path: Path):
    source = ukb_source(few)
    names = [path for path in source.table["path"].to_pylist() if not path.startswith(TRUNCATED)]
    shards = open_shards(str(write_shards(tmp_path / "shards", [few / name for name in names], size=4)))
    assert (len(shards.parts), shards.records, shards.unreadable_before) == (3, 10, 2)
    direct = [row for row in made(job_for(bundles[12], source, tmp_path / "a"))[0] if row["subject_id"] != TRUNCATED]
    by_shard = made(job_for(bundles[12], shards, tmp_path / "b"))[0]
    for one, other in zip(direct, by_shard, strict=True):
        for row in (one, other):
            row["score"] = row["score"] and round(row["score"], 6)
            row["probability"] = row["probability"] and round(row["probability"], 6)
        assert other.pop("subject_id") == other["record_id"]  # here the shards were made without the cohort's rules
        assert one.pop("subject_id") == one["record_id"].split("_")[0] and one == other


def test_missing_and_derived_leads_stand_beside_each_score(bundles: dict[int, Path], tmp_path: Path):
    """A model of 12 leads gives recordings of two leads other scores: whoever reads the table must see why."""
    folder = tmp_path / "in"
    folder.mkdir()
    signal_mv_LT, _ = simulate_ecg(EcgParameters(), np.random.default_rng(3))
    for name, leads in (("two", ("I", "II")), ("twelve", LEADS)):
        rows = signal_mv_LT[: len(leads)].T.round(3)
        text = "\n".join(",".join(f"{value:.3f}" for value in row) for row in rows)
        (folder / f"{name}.csv").write_text(f"# rate_hz: 500\n# unit: mV\n{','.join(leads)}\n{text}\n")
    source = open_recordings(str(folder), "auto", None, None, threads=1)
    shards = open_shards(str(write_shards(tmp_path / "shards", sorted(folder.iterdir(), reverse=True), size=4)))
    for name, chosen in (("source", source), ("shards", shards)):
        job = job_for(bundles[12], chosen, tmp_path / name)
        rows, said = made(job)
        by_name = {row["record_id"]: row for row in rows}
        assert by_name["twelve"]["leads_missing"] == by_name["twelve"]["leads_derived"] == ""
        two = by_name["two"]
        assert (two["leads_derived"], two["leads_missing"]) == ("III,aVR,aVL,aVF", "V1,V2,V3,V4,V5,V6")
        assert two["reliability"] == "limited"
        assert "Missing of the model's 12 leads: V1, V2, V3, V4, V5, V6." in two["reliability_reasons"]
        assert "Computed from I and II, not measured: III, aVR, aVL, aVF." in two["reliability_reasons"]
        summary = commit(job, {"plan": job.plan, "model": "ph-12L"}, [part["sha256"] for part in said])
        with (tmp_path / name / "scores-plan.csv").open() as stream:
            written = {row["record_id"]: row for row in csv.DictReader(stream)}
        assert written["two"]["leads_missing"] == two["leads_missing"] and written["two"]["reliability"] == "limited"
        assert summary["limited"] == sum(row["reliability"] == "limited" for row in rows)


def test_unreadable_recordings_are_counted_apart_from_refused_ones(few: Path, bundles: dict[int, Path], tmp_path: Path):
    job = job_for(bundles[6], ukb_source(few), tmp_path / "out")
    digests = [part["sha256"] for part in made(job)[1]]
    summary = commit(job, {"plan": job.plan, "model": "ph-6L"}, digests)
    assert summary["refused"] == {"leads": 1, "xml": 1}  # everything without a score
    assert (summary["unreadable"], summary["unreadable_codes"]) == (1, {"xml": 1})


def test_who_withdraws_after_ingest_gets_no_score(few: Path, bundles: dict[int, Path], tmp_path: Path):
    paths = sorted(few.glob("*.xml"))[:6]
    folder = write_shards(tmp_path / "shards", [path for path in paths if not path.name.startswith(TRUNCATED)], size=2)
    before = open_shards(str(folder))
    ids = [row["subject_id"] for row in made(job_for(bundles[6], before, tmp_path / "a"))[0]]
    assert len(ids) == before.records
    (folder / "withdrawn.csv").write_text("\n".join(ids[1:4]))  # all of the second shard among them
    after = open_shards(str(folder))
    rows, said = made(job_for(bundles[6], after, tmp_path / "b"))
    assert [row["subject_id"] for row in rows] == [ids[0], *ids[4:]]
    assert after.records == len(rows) == sum(part["records"] for part in said)
    assert after.digest != before.digest  # scores of the others are never put beside those with them


def test_a_part_is_made_once_and_again_only_where_something_changed(few: Path, bundles, tmp_path: Path):
    job = job_for(bundles[6], ukb_source(few), tmp_path / "out")
    rows, said = made(job)
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    before = {path: path.read_bytes() for path in parts}
    assert len(parts) == 3
    assert [part["made"] for part in made(job)[1]] == [0, 0, 0]

    parts[2].write_bytes(before[parts[2]][:-300])  # cut off
    damaged = bytearray(before[parts[1]])
    damaged[len(damaged) // 4] ^= 0xFF  # within the data: a page's checksum tells
    parts[1].write_bytes(damaged)
    assert finished_part(job, "parts/" + parts[1].name) is None
    assert [part["made"] for part in made(job)[1]] == [0, 5, 1]
    assert {path: path.read_bytes() for path in parts} == before  # the same bytes

    source = few / f"{TRUNCATED}_20205_2_0.xml"
    source.write_bytes(xml(0))  # mended
    again, said = made(job)
    assert [part["made"] for part in said] == [5, 0, 0] and sum(part["unreadable"] for part in said) == 0
    mended = [row for row in again if row["subject_id"] == TRUNCATED]
    assert mended[0]["score"] is not None and again[4:] == rows[4:]


def test_a_shard_that_is_not_what_was_ingested_is_refused(few: Path, bundles, tmp_path: Path):
    names = ["1000001_20205_2_0.xml", "1000002_20205_2_0.xml"]
    folder = write_shards(tmp_path / "shards", [few / name for name in names], size=4)
    (shard,) = folder.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1] + b"X")
    said = PartMaker(job_for(bundles[6], open_shards(str(folder)), tmp_path / "out"))({"number": 0})
    failure = Failure(**json.loads(said["result"]))
    assert "is not what was ingested" in str(failure.error())
    assert str(failure.error()).endswith("the same command fails until this is mended")
    assert not (tmp_path / "out").exists()


def test_a_place_that_fails_is_no_unreadable_recording_and_its_message_names_nobody(few: Path, bundles, tmp_path):
    source = ukb_source(few)
    path = few / "1000007_20205_2_0.xml"
    path.unlink()
    path.symlink_to(path)  # a loop: neither there nor absent
    said = json.loads(PartMaker(job_for(bundles[6], source, tmp_path / "out"))({"number": 1})["result"])
    assert str(few) in said["failure"] and "1000007" not in said["failure"]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (StorageError("the store does not answer"), "give the same command again to continue"),
        (ConnectionResetError("the server closed the connection"), "give the same command again to continue"),
        (StorageError("access denied", passing=False), "the same command fails until this is mended"),
        (BundleError("config.json is altered: fetch it again"), "the same command fails until this is mended"),
        (OSError(28, "No space left on device"), "the same command fails until this is mended"),
    ],
)
def test_only_what_may_pass_is_worth_another_try(error: LsemvaeError | OSError, end: str):
    said = str(Failure.of(error).error())
    assert said.startswith(str(error)) and said.endswith(end)


def test_duplicates_are_refused(tmp_path: Path):
    row = {"subject_id": "1", "study_id": "7", "file_name": "7", "ecg_time": "", "path": "files/p1/s7/7"}
    pd.DataFrame([row, row | {"path": "files/p2/s7/7"}]).to_csv(tmp_path / "record_list.csv", index=False)
    with pytest.raises(LsemvaeError, match="a study twice"):
        open_recordings(str(tmp_path), "mimic-iv-ecg", None, None, 1)


def test_the_labels_decide_who_belongs_to_a_cohort(few: Path, tmp_path: Path):
    (tmp_path / "who.csv").write_text(f"eid,instance\n{REPEATED},3\n1000008,2\n{WITHDRAWN},2\n")
    source = open_recordings(str(few), "ukb-20205", str(tmp_path / "who.csv"), None, 1)
    assert source.table["record_id"].to_pylist() == [f"{REPEATED}_20205_3_0", "1000008_20205_2_0"]
    assert source.digest != ukb_source(few).digest  # another cohort is another plan


def test_of_two_models_that_take_an_output_at_the_same_moment_one_has_it(tmp_path: Path):
    output = Storage.open(tmp_path)
    first = {"plan": "a", "model": "m", "version": 1, "digest": "d1", "input": "x"}
    second = first | {"plan": "b", "version": 2, "digest": "d2"}
    claim(output, first)
    output.write_bytes(JOB, json.dumps(second).encode())  # it looked before the first had written
    with pytest.raises(LsemvaeError, match=r"digest d2.*choose another --output"):
        claim(output, first)
    claim(output, second)
    output.write_bytes(SUMMARY, json.dumps(first).encode())  # … and finished before it heard
    with pytest.raises(LsemvaeError, match="holds scores of m version 1"):
        claim(output, second)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"digest": "d2"}, "holds scores of m version 1 .* this is m version 1 .digest d2"),
        ({"input_digest": "i2"}, "whose recordings were others"),
        ({"holds": "explanations", "settings": {}}, "holds scores of .* and no explanations"),
    ],
)
def test_a_refusal_says_what_differs(changed: dict, says: str, tmp_path: Path):
    about = {"plan": "a", "model": "m", "version": 1, "digest": "d1", "input": "x", "input_digest": "i1"}
    claim(Storage.open(tmp_path), about)
    with pytest.raises(LsemvaeError, match=f"{says}.*choose another --output"):
        claim(Storage.open(tmp_path), about | {"plan": "b"} | changed)


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    output = Storage.open(tmp_path)
    with contextlib.suppress(KeyError), output.writing("scores.csv") as stream:
        stream.write(b"half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with output.writing("scores.csv") as stream:
        stream.write(b"all")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"all"]


ABOUT = {"plan": "a"}


def test_a_command_waits_for_one_that_lives_and_not_for_one_that_is_dead(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "BEAT_S", 0.1)
    output = Storage.open(tmp_path)
    first = Progress(output, ABOUT, 10).__enter__()

    def stop_when_waited_for() -> None:
        while "another command writes to" not in caplog.text:
            time.sleep(0.01)
        first.stop("done")

    threading.Thread(target=stop_when_waited_for, daemon=True).start()
    with Progress(output, ABOUT, 10):
        assert first._stopped.is_set()

    def left_behind(owner: str) -> None:
        output.write_bytes(progress.PROGRESS, json.dumps({"owner": owner, "beat": 3, "state": "running"}).encode())

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_behind(f"{socket.gethostname()}:{ended.pid}:00")
    caplog.clear()
    with Progress(output, ABOUT, 10):
        assert "another command" not in caplog.text  # it did not wait
    monkeypatch.setattr(progress, "SILENT_S", 1.0)
    left_behind("elsewhere:1:00")
    began = time.monotonic()
    with Progress(output, ABOUT, 10):
        assert time.monotonic() - began > 1.0
    assert json.loads((tmp_path / progress.PROGRESS).read_text())["state"] == "done"


def test_a_command_ends_when_another_has_taken_its_place(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    part = {"records": 1, "made": 1, "scored": 1, "unreadable": 0, "refused": {}}
    part |= {"unreadable_codes": {}, "began": 1.0, "ended": 2.0}
    output = Storage.open(tmp_path)
    with Progress(output, ABOUT, 4) as mine:
        mine.add(part)
        other = {"owner": "elsewhere:1:00", "beat": 1, "state": "running"}
        while mine._thread.is_alive():  # a beat that has just read the file may write over the other's once
            output.write_bytes(progress.PROGRESS, json.dumps(other).encode())
            time.sleep(0.02)
        with pytest.raises(LsemvaeError, match="it goes on, this one ends"):
            mine.add(part)
    assert json.loads((tmp_path / progress.PROGRESS).read_text()) == other  # it is not written over


# --- what the endpoint lets in -------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in-evil").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "in" / "inner").symlink_to(tmp_path / "in" / "deep")
    monkeypatch.setenv(PREFIXES, f" {tmp_path}/in/ , s3://bucket/cohorts")
    return tmp_path


@pytest.mark.parametrize(
    "uri",
    ["{tmp}/in", "{tmp}/in/", "{tmp}/in/deep/new", "{tmp}/in/inner", "s3://bucket/cohorts/a b/x-1.2", "s3://bucket/cohorts"],
)  # fmt: skip
def test_places_below_a_prefix_are_allowed(places: Path, uri: str):
    assert allowed(uri.format(tmp=places), "input").uri == uri.format(tmp=places).rstrip("/")


@pytest.mark.parametrize(
    "uri",
    [
        "{tmp}", "{tmp}/secret", "{tmp}/in-evil", "{tmp}/in/../secret", "{tmp}/in/./deep", "{tmp}/in/%2e%2e/secret",
        "{tmp}/in/deep/../../secret", "{tmp}/in/link", "{tmp}/in/link/x", "{tmp}/in//deep", "/{tmp}/in", "file://{tmp}/in",
        "in", "~/in", "s3://bucket/cohorts-evil", "s3://bucket", "s3://bucket/", "s3://bucket/cohorts/../x",
        "s3://bucket/cohorts/%2e%2e/x", "s3://bucket/cohorts?endpoint=http://evil", "s3://bucket/cohorts/x?anonymous=true",
        "s3://bucket/cohorts#x", "S3://bucket/cohorts", "s3://user@bucket/cohorts", "s3://bucket/cohorts\n", "s3://bucket/cohorts/\0",
        "s3://bucket/cohorts/..\\x", "s3://bucket/cohorts/$(id)", "http://bucket/cohorts", "s3://evil/s3://bucket/cohorts",
        "{tmp}/in/s3://bucket", "",
    ],
)  # fmt: skip
def test_places_anywhere_else_are_refused(places: Path, uri: str):
    with pytest.raises(HTTPException) as refused:
        allowed(uri.format(tmp=places), "input")
    assert refused.value.status_code == 403 and str(places) not in refused.value.detail


def test_without_prefixes_nothing_is_allowed(places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PREFIXES, " ,")
    with pytest.raises(HTTPException, match="403: cohorts are switched off: set LSEMVAE_COHORT_PREFIXES="):
        allowed(f"{places}/in", "input")


def test_the_choice_of_a_model():
    def model(name: str, leads: int, version: int | None = 3) -> SimpleNamespace:
        return SimpleNamespace(described=SimpleNamespace(name=name, leads=LEADS[:leads], version=version))

    served = {"a": model("a", 12), "b": model("b", 6), "c": model("c", 6), "d": model("d", 3, version=None)}
    assert choose(served, None, None).name == choose(served, None, 12).name == choose(served, "a", None).name == "a"
    assert choose(served, "c", 6).name == "c"
    for name, leads, says in (
        ("e", None, r"there is a \(12 leads\)"), ("a", 6, "no such model"), (None, 6, "name one"),
        ("d", None, "served from a folder"),
    ):  # fmt: skip
        with pytest.raises(HTTPException, match=says):
            choose(served, name, leads)
    with pytest.raises(HTTPException, match="there is none"):
        choose({}, None, None)


# --- the command, on Ray -------------------------------------------------------------------------------------


def results(output: Path) -> dict[str, bytes]:
    """Everything but progress.json, which has times in it, and what a killed command may leave hidden."""
    paths = [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths if path.name != progress.PROGRESS}


def start(*arguments: object, command: Sequence[object] = (sys.executable, SCORE)) -> subprocess.Popen:
    words = [*map(str, command), *map(str, arguments)]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def whole(ray_cluster: Cluster, ukb: Path, bundles, tmp_path_factory) -> tuple[Path, list[tuple[int, str, str]]]:
    """The cohort scored by two commands that are given at the same moment -> output, and how each ended."""
    output = tmp_path_factory.mktemp("whole") / "out"
    both = [start("--model", bundles[6], "--source", ukb, "--output", output) for _ in range(2)]
    ends = [process.communicate() for process in both]
    return output, [(process.returncode, *end) for process, end in zip(both, ends, strict=True)]


@pytest.mark.ray
def test_two_commands_at_once_make_one_result(whole, ukb: Path):
    output, ends = whole
    assert all(code == 0 or "this one ends" in err for code, _, err in ends), ends
    assert any(code == 0 for code, _, _ in ends), ends
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["records"], summary["scored"], summary["unreadable"]) == (299, 297, 1)
    assert summary["refused"] == {"leads": 1, "xml": 1}
    assert sum(summary["distribution"]["histogram"]) == 297
    parquet, table = (output / name for name in summary["files"])
    rows = pq.read_table(parquet).to_pylist()
    expected = [str(n) for n in range(1000001, 1000301) if str(n) != WITHDRAWN]
    assert [row["subject_id"] for row in rows] == expected  # each participant once, the withdrawn one not at all
    with table.open(newline="") as stream:
        as_text = list(csv.DictReader(stream))
    for row, text in zip(rows, as_text, strict=True):
        assert (row["record_id"], row["digest"], row["reason"] or "") == (
            text["record_id"],
            text["digest"],
            text["reason"],
        )
        assert text["score"] == "" if row["score"] is None else float(text["score"]) == row["score"]
        assert text["decision"] == {None: "", True: "true", False: "false"}[row["decision"]]
    printed = next(out for code, out, _ in ends if code == 0)
    assert "297 scored" in printed and "not a medical device" in printed
    assert "1 refused by the model's preprocessing (leads 1), 1 unreadable (xml 1)" in printed
    for _, out, err in ends:
        assert TRUNCATED not in out + err and WITHDRAWN not in out + err  # nobody is named


@pytest.mark.ray
def test_killed_and_given_again_it_ends_with_the_same_bytes(whole, ray_cluster, ukb: Path, bundles, tmp_path: Path):
    output = tmp_path / "out"
    arguments = ("--model", bundles[6], "--source", ukb, "--output", output)
    process = start(*arguments, command=[sys.executable, ROOT / "tests" / "support" / "watched.py", "score"])
    while not list(output.glob("parts/*.parquet")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "summary.json").exists()
    for path in output.glob("**/*.parquet"):  # what can be seen is whole
        assert pq.read_table(path).num_rows
    kept = {path: path.stat().st_mtime_ns for path in output.glob("parts/*.parquet")}
    done = workflow("score", *arguments)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "another command" not in done.stdout  # of a dead one nothing is expected
    assert results(output) == results(whole[0])
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "is complete: nothing to do" in workflow("score", *arguments).stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    plan = json.loads((output / "summary.json").read_text())["plan"]
    assert finished(Storage.open(output), plan)
    (table,) = output.glob("*.csv")
    table.write_bytes(table.read_bytes()[:-10])  # damaged afterwards: it is made again from the parts
    assert finished(Storage.open(output), plan) is None


@pytest.mark.ray
def test_scores_of_another_model_or_of_other_recordings_are_refused(whole, ukb: Path, bundles, tmp_path: Path):
    shards = write_shards(tmp_path / "shards", [ukb / "1000001_20205_2_0.xml"], size=1)
    before = results(whole[0])
    for model, source, says in (
        (bundles[12], {"source": str(ukb)}, "this is ph-12L"),
        (bundles[6], {"source": str(ukb), "limit": 5}, "whose recordings were others"),
        (bundles[6], {"data": str(shards)}, "whose recordings were others"),
    ):
        with pytest.raises(LsemvaeError, match=rf"holds scores of ph-6L .*{says}.*choose another --output"):
            score.main(score.Args(model=str(model), output=str(whole[0]), **source))
    assert results(whole[0]) == before


@pytest.mark.ray
def test_above_the_error_rate_it_stops_with_status_3_and_goes_on_when_mended(ray_cluster, bundles, tmp_path: Path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(6):
        (source / f"r{number}.xml").write_bytes(xml(number) if number else b"<CardiologyXML>")
    arguments = ("--model", bundles[6], "--source", source, "--output", output, "--max-unreadable", 0.1)
    stopped = workflow("score", *arguments, check=False)
    assert stopped.returncode == TOO_MANY_UNREADABLE
    assert "1 of 6 recordings are unreadable" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not list(output.glob("scores-*")) and not (output / "summary.json").exists()
    (source / "r0.xml").write_bytes(xml(0))
    workflow("score", *arguments)
    assert json.loads((output / "summary.json").read_text())["scored"] == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "either --data (shards) or --source"),
        (("--data", "x", "--source", "y"), "either --data (shards) or --source"),
        (("--source", "{tmp}/nowhere"), "does not exist"),
        (("--source", "{tmp}", "--cohort", "nobody"), "there is no cohort 'nobody'"),
        (("--source", "{tmp}"), "has no recordings"),
        (("--source", "{tmp}", "--max-unreadable", "2"), "give a share"),
        (("--source", "{tmp}", "--digest", "0123"), "not 0123: nothing is scored"),
    ],
)
def test_mistakes_are_one_line_and_status_2(bundles, tmp_path: Path, arguments, says, monkeypatch, capsys):
    words = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["score.py", "--model", str(bundles[6]), "--output", f"{tmp_path}/out", *words])
    with pytest.raises(SystemExit) as ended:
        score.run_command(score.main, score.Args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


# --- over HTTP -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(ray_cluster: Cluster, bundles, ukb: Path, tmp_path_factory) -> Iterator[httpx.Client]:
    """`serve run` of serve/config.yaml with the untrained 6-lead model, and cohorts below one folder."""
    run = Run.start("cohorts", "untrained", {})
    run.bundle(bundles[6])
    run.register("cohort-6L", {"digest": describe_model(str(bundles[6]), None)[1]["digest"]})
    run.end()
    promote("cohort-6L")
    folder = tmp_path_factory.mktemp("cohorts")
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = servers.free_port()
    application = config["applications"][0] | {"name": f"cohorts-{port}"}
    config["applications"] = [application]
    application["args"] |= {"models": ["models:/cohort-6L@champion"], "bundles": str(folder), "allow_anonymous": True}
    application["runtime_env"] = {"env_vars": {PREFIXES: f"{ukb},{folder}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "config.yaml")]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
    wait_for(f"http://127.0.0.1:{port}/readyz", process, log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.folder, client.application = folder, application["name"]
        yield client
    end_serve(process)


def until(client: httpx.Client, job_id: str, *states: str) -> dict:
    while (answer := client.get(f"/v1/cohorts/{job_id}")).status_code in (200, 502, 503):
        if answer.status_code == 200 and answer.json()["status"] in states:
            return answer.json()
        time.sleep(0.3)
    pytest.fail(answer.text)


def replica_pids(application: str) -> list[int]:
    """By the title that Ray gives them, which holds the application's name: no other run on this machine has it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ray::ServeReplica:{application}:".encode()):
                found.append(int(path.parent.name))
    return found


@pytest.mark.ray
def test_a_cohort_over_http_outlives_the_replica_that_started_it(service: httpx.Client, ukb: Path, whole):
    asked = {"input": str(ukb), "output": str(service.folder / "scores"), "leads": 6}
    started = service.post("/v1/cohorts", json=asked)
    assert started.status_code == 202, started.text
    job_id = started.json()["id"]
    assert (started.json()["model"], started.json()["version"]) == ("cohort-6L", 1)
    assert service.post("/v1/cohorts", json=asked).json()["id"] == job_id  # the same request, the same job
    (pid,) = replica_pids(service.application)
    os.kill(pid, signal.SIGKILL)
    done = until(service, job_id, "done", "failed", "stopped")
    assert done["status"] == "done", done
    assert (done["records"], done["done"], done["scored"]) == (299, 299, 297)
    assert done["refused"] == {"leads": 1, "xml": 1} and done["records_per_s"] > 0
    (table,) = (service.folder / "scores").glob("scores-*.parquet")
    (alone,) = whole[0].glob("scores-*.parquet")
    by_job, by_command = pq.read_table(table), pq.read_table(alone)
    assert by_job["score"].equals(by_command["score"]) and set(by_job["version"].to_pylist()) == {1}
    again = service.post("/v1/cohorts", json=asked).json()
    assert (again["id"], again["status"]) == (job_id, "done")
    assert TRUNCATED not in json.dumps(done)


@pytest.mark.ray
def test_a_cohort_is_stopped_and_goes_on(service: httpx.Client, ukb: Path):
    asked = {"input": str(ukb), "output": str(service.folder / "stopped")}
    job_id = service.post("/v1/cohorts", json=asked).json()["id"]
    assert service.delete(f"/v1/cohorts/{job_id}").status_code == 200
    assert until(service, job_id, "done", "failed", "stopped")["status"] == "stopped"
    assert service.post("/v1/cohorts", json=asked).json()["id"] == job_id
    assert until(service, job_id, "done", "failed")["status"] == "done"
    assert service.delete(f"/v1/cohorts/{job_id}").json()["status"] == "done"  # what has ended stays as it is


@pytest.mark.ray
def test_a_job_that_fails_says_why_and_what_is_not_allowed_is_refused(service: httpx.Client, ukb: Path, whole):
    folder = service.folder
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text("{}")
    failed = service.post("/v1/cohorts", json={"input": f"{folder}/broken", "output": f"{folder}/none"}).json()
    assert "has schema None" in until(service, failed["id"], "failed")["error"]
    for body, status, says in (
        ({"input": f"{folder}/../x", "output": f"{folder}/y"}, 403, "the input is not below"),
        ({"input": str(ukb), "output": str(whole[0])}, 403, "the output is not below"),
        ({"input": str(ukb), "output": str(ukb)}, 422, "are the same"),
        ({"input": f"{folder}/absent", "output": f"{folder}/y"}, 422, "does not exist"),
        ({"input": str(ukb), "output": f"{folder}/y", "model": "nobody"}, 422, "there is cohort-6L (6 leads)"),
        ({"input": str(ukb), "output": f"{folder}/y", "actors": 9}, 422, "extra"),
        ({"input": str(ukb)}, 422, "output"),
    ):
        answer = service.post("/v1/cohorts", json=body)
        assert answer.status_code == status and says in answer.text, answer.text
    assert service.get("/v1/cohorts/cohort-0123456789abcdef").status_code == 404
    assert service.get("/v1/cohorts/raysubmit_x").status_code == 422
    assert "/v1/cohorts/{job_id}" in service.get("/openapi.json").json()["paths"]
