"""Tests of whether explanations are true: model randomisation, deletion and insertion. They are part of every report.

`lsemvae.explain.randomised` and `lsemvae.explain.removal` say how each is made, `lsemvae.explain.truth` what only a
simulated cohort can show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lsemvae.explain import intervals
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.explain.intervals import Interval
from lsemvae.explain.randomised import cascade, layers_of, module_of, rank_correlation
from lsemvae.explain.removal import KINDS, SHARES, Cells, Removal

LEAST_DIFFERENCE = 1e-4
"""Where recordings differ from the baseline by a smaller logit on average, there is nothing to remove: NaN."""


@dataclass(frozen=True)
class Checks:
    """What the checks found, as tables. Intervals are 95 %, over subjects.

    randomisation  layers, correlation, low, high: mean rank correlation, over cells of lead and 0.1 s, of the signed
                   attributions with those of the model in which these layers and all nearer to the score have random
                   weights; absolute, absolute_low, absolute_high: of the sums of their absolute values
    curves         kind (deletion, insertion), order (attribution, occlusion, random), share, logit, low, high: `logit`
                   is how much of the difference between the logits of the recordings and of their baselines there is
                   when so large a share of the cells is taken away, or is there: 1 all, 0 none. Below 0 or above 1
                   where what speaks against the score is all that is left, or not there yet
    areas          kind, order, area, low, high; against_random, against_low, against_high: the area under each curve
                   less that of the random order on the same recordings; against_occlusion, occlusion_low,
                   occlusion_high: the same for the order of occlusion. NaN for an order against itself
    truth          what, correlation, low, high, records: see `lsemvae.explain.truth`; None where the cohort is real
    evidence       wave, evidence, low, high: how far the overload of simulated hearts moves the logit through each
                   wave, in standard deviations of the logit of healthy ones; None where the cohort is real
    """

    randomisation: pd.DataFrame
    curves: pd.DataFrame
    areas: pd.DataFrame
    records: int
    truth: pd.DataFrame | None = None
    evidence: pd.DataFrame | None = None


@dataclass(frozen=True)
class Effort:
    """How much the checks compute. The defaults take some thousand passes of the model a recording.

    cell_s           a cell of deletion and insertion is one lead for so long; occlusion needs a pass for each
    layers           steps of the randomisation, at most
    randomisations   random weights of each step; their correlations are averaged
    random_orders    random orders of removal; their curves are averaged
    draws            bootstrap resamplings
    """

    cell_s: float = 0.25
    layers: int = 5
    randomisations: int = 3
    random_orders: int = 3
    draws: int = 1000


RANDOMISATION_CELL_S = 0.1
RANDOM_STEPS = 8  # ranks of cells need no exact integrals
CHUNK = 16  # recordings at a time


def run_checks(
    model: Any,
    x_BLT: Tensor,
    lead_mask_BL: Tensor,
    rate_hz: float,
    settings: Settings,
    *,
    baseline: Tensor | None = None,
    subject_B: Sequence[str] | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Checks:
    """Check the attributions of these recordings: the model's input on its device. The model is not changed.

    baseline  as for `attribute`; of several, their mean replaces what is removed
    subject_B whose each recording is; by default each has its own subject
    progress  is told how many steps are done, and of how many
    """
    effort = effort or Effort()
    subjects = np.arange(len(x_BLT)) if subject_B is None else np.asarray(subject_B)
    times_DB = intervals.resampled(subjects, effort.draws, seed)
    layers = layers_of(model, x_BLT[:2], lead_mask_BL[:2], effort.layers)
    orders = 2 + effort.random_orders
    steps = _Steps(len(x_BLT) * (2 + len(KINDS) * orders + len(layers) * effort.randomisations), progress)
    signed, absolute, left = [], [], []
    for start in range(0, len(x_BLT), CHUNK):
        rows = slice(start, start + CHUNK)
        part = _Part(
            model, x_BLT[rows], lead_mask_BL[rows], None if baseline is None else baseline[..., rows, :, :], settings
        )
        values_BLT = part.attributions(model)
        steps.done(len(values_BLT))
        left.append(_removed(part, values_BLT, round(effort.cell_s * rate_hz), effort, [seed, start], steps))
        cells = Cells.of(part.x_BLT, part.lead_mask_BL, round(RANDOMISATION_CELL_S * rate_hz))
        found = _randomised(part, values_BLT, cells, layers, effort, seed, steps)
        signed.append(found[0])
        absolute.append(found[1])
    left_of = {key: np.concatenate([part[key] for part in left]) for key in left[0]}
    return Checks(
        _randomisation_table(layers, np.concatenate(signed, axis=1), np.concatenate(absolute, axis=1), times_DB),
        _curves_table(left_of, times_DB),
        _areas_table(left_of, times_DB),
        len(x_BLT),
    )


class _Steps:
    def __init__(self, of: int, progress: Callable[[int, int], object] | None) -> None:
        self._of, self._progress, self._done = of, progress, 0

    def done(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._of)


@dataclass(frozen=True)
class _Part:
    """Some of the recordings."""

    model: Any
    x_BLT: Tensor
    lead_mask_BL: Tensor
    baseline: Tensor | None
    settings: Settings

    def attributions(self, model: Any, settings: Settings | None = None) -> Tensor:
        found = attribute(model, self.x_BLT, self.lead_mask_BL, settings or self.settings, self.baseline)
        return torch.from_numpy(found.values_BLT).to(self.x_BLT.device)

    @property
    def one_baseline_BLT(self) -> Tensor | None:
        return self.baseline.mean(dim=0) if self.baseline is not None and self.baseline.ndim == 4 else self.baseline


# --- what is computed of some recordings ----------------------------------------------------------------------


_Left = dict[tuple[str, str], np.ndarray]
"""By kind and order, `Removal.left`."""


def _removed(
    part: _Part, values_BLT: Tensor, samples: int, effort: Effort, seed: Sequence[int], steps: _Steps
) -> _Left:
    removal = Removal(part.model, part.x_BLT, part.lead_mask_BL, part.one_baseline_BLT, samples)
    rng = np.random.default_rng(seed)
    orders = {
        "attribution": [removal.order(removal.cells.sums(values_BLT))],
        "occlusion": [removal.order(removal.effects(steps.done))],
        "random": [removal.random_order(rng) for _ in range(effort.random_orders)],
    }
    left: _Left = {}
    for kind in KINDS:
        for order, ranks in orders.items():
            curves_NBS = []
            for rank_BLP in ranks:
                curves_NBS.append(removal.left(rank_BLP, kind))
                steps.done(len(part.x_BLT))
            left[kind, order] = np.mean(curves_NBS, axis=0)
    return left


def _randomised(
    part: _Part,
    values_BLT: Tensor,
    cells: Cells,
    layers: Sequence[Sequence[str]],
    effort: Effort,
    seed: int,
    steps: _Steps,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlations of signed and of absolute attributions, [layers, B] each, means over randomisations."""
    few = min(part.settings.steps, RANDOM_STEPS)
    once = replace(part.settings, steps=few, most_steps=few)
    own = [cells.sums(values).cpu().numpy() for values in (values_BLT, values_BLT.abs())]
    there_BLP = cells.there_BLP.cpu().numpy()
    found_NKSB = np.full((effort.randomisations, len(layers), 2, len(values_BLT)), np.nan)
    for n in range(effort.randomisations):
        for layer, random in enumerate(cascade(part.model, layers, 1000 * seed + n)):
            others_BLT = part.attributions(random, once)
            for s, others in enumerate((others_BLT, others_BLT.abs())):
                sums_BLP = cells.sums(others).cpu().numpy()
                for b, there_LP in enumerate(there_BLP):
                    found_NKSB[n, layer, s, b] = rank_correlation(own[s][b][there_LP], sums_BLP[b][there_LP])
            steps.done(len(values_BLT))
    there_NKSB = np.isfinite(found_NKSB)  # random weights may ignore the input: then nothing correlates
    count_KSB = there_NKSB.sum(axis=0)
    sum_KSB = np.where(there_NKSB, found_NKSB, 0.0).sum(axis=0)
    mean_KSB = np.where(count_KSB > 0, sum_KSB / np.maximum(count_KSB, 1), np.nan)
    return mean_KSB[:, 0], mean_KSB[:, 1]


# --- tables ---------------------------------------------------------------------------------------------------


def _randomisation_table(
    layers: Sequence[Sequence[str]], signed_KB: np.ndarray, absolute_KB: np.ndarray, times_DB: np.ndarray
) -> pd.DataFrame:
    rows = []
    for names, signed_B, absolute_B in zip(layers, signed_KB, absolute_KB, strict=True):
        signed, absolute = intervals.mean(signed_B, times_DB), intervals.mean(absolute_B, times_DB)
        rows.append((module_of(names), *signed, *absolute))
    columns = ["layers", "correlation", "low", "high", "absolute", "absolute_low", "absolute_high"]
    return pd.DataFrame(rows, columns=columns)


def _as_share(of_B: np.ndarray, left: _Left, times_DB: np.ndarray) -> Interval:
    """The sum over recordings, as a share of the summed differences between recording and baseline.

    A ratio of sums: of a recording whose logit is that of its baseline, a share of its own would be without bound.
    """
    return intervals.ratio(of_B, left["deletion", "random"][:, 0], times_DB, LEAST_DIFFERENCE)


def _curves_table(left: _Left, times_DB: np.ndarray) -> pd.DataFrame:
    rows = [
        (kind, order, share, *_as_share(left_BS[:, s], left, times_DB))
        for (kind, order), left_BS in left.items()
        for s, share in enumerate(SHARES.tolist())
    ]
    return pd.DataFrame(rows, columns=["kind", "order", "share", "logit", "low", "high"])


def _areas_table(left: _Left, times_DB: np.ndarray) -> pd.DataFrame:
    area_of = {key: np.trapezoid(left_BS, SHARES, axis=1) for key, left_BS in left.items()}
    rows = []
    for (kind, order), area_B in area_of.items():
        row: list[Any] = [kind, order, *_as_share(area_B, left, times_DB)]
        for other in ("random", "occlusion"):
            of = area_B - area_of[kind, other]
            row += [np.nan] * 3 if other == order else _as_share(of, left, times_DB)
        rows.append(row)
    against = ["against_random", "against_low", "against_high", "against_occlusion", "occlusion_low", "occlusion_high"]
    return pd.DataFrame(rows, columns=["kind", "order", "area", "low", "high", *against])
