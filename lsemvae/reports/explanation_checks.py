"""What the checks of explanations say, in plain sentences that follow from the numbers."""

from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from lsemvae.explain.checks import Checks
from lsemvae.explain.truth import ATTRIBUTION_EFFECT, EFFECT_TRUTH
from lsemvae.plots.attribution import Picture
from lsemvae.plots.shares import Values, randomisation, removal_curves
from lsemvae.reports.explanation_records import Image, figure
from lsemvae.reports.page import table

ALIKE = 0.5
"""Attributions of a random model that correlate with the model's own by more than this say little of what it learned.
The test has no agreed limit; the page says this one."""
_REMOVED = {
    "deletion": "Deleting in the order of the attributions {does} the logit's difference from the baseline {how}.",
    "insertion": "Inserting in the order of the attributions {does} the logit's difference from the baseline {how}.",
}
_DOES = {"deletion": ("takes away", "take away"), "insertion": ("restores", "restore")}
Verdict = tuple[bool | None, str]
"""Whether a check passes, None where that cannot be said, and a sentence with its numbers."""


def verdicts(checks: Checks) -> list[Verdict]:
    return [
        *_randomised(checks.randomisation),
        *_removed(checks.areas),
        *_true(checks.truth),
        *_evident(checks.evidence),
    ]


def _randomised(of: pd.DataFrame) -> list[Verdict]:
    """Of the model in which all layers are random."""
    if of.empty:
        return []
    last = of.iloc[-1]
    found = [_alike("signed attributions", last.correlation, last.low, last.high)]
    if "absolute" in of:
        found.append(_alike("absolute attributions", last.absolute, last.absolute_low, last.absolute_high))
    return found


def _alike(what: str, correlation: float, low: float, high: float) -> Verdict:
    numbers = f"rank correlation {_spread(correlation, low, high)}, limit {ALIKE:g}"
    if high < ALIKE:
        return True, f"With random weights the {what} are others, so they depend on what the model learned ({numbers})."
    if low > ALIKE:
        return (
            False,
            f"With random weights the {what} are much the same: they show the signal, not the model ({numbers}).",
        )
    return None, f"Whether random weights give other {what} is not clear ({numbers})."


def _removed(areas: pd.DataFrame) -> list[Verdict]:
    """Deletion is better with a smaller area, insertion with a larger one."""
    found: list[Verdict] = []
    for row in areas[(areas.order == "attribution") & areas.kind.isin(list(_REMOVED))].itertuples():
        does, do = _DOES[row.kind]
        low, high = sorted(-end if row.kind == "deletion" else end for end in (row.against_low, row.against_high))
        numbers = f"area less that of random order {_spread(row.against_random, row.against_low, row.against_high)}"
        if "against_occlusion" in areas:
            of = _spread(row.against_occlusion, row.occlusion_low, row.occlusion_high)
            numbers += f"; less that of gradient-free occlusion {of}"
        passes: bool | None = None
        words = f"does not clearly {do}"
        if low > 0:
            passes, words = True, does
        elif high < 0:
            passes, words = False, f"does not {do}"
        text = _REMOVED[row.kind].format(does=words, how=f"faster than random order ({numbers})")
        found.append((passes, text))
    return found


def _true(of: pd.DataFrame | None) -> list[Verdict]:
    found: list[Verdict] = []
    for row in () if of is None else of.itertuples():
        numbers = f"rank correlation {_spread(row.correlation, row.low, row.high)}, {row.records} recordings"
        shuffled = "shuffled" in str(row.what)
        finds = bool(row.low > 0)
        does = "correlate" if finds else "do not clearly correlate"
        text = f"{row.what}: attributions {does} with what the label depends on ({numbers})"
        wrong = ", although the labels are random" if shuffled and finds else ""
        passes: bool | None = finds != shuffled
        if row.what == ATTRIBUTION_EFFECT:
            text = f"{row.what}: attributions {does} with how the score changes where a wave is exchanged ({numbers})"
        elif row.what == EFFECT_TRUTH:  # it is the model's doing, not that of its explanation
            text = f"{row.what}: the waves that change the score {does} with what the label depends on ({numbers})"
            passes = True if finds else None
        found.append((passes, f"{text}{wrong}."))
    return found


def _evident(of: pd.DataFrame | None) -> list[Verdict]:
    found: list[Verdict] = []
    for row in () if of is None else of[of.wave == "all"].itertuples():
        finds = bool(row.low > 0)
        does = "find" if finds else "do not clearly find"
        numbers = f"{_spread(row.evidence, row.low, row.high)} standard deviations of the logit"
        found.append((True if finds else None, f"Attributions {does} evidence for the label in the waves ({numbers})."))
    return found


def _spread(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f} to {high:.3f}]"


# --- its part of the page -------------------------------------------------------------------------------------


def verdict_list(found: Sequence[Verdict]) -> str:
    names = {True: "Passes", False: "Fails", None: "Undecided"}
    return "<ul>" + "".join(f"<li><b>{names[passes]}.</b> {escape(text)}</li>" for passes, text in found) + "</ul>"


def checks_section(checks: Checks | None) -> str:
    if checks is None:
        return "<p>The checks were not asked for, so nothing here shows whether the explanations are true.</p>"
    parts = [f"<p>With {checks.records:,} recordings. Intervals are 95 %, over subjects.</p>"]
    parts.append(verdict_list(verdicts(checks)))
    if len(checks.randomisation):
        of = checks.randomisation
        words = (
            "Model randomisation (Adebayo et al. 2018): rank correlation of the attributions with those of the model "
            "in which these layers and all nearer to the score have random weights. The lower, the more the "
            f"attributions depend on what was learned; the check fails above {ALIKE:g}."
        )
        series = {"signed": _values(of, ("correlation", "low", "high"))}
        if "absolute" in of:
            series["absolute"] = _values(of, ("absolute", "absolute_low", "absolute_high"))
        parts.append(figure(Image.of(randomisation(list(of.layers), series)), words))
    if len(checks.curves):
        words = (
            "Deletion and insertion: how much of the difference between the logits of the recording and of the "
            "baseline there is while parts of the recording are taken away, or put back, the most important first. "
            "True attributions are below random order in deletion, and above it in insertion."
        )
        parts += [figure(Image.of(curves_picture(checks.curves)), words), _areas(checks.areas)]
    if checks.truth is not None and len(checks.truth):
        rows = [
            [str(row.what), _spread(row.correlation, row.low, row.high), f"{row.records:,}"]
            for row in checks.truth.itertuples()
        ]
        caption = "Simulated cohort: rank correlation with the leads and waves that the label depends on"
        parts.append(_escaped(caption, ["what", "correlation", "recordings"], rows))
    if checks.evidence is not None and len(checks.evidence):
        caption = (
            "Simulated cohort: how far the overload moves the logit through each wave, by the attributions, in "
            "standard deviations of the logit of healthy hearts"
        )
        rows = [[str(row.wave), _spread(row.evidence, row.low, row.high)] for row in checks.evidence.itertuples()]
        parts.append(_escaped(caption, ["wave", "evidence"], rows))
    return "".join(parts)


def _values(of: pd.DataFrame, columns: Sequence[str]) -> Values:
    return Values(*(of[name].to_numpy(dtype=float) for name in columns))


def curves_picture(of: pd.DataFrame) -> Picture:
    """The curves of `lsemvae.explain.checks.Checks`."""
    found: dict[str, dict[str, tuple[np.ndarray, Values]]] = {}
    for (kind, order), rows in of.groupby(["kind", "order"], sort=False):
        values = _values(rows, ("logit", "low", "high"))
        found.setdefault(str(kind), {})[str(order)] = (rows.share.to_numpy(dtype=float), values)
    return removal_curves(found, "share of the difference")


def _areas(of: pd.DataFrame) -> str:
    rows = [
        [
            f"{row.kind}, {row.order}",
            _spread(row.area, row.low, row.high),
            "–" if row.order == "random" else _spread(row.against_random, row.against_low, row.against_high),
        ]
        for row in of.itertuples()
    ]
    return _escaped("Area under each curve", ["curve", "area", "difference from random order"], rows)


def _escaped(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(escape(caption), list(map(escape, header)), [[escape(cell) for cell in row] for row in rows])
