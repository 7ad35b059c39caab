"""The median beat of each lead with the mean attribution of the beats as a band below it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

from lsemvae.plots.attribution import LOWERS, RAISES, SHADE, Picture, Span, draw_band, heights, most
from lsemvae.plots.ecg_paper import INK, MAJOR, MINOR, PAPER

BEAT_SMOOTH_S = 0.02
"""The mean of many beats is smoother than one, so it may be drawn finer."""


def median_beat(
    leads: Sequence[str],
    rate_hz: float,
    x_LT: np.ndarray,
    values_LT: np.ndarray,
    peaks_N: np.ndarray,
    *,
    unit_mv: float | None,
    there_L: np.ndarray | None = None,
    spans: Sequence[Span] = (),
) -> Picture | None:
    """The median beat of each lead about its R peaks (samples), and the beats' mean attribution as its band.

    `spans` are in seconds after R. The largest band of all leads fills its height. None where no beat is whole.
    """
    before, after = _room(peaks_N, rate_hz)
    whole = [int(peak) for peak in np.rint(peaks_N) if before <= peak < x_LT.shape[1] - after]
    if not whole:
        return None
    beats_NLT = np.stack([x_LT[:, peak - before : peak + after] for peak in whole]) * (unit_mv or 1.0)
    mean_LT = np.stack([values_LT[:, peak - before : peak + after] for peak in whole]).mean(axis=0)
    band_LT, explained = heights(mean_LT, rate_hz, BEAT_SMOOTH_S)
    time_ms_T = 1000 * np.arange(-before, after) / rate_hz
    figure, panels = _panels(len(leads))
    ends = (float(band_LT.min(initial=0.0)) - 0.1, float(band_LT.max(initial=0.0)) + 0.1)
    for row, (lead, (trace, band)) in enumerate(zip(leads, panels, strict=True)):
        there = there_L is None or bool(there_L[row])
        _beat(trace, time_ms_T, beats_NLT[:, row], lead if there else f"{lead} is missing", spans, unit_mv is not None)
        draw_band(band, time_ms_T, band_LT[row], 0.0, rate_hz, up=1, smoothed_s=BEAT_SMOOTH_S)
        band.set(ylim=ends, xlim=time_ms_T[[0, -1]], yticks=[])
        _edges(band, spans)
    unit = "mV" if unit_mv is not None else "standard deviations"
    figure.supylabel(f"{unit}; below: attribution", x=0.08 / figure.get_figwidth(), fontsize=9, ha="left")
    figure.supxlabel("ms after R", y=0.04 / figure.get_figheight(), fontsize=9, va="bottom")
    if explained:
        patches = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#222") for color in (RAISES, LOWERS)]
        names = ["raises the score (above the line)", "lowers the score (below the line)"]
        beside = 2 if len(leads) > 3 else 1
        figure.legend(patches, names, loc="upper left", ncols=beside, frameon=False, fontsize=8.5)
    found = "; ".join(f"{one.wave} {1000 * one.onset_s:.0f} to {1000 * one.offset_s:.0f} ms" for one in spans)
    words = f"Median of {len(whole)} beats about R, {', '.join(leads)}; band: mean attribution of the beats."
    return Picture(figure, words + (f" {found}." if found else "") + most(leads, mean_LT))


def _panels(count: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """At most three panels below each other, columns first as on ECG paper: each for a trace and for its band."""
    down = min(3, count)
    across = -(-count // down)
    top = 0.4 if across > 1 else 0.6  # the key has two lines where there is one column
    width, height = 0.55 + (2.8 * across if across > 1 else 3.8), 2.5 * down + 0.45 + top
    figure = Figure(figsize=(width, height))
    outer = figure.add_gridspec(
        down, across, left=0.75 / width, right=1 - 0.12 / width, bottom=0.5 / height, top=1 - top / height,
        wspace=0.2, hspace=0.1,
    )  # fmt: skip
    panels = []
    for number in range(count):
        column, line = divmod(number, down)
        inner = outer[line, column].subgridspec(2, 1, height_ratios=(2, 1), hspace=0.04)
        trace, band = (figure.add_subplot(inner[part]) for part in range(2))
        band.tick_params(labelsize=7.5, labelbottom=line == down - 1 or number == count - 1, length=2)
        for axis in (trace, band):
            axis.spines[["top", "right", "left", "bottom"]].set(linewidth=0.4, color="0.6")
        panels.append((trace, band))
    return figure, panels


def _room(peaks_N: np.ndarray, rate_hz: float) -> tuple[int, int]:
    """Samples before and after R: at most 400 and 600 ms, and little of the neighbouring beats."""
    interval_s = float(np.median(np.diff(peaks_N))) / rate_hz if len(peaks_N) > 1 else 1.0
    return round(min(0.4, 0.42 * interval_s) * rate_hz), round(min(0.6, 0.68 * interval_s) * rate_hz)


def _beat(
    axis: Axes, time_ms_T: np.ndarray, beats_NT: np.ndarray, name: str, spans: Sequence[Span], millivolts: bool
) -> None:
    """The beats in grey, their median in black, on a grid of 40 ms and 0.1 mV where millivolts are known."""
    single = [np.column_stack([time_ms_T, beat_T]) for beat_T in beats_NT[:20]]
    axis.add_collection(LineCollection(single, color="0.65", linewidth=0.5, zorder=3), autolim=False)
    axis.plot(time_ms_T, np.median(beats_NT, axis=0), color=INK, linewidth=1.3, zorder=4)
    low, high = float(beats_NT.min()), float(beats_NT.max())
    short = max(0.5 - (high - low), 0) / 2  # noise must not fill the panel
    room = 0.05 * max(high - low, 0.5)
    axis.set(xlim=time_ms_T[[0, -1]], ylim=(low - short - room, high + short + 5 * room))  # above: names of the waves
    axis.set_facecolor(PAPER)
    axis.tick_params(labelsize=7.5, labelbottom=False, length=2)
    axis.locator_params(axis="y", nbins=4)
    axis.xaxis.set_minor_locator(MultipleLocator(40))
    axis.xaxis.set_major_locator(MultipleLocator(200))
    axis.grid(axis="x", which="minor", color=MINOR, linewidth=0.4)
    axis.grid(axis="x", which="major", color=MAJOR, linewidth=0.6)
    if millivolts and high - low < 4:
        axis.yaxis.set_minor_locator(MultipleLocator(0.1))
        axis.grid(axis="y", which="minor", color=MINOR, linewidth=0.4)
    axis.grid(axis="y", which="major", color=MAJOR, linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    axis.set_axisbelow(True)
    axis.text(0.02, 0.95, name, transform=axis.transAxes, fontsize=10, weight="bold", va="top", zorder=6)
    _edges(axis, spans)
    for span in spans:
        middle_ms = 500 * (span.onset_s + span.offset_s)
        if time_ms_T[0] < middle_ms < time_ms_T[-1]:
            axis.text(
                middle_ms, 0.97, span.wave, transform=axis.get_xaxis_transform(), fontsize=7.5, ha="center", va="top"
            )


def _edges(axis: Axes, spans: Sequence[Span]) -> None:
    """Onset and offset of each wave: dashed lines about a light shade."""
    for span in spans:
        start_ms, end_ms = 1000 * span.onset_s, 1000 * span.offset_s
        axis.axvspan(start_ms, end_ms, color="black", alpha=SHADE.get(span.wave, 0.05), linewidth=0)
    ends_ms = [1000 * end_s for span in spans for end_s in (span.onset_s, span.offset_s)]
    style: dict[str, Any] = {"color": "0.35", "linewidth": 0.6, "linestyle": (0, (3, 2)), "zorder": 2}
    axis.vlines(ends_ms, 0, 1, transform=axis.get_xaxis_transform(), **style)
