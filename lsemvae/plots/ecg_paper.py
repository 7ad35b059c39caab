"""A recording on ECG paper, as SVG."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

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
