"""Unusable input is reported in one line, with status 2, before a command contacts a cluster or an MLflow server."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pretrain
import pytest
import tune
import tyro
from command import run_recipe_command

from lsemvae.data.shards import MANIFEST, SCHEMA_VERSION, Manifest, Shard
from lsemvae.recipes import PRETRAIN, recipe_json

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Refused:
    """Run a command where neither Ray nor MLflow answers -> its one-line error."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    def give(recipe: object, data: Path, storage: Path, grid: str | None = None) -> str:
        words = [recipe, "--data", data, "--storage", storage]
        words += ["--grid", grid] if grid else []
        command, required = (tune, {"grid": tyro.MISSING}) if grid else (pretrain, {})
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_recipe_command(command.main, command.Args, PRETRAIN, storage=tyro.MISSING, **required)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return give


def manifest_of(subjects: int, **rows: int) -> dict:
    shards = [Shard(f"{split}-00000.parquet", split, count, 1, "0") for split, count in rows.items()]
    total = sum(rows.values())
    return asdict(Manifest("here", "folder", "x", total, subjects, 0, {}, shards))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "holds no manifest.json: make one with `python workflows/ingest.py"),
        (manifest_of(0), "has 0 recordings in 'train': 32 are needed"),
        (manifest_of(40, train=31, val=9), "has 31 recordings in 'train': 32 are needed"),
        (manifest_of(40, train=40), "holds out no subject to validate on: ingest again with --val-share"),
        (manifest_of(1, val=40), "has recordings of one subject, who is held out: ingest others too, or give --all"),
        (manifest_of(40, train=40, val=7), "has 7 recordings in 'val': 8 are needed"),
        (manifest_of(40, train=40, val=9) | {"schema": SCHEMA_VERSION + 1}, f"has schema {SCHEMA_VERSION + 1}, this"),
        (
            {"schema": SCHEMA_VERSION + 1, "shards": {"elsewhere": 1}, "new": 1},
            f"has schema {SCHEMA_VERSION + 1}, this version reads {SCHEMA_VERSION}",
        ),
    ],
)
def test_shards_that_are_no_data_set_to_train_on(manifest: dict | None, says: str, tmp_path: Path, refused: Refused):
    data = tmp_path / "data"
    data.mkdir()
    if manifest:
        (data / MANIFEST).write_text(json.dumps(manifest))
    assert says in refused("smoke", data, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("grid", [None, "beta=0.5,1"], ids=["pretrain", "tune"])
def test_a_storage_that_cannot_be_written_to(grid: str | None, tmp_path: Path, refused: Refused):
    data = tmp_path / "data"
    data.mkdir()
    (data / MANIFEST).write_text(json.dumps(manifest_of(40, train=40, val=9)))
    (tmp_path / "file").write_text("")
    said = refused("smoke", data, tmp_path / "file" / "runs", grid)
    assert f"--storage {tmp_path}/file/runs" in said and "cannot be written to: " in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": {"epoch": 3}}, "epoch"),
        ({"wings": 2}, "wings"),
        ({"optim": {"epochs": "many"}}, "recipe.optim.epochs is 'many'"),
    ],
)
def test_a_recipe_file_with_a_field_that_is_not_one(change: dict, says: str, tmp_path: Path, refused: Refused):
    recipe = json.loads(recipe_json(PRETRAIN["smoke"]))
    for name, value in change.items():
        recipe[name] = recipe[name] | value if isinstance(value, dict) else value
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    said = refused(path, tmp_path / "no data", tmp_path / "runs")
    assert str(path) in said and says in said
