"""Pictures of shares of attributions, by lead and wave, and of the checks of explanations.

Signs are readable without colour: bars go right or left of zero, and numbers in cells have their sign.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lsemvae.plots.attribution import LOWERS, RAISES, Picture

_GROUPS: tuple[dict[str, Any], ...] = (
    {"facecolor": "#1d3f5e"},
    {"facecolor": "#cfe0ee", "hatch": "////"},
    {"facecolor": "#8a8a8a"},
    {"facecolor": "white", "hatch": "...."},
)
"""Neighbouring bars differ in lightness and hatching."""
_ORDERS: dict[str, dict[str, Any]] = {
    "attribution": {"color": "#a63a00", "linestyle": "-", "marker": "o", "linewidth": 2.6},
    "occlusion": {"color": "#0072b2", "linestyle": "--", "marker": "s", "linewidth": 1.5},
    "random": {"color": "#555555", "linestyle": ":", "marker": "x", "linewidth": 1.5},
}
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#3d8fc7", "#ffffff", "#c4581c"])


class Values(NamedTuple):
    """A value for each name, NaN where there is none; with intervals where `low` and `high` are given."""

    value_N: np.ndarray
    low_N: np.ndarray | None = None
    high_N: np.ndarray | None = None


class Panel(NamedTuple):
    """Bars of one quantity, one series for each group. A single `signed` series is coloured by the sign of its bars."""

    title: str
    series: Mapping[str, Values]
    percent: bool = True
    signed: bool = True


def bars(names: Sequence[str], panels: Sequence[Panel]) -> Picture:
    """A row for each name, a panel for each quantity, at most three beside each other."""
    most = max(len(panel.series) for panel in panels)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    height = 0.17 * len(names) * (most + 0.6) + 0.9
    figure = Figure(figsize=(2.7 * across + 0.8, height * down + 0.3), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    axes = list(grid.flat)[: len(panels)]
    for empty in list(grid.flat)[len(panels) :]:
        empty.set_axis_off()
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, panel, len(names))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    groups, labels = axes[0].get_legend_handles_labels()
    if most > 1:
        figure.legend(groups, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
    return Picture(figure, " ".join(_panel_words(names, panel) for panel in panels))


def _panel(axis: Axes, panel: Panel, count: int) -> None:
    scale = 100.0 if panel.percent else 1.0
    height = 0.8 / len(panel.series)
    place_N = np.arange(count)
    for number, (name, of) in enumerate(panel.series.items()):
        at_N = place_N + (number - (len(panel.series) - 1) / 2) * height
        value_N = scale * np.asarray(of.value_N, dtype=float)
        style = dict(_GROUPS[number % len(_GROUPS)])
        if len(panel.series) == 1:
            style = {"color": np.where(value_N < 0, LOWERS, RAISES) if panel.signed else "#8a8a8a"}
        axis.barh(at_N, np.nan_to_num(value_N), height * 0.92, edgecolor="#222", linewidth=0.6, label=name, **style)
        if of.low_N is not None and of.high_N is not None:
            axis.hlines(at_N, scale * of.low_N, scale * of.high_N, color="black", linewidth=1.1)
            for end_N in (of.low_N, of.high_N):
                axis.plot(scale * end_N, at_N, "|", color="black", markersize=4)
        for at in at_N[~np.isfinite(value_N)]:
            axis.annotate("–", (0, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=0.9)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel("%" if panel.percent else "logit", fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.locator_params(axis="x", nbins=5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="0.88", linewidth=0.6)
    axis.set_axisbelow(True)


def _panel_words(names: Sequence[str], panel: Panel) -> str:
    parts = []
    for group, of in panel.series.items():
        shown = ", ".join(
            f"{name} {_number(float(value), panel.percent)}" for name, value in zip(names, of.value_N, strict=True)
        )
        parts.append(f"{group}: {shown}" if len(panel.series) > 1 else shown)
    return f"{panel.title}: {'; '.join(parts)}."


def _number(value: float, percent: bool) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{100 * value:.0f} %" if percent else f"{value:.2g}"


class Cells(NamedTuple):
    """A number for each row and column, NaN where there is none. A cell with `marked` has an asterisk."""

    title: str
    value_RC: np.ndarray
    percent: bool = True
    marked_RC: np.ndarray | None = None
    sums: bool = True
    """Whether sums over rows and columns mean something; they are drawn at the edges."""


def heat_maps(rows: Sequence[str], columns: Sequence[str], panels: Sequence[Cells]) -> Picture:
    """Numbers with their sign in cells that are the darker, the larger the number is. Shares are in percent."""
    figure = Figure(figsize=((0.62 * (len(columns) + 1) + 0.9) * len(panels), 0.3 * (len(rows) + 1) + 1.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    sums = len(rows) > 1 and any(panel.sums for panel in panels)
    for axis, panel in zip(axes, panels, strict=True):
        _cells(axis, rows, columns, panel)
        axis.set_ylim(len(rows) + sums - 0.5, -0.5)  # rows of all panels are at the same height
    return Picture(figure, " ".join(_cell_words(rows, columns, panel) for panel in panels))


def _cell_words(rows: Sequence[str], columns: Sequence[str], panel: Cells) -> str:
    known = [(abs(value), place) for place, value in np.ndenumerate(panel.value_RC) if value and np.isfinite(value)]
    largest = []
    for _, (row, column) in sorted(known, reverse=True)[:5]:
        number = _signed(float(panel.value_RC[row, column]), panel.percent)
        largest.append(f"{rows[row]} {columns[column]} {number}{' %' * panel.percent}{_mark(panel, row, column)}")
    of = f"{panel.title}: {', '.join(rows)} by {', '.join(columns)}."
    return f"{of} Largest: {', '.join(largest) or 'none'}."


def _cells(axis: Axes, rows: Sequence[str], columns: Sequence[str], panel: Cells) -> None:
    value_RC = np.asarray(panel.value_RC, dtype=float)
    names, headers = list(rows), list(columns)
    largest = float(np.nanmax(np.abs(value_RC), initial=0.0)) or 1.0
    corners = (np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5)
    axis.pcolormesh(*corners, np.ma.masked_invalid(value_RC), cmap=_SIGNED, vmin=-largest, vmax=largest)
    for (row, column), value in np.ndenumerate(value_RC):
        _number_in(axis, row, column, _signed(value, panel.percent) + _mark(panel, row, column))
    if panel.sums:
        headers.append("all")
        for row, value in enumerate(value_RC.sum(axis=1)):
            _number_in(axis, row, len(columns), _signed(value, panel.percent))
    if panel.sums and len(rows) > 1:
        names.append("all")
        for column, value in enumerate([*value_RC.sum(axis=0), value_RC.sum()]):
            _number_in(axis, len(rows), column, _signed(value, panel.percent))
    axis.set_xlim(-0.5, len(headers) - 0.5)
    axis.set_xticks(range(len(headers)), headers)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=9)
    axis.set_title(panel.title, fontsize=9.5, loc="left")
    axis.spines[:].set(color="0.6", linewidth=0.6)


def _mark(panel: Cells, row: int, column: int) -> str:
    return "*" if panel.marked_RC is not None and panel.marked_RC[row, column] else ""


def _number_in(axis: Axes, row: int, column: int, text: str) -> None:
    axis.text(column, row, text, ha="center", va="center", fontsize=8.5)


def _signed(value: float, percent: bool) -> str:
    """With its sign, of the digits that fit into a cell; a number that rounds to 0 has none."""
    if not np.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if percent else f"{value:+.2f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


# --- the checks -----------------------------------------------------------------------------------------------


def randomisation(layers: Sequence[str], series: Mapping[str, Values]) -> Picture:
    """Correlation of attributions with those of the model whose layers are random up to each of these."""
    figure = Figure(figsize=(7.0, 0.24 * len(layers) * (len(series) + 0.6) + 1.2), layout="constrained")
    axis = figure.subplots()
    _panel(axis, Panel("", series, percent=False, signed=False), len(layers))
    found_N = np.concatenate([part for of in series.values() for part in of if part is not None])
    least = float(np.nanmin(found_N, initial=0.0))
    axis.set(xlim=(min(-0.1, least - 0.05), 1.02), xlabel="rank correlation with the model's own attributions")
    axis.set_yticks(range(len(layers)), layers)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    if len(series) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return Picture(figure, _panel_words(layers, Panel("Rank correlation with random layers", series, percent=False)))


def removal_curves(of: Mapping[str, Mapping[str, tuple[np.ndarray, Values]]], label: str) -> Picture:
    """For each kind (deletion, insertion) and order: `label` over the share of the recording, with its interval."""
    figure = Figure(figsize=(4.4 * max(len(of), 1) + 0.4, 4.0), layout="constrained")
    axes = figure.subplots(1, max(len(of), 1), sharey=True, squeeze=False)[0]
    for axis, (kind, orders) in zip(axes, of.items(), strict=False):
        for order, (share_N, values) in orders.items():
            style = _ORDERS.get(order, {"color": "black", "linestyle": "-.", "marker": "^", "linewidth": 1.5})
            every = max(1, len(share_N) // 8)
            axis.plot(100 * share_N, values.value_N, label=order, markersize=4.5, markevery=every, **style)
            if values.low_N is not None and values.high_N is not None:
                axis.fill_between(100 * share_N, values.low_N, values.high_N, color=style["color"], alpha=0.15)
        done = "taken away" if kind == "deletion" else "there"
        axis.set(xlabel=f"% of the recording that is {done}", title=kind)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.6)
    axes[0].set_ylabel(label)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, handlelength=3.4
    )
    return Picture(figure, f"{label} over the share of the recording, in {' and '.join(of)}, by order.")
