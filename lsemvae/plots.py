"""Pictures people look at: reconstructions, out-of-fold curves. Each function writes one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve


def reconstructions(
    x_BLT: np.ndarray,
    reconstruction_BLT: np.ndarray,
    leads: Sequence[str],
    rate_hz: int,
    path: Path,
    seconds: float = 4.0,
) -> None:
    """Recordings (columns) by lead (rows): what went in, in grey, and what came out, in red."""
    shown = int(seconds * rate_hz)
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
    axes[0, 0].legend(loc="upper left", fontsize=7, frameon=False, ncols=2)
    figure.savefig(path, dpi=90)


def discrimination(y_B: np.ndarray, scores: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """ROC and precision-recall curves of out-of-fold scores, one line for each named scorer."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    roc, precision_recall = figure.subplots(1, 2)
    for name, score_B in scores.items():
        false_positive, true_positive, _ = roc_curve(y_B, score_B)
        precision, recall, _ = precision_recall_curve(y_B, score_B)
        roc.plot(false_positive, true_positive, label=name)
        precision_recall.plot(recall, precision, label=name)
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
