"""From scores to tables: which trainings count, subgroups, differences, files, and what the paper printed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from support import scored

from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.compare import Comparison, Known, Scores, compare
from lsemvae.evaluation.metrics import ALL_METRICS, Estimate
from lsemvae.evaluation.published import published
from lsemvae.evaluation.significance import holm
from lsemvae.evaluation.tables import (
    all_as_markdown,
    analysis_table,
    differences_table,
    escaped,
    main_table,
    subgroups_table,
)
from lsemvae.storage import Storage

METHODS = {name: scored.METHODS[name] for name in ("LS-EMVAE", "ST-MEM", "naive")}


@pytest.fixture(scope="module")
def scores() -> Scores:
    """Three methods on 12 leads, two settings of another analysis, and MVAE, which failed."""
    of, whole = scored.people(150), scored.scores(150)
    parts = [scored.lines(of, METHODS)]
    parts += [scored.lines(of, {"LS-EMVAE": d}, "noise", s, seeds=[0]) for d, s in ((1.2, "20 dB"), (0.6, "5 dB"))]
    return Scores(whole.facts, of, pd.concat(parts), whole.failed)


@pytest.fixture(scope="module")
def compared(scores: Scores) -> Comparison:
    return compare(scores, draws=40)


def value(comparison: Comparison, metric: str, **cell: object) -> pd.Series:
    wanted = {"analysis": "main", "leads": "12L", "metric": metric} | cell
    (row,) = [row for _, row in comparison.metrics.iterrows() if all(row[key] == of for key, of in wanted.items())]
    return row


def auroc(scores: Scores, method: str, seed: int, rows: object = slice(None)) -> float:
    """By scikit-learn, of the main table's scores among the people with these record ids."""
    of = scores.scores[(scores.scores.analysis == "main") & (scores.scores.method == method)]
    by_record = of[of.seed == seed].set_index("record_id").score
    people = scores.people.set_index("record_id").loc[rows]
    return roc_auc_score(people.label, by_record[people.index])


def test_a_value_is_the_mean_over_the_seeds_and_its_folds_and_seeds_are_beside_it(scores: Scores, compared: Comparison):
    row = value(compared, "auroc", method="LS-EMVAE")
    of_seeds = [auroc(scores, "LS-EMVAE", seed) for seed in (0, 1)]
    assert row.value == pytest.approx(np.mean(of_seeds))
    assert row.seed_sd == pytest.approx(np.std(of_seeds, ddof=1))
    assert (row.seeds, row.recordings, row.positive) == (2, 150, scores.people.label.sum())
    assert row.low < row.value < row.high
    folds = [
        np.mean([auroc(scores, "LS-EMVAE", seed, of.record_id) for seed in (0, 1)])
        for _, of in scores.people.groupby("fold")
    ]
    assert (row.fold_mean, row.fold_sd) == pytest.approx((np.mean(folds), np.std(folds, ddof=1)))
    assert compared.line("LS-EMVAE", "12L").keys() == set(ALL_METRICS)
    assert value(compared, "auroc", method="LS-EMVAE", analysis="noise", setting="5 dB").value < row.value


def test_what_is_known_is_not_computed_again(scores: Scores, compared: Comparison):
    of_line = {row.method: Estimate(row.difference, row.low, row.high) for row in compared.differences.itertuples()}
    known = Known({name: compared.line(name, "12L") for name in METHODS}, of_line)
    found = compare(scores, draws=40, known=known)
    for table in ("metrics", "differences", "subgroups", "abstention"):
        pd.testing.assert_frame_equal(getattr(found, table), getattr(compared, table))
    given = Estimate(9.0, 8.0, 10.0)
    found = compare(scores, draws=40, known=Known({"naive": dict.fromkeys(ALL_METRICS, given)}, {"naive": given}))
    assert value(found, "auroc", method="naive").value == 9.0
    assert found.differences.set_index("method").high["naive"] == 10.0
    assert found.line("ST-MEM", "12L") == compared.line("ST-MEM", "12L")


def test_the_order_of_the_lines_does_not_matter(scores: Scores, compared: Comparison):
    shuffled = scores.scores[scores.scores.analysis == "main"].sample(frac=1, random_state=0)
    found = compare(replace(scores, scores=shuffled), draws=40)
    for method in METHODS:
        assert found.line(method, "12L")["mcc"] == compared.line(method, "12L")["mcc"]


def test_a_seed_that_lacks_recordings_is_left_out_and_a_method_without_any_says_why(scores: Scores):
    table = scores.scores[scores.scores.analysis == "main"]
    lost = (table.method == "ST-MEM") & (table.seed == 1) & (table.fold == 2)
    found = compare(replace(scores, scores=table[~lost]), draws=10)
    row = value(found, "auroc", method="ST-MEM")
    assert row.seeds == 1 and np.isnan(row.seed_sd)
    assert row.value == pytest.approx(auroc(scores, "ST-MEM", 0))
    failed = value(found, "auroc", method="MVAE")
    assert failed.note == "failed: CUDA out of memory <at> fold 3" and np.isnan(failed.value) and failed.seeds == 0
    assert "MVAE" not in set(found.differences.method) | set(found.subgroups.method)
    assert found.line("MVAE", "12L") == {}


def test_differences_are_of_the_reference_and_corrected_over_their_analysis(scores: Scores, compared: Comparison):
    found = compared.differences.set_index("method")
    assert list(found.index) == ["ST-MEM", "naive"]
    means = {method: np.mean([auroc(scores, method, seed) for seed in (0, 1)]) for method in METHODS}
    for method, row in found.iterrows():
        assert row.difference == pytest.approx(means["LS-EMVAE"] - means[method])
        assert row.low < row.difference < row.high
    assert found.p_holm.tolist() == pytest.approx(holm(found.p.tolist()))
    assert found.p_holm["naive"] < 0.001 < found.p["ST-MEM"]
    other = compare(scores, draws=10, reference="ST-MEM").differences.set_index("method")
    assert other.difference["LS-EMVAE"] == pytest.approx(-found.difference["ST-MEM"])
    assert compare(scores, draws=10, reference="absent").differences.empty


def test_subgroups_are_measured_alone_or_say_why_not(scores: Scores, compared: Comparison):
    found = compared.subgroups[compared.subgroups.method == "LS-EMVAE"]
    women = scores.people[scores.people.female == 1]
    row = found[(found.subgroup == "women") & (found.metric == "auroc")].iloc[0]
    assert (row.recordings, row.subjects, row.positive) == (len(women), women.subject_id.nunique(), women.label.sum())
    expected = [auroc(scores, "LS-EMVAE", seed, women.record_id) for seed in (0, 1)]
    assert row.value == pytest.approx(np.mean(expected))
    assert row.low < row.value < row.high
    sizes = found.drop_duplicates("subgroup").set_index("subgroup").recordings
    assert sizes[["women", "men", "sex not known"]].sum() == 150
    assert sizes[["under 50", "50 to 64", "65 to 74", "75 and over", "age not known"]].sum() == 150
    few = found[found.subgroup == "sex not known"]
    assert list(few.note) == ["fewer than 20 recordings"] and few.value.isna().all()
    people = scores.people.assign(label=scores.people.label.where(scores.people.female != 0, 0))
    one_class = compare(replace(scores, people=people), draws=10).subgroups
    assert set(one_class[one_class.subgroup == "men"].note) == {"all recordings have label 0"}


@pytest.mark.parametrize(
    ("age_years", "subgroup"), [(49.9, "under 50"), (50, "50 to 64"), (64.9, "50 to 64"), (75, "75 and over")]
)
def test_the_bounds_of_the_age_groups(scores: Scores, age_years: float, subgroup: str):
    main = scores.scores[(scores.scores.analysis == "main") & (scores.scores.method == "naive")]
    people = scores.people.assign(age_years=age_years)
    found = compare(replace(scores, scores=main, people=people), draws=2).subgroups
    assert set(found[(found.kind == "age") & (found.recordings > 0)].subgroup) == {subgroup}


def test_an_analysis_with_one_class_does_not_stop_the_others(scores: Scores):
    healthy = scores.people.assign(record_id="h" + scores.people.record_id, label=0)
    both = pd.concat([scores.people, healthy])
    external = scored.lines(healthy, {"LS-EMVAE": 1.0}, "external", "healthy", seeds=[0])
    found = compare(replace(scores, people=both, scores=pd.concat([scores.scores, external])), draws=10)
    row = value(found, "auroc", method="LS-EMVAE", analysis="external")
    assert row.note == "all recordings have the same label" and np.isnan(row.value)
    assert value(found, "auroc", method="LS-EMVAE").recordings == 150


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"people": s.people.drop(columns="female")}, "people lacks the columns female"),
        (lambda s: {"people": pd.concat([s.people, s.people[:1]])}, "'r0' is twice"),
        (lambda s: {"people": s.people[1:]}, "1 scored recordings, such as 'r0'"),
        (lambda s: {"people": s.people.assign(label=2)}, "neither 0 nor 1"),
        (lambda s: {"scores": s.scores.assign(score=1.5)}, "main, , 12L, LS-EMVAE: a score is 1.5"),
        (lambda s: {"scores": s.scores.assign(score=np.nan)}, "a score is nan"),
    ],
)
def test_scores_that_cannot_be_right_are_refused(scores: Scores, change, words: str):
    with pytest.raises(LsemvaeError, match=words):
        replace(scores, **change(scores))


def test_a_recording_scored_twice_by_a_seed_is_refused(scores: Scores):
    with pytest.raises(LsemvaeError, match="LS-EMVAE: recording 'r0' is scored twice"):
        compare(replace(scores, scores=pd.concat([scores.scores, scores.scores[:1]])), draws=2)


def test_what_is_written_is_read_again(scores: Scores, compared: Comparison, tmp_path: Path):
    place = Storage.open(tmp_path / "new")
    scores.write(place)
    compared.write(place)
    again, comparison = Scores.read(place), Comparison.read(place)
    assert again.facts == scores.facts
    for name in ("people", "scores", "failed"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(scores, name).reset_index(drop=True), check_dtype=False
        )
    for name in ("metrics", "differences", "subgroups"):
        pd.testing.assert_frame_equal(getattr(comparison, name), getattr(compared, name), check_dtype=False)
    assert comparison.line("ST-MEM", "12L").keys() == set(ALL_METRICS)
    assert (comparison.reference, comparison.draws) == ("LS-EMVAE", 40)
    (tmp_path / "new" / "metrics.csv").unlink()
    with pytest.raises(LsemvaeError, match=r"no metrics\.csv"):
        Comparison.read(place)


def test_tables_show_each_figure_once(compared: Comparison):
    main = main_table(compared)
    assert main.header[:3] == ["method", "leads", "AUROC"] and main.header[-1] == "seeds"
    assert [row[0] for row in main.rows] == [*METHODS, "MVAE"]
    assert all(len(row) == len(main.header) for row in main.rows)
    assert main.rows[0][2] == str(compared.line("LS-EMVAE", "12L")["auroc"])
    assert main.rows[3][2] == "failed: CUDA out of memory <at> fold 3"
    assert main_table(compared, ["calibration_slope"]).rows[2][2] == "–"  # one score for all: no slope
    assert [row[-1] for row in differences_table(compared).rows] == ["no", "yes"]
    assert analysis_table(compared, "noise").header == ["method", "20 dB, 12L", "5 dB, 12L"]
    subgroups = {row[0]: row for row in subgroups_table(compared, "LS-EMVAE", "12L", ["auroc", "mcc"]).rows}
    assert subgroups["sex not known"][-2:] == ["fewer than 20 recordings", ""]
    assert subgroups["women"][3].endswith(" %") and "[" in subgroups["women"][4]


def test_markdown_has_every_table_and_no_cell_breaks_out(compared: Comparison):
    text = all_as_markdown(compared)
    assert text.count("| method | leads |") == 3
    assert "&lt;at> fold 3" in text and "<at>" not in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert escaped("a | b\nc") == "a \\| b c"


def test_what_the_paper_printed():
    ph = published("ph").set_index(["method", "leads"])
    assert ph.auroc["LS-EMVAE", "12L"] == 0.852 and ph.auroc["MoPoE-VAE", "6L"] == 0.787
    assert (ph.accuracy["LS-EMVAE", "6L"], ph.mcc["LS-EMVAE", "6L"]) == (0.815, 0.412)
    assert np.isnan(ph.auroc["beta-VAE", "6L"]) and np.isnan(ph.mcc["ST-MEM", "12L"])
    assert len(published("elevated_pawp")) == 2
    assert published("norm") is None
