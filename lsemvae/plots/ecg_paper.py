"""Draw a recording on ECG paper, as SVG."""

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
"""How far a trace may go from its baseline. If a trace is taller, the whole page gets the next smaller gain. A lead
that does not fit at the smallest gain does not change the gain: it is cut off, and the page says so."""

PAPER, MINOR, MAJOR, INK = "#fffaf8", "#f5c6c6", "#e28f8f", "#111"
"""Colours of the paper, of its lines every 1 mm and every 5 mm, and of traces and words."""

_LEFT_MM, _RIGHT_MM = 15, 5
_HEAD_MM, _FOOT_MM = 10, 10
_SHORTER_S = 0.1
"""A recording is called short or long if its duration differs from the paper's by more than this."""
_RHYTHM_ROW = 3


class _Strip(NamedTuple):
    """A stretch of one lead on the paper; `y_mv_T` is the height over its baseline, None if the lead is missing."""

    lead: str
    row: int
    start_s: float
    y_mv_T: np.ndarray | None


class _Page(NamedTuple):
    """Where everything lies: the strips, one baseline a row, and the size of the paper."""

    strips: list[_Strip]
    gain_mm_per_mv: float
    cut_off_mv: dict[str, float]
    """Leads that do not fit, with the largest distance from their baseline."""
    baselines_mm: list[int]
    width_mm: int
    height_mm: int


def ecg_paper(record: Record, title: str = "") -> str:
    """Draw a recording as a cardiologist expects it -> SVG, one unit a millimetre: 25 mm/s, 10 mm/mV, 1 and 5 mm grid.

    There are three rows of four leads (of two leads if there are only limb leads), one after the other in time, and a
    rhythm strip. Each lead is drawn about its median, unfiltered. Derived and missing leads are marked as such; NaN are
    gaps. Of a recording longer than 10 s the first 10 s are drawn. In a shorter recording every lead starts at the
    beginning.
    """
    leads = LIMB_LEADS if set(record.leads) <= set(LIMB_LEADS) else LIMB_LEADS + CHEST_LEADS
    page = _lay_out(_strips(record, leads), bool(title))
    notes = _notes(record, page)
    cut_off = _cut_off_note(record, page)
    scale = f"{MM_PER_S} mm/s   {page.gain_mm_per_mv:g} mm/mV"
    spoken = [title, scale.replace("   ", ", "), *notes, cut_off, *_origin_notes(record, leads)]
    label = ", ".join(part for part in ("ECG on paper", *spoken) if part)

    last_mm = page.height_mm - 3.5
    words = [_text(_LEFT_MM, 6, title, "title")] if title else []
    words += [_name(record, page, strip) for strip in page.strips]
    words.append(_text(_LEFT_MM, last_mm, scale, "scale"))
    words.append(_text(_LEFT_MM + 52, last_mm, " · ".join(notes), "note"))
    if cut_off:
        words.append(_text(_LEFT_MM, last_mm - 5, cut_off, "note"))
    return _svg(page, label, _traces(page, record.rate_hz), words)


def _strips(record: Record, leads: Sequence[str]) -> list[_Strip]:
    """The stretch of each lead in its row and column, and the rhythm strip: II if it was recorded, else I, else any."""
    signal_mv_LT = record.signal_for(leads)[:, : round(PAPER_S * record.rate_hz)]
    about_median: dict[str, np.ndarray] = {}  # without the leads that are missing
    for lead, signal_mv_T in zip(leads, signal_mv_LT, strict=True):
        if lead in record.leads:
            finite_T = np.isfinite(signal_mv_T)
            middle_mv = np.median(signal_mv_T[finite_T]) if finite_T.any() else 0.0
            about_median[lead] = np.where(finite_T, signal_mv_T - middle_mv, np.nan)
    seconds = PAPER_S / (len(leads) // 3)
    short = _seconds(record) < PAPER_S - _SHORTER_S
    strips = []
    for number, lead in enumerate(leads):
        column, row = divmod(number, 3)
        start = 0 if short else round(column * seconds * record.rate_hz)
        end = start + round(seconds * record.rate_hz) + 1  # to where the next one begins
        y_mv_T = about_median.get(lead)
        strips.append(_Strip(lead, row, column * seconds, None if y_mv_T is None else y_mv_T[start:end]))
    drawable = [lead for lead in ("II", "I", *leads) if lead in about_median]
    full = [lead for lead in drawable if np.isfinite(about_median[lead]).any()]
    rhythm = (full or drawable)[0]
    return [*strips, _Strip(rhythm, _RHYTHM_ROW, 0.0, about_median[rhythm])]


def _lay_out(strips: list[_Strip], titled: bool) -> _Page:
    """The largest gain at which every trace fits, and the baselines that this gain allows."""
    reach_mv = {strip.lead: 0.0 for strip in strips}
    for strip in strips:
        if strip.y_mv_T is not None:
            reach_mv[strip.lead] = max(reach_mv[strip.lead], float(np.nanmax(np.abs(strip.y_mv_T), initial=0.0)))
    holdable_mv = REACH_MM / GAINS_MM_PER_MV[-1]
    cut_off_mv = {lead: mv for lead, mv in reach_mv.items() if mv > holdable_mv}
    tallest_mv = max((mv for lead, mv in reach_mv.items() if lead not in cut_off_mv), default=holdable_mv)
    gain = next(gain for gain in GAINS_MM_PER_MV if tallest_mv * gain <= REACH_MM)
    foot_mm = _FOOT_MM + (5 if cut_off_mv else 0)
    baselines_mm, height_mm = _rows(strips, gain, _HEAD_MM if titled else 2, foot_mm)
    width_mm = _LEFT_MM + round(PAPER_S * MM_PER_S) + _RIGHT_MM
    return _Page(strips, gain, cut_off_mv, baselines_mm, width_mm, height_mm)


def _rows(strips: Sequence[_Strip], gain: float, head_mm: int, foot_mm: int) -> tuple[list[int], int]:
    """Baselines from the top and the height. Baselines lie on the 5 mm grid, so far apart that no traces meet."""
    up_mm, down_mm = [10.0] * 4, [5.0] * 4  # room for the calibration pulse and the names
    for strip in strips:
        if strip.y_mv_T is not None:
            high_mm, low_mm = (np.clip(part * gain, 0, REACH_MM) for part in (strip.y_mv_T, -strip.y_mv_T))
            up_mm[strip.row] = max(up_mm[strip.row], float(np.nanmax(high_mm, initial=0.0)))
            down_mm[strip.row] = max(down_mm[strip.row], float(np.nanmax(low_mm, initial=0.0)))
    baselines_mm, bottom_mm = rows(up_mm, down_mm, head_mm)
    return baselines_mm, 5 * int(np.ceil((bottom_mm + foot_mm) / 5))


def rows(up_mm: Sequence[float], down_mm: Sequence[float], head_mm: float) -> tuple[list[int], float]:
    """Baselines on the 5 mm grid of rows that reach so far up and down, and where the last row ends."""
    baselines_mm: list[int] = []
    bottom_mm = float(head_mm)
    for up, down in zip(up_mm, down_mm, strict=True):
        baselines_mm.append(5 * int(np.ceil((bottom_mm + up) / 5)))
        bottom_mm = baselines_mm[-1] + down + 1
    return baselines_mm, bottom_mm


def _notes(record: Record, page: _Page) -> list[str]:
    """What the line at the foot says."""
    notes = [f"{record.rate_hz:g} Hz", "unfiltered"]
    seconds = _seconds(record)
    if seconds > PAPER_S + _SHORTER_S:
        notes.append(f"the first {PAPER_S:g} of {seconds:.1f} s")
    elif seconds < PAPER_S - _SHORTER_S:
        notes.append(f"{seconds:.1f} s, each lead from its beginning")
    if page.gain_mm_per_mv != GAINS_MM_PER_MV[0]:
        notes.append("smaller gain than usual")
    return notes


def _cut_off_note(record: Record, page: _Page) -> str:
    if not page.cut_off_mv:
        return ""
    which = "all leads" if len(page.cut_off_mv) == len(record.leads) else ", ".join(page.cut_off_mv)
    tallest_mv = max(page.cut_off_mv.values())
    return f"cut off at {REACH_MM / page.gain_mm_per_mv:g} mV: {which} (up to {tallest_mv:.3g} mV)"


def _origin_notes(record: Record, leads: Sequence[str]) -> list[str]:
    named = {
        origin: " ".join(lead for lead in leads if record.origin(lead) == origin) for origin in ("derived", "missing")
    }
    return [f"{origin}: {names}" for origin, names in named.items() if names]


def _seconds(record: Record) -> float:
    return record.signal_mv_LT.shape[1] / record.rate_hz


def _position(page: _Page, strip: _Strip) -> tuple[float, int]:
    """Where the strip begins, and its baseline, in mm."""
    return _LEFT_MM + strip.start_s * MM_PER_S, page.baselines_mm[strip.row]


def _traces(page: _Page, rate_hz: float) -> str:
    """Path commands in hundredths of a millimetre: a calibration pulse for each row, then the strips."""
    gain = page.gain_mm_per_mv
    paths = [
        f"M200 {baseline_mm * 100}h200v{-gain * 100:.0f}h500v{gain * 100:.0f}h200"  # 1 mV for 0.2 s
        for baseline_mm in page.baselines_mm
    ]
    for strip in page.strips:
        x_mm, y_mm = _position(page, strip)
        if strip.start_s:  # a mark where one lead ends and the next begins
            paths.append(f"M{x_mm * 100:.0f} {y_mm * 100 - 250}v500")
        if strip.y_mv_T is not None:
            paths.append(_trace(x_mm, y_mm, strip.y_mv_T, gain, rate_hz))
    return "".join(paths)


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


def _name(record: Record, page: _Page, strip: _Strip) -> str:
    """The name of the strip's lead, and whether it is derived, missing or empty."""
    name = f"{strip.lead} derived" if strip.lead in record.derived else strip.lead
    if strip.y_mv_T is None:
        name += " missing"
    elif not np.isfinite(strip.y_mv_T).any():
        name += " has no values"
    x_mm, y_mm = _position(page, strip)
    return _text(x_mm + 1, y_mm - 7, name, "lead")


def _text(x_mm: float, y_mm: float, text: str, kind: str) -> str:
    size, weight = {"title": (4, "bold"), "lead": (3.4, "bold"), "scale": (3.4, "bold"), "note": (3.4, "normal")}[kind]
    return (
        f'<text x="{x_mm:g}" y="{y_mm:g}" font-size="{size}" font-weight="{weight}" fill="{INK}" stroke="{PAPER}" '
        f'stroke-width="0.8" paint-order="stroke" xml:space="preserve">{escape(text)}</text>'
    )


def _grid(width_mm: int, height_mm: int) -> tuple[str, str]:
    """Path commands of the lines every 1 mm, and of those every 5 mm."""
    lines_mm = [(x_mm, f"M{x_mm} 0v{height_mm}") for x_mm in range(width_mm + 1)]
    lines_mm += [(y_mm, f"M0 {y_mm}h{width_mm}") for y_mm in range(height_mm + 1)]
    minor = "".join(line for at_mm, line in lines_mm if at_mm % 5)
    return minor, "".join(line for at_mm, line in lines_mm if at_mm % 5 == 0)


def _svg(page: _Page, label: str, traces: str, words: Sequence[str]) -> str:
    width_mm, height_mm = page.width_mm, page.height_mm
    minor, major = _grid(width_mm, height_mm)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'width="{width_mm}mm" height="{height_mm}mm" viewBox="0 0 {width_mm} {height_mm}" '
        'font-family="Helvetica, Arial, sans-serif" fill="none">'
        f'<rect width="{width_mm}" height="{height_mm}" fill="{PAPER}"/>'
        f'<path d="{minor}" stroke="{MINOR}" stroke-width="0.1"/>'
        f'<path d="{major}" stroke="{MAJOR}" stroke-width="0.2"/>'
        f'<g transform="scale(0.01)" stroke="{INK}" stroke-width="25" stroke-linejoin="round" stroke-linecap="round">'
        f'<path d="{traces}"/></g>{"".join(words)}</svg>'
    )
