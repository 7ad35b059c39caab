"""Small files of state that are cut or garbled: one line with the file and what to do, or they are made again."""

import json
from collections.abc import Callable
from pathlib import Path

import demo
import finetune
import pretrain
import pytest
import tune

from lsemvae.data.shards import MANIFEST, ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.compare import _facts
from lsemvae.recipes import PRETRAIN, recipe_json
from lsemvae.scoring.output import JOB, SUMMARY, claim, finished
from lsemvae.scoring.progress import PROGRESS, Progress
from lsemvae.storage import Storage
from lsemvae.training.trials import HISTORY, Outcome, read_history, read_outcome, write_outcome
from serve.cohorts import _progress

ABOUT = {"plan": "a", "model": "m", "version": 1, "digest": "d", "input": "x"}
RECIPE = PRETRAIN["smoke"]
WHOLE = {
    JOB: ABOUT,
    SUMMARY: ABOUT | {"files": {}},
    PROGRESS: ABOUT | {"owner": "h:1:a", "beat": 1, "state": "done"},
    pretrain.RUN: {"run": "r1"},
    "pretraining's result.json": {"bundle": "b", "digest": "d", "model": "m", "run": "r", "metrics": {}},
    tune.PLAN: {"recipe": json.loads(recipe_json(RECIPE)), "data_digest": "d", "trials": {}},
    "a trial's result.json": {"state": "finished", "metrics": {}, "digest": "d", "reason": ""},
    MANIFEST: {"schema": 1},
    "comparison.json": {"reference": "r", "draws": 1, "seed": 0},
    demo.LAST: {"place": "p", "task": "ph"},
}
READ: dict[str, Callable[[Path], object]] = {
    JOB: lambda folder: claim(Storage.open(folder), ABOUT),
    SUMMARY: lambda folder: (claim(Storage.open(folder), ABOUT), finished(Storage.open(folder), "a")),
    pretrain.RUN: lambda folder: finetune.start_run("m", {}, Storage.open(folder)),
    "pretraining's result.json": lambda folder: pretrain._is_finished(Storage.open(folder), "n"),
    tune.PLAN: lambda folder: tune.read_plan(Storage.open(folder), RECIPE, "d"),
    "a trial's result.json": lambda folder: read_outcome(Storage.open(folder)),
    MANIFEST: lambda folder: ShardedDataset.open(str(folder)),
    "comparison.json": lambda folder: _facts(Storage.open(folder), "comparison.json"),
    demo.LAST: demo.read_last,
}
GARBLED = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "other bytes": lambda content: b"\xff\x00" + content,
    "zeros": lambda content: bytes(len(content)),
    "another kind": lambda content: b"[1]",
}


@pytest.mark.parametrize("how", GARBLED)
@pytest.mark.parametrize("file", READ)
def test_one_line_names_the_file_and_says_what_to_do(file: str, how: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # it must be read before MLflow is asked
    name = file.rsplit(" ", 1)[-1]
    (tmp_path / name).write_bytes(GARBLED[how](json.dumps(WHOLE[file]).encode()))
    with pytest.raises(LsemvaeError) as raised:
        READ[file](tmp_path)
    (line,) = str(raised.value).splitlines()
    assert f"{tmp_path}/{name} is damaged: it is not JSON. " in line
    assert any(word in line for word in ("Delete it and give the same command again", "again"))


@pytest.mark.parametrize("file", [file for file in READ if file not in (MANIFEST, "comparison.json")])
def test_an_object_that_lacks_what_is_needed_is_damaged_too(file: str, tmp_path: Path):
    name = file.rsplit(" ", 1)[-1]
    (tmp_path / name).write_text('{"other": 1}')
    with pytest.raises(LsemvaeError, match=r"is damaged: it lacks \w+"):
        READ[file](tmp_path)


@pytest.mark.parametrize("how", GARBLED)
def test_a_garbled_progress_stops_nobody_and_is_written_again(how: str, tmp_path: Path):
    output = Storage.open(tmp_path)
    (tmp_path / PROGRESS).write_bytes(GARBLED[how](json.dumps(WHOLE[PROGRESS]).encode()))
    assert _progress({"output": str(tmp_path), "digest": "d", "input": "x"}) == {}
    with Progress(output, ABOUT, 1):
        assert _progress({"output": str(tmp_path), "digest": "d", "input": "x"})["state"] == "running"
    assert json.loads((tmp_path / PROGRESS).read_text())["state"] == "done"


@pytest.mark.parametrize("how", GARBLED)
def test_a_trial_s_garbled_epochs_are_said_and_cost_only_asha_s_comparison(how: str, tmp_path: Path, caplog):
    write_outcome(Storage.open(tmp_path), Outcome("finished"))
    (tmp_path / HISTORY).write_bytes(GARBLED[how](b'[{"epochs": 1, "val.loss": 3}]'))
    assert read_history(Storage.open(tmp_path)) == []
    assert f"{tmp_path}/{HISTORY} is damaged" in caplog.text
    assert read_outcome(Storage.open(tmp_path)).state == "finished"
