"""A recording on ECG paper with its attribution as a band below each trace; the median beat is in `median_beat.py`.

A band is readable without colour: what raises the score is above its line, and dark; what lowers it is below, and
light. The arrays here are [L, T] in the leads' order; T may be any length.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from PIL import Image

from lsemvae.plots.ecg_paper import GAINS_MM_PER_MV, INK, MAJOR, MINOR, MM_PER_S, PAPER, REACH_MM, rows

RAISES, LOWERS = "#a63a00", "#66b5ea"
"""Vermilion and sky blue: colour-blind readers can tell them apart, and in grey one is dark and the other is light."""
SMOOTH_S = 0.04
"""Attributions jump between neighbouring samples. Each value drawn is the mean over so long a time: 1 mm of paper."""
SHADE = {"P": 0.05, "QRS": 0.10, "T": 0.05}
_LEFT_MM, _RIGHT_MM = 20, 5
_LEAST_WIDTH_MM = 200.0  # so that the foot has room for its words
_BAND_MM = 8.0  # from the band's line to its largest value
_LEAST = 0.01  # smaller parts of the largest value are not drawn: nobody would see them
_NOMINAL_MV = 0.15  # the height at which one standard deviation is drawn where millivolts are not known


DPI = 127
"""5 pixels a millimetre: the lines of the paper are then equally sharp, and take few bytes."""


class Picture(NamedTuple):
    """A figure, and in words what it shows: its text alternative."""

    figure: Figure
    words: str

    def png(self, dpi: int = DPI) -> bytes:
        """With 256 colours, which takes a quarter of the bytes. Each is within 3 % of what was drawn."""
        drawn, content = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context({"font.family": "sans-serif"}):
            self.figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
        # The palette that covers all colours: other methods drop the bands' colours, which are rare on large paper.
        of_256 = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        of_256.save(content, "png", optimize=True)
        return content.getvalue()

    def svg(self) -> str:
        """Without a date or a program's name, so the same figure gives the same text. Two decimals of a point do."""
        content = io.StringIO()
        without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({"svg.hashsalt": "0", "svg.fonttype": "none", "font.family": "sans-serif"}):
            self.figure.savefig(content, format="svg", metadata=without)
        text = content.getvalue()
        text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text[text.index("<svg") :])
        return text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.words)}" ', 1)


class Span(NamedTuple):
    """Where a wave is, in seconds: P, QRS or T."""

    wave: str
    onset_s: float
    offset_s: float


def smooth(values_LT: np.ndarray, rate_hz: float, seconds: float = SMOOTH_S) -> np.ndarray:
    """The mean over `seconds` about each sample; signs may cancel.

    An even number of samples has no middle one, so the outermost two count half: 4 samples are (1/2 1 1 1 1/2) / 4.
    """
    count = max(1, round(seconds * rate_hz))
    weights = np.ones(count) if count % 2 else np.r_[0.5, np.ones(count - 1), 0.5]
    half = len(weights) // 2
    padded_LT = np.pad(np.asarray(values_LT, dtype=float), ((0, 0), (half, half)))
    return np.stack([np.convolve(values_T, weights / count, mode="valid") for values_T in padded_LT])


def heights(values_LT: np.ndarray, rate_hz: float, seconds: float = SMOOTH_S) -> tuple[np.ndarray, bool]:
    """Smoothed attributions in units of the largest of all leads, and whether any is not 0."""
    smoothed_LT = smooth(np.nan_to_num(values_LT), rate_hz, seconds)
    strongest = float(np.abs(smoothed_LT).max(initial=0.0))
    smoothed_LT /= strongest or 1.0
    return np.where(np.abs(smoothed_LT) < _LEAST, 0.0, smoothed_LT), strongest > 0


# --- ECG paper ------------------------------------------------------------------------------------------------


def attribution_paper(
    leads: Sequence[str],
    rate_hz: float,
    x_LT: np.ndarray,
    values_LT: np.ndarray,
    *,
    unit_mv: float | None,
    there_L: np.ndarray | None = None,
    spans: Sequence[Span] = (),
    title: str = "",
) -> Picture:
    """ECG paper, 25 mm/s and 10 mm/mV, a row for each lead over the whole time: its trace, and below it its band.

    The band's height is the smoothed attribution; the recording's largest, of any lead, fills it.

    unit_mv  what 1 of `x_LT` is in mV; None where that is not known: traces are then in standard deviations
    there_L  False for a lead that the recording lacks
    """
    unit = _NOMINAL_MV if unit_mv is None else unit_mv
    there_L = np.ones(len(leads), dtype=bool) if there_L is None else np.asarray(there_L, dtype=bool)
    y_LT = np.where(there_L[:, None], np.nan_to_num(np.asarray(x_LT, dtype=float)) * unit, 0.0)
    band_mm_LT, explained = heights(values_LT, rate_hz)
    band_mm_LT = band_mm_LT * _BAND_MM
    tallest = float(np.abs(y_LT).max(initial=0.0))
    gain = next((gain for gain in GAINS_MM_PER_MV if tallest * gain <= REACH_MM), GAINS_MM_PER_MV[-1])
    y_mm_LT = np.clip(y_LT * gain, -REACH_MM, REACH_MM)

    head_mm = (8.0 if title else 1.0) + (7.0 if spans else 0.0)
    up_mm = np.maximum(y_mm_LT.max(axis=1, initial=0.0), 6.0) + 3
    up_mm[:1] = np.maximum(up_mm[:1], gain + 1)  # the first pulse must stay on the paper
    down_mm = np.maximum(-y_mm_LT.min(axis=1, initial=0.0), 2.0) + 1
    line_mm = down_mm + np.maximum(band_mm_LT.max(axis=1, initial=0.0), 1.0)  # the band's line, below the baseline
    end_mm = line_mm + np.maximum(-band_mm_LT.min(axis=1, initial=0.0), 1.0)
    baselines_mm, bottom_mm = rows(list(up_mm), list(end_mm), head_mm)
    foot = _foot(gain, unit_mv, tallest, explained, bool(spans))
    seconds = x_LT.shape[1] / rate_hz
    width_mm = max(_LEFT_MM + seconds * MM_PER_S + _RIGHT_MM, _LEAST_WIDTH_MM)
    height_mm = 5 * int(np.ceil((bottom_mm + 4.5 * len(foot) + 2) / 5))

    figure, axis = _paper(width_mm, height_mm)
    _waves(axis, spans, head_mm, bottom_mm)
    x_mm_T = _LEFT_MM + np.arange(x_LT.shape[1]) / rate_hz * MM_PER_S
    for row, (lead, baseline_mm) in enumerate(zip(leads, baselines_mm, strict=True)):
        _write(axis, 2, baseline_mm - 4, lead, 3.6, weight="bold")
        if not there_L[row]:
            _write(axis, _LEFT_MM + 1, baseline_mm - 4, f"{lead} is missing", 3.6)
            continue
        _pulse(axis, baseline_mm, gain)
        axis.plot(x_mm_T, baseline_mm - y_mm_LT[row], color=INK, linewidth=_points(0.25), zorder=5)
        draw_band(axis, x_mm_T, band_mm_LT[row], baseline_mm + line_mm[row], rate_hz, up=-1)
    if title:
        _write(axis, _LEFT_MM, 6, title, 4, weight="bold")
    for number, text in enumerate(foot):
        _write(axis, _LEFT_MM, bottom_mm + 4 + 4.5 * number, text, 3.2)
    if explained:
        _key(axis, width_mm, bottom_mm + 4)
    return Picture(figure, _paper_words(leads, values_LT, there_L, foot[0], seconds))


def _foot(gain: float, unit_mv: float | None, tallest: float, explained: bool, waves: bool) -> list[str]:
    """The lines below the rows."""
    per_unit = gain * _NOMINAL_MV
    scale = f"{gain:g} mm/mV" if unit_mv is not None else f"{per_unit:g} mm per standard deviation (SD)"
    first = f"{MM_PER_S} mm/s   {scale}   filtered as the model sees it"
    if tallest * gain > REACH_MM:
        first += f"   cut off at {REACH_MM / gain:g} mV" if unit_mv is not None else "   tall traces are cut off"
    pulse = "1 mV" if unit_mv is not None else f"{1 / _NOMINAL_MV:.1f} SD"
    first += f"   pulse: {pulse}, 0.2 s"
    band = (
        f"Band: attribution, mean over {1000 * SMOOTH_S:g} ms; full height is the largest of all leads here."
        if explained
        else "The attribution is 0 everywhere."
    )
    return [first, band + ("   Shaded: P, QRS, T." if waves else "")]


def _paper_words(leads: Sequence[str], values_LT: np.ndarray, there_L: np.ndarray, scale: str, seconds: float) -> str:
    """The text alternative: what is drawn, and which leads have most of the attribution."""
    missing = [lead for lead, there in zip(leads, there_L, strict=True) if not there]
    words = f"ECG paper, {', '.join(leads)}, {seconds:.1f} s, {scale.replace('   ', ', ')}, with attribution bands."
    return words + most(leads, values_LT) + (f" Missing: {', '.join(missing)}." if missing else "")


def most(leads: Sequence[str], values_LT: np.ndarray, count: int = 3) -> str:
    """The leads with the largest shares of the absolute attribution, and which way they push the score."""
    absolute_L, signed_L = np.abs(values_LT).sum(axis=1), values_LT.sum(axis=1)
    total = float(absolute_L.sum())
    if not total:
        return " The attribution is 0 everywhere."
    most = [
        f"{leads[row]} ({100 * absolute_L[row] / total:.0f} %, {'raises' if signed_L[row] > 0 else 'lowers'} the score)"
        for row in np.argsort(-absolute_L)[:count]
        if absolute_L[row] > 0
    ]
    return f" Most of it is in {', '.join(most)}."


def _points(mm: float) -> float:
    """Millimetres as the points that matplotlib measures lines and letters in."""
    return mm * 72 / 25.4


def _paper(width_mm: float, height_mm: float) -> tuple[Figure, Axes]:
    """Empty paper of exactly this size; one unit is a millimetre, and y goes down."""
    figure = Figure(figsize=(width_mm / 25.4, height_mm / 25.4), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width_mm), ylim=(height_mm, 0))
    axis.set_axis_off()
    for color, line_mm, fifth in ((MINOR, 0.1, False), (MAJOR, 0.2, True)):
        upright = [((at, 0), (at, height_mm)) for at in range(int(width_mm) + 1) if (at % 5 == 0) == fifth]
        level = [((0, at), (width_mm, at)) for at in range(int(height_mm) + 1) if (at % 5 == 0) == fifth]
        ends = [end for line in upright + level for end in line]
        grid = Path(ends, [Path.MOVETO, Path.LINETO] * (len(ends) // 2))
        axis.add_patch(PathPatch(grid, facecolor="none", edgecolor=color, linewidth=_points(line_mm), zorder=0))
    return figure, axis


def _write(axis: Axes, x_mm: float, y_mm: float, text: str, size_mm: float, **more: Any) -> None:
    axis.text(x_mm, y_mm, text, fontsize=_points(size_mm * 0.8), color=INK, zorder=6, **more)


def _pulse(axis: Axes, baseline_mm: float, gain: float) -> None:
    """1 mV for 0.2 s, left of the trace."""
    x_mm = np.array([11.5, 12.5, 12.5, 17.5, 17.5, 18.5])
    y_mm = baseline_mm - gain * np.array([0, 0, 1, 1, 0, 0])
    axis.plot(x_mm, y_mm, color=INK, linewidth=_points(0.25), zorder=5)


def draw_band(
    axis: Axes,
    x_T: np.ndarray,
    height_T: np.ndarray,
    line: float,
    rate_hz: float,
    up: int,
    smoothed_s: float = SMOOTH_S,
) -> None:
    """Heights about a line of the axis; `up` is 1 where the axis goes up, -1 where it goes down."""
    axis.plot(x_T[[0, -1]], [line, line], color="#555", linewidth=0.5, zorder=3)
    every = max(1, int(rate_hz * smoothed_s / 4))  # what is smoothed needs no more points
    x_T, height_T = x_T[::every], height_T[::every]
    for kind, color, part_T in (
        ("raises", RAISES, np.maximum(height_T, 0)),
        ("lowers", LOWERS, np.minimum(height_T, 0)),
    ):
        if part_T.any():
            style: dict[str, Any] = {
                "facecolor": color,
                "edgecolor": "#222",
                "linewidth": 0.3,
                "zorder": 4,
                "gid": kind,
            }
            axis.fill_between(x_T, line, line + up * part_T, where=part_T != 0, **style)


def _waves(axis: Axes, spans: Sequence[Span], top_mm: float, bottom_mm: float) -> None:
    """Light shades through all rows; letters above them, those of QRS higher, so that they do not meet."""
    free_mm = 0.0
    for span in sorted(spans, key=lambda span: span.onset_s):
        start_mm, end_mm = (_LEFT_MM + at * MM_PER_S for at in (span.onset_s, span.offset_s))
        shade = Rectangle((start_mm, top_mm), end_mm - start_mm, bottom_mm - top_mm)
        shade.set(facecolor="black", alpha=SHADE.get(span.wave, 0.05), linewidth=0, zorder=1)
        axis.add_patch(shade)
        middle_mm = (start_mm + end_mm) / 2
        if span.wave == "QRS":
            _write(axis, middle_mm, top_mm - 3.8, span.wave, 2.8, ha="center")
        elif middle_mm > free_mm:
            _write(axis, middle_mm, top_mm - 1, span.wave, 2.8, ha="center")
            free_mm = middle_mm + 2


def _key(axis: Axes, width_mm: float, y_mm: float) -> None:
    """Which way is which, at the right of the foot."""
    for number, (color, up, text) in enumerate(((RAISES, 1, "raises the score"), (LOWERS, -1, "lowers the score"))):
        line_mm = y_mm + 4.5 * number - (0 if up > 0 else 2.4)
        x_mm = width_mm - _RIGHT_MM - 32
        axis.add_patch(Rectangle((x_mm, line_mm), 4, -2.4 * up, facecolor=color, edgecolor="#222", linewidth=0.3))
        axis.plot([x_mm - 1, x_mm + 5], [line_mm] * 2, color="#555", linewidth=0.5)
        _write(axis, x_mm + 6.5, y_mm + 4.5 * number, text, 3.2)
