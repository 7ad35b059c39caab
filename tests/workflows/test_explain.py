"""Explaining a cohort: rows, files, what is refused, and a command that is killed and given again."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import explain
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from support import parts
from support.bundles import SMALL, save
from support.labelled import write_labelled
from support.session import ROOT, workflow

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Scorer
from lsemvae.data.shards import MANIFEST, SCHEMA, unpack
from lsemvae.explain.attribution import Settings
from lsemvae.explain.checks import Effort
from lsemvae.explain.explainer import Explainer
from lsemvae.explain.reference import Reference
from lsemvae.explain.waves import WAVES
from lsemvae.leads import LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.reports.explained import checked, commit, drawn, file_name
from lsemvae.scoring import chosen, explaining
from lsemvae.scoring.inputs import open_recordings, open_shards, signals_of
from lsemvae.scoring.output import SUMMARY
from lsemvae.scoring.parts import Job
from lsemvae.scoring.progress import PROGRESS
from lsemvae.storage import Storage

COARSE = Settings(steps=4, bound=10.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier of the limb leads with windows of 5 s, and an encoder beside it."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    config = ClassifierConfig(encoder=replace(SMALL, samples=496), hidden=8)
    kept = PreprocessConfig(rate_hz=100, samples=496, window="all")
    classifier = build(config, LIMB_LEADS)
    bundles.save(Bundle.of(classifier, kept, task="ph", threshold=0.5), classifier, folder / "ph-6L")
    save(folder / "encoder", SMALL)
    return folder / "ph-6L"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 recordings of 12 subjects, in a shard of 16 and one of 8."""
    return write_labelled(tmp_path_factory.mktemp("labelled"), subjects=12)


# --- which recordings ----------------------------------------------------------------------------------------


def read_all(source: chosen.CohortInput) -> list[list[str]]:
    """The ids of the recordings of each part."""
    parts = range(len(source.parts))
    return [[read.record_id for chunk in source.chunks(n, LIMB_LEADS) for read in chunk] for n in parts]


def test_chosen_recordings_come_in_small_parts_with_their_labels(labelled: Path, tmp_path: Path):
    whole = open_shards(str(labelled))
    table = chosen.table_of(whole)
    rows = chosen.rows_of(table, ["r020", "r003", "r001", "r002", "r017"], "x")
    assert rows == [1, 2, 3, 17, 20]
    source = chosen.choose(whole, rows, ["ph", "age_years"], 2)
    assert read_all(source) == [["r001", "r002"], ["r003"], ["r017", "r020"]]  # no part has two shards
    assert (source.records, source.uri) == (5, whole.uri)
    (first,) = [read for chunk in source.chunks(1, LIMB_LEADS) for read in chunk]
    assert first.labels == {"ph": 1, "age_years": 41}
    (as_scored,) = [read for chunk in whole.chunks(0, LIMB_LEADS) for read in chunk if read.record_id == "r003"]
    np.testing.assert_array_equal(first.signal_mv_LT, as_scored.signal_mv_LT)
    digests = {chosen.choose(whole, some, names, 2).digest for some in (rows, rows[1:]) for names in ((), ("ph",))}
    assert len(digests) == 4


def test_who_withdraws_and_labels_that_change_after_ingest_count(labelled: Path, tmp_path: Path):
    for path in labelled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = chosen.choose(open_shards(str(tmp_path)), range(24), ["ph"], 8)
    (tmp_path / "withdrawn.csv").write_text("s001\n")
    (tmp_path / "labels.csv").write_text("record_id,ph\nr000,1\nr005,\n")
    whole = open_shards(str(tmp_path))
    table = chosen.table_of(whole)
    assert len(table) == 22 and "r002" not in set(table["record_id"])
    source = chosen.choose(whole, chosen.rows_of(table, ["r000", "r004", "r005", "r023"], "x"), ["ph"], 8)
    reads = [read for n in range(len(source.parts)) for chunk in source.chunks(n, LIMB_LEADS) for read in chunk]
    assert [(read.record_id, read.labels.get("ph")) for read in reads][:3] == [
        ("r000", 1),
        ("r004", None),
        ("r005", None),
    ]
    assert source.digest != before.digest


def test_a_sample_is_seeded_and_in_order():
    assert chosen.sample([5, 7], 3) == [5, 7]
    some = chosen.sample(range(100), 10)
    assert some == chosen.sample(range(100), 10) == sorted(set(some)) and len(some) == 10


def test_names_of_files_are_safe_and_tell_recordings_apart():
    ids = ["a/b", "a b", "a_b", "A_b", "../../etc/passwd", "..", "", "x" * 300, "x" * 301, "é", "ü", "con", "a\0b"]
    names = [file_name(record_id) for record_id in ids]
    assert len({name.lower() for name in names}) == len(ids)
    for name in names:
        assert len(name) < 60 and not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )
    assert file_name("r001").startswith("r001-")


# --- rows, in one process without Ray ------------------------------------------------------------------------


def job_for(model: Path, source: chosen.CohortInput, output: Path, asked: explaining.Asked) -> Job:
    return parts.job_for(model, source, output, explaining.explanations(bundles.describe(model).leads, asked))


made = parts.made


def test_rows_are_what_the_explainer_says(model: Path, labelled: Path, tmp_path: Path):
    whole = open_shards(str(labelled))
    asked = explaining.Asked(COARSE, "ph", explaining.people_in(chosen.table_of(whole).columns))
    job = job_for(model, chosen.choose(whole, [2, 3, 17], asked.labels, 2), tmp_path / "out", asked)
    rows, said = made(job)
    assert [row["record_id"] for row in rows] == ["r002", "r003", "r017"] and [part["made"] for part in said] == [2, 1]
    table = whole.data.read(SCHEMA.names).to_pylist()
    records = [unpack(row) for row in table if row["record_id"] in ("r002", "r003", "r017")]
    signals, rates = [r.signal_for(LIMB_LEADS) for r in records], [r.rate_hz for r in records]
    for row, explanation in zip(rows, Explainer(model, COARSE).explain_signals(signals, rates), strict=True):
        assert row["score"] == pytest.approx(explanation.score.score, abs=1e-6)
        assert row["windows"] == len(explanation.windows) == 2
        assert row["beats"] == sum(window.waves.beats for window in explanation.windows) > 8
        assert row["logit"] == pytest.approx(np.mean([window.logit for window in explanation.windows]), abs=1e-5)
        assert (row["steps"], row["baseline"], row["bound"]) == (4, "zero", 10.0)
        for at, lead in enumerate(LIMB_LEADS):
            for wave, name in enumerate(WAVES):
                for kind, shares_LW in zip(("signed", "absolute"), explanation.shares, strict=True):
                    assert row[f"{kind}.{lead}.{name}"] == pytest.approx(shares_LW[at, wave], abs=1e-4)
        assert sum(row[name] for name in row if name.startswith("absolute.")) == pytest.approx(1, abs=1e-5)
        subject = int(row["subject_id"][1:])
        assert (row["label"], row["female"], row["age_years"]) == (subject % 2, subject % 3 == 0, 40 + subject)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert [part["made"] for part in made(job)[1]] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_reference_is_a_sample_of_recordings_without_the_label(model: Path, labelled: Path, tmp_path: Path):
    args = explain.Args(str(model), str(tmp_path), data=str(labelled), baseline="expected")
    whole = args.open()
    reference, which = explain.reference_of(args, whole, "ph")
    reads = chosen.read_all(reference, LIMB_LEADS)
    assert len(reads) == 12 and all(int(read.subject_id[1:]) % 2 == 0 for read in reads)
    assert which == f"12 recordings of those whose label ph is 0 in {labelled} ({reference.digest})"
    everyone, which = explain.reference_of(args, whole, None)
    assert everyone.records == 16 and "whose label" not in which  # of 24
    assert explain.reference_of(replace(args, baseline="zero"), whole, "ph") == (None, None)

    asked = explaining.Asked(replace(COARSE, baseline="expected", references=3), reference=reference)
    job = job_for(model, chosen.choose(whole, [1], (), 32), tmp_path / "out", asked)
    ((row,), _) = made(job)
    (read,) = chosen.read_all(job.source, LIMB_LEADS)
    known = Reference.of_signals(*signals_of(reads), LIMB_LEADS, bundles.describe(model).preprocess)
    explainer = Explainer(model, asked.settings, reference=known)
    (direct,) = explainer.explain_signals([read.signal_mv_LT], [read.rate_hz])
    assert row["baseline"] == "expected"
    assert row["baseline_logit"] == pytest.approx(np.mean([w.baseline_logit for w in direct.windows]), abs=1e-5)
    assert row["signed.II.QRS"] == pytest.approx(direct.shares.signed_LW[1, WAVES.index("QRS")], abs=1e-4)


def test_recordings_are_explained_again_for_pictures_and_checks(model: Path, labelled: Path, tmp_path: Path):
    whole = open_shards(str(labelled))
    few = Effort(cell_s=2.5, layers=1, randomisations=1, random_orders=1, draws=20)
    asked = explaining.Asked(COARSE, igar=True, effort=few)
    job = job_for(model, chosen.choose(whole, [0, 5], (), 32), tmp_path / "out", asked)
    rows, _ = made(job)
    again = explaining.explain_again(job, asked, chosen.choose(whole, [5, 0], (), 1), job.source)
    assert list(again.shown) == ["r000", "r005"] and again.checks.records == 2
    for row in rows:
        assert row["score"] == pytest.approx(again.shown[row["record_id"]].score.score, abs=1e-6)
        assert sum(row[f"igar.{lead}"] for lead in LIMB_LEADS) == pytest.approx(1, abs=1e-5)
        peaks = [row[f"igar.II.{peak}"] for peak in ("P", "Q", "R", "S", "T")]
        assert sum(peaks) in (0, pytest.approx(1, abs=1e-5))
    assert explaining.explain_again(job, asked, None, None) == explaining.Again({}, None)
    broken = replace(job, uri=str(tmp_path / "nothing"))
    failure = explaining.explain_again(broken, asked, None, None)
    assert "does not exist" in failure.failure and not failure.passing


def test_records_are_listed_on_the_command_line_or_in_a_file(tmp_path: Path):
    (tmp_path / "ids.txt").write_text("r2\n\n r1,r3\nr2\n")
    assert explain.record_ids(str(tmp_path / "ids.txt")) == explain.record_ids(" r2 ,r1,r3,,r2") == ["r2", "r1", "r3"]
    assert explain.record_ids("x" * 5000) == ["x" * 5000]


def test_recordings_are_drawn_and_checked_as_asked():
    rows = pd.DataFrame({"record_id": ["a", "b", "c", "d"], "score": [0.1, 0.9, 0.9, 0.4]})
    assert drawn(rows, [], 3) == ["b", "c", "d"] and drawn(rows, [], 0) == []
    assert drawn(rows, ["d", "refused", "a", "b"], 2) == ["d", "a"]
    assert checked(rows, 2) == checked(rows, 2) and len(set(checked(rows, 2))) == 2 and checked(rows, 0) == []


def test_refused_and_unreadable_recordings_have_rows_as_in_scoring(model: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = "\n".join(",".join(f"{value:.3f}" for value in row) for row in rng.normal(0, 0.1, (600, 2)))
    head = "# rate_hz: 100\n# unit: mV\nI,II\n"
    (folder / "noise.csv").write_text(head + noise + "\n")
    (folder / "flat.csv").write_text(head + "0.0,0.0\n" * 600)
    (folder / "cut.csv").write_text(head + "0.1,\n" + "x,y\n")
    whole = open_recordings(str(folder), "auto", None, None, threads=1)
    asked = explaining.Asked(COARSE)
    job = job_for(model, chosen.choose(whole, range(3), asked.labels, 2), tmp_path / "out", asked)
    rows, said = made(job)
    of = {row["record_id"]: row for row in rows}
    assert "label" not in of["noise"] and of["noise"]["no_waves"] == "no beat was found" and of["noise"]["beats"] == 0
    assert "by lead only" in of["noise"]["notes"]
    (flat,) = Scorer(model).score_signals([np.zeros((6, 600), np.float32)], [100])
    assert (of["flat"]["refused"], of["flat"]["reason"]) == (flat.refused.code, str(flat.refused))
    assert of["flat"]["score"] is of["flat"]["signed.I.QRS"] is None
    assert of["cut"]["refused"] and of["cut"]["score"] is None and of["cut"]["baseline"] == "zero"
    assert sum(part["unreadable"] for part in said) == 1


def test_where_every_recording_is_refused_the_table_says_why(model: Path, tmp_path: Path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "flat.csv").write_text("# rate_hz: 100\n# unit: mV\nI,II\n" + "0.0,0.0\n" * 600)
    args = explain.Args(str(model), str(tmp_path / "out"), source=str(folder))
    cohort = args.open()
    job, about, _ = explain.planned(args, cohort)
    digests = [part["sha256"] for part in made(job)[1]]
    summary = commit(job, about, digests, cohort, lambda shown, checked: pytest.fail("nothing is to be explained"))
    explain.show(summary, job.output)
    assert {path.suffix for path in (tmp_path / "out").iterdir() if path.is_file()} == {".parquet", ".csv", ".json"}
    said = capsys.readouterr().out
    assert "1 refused by the model's preprocessing (leads 1)" in said and "no recording was explained" in said
    assert "the label ph is not known here" in said and "report.html" not in said


# --- the command, on Ray -------------------------------------------------------------------------------------

QUICK = ("--steps", 4, "--bound", 10, "--limit", 40, "--pictures", 1, "--checks", 3)
QUICK += ("--effort.cell-s", 2.5, "--effort.layers", 1, "--effort.randomisations", 1, "--effort.random-orders", 1)


@pytest.fixture(scope="module")
def whole(finetuned, shards: Path, s3: str) -> tuple[Storage, str]:
    """The first 40 recordings of the cohort, explained with a registered model into S3 -> the output, what was said."""
    output = Storage.open("s3://ecg/explained")
    words = ("--model", "models:/ph-6L@champion", "--data", shards, "--output", output.uri)
    return output, workflow("explain", *words, *QUICK).stdout


def results(output: Storage) -> dict[str, bytes]:
    """Everything but progress.json, which has times in it, and what a killed command may leave hidden."""
    names = [name for name in output.list() if not Path(name).name.startswith(".")]
    return {name: output.read_bytes(name) for name in names if name != PROGRESS}


@pytest.mark.ray
def test_a_cohort_is_explained_with_tables_pictures_checks_and_a_report(whole: tuple[Storage, str], shards: Path):
    output, printed = whole
    files, about = results(output), json.loads(output.read_bytes(SUMMARY))
    assert set(about["files"]) | {SUMMARY, "job.json"} == {name for name in files if not name.startswith("parts/")}
    assert len([name for name in files if name.startswith("parts/")]) == 2
    parquet, table = (name for name in about["files"] if name.startswith("explanations-"))
    rows = pq.read_table(pa.BufferReader(files[parquet])).to_pandas()
    assert (about["records"], about["scored"]) == (40, rows["score"].notna().sum())
    assert about["settings"]["label"] == "ph"
    assert rows["record_id"].tolist() == open_shards(str(shards)).data.read(["record_id"])["record_id"].to_pylist()[:40]
    assert rows["record_id"].is_unique and set(rows["label"].dropna()) == {0, 1} and (rows["version"] == 1).all()
    assert pacsv.read_csv(pa.BufferReader(files[table])).num_rows == 40
    known = rows[rows["score"].notna()]
    assert np.allclose(known[[name for name in rows if name.startswith("absolute.")]].sum(axis=1), 1, atol=1e-4)
    means = pd.read_csv(io.BytesIO(files["summary.csv"]))
    assert {"all"} < set(means["group"]) and set(means["wave"]) == {"all", *WAVES}
    best = known.sort_values("score", ascending=False, kind="stable")["record_id"].iloc[0]
    pictures = [name for name in files if name.startswith("pictures/")]
    assert about["drawn"] == 1 and {Path(name).suffix for name in pictures} == {".png", ".svg"}
    assert all(name.startswith(f"pictures/{file_name(best)}-") for name in pictures)
    assert about["checked"] == 3 and {"checks-randomisation.csv", "checks-curves.csv", "checks-areas.csv"} < set(files)
    assert b"<html" in files["report.html"] and b"not a medical device" in files["report.html"]
    for says in ("share of the attribution", "s3://ecg/explained/report.html", "/pictures", "not a medical device"):
        assert says in printed
    largest = means[(means["group"] == "all") & (means["wave"] == "all") & (means["lead"] != "all")].nlargest(
        1, "absolute"
    )
    assert f"  {largest['lead'].item():5s} {100 * largest['absolute'].item():.1f} % (" in printed
    assert not set(rows["record_id"]) & set(re.findall(r"\w+", printed))  # nobody is named


@pytest.mark.ray
def test_killed_and_given_again_it_ends_with_the_same_bytes(whole: tuple[Storage, str], shards: Path, tmp_path: Path):
    output = tmp_path / "out"
    words = ("--model", "models:/ph-6L@champion", "--data", shards, "--output", output, *QUICK)
    command = [sys.executable, ROOT / "tests" / "support" / "watched.py", "explain", *words]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    while not list(output.glob("parts/*.parquet")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / SUMMARY).exists() and not (output / "report.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("parts/*.parquet")}
    workflow("explain", *words)
    assert kept and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert results(Storage.open(output)) == results(whole[0])
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "is complete: nothing to do" in workflow("explain", *words).stdout
    for other, says in (
        (("--steps", 5), "with other settings (steps was 4, is 5)"),
        (("--limit", 39), "whose recordings were others"),
        (("--model", "models:/ph-12L@champion"), "this is ph-12L version 1"),
    ):
        refused = workflow("explain", *words, *other, check=False)
        assert refused.returncode == 2 and says in refused.stderr and "holds explanations of ph-6L" in refused.stderr
    refused = workflow("score", *words[:6], check=False)
    assert refused.returncode == 2 and "and no scores: choose another --output" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "either --data (shards) or --source"),
        (("--data", "{data}", "--records", "r1,r001"), "no recording 'r1' (1 of 2 ids are not there): it has 24, such"),
        (("--data", "{data}", "--records", " , "), "names no recording"),
        (("--data", "{data}", "--records", "{data}/empty.txt"), "names no recording"),
        (("--data", "{data}", "--records", "{data}/train.parquet"), "is no text file"),
        (("--data", "{data}", "--records", "file://{data}"), "is no text file"),
        (("--data", "{data}", "--task", "mi"), "has no label 'mi': it has age_years, female, ph, torn"),
        (("--data", "{data}", "--task", "torn"), "other values than 0 and 1"),
        (("--data", "{unknown}", "--task", "ph"), "is known of none of them"),
        (("--data", "{data}", "--reference", "{data}"), "--reference is for --baseline mean-beat and expected"),
        (("--data", "{data}", "--checks", "-1"), "give 0 or more"),
        (("--data", "{data}", "--steps", "99", "--most-steps", "9"), "most_steps no smaller than steps"),
        (("--data", "{data}", "--checks", "0", "--simulated"), "is one of the --checks"),
        (("--data", "{data}", "--encoder", "{model}"), "is a classifier (ph): give the pre-trained encoder"),
        (("--data", "{data}", "--limit", "0"), "a limit of at least 1"),
        (("--data", "{data}", "--digest", "0123"), "not 0123: nothing is explained"),
        (("--data", "{data}", "--model", "{encoder}"), "pre-trained encoder, it has no task"),
        (("--data", "{data}/none"), f"holds no {MANIFEST}"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(model, labelled, tmp_path: Path, arguments, says, monkeypatch, capsys):
    (labelled / "empty.txt").write_text("\n")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    for path in labelled.glob("*[nt]"):  # the shards and the manifest
        (unknown / path.name).write_bytes(path.read_bytes())
    (unknown / "labels.csv").write_text("record_id,ph\nr000,\n")
    places = {"data": labelled, "model": model, "encoder": model.parent / "encoder", "unknown": unknown}
    words = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["explain.py", "--model", str(model), "--output", f"{tmp_path}/out", *words])
    with pytest.raises(SystemExit) as ended:
        explain.run_command(explain.main, explain.Args)
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()
