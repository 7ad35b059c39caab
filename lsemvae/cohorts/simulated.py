"""Write a simulated cohort in the layout of MIMIC-IV-ECG, with labels whose best AUROC is known.

    severity = ln(mPAP / 14 mmHg) + N(0, response_sd)     the second term belongs to the subject

The pressure reaches the ECG through `severity` alone; everything else that is drawn is independent of it. So
mPAP -> severity -> ECG is a Markov chain, and by the data processing inequality no score of one ECG ranks
`mPAP > 20` better than P(mPAP > 20 | severity). That probability increases with severity (a Gaussian shift has a
monotone likelihood ratio), so severity itself is an optimal score. Its AUROC, `best_auroc`, is an upper bound for every
score of one ECG of a subject that the model was not trained on. Other ECGs of that subject, with their labels, would
reveal the subject's response: split by subject. On a finite cohort every AUROC scatters about its mean, that of the
optimal score too: `cohort_auroc`.
"""

import csv
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from lsemvae.cohorts.labels import PLAUSIBLE
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.simulate import RATE_HZ, SAMPLES, EcgParameters, simulate_ecg

LSB_PER_MV = 200
NAN_STORED = -32768
PH_ABOVE_MMHG = 20.0  # Humbert et al. 2022, ESC/ERS guidelines, Eur Heart J 43:3618
FILE_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")  # aVF before aVL
NOT_MEASURABLE = {
    "rr_interval": (65535,),
    **dict.fromkeys(("p_onset", "p_end", "qrs_onset", "qrs_end", "t_end"), (29999,)),
    **dict.fromkeys(("p_axis", "qrs_axis", "t_axis"), (32767, -32768)),
}
SUBJECTS_A_TASK = 16
"""How many subjects are simulated at a time: about 50 recordings, 6 MB."""

_REPORTS = tuple(f"report_{line}" for line in range(18))
_IDS = ("subject_id", "study_id")
_TABLES = {
    "record_list.csv": (*_IDS, "file_name", "ecg_time", "path"),
    "machine_measurements.csv": (
        *(*_IDS, "cart_id", "ecg_time", *_REPORTS, "bandwidth", "filtering", *NOT_MEASURABLE),
    ),
    "labels.csv": (*_IDS, "path", "mpap_mmhg", "ph"),
    "truth.csv": (*_IDS, "severity"),
}


@dataclass(frozen=True)
class CohortConfig:
    """What to simulate. The rates of NaN and flat leads are those published for MIMIC-IV-ECG 1.0."""

    subjects: int = 200
    """Number of subjects."""
    seed: int = 0
    """The same seed and settings give the same bytes."""
    mean_studies: float = 3.0
    """Mean number of ECGs a subject (geometric, at least 1, at most 260)."""
    ph_share: float = 0.3
    """Share of subjects with pulmonary hypertension, between 0 and 1."""
    response_sd: float = 0.58
    """Standard deviation, between subjects, of the heart's response to a pressure. 0.58 makes the best AUROC 0.90."""
    pressure_drift: float = 0.05
    """Standard deviation of ln(mPAP) between the ECGs of one subject."""
    af_share: float = 0.03
    """Share of subjects in atrial fibrillation."""
    nan_share: float = 0.01319
    """Share of recordings with a gap of NaN, stored as -32768: 10,554 of 800,035."""
    flat_share: float = 0.002437
    """Share of recordings with a lead that is zero throughout: 1,950 of 800,035."""
    unmeasured_share: float = 0.005
    """Share of the cart's measurements that say "not measurable" (29999, 32767 or -32768, 65535)."""
    mains_hz: float = 60.0
    """Mains frequency, 50 or 60."""


@dataclass(frozen=True)
class CohortSummary:
    """What was written. `cohort_auroc` is the optimal score's AUROC on these recordings, NaN if one class is absent."""

    folder: Path
    subjects: int
    records: int
    ph_records: int
    nan_records: int
    flat_records: int
    best_auroc: float
    cohort_auroc: float


def severity_of(mpap_mmhg: ArrayLike) -> np.ndarray:
    """Pressure in mmHg -> mean severity: the logarithm of its ratio to the healthy mean of 14 mmHg."""
    return np.log(np.asarray(mpap_mmhg) / 14.0)


def draw_pressures(ph_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whether subjects have PH, bool [N] -> their mPAP in mmHg [N].

    Healthy: 14.0 ± 3.3 (Kovacs et al. 2009, Eur Respir J 34:888) between 5 and 20. With PH: 20 plus a
    log-normal of median 22, at most 100, which gives 45 ± 15 as in COMPERA (45 ± 13; Hoeper et al. 2017).
    """
    quantile_N = rng.random(len(ph_N))
    low, high = ndtr((5.0 - 14.0) / 3.3), ndtr((PH_ABOVE_MMHG - 14.0) / 3.3)
    healthy_N = 14.0 + 3.3 * ndtri(low + quantile_N * (high - low))
    return np.where(ph_N, np.minimum(PH_ABOVE_MMHG + 22.0 * np.exp(0.55 * ndtri(quantile_N)), 100), healthy_N)


def best_auroc(config: CohortConfig, draws: int = 1_000_000) -> float:
    """AUROC of P(mPAP > 20 | severity): the upper bound explained above. It uses the same draws every time.

    It is the mean of Phi((f(m1) - f(m0)) / (response_sd * sqrt 2)) over pairs m1 > 20 >= m0; its error is below 0.001.
    """
    rng = np.random.default_rng(0)
    mpap_N = draw_pressures(rng.random(draws) < config.ph_share, rng)
    f_N = severity_of(mpap_N * np.exp(config.pressure_drift * rng.standard_normal(draws)))
    above = f_N > severity_of(PH_ABOVE_MMHG)
    difference = rng.choice(f_N[above], draws) - rng.choice(f_N[~above], draws)
    return float(ndtr(difference / (config.response_sd * math.sqrt(2))).mean())


class Study(NamedTuple):
    """One simulated recording: its row of every table, what the summary counts, and its two files."""

    row: dict[str, Any]
    outcome: "_Outcome"
    header: str
    content: bytes


Work = Callable[[Sequence["_Subject"]], list[list[Study]]]
"""Simulates some subjects -> the studies of each. It writes nothing, so it may run on any machine, and twice."""
Run = Callable[[Work, Sequence[Sequence["_Subject"]]], Iterable[list[list[Study]]]]
"""Applies the work to each group of subjects -> the results in the same order, as `map` does."""


def simulate_cohort(
    config: CohortConfig, folder: Path, progress: Callable[[], object] | None = None, run: Run = map
) -> CohortSummary:
    """Write a cohort into `folder`, which appears only when it is complete; call `progress()` after each subject.

    It writes record_list.csv, machine_measurements.csv and files/ as in MIMIC-IV-ECG, and labels.csv with mpap_mmhg and
    ph (1 above 20 mmHg). The severity is in truth.csv and the best AUROC in truth.json: apart from the labels, so that
    no training reads them by accident. `run` decides where the simulation runs; only this process writes, and the bytes
    are always the same. Raises LsemvaeError if a setting is out of range, and if `folder` is a file, holds something or
    cannot be written.
    """
    _check(config)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LsemvaeError(f"{folder} exists and is not an empty folder: name a new one, or remove it")
    unfinished = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
        summary = _summary(config, folder, _write(config, unfinished, progress, run))
        (unfinished / "truth.json").write_text(json.dumps(_truth(config, summary), indent=2) + "\n")
        unfinished.replace(folder)
    except OSError as error:
        raise LsemvaeError(
            f"{folder} cannot be written ({error.strerror}): make room, or name another folder"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # it is gone if all went well
    return summary


def _summary(config: CohortConfig, folder: Path, outcomes: Sequence["_Outcome"]) -> CohortSummary:
    from scipy.stats import mannwhitneyu  # half of what a worker would have to import, and none needs it

    severity, ph, nan, flat = np.array(outcomes).T
    healthy, overloaded = severity[ph == 0], severity[ph == 1]
    wins = mannwhitneyu(overloaded, healthy).statistic if len(healthy) and len(overloaded) else math.nan
    return CohortSummary(
        folder=folder,
        subjects=config.subjects,
        records=len(ph),
        ph_records=int(ph.sum()),
        nan_records=int(nan.sum()),
        flat_records=int(flat.sum()),
        best_auroc=best_auroc(config),
        cohort_auroc=float(wins / max(1, len(healthy) * len(overloaded))),
    )


def _truth(config: CohortConfig, summary: CohortSummary) -> dict[str, Any]:
    """What truth.json says."""
    counts = asdict(summary)
    del counts["folder"]
    best, here = counts.pop("best_auroc"), counts.pop("cohort_auroc")
    return {
        "label": f"ph = mpap_mmhg > {PH_ABOVE_MMHG:g}",
        "best_auroc": best,
        "cohort_auroc": None if math.isnan(here) else here,
        **counts,
        "config": asdict(config),
    }


def _check(config: CohortConfig) -> None:
    ranges = {
        "subjects": (1, 1_000_000),
        "seed": (0, 2**63),
        "mean_studies": (1, 8),
        "ph_share": (0.001, 0.999),
    }
    ranges |= {"response_sd": (0.001, 10), "pressure_drift": (0, 1), "mains_hz": (1, 249)}
    ranges |= dict.fromkeys(("af_share", "nan_share", "flat_share", "unmeasured_share"), (0, 1))
    for name, (low, high) in ranges.items():
        if not low <= getattr(config, name) <= high:
            raise LsemvaeError(f"{name} is {getattr(config, name)}: give a number from {low} to {high}")


class _Subject(NamedTuple):
    """What is drawn for the whole cohort at once. The rest of a subject follows from the seed and its `number`."""

    number: int
    subject_id: int
    mpap_mmhg: float
    study_ids: list[int]


class _Outcome(NamedTuple):
    """What the summary counts of one record."""

    severity: float
    ph: bool
    has_nan: bool
    has_flat: bool


def _write(config: CohortConfig, folder: Path, progress: Callable[[], object] | None, run: Run) -> list[_Outcome]:
    """Write the signals and the tables, subject by subject."""
    outcomes = []
    with ExitStack() as stack:
        writers = []
        for name, columns in _TABLES.items():
            file = stack.enter_context((folder / name).open("w", newline=""))
            writers.append(csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n"))
            writers[-1].writeheader()
        for studies in _simulated(config, run):
            for study in studies:
                _write_wfdb(folder, study)
                for writer in writers:
                    writer.writerow(study.row)
                outcomes.append(study.outcome)
            if progress:
                progress()
    return outcomes


def _simulated(config: CohortConfig, run: Run) -> Iterator[list[Study]]:
    """The studies of each subject, in the order of the subjects."""
    subjects = _draw_subjects(config)
    groups = [subjects[first : first + SUBJECTS_A_TASK] for first in range(0, len(subjects), SUBJECTS_A_TASK)]
    for of_group in run(partial(_simulate_subjects, config), groups):
        yield from of_group


def _draw_subjects(config: CohortConfig) -> list[_Subject]:
    rng = np.random.default_rng([config.seed, 0])
    # An exact number, so that a small cohort has both classes.
    with_ph = np.clip(round(config.ph_share * config.subjects), 1, max(1, config.subjects - 1))
    with_ph_N = rng.permutation(config.subjects) < with_ph
    mpap_N = draw_pressures(with_ph_N, rng)
    subject_ids = 10_000_000 + np.sort(rng.choice(10_000_000, config.subjects, replace=False))
    studies_N = np.minimum(rng.geometric(1 / config.mean_studies, config.subjects), 260)
    study_ids = 40_000_000 + rng.choice(10_000_000, studies_N.sum(), replace=False)
    of_subject = np.split(study_ids, np.cumsum(studies_N)[:-1])
    return [
        _Subject(index, int(subject_ids[index]), float(mpap_N[index]), np.sort(ids).tolist())
        for index, ids in enumerate(of_subject)
    ]


def _simulate_subjects(config: CohortConfig, subjects: Sequence[_Subject]) -> list[list[Study]]:
    return [_simulate_subject(config, subject) for subject in subjects]


def _simulate_subject(config: CohortConfig, subject: _Subject) -> list[Study]:
    """The studies of one subject, which depend on no other subject."""
    rng = np.random.default_rng([config.seed, 1 + subject.number])
    heart = draw_heart(config, rng)
    response = config.response_sd * rng.standard_normal()
    return [_simulate_study(config, subject, study_id, heart, response, rng) for study_id in subject.study_ids]


def _simulate_study(
    config: CohortConfig,
    subject: _Subject,
    study_id: int,
    heart: EcgParameters,
    response: float,
    rng: np.random.Generator,
) -> Study:
    mpap = float(subject.mpap_mmhg * np.exp(config.pressure_drift * rng.standard_normal()))
    severity, ph = float(severity_of(mpap)) + response, mpap > PH_ABOVE_MMHG
    parameters = replace(draw_another_day(heart, rng), severity=severity)
    signal_mv_LT, measured = simulate_ecg(parameters, rng)
    stored, has_nan, has_flat = _store(config, signal_mv_LT, rng)
    when = datetime(2110, 1, 1) + timedelta(minutes=int(rng.integers(90 * 365 * 24 * 60)))
    row = _machine_row(config, parameters, measured, rng)
    row |= {"subject_id": subject.subject_id, "study_id": study_id, "file_name": study_id, "ecg_time": when}
    row |= {"path": f"files/p{str(subject.subject_id)[:4]}/p{subject.subject_id}/s{study_id}/{study_id}"}
    written = np.clip(mpap, *PLAUSIBLE["mpap_mmhg"])  # ingest refuses what no adult has
    row |= {"mpap_mmhg": f"{written:.2f}", "ph": int(ph), "severity": f"{severity:.6f}"}
    header = _header(subject.subject_id, study_id, when, stored)
    return Study(row, _Outcome(severity, ph, has_nan, has_flat), header, stored.T.tobytes())


def draw_heart(config: CohortConfig, rng: np.random.Generator) -> EcgParameters:
    """A subject's anatomy and rhythm, independent of the pressure."""
    turn = np.radians([10.0, 12.0, 15.0]) * rng.standard_normal(3)
    gains = np.exp(0.1 * rng.standard_normal() + np.array([0.15, 0.15, 0.2]) * rng.standard_normal(3))
    stretches = np.exp(np.array([0.08, 0.07, 0.04]) * rng.standard_normal(3))
    return EcgParameters(
        heart_rate_bpm=float(74 + 12 * rng.standard_normal()),
        atrial_fibrillation=bool(rng.random() < config.af_share),
        rotation_rad=tuple(turn),
        gains=tuple(gains),
        stretches=tuple(stretches),
        mains_hz=config.mains_hz,
    )


def draw_another_day(heart: EcgParameters, rng: np.random.Generator) -> EcgParameters:
    """The same heart on the day of one study, with a rate, electrode positions and noise of that day."""
    return replace(
        heart,
        heart_rate_bpm=float(np.clip(heart.heart_rate_bpm * np.exp(0.08 * rng.standard_normal()), 45, 125)),
        rotation_rad=tuple(np.array(heart.rotation_rad) + np.radians(3.0) * rng.standard_normal(3)),
        noise_mv=tuple(np.array(heart.noise_mv) * np.exp(0.5 * rng.standard_normal(5))),
    )


def _store(config: CohortConfig, signal_mv_LT: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool, bool]:
    """Millivolts in the order of LEADS -> int16 in the order of the file, whether it has NaN, and a flat lead."""
    in_file_order = signal_mv_LT[[LEADS.index(lead) for lead in FILE_LEADS]]
    stored = np.clip(np.rint(in_file_order * LSB_PER_MV), -32767, 32767).astype("<i2")
    lead = rng.permutation(len(stored))
    has_flat, has_nan = rng.random(2) < (config.flat_share, config.nan_share)
    if has_flat:
        stored[lead[0]] = 0
    if has_nan:
        start, length = rng.integers(0, SAMPLES - 1000), rng.integers(25, 1000)
        stored[lead[1 : 2 + rng.integers(3)], start : start + length] = NAN_STORED
    return stored, bool(has_nan), bool(has_flat)


def _header(subject_id: int, study_id: int, when: datetime, stored: np.ndarray) -> str:
    """The .hea of `stored`, int16 [12, T], whose .dat has format 16."""
    lines = [f"{study_id} {len(stored)} {RATE_HZ} {stored.shape[1]} {when:%H:%M:%S %d/%m/%Y}"]
    checksums = stored.sum(axis=1, dtype=np.int64) % 65536  # unsigned, as in the published headers
    for lead, first, checksum in zip(FILE_LEADS, stored[:, 0], checksums, strict=True):
        lines.append(f"{study_id}.dat 16 {LSB_PER_MV:.1f}(0)/mV 16 0 {first} {checksum} 0 {lead}")
    lines.append(f"# <subject_id>: {subject_id}")
    return "\n".join(lines) + "\n"


def _write_wfdb(folder: Path, study: Study) -> None:
    path = folder / study.row["path"]
    path.parent.mkdir(parents=True)
    path.with_suffix(".hea").write_text(study.header)
    path.with_suffix(".dat").write_bytes(study.content)


def _machine_row(
    config: CohortConfig, parameters: EcgParameters, measured: dict[str, float], rng: np.random.Generator
) -> dict[str, object]:
    """What the cart prints: its reports, and its measurements, rounded or MIMIC's numbers for "not measurable"."""
    row: dict[str, object] = {"cart_id": int(rng.integers(100_000, 10_000_000))}
    lost = rng.random(len(NOT_MEASURABLE)) < config.unmeasured_share
    for (name, instead), is_lost in zip(NOT_MEASURABLE.items(), lost, strict=True):
        unknown = is_lost or math.isnan(measured[name])
        row[name] = int(rng.choice(instead)) if unknown else round(measured[name])
    rate_bpm = 60_000 / measured["rr_interval"]
    sinus = "Sinus bradycardia" if rate_bpm < 60 else "Sinus tachycardia" if rate_bpm > 100 else "Sinus rhythm"
    reports = ["Atrial fibrillation" if parameters.atrial_fibrillation else sinus]
    if measured["qrs_axis"] > 90:
        reports.append("Right axis deviation")
    reports.append("Normal ECG" if reports == ["Sinus rhythm"] else "Abnormal ECG")
    row |= dict(zip(_REPORTS, reports, strict=False))
    return row | {"bandwidth": "0.005-150 Hz", "filtering": "<not specified>"}
