"""workflows/evaluate.py: the comparison of methods from shards to report, its continuation, and its mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from support.labelled import write_labelled
from support.local_training import pretrain_here
from support.session import Trained, workflow

from lsemvae import bundle as bundles
from lsemvae.data.shards import ShardedDataset
from lsemvae.evaluation.compare import Comparison, Scores
from lsemvae.evaluation.methods import methods
from lsemvae.recipes import FINETUNE, recipe_json
from lsemvae.storage import Storage
from lsemvae.tracking import resolve


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose inner folds a tenth of the labels cannot fill."""
    path = tmp_path_factory.mktemp("recipe") / "training.json"
    recipe = replace(FINETUNE["smoke"], trains="linear", strengths=(0.01, 0.1), inner_folds=3, bootstrap_draws=50)
    path.write_text(recipe_json(recipe))
    return path


@pytest.mark.ray
def test_a_comparison_its_report_its_failures_and_what_goes_on(
    shards: Path, pretrained: Trained, training: Path, tmp_path: Path
):
    out = tmp_path / "out"
    command = [
        "evaluate", "--cohort", shards, "--task", "ph", "--output", out, "--size", "smoke", "--training", training,
        "--encoders", f"lsemvae={pretrained.folder / 'bundle'}", "--leads", "6", "--folds", "3", "--scratch-epochs", 1,
        "--data-licence", "made for tests", "--model-name", "compared",
    ]  # fmt: skip
    given = ["--pretrain", shards, "--pretrain-epochs", 1, "--pretrain-workers", 1]
    few = ["--methods", "multimodal-cnn", "mvae", *given]
    first = workflow(*command, *few, "--analyses", "noise", "fewer-labels", check=False)
    assert first.returncode == 3, first.stderr  # a tenth of the labels is too few for the inner folds of a regression
    assert "trainings failed" in first.stderr
    place = Storage.open(out)
    scores, comparison = Scores.read(place), Comparison.read(place)
    assert set(scores.failed["setting"]) == {"10 %"} and scores.failed["reason"].str.contains("3 folds need 3").all()
    rows = ["LS-EMVAE", "MVAE", "Multimodal-CNN", "untrained encoder", "classical features", "amplitude quantiles"]
    main = scores.scores[scores.scores["analysis"] == "main"]
    assert set(main["method"]) == {*rows, "naive"}
    stored = ShardedDataset.open(str(shards)).read(["record_id", "label.ph"]).to_pandas().set_index("record_id")
    for row in rows:
        mine = main[main["method"] == row]
        assert sorted(mine["record_id"]) == sorted(stored.index)
        auroc = roc_auc_score(stored["label.ph"].loc[mine["record_id"]], mine["score"])
        assert comparison.line(row, "6L")["auroc"].value == pytest.approx(auroc)
        assert f"{auroc:.3f} [" in first.stdout
    folds = main.drop_duplicates("record_id").merge(scores.people, on="record_id", suffixes=("", "_people"))
    assert (folds["fold"] == folds["fold_people"]).all() and folds.groupby("subject_id")["fold"].nunique().max() == 1
    settings = set(zip(scores.scores["analysis"], scores.scores["setting"], strict=True))
    assert {("noise", "20 dB"), ("noise", "5 dB"), ("fewer labels", "50 %"), ("fewer labels", "25 %")} <= settings
    noisy = scores.scores[(scores.scores["setting"] == "5 dB") & (scores.scores["method"] == "LS-EMVAE")]
    clean = main[main["method"] == "LS-EMVAE"].set_index("record_id")["score"]
    assert not np.allclose(noisy["score"], clean.loc[noisy["record_id"]])

    page = (out / "report.html").read_text()
    assert "Multimodal-CNN" in page and "3 folds need 3" in page and not set(stored.index) & set(page.split())
    bundle, _ = bundles.load(out / "bundle-6L")
    assert "made for tests" in bundle.provenance["model_card"] and bundle.task == "ph" and 0 < bundle.threshold < 1
    name, version = resolve("models:/compared-6L@candidate")
    assert f"models:/{name}/{version} (alias candidate, LS-EMVAE, digest {bundle.digest})" in first.stdout

    # Another method adds its own trainings; those that had finished are not run again.
    (kept,) = out.glob("cells-*")
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    second = workflow(*command, *few, "--analyses", "balance", "--register", "none")
    assert "mvae" in second.stdout and "is finished: nothing to do" in second.stdout  # its pre-training
    after = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after.keys() - before.keys()}
    assert new and all("positive" in name for name in new)
    assert len(Scores.read(place).failed) == 0 and "error" not in second.stderr.lower().split()


@pytest.fixture(scope="module")
def encoders(shards_here: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle of every smoke recipe after one epoch, by the name of its method."""
    found = {}
    for name, method in methods("smoke").items():
        if method.recipe:
            recipe = replace(method.recipe, optim=replace(method.recipe.optim, epochs=1))
            found[name] = pretrain_here(recipe, shards_here, tmp_path_factory.mktemp(name))
            assert bundles.load(found[name])[1].config == method.recipe.model
    return found


@pytest.mark.ray
def test_every_smoke_recipe_is_compared(shards_here: Path, ray_cluster, encoders: dict[str, Path], tmp_path: Path):
    """It shows that the recipes run, not what they are worth."""
    out = tmp_path / "out"
    done = workflow(
        "evaluate", "--cohort", shards_here, "--task", "ph", "--output", out, "--size", "smoke", "--training", "smoke",
        "--encoders", *(f"{name}={folder}" for name, folder in encoders.items()), "--leads", "12", "--folds", 2,
        "--scratch-epochs", 1, "--analyses", "ablations", "--register", "st-mem", "--model-name", "compared",
    )  # fmt: skip
    scores = Scores.read(Storage.open(out))
    assert scores.failed.empty
    assert {m.title for m in methods("smoke").values() if m.config or m.recipe} <= set(scores.scores["method"])
    _, classifier = bundles.load(out / "bundle-12L")
    assert classifier.config.encoder.architecture == "st-mem"
    assert "ST-MEM" in done.stdout
    women = Comparison.read(Storage.open(out)).subgroups
    assert set(women["subgroup"]) >= {"women", "men", "under 50"}


def test_the_plan_is_shown_without_running_it(shards_here: Path, tmp_path: Path):
    done = workflow(
        "evaluate", "--cohort", shards_here, "--task", "ph", "--output", tmp_path / "out", "--size", "smoke",
        "--training", "linear", "--pretrain", shards_here, "--methods", "multimodal-cnn", "mvae", "--leads", "6",
        "--folds", 2, "--analyses", "fewer-labels", "--dry-run",
    )  # fmt: skip
    assert "pre-train LS-EMVAE: 4 epochs" in done.stdout and "pre-train MVAE" in done.stdout
    # 2 folds x (everything, and 3 shares of the labels) for each of 6 rows
    assert "6L (main): 48 trainings" in done.stdout and "  Multimodal-CNN: 8 trainings, about" in done.stdout
    assert "in all about" in done.stdout and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def shards_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set that was written without Ray."""
    return write_labelled(tmp_path_factory.mktemp("labelled"), subjects=24)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "resnet"], "there is no method 'resnet': choose all, or some of lsemvae"),
        (["--analyses", "ages"], "no analysis 'ages'"),
        (["--analyses", "external"], "give --external URI"),
        (["--methods", "mvae"], "no encoder for lsemvae, mvae: give --encoders lsemvae=URI, or --pretrain"),
        (["--methods", "ecg-fm", "--pretrain", "{data}"], "no encoder for ecg-fm: give --encoders ecg-fm=URI, or name"),
        (["--encoders", "resnet1d=x"], "--encoders resnet1d=x: give NAME=URI"),
        (["--encoders", "lsemvae={data}", "--methods", "lsemvae"], "is no bundle"),
        (["--folds", "50"], "50 folds need 50 of each"),
        (["--folds", "torn"], "--folds torn: "),
        (["--folds", "nobody"], "no label 'nobody'"),
        (["--task", "torn"], "at other values"),
        (["--training", "best"], "there is no recipe 'best'"),
        (["--register", "mvae"], "--register mvae: give one of the methods that are compared, or none"),
        (["--leads", "V9"], "unknown lead 'V9'"),
        (["--cohort", "{tmp}"], "holds no manifest.json"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], says: str, shards_here: Path, tmp_path: Path):
    given = {"--cohort": str(shards_here), "--task": "ph", "--output": str(tmp_path / "out"), "--methods": "lsemvae"}
    changed = [word.format(data=shards_here, tmp=tmp_path) for word in words]
    command = [part for name, value in given.items() if name not in changed for part in (name, value)]
    done = workflow("evaluate", *command, *changed, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.strip().splitlines() if "MLFLOW" not in line]
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_numbers_are_names_that_mlflow_takes():
    import evaluate
    from mlflow.utils.validation import _validate_metric_name

    metrics = pd.DataFrame(
        [("main", "6L", name, "auroc", 0.5, 0.4, np.nan, "") for name in ("β-VAE", "MMVAE+", "LS-EMVAE, product only")],
        columns=["analysis", "leads", "method", "metric", "value", "low", "high", "note"],
    )
    found = evaluate.numbers(Comparison(metrics, pd.DataFrame(), pd.DataFrame()))
    assert len(found) == 6 and json.dumps(found, allow_nan=False)
    for name in found:
        _validate_metric_name(name)
