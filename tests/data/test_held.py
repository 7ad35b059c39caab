"""What still holds recordings of subjects who have withdrawn: after ingest, after training and after scoring."""

import csv
import json
import sys
from pathlib import Path

import pretrain
import pytest
from support import bundles, parts
from support.labelled import write_labelled
from support.session import workflow

from lsemvae.bundle import describe
from lsemvae.cohorts.withdrawn import Withdrawn
from lsemvae.data.held import MODEL, NAME, NOT_READ, PERHAPS, ROWS, TEXT, Search
from lsemvae.data.shards import ShardedDataset
from lsemvae.recipes import PRETRAIN
from lsemvae.scoring.inputs import open_shards
from lsemvae.scoring.output import commit
from lsemvae.scoring.scores import SCORES
from lsemvae.storage import Storage
from lsemvae.tracking import Run

GONE, THEIRS = "s002", ("r004", "r005")
LIST = Withdrawn.of([GONE]).digest


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, scores of them, and runs with bundles that were and were not trained on them."""
    folder = tmp_path_factory.mktemp("places")
    digest = ShardedDataset.open(str(write_labelled(folder / "shards", 6))).manifest.digest
    uri = str(folder / "shards")
    model = bundles.save(folder / "runs" / "model" / "bundle", data={"uri": uri, "digest": digest})
    source = open_shards(uri)
    job = parts.job_for(folder / "runs" / "model" / "bundle", source, folder / "scores", SCORES)
    said = parts.made(job)[1]
    commit(job, {"plan": job.plan, "model": "m"}, [part["sha256"] for part in said])

    for name, data in {
        "of-another": {"uri": "elsewhere", "digest": "0123"},
        "without-them": {"uri": uri, "digest": digest, "since_ingest": {"withdrawn": LIST}},
        "without-others": {"uri": uri, "digest": digest, "since_ingest": {uri: {"withdrawn": "4567"}}},
        "of-several": {"uri": f"elsewhere {uri}:3", "digest": "89ab"},
    }.items():
        bundles.save(folder / "runs" / name / "checkpoint_3" / "bundle", bundles.SMALL, data=data)
    bundles.save(
        folder / "runs" / "tuned" / "bundle", data={"uri": "x", "digest": "y"}, encoder={"digest": model.digest}
    )

    place = Storage.open(folder / "evaluated")
    place.write_bytes("people.csv", b"record_id,label\nfurther/r004,1\nr0040,0\nr011,1\n")
    place.write_bytes("cells/main.json", json.dumps({"record_id": ["r004", "r011"], "r005": 4}).encode())
    place.write_bytes("pictures/r005-1a2b3c4d-ecg.png", b"")
    place.write_bytes("report.html", b"<td>r005</td><td>r0051</td>")
    place.write_bytes("other.html", b"<td>r0051</td>")
    Storage.open(folder / "shards").write_bytes("report.html", b"<html>")
    place.write_bytes("in/r004.xml", b"")
    place.write_bytes("in/r0041.xml", b"")
    place.write_bytes("cut.parquet", b"PAR1")
    place.write_bytes("withdrawn.csv", f"{GONE}\n".encode())
    place.write_bytes("list.txt", f"{GONE}\n".encode())
    return folder


def test_everything_that_holds_them_is_found_and_nothing_else(places: Path):
    found = Search(Withdrawn.of([GONE])).look([Storage.open(places)])
    assert found.records == set(THEIRS)
    held = {one.path: (one.what, one.count) for one in found.found}
    assert held == {
        "shards/val.parquet": (ROWS, 2),
        "scores/parts/000001-plan.parquet": (ROWS, 2),
        "scores/scores-plan.parquet": (ROWS, 2),
        "scores/scores-plan.csv": (ROWS, 2),
        "evaluated/people.csv": (ROWS, 1),
        "evaluated/cells/main.json": (TEXT, 2),
        "evaluated/report.html": (TEXT, 1),
        "shards/report.html": (TEXT, 1),
        "evaluated/pictures/r005-1a2b3c4d-ecg.png": (NAME, 1),
        "evaluated/in/r004.xml": (NAME, 1),
        "evaluated/cut.parquet": (NOT_READ, 0),
        "runs/model/bundle/config.json": (MODEL, 1),
        "runs/without-others/checkpoint_3/bundle/config.json": (PERHAPS, 1),
        "runs/of-several/checkpoint_3/bundle/config.json": (MODEL, 1),
        "runs/tuned/bundle/config.json": (MODEL, 1),
    }


def test_in_an_object_store_and_with_leading_zeros(s3: str, tmp_path: Path):
    place = Storage.open(f"s3://ecg/{tmp_path.name}")
    place.write_bytes("ukb.csv", b"eid,ph\n0012,1\n120,0\n")
    assert [one.path for one in Search(Withdrawn.of(["12"])).look([place]).found] == ["ukb.csv"]


def test_the_command_names_places_counts_runs_and_versions(mlflow_server: str, places: Path, tmp_path: Path):
    data = ShardedDataset.open(str(places / "shards"))
    run = Run.start("finetune", "of them", {})
    run.reads(data)
    run.bundle(places / "runs" / "model" / "bundle")
    digest = describe(places / "runs" / "tuned" / "bundle").digest
    version = run.register("withdrawn-12L", {"digest": digest}, "candidate")
    run.end()
    tagged = Run.start("evaluate", "of them", {})
    tagged.tags({"data_digest": data.manifest.digest})
    tagged.end()
    other = Run.start("finetune", "of others", {})
    other.end()
    subfolders = [places / name for name in ("shards", "scores", "evaluated", "runs")]
    words = ("--list", places / "evaluated" / "list.txt", "--places", *subfolders, "--output", tmp_path / "held.csv")
    printed = workflow("withdrawn", *words).stdout
    assert f"{places}/shards: 1 tables with 2 rows, 1 other files\n" in printed
    assert f"{places}/scores: 3 tables with 6 rows\n" in printed
    assert f"{places}/evaluated: 1 tables with 1 rows, 1 tables that cannot be read, 4 other files\n" in printed
    assert "3 models, 1 models that were trained without the subjects of another list\n" in printed
    assert f"{mlflow_server}: 2 runs, 1 versions\n" in printed
    assert not any(name in printed for name in (GONE, *THEIRS))
    with (tmp_path / "held.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert {line["path"] for line in lines if line["place"] == mlflow_server} == {
        run.run_id, tagged.run_id, f"models:/withdrawn-12L/{version}",
    }  # fmt: skip
    assert len(lines) == 18


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--list", "{tmp}/none", "--places", "{tmp}"), "none does not exist: give the path or URI of the list"),
        (("--list", "{tmp}/empty", "--places", "{tmp}"), "names nobody"),
        (("--list", "{tmp}/list", "--places", "{tmp}/nowhere"), "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path: Path, words: tuple[str, ...], says: str):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "list").write_text(GONE)
    failed = workflow("withdrawn", *(word.format(tmp=tmp_path) for word in words), "--no-mlflow", check=False)
    (line,) = failed.stderr.strip().splitlines()
    assert failed.returncode == 2 and says in line


def test_a_finished_pretraining_says_who_has_withdrawn_since(tmp_path: Path, monkeypatch, capsys):
    """It is not trained again, but nobody may believe that its model was trained without them."""
    data, place = write_labelled(tmp_path / "shards", 24), tmp_path / "runs" / "run"
    (data / "withdrawn.csv").write_text("s003\n")
    before = ShardedDataset.open(str(data)).since_ingest
    bundles.save(place / "bundle", bundles.SMALL, data={"uri": str(data), "since_ingest": {str(data): before}})
    result = {"bundle": "b", "digest": "d", "model": "m", "run": "r", "metrics": {"epoch": 0, "train.loss": 1.0}}
    Storage.open(place).write_bytes("result.json", json.dumps(result).encode())
    words = ["pretrain.py", "smoke", "--data", str(data), "--storage", str(place.parent), "--name", "run"]

    def said() -> str:
        monkeypatch.setattr(sys, "argv", list(words))
        pretrain.run_recipe_command(pretrain.main, pretrain.Args, PRETRAIN, storage=pretrain.tyro.MISSING)
        return capsys.readouterr().out

    assert "run is finished: nothing to do" in (printed := said()) and "withdrawn" not in printed
    (data / "withdrawn.csv").write_text(f"s003\n{GONE}\n")
    assert "The list of who has withdrawn" in (printed := said()) and GONE not in printed
