"""`truth`: whether attributions find the leads and waves that simulated labels depend on, and not with shuffled labels.

In the cohort the overload shows in all waves, or in the P, the QRS or the T alone. A classifier is trained on simulated
subjects with their labels, and again for each seed with the labels shuffled. See `lsemvae.explain.truth`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import trained
from benchmarks.measure import Row
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.training.finetune import Inputs

OVERLOADS = {"all": (1.0, 1.0, 1.0), "P": (1.0, 0.0, 0.0), "QRS": (0.0, 1.0, 0.0), "T": (0.0, 0.0, 1.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    trained.add_arguments(parser)
    parser.add_argument("--overload", default="all", choices=sorted(OVERLOADS), help="the waves that show the overload")
    parser.add_argument("--subjects", type=int, default=600, help="simulated subjects to train on, one recording each")
    parser.add_argument("--tested", type=int, default=200, help="other subjects, for the AUROC")
    parser.add_argument("--hearts", type=int, default=48, help="hearts that the attributions are compared on")
    parser.add_argument("--truth-hearts", type=int, default=200, help="other hearts, that the truth is computed from")
    parser.add_argument("--shuffles", type=int, default=5, help="models that are trained on shuffled labels")


def bench_truth(args: argparse.Namespace) -> list[Row]:
    """Figures of the model with true labels, against their standard deviation over those with shuffled labels."""
    from lsemvae.explain import truth
    from lsemvae.explain.attribution import Settings

    if args.shuffles < 2:
        raise LsemvaeError(f"--shuffles is {args.shuffles}: give 2 or more, their spread is the baseline")
    encoder, config = trained.encoder_of(args)
    overload = OVERLOADS[args.overload]
    train = simulated(args.subjects, config, overload, seed=1)
    test = simulated(args.tested, config, overload, seed=2)
    hearts = truth.draw_hearts(args.hearts, LEADS, config, seed=0, overload=overload)
    truth_LW = truth.truth_of(truth.draw_hearts(args.truth_hearts, LEADS, config, seed=1, overload=overload))
    figures: dict[str, list[float]] = {}
    for seed in (None, *range(args.shuffles)):
        model = trained.classifier(args, encoder, train if seed is None else trained.shuffled(train, seed))
        found = truth.look(model, hearts, truth_LW, Settings())
        auroc = trained.auroc(model, test, args.device)
        print(f"{args.overload}, {'true labels' if seed is None else f'shuffled labels {seed}'}: AUROC {auroc:.3f}")
        figures.setdefault("AUROC above 0.5", []).append(auroc - 0.5)
        for name, *spread in [*_named(found.evidence(), "evidence in "), *_named(found.rows())]:
            print("  {}: {:.2f} [{:.2f}, {:.2f}]".format(name, *spread), flush=True)
            figures.setdefault(name, []).append(spread[0])
        if seed is None:
            print(_cells(found), flush=True)
    return [_against_shuffled(f"{args.overload}: {name}", np.array(of)) for name, of in figures.items()]


def _cells(found: Any) -> str:
    """Truth, effect and attribution of each lead and wave; the latter two in standard deviations of healthy logits."""
    import pandas as pd

    from lsemvae.explain.truth import CELL_WAVES

    deviation = found.healthy_logit_B.std()
    tables = {
        "truth": found.truth_LW,
        "effect": found.effect_BLW.mean(axis=0) / deviation,
        "attribution": found.attribution_BLW.mean(axis=0) / deviation,
    }
    columns = [pd.DataFrame(of_LW, index=LEADS, columns=CELL_WAVES) for of_LW in tables.values()]
    return pd.concat(columns, axis=1, keys=list(tables)).round(2).to_string()


def _named(table: Any, prefix: str = "") -> list[tuple[str, float, float, float]]:
    """The rows of a table as name, value, low, high."""
    return [(f"{prefix}{row[0]}", *row[1:4]) for row in table.itertuples(index=False)]


def _against_shuffled(case: str, values_N: np.ndarray) -> Row:
    """The first value against the others, which are printed as their mean with its 95 % interval over seeds."""
    from scipy.stats import t

    ours, shuffled_N = float(values_N[0]), values_N[1:]
    sd = float(shuffled_N.std(ddof=1))
    half = float(t.ppf(0.975, len(shuffled_N) - 1)) * sd / math.sqrt(len(shuffled_N))
    mean = float(shuffled_N.mean())
    print(f"{case}: {ours:.2f}; shuffled labels, mean over seeds {mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]")
    return Row(case, ours, sd, ours / sd if sd > 0 else math.inf, "SD of shuffled")


def simulated(count: int, config: PreprocessConfig, overload: Sequence[float], seed: int) -> Inputs:
    """Drawn as `workflows/simulate.py` draws them, without its faults."""
    from lsemvae.cohorts import simulated as cohort
    from lsemvae.preprocess import preprocess_signals
    from lsemvae.simulate import RATE_HZ, simulate_ecg

    settings, rng = cohort.CohortConfig(), np.random.default_rng(seed)
    ph_B = rng.random(count) < settings.ph_share
    severity_B = cohort.severity_of(cohort.draw_pressures(ph_B, rng)) + settings.response_sd * rng.standard_normal(
        count
    )
    signals = []
    for severity in severity_B.tolist():
        heart = cohort.draw_another_day(cohort.draw_heart(settings, rng), rng)
        parameters = replace(heart, severity=severity, overload=tuple(overload))
        signals.append(simulate_ecg(parameters, rng)[0].astype(np.float32))
    prepared = preprocess_signals(signals, [RATE_HZ] * count, LEADS, config)
    return Inputs(prepared.x_BLT, prepared.lead_mask_BL, ph_B.astype(np.int64))
