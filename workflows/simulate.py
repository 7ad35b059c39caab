"""Write a simulated cohort in the layout of MIMIC-IV-ECG, with a known best AUROC.

python workflows/simulate.py --output cohort --subjects 200 --seed 0
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from command import run_command, start_ray

from lsemvae.cohorts.simulated import CohortConfig, Study, Work, simulate_cohort
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.progress import Bar
from lsemvae.record import Record
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

WITHOUT_RAY = 3000
"""Recordings that are simulated sooner than Ray starts and simulates them."""


@dataclass(frozen=True)
class Args:
    output: Path
    """A new folder for the cohort. Only this process writes there; with Ray, the cluster's nodes send it what they
    simulate."""
    tasks: int | None = None
    """Ray tasks at a time; 1 simulates in this process, without Ray. By default as many as the cluster has CPUs, and 1
    for fewer than 3,000 recordings."""
    cohort: tyro.conf.OmitArgPrefixes[CohortConfig] = field(default_factory=CohortConfig)
    pictures: Path | None = None
    """Also draw the ECG of an average heart, healthy and overloaded, as two SVG files in this folder."""


def main(args: Args) -> None:
    if args.tasks is not None and args.tasks < 1:
        raise LsemvaeError(f"tasks is {args.tasks}: give 1 or more")
    without_ray = (
        args.cohort.subjects * args.cohort.mean_studies < WITHOUT_RAY if args.tasks is None else args.tasks == 1
    )
    with Bar(args.cohort.subjects, "simulate", "subjects") as bar:
        summary = simulate_cohort(args.cohort, args.output, bar.update, map if without_ray else OnRay(args.tasks))
    if args.pictures:
        draw(args.pictures)
    print(f"Wrote {summary.folder}: labels are in labels.csv, the best AUROC in truth.json")
    print(
        f"{summary.records} records of {summary.subjects} subjects: {summary.ph_records} with PH, "
        f"{summary.nan_records} with NaN, {summary.flat_records} with a flat lead; "
        f"best expected AUROC {summary.best_auroc:.3f}, on these records {summary.cohort_auroc:.3f}"
    )
    print(f"next: python workflows/ingest.py --source {summary.folder} --output …")


@dataclass(frozen=True)
class OnRay:
    """Like `map`, on Ray: results in order, with a bounded number of tasks submitted, so that memory stays bounded.

    Ray runs a task again where its process or node is lost. Raises LsemvaeError when it is lost again and again.
    """

    at_once: int | None
    """Tasks at a time; None: as many as the cluster has CPUs, and as many again that wait."""

    def __call__(self, work: Work, groups: Sequence[Any]) -> Iterator[list[list[Study]]]:
        start_ray()
        import ray

        @ray.remote
        def simulate_subjects(group: Any) -> list[list[Study]]:
            return work(group)

        found = ray.exceptions
        lost = (found.WorkerCrashedError, found.OutOfMemoryError, found.NodeDiedError, found.ObjectLostError)
        running: deque[Any] = deque()
        try:
            for group in groups:
                cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))  # none while an autoscaler starts from 0
                while len(running) >= (self.at_once or 2 * cpus):
                    yield ray.get(running.popleft())
                running.append(simulate_subjects.remote(group))
            while running:
                yield ray.get(running.popleft())
        except lost as error:
            raise LsemvaeError(
                f"a simulating task was lost again and again, perhaps for lack of memory ({type(error).__name__}): "
                "give fewer --tasks"
            ) from None


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
    run_command(main, Args)
