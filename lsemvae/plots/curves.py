"""Figures: distributions, reconstructions, ROC and precision-recall curves, grid searches, calibration."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure


def histogram(values: np.ndarray, edges: np.ndarray, label: str, color: str = "#2f5d8a") -> str:
    """Draw the counts of values -> SVG. Values beyond the outer edges count in the outer bars; NaN are left out."""
    counts, _ = np.histogram(np.clip(values[np.isfinite(values)], edges[0], edges[-1]), edges)
    # So that the same values give the same bytes, text stays text, and no address is in the file.
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.4, 2.8), layout="constrained")
        axis = figure.subplots()
        axis.stairs(counts, edges, fill=True, color=color)
        axis.set(xlabel=label, ylabel="count", xlim=(edges[0], edges[-1]))
        axis.locator_params(axis="y", integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata=without)
    return content.getvalue()[content.getvalue().index("<svg") :]


def reconstructions(
    x_BLT: np.ndarray,
    reconstruction_BLT: np.ndarray,
    leads: Sequence[str],
    rate_hz: int,
    path: Path,
    seconds: float = 4.0,
) -> None:
    """Plot each recording (column) and lead (row): the input in grey, its reconstruction in red."""
    shown = min(int(seconds * rate_hz), x_BLT.shape[-1])
    time_s_T = np.arange(shown) / rate_hz
    columns = len(x_BLT)
    figure = Figure(figsize=(5.2 * columns, 0.95 * len(leads) + 0.8), layout="constrained")
    axes = figure.subplots(len(leads), columns, sharex=True, squeeze=False)
    for column in range(columns):
        for row, lead in enumerate(leads):
            axis = axes[row, column]
            x_T, reconstruction_T = x_BLT[column, row], reconstruction_BLT[column, row]
            axis.plot(time_s_T, x_T[:shown], color="0.55", linewidth=0.8, label="recorded")
            axis.plot(time_s_T, reconstruction_T[:shown], color="#c0392b", linewidth=0.9, label="reconstructed")
            varies = x_T.std() > 0 and reconstruction_T.std() > 0
            r = np.corrcoef(x_T, reconstruction_T)[0, 1] if varies else np.nan
            axis.set_title(f"r = {r:.2f}", loc="right", fontsize=7, pad=1)
            axis.set_ylabel(lead, rotation=0, ha="right", va="center")
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
        axes[-1, column].set_xlabel("seconds")
    # The legend is above the plots: within one it would cover the recording.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", fontsize=7, frameon=False, ncols=2)
    figure.savefig(path, dpi=90)


def discrimination(y_B: np.ndarray, scores: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Plot the ROC and precision-recall curves of out-of-fold scores, one line for each named scorer."""
    from sklearn.metrics import precision_recall_curve, roc_curve  # takes 1 s, and the other figures do not need it

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    roc, precision_recall = figure.subplots(1, 2)
    # Lines of different styles can be told apart in grey.
    for (name, score_B), style in zip(scores.items(), cycle(("-", "--", "-.", ":")), strict=False):
        false_positive, true_positive, _ = roc_curve(y_B, score_B)
        precision, recall, _ = precision_recall_curve(y_B, score_B)
        roc.plot(false_positive, true_positive, style, label=name)
        precision_recall.plot(recall, precision, style, label=name)
    roc.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    precision_recall.axhline(y_B.mean(), color="0.7", linestyle=":", linewidth=1)
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, out of fold")
    precision_recall.set(
        xlabel="recall (sensitivity)",
        ylabel="precision",
        title="Precision-recall, out of fold",
        ylim=(0, 1.02),
    )
    for axis in (roc, precision_recall):
        axis.spines[["top", "right"]].set_visible(False)
    roc.legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def grid_search(
    settings: Mapping[str, Sequence[object]],
    value: Sequence[float],
    collapsed: Sequence[bool],
    label: str,
    path: Path,
    best: int | None = None,
) -> None:
    """Plot each trial's value over each searched setting, one panel a setting.

    Lines join the trials that differ in that setting alone. `settings` holds one value for each trial; `best` is the
    index of the trial that is marked by a ring.
    """
    names = list(settings)
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    dead = np.array(collapsed, dtype=bool)
    value_N = np.array(value, dtype=float)
    for panel, name in zip(panels, names, strict=True):
        ticks = sorted(set(settings[name]), key=lambda entry: (isinstance(entry, str | tuple), entry))
        x_N = np.array([ticks.index(entry) for entry in settings[name]])
        others = list(zip(*(settings[other] for other in names if other != name), strict=True)) or [()] * len(x_N)
        for group in dict.fromkeys(others):
            rows = sorted((row for row, other in enumerate(others) if other == group), key=lambda row: x_N[row])
            panel.plot(x_N[rows], value_N[rows], color="0.8", linewidth=1, zorder=1)
        for shown, color, marker, kind in ((~dead, "#2f5d8a", "o", "trial"), (dead, "#c0392b", "x", "collapsed")):
            if shown.any():
                panel.scatter(x_N[shown], value_N[shown], color=color, marker=marker, zorder=2, label=kind)
        if best is not None:
            panel.scatter(
                x_N[best], value_N[best], s=150, facecolor="none", edgecolor="#2e8b57", linewidth=1.8, label="best"
            )
        panel.set_xticks(range(len(ticks)), [f"{tick:g}" if isinstance(tick, float) else str(tick) for tick in ticks])
        panel.set(xlabel=name, xlim=(-0.5, len(ticks) - 0.5))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def reliability(diagrams: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path, title: str) -> None:
    """Plot the share of positives over the mean probability, one line for each name.

    `diagrams` maps a name to (probability, positive, weight), each an array over bins. The area of a point is
    proportional to its bin's weight.
    """
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    for name, (probability, positive, weight) in diagrams.items():
        (line,) = axis.plot(probability, positive, linewidth=1)
        axis.scatter(probability, positive, 400 * weight / weight.sum(), color=line.get_color(), label=name)
    axis.set(xlabel="probability", ylabel="share of positives", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False)
    axis.set_title(title, fontsize=10, wrap=True)
    figure.savefig(path, dpi=110)
