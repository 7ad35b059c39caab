"""The simulated cohort: MIMIC-IV-ECG's files, patients' hearts, and the best AUROC that is stated."""

import csv
import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import command as command_module
import numpy as np
import pandas as pd
import pytest
import wfdb
from scipy.signal import find_peaks
from scipy.stats import norm
from simulate import OnRay
from sklearn.metrics import roc_auc_score
from support.session import ROOT, kept_signals, workflow

from lsemvae.cohorts.simulated import (
    FILE_LEADS,
    SUBJECTS_A_TASK,
    CohortConfig,
    best_auroc,
    draw_pressures,
    severity_of,
    simulate_cohort,
)
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.simulate import EcgParameters, simulate_ecg

QUIET = (0.0,) * 5


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """60 subjects with many faults, and its summary."""
    config = CohortConfig(subjects=60, seed=11, nan_share=0.3, flat_share=0.2, unmeasured_share=0.1, af_share=0.1)
    return simulate_cohort(config, tmp_path_factory.mktemp("simulated") / "cohort")


def table(cohort, name):
    return pd.read_csv(cohort.folder / name)


def stored(cohort, path):
    """int16 [12, T] as it lies in the file."""
    return np.fromfile(cohort.folder / f"{path}.dat", "<i2").reshape(-1, 12).T


def beat(signal_mv_LT):
    """The median beat [12, 350], R peak at 125, its PR segment at zero."""
    centred = signal_mv_LT - np.median(signal_mv_LT, axis=1, keepdims=True)
    energy = np.convolve((np.gradient(centred, axis=1) ** 2).sum(axis=0), np.ones(25) / 25, "same")
    peaks, _ = find_peaks(energy, height=0.3 * energy.max(), distance=125)
    peaks = peaks[(peaks > 130) & (peaks < 4700)]
    median = np.median([centred[:, peak - 125 : peak + 225] for peak in peaks], axis=0)
    return dict(zip(LEADS, median - median[:, 95:103].mean(axis=1, keepdims=True), strict=True))


def features(signal_mv_LT):
    """What pressure changes in patients, each rising with it: mV, and degrees for the axis."""
    leads = beat(signal_mv_LT)
    p, qrs, t = slice(30, 98), slice(103, 165), slice(190, 310)
    net = {lead: leads[lead][qrs].max() + leads[lead][qrs].min() for lead in ("I", "aVF")}
    return {
        "P in II": leads["II"][p].max(),
        "QRS axis": np.degrees(np.arctan2(net["aVF"], net["I"])),
        "R in V1": leads["V1"][qrs].max(),
        "S in V5 and V6": -leads["V5"][qrs].min() - leads["V6"][qrs].min(),
        "T inverted in V1 to V3": -sum(leads[lead][t].mean() for lead in ("V1", "V2", "V3")),
    }


def random_heart(rng, severity):
    return EcgParameters(
        severity=severity,
        heart_rate_bpm=rng.uniform(55, 95),
        rotation_rad=tuple(np.radians(12) * rng.standard_normal(3)),
        gains=tuple(np.exp(0.15 * rng.standard_normal(3))),
    )


# ------------------------------------------------------------------------------------------------ the files


def test_wfdb_reads_every_record_and_agrees_with_its_header(cohort):
    for row in table(cohort, "record_list.csv").itertuples():
        record = wfdb.rdrecord(cohort.folder / row.path, physical=False)
        assert record.sig_name == list(FILE_LEADS)
        assert (record.fs, record.sig_len, record.adc_gain, record.units) == (
            500,
            5000,
            [200.0] * 12,
            ["mV"] * 12,
        )
        np.testing.assert_array_equal(record.d_signal.T, stored(cohort, row.path))
        assert record.checksum == record.calc_checksum()
        assert record.init_value == record.d_signal[0].tolist()
        assert str(record.base_datetime) == row.ecg_time
        assert record.comments == [f"<subject_id>: {row.subject_id}"]


def test_the_header_is_the_published_one_line_by_line(cohort):
    row = table(cohort, "record_list.csv").iloc[0]
    lines = (cohort.folder / f"{row.path}.hea").read_text().splitlines()
    day, clock = row.ecg_time.split()
    assert lines[0] == f"{row.study_id} 12 500 5000 {clock} {'/'.join(reversed(day.split('-')))}"
    signal = stored(cohort, row.path).astype(int)
    assert lines[1] == f"{row.study_id}.dat 16 200.0(0)/mV 16 0 {signal[0, 0]} {signal[0].sum() % 65536} 0 I"
    assert [line.split()[-1] for line in lines[5:7]] == ["aVF", "aVL"]
    assert lines[-1] == f"# <subject_id>: {row.subject_id}"
    assert (cohort.folder / f"{row.path}.dat").stat().st_size == 120_000


def test_the_tables_have_the_published_columns_and_paths(cohort):
    records, machine, labels, truth = (
        table(cohort, f"{name}.csv") for name in ("record_list", "machine_measurements", "labels", "truth")
    )
    assert list(records) == ["subject_id", "study_id", "file_name", "ecg_time", "path"]
    assert len(list(machine)) == 33
    assert list(machine)[:5] == ["subject_id", "study_id", "cart_id", "ecg_time", "report_0"]
    assert list(machine)[21:26] == ["report_17", "bandwidth", "filtering", "rr_interval", "p_onset"]
    assert list(labels) == ["subject_id", "study_id", "path", "mpap_mmhg", "ph"]
    for other in (machine, labels, truth):
        assert other.study_id.tolist() == records.study_id.tolist()
    for row in records.itertuples():
        subject, study = str(row.subject_id), str(row.study_id)
        assert (len(subject), subject[0], len(study), study[0]) == (8, "1", 8, "4")
        assert row.path == f"files/p{subject[:4]}/p{subject}/s{study}/{study}"
    on_disk = {str(path.relative_to(cohort.folder))[:-4] for path in cohort.folder.rglob("*.hea")}
    assert on_disk == set(records.path)
    assert records.study_id.is_unique
    assert records.subject_id.nunique() == cohort.subjects == 60
    assert records.subject_id.value_counts().max() > 3


def test_labels_follow_the_pressure_and_do_not_tell_the_severity(cohort):
    labels = table(cohort, "labels.csv")
    clear = (labels.mpap_mmhg - 20).abs() > 0.01
    assert (labels.ph == (labels.mpap_mmhg > 20))[clear].all()
    assert 0 < labels.ph.sum() == cohort.ph_records < cohort.records
    by_subject = labels.groupby("subject_id").mpap_mmhg
    assert (by_subject.max() / by_subject.min()).max() < 1.4
    truth = json.loads((cohort.folder / "truth.json").read_text())
    assert truth["best_auroc"] == cohort.best_auroc
    assert truth["config"]["seed"] == 11
    severity = table(cohort, "truth.csv").severity
    assert cohort.cohort_auroc == pytest.approx(roc_auc_score(labels.ph, severity), abs=1e-6)


def test_nan_and_flat_leads_come_at_the_rates_asked_for(cohort):
    signals = [stored(cohort, path) for path in table(cohort, "labels.csv").path]
    has_nan = sum((signal == -32768).any() for signal in signals)
    has_flat = sum((signal == 0).all(axis=1).any() for signal in signals)
    assert (has_nan, has_flat) == (cohort.nan_records, cohort.flat_records)
    assert 0.2 < has_nan / len(signals) < 0.4
    assert 0.1 < has_flat / len(signals) < 0.3
    assert CohortConfig.nan_share == pytest.approx(10_554 / 800_035, rel=1e-3)
    assert CohortConfig.flat_share == pytest.approx(1_950 / 800_035, rel=1e-3)


def test_einthoven_and_goldberger_hold_to_one_step(cohort):
    checked = 0
    for path in table(cohort, "labels.csv").path:
        lead = dict(zip(FILE_LEADS, stored(cohort, path).astype(float), strict=True))
        if any((lead[name] == -32768).any() or not lead[name].any() for name in LEADS[:6]):
            continue
        checked += 1
        for residual in (
            lead["I"] + lead["III"] - lead["II"],
            lead["aVR"] + (lead["I"] + lead["II"]) / 2,
            lead["aVL"] - lead["I"] + lead["II"] / 2,
            lead["aVF"] - lead["II"] + lead["I"] / 2,
        ):
            assert np.abs(residual).max() <= 1  # step of 5 uV
    assert checked > 50


def test_not_measurable_is_a_number_and_the_rest_is_plausible(cohort):
    machine = table(cohort, "machine_measurements.csv")
    for column in ("p_onset", "p_end", "qrs_onset", "qrs_end", "t_end"):
        assert (machine[column] == 29999).any()
        assert machine.loc[machine[column] != 29999, column].between(30, 900).all()
    for column in ("p_axis", "qrs_axis", "t_axis"):
        assert {32767, -32768} <= set(machine[column])
        assert machine.loc[~machine[column].isin((32767, -32768)), column].between(-180, 180).all()
    assert (machine.rr_interval == 65535).any()
    assert machine.loc[machine.rr_interval != 65535, "rr_interval"].between(400, 1500).all()
    fibrillating = machine.report_0 == "Atrial fibrillation"
    assert fibrillating.any()
    assert (machine.p_onset[fibrillating] == 29999).all()
    assert machine.report_0.str.contains("Sinus").sum() == (~fibrillating).sum()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    config = CohortConfig(subjects=5, seed=3)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        simulate_cohort(replace(config, seed=seed), folder)
    names = sorted(str(path.relative_to(folders[0])) for path in folders[0].rglob("*") if path.is_file())
    assert names == sorted(str(p.relative_to(folders[1])) for p in folders[1].rglob("*") if p.is_file())
    assert filecmp.cmpfiles(folders[0], folders[1], names, shallow=False) == (names, [], [])
    assert (folders[0] / "labels.csv").read_bytes() != (folders[2] / "labels.csv").read_bytes()


def same_files(one, other) -> bool:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def at_once(work, groups):
    """Two groups of subjects at a time, ahead of what is written."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(work, groups)


@pytest.mark.parametrize("subjects", [SUBJECTS_A_TASK - 1, 3 * SUBJECTS_A_TASK + 1])
def test_wherever_it_is_simulated_the_bytes_are_the_same(tmp_path, subjects):
    config = CohortConfig(subjects=subjects, mean_studies=1.2, seed=3, nan_share=0.2, flat_share=0.2)
    done = []
    for name, run in (("one", map), ("other", at_once)):
        simulate_cohort(config, tmp_path / name, lambda: done.append(1), run)
    assert same_files(tmp_path / "one", tmp_path / "other")
    assert len(done) == 2 * subjects


@pytest.mark.parametrize("run", [map, at_once])
def test_a_cohort_that_cannot_be_finished_leaves_nothing(tmp_path, run):
    """In the midst of it, the folder of the signals becomes a file."""

    def break_it():
        (partial,) = tmp_path.iterdir()
        if (partial / "files").is_dir():
            (partial / "files").rename(partial / "elsewhere")
            (partial / "files").write_text("in the way")

    config = CohortConfig(subjects=10 * SUBJECTS_A_TASK, mean_studies=1)
    with pytest.raises(LsemvaeError, match=r"cohort cannot be written \(.*\): make room, or name another folder"):
        simulate_cohort(config, tmp_path / "cohort", break_it, run)
    assert list(tmp_path.iterdir()) == []


def test_a_cohort_appears_whole_or_not_at_all(tmp_path):
    def fail():
        assert not (tmp_path / "cohort").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_cohort(CohortConfig(subjects=3), tmp_path / "cohort", progress=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cohort").mkdir()  # an empty folder is fine
    done = []
    simulate_cohort(CohortConfig(subjects=3), tmp_path / "cohort", progress=lambda: done.append(1))
    assert len(done) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("subjects", 0), ("seed", -1), ("ph_share", 1.0), ("nan_share", 1.5), ("response_sd", np.nan)],
)
def test_a_setting_out_of_range_is_named(tmp_path, setting, value):
    with pytest.raises(LsemvaeError, match=f"{setting} is .*: give a number from"):
        simulate_cohort(CohortConfig(**{setting: value}), tmp_path / "cohort")


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(LsemvaeError, match="not an empty folder: name a new one"):
            simulate_cohort(CohortConfig(subjects=2), folder)
    with pytest.raises(LsemvaeError, match="cannot be written"):
        simulate_cohort(CohortConfig(subjects=2), tmp_path / "file" / "cohort")


# ----------------------------------------------------------------------------------------------- the hearts


def test_an_average_heart_looks_like_one():
    signal_mv_LT, measured = simulate_ecg(EcgParameters(heart_rate_bpm=60, noise_mv=QUIET), np.random.default_rng(0))
    assert signal_mv_LT.shape == (12, 5000)
    leads = beat(signal_mv_LT)
    qrs, t = slice(103, 165), slice(190, 310)
    r = [leads[f"V{n}"][qrs].max() for n in range(1, 7)]
    assert r[0] < 0.4 < r[2] < r[3]  # R progression
    assert all(r[n] > -leads[f"V{n + 1}"][qrs].min() for n in (3, 4, 5))
    assert all(r[n] < -leads[f"V{n + 1}"][qrs].min() for n in (0, 1))
    assert -leads["aVR"].min() > 2 * leads["aVR"].max()
    assert 0.6 < leads["II"][qrs].max() < 1.6
    assert 0.08 < leads["II"][30:98].max() < 0.2
    assert all(0.1 < leads[lead][t].max() < 0.8 for lead in ("I", "II", "V3", "V4", "V5", "V6"))
    assert 120 < measured["qrs_onset"] - measured["p_onset"] < 200
    assert 80 < measured["qrs_end"] - measured["qrs_onset"] < 110
    assert 370 < measured["t_end"] - measured["qrs_onset"] < 430
    assert all(0 < measured[axis] < 80 for axis in ("p_axis", "qrs_axis", "t_axis"))


@pytest.mark.parametrize("feature", ["P in II", "QRS axis", "R in V1", "S in V5 and V6", "T inverted in V1 to V3"])
def test_pressure_changes_what_it_changes_in_patients(feature, measured_by_severity):
    healthy, moderate, severe = (np.array([row[feature] for row in rows]) for rows in measured_by_severity)
    assert healthy.mean() < moderate.mean() < severe.mean()
    assert severe.mean() - healthy.mean() > 2 * np.hypot(healthy.std(), severe.std()) / np.sqrt(len(healthy))


@pytest.fixture(scope="module")
def measured_by_severity():
    rng = np.random.default_rng(5)
    return [
        [features(simulate_ecg(random_heart(rng, severity), rng)[0]) for _ in range(40)] for severity in (0.0, 0.9, 1.8)
    ]


def test_severe_overload_meets_the_textbook(measured_by_severity):
    severe = {name: np.mean([row[name] for row in measured_by_severity[2]]) for name in measured_by_severity[2][0]}
    assert severe["QRS axis"] > 90
    assert severe["P in II"] > 0.2
    assert severe["R in V1"] + severe["S in V5 and V6"] / 2 > 1.05  # Sokolow-Lyon, right ventricle
    assert severe["S in V5 and V6"] / 2 > 0.7
    assert severe["T inverted in V1 to V3"] > 0


def test_fibrillation_is_irregular_and_has_no_p_wave():
    def spread_and_p(atrial_fibrillation):
        parameters = EcgParameters(atrial_fibrillation=atrial_fibrillation, noise_mv=QUIET)
        signal_mv_LT, measured = simulate_ecg(parameters, np.random.default_rng(2))
        peaks, _ = find_peaks(signal_mv_LT[LEADS.index("II")], height=0.6, distance=100)
        return np.diff(peaks).std() / np.diff(peaks).mean(), measured["p_onset"]

    sinus, fibrillating = spread_and_p(False), spread_and_p(True)
    assert 0.005 < sinus[0] < 0.06 < 0.12 < fibrillating[0]
    assert sinus[1] == 40
    assert np.isnan(fibrillating[1])


def test_noise_reaches_the_leads_as_through_electrodes_and_stops_at_150_hz():
    noise_only = EcgParameters(gains=(0.0, 0.0, 0.0), noise_mv=(0.01, 0.02, 0.1, 0.05, 0.0))
    signal_mv_LT, _ = simulate_ecg(noise_only, np.random.default_rng(0))
    lead = dict(zip(LEADS, signal_mv_LT, strict=True))
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-9)
    power = np.abs(np.fft.rfft(signal_mv_LT)) ** 2
    assert power[:, 1502:].max() < 1e-6 * power.max()
    assert power[:, 1:8].sum() > 0.7 * power.sum()  # baseline wander below 0.8 Hz


# ---------------------------------------------------------------------------------------------- best AUROC


def severities(config, count, seed):
    rng = np.random.default_rng(seed)
    mpap = draw_pressures(rng.random(count) < config.ph_share, rng)
    mpap *= np.exp(config.pressure_drift * rng.standard_normal(count))
    return mpap > 20, severity_of(mpap) + config.response_sd * rng.standard_normal(count), mpap


@pytest.mark.parametrize("response_sd", [0.2, 0.58, 1.5])
def test_the_optimal_score_reaches_the_stated_auroc_and_no_more(response_sd):
    config = CohortConfig(response_sd=response_sd)
    stated = best_auroc(config)
    ph, severity, _ = severities(config, 400_000, seed=1)
    assert roc_auc_score(ph, severity) == pytest.approx(stated, abs=0.003)
    # Bayes' rule by brute force, on other draws: P(ph | s) rises with s, so its AUROC is that of s.
    prior_ph, _, prior_mpap = severities(config, 20_000, seed=2)
    grid = np.linspace(severity.min(), severity.max(), 200)
    likelihood = norm.pdf((grid[:, None] - severity_of(prior_mpap)) / response_sd)
    posterior = (likelihood @ prior_ph) / np.maximum(likelihood.sum(axis=1), 1e-300)
    seen = (grid > np.quantile(severity, 0.001)) & (grid < np.quantile(severity, 0.999))
    assert (np.diff(posterior[seen]) > -1e-9).all()
    assert roc_auc_score(ph, np.interp(severity, grid, posterior)) == pytest.approx(stated, abs=0.003)


def test_the_default_is_0_90_and_a_clearer_response_raises_it():
    assert best_auroc(CohortConfig()) == pytest.approx(0.90, abs=0.003)
    assert best_auroc(CohortConfig(response_sd=0.1)) > 0.99
    assert best_auroc(CohortConfig(response_sd=5)) < 0.65


def test_pressures_are_those_of_the_sources():
    rng = np.random.default_rng(0)
    healthy = draw_pressures(np.zeros(50_000, dtype=bool), rng)
    with_ph = draw_pressures(np.ones(50_000, dtype=bool), rng)
    assert healthy.max() <= 20 < with_ph.min()
    assert (healthy.mean(), healthy.std()) == pytest.approx((14, 3.2), abs=0.3)
    assert (with_ph.mean(), with_ph.std()) == pytest.approx((45, 14.5), abs=1)


def test_a_measured_feature_tells_but_stays_below_the_best(tmp_path):
    cohort = simulate_cohort(
        CohortConfig(subjects=700, mean_studies=1, seed=21, nan_share=0, flat_share=0), tmp_path / "c"
    )
    labels = table(cohort, "labels.csv")
    order = [FILE_LEADS.index(lead) for lead in LEADS]
    score = []
    for path in labels.path:
        row = features(stored(cohort, path)[order] / 200)
        score.append(row["R in V1"] + row["S in V5 and V6"] / 2)
    assert 0.7 < roc_auc_score(labels.ph, score) < cohort.cohort_auroc
    assert abs(cohort.cohort_auroc - cohort.best_auroc) < 0.04


# --------------------------------------------------------------------------------------------- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "workflows/simulate.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_writes_a_cohort_and_names_a_mistake_in_one_line(tmp_path):
    first = command("--output", tmp_path / "cohort", "--subjects", 4, "--seed", 2)
    assert first.returncode == 0, first.stderr
    assert f"{tmp_path / 'cohort'}" in first.stdout
    with (tmp_path / "cohort" / "labels.csv").open() as file:
        assert len({row["subject_id"] for row in csv.DictReader(file)}) == 4
    again = workflow("simulate", "--output", tmp_path / "cohort", "--subjects", 4, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    none = workflow("simulate", "--output", tmp_path / "none", "--tasks", 0, check=False)
    assert (none.returncode, none.stderr) == (2, "error: tasks is 0: give 1 or more\n")


def killing(marker, work):
    """`work` as a process that is killed when it is called for the first time."""

    def once(group):
        if not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return work(group)

    return once


@pytest.mark.ray
def test_ray_tasks_write_the_same_bytes_also_when_one_is_killed(ray_cluster, tmp_path):
    config = CohortConfig(subjects=3 * SUBJECTS_A_TASK + 1, mean_studies=1.2, seed=3)
    simulate_cohort(config, tmp_path / "here")
    done = []
    run = lambda work, groups: OnRay(2)(killing(tmp_path / "killed", work), groups)  # noqa: E731
    with kept_signals():
        simulate_cohort(config, tmp_path / "ray", lambda: done.append(1), run)
    assert (tmp_path / "killed").exists()
    assert len(done) == config.subjects
    assert same_files(tmp_path / "here", tmp_path / "ray")


@pytest.mark.ray
def test_a_task_that_is_lost_again_and_again_is_named_in_one_line(ray_cluster, tmp_path):
    run = lambda work, groups: OnRay(2)(lambda group: os.kill(os.getpid(), signal.SIGKILL), groups)  # noqa: E731
    with kept_signals(), pytest.raises(LsemvaeError, match=r"lost again and again.*give fewer --tasks"):
        simulate_cohort(CohortConfig(subjects=4), tmp_path / "cohort", None, run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_ctrl_c_says_so_in_one_line_and_leaves_nothing(ray_cluster, tmp_path):
    words = [sys.executable, "workflows/simulate.py", "--output", tmp_path / "cohort", "--subjects", 20_000]
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not any(tmp_path.rglob("*.dat")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == command_module.INTERRUPTED
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
