"""The grid search: what a grid means, how trials are ranked, and a search that is killed and resumed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tune
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from support.checkpoints import newest
from support.session import ROOT, Trained, text_of, workflow
from support.watched import Attempt

from lsemvae import bundle as bundles
from lsemvae.config import PretrainRecipe, recipe_from, with_settings
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.recipes import FINETUNE, PRETRAIN, read_recipe, recipe_json
from lsemvae.tracking import flatten
from lsemvae.training import search
from lsemvae.training.grid import make_trials, parse_grid, require_comparable
from lsemvae.training.trials import Outcome, best_of, describe_metrics, make_table

SMOKE = PRETRAIN["smoke"]
WATCHED = str(ROOT / "tests" / "support" / "watched.py")


# ---- recipes as files


@pytest.mark.parametrize("recipe", [*PRETRAIN.values(), *FINETUNE.values()], ids=[*PRETRAIN, *FINETUNE])
def test_a_recipe_survives_its_file(recipe: object, tmp_path: Path):
    (tmp_path / "r.json").write_text(recipe_json(recipe))
    assert read_recipe(str(tmp_path / "r.json"), type(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values["optim"].pop("epochs"), "recipe.optim lacks epochs"),
        (lambda values: values["model"].update(betta=1), "recipe.model has the unknown field betta"),
        (lambda values: values["optim"].update(epochs="3"), "recipe.optim.epochs is '3': not a int"),
        (lambda values: values["model"].update(beta=-1.0), "beta is -1.0: give a finite number, 0 or more"),
    ],
)
def test_a_recipe_file_that_is_wrong_is_named_with_its_field(change, says: str, tmp_path: Path):
    values = json.loads(recipe_json(SMOKE))
    change(values)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(values))
    with pytest.raises(LsemvaeError) as error:
        read_recipe(str(path), PretrainRecipe)
    assert str(path) in str(error.value) and says in str(error.value)


# ---- the grid


def test_short_and_dotted_names_mean_the_same_fields():
    grid = parse_grid(SMOKE, ["beta=0.5,1", "optim.learning-rate=1e-3", "channels=4+8+8,2+2+2"])
    assert grid == {
        "model.beta": [0.5, 1], "optim.learning_rate": [1e-3], "model.channels": [[4, 8, 8], [2, 2, 2]],
    }  # fmt: skip
    trials = make_trials(SMOKE, grid, "data")
    assert len(trials) == 4
    assert {(t.recipe.model.beta, t.recipe.model.channels) for t in trials} == {
        (beta, channels) for beta in (0.5, 1.0) for channels in ((4, 8, 8), (2, 2, 2))
    }
    for trial in trials:  # nothing else has changed
        model = replace(trial.recipe.model, beta=SMOKE.model.beta, channels=SMOKE.model.channels)
        optim = replace(trial.recipe.optim, learning_rate=SMOKE.optim.learning_rate)
        assert trial.recipe.optim.learning_rate == 1e-3
        assert replace(trial.recipe, model=model, optim=optim) == SMOKE


def test_a_trial_is_known_by_what_it_does():
    """1 and 1.0, a repeated value, and another order of words give the same trials; other data give others."""
    a = make_trials(SMOKE, parse_grid(SMOKE, ["beta=1,1.0,0.5", "gamma=0"]), "data")
    b = make_trials(SMOKE, parse_grid(SMOKE, ["gamma=0.0", "beta=0.5,1"]), "data")
    other = make_trials(SMOKE, parse_grid(SMOKE, ["gamma=0.0", "beta=0.5,1"]), "other")
    assert len(a) == 2 and {t.id for t in a} == {t.id for t in b}
    assert not {t.id for t in a} & {t.id for t in other}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("beta", "names no values"),
        ("beta=", "names no values"),
        ("beta=1,,2", "names no values"),
        ("betta=1", "did you mean model.beta?"),
        ("samples=5000", "model.samples or preprocess.samples"),
        ("model=1", "no field 'model'"),
        ("beta=x", "recipe.model.beta is 'x': not a float"),
        ("beta=-1", "beta is -1.0"),
        ("beta=NaN", "recipe.model.beta is 'NaN': not a float"),
        ("beta=true", "recipe.model.beta is True: not a float"),
        ("epochs=1.5", "recipe.optim.epochs is 1.5: not a int"),
        ("fusion=sum", "recipe.model.fusion is 'sum'"),
        ("channels=4+8", "recipe.model.channels is [4, 8]"),
    ],
)
def test_what_a_grid_cannot_mean_is_said(word: str, says: str):
    with pytest.raises(LsemvaeError) as error:
        make_trials(SMOKE, parse_grid(SMOKE, [word]), "data")
    assert says in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="beta=,.+0159eE-NaInf\x00\n ", max_size=20))
def test_no_word_does_anything_but_mean_something_or_be_refused(text: str):
    try:
        trials = make_trials(SMOKE, parse_grid(SMOKE, [text]), "data")
    except LsemvaeError:
        return
    assert trials and all(recipe_from(PretrainRecipe, asdict(t.recipe)) == t.recipe for t in trials)


def test_every_field_can_be_searched():
    for name, value in flatten(asdict(SMOKE)).items():
        if value == ():
            continue
        text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
        (trial,) = make_trials(
            SMOKE, parse_grid(SMOKE, [f"{name}={text.lower() if isinstance(value, bool) else text}"]), "d"
        )
        assert trial.recipe == SMOKE, name


def test_the_error_decides_only_where_it_can_be_compared():
    require_comparable({"a": {"settings": {"model.beta": 1.0, "optim.epochs": 3}}}, "here")
    for name in ("preprocess.scale", "leads", "model.objective"):
        with pytest.raises(LsemvaeError, match="--select pearson_r"):
            require_comparable({"a": {"settings": {name: 0}}}, "here")


# ---- ranking and room


def test_a_metric_that_an_architecture_does_not_report_is_left_out_or_refused():
    plain = {"val.reconstruction": 2.0, "val.collapsed": 0.0, "epoch": 3.0}
    assert describe_metrics(plain) == "reconstruction 2 (epoch 3)"
    full = plain | {"val.pearson_r": 0.5, "val.kl": 7.0, "val.active_units": 4.0, "val.collapsed": 1.0}
    said = "mean Pearson r 0.500, reconstruction 2, KL 7, 4 active units, collapsed (epoch 3)"
    assert describe_metrics(full) == said
    entries, outcomes = {"a": {"settings": {}}}, {"a": Outcome("finished", plain)}
    table = make_table(entries, SMOKE, outcomes, "reconstruction")
    assert {"reconstruction", "collapsed", "epoch"} <= set(table) and "kl" not in table and "pearson_r" not in table
    with pytest.raises(LsemvaeError, match="has no pearson_r"):
        make_table(entries, SMOKE, outcomes, "pearson_r")


def outcome(state: str, r: float = 0.0, error: float = 1.0, collapsed: bool = False, **more: float) -> Outcome:
    metrics = {
        "val.pearson_r": r, "val.reconstruction": error, "val.kl": 1.0, "val.active_units": 3.0,
        "val.collapsed": float(collapsed), "epoch": 1, "val.loss": 1.0, **more,
    }  # fmt: skip
    return Outcome(state, metrics if state != "failed" else {}, reason="out of memory" * (state == "failed"))


@pytest.mark.parametrize(("select", "order"), [("pearson_r", [2, 1, 5, 3, 4]), ("reconstruction", [1, 2, 5, 3, 4])])
def test_the_best_are_alive_and_finished_whatever_the_loss(select: str, order: list[int]):
    outcomes = {
        "a": outcome("finished", 0.3, 1.0, **{"val.loss": 900.0}),
        "b": outcome("finished", 0.4, 2.0, **{"val.loss": 1000.0}),
        "c": outcome("finished", 0.9, 0.1, collapsed=True, **{"val.loss": 0.0}),
        "d": outcome("failed"),
        "e": outcome("stopped", 0.8, 0.5),
    }
    entries = {id: {"settings": {"model.beta": number}} for number, id in enumerate(outcomes)}
    table = make_table(entries | {"f": {"settings": {"model.gamma": 1.0}}}, SMOKE, outcomes, select)
    assert list(table["trial"]) == order  # f has not ended
    assert set(table["model.gamma"]) == {SMOKE.model.gamma}  # from the recipe
    assert best_of(table) == {2: "b", 1: "a"}[order[0]]
    assert best_of(make_table(entries, SMOKE, {"c": outcomes["c"], "d": outcomes["d"]}, select)) is None


@given(st.lists(st.integers(0, 64), min_size=1, max_size=6), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_trials_at_a_time_leave_a_cpu_to_read_with(cpus: list[int], workers: int, seed: int):
    """Wherever drivers and workers are placed, some node keeps a whole CPU for a task that reads."""
    many = search.room([{"CPU": count} for count in cpus], workers, use_gpu=False)
    rng = np.random.default_rng(seed)
    free = np.array(cpus, dtype=float)
    for need, count in ((search.DRIVER_CPUS, many), (1.0, many * workers)):
        for _ in range(count):
            fits = np.flatnonzero(free >= need - 1e-9)
            assert len(fits), "a worker finds no place"
            free[rng.choice(fits)] -= need
    assert many < 1 or free.max() >= 1 - 1e-9


def test_gpus_bound_the_trials_where_they_are_used():
    node = {"CPU": 16, "GPU": 8}
    assert search.room([node], 4, use_gpu=True) == 2
    assert search.room([node, node], 8, use_gpu=True) == 2
    assert search.room([{"CPU": 4}], 1, use_gpu=False) == 2
    assert search.room([{"CPU": 2}], 1, use_gpu=False) == 0


# ---- a search

# With these few recordings, six epochs of twelve steps are the fewest after which the posterior does not collapse.
TINY = (
    "smoke", "--optim.epochs", 6, "--optim.batch-size", 8, "--optim.learning-rate", 5e-3, "--kl-warmup-epochs", 0,
    "--model.beta", 0.01, "--plot-every", 100,
)  # fmt: skip
GRID = ("--grid", "reconstruction_weight=0,1000")


@dataclasses.dataclass(frozen=True)
class Searched(Trained):
    command: tuple[object, ...]
    finished_before: dict[Path, int]
    """The result.json files of the trials that had finished when the command was killed, and when they were written."""

    def args(self, **changes: object) -> tune.Args:
        recipe = recipe_from(PretrainRecipe, json.loads((self.folder / "tune.json").read_text())["recipe"])
        data = str(self.command[self.command.index("--data") + 1])
        asked = {"recipe": recipe, "data": data, "storage": str(self.folder.parent), "name": "g", "grid": GRID[1:]}
        return tune.Args(**asked | changes)


@pytest.fixture(scope="session")
def searched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search that is killed after the first trial and one checkpoint of the second, and goes on.

    The second command is given while the first one runs, and waits for it.
    """
    storage = tmp_path_factory.mktemp("tune")
    command = (*TINY, "--data", shards, "--storage", storage, "--name", "g", "--max-concurrent", 1, *GRID)
    steps = -(-ShardedDataset.open(str(shards)).manifest.rows_in("train") // 8)
    attempt = Attempt(tmp_path_factory.mktemp("watched"))
    process = subprocess.Popen(
        [sys.executable, WATCHED, "tune", *map(str, command)], cwd=ROOT, env=os.environ | attempt.environment,
        stdout=subprocess.DEVNULL, stderr=(attempt.folder / "first.err").open("w"),
    )  # fmt: skip
    trials = storage / "g" / "trials"

    def wait_until(condition: Callable[[], object]) -> None:
        while not condition():
            assert process.poll() is None, text_of(attempt.folder / "first.err")[-3000:]
            time.sleep(0.1)

    wait_until(lambda: list(trials.glob("*/result.json")))
    attempt.until(3 * steps)  # the second trial waits there until it is killed
    (first,) = trials.glob("*/result.json")
    wait_until(lambda: any(newest(place, steps) for place in trials.iterdir() if place != first.parent))
    out, err = (attempt.folder / f"second.{name}" for name in ("out", "err"))
    with out.open("w") as stdout, err.open("w") as stderr:
        second = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *map(str, command)], cwd=ROOT,
            stdout=stdout, stderr=stderr,
        )  # fmt: skip
    wait_until(lambda: "another command works in" in text_of(err) or second.poll() is not None)
    before = {path: path.stat().st_mtime_ns for path in trials.glob("*/result.json")}
    assert not (storage / "g" / "result.json").exists()
    process.kill()
    process.wait()
    assert second.wait() == 0, text_of(err)[-3000:]
    return Searched(storage / "g", text_of(out), command, before)


@pytest.mark.ray
def test_a_collapsing_weight_loses_and_the_other_is_chosen(searched: Searched):
    table = pd.read_csv(searched.folder / "results.csv")
    assert list(table["model.reconstruction_weight"]) == [1000, 0]
    assert list(table["collapsed"]) == [False, True] and list(table["state"]) == ["finished"] * 2
    assert table["active_units"][0] > table["active_units"][1]
    best = read_recipe(str(searched.folder / "best_recipe.json"), PretrainRecipe)
    assert best.model.reconstruction_weight == 1000 and best.optim.epochs == 6 and best.model.beta == 0.01
    assert with_settings(best, {"model.reconstruction_weight": 0}).model.reconstruction_weight == 0
    assert "trial 2 of 2 finished: reconstruction_weight=1000.0: mean Pearson r" in searched.printed
    assert "held out by subject" in searched.printed
    assert (searched.folder / "results.png").read_bytes().startswith(b"\x89PNG")
    bundle, _ = bundles.load(searched.folder / "trials" / table["id"][0] / "bundle")
    assert bundle.config["reconstruction_weight"] == 1000
    assert not list(searched.folder.glob("trials/*/checkpoint_2*")) and not (searched.folder / "of_tune").exists()


@pytest.mark.ray
def test_a_killed_search_goes_on_where_it_was(searched: Searched):
    """The finished trial is not run again; the other resumes from its checkpoint, in the same MLflow runs."""
    assert len(searched.finished_before) == 1
    for path, written in searched.finished_before.items():
        assert path.stat().st_mtime_ns == written
    assert "2 trials, 1 to run" in searched.printed
    plan = json.loads((searched.folder / "tune.json").read_text())
    client = MlflowClient()
    for entry in plan["trials"].values():
        steps = [metric.step for metric in client.get_metric_history(entry["run"], "train.loss")]
        assert sorted(set(steps)) == list(range(6)) and len(steps) <= 7  # at most one epoch is done twice
    parents = client.search_runs([client.get_experiment_by_name("tune").experiment_id], "attributes.run_name = 'g'")
    assert [run.info.run_id for run in parents] == [plan["run"]]


@pytest.mark.ray
def test_the_runs_are_below_one_that_holds_the_results(searched: Searched, shards: Path):
    plan = json.loads((searched.folder / "tune.json").read_text())
    client = MlflowClient()
    parent = client.get_run(plan["run"])
    assert parent.info.status == "FINISHED" and parent.data.tags["best"] == "2"
    assert {item.path for item in client.list_artifacts(plan["run"])} == {
        "results.csv", "results.png", "best_recipe.json",
    }  # fmt: skip
    for weight, entry in zip(("0.0", "1000.0"), plan["trials"].values(), strict=True):
        child = client.get_run(entry["run"])
        assert child.data.tags["mlflow.parentRunId"] == plan["run"] and child.info.status == "FINISHED"
        assert child.data.params["model.reconstruction_weight"] == weight
        epochs = client.get_metric_history(entry["run"], "val.pearson_r")
        steps = client.get_metric_history(entry["run"], "step.loss")
        rows = ShardedDataset.open(str(shards)).manifest.rows_in("train")
        assert {m.step for m in epochs} == set(range(6))
        assert {m.step for m in steps} >= {epoch * -(-rows // 8) - 1 for epoch in range(1, 7)}  # each epoch's last
    losses = [metric.value for metric in client.get_metric_history(entry["run"], "val.loss")]
    assert parent.data.metrics["best.val.loss"] == min(losses)


@pytest.mark.ray
def test_the_same_grid_again_shows_the_table(searched: Searched, capsys: pytest.CaptureFixture):
    tune.main(searched.args())
    said = capsys.readouterr().out
    assert "g is finished: nothing to do" in said
    assert searched.printed[searched.printed.index("Of each trial") :] in said


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": SMOKE}, "holds a search over another recipe: give another --name"),
        ({"grid": ("betta=1",)}, "did you mean model.beta?"),
        ({"grid": ("optim.batch_size=9",)}, "batch_size=9 is no multiple of streams=8"),
        ({"grid": ("preprocess.scale=lead,record",), "select": "reconstruction"}, "--select pearson_r"),
        ({"num_workers": 0}, "take 1 or more"),
        ({"num_workers": 9}, "9 workers and 8 streams"),
    ],
)
def test_mistakes_are_said_before_anything_changes(changes: dict, says: str, searched: Searched):
    before = {path: path.stat().st_mtime_ns for path in searched.folder.rglob("*")}
    with pytest.raises(LsemvaeError) as error:
        tune.main(searched.args(**changes))
    assert says in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in searched.folder.rglob("*")} == before


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path):
    done = workflow("tune", tmp_path / "no.json", "--data", tmp_path, "--storage", tmp_path, *GRID, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: there is no recipe {tmp_path / 'no.json'}: check the path\n"


@pytest.mark.ray
def test_another_grid_adds_trials_of_which_one_is_stopped_and_one_fails(
    searched: Searched, capsys: pytest.CaptureFixture
):
    """ASHA takes earlier trials into account; only the trial whose loss overflows float32 fails."""
    given = searched.command[: searched.command.index("--grid")]
    done = workflow("tune", *given, "--grid", "reconstruction_weight=0,1000,1e-9,1e38", "--asha")
    assert "4 trials, 2 to run" in done.stdout
    table = pd.read_csv(searched.folder / "results.csv").set_index("trial")
    assert list(table.index) == [2, 1, 3, 4]
    assert list(table["state"]) == ["finished", "finished", "stopped", "failed"]
    assert table["epoch"][3] < 5  # the last of six: it was stopped before
    assert "not finite" in table["reason"][4] and done.stdout.count("not finite") == 2  # at once, and below the table
    best = read_recipe(str(searched.folder / "best_recipe.json"), PretrainRecipe)
    assert best.model.reconstruction_weight == 1000
    plan = json.loads((searched.folder / "tune.json").read_text())
    states = [MlflowClient().get_run(entry["run"]).info.status for entry in plan["trials"].values()]
    assert states == ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    tune.main(searched.args(grid=("beta=0.01", "reconstruction_weight=1000,1e-9")))
    assert "g is finished: nothing to do" in capsys.readouterr().out
    tune.main(searched.args(select="reconstruction"))  # nothing to run, but another best trial to write down
    said = capsys.readouterr().out
    assert "2 trials, 0 to run" in said and "best: lowest reconstruction" in said
