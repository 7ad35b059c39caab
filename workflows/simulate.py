"""Write a simulated cohort in the layout of MIMIC-IV-ECG, with a known best AUROC.

python workflows/simulate.py --output cohort --subjects 200 --seed 0
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from lsemvae.cohorts.simulated import CohortConfig, simulate_cohort
from lsemvae.leads import LEADS
from lsemvae.progress import Bar
from lsemvae.record import Record
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

SUBJECTS_A_PROCESS = 200
"""Starting a process costs as much time as simulating so many subjects."""


@dataclass(frozen=True)
class Args:
    output: Path
    """A new folder for the cohort."""
    processes: int | None = None
    """Number of processes; by default one for each CPU, but no more than one for 200 subjects."""
    cohort: tyro.conf.OmitArgPrefixes[CohortConfig] = field(default_factory=CohortConfig)
    pictures: Path | None = None
    """Also draw the ECG of an average heart, healthy and overloaded, as two SVG files in this folder."""


def main(args: Args) -> None:
    processes = args.processes
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), max(1, args.cohort.subjects // SUBJECTS_A_PROCESS))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # in the processes that this one starts
    with Bar(args.cohort.subjects, "simulate", "subjects") as bar:
        summary = simulate_cohort(args.cohort, args.output, bar.update, processes)
    if args.pictures:
        draw(args.pictures)
    print(f"Wrote {summary.folder}: labels are in labels.csv, the best AUROC in truth.json")
    print(
        f"{summary.records} records of {summary.subjects} subjects: {summary.ph_records} with PH, "
        f"{summary.nan_records} with NaN, {summary.flat_records} with a flat lead; "
        f"best expected AUROC {summary.best_auroc:.3f}, on these records {summary.cohort_auroc:.3f}"
    )
    print(f"next: python workflows/ingest.py --source {summary.folder} --output …")


def draw(folder: Path) -> None:
    """Draw an average heart at an mPAP of 14 mmHg and of 69 mmHg on ECG paper."""
    from lsemvae.plots.ecg_paper import ecg_paper

    folder.mkdir(parents=True, exist_ok=True)
    for name, severity, title in (
        ("healthy.svg", 0.0, "Average heart, severity 0 (mPAP 14 mmHg)"),
        ("overloaded.svg", 1.6, "The same heart, severity 1.6 (mPAP 69 mmHg)"),
    ):
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=severity), np.random.default_rng(3))
        record = Record.from_leads(dict(zip(LEADS, signal_mv_LT, strict=True)), RATE_HZ)
        (folder / name).write_text(ecg_paper(record, title))


if __name__ == "__main__":
    from command import run_command  # not above: each process imports this file, and has no use for it

    run_command(main, Args)
