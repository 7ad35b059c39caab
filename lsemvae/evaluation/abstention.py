"""Abstention: whether a measure of doubt finds the recordings that a model scores badly.

The most doubtful tenth of the recordings is set aside, and the AUROC of the others is compared with that of all, which
is what setting aside a random tenth gives on average. The idea is HemoNet's (daphneschles/RHCnet), which sets aside the
tenth that its own score calls least reliable.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from lsemvae.bundle import SET_ASIDE, Doubt
from lsemvae.evaluation.cells import Material, Ran
from lsemvae.evaluation.metrics import Estimate, Weighted, interval_of, resampled
from lsemvae.models.parts.doubt import Kind


class SetAside(NamedTuple):
    """AUROC of all recordings, of those that remain, and the second minus the first, with paired intervals."""

    every: Estimate
    rest: Estimate
    gain: Estimate


def set_aside(
    y_B: np.ndarray,
    score_NB: np.ndarray,
    doubt_NB: np.ndarray,
    subject_B: np.ndarray,
    *,
    share: float = SET_ASIDE,
    draws: int = 500,
    seed: int = 0,
) -> SetAside:
    """Set aside the most doubtful `share` of the recordings, in each of N trainings and in each bootstrap sample.

    Values are means over the trainings. Both AUROCs are of the same resampling of subjects. There is no interval where
    too many resamplings leave one class only.
    """
    pairs = [
        (Weighted(y_B, score_B, np.zeros(len(y_B), dtype=bool)), np.asarray(doubt_B, dtype=float))
        for score_B, doubt_B in zip(np.atleast_2d(score_NB), np.atleast_2d(doubt_NB), strict=True)
    ]

    def aurocs(times_DB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):  # one class only: NaN
            every = [measure(times_DB, ("auroc",))["auroc"] for measure, _ in pairs]
            rest = [measure(kept(times_DB, doubt_B, share), ("auroc",))["auroc"] for measure, doubt_B in pairs]
        return np.mean(every, axis=0), np.mean(rest, axis=0)

    every, rest = (float(value[0]) for value in aurocs(np.ones((1, len(y_B)))))
    drawn = [aurocs(times_DB) for times_DB in resampled(y_B, subject_B, draws, seed)]
    every_D, rest_D = (np.concatenate(values) for values in zip(*drawn, strict=True))
    return SetAside(
        Estimate(every, *interval_of(every_D)),
        Estimate(rest, *interval_of(rest_D)),
        Estimate(rest - every, *interval_of(rest_D - every_D)),
    )


def kept(weight_DB: np.ndarray, doubt_B: np.ndarray, share: float = SET_ASIDE) -> np.ndarray:
    """The weights without those of the most doubtful `share`, for each of D weightings.

    Where the boundary falls within a recording, or within recordings of equal doubt, each keeps the same part of its
    weight. So a doubt that is the same for all changes no AUROC. Worked example: doubts (1, 3, 2, 3), weights 1, share
    0.25: three of the four weights remain, two of them below doubt 3, so both recordings of doubt 3 keep 0.5.
    """
    order_B = np.argsort(doubt_B, kind="stable")
    _, group_B = np.unique(doubt_B[order_B], return_inverse=True)
    starts_G = np.flatnonzero(np.append(True, np.diff(group_B) > 0))
    sorted_DB = weight_DB[:, order_B].astype(float)
    weight_DG = np.add.reduceat(sorted_DB, starts_G, axis=1)
    before_DG = weight_DG.cumsum(axis=1) - weight_DG
    room_DG = (1 - share) * weight_DG.sum(axis=1, keepdims=True) - before_DG
    part_DG = np.clip(room_DG / np.where(weight_DG > 0, weight_DG, 1), 0, 1)
    found_DB = np.empty_like(sorted_DB)
    found_DB[:, order_B] = sorted_DB * part_DG[:, group_B]
    return found_DB


def out_of_fold(ran: Ran, material: Material) -> dict[tuple[str, int, str], np.ndarray]:
    """(row, seed, measure) -> doubt_B, where every fold measured it."""
    found: dict[tuple[str, int, str], np.ndarray] = {}
    for cell, doubts in ran.doubts.items():
        for kind, doubt_B in doubts.items():
            whole = np.full(len(material.embedded.y_B), np.nan)
            found.setdefault((cell.row.name, cell.seed, kind), whole)[material.folds[cell.fold][1]] = doubt_B
    return {key: doubt_B for key, doubt_B in found.items() if np.isfinite(doubt_B).all()}


def table(doubts: Mapping[tuple[str, int, str], np.ndarray], record_B: np.ndarray, leads: str) -> pd.DataFrame:
    """The same as `lsemvae.evaluation.compare.Scores.doubts`."""
    parts = [
        pd.DataFrame(
            {"leads": leads, "method": method, "seed": seed, "record_id": record_B, "doubt": kind, "value": doubt_B}
        )
        for (method, seed, kind), doubt_B in doubts.items()
    ]
    columns = ["leads", "method", "seed", "record_id", "doubt", "value"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


COLUMNS = (
    "leads", "method", "doubt", "recordings", "all", "all_low", "all_high", "rest", "rest_low", "rest_high",
    "gain", "gain_low", "gain_high",
)  # fmt: skip
"""Of a comparison's table of abstention: a line for each set of leads, method and measure of doubt."""


def figures(found: SetAside) -> dict[str, float]:
    """The figures of such a line."""
    return {
        f"{name}{suffix}": value
        for name, of in (("all", found.every), ("rest", found.rest), ("gain", found.gain))
        for suffix, value in (("", of.value), ("_low", of.low), ("_high", of.high))
    }


def helpful(lines: pd.DataFrame) -> Kind | None:
    """The measure of doubt that a bundle carries, of one method on one set of leads.

    It is the one with the largest gain, if the gain's interval is above 0. Choosing the best of two on the recordings
    that it is measured on favours it a little; the interval does not allow for that.
    """
    shown = lines[lines["gain"].notna()]
    if shown.empty:
        return None
    best = shown.loc[shown["gain"].idxmax()]
    return cast(Kind, best["doubt"]) if best["gain_low"] > 0 else None


def carried(lines: pd.DataFrame, doubts: Mapping[str, pd.DataFrame]) -> Doubt | None:
    """What a bundle carries of a method on one set of leads: the helpful measure, and its limit.

    `doubts` are what `lsemvae.evaluation.compare.Scores.doubts_of` gives; the limit is of the first seed, which the
    bundle's model has.
    """
    kind = helpful(lines)
    if kind is None:
        return None
    line = lines[lines["doubt"] == kind].iloc[0]
    measured = {"recordings": int(line["recordings"])} | {name: float(line[name]) for name in COLUMNS[4:]}
    return Doubt(kind, float(np.quantile(doubts[kind].iloc[0], 1 - SET_ASIDE)), measured)


def verdict(lines: pd.DataFrame) -> str:
    """What setting aside is worth to one method on one set of leads, in words with the figures."""
    if lines.empty:
        return "not measured"
    found = "; ".join(
        f"{row.doubt}: AUROC {row.all:.3f} of all, {row.rest:.3f} of the remaining {100 * (1 - SET_ASIDE):.0f} %, gain "
        f"{row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]"
        for row in lines.itertuples()
    )
    kind = helpful(lines)
    if kind is None:
        return (
            "measured, and no measure of doubt is shown to help, so the model carries none and gives no such warning. "
            f"Setting aside the most doubtful {100 * SET_ASIDE:.0f} %: {found}."
        )
    choice = " It was chosen on the same recordings, which favours it a little." if len(lines) > 1 else ""
    return (
        f"the model carries the measure {kind}: recordings more doubtful than the limit of the most doubtful "
        f"{100 * SET_ASIDE:.0f} % are marked in `reliability`. Setting these aside: {found}.{choice}"
    )
