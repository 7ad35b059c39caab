"""Write a simulated cohort in the layout of MIMIC-IV-ECG, with a known best AUROC.

python workflows/simulate.py --output cohort --subjects 200 --seed 0
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from command import run_command
from tqdm import tqdm

from lsemvae.leads import LEADS
from lsemvae.simulate import RATE_HZ, CohortConfig, EcgParameters, simulate_cohort, simulate_ecg


@dataclass(frozen=True)
class Args:
    output: Path
    """A new folder for the cohort."""
    cohort: tyro.conf.OmitArgPrefixes[CohortConfig] = field(default_factory=CohortConfig)
    picture: Path | None = None
    """Also draw an average heart, healthy and overloaded, as a twelve-lead ECG into this PNG file."""


def main(args: Args) -> None:
    with tqdm(total=args.cohort.subjects, unit=" subjects", delay=0.3, disable=None) as bar:
        summary = simulate_cohort(args.cohort, args.output, progress=bar.update)
    if args.picture:
        draw(args.picture)
    print(f"The cohort is in {summary.folder}, its labels in labels.csv, its best AUROC in truth.json")
    print(
        f"{summary.records} records of {summary.subjects} subjects: {summary.ph_records} with PH, "
        f"{summary.nan_records} with NaN, {summary.flat_records} with a flat lead; "
        f"best AUROC {summary.best_auroc:.3f}, on these records {summary.cohort_auroc:.3f}"
    )


def draw(path: Path) -> None:
    """Two printouts of 3 x 4 leads and a rhythm strip, 25 mm/s and 10 mm/mV."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    healthy = EcgParameters(severity=0.0)
    figure, panels = plt.subplots(2, 1, figsize=(12, 13.5), layout="constrained")
    for axes, parameters, title in (
        (panels[0], healthy, "Average heart, severity 0 (mPAP 14 mmHg)"),
        (panels[1], replace(healthy, severity=1.6), "The same heart, severity 1.6 (mPAP 69 mmHg)"),
    ):
        signal_mv_LT, _ = simulate_ecg(parameters, np.random.default_rng(3))
        quarter = signal_mv_LT.shape[1] // 4
        time_s = np.arange(signal_mv_LT.shape[1]) / RATE_HZ
        for column in range(4):
            part = slice(column * quarter, (column + 1) * quarter)
            for row in range(3):
                lead = LEADS[3 * column + row]
                offset_mv = 3.0 * (3 - row)
                axes.plot(time_s[part], signal_mv_LT[3 * column + row, part] + offset_mv, "k", lw=0.9)
                axes.text(time_s[part][0] + 0.05, offset_mv + 1.0, lead, weight="bold")
        axes.plot(time_s, signal_mv_LT[LEADS.index("II")], "k", lw=0.9)
        axes.text(0.05, 1.0, "II", weight="bold")
        axes.set(
            xlim=(0, 10),
            ylim=(-1.5, 11.0),
            aspect=0.4,
            title=title,
            xlabel="A large box is 0.2 s and 0.5 mV.",
        )
        axes.set_xticks(np.arange(0, 10.01, 0.2), labels=[])
        axes.set_xticks(np.arange(0, 10, 0.04), minor=True)
        axes.set_yticks(np.arange(-1.5, 11.01, 0.5), labels=[])
        axes.set_yticks(np.arange(-1.5, 11, 0.1), minor=True)
        axes.tick_params(which="both", length=0)
        axes.grid(color="#e8a0a0", lw=0.6)
        axes.grid(which="minor", color="#f6d8d8", lw=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_command(main, Args)
