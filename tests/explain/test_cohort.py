"""Means over subjects and their intervals, against plain loops and known truths."""

import warnings

import numpy as np
import pandas as pd
import pytest

from lsemvae.cohorts.demographics import AGES
from lsemvae.explain.cohort import COLUMNS, DIFFERENCE, igar_summary, summary
from lsemvae.explain.igar import PEAKS
from lsemvae.explain.waves import WAVES

LEADS = ("I", "II")


def simulated_table(records: int, subjects: int, seed: int = 0, effect: float = 0.0) -> pd.DataFrame:
    """Shares with an effect of the subject and of the recording; those of label 1 are larger by `effect`."""
    rng = np.random.default_rng(seed)
    subject_B = rng.integers(subjects, size=records)
    label_B = (subject_B % 2).astype(float)
    cells = [f"{kind}.{lead}.{wave}" for kind in ("signed", "absolute") for lead in LEADS for wave in WAVES]
    values = 0.1 + 0.05 * rng.standard_normal((subjects, len(cells)))[subject_B]
    values += 0.02 * rng.standard_normal(values.shape) + effect * label_B[:, None]
    table = pd.DataFrame(values, columns=cells)
    return table.assign(
        subject_id=subject_B.astype(str), label=label_B, female=(subject_B % 3 == 0).astype(float),
        age_years=30.0 + subject_B % 60,
    )  # fmt: skip


def row_of(found: pd.DataFrame, group: str, lead: str, wave: str) -> pd.Series:
    rows = found[(found.group == group) & (found.lead == lead) & (found.wave == wave)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_means_are_those_of_a_plain_loop():
    table = simulated_table(90, 25)
    found = summary(table, LEADS, draws=20)
    assert list(found.columns) == [*COLUMNS, "records", "subjects"]
    members = {"all": table, "label 1": table[table.label == 1], "women": table[table.female == 1]}
    members |= {"50 to 64": table[(table.age_years >= 50) & (table.age_years < 65)]}
    members |= {"men, label 0": table[(table.female == 0) & (table.label == 0)]}
    for group, rows in members.items():
        for lead in (*LEADS, "all"):
            for wave in (*WAVES, "all"):
                for kind in ("signed", "absolute"):
                    of_subjects = []
                    for _, own in rows.groupby("subject_id"):
                        totals = []
                        for _, row in own.iterrows():
                            cells = [(a, b) for a in LEADS for b in WAVES if lead in (a, "all") and wave in (b, "all")]
                            totals.append(sum(row[f"{kind}.{a}.{b}"] for a, b in cells))
                        of_subjects.append(np.mean(totals))
                    assert row_of(found, group, lead, wave)[kind] == pytest.approx(np.mean(of_subjects))
        counts = row_of(found, group, "I", "P")
        assert (counts.records, counts.subjects) == (len(rows), rows.subject_id.nunique())
    difference = row_of(found, DIFFERENCE, "II", "T")
    means = [row_of(found, f"label {label}", "II", "T").signed for label in (1, 0)]
    assert difference.signed == pytest.approx(means[0] - means[1])


def test_intervals_are_those_of_a_plain_bootstrap():
    table = simulated_table(60, 20)
    row = row_of(summary(table, LEADS, draws=4000), "all", "I", "QRS")
    of_subjects = table.groupby("subject_id")["signed.I.QRS"].mean().to_numpy()
    rng = np.random.default_rng(1)
    means = [rng.choice(of_subjects, len(of_subjects)).mean() for _ in range(4000)]
    width = np.ptp(np.percentile(means, [2.5, 97.5]))
    np.testing.assert_allclose([row.signed_low, row.signed_high], np.percentile(means, [2.5, 97.5]), atol=0.06 * width)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 40 cohorts with 20 independent cells each; a bootstrap of 20 subjects covers somewhat less than 95 %."""
    inside, of_difference = [], []
    for seed in range(40):
        table = simulated_table(80, 40, seed, effect=0.03).drop(columns=["female", "age_years"])
        found = summary(table, LEADS, draws=200, seed=seed)
        cells = found[(found.lead != "all") & (found.wave != "all")]
        for group, truth, counted in (("label 0", 0.1, inside), (DIFFERENCE, 0.03, of_difference)):
            of = cells[cells.group == group]
            counted.append(np.mean((of.signed_low < truth) & (truth < of.signed_high)))
    assert 0.88 < np.mean(inside) < 0.97 and 0.90 < np.mean(of_difference) < 0.97


def test_recordings_of_a_subject_are_no_independent_observations():
    """Each recording ten times over: the mean and the interval stay as they are."""
    table = simulated_table(40, 40)
    once, often = (summary(of, LEADS, draws=300) for of in (table, pd.concat([table] * 10)))
    for column in ("signed", "signed_low", "absolute_high"):
        np.testing.assert_allclose(often[column], once[column], rtol=1e-5, atol=1e-7)
    assert (often.records == 10 * once.records).all() and (often.subjects == once.subjects).all()


def test_small_groups_have_no_intervals_and_empty_ones_are_left_out():
    table = simulated_table(20, 10)
    table["female"] = np.where(table.subject_id == table.subject_id[0], 1.0, 0.0)
    table["age_years"] = np.nan
    table = table.drop(columns="label")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary(table, LEADS, draws=50)
    assert list(found.group.unique()) == ["all", "women", "men"]
    women = found[found.group == "women"]
    assert women.signed.notna().all() and (women.subjects == 1).all()
    assert women[["signed_low", "signed_high", "absolute_low", "absolute_high"]].isna().all().all()
    assert found[found.group == "men"].signed_low.notna().all()
    assert summary(table.iloc[:0], LEADS).empty


def test_missing_labels_sexes_and_cells_are_left_out():
    table = simulated_table(60, 30)
    table.loc[:9, ["label", "female", "age_years"]] = np.nan
    table.loc[10:19, "signed.I.P"] = np.nan
    table["absolute.II.T"] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary(table, LEADS, draws=50)
    sizes = found.drop_duplicates("group").set_index("group").records
    assert sizes["all"] == 60 and sizes["label 0"] + sizes["label 1"] == 50 == sizes["women"] + sizes["men"]
    assert sizes[[name for name in AGES if name in sizes]].sum() == 50
    expected = table.groupby("subject_id")["signed.I.P"].mean().mean()
    assert row_of(found, "all", "I", "P").signed == pytest.approx(expected)
    assert row_of(found, "all", "II", "T")[["absolute", "absolute_low"]].isna().all()


def test_the_same_seed_gives_the_same_table():
    table = simulated_table(40, 20)
    first, second, other = (summary(table, LEADS, draws=50, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, second)
    assert not first.signed_low.equals(other.signed_low)


def test_igar_is_summed_up_by_lead_and_by_peak():
    rng = np.random.default_rng(0)
    columns = [f"igar.{lead}" for lead in LEADS] + [f"igar.{lead}.{peak}" for lead in LEADS for peak in PEAKS]
    table = pd.DataFrame(rng.random((30, len(columns))), columns=columns).assign(subject_id=np.arange(30) // 2)
    table.loc[3, [f"igar.II.{peak}" for peak in PEAKS]] = np.nan  # an absent lead
    found = igar_summary(table, LEADS, draws=200).set_index(["kind", "name"])
    assert list(found.index) == [("lead", "I"), ("lead", "II"), *(("wave", peak) for peak in PEAKS)]
    assert found.ratio["lead", "II"] == pytest.approx(table["igar.II"].mean())
    of_records = table[["igar.I.R", "igar.II.R"]].mean(axis=1)
    assert found.ratio["wave", "R"] == pytest.approx(of_records.groupby(table.subject_id).mean().mean())
    assert ((found.low < found.ratio) & (found.ratio < found.high)).all()
