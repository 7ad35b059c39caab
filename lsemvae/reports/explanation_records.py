"""One explained recording: its pictures, and its part of the page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, Self

import numpy as np

from lsemvae.explain.explainer import Explanation
from lsemvae.explain.waves import DELINEATED, WAVES, Delineation
from lsemvae.plots.attribution import Picture, Span, attribution_paper
from lsemvae.plots.median_beat import median_beat
from lsemvae.plots.shares import Cells, Panel, Values, bars, heat_maps
from lsemvae.reports.page import picture, table

_CAPTIONS = {
    "paper": "ECG paper. Below each trace the attribution: above its line what raises the score, below what lowers it.",
    "beat": "Median beat about R, in black, and single beats in grey. Dashed: median onset and offset of the waves. "
    "Below: the mean attribution of the beats.",
    "leads": "By lead. Shares of the recording's attribution; occlusion: how far the logit falls without the lead. Of "
    "LS-EMVAE also the weight of the lead's expert, and its share of the fused precision.",
    "waves": "By wave, all leads together. ST is from the end of QRS to the onset of T; rest is what is left.",
    "cells": "By lead and wave, in percent of the recording's absolute attribution; occlusion: how far the logit falls "
    "when a straight line replaces the wave.",
}


def record_pictures(explanation: Explanation) -> dict[str, Picture]:
    """The pictures of one recording by name: paper, beat, leads, waves, cells; none for a refused recording.

    Without a beat there are only paper and leads. Of several windows, the one with most attribution is drawn.
    """
    if not explanation.windows or explanation.shares is None:
        return {}
    windows, leads = explanation.windows, explanation.leads
    number = int(np.argmax([np.abs(window.values_LT).sum() for window in windows]))
    drawn = windows[number]
    common: dict[str, Any] = {
        "unit_mv": explanation.unit_mv, "there_L": drawn.lead_mask_L,
    }  # fmt: skip
    title = f"Window {number + 1} of {len(windows)}, the one with most attribution" if len(windows) > 1 else ""
    signal = (leads, explanation.rate_hz, drawn.x_LT, drawn.values_LT)
    found = {"paper": attribution_paper(*signal, spans=spans(drawn.waves), title=title, **common)}
    if drawn.waves.beats:
        peaks_N = drawn.waves.edges["QRS"][:, 1]
        beat = median_beat(*signal, peaks_N[np.isfinite(peaks_N)], spans=usual_spans(drawn.waves), **common)
        found |= {"beat": beat} if beat else {}
    found["leads"] = _lead_bars(explanation)
    if explanation.beats:
        signed_LW, absolute_LW = explanation.shares
        shares = [Panel("signed share", {"": Values(signed_LW.sum(axis=0))})]
        shares += [Panel("absolute share", {"": Values(absolute_LW.sum(axis=0))}, signed=False)]
        found["waves"] = bars(WAVES, shares)
        found["cells"] = _cells(explanation)
    return found


def spans(waves: Delineation) -> list[Span]:
    """Each wave of which onset and offset were found."""
    found = []
    for wave in DELINEATED:
        for onset, _, offset in waves.edges.get(wave, np.empty((0, 3))):
            if np.isfinite(onset) and offset > onset:
                found.append(Span(wave, onset / waves.rate_hz, offset / waves.rate_hz))
    return found


def usual_spans(waves: Delineation) -> list[Span]:
    """The median onset and offset of each wave, in seconds after R."""
    found = []
    for wave in DELINEATED:
        after_N2 = waves.edges.get(wave, np.empty((0, 3)))[:, ::2] - waves.edges["QRS"][:, 1:2]
        known_N2 = after_N2[np.isfinite(after_N2).all(axis=1)]
        if len(known_N2):
            onset, offset = np.median(known_N2, axis=0) / waves.rate_hz
            found.append(Span(wave, float(onset), float(offset)))
    return found


def _lead_bars(explanation: Explanation) -> Picture:
    assert explanation.shares is not None
    there_L = explanation.there_L
    signed_L, absolute_L = (np.where(there_L, np.nansum(of_LW, axis=1), np.nan) for of_LW in explanation.shares)
    panels = [
        Panel("signed share", {"": Values(signed_L)}),
        Panel("absolute share", {"": Values(absolute_L)}, signed=False),
        Panel("occlusion", {"": Values(explanation.lead_drop_L)}, percent=False),
    ]
    for title, weight_L in (
        ("gate weight", explanation.gate_L), ("share of the precision", explanation.precision_L),
    ):  # fmt: skip
        if weight_L is not None:
            panels.append(Panel(title, {"": Values(weight_L)}, signed=False))
    return bars(explanation.leads, panels)


def _cells(explanation: Explanation) -> Picture:
    assert explanation.shares is not None
    panels = [Cells("attribution, %", explanation.shares.signed_LW)]
    drop_LW = explanation.wave_drop_LW
    if np.isfinite(drop_LW).any():
        panels.append(Cells("occlusion, fall of the logit", drop_LW, percent=False, sums=False))
    return heat_maps(explanation.leads, WAVES, panels)


# --- its part of the page -------------------------------------------------------------------------------------


class Image(NamedTuple):
    """A picture for the page. It takes a second to draw: a run draws each once, for its file and for the page."""

    png: bytes
    words: str
    wide_in: float

    @classmethod
    def of(cls, one: Picture) -> Self:
        return cls(one.png(), one.words, float(one.figure.get_figwidth()))


class Shown(NamedTuple):
    """A recording on the page; `images` are those of `record_pictures`, by name."""

    record_id: str
    explanation: Explanation
    images: Mapping[str, Image]


def record_section(shown: Shown, row: Mapping[str, Any]) -> str:
    """`row` is the recording's in the table of records; `reliability` and its reasons are shown where it has them."""
    record_id, explanation, images = shown
    parts = [f"<h3>Recording {escape(record_id)}</h3>"]
    if explanation.score.refused is not None:
        return parts[0] + f"<p>Refused, as for scoring: {escape(str(explanation.score.refused))}.</p>"
    parts.append(_html("What the model says", _facts(explanation, row)))
    notes = [*explanation.notes, *_missing(explanation)]
    if isinstance(row.get("reliability_reasons"), str) and row["reliability_reasons"]:
        notes.append(row["reliability_reasons"])
    parts += ["<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"] if notes else []
    return "".join([*parts, *(figure(one, _CAPTIONS[name]) for name, one in images.items())])


def figure(one: Image, caption: str) -> str:
    """A picture on the page, as wide as the page where it would otherwise be too small to read."""
    return picture(one.png, one.words, caption=caption, large=one.wide_in > 6, paper=one.wide_in > 8)


def _facts(explanation: Explanation, row: Mapping[str, Any]) -> dict[str, str]:
    score, windows = explanation.score, explanation.windows
    facts = {"score": "–" if score.score is None else f"{score.score:.3f}"}
    facts["decision"] = "at or above the threshold" if score.decision else "below the threshold"
    if score.probability is not None:
        facts["calibrated probability"] = f"{score.probability:.3f}"
    if isinstance(row.get("reliability"), str):
        facts["reliability"] = row["reliability"]
    if score.doubt is not None:
        facts["doubt"] = f"{score.doubt:.3g}"
    facts["logit, mean of the windows" if len(windows) > 1 else "logit"] = _each([one.logit for one in windows])
    facts["logit of the baseline"] = _each([one.baseline_logit for one in windows])
    worst = max(windows, key=lambda window: abs(window.delta))
    facts["largest convergence delta"] = f"{worst.delta:+.4f} with {worst.steps} steps"
    without = ", ".join(f"{wave} of {count}" for wave, count in explanation.failures.items() if count)
    facts["beats"] = f"{explanation.beats}" + (f"; not found: {without}" if without else "")
    return facts


def _each(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}"


def _missing(explanation: Explanation) -> list[str]:
    missing = [lead for lead, there in zip(explanation.leads, explanation.there_L, strict=True) if not there]
    return [f"Missing or unusable: {', '.join(missing)}. An absent lead has no attribution."] if missing else []


def _html(caption: str, facts: Mapping[str, str]) -> str:
    rows = [[escape(name), escape(value)] for name, value in facts.items()]
    return table(caption, ["", "value"], rows, numbers=False)
