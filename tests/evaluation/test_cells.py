"""Cells of a comparison: which recordings they train on, what they score, and that each is run once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.config import FinetuneRecipe, OptimConfig
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention, plan
from lsemvae.evaluation import cells as cells_module
from lsemvae.evaluation.cells import (
    ALL,
    Cell,
    Material,
    Ran,
    Row,
    Trials,
    Variant,
    _Kept,
    cells_of,
    groups,
    judge,
    outcomes,
    run_cells,
    train_row,
)
from lsemvae.evaluation.embedding import CLASSICAL, QUANTILES, Embedded, Pretrained, merged
from lsemvae.evaluation.folds import given_folds, make_folds
from lsemvae.evaluation.methods import REFERENCE, SUPERVISED, chosen, methods
from lsemvae.external import EXTERNAL
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import ABLATIONS, COMPARED, FINETUNE
from lsemvae.storage import Storage

RECIPE = replace(FINETUNE["smoke"], trains="linear", inner_folds=2, strengths=(0.01,))
SAMPLES = 80


def cohort(records: int = 60, subjects: int = 30, seed: int = 0, signal: float = 2.0) -> Embedded:
    rng = np.random.default_rng(seed)
    subject_B = np.sort(rng.integers(0, subjects, records)).astype(str)
    y_B = np.array([int(subject) % 3 == 0 for subject in subject_B], dtype=np.int64)
    h_BF = rng.standard_normal((records, 4)).astype(np.float32)
    h_BF[:, 0] += signal * y_B
    x_BLT = rng.standard_normal((records, len(LIMB_LEADS), SAMPLES)).astype(np.float32)
    return Embedded(
        h_BF={"one": h_BF},
        observed_BF={"one": np.ones(h_BF.shape, dtype=bool)},
        y_B=y_B,
        record_B=np.array([f"r{number:03d}" for number in range(records)]),
        subject_B=subject_B,
        refused=0,
        inputs={"in": (x_BLT, np.ones(x_BLT.shape[:2], dtype=bool))},
    )


def material(embedded: Embedded, **more: object) -> Material:
    return Material(embedded, make_folds(embedded.y_B, embedded.subject_B, 3, 0), **more)


# --- which recordings a cell trains on -------------------------------------------------------------------------


@given(st.integers(0, 5), st.sampled_from([0.5, 0.25, 0.1]))
@settings(max_examples=30, deadline=None)
def test_fewer_labels_are_whole_subjects_of_both_classes_and_part_of_more(seed: int, share: float):
    embedded = cohort(seed=seed)
    rows = np.arange(len(embedded.y_B))
    fewer, more = (
        Variant("fewer labels", share=part).rows(rows, embedded.y_B, embedded.subject_B, seed) for part in (share, 0.8)
    )
    kept = set(embedded.subject_B[fewer])
    assert set(embedded.y_B[fewer]) == {0, 1} and set(fewer) <= set(more) <= set(rows)
    assert all((row in fewer) == (embedded.subject_B[row] in kept) for row in rows)
    assert len(kept) == pytest.approx(share * len(set(embedded.subject_B)), abs=1.5)


@pytest.mark.parametrize("positives", [0.25, 0.5, 0.75])
def test_a_class_balance_thins_one_class_only(positives: float):
    embedded = cohort()
    rows = np.flatnonzero(embedded.subject_B != "1")
    kept = Variant("class balance", positives=positives).rows(rows, embedded.y_B, embedded.subject_B, 0)
    assert embedded.y_B[kept].mean() == pytest.approx(positives, abs=0.03) and set(kept) <= set(rows)
    whole = [set(np.flatnonzero(embedded.y_B == value)) & set(rows) for value in (0, 1)]
    assert any(of <= set(kept) for of in whole)  # the class that is too small stays whole


def test_a_cell_never_trains_on_its_own_test_subjects():
    found = material(cohort())
    for fold, (_, test) in enumerate(found.folds):
        for variant in (Variant(), Variant("fewer labels", share=0.5), Variant("class balance", positives=0.5)):
            cell = Cell(Row("one", "linear", ("one",), RECIPE), 0, fold, variant)
            train = found.embedded.subject_B[found.train_rows(cell)]
            assert not set(train) & set(found.embedded.subject_B[test]) and set(found.tests(cell)) == {""}


# --- what a cell gives -----------------------------------------------------------------------------------------


def test_a_linear_cell_scores_its_fold_the_noisy_recordings_and_another_cohort():
    noisy, other = cohort(seed=0, signal=0.0), cohort(seed=7)
    found = material(cohort(), noisy={"5 dB": noisy}, others={"elsewhere": other})
    row = Row("one", "linear", ("one",), RECIPE)
    cell = Cell(row, 0, 1)
    head, tests = train_row(cell, found), found.tests(cell)
    assert list(tests) == ["", "5 dB"]
    clean_B, noisy_B = (judge(head, cell, *test, "cpu").score_B for test in tests.values())
    assert len(clean_B) == len(noisy_B) == len(found.folds[1][1]) and not np.allclose(clean_B, noisy_B)
    whole = Cell(row, 0, ALL)
    assert list(found.tests(whole)) == ["elsewhere"] and len(found.train_rows(whole)) == 60
    scores = judge(train_row(whole, found), whole, other, np.arange(60), "cpu").score_B
    assert scores[other.y_B == 1].mean() > scores[other.y_B == 0].mean()


def of_heads() -> tuple[Material, list[Cell], list[Cell]]:
    """Material, the cells of a row that trains heads, and those of a linear one."""
    recipe = replace(RECIPE, trains="head", hidden=3, optim=OptimConfig(epochs=2, batch_size=8, learning_rate=1e-2))
    heads, linear = Row("heads", "head", ("one", "one", "two"), recipe), Row("linear", "linear", ("one",), RECIPE)
    embedded = cohort()
    h_BF = embedded.h_BF | {"two": embedded.h_BF["one"][:, ::-1].copy()}
    found = material(replace(embedded, h_BF=h_BF, observed_BF=embedded.observed_BF | {"two": h_BF["two"] < 9}))
    return found, cells_of([heads], 3, [Variant(), Variant("fewer labels", "50 %", share=0.5)]), cells_of([linear], 3)


def test_heads_on_the_same_features_are_trained_together_and_score_as_they_do_alone():
    found, heads, linear = of_heads()
    grouped = groups([*heads, *linear])
    assert [len(group) for group in grouped] == [6, 3, 6, 3, 1, 1, 1]
    assert [cell for group in grouped for cell in group] == [*heads, *linear]
    for group in grouped:
        for cell, outcome in zip(group, outcomes(group, found, "cpu"), strict=True):
            expected_B = judge(train_row(cell, found), cell, *found.tests(cell)[""], "cpu").score_B
            np.testing.assert_allclose(outcome["scores"][""], expected_B, atol=1e-5)


def test_a_head_that_fails_does_not_stop_those_beside_it(monkeypatch: pytest.MonkeyPatch):
    """The scores of the third fold are not finite."""
    found, heads, _ = of_heads()
    group = groups(heads)[0]
    original = cells_module.judge

    def broken(trained, cell, *rest):
        judged = original(trained, cell, *rest)
        return judged._replace(score_B=judged.score_B * np.nan) if cell.fold == 2 else judged

    monkeypatch.setattr(cells_module, "judge", broken)
    of = dict(zip(group, outcomes(group, found, "cpu"), strict=True))
    assert all(set(outcome) == ({"failed"} if cell.fold == 2 else {"scores", "doubts"}) for cell, outcome in of.items())
    assert {o["failed"] for o in of.values() if "failed" in o} == {
        "ArithmeticError: scores are not finite: the training diverged"
    }


@pytest.mark.ray
def test_each_cell_of_a_group_is_kept_in_its_own_file(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    found, heads, linear = of_heads()
    cells, trials = [*heads[:9], *linear], Trials(keep=Storage.open(tmp_path))
    with capsys.disabled():  # Tune pickles the progress bar, and what pytest puts in place of stderr cannot be
        ran = run_cells(cells, found, trials)
    assert not ran.failed and set(ran.scores) == set(cells)
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{cell.name}.json" for cell in cells}
    for cell in cells:
        expected_B = judge(train_row(cell, found), cell, *found.tests(cell)[""], "cpu").score_B
        np.testing.assert_allclose(ran.scores[cell][""], expected_B, atol=1e-5)


@pytest.mark.parametrize("name", ["multimodal-cnn", "resnet1d", "transformer"])
def test_a_supervised_cell_trains_from_random_weights_that_depend_on_the_seed(name: str):
    method = next(m for m in chosen([name], "smoke", ablations=False) if m.name == name)
    embedded = cohort(12, 12)
    x_BLT = np.random.default_rng(0).standard_normal((12, 6, 5000)).astype(np.float32)
    embedded = replace(embedded, inputs={"in": (x_BLT, np.ones((12, 6), dtype=bool))})
    recipe = replace(SUPERVISED["smoke"], scratch_epochs=1, seeds=2)
    encoder = Pretrained(
        build(LSEMVAEConfig(samples=5000, latent=2, channels=(1, 1, 1)), LEADS), "d", PreprocessConfig(), ""
    )
    digest = encoder.preprocess.digest
    found = plan.plan([method], {REFERENCE: encoder}, [encoder.model], LIMB_LEADS, RECIPE, recipe)
    (row,) = (row for row in found.rows if row.name == method.title)
    assert (row.trains, row.scratch, row.seeds, row.input) == ("all", True, 2, digest)
    embedded = replace(embedded, inputs={digest: embedded.inputs["in"]})
    here = Material(embedded, [(np.arange(8), np.arange(8, 12))], found.starts)
    first, again, second = (train_row(Cell(row, seed, 0), here) for seed in (0, 0, 1))
    scores = [
        judge(model, Cell(row, 0, 0), embedded, np.arange(8, 12), "cpu").score_B for model in (first, again, second)
    ]
    assert np.array_equal(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])
    untouched = found.starts[method.title].encoders.state_dict()
    assert any(not torch.equal(values, untouched[key]) for key, values in first.encoders.state_dict().items())


def test_a_finished_cell_is_read_again_only_as_the_same_training(tmp_path: Path):
    kept, row = _Kept(Storage.open(tmp_path)), Row("β, one", "linear", ("one",), RECIPE, made_of="digest")
    found = material(cohort())
    cell = Cell(row, 0, 1)
    tests = found.tests(cell)
    assert kept.read(cell, tests) is None
    count = len(found.folds[1][1])
    kept.write(cell, {"": [0.5] * count})
    scores, doubts = kept.read(cell, tests)  # as cells of before doubts wrote it
    assert scores[""].tolist() == [0.5] * count and doubts == {}
    others = [
        cell._replace(seed=1), cell._replace(fold=0), cell._replace(variant=Variant("fewer labels", "50 %", share=0.5)),
        cell._replace(row=row._replace(made_of="another encoder")),
        cell._replace(row=row._replace(recipe=replace(RECIPE, strengths=(0.1,)))),
    ]  # fmt: skip
    assert all(kept.read(other, found.tests(other)) is None for other in others)
    assert len({other.name for other in [cell, *others]}) == 6
    noisy = replace(found, noisy={"5 dB": found.embedded})  # it has not scored the noisy recordings
    assert kept.read(cell, noisy.tests(cell)) is None
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"": [0.5] * count}


def test_a_cell_keeps_the_doubts_of_its_fold(tmp_path: Path):
    """Standardised by the training recordings alone: a shift of the test recordings shows."""
    embedded = cohort(signal=0.0)
    folds = make_folds(embedded.y_B, embedded.subject_B, 3, 0)
    embedded.h_BF["one"][folds[1][1]] += 20.0
    found, kept = Material(embedded, folds), _Kept(Storage.open(tmp_path))
    row = Row("one", "linear", ("one",), RECIPE)
    ran = Ran()
    for fold in range(3):
        cell = Cell(row, 0, fold)
        score_B, doubts = judge(train_row(cell, found), cell, *found.tests(cell)[""], "cpu")
        kept.write(cell, {"": score_B.tolist()}, {kind: of.tolist() for kind, of in doubts.items()})
        scores, again = kept.read(cell, found.tests(cell))
        assert scores.keys() == {""} and again.keys() == {"distance"}
        np.testing.assert_allclose(again["distance"], doubts["distance"])
        ran.doubts[cell] = again
    ((key, doubt_B),) = abstention.out_of_fold(ran, found).items()
    assert key == ("one", 0, "distance")
    assert doubt_B[folds[1][1]].min() == 25 and doubt_B[folds[0][1]].max() < 10
    table = abstention.table({key: doubt_B}, embedded.record_B, "6L")
    assert table["value"].tolist() == doubt_B.tolist() and table["record_id"].tolist() == embedded.record_B.tolist()
    del ran.doubts[Cell(row, 0, 2)]  # kept by a run of before: a measure that is not complete does not count
    assert abstention.out_of_fold(ran, found) == {} and abstention.table({}, embedded.record_B, "6L").empty


# --- the plan and its tables -----------------------------------------------------------------------------------


def test_methods_are_the_recipes_and_the_supervised_architectures_at_every_size():
    for size in ("full", "cpu", "smoke"):
        found = methods(size)
        assert {name for name, method in found.items() if method.recipe} == {
            REFERENCE, *(name.removesuffix(f"-{size}") for name in COMPARED if name.endswith(f"-{size}"))
        }  # fmt: skip
        assert {"multimodal-cnn", "resnet1d", "xresnet1d", "transformer"} <= found.keys()
        assert len({method.title for method in found.values()}) == len(found)
        schedules = {
            (method.recipe.optim, method.recipe.preprocess, method.recipe.circular_shifts)
            for method in found.values()
            if method.recipe
        }
        assert len(schedules) == 1  # no method wins by its schedule
        assert [name for name, m in found.items() if not m.config and not m.recipe] == [*EXTERNAL]
    names = [method.name for method in chosen(["st-mem", "all"], "cpu", ablations=False)]
    assert (
        names[:2] == [REFERENCE, "st-mem"]
        and not set(names) & {*ABLATIONS, *EXTERNAL}
        and len(set(names)) == len(names)
    )
    assert set(ABLATIONS) <= {method.name for method in chosen(["all"], "cpu", ablations=True)}
    with pytest.raises(LsemvaeError, match="there is no method 'resnet': choose all, or some of lsemvae, "):
        chosen(["resnet"], "cpu", ablations=False)


@pytest.mark.parametrize("trains", ["linear", "head", "all"])
def test_a_plan_has_a_row_for_each_method_and_refuses_leads_that_one_cannot_take(trains: str):
    model = build(LSEMVAEConfig(samples=SAMPLES, latent=2, channels=(1, 1, 1)), LIMB_LEADS)
    encoder = Pretrained(model, "digest", PreprocessConfig(), "")
    recipe = replace(RECIPE, trains=trains, seeds=2)
    few = chosen(["multimodal-cnn"], "smoke", ablations=False)
    found = plan.plan(few, {REFERENCE: encoder}, [model, model], LIMB_LEADS, recipe, SUPERVISED["smoke"])
    names = ["LS-EMVAE", "Multimodal-CNN", "untrained encoder", CLASSICAL, QUANTILES]
    assert [row.name for row in found.rows] == names and not found.refused
    assert found.rows[0].seeds == (1 if trains == "linear" else 2) and found.rows[0].made_of == "digest"
    frozen = {name for of in found.encoders.values() for name in of}
    assert frozen == {"untrained encoder 0", "untrained encoder 1"} | ({"LS-EMVAE"} if trains != "all" else set())
    count = len(plan.cells(found, 3, ["fewer-labels", "external"], main=True))
    seeds = sum(row.seeds for row in found.rows)
    assert count == seeds * 3 * 4 + seeds and len(plan.cells(found, 3, ["fewer-labels"], main=False)) == seeds * 3
    without = plan.plan(few, {REFERENCE: encoder}, [build(model.config, LEADS)] * 2, LEADS, recipe, SUPERVISED["smoke"])
    assert "V1" in without.refused["LS-EMVAE"] and [row.name for row in without.rows] == names[1:]


def test_scores_become_a_table_without_methods_that_failed():
    embedded = cohort()
    found = material(embedded, noisy={"5 dB": embedded}, others={"elsewhere": cohort(seed=3)})
    good, bad = Row("good", "linear", ("one",), RECIPE), Row("bad", "linear", ("one",), RECIPE)
    ran, rng = Ran(), np.random.default_rng(0)
    for fold, (_, test) in enumerate(found.folds):
        for row in (good, bad):
            ran.scores[Cell(row, 0, fold)] = {"": rng.random(len(test)), "5 dB": rng.random(len(test))}
    ran.scores[Cell(good, 0, ALL)] = {"elsewhere": rng.random(60)}
    broken = Cell(bad, 0, 2)
    del ran.scores[broken]
    ran.failed[broken] = "ArithmeticError: it diverged"
    ran.failed[Cell(good, 0, ALL)] = "RuntimeError: on all recordings"  # takes nothing from the main table
    scores, failed = plan.table(ran, found, LIMB_LEADS, "main")
    columns = ["analysis", "setting", "leads", "method", "seed", "record_id", "fold", "score", "decision"]
    assert list(scores.columns) == columns and set(scores["method"]) == {"naive", "good"}
    assert scores.groupby(["analysis", "setting"]).size().to_dict() == {
        ("external", "elsewhere"): 60, ("main", ""): 120, ("noise", "5 dB"): 60
    }  # fmt: skip
    assert failed["fold"].tolist() == [2, ALL]
    assert failed.iloc[0].to_dict() == {
        "analysis": "main", "setting": "", "leads": "6L", "method": "bad", "seed": 0, "fold": 2,
        "reason": "ArithmeticError: it diverged",
    }  # fmt: skip
    main = scores[(scores["analysis"] == "main") & (scores["method"] == "good")].set_index("record_id")
    test = found.folds[0][1]
    assert main["score"].loc[embedded.record_B[test]].tolist() == ran.scores[Cell(good, 0, 0)][""].tolist()
    assert scores[scores["analysis"] == "external"]["record_id"].iloc[0] == "elsewhere/r000"


def test_lead_sets_and_analyses_are_named_or_refused():
    found = plan.lead_sets(["6", "12"], plan.SMALL_SETS)
    assert found[LIMB_LEADS] == found[LEADS] == "main" and found[("I", "II", "III")] == "lead sets" and len(found) == 10
    assert plan.analyses(["all"], external=False) == tuple(name for name in plan.ANALYSES if name != "external")
    assert plan.analyses([], external=True) == ("external",)
    with pytest.raises(LsemvaeError, match="no analysis 'ages': choose all"):
        plan.analyses(["ages"], external=False)
    with pytest.raises(LsemvaeError, match="give --external URI"):
        plan.analyses(["external"], external=False)


def test_features_of_two_preprocessings_are_those_of_the_common_recordings():
    one, other = cohort(), cohort(seed=1)
    other = replace(other, h_BF={"two": other.h_BF["one"]}, observed_BF={"two": other.observed_BF["one"]}, inputs={})
    kept = np.array([row for row in range(60) if row not in (3, 59)])
    other = replace(
        other, h_BF={"two": other.h_BF["two"][kept]}, observed_BF={"two": other.observed_BF["two"][kept]},
        y_B=one.y_B[kept], record_B=other.record_B[kept], subject_B=one.subject_B[kept], refused=2,
    )  # fmt: skip
    found = merged([one, other])
    assert found.record_B.tolist() == other.record_B.tolist() and found.refused == 2
    assert np.array_equal(found.h_BF["one"], one.h_BF["one"][kept])
    assert np.array_equal(found.h_BF["two"], other.h_BF["two"])
    assert np.array_equal(found.inputs["in"][0], one.inputs["in"][0][kept])


# --- folds that a column gives ---------------------------------------------------------------------------------


def test_given_folds_are_taken_as_they_are():
    y_B, subject_B = np.array([0, 1, 0, 1, 0, 1]), np.array(list("aabbcd"))
    found = given_folds(np.array([10.0, 10, 2, 2, 3, 3]), y_B, subject_B, "strat_fold")
    assert [test.tolist() for _, test in found] == [[2, 3], [4, 5], [0, 1]]
    assert all(sorted([*train, *test]) == list(range(6)) for train, test in found)


@pytest.mark.parametrize(
    ("fold_B", "says"),
    [
        ([1, 1, 2, 2, np.nan, 3], "1 of 6 labelled recordings have no fold"),
        ([1] * 6, "every recording is in fold 1"),
        ([1, 2, 2, 2, 1, 1], "1 subjects are in two folds"),
        ([1, 1, 1, 1, 2, 1], "all 1 recordings of fold 2 have label 0"),
    ],
)
def test_given_folds_that_would_fool_are_refused(fold_B: list, says: str):
    y_B, subject_B = np.array([0, 1, 0, 1, 0, 1]), np.array(list("aabbcd"))
    with pytest.raises(LsemvaeError, match=f"--folds strat_fold: {says}"):
        given_folds(np.array(fold_B, dtype=float), y_B, subject_B, "strat_fold")


def test_a_recipe_is_the_same_whatever_the_method():
    assert all(isinstance(recipe, FinetuneRecipe) and recipe.trains == "all" for recipe in SUPERVISED.values())
    assert all(recipe.shifts > 1 for recipe in SUPERVISED.values())


@pytest.mark.parametrize("content", [b"", b'{"": [0.5, ', b"\xff", b"[]"])
def test_a_cell_s_garbled_file_is_said_and_trained_again(content: bytes, tmp_path: Path, caplog):
    kept, found = _Kept(Storage.open(tmp_path)), material(cohort())
    cell = Cell(Row("one", "linear", ("one",), RECIPE), 0, 0)
    kept.write(cell, {"": [0.5] * len(found.folds[0][1])})
    assert kept.read(cell, found.tests(cell)) is not None
    (tmp_path / f"{cell.name}.json").write_bytes(content)
    assert kept.read(cell, found.tests(cell)) is None
    assert f"{cell.name}.json is damaged" in caplog.text and "It is trained again" in caplog.text


def test_a_fold_of_one_class_is_refused_before_anything_is_trained():
    """Each class has enough subjects; but one subject has both, so a fold is left with one class."""
    y_B, subject_B = np.array([0, 1, 0, 1]), np.array(["s0", "s1", "s2", "s2"])
    with pytest.raises(LsemvaeError, match=r"fold 1 has one class only: lower --folds \(now 2\) or add recordings"):
        make_folds(y_B, subject_B, 2, seed=0)


def test_folds_that_tear_a_subject_apart_are_refused(monkeypatch: pytest.MonkeyPatch):
    """As if the library kept no groups together. The guard works without assertions, too (`python -O`)."""
    import sklearn.model_selection as library

    class Tears(library.StratifiedKFold):
        def split(self, x: object, y: np.ndarray, groups: np.ndarray) -> object:
            return super().split(x, y)

    monkeypatch.setattr(library, "StratifiedGroupKFold", Tears)
    y_B, subject_B = np.tile([0, 0, 1, 1], 6), np.repeat([f"s{number}" for number in range(12)], 2)
    with pytest.raises(LsemvaeError, match=r"fold 0 tests on recordings of \d+ subjects that it trains on"):
        make_folds(y_B, subject_B, 3, seed=0)
