"""Pictures of a comparison, as PNG bytes. Lines differ in style and marker too, so that grey copies can be read."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from sklearn.metrics import precision_recall_curve, roc_curve

# Okabe and Ito's colours, which colour-blind readers can tell apart, ordered so that neighbours differ in lightness.
COLORS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#7f7f7f")
_LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 2, 1, 2, 1, 2)), (0, (9, 3)), (0, (3, 1)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LINES = len(COLORS)
_DPI = 120


class Spread(NamedTuple):
    """A value with its interval, either bound NaN where there is none."""

    value: float
    low: float
    high: float


class Diagram(NamedTuple):
    """A reliability diagram: the mean probability and the share of positives of each bin, and all probabilities."""

    probability: np.ndarray
    positive: np.ndarray
    probability_B: np.ndarray


def roc(y_B: np.ndarray, scores: Mapping[str, np.ndarray]) -> bytes:
    """ROC curves of at most MAX_LINES methods."""
    figure, axis = _square()
    for number, (name, score_B) in enumerate(scores.items()):
        false_positive, true_positive, _ = roc_curve(y_B, score_B)
        axis.plot(false_positive, true_positive, label=name, **_style(number, len(false_positive)))
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return _with_legend(figure)


def precision_recall(y_B: np.ndarray, scores: Mapping[str, np.ndarray]) -> bytes:
    """Precision-recall curves of at most MAX_LINES methods; the thin line is the share of positives."""
    figure, axis = _square()
    for number, (name, score_B) in enumerate(scores.items()):
        precision, recall, _ = precision_recall_curve(y_B, score_B)
        axis.step(recall, precision, where="post", label=name, **_style(number, len(recall)))
    axis.axhline(float(np.mean(y_B)), color="0.6", linewidth=0.8, zorder=0)
    axis.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_aspect("equal")
    return _with_legend(figure)


def reliability(diagrams: Mapping[str, Diagram]) -> bytes:
    """The share of positives over the mean probability; below, how many recordings have which probability."""
    figure = Figure(figsize=(5.6, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
    for number, (name, of) in enumerate(diagrams.items()):
        style = _style(number, len(of.probability)) | {"markevery": 1}
        upper.plot(of.probability, of.positive, label=name, **style)
        count, edges = np.histogram(of.probability_B, np.linspace(0, 1, 26))
        lower.stairs(count, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
    upper.set(ylabel="share of positives", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="probability", ylabel="recordings", ylim=(0, None))
    lower.locator_params(axis="y", integer=True, nbins=4)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure, upper)


def net_benefit(y_B: np.ndarray, probability_B: np.ndarray, threshold_K: np.ndarray) -> np.ndarray:
    """True positives minus false positives times the odds of the threshold, each per recording (Vickers 2006). [K]

    With 2 true and 3 false positives of 10 at a threshold of 0.2, whose odds are 1 : 4: 0.2 - 0.3 / 4 = 0.125.
    """
    treated_KB = probability_B >= threshold_K[:, None]
    true_K, false_K = (treated_KB & (y_B == 1)).mean(axis=1), (treated_KB & (y_B == 0)).mean(axis=1)
    return true_K - false_K * threshold_K / (1 - threshold_K)


def decision_curve(y_B: np.ndarray, probabilities: Mapping[str, np.ndarray]) -> bytes:
    """Net benefit over the threshold probability, with those of treating everybody and nobody."""
    y_B = np.asarray(y_B)
    threshold_K = np.linspace(0.01, 0.99, 99)
    share = float(y_B.mean())
    figure, axis = _square((6.4, 4.8))
    for number, (name, probability_B) in enumerate(probabilities.items()):
        benefit_K = net_benefit(y_B, probability_B, threshold_K)
        axis.plot(threshold_K, benefit_K, label=name, **_style(number, len(threshold_K)))
    everybody_K = net_benefit(y_B, np.ones(len(y_B)), threshold_K)
    axis.plot(threshold_K, everybody_K, color="0.55", linewidth=1, label="everybody is treated", zorder=0)
    axis.axhline(0, color="0.55", linewidth=1, linestyle=":", label="nobody is treated", zorder=0)
    axis.set(xlabel="threshold probability", ylabel="net benefit", xlim=(0, 1), ylim=(-0.25 * share, 1.08 * share))
    return _with_legend(figure)


def forest(rows: Sequence[tuple[str, Spread | None, str]], label: str, middle: float) -> bytes:
    """A line for each row: its name, a point with its interval, and a note at the right.

    A row without a value and a note is a heading. `middle` is the value of no effect, or NaN.
    """
    figure = Figure(figsize=(8.0, 0.31 * len(rows) + 0.9), layout="constrained")
    axis = figure.subplots()
    values = [of for _, of, _ in rows if of is not None]
    for place, (_, of, note) in enumerate(rows):
        if of is not None:
            axis.hlines(place, of.low, of.high, color="#0072b2", linewidth=1.6)
            axis.plot(of.value, place, "s", color="black", markersize=5)
        axis.annotate(note, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    if np.isfinite(middle):
        axis.axvline(middle, color="0.5", linewidth=0.9, linestyle="--", zorder=1)
    bounds = [bound for of in values for bound in of if np.isfinite(bound)] + [middle] * bool(np.isfinite(middle))
    if bounds:
        room = 0.06 * (max(bounds) - min(bounds)) or 0.05
        axis.set_xlim(min(bounds) - room, max(bounds) + room)
    axis.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    for text, (_, of, note) in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("normal" if of is not None or note else "bold")
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    return _png(figure)


def confusion(y_B: np.ndarray, decision_B: np.ndarray, positive: str) -> bytes:
    """Recordings by label and decision, with the share of each label's recordings. `positive` names the label."""
    count_22 = np.array(
        [[int(((y_B == label) & (decision_B == decided)).sum()) for decided in (0, 1)] for label in (0, 1)]
    )
    share_22 = count_22 / np.maximum(count_22.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share_22, cmap="Greys", vmin=0, vmax=1.25)
    for (row, column), share in np.ndenumerate(share_22):
        text = f"{count_22[row, column]:,}\n{100 * share:.1f} %"
        axis.text(column, row, text, ha="center", va="center", fontsize=12, color="white" if share > 0.6 else "black")
    axis.set_xticks([0, 1], ["below the\nthreshold", "at or above\nthe threshold"])
    axis.set_yticks([0, 1], [f"not {positive}", positive])
    axis.set(xlabel="decision", ylabel="label")
    axis.tick_params(length=0)
    return _png(figure)


def latent_map(h_BF: np.ndarray, y_B: np.ndarray, positive: str) -> bytes:
    """The features' first two principal components, each feature standardised; a point is a recording."""
    z_BF = h_BF - h_BF.mean(axis=0)
    scale_F = z_BF.std(axis=0)
    z_BF = z_BF / np.where(scale_F > 0, scale_F, 1)
    left_BK, singular_K, _ = np.linalg.svd(z_BF, full_matrices=False)
    left_BK, explained_K = left_BK[:, :2] * singular_K[:2], singular_K**2 / max(float((singular_K**2).sum()), 1e-12)
    x_B, v_B = left_BK[:, 0], left_BK[:, 1] if left_BK.shape[1] > 1 else np.zeros(len(left_BK))
    figure, axis = _square((5.8, 5.2))
    kinds: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (0, f"not {positive}", {"facecolors": "none", "edgecolors": "#56b4e9", "marker": "o", "linewidths": 0.9}),
        (1, positive, {"color": "#000000", "marker": "x", "linewidths": 1.1}),
    )
    for label, name, style in kinds:
        of_B = y_B == label
        axis.scatter(x_B[of_B], v_B[of_B], s=20, label=f"{name} ({of_B.sum():,})", **style)
    shares = [f"{100 * share:.0f} %" for share in (*explained_K[:2], 0.0)]
    axis.set(
        xlabel=f"first component ({shares[0]} of the variance)",
        ylabel=f"second component ({shares[1]} of the variance)",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    return _with_legend(figure)


def label_efficiency(of: Mapping[str, Mapping[float, Spread]], metric: str = "AUROC") -> bytes:
    """The metric over the share of labels, in percent, that each method was trained with."""
    figure, axis = _square((6.4, 4.8))
    shares = sorted({share for values in of.values() for share in values})
    for number, (name, values) in enumerate(of.items()):
        # Side by side, so that the intervals do not hide each other.
        offset = 1.035 ** (number - (len(of) - 1) / 2)
        x = np.array([share * offset for share in sorted(values)])
        value, low, high = (np.array([values[share][part] for share in sorted(values)]) for part in range(3))
        style = _style(number, len(x)) | {"markevery": 1}
        axis.plot(x, value, label=name, **style)
        axis.vlines(x, low, high, color=style["color"], linewidth=0.9)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(shares))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(shares, [f"{share:g} %" for share in shares])
    axis.set(xlabel="labelled recordings used for training", ylabel=metric)
    return _with_legend(figure)


def dots(of: Mapping[str, Mapping[str, Spread]], label: str, chance: float = np.nan) -> bytes:
    """A row for each method, a point with its interval for each set of leads."""
    columns = list(dict.fromkeys(leads for values in of.values() for leads in values))
    figure = Figure(figsize=(7.2, 0.24 * len(of) * max(len(columns), 1.6) + 1.3), layout="constrained")
    axis = figure.subplots()
    for number, leads in enumerate(columns):
        style = _style(number, 1)
        offset = (number - (len(columns) - 1) / 2) * 0.7 / max(len(columns), 1)
        known = [(row + offset, of[name][leads]) for row, name in enumerate(of) if leads in of[name]]
        for place, spread in known:
            axis.hlines(place, spread.low, spread.high, color=style["color"], linewidth=1.3)
        axis.plot(
            [spread.value for _, spread in known], [place for place, _ in known],
            linestyle="", marker=style["marker"], color=style["color"], markersize=6, label=leads,
        )  # fmt: skip
    for row in range(0, len(of), 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0, linewidth=0)
    if np.isfinite(chance):
        axis.axvline(chance, color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    axis.set_yticks(range(len(of)), list(of))
    axis.set(xlabel=label, ylim=(len(of) - 0.5, -0.5))
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return _with_legend(figure)


# --- what they share ------------------------------------------------------------------------------------------


def _square(size: tuple[float, float] = (5.6, 5.2)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _style(number: int, points: int) -> dict[str, Any]:
    """Colour, line style and marker of a line, with about six markers along it, not at the places of the others'."""
    every = max(1, points // 6)
    return {
        "color": COLORS[number % MAX_LINES],
        "linestyle": _LINES[number % MAX_LINES],
        "marker": _MARKERS[number % MAX_LINES],
        "markersize": 4.5,
        "linewidth": 1.4,
        "markevery": (min(number * every // MAX_LINES, max(points - 1, 0)), every),
    }


def _with_legend(figure: Figure, axis: Axes | None = None) -> bytes:
    """The legend is above the plot: within it, it would cover lines."""
    handles, labels = (axis or figure.axes[0]).get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) > 16 else 3
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, handlelength=3.4
    )
    return _png(figure)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()
