"""The cohort's part of the page of explanations: shares by lead and wave, by label and subgroup."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from lsemvae.cohorts.demographics import AGES
from lsemvae.explain.cohort import DIFFERENCE
from lsemvae.explain.waves import WAVES
from lsemvae.plots.attribution import Picture
from lsemvae.plots.shares import Cells, Panel, Values, bars, heat_maps
from lsemvae.reports.explanation_records import Image, figure
from lsemvae.reports.page import table

IGAR_WEAKNESSES = (
    "The integrated-gradient attribution ratio (IGAR) is computed as its authors published it, so that tables can be "
    "compared: 50 steps from zero; each lead scaled from its least to its largest attribution; of a lead, the share of "
    "its samples at or above 0.7, divided by the sum over leads; of a wave, the number of samples at or above 0.6 "
    "within 40 ms of its peaks, divided by the sum over P, Q, R, S and T. Its weaknesses: scaling takes away sign and "
    "size, so a lead with hardly any attribution can have a large ratio; the windows of Q, R and S overlap, so samples "
    "count twice; ST and all else is left out of the waves; it is the same whether the attributions have converged or "
    "not. The shares beside it have none of these."
)
SUBGROUPS = ("women", "men", *AGES)


def spread(row: Mapping[str, Any] | pd.Series, kind: str, prefix: str | None = None) -> str:
    """A share in percent with its interval, where it has one: columns KIND, KIND_low and KIND_high, or low and high."""
    prefix = f"{kind}_" if prefix is None else prefix
    value, low, high = (100 * float(row[name]) for name in (kind, f"{prefix}low", f"{prefix}high"))
    value, low, high = (round(of, 1) + 0.0 for of in (value, low, high))  # no -0.0
    if not np.isfinite(value):
        return "–"
    return f"{value:.1f}" + (f" [{low:.1f} to {high:.1f}]" if np.isfinite([low, high]).all() else "")


def cohort_section(summary: pd.DataFrame) -> list[str]:
    """Bars and maps of lead and wave by label, and tables by label and subgroup."""
    if summary.empty:
        return ["<p>No recording is explained, so there is no summary.</p>"]
    groups = [str(group) for group in summary.group.unique()]
    labels: list[str] = [group for group in ("label 1", "label 0") if group in groups]
    drawn = labels or ["all"]
    parts = [
        "<p>Means over subjects, with 95 % bootstrap intervals over subjects.</p>",
        _sizes(summary, [*drawn, *SUBGROUPS]),
    ]
    for what, caption in (("lead", "By lead, all waves together"), ("wave", "By wave, all leads together")):
        which = f"{caption}; {', '.join(drawn)}. Black lines: 95 % intervals."
        parts.append(figure(Image.of(_bars(summary, what, drawn)), which))
    parts.append(_maps(summary, [group for group in ("all", DIFFERENCE) if group in groups]))
    parts += _tables(summary, ["all", *labels, *([DIFFERENCE] if DIFFERENCE in groups else [])])
    subgroups = [group for group in SUBGROUPS if group in groups]
    if subgroups:
        parts += ["<h3>By sex and age</h3>", *_tables(summary, subgroups)]
        if any(group.endswith(("label 1", "label 0")) for group in set(groups) - set(labels)):
            parts.append("<p>The table of the run has each of these by label, too.</p>")
    return parts


def _sizes(summary: pd.DataFrame, groups: Sequence[str]) -> str:
    of = summary[summary.group.isin(["all", *groups])].drop_duplicates("group")
    rows = [[escape(row.group), f"{row.records:,.0f}", f"{row.subjects:,.0f}"] for row in of.itertuples()]
    return table("Groups", ["group", "recordings", "subjects"], rows)


def _of(summary: pd.DataFrame, group: str, what: str) -> pd.DataFrame:
    """The rows of one group by lead or by wave, in the table's order."""
    other = "wave" if what == "lead" else "lead"
    return summary[(summary.group == group) & (summary[other] == "all") & (summary[what] != "all")]


def _bars(summary: pd.DataFrame, what: str, groups: Sequence[str]) -> Picture:
    names = list(_of(summary, groups[0], what)[what])
    panels = []
    for kind in ("signed", "absolute"):
        series = {}
        for group in groups:
            of = _of(summary, group, what).set_index(what).reindex(names)
            series[group] = Values(*(of[f"{kind}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")))
        panels.append(Panel(f"{kind} share", series, signed=kind == "signed"))
    return bars(names, panels)


def _maps(summary: pd.DataFrame, groups: Sequence[str]) -> str:
    """Signed shares of each lead and wave: of all, and of the difference between the labels where there are both."""
    leads = list(_of(summary, groups[0], "lead").lead)
    panels = []
    for group in groups:
        value_LW, low_LW, high_LW = (_grid(summary, group, leads, f"signed{end}") for end in ("", "_low", "_high"))
        panels.append(Cells(f"{group}, %", value_LW, marked_RC=(low_LW > 0) | (high_LW < 0)))
    caption = f"Signed shares by lead and wave, {' and '.join(groups)}. *: the 95 % interval excludes 0."
    return figure(Image.of(heat_maps(leads, WAVES, panels)), caption)


def _grid(summary: pd.DataFrame, group: str, leads: Sequence[str], column: str) -> np.ndarray:
    of = summary[summary.group == group].pivot(index="lead", columns="wave", values=column)
    return of.reindex(index=list(leads), columns=list(WAVES)).to_numpy(dtype=float)


def _tables(summary: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    return [_group_table(summary, groups, what, kind) for what in ("lead", "wave") for kind in ("signed", "absolute")]


def _group_table(summary: pd.DataFrame, groups: Sequence[str], what: str, kind: str) -> str:
    by_group = [_of(summary, group, what).set_index(what) for group in groups]
    rows = [
        [escape(str(name)), *(spread(of.loc[name], kind) if name in of.index else "–" for of in by_group)]
        for name in by_group[0].index
    ]
    caption = f"{kind.capitalize()} shares by {what}, % [95 % interval]"
    return table(caption, [what, *map(escape, groups)], rows)


def igar_section(igar: pd.DataFrame | None, summary: pd.DataFrame) -> list[str]:
    """The ratio beside the shares of the same recordings, and what speaks against it."""
    if igar is None or igar.empty:
        return []
    parts = ["<h2>IGAR, as published</h2>", f"<p>{escape(IGAR_WEAKNESSES)}</p>"]
    for what, of in igar.groupby("kind", sort=False):
        own = _of(summary, "all", str(what)).set_index(str(what))
        rows = []
        for row in of.to_dict("records"):
            beside = spread(own.loc[row["name"]], "absolute") if row["name"] in own.index else "–"
            rows.append([escape(str(row["name"])), spread(row, "ratio", ""), beside])
        header = [escape(str(what)), "IGAR", "share of the absolute attribution"]
        parts.append(table(f"By {escape(str(what))}, % [95 % interval]", header, rows))
    return parts
