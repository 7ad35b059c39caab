"""Pictures people look at: recordings on ECG paper, reconstructions, curves, distributions."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from lsemvae.leads import CHEST_LEADS, LIMB_LEADS
from lsemvae.record import Record

MM_PER_S = 25
GAINS_MM_PER_MV = (10.0, 5.0, 2.5)
PAPER_S = 10.0
REACH_MM = 25.0
"""How far a trace may go from its baseline. A taller one gets the next smaller gain for the whole page, and one that
does not fit with the smallest is cut off instead, which the page says."""
_LEFT_MM, _RIGHT_MM = 15, 5
_HEAD_MM, _FOOT_MM = 10, 10


class _Strip(NamedTuple):
    """A stretch of one lead on the paper; `y_mv_T` is the height over its baseline, None where it is missing."""

    lead: str
    row: int
    start_s: float
    y_mv_T: np.ndarray | None


def ecg_paper(record: Record, title: str = "") -> str:
    """A recording as a cardiologist expects it -> SVG, one unit a millimetre: 25 mm/s, 10 mm/mV, grid of 1 and 5 mm.

    Three rows of four leads (of two where there are only limb leads), one after the other in time, and a rhythm
    strip. Each lead is drawn about its median, unfiltered. What was derived or is missing says so, NaN are gaps.
    A recording longer than 10 s gives its first 10 s, the leads of a shorter one all start at its beginning.
    """
    limb_only = set(record.leads) <= set(LIMB_LEADS)
    leads = LIMB_LEADS if limb_only else LIMB_LEADS + CHEST_LEADS
    strips = _strips(record, leads)
    reach_mv = {strip.lead: 0.0 for strip in strips}
    for strip in strips:
        if strip.y_mv_T is not None:
            reach_mv[strip.lead] = max(reach_mv[strip.lead], float(np.nanmax(np.abs(strip.y_mv_T), initial=0.0)))
    holdable_mv = REACH_MM / GAINS_MM_PER_MV[-1]
    cut_off = {lead: mv for lead, mv in reach_mv.items() if mv > holdable_mv}
    tallest_mv = max((mv for lead, mv in reach_mv.items() if lead not in cut_off), default=holdable_mv)
    gain = next(gain for gain in GAINS_MM_PER_MV if tallest_mv * gain <= REACH_MM)

    head_mm, foot_mm = _HEAD_MM if title else 2, _FOOT_MM + (5 if cut_off else 0)
    baselines_mm, height_mm = _rows(strips, gain, head_mm, foot_mm)
    width_mm = _LEFT_MM + round(PAPER_S * MM_PER_S) + _RIGHT_MM
    traces, words = [], [_text(_LEFT_MM, 6, title, "title")] if title else []
    for row_mm in baselines_mm:
        traces.append(f"M200 {row_mm * 100}h200v{-gain * 100:.0f}h500v{gain * 100:.0f}h200")  # 1 mV for 0.2 s
    for strip in strips:
        x_mm, y_mm = _LEFT_MM + strip.start_s * MM_PER_S, baselines_mm[strip.row]
        if strip.start_s:
            traces.append(f"M{x_mm * 100:.0f} {y_mm * 100 - 250}v500")
        if strip.y_mv_T is not None:
            traces.append(_trace(x_mm, y_mm, strip.y_mv_T, gain, record.rate_hz))
        name = f"{strip.lead} derived" if strip.lead in record.derived else strip.lead
        if strip.y_mv_T is None:
            name += " missing"
        elif not np.isfinite(strip.y_mv_T).any():
            name += " has no values"
        words.append(_text(x_mm + 1, y_mm - 7, name, "lead"))

    scale = f"{MM_PER_S} mm/s   {gain:g} mm/mV"
    seconds = record.signal_mv_LT.shape[1] / record.rate_hz
    notes = [f"{record.rate_hz:g} Hz", "unfiltered"]
    if seconds > PAPER_S + 0.1:
        notes.append(f"the first {PAPER_S:g} of {seconds:.1f} s")
    elif seconds < PAPER_S - 0.1:
        notes.append(f"{seconds:.1f} s, each lead from its beginning")
    if gain != GAINS_MM_PER_MV[0]:
        notes.append("smaller gain than usual")
    last_mm = height_mm - 3.5
    words.append(_text(_LEFT_MM, last_mm, scale, "scale"))
    words.append(_text(_LEFT_MM + 52, last_mm, " · ".join(notes), "note"))
    if cut_off:
        which = "all leads" if len(cut_off) == len(record.leads) else ", ".join(cut_off)
        notes.append(f"cut off at {REACH_MM / gain:g} mV: {which} (up to {max(cut_off.values()):.3g} mV)")
        words.append(_text(_LEFT_MM, last_mm - 5, notes[-1], "note"))

    vertical, horizontal = f"v{height_mm}", f"h{width_mm}"
    lines = {"minor": "", "major": ""}
    for x_mm in range(width_mm + 1):
        lines["minor" if x_mm % 5 else "major"] += f"M{x_mm} 0{vertical}"
    for y_mm in range(height_mm + 1):
        lines["minor" if y_mm % 5 else "major"] += f"M0 {y_mm}{horizontal}"
    for origin in ("derived", "missing"):
        of_origin = [lead for lead in leads if record.origin(lead) == origin]
        notes += [f"{origin}: {' '.join(of_origin)}"] if of_origin else []
    label = ", ".join(part for part in ("ECG on paper", title, scale.replace("   ", ", "), *notes) if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'width="{width_mm}mm" height="{height_mm}mm" viewBox="0 0 {width_mm} {height_mm}" '
        'font-family="Helvetica, Arial, sans-serif" fill="none">'
        f'<rect width="{width_mm}" height="{height_mm}" fill="#fffaf8"/>'
        f'<path d="{lines["minor"]}" stroke="#f5c6c6" stroke-width="0.1"/>'
        f'<path d="{lines["major"]}" stroke="#e28f8f" stroke-width="0.2"/>'
        '<g transform="scale(0.01)" stroke="#111" stroke-width="25" stroke-linejoin="round" stroke-linecap="round">'
        f'<path d="{"".join(traces)}"/></g>{"".join(words)}</svg>'
    )


def _strips(record: Record, leads: Sequence[str]) -> list[_Strip]:
    signal_mv_LT = record.signal_for(leads)[:, : round(PAPER_S * record.rate_hz)]
    about_median = {}
    for lead, signal_mv_T in zip(leads, signal_mv_LT, strict=True):
        finite_T = np.isfinite(signal_mv_T)
        middle_mv = np.median(signal_mv_T[finite_T]) if finite_T.any() else 0.0
        about_median[lead] = np.where(finite_T, signal_mv_T - middle_mv, np.nan) if lead in record.leads else None
    seconds = PAPER_S / (len(leads) // 3)
    short = record.signal_mv_LT.shape[1] / record.rate_hz < PAPER_S - 0.1
    strips = []
    for number, lead in enumerate(leads):
        column, row = divmod(number, 3)
        start = 0 if short else round(column * seconds * record.rate_hz)
        end = start + round(seconds * record.rate_hz) + 1  # to where the next one begins
        y_mv_T = about_median[lead]
        strips.append(_Strip(lead, row, column * seconds, None if y_mv_T is None else y_mv_T[start:end]))
    drawable = [lead for lead in ("II", "I", *leads) if about_median[lead] is not None]
    full = [lead for lead in drawable if np.isfinite(about_median[lead]).any()]
    rhythm = (full or drawable)[0]
    return [*strips, _Strip(rhythm, 3, 0.0, about_median[rhythm])]


def _rows(strips: Sequence[_Strip], gain: float, head_mm: int, foot_mm: int) -> tuple[list[int], int]:
    """Baselines from the top, on lines of the 5 mm grid and so far apart that no traces meet, and the height."""
    up_mm, down_mm = [10.0] * 4, [5.0] * 4  # room for the calibration pulse and the names
    for strip in strips:
        if strip.y_mv_T is not None:
            high_mm, low_mm = (np.clip(part * gain, 0, REACH_MM) for part in (strip.y_mv_T, -strip.y_mv_T))
            up_mm[strip.row] = max(up_mm[strip.row], float(np.nanmax(high_mm, initial=0.0)))
            down_mm[strip.row] = max(down_mm[strip.row], float(np.nanmax(low_mm, initial=0.0)))
    baselines_mm, bottom_mm = [], float(head_mm)
    for up, down in zip(up_mm, down_mm, strict=True):
        baselines_mm.append(5 * int(np.ceil((bottom_mm + up) / 5)))
        bottom_mm = baselines_mm[-1] + down + 1
    return baselines_mm, 5 * int(np.ceil((bottom_mm + foot_mm) / 5))


def _trace(x_mm: float, y_mm: float, y_mv_T: np.ndarray, gain: float, rate_hz: float) -> str:
    """Path commands in hundredths of a millimetre, one stroke for each run without NaN."""
    finite_T = np.isfinite(y_mv_T)
    x_T = np.rint((x_mm + np.arange(len(y_mv_T)) / rate_hz * MM_PER_S) * 100).astype(int)
    y_T = np.rint((y_mm - np.clip(np.nan_to_num(y_mv_T) * gain, -REACH_MM, REACH_MM)) * 100).astype(int)
    edges = np.flatnonzero(np.diff(finite_T, prepend=False, append=False))
    strokes = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        steps = np.stack([np.diff(x_T[start:end]), np.diff(y_T[start:end])], axis=1).ravel()
        text = " ".join(map(str, steps.tolist())) or "0 0"  # a single sample is a dot
        strokes.append(f"M{x_T[start]} {y_T[start]}l{text}")
    return "".join(strokes).replace(" -", "-")


def _text(x_mm: float, y_mm: float, text: str, kind: str) -> str:
    size, weight = {"title": (4, "bold"), "lead": (3.4, "bold"), "scale": (3.4, "bold"), "note": (3.4, "normal")}[kind]
    return (
        f'<text x="{x_mm:g}" y="{y_mm:g}" font-size="{size}" font-weight="{weight}" fill="#111" stroke="#fffaf8" '
        f'stroke-width="0.8" paint-order="stroke" xml:space="preserve">{escape(text)}</text>'
    )


def histogram(values: np.ndarray, edges: np.ndarray, label: str, color: str = "#2f5d8a") -> str:
    """Counts of values -> SVG; those beyond the outer edges are in the outer bars, NaN are left out."""
    counts, _ = np.histogram(np.clip(values[np.isfinite(values)], edges[0], edges[-1]), edges)
    # The same values are to give the same bytes, words are to stay words, and no address is to be in it.
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.4, 2.8), layout="constrained")
        axis = figure.subplots()
        axis.stairs(counts, edges, fill=True, color=color)
        axis.set(xlabel=label, ylabel="count", xlim=(edges[0], edges[-1]))
        axis.yaxis.get_major_locator().set_params(integer=True)
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
    """Recordings (columns) by lead (rows): what went in, in grey, and what came out, in red."""
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
    # Above the plots: within one it would lie on the recording.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", fontsize=7, frameon=False, ncols=2)
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


def grid_search(
    settings: Mapping[str, Sequence[object]],
    value: Sequence[float],
    collapsed: Sequence[bool],
    label: str,
    path: Path,
    best: int | None = None,
) -> None:
    """One panel a searched setting: each trial's value over the setting's, joined where all else is equal.

    `settings` holds one value for each trial; `best` is the place of the trial that has a ring.
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
    """Share of positives over the mean probability, one line for each named (probability, positive, weight) [bin].

    The area of a point is its bin's weight.
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
