"""`references`: how much the explanations of one model depend on what recordings are compared with.

The baselines are no signal, the mean beat of other recordings, and other recordings (expected gradients). The others
are recordings of subjects without the label, that are not explained.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Row
from lsemvae.explain import intervals

REFERENCES = {"mean-beat": 32, "expected": 16}
DRAWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--model", type=Path, required=True, help="the folder of a classifier's bundle")
    parser.add_argument("--data", required=True, help="labelled shards that it was not trained on")
    parser.add_argument("--task", required=True, help="the label")
    parser.add_argument("--records", type=int, default=100, help="recordings that are explained")
    parser.add_argument("--checked", type=int, default=24, help="of these, recordings for deletion and insertion")
    parser.add_argument("--cell-s", type=float, default=0.5, help="length of what is taken away at once, in s")


def bench_references(args: argparse.Namespace) -> list[Row]:
    """Rank correlation of each recording's shares of leads with those from no signal, and the areas of removal."""
    from lsemvae.bundle import Scorer
    from lsemvae.explain.attribution import Settings
    from lsemvae.explain.explainer import Explainer
    from lsemvae.explain.randomised import rank_correlation
    from lsemvae.explain.reference import Reference

    bundle = Scorer(args.model).bundle
    signals, rates_hz, y_B, subject_B = _labelled(args.data, args.task, bundle.leads)
    order_B = np.random.default_rng(0).permutation(len(y_B))
    chosen = order_B[: args.records]
    others = [row for row in order_B[args.records :] if y_B[row] == 0 and subject_B[row] not in subject_B[chosen]]
    shares: dict[str, np.ndarray] = {}
    rows = []
    for baseline in ("zero", *REFERENCES):
        reference = None
        if baseline in REFERENCES:
            some = others[: REFERENCES[baseline]]
            reference = Reference.of_signals(
                [signals[row] for row in some], [rates_hz[row] for row in some], bundle.leads, bundle.preprocess
            )
        settings = replace(Settings(), baseline=baseline)
        explainer = Explainer(args.model, settings, args.device, reference=reference)
        found = explainer.explain_signals([signals[row] for row in chosen], [rates_hz[row] for row in chosen])
        kept = [(one, subject_B[row]) for one, row in zip(found, chosen, strict=True) if one.shares is not None]
        shares[baseline] = np.array([[of.sum(axis=1) for of in one.shares] for one, _ in kept])  # [B, 2, L]
        steps = np.mean([window.steps for one, _ in kept for window in one.windows])
        print(f"{baseline}: {len(kept)} recordings, {steps:.0f} points each on average", flush=True)
        times_DB = intervals.resampled([subject for _, subject in kept], DRAWS, 0)
        for kind, name in enumerate(("signed", "absolute")):
            same_B = np.array(
                [
                    rank_correlation(*pair)
                    for pair in zip(shares["zero"][:, kind], shares[baseline][:, kind], strict=True)
                ]
            )
            rows.append(
                _row(f"{baseline}: {name} shares of leads", intervals.mean(same_B, times_DB), "rank correlation")
            )
        rows += _areas(args, explainer, [(one, subject) for one, subject in kept][: args.checked], baseline)
    return rows


def _labelled(
    uri: str, task: str, leads: tuple[str, ...]
) -> tuple[list[np.ndarray], list[float], np.ndarray, np.ndarray]:
    """Signals [L, T] in mV of these leads, their rates, labels and subjects."""
    from lsemvae.data.shards import SIGNAL_COLUMNS, ShardedDataset, signals_mv

    data = ShardedDataset.open(uri)
    column = data.require_label(task)
    table = data.read([*SIGNAL_COLUMNS, "subject_id", column])
    columns = table.filter(table[column].is_valid()).to_pydict()
    y_B, subject_B = np.array(columns[column], dtype=np.int64), np.array(columns["subject_id"])
    return list(signals_mv(columns, leads)), columns["rate_hz"], y_B, subject_B


def _areas(args: argparse.Namespace, explainer: Any, kept: list[tuple[Any, str]], baseline: str) -> list[Row]:
    """How much better than the random order the order of attribution is, in deletion and insertion."""
    from lsemvae.explain.checks import Effort, run_checks

    windows = [(one.windows[0], subject) for one, subject in kept]
    x_BLT, mask_BL = (np.stack([getattr(window, of) for window, _ in windows]) for of in ("x_LT", "lead_mask_L"))
    found = run_checks(
        explainer.scorer.model, torch.from_numpy(x_BLT).to(args.device), torch.from_numpy(mask_BL).to(args.device),
        explainer.scorer.bundle.preprocess.rate_hz, explainer.settings,
        baseline=explainer.baseline(x_BLT, [window.waves for window, _ in windows]),
        subject_B=[subject for _, subject in windows],
        effort=Effort(cell_s=args.cell_s, layers=1, randomisations=1),
    )  # fmt: skip
    areas = found.areas.set_index(["kind", "order"])
    return [
        _row(
            f"{baseline}: {kind}, less random order",
            intervals.Interval(*areas.loc[(kind, "attribution"), ["against_random", "against_low", "against_high"]]),
            "area",
            sign=-1 if kind == "deletion" else 1,
        )
        for kind in ("deletion", "insertion")
    ]


def _row(case: str, found: intervals.Interval, unit: str, sign: int = 1) -> Row:
    """The value against its distance from the end of its interval nearer to 0: a ratio above 1 excludes 0."""
    print(f"  {case}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]", flush=True)
    half = found.value - found.low if sign > 0 else found.high - found.value
    return Row(case, found.value, half, sign * found.value / half if half > 0 else np.inf, unit)
