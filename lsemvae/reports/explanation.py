"""The report of a run of explanations, as one page for a cardiologist and a statistician.

The page names recordings by their record ids, and no subject.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from lsemvae.explain.attribution import LEAST
from lsemvae.explain.checks import Checks
from lsemvae.explain.explainer import NOT_CONVERGED
from lsemvae.explain.waves import DELINEATED
from lsemvae.reports.explanation_checks import checks_section, verdict_list, verdicts
from lsemvae.reports.explanation_cohort import cohort_section, igar_section, spread
from lsemvae.reports.explanation_records import Image, Shown, record_pictures, record_section
from lsemvae.reports.page import page, share, table
from lsemvae.tracking import shown as without_password

__all__ = ["Image", "Shown", "explanation_report", "record_pictures"]

READING = (
    "An attribution says how much a sample of a lead raises the score (above the line) or lowers it (below), compared "
    "with the baseline. It does not say that the sample is abnormal: a normal wave can raise a score, and a wave that "
    "is absent has no attribution.",
    "For a cardiologist: look first whether the bands lie on waves that could matter for this label. Attribution "
    "between the beats, or in a noisy lead, is a reason to doubt the score of that recording.",
    "For a statistician: attributions are integrated gradients of the logit of the score with respect to the model's "
    "input. They sum to the logit less that of the baseline, except for the convergence delta. Shares are divided by "
    "the sum of the recording's absolute attributions, so recordings weigh alike. Each sample belongs to one lead and "
    "one wave, so nothing counts twice. Signed shares sum to less than 100 % where attributions of both signs cancel.",
    "Occlusion needs no gradient: it is the logit less the logit without the lead, or with a straight line in place of "
    "the wave. Where it disagrees with the attributions, leads or waves can replace each other, or the explanation is "
    "doubtful.",
)
LIMITS = (
    "An explanation says what the model's score depends on, not why the heart is as it is. A model may be right for "
    "the wrong reason, and a plausible explanation does not make a score correct.",
    "Attributions depend on the baseline. Leads depend on each other, too: the six limb leads follow from two, so the "
    "model may use any of them for the same fact.",
    "Waves are found by a program. Where it fails, attributions count for their lead, and as rest among the waves.",
    "Intervals are for one cell at a time. With many leads, waves and groups, some exclude 0 by chance.",
    "Research use only. This is not a medical device.",
)


def explanation_report(
    about: Mapping[str, Any],
    records: pd.DataFrame,
    summary: pd.DataFrame,
    checks: Checks | None,
    shown: Sequence[Shown],
    igar: pd.DataFrame | None = None,
) -> str:
    """A run of explanations -> HTML.

    about    facts in the order in which the page shows them, such as model, version, digest, task, leads, threshold,
             baseline, bound, data; a value may be a mapping or a list
    records  a row for each recording that was asked for: record_id, refused (the code) and reason; and where it was
             explained score, decision, logit, baseline_logit, delta, steps, beats, failures.P, .QRS and .T, notes
    summary  see `lsemvae.explain.cohort`
    shown    the recordings that are drawn
    igar     the published ratio, means over recordings: kind (lead, wave), name, ratio, low, high
    """
    task = str(about.get("task", "score"))
    explained = records[records.refused.isna()]
    title = f"{task}: {len(explained):,} recordings explained"
    rows = {str(row["record_id"]): row for row in records.to_dict("records")}
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Which leads and which waves the score depends on, and whether that is true. Recordings have the ids of "
        "your data; no subject is named. For research, not for patient care.</p>",
        "<h2>In short</h2>",
        _in_short(records, summary, checks),
        "<h2>How to read this</h2>",
        _list(READING),
        "<h2>Recordings</h2>",
        _counts(records),
        "<h2>The cohort</h2>",
        *cohort_section(summary),
        *igar_section(igar, summary),
        "<h2>Are the explanations true?</h2>",
        checks_section(checks),
        "<h2>Convergence</h2>",
        _convergence(explained, about),
        "<h2>Some recordings</h2>",
        *([record_section(one, rows.get(one.record_id, {})) for one in shown] or ["<p>None is drawn.</p>"]),
        "<h2>What this does not show</h2>",
        _list(LIMITS),
        "<h2>What was asked</h2>",
        _asked(about),
    ]
    return page(f"Explanations: {title}", parts)


# --- parts of the page ----------------------------------------------------------------------------------------


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _words(value: Any) -> str:
    """A fact in one line, without the password of an address."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(of)}" for key, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else without_password(str(value))


def _asked(about: Mapping[str, Any]) -> str:
    rows = [[escape(str(name)), escape(_words(value))] for name, value in about.items()]
    return table("The model and the settings of this run", ["what", "value"], rows, numbers=False)


def _in_short(records: pd.DataFrame, summary: pd.DataFrame, checks: Checks | None) -> str:
    explained = int(records.refused.isna().sum())
    texts = [f"Explained: {explained:,} of {len(records):,} recordings. Refused: {len(records) - explained:,}."]
    every = summary[summary.group == "all"]
    for what, other in (("lead", "wave"), ("wave", "lead")):
        of = every[(every[other] == "all") & (every[what] != "all")].sort_values("absolute", ascending=False)[:3]
        if len(of):
            named = ", ".join(f"{row[what]} ({spread(row, 'absolute')} %)" for row in of.to_dict("records"))
            texts.append(f"Most attribution, of either sign, by {what}: {named}.")
    if checks is None:
        texts.append("The checks were not asked for, so nothing here shows whether the explanations are true.")
    html = "".join(f"<p>{escape(text)}</p>" for text in texts)
    return html + (verdict_list(verdicts(checks)) if checks is not None else "")


def _counts(records: pd.DataFrame) -> str:
    explained = records[records.refused.isna()]
    all_of = len(records)
    lines = [("explained", len(explained), all_of), ("refused", all_of - len(explained), all_of)]
    lines += [(f"refused: {code}", int(count), all_of) for code, count in records.refused.value_counts().items()]
    if "beats" in records:
        without = explained.beats.fillna(0) == 0
        lines.append(("without a beat, so explained by lead only", int(without.sum()), len(explained)))
    if "decision" in records:
        positive = int(explained.decision.fillna(False).astype(bool).sum())
        lines.append(("at or above the threshold", positive, len(explained)))
    rows = [[escape(name), f"{count:,}", share(count, of)] for name, count, of in lines]
    return table("Recordings", ["", "recordings", "share"], rows) + _delineation(explained)


def _delineation(explained: pd.DataFrame) -> str:
    known = [wave for wave in DELINEATED if f"failures.{wave}" in explained]
    if "beats" not in explained or not known:
        return ""
    beats = int(explained.beats.fillna(0).sum())
    rows = []
    for wave in known:
        count = int(explained[f"failures.{wave}"].fillna(0).sum())
        rows.append([wave, f"{count:,}", share(count, beats)])
    return table(f"Waves not found, of {beats:,} beats", ["wave", "beats", "share"], rows)


def _convergence(explained: pd.DataFrame, about: Mapping[str, Any]) -> str:
    if explained.empty or "delta" not in explained:
        return "<p>Nothing is explained.</p>"
    part = explained.delta.abs() / (explained.logit - explained.baseline_logit).abs().clip(lower=LEAST)
    counts = explained.steps.value_counts().sort_index()
    steps = ", ".join(f"{int(count):,} with {int(of)}" for of, count in counts.items())
    text = (
        "The convergence delta is what the sum of a recording's attributions lacks of the difference between its "
        f"logit and the baseline's. Its largest share of that difference (of {LEAST:g}, where the difference is "
        f"smaller) is {part.max():.3g}, its median {part.median():.3g}. Recordings by steps: {steps}."
    )
    if "notes" in explained and "bound" in about:
        over = sum(NOT_CONVERGED in notes for notes in explained.notes if isinstance(notes, str))
        text += (
            f" The bound is {about['bound']:g} of the difference, or of a tenth of the sum of the recording's absolute "
            f"attributions where that is more. Recordings that exceed it with the most steps: {over or 'none'}."
        )
    return f"<p>{escape(text)}</p>"
