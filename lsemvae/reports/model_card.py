"""The model card: what a registered model was trained and measured on, and what it is not for, as Markdown.

It travels in the bundle's provenance and is the description of the registered version, so it is kept short.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lsemvae.bundle import Bundle
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.cells import MAIN
from lsemvae.evaluation.compare import Comparison, Scores
from lsemvae.evaluation.metrics import ALL_METRICS, TITLES
from lsemvae.evaluation.tables import (
    Table,
    differences_table,
    escaped,
    interval,
    markdown,
    subgroups_table,
)
from lsemvae.tracking import shown

MAX_BYTES = 16_000

INTENDED_USE = (
    "Research on ECG models, on recordings of people like those of the cohort below, by experts who can judge the "
    "results: to compare methods, to plan a study, to choose recordings for review by experts."
)
NOT_FOR = (
    "Diagnosis, screening, triage, or any decision about a person's care. It is not a medical device.",
    "Excluding disease: a score below the threshold does not mean that the label is absent.",
    "Other patients, devices, leads or labels than those below, unless it was measured there first.",
    "Decisions about insurance, employment or the like.",
)
LIMITS = (
    "All figures are out of fold within one cohort. The model that is registered was trained on all folds, and was "
    "itself not measured on new recordings.",
    "The scores rank recordings; they are no probabilities. A calibrated probability, the PPV and the NPV hold where "
    "the label is as frequent as here.",
    "Intervals are over subjects. Another pre-training or other folds would give other figures.",
    "Subgroups are small, their number is not corrected for, and only sex and age were looked at.",
    "The label is what the cohort's source says it is; its errors are the model's too.",
)

ANSWERED, PARTLY, NOT = "answered", "in part", "not answered"
TRIPOD_AI: tuple[tuple[str, str, str], ...] = (
    ("1", ANSWERED, "title: the task, the cohort and the model are named"),
    ("2", NOT, "abstract: none"),
    ("3", PARTLY, "background: the intended use is here; care pathway and known inequalities are not"),
    ("4", ANSWERED, "objective: development with internal validation, for this label"),
    ("5", PARTLY, "data: source and digest are here; dates are not"),
    ("6", PARTLY, "participants: counts are here; setting, eligibility and treatment are the source's to say"),
    ("7", ANSWERED, "data preparation: one definition, named by its digest"),
    ("8", PARTLY, "outcome: the label is named; how it was assessed, and by whom, is the source's to say"),
    ("9", ANSWERED, "predictors: the leads of the recording alone"),
    ("10", NOT, "sample size: not planned; intervals show what the size allows"),
    ("11", PARTLY, "missing data: recordings without the label are left out; missing leads are masked"),
    (
        "12",
        ANSWERED,
        "analysis: folds by subject, choices on inner folds, bootstrap intervals, calibration",
    ),
    ("13", ANSWERED, "class imbalance: the recipe's loss; calibration shows its effect"),
    ("14", PARTLY, "fairness: results by sex and age; ethnicity and others were not known"),
    ("15", ANSWERED, "model output: a score, a threshold and, if calibrated, a probability"),
    ("16", ANSWERED, "training against evaluation: the same cohort, other subjects"),
    ("17", NOT, "ethical approval: the source's to say"),
    ("18", PARTLY, "open science: the code is open; funding, protocol and registration are not stated"),
    ("19", NOT, "patient and public involvement: none is recorded"),
    ("20", PARTLY, "participants' flow: recordings used and refused; no comparison with a target population"),
    ("21", ANSWERED, "model development: recordings and positives of each analysis"),
    ("22", ANSWERED, "model specification: config.json and weights of the bundle"),
    ("23", ANSWERED, "performance: with intervals, and by subgroup; heterogeneity between sites was not measured"),
    ("24", NOT, "updating: none was done"),
    ("25", PARTLY, "interpretation: differences from other methods; no comparison with clinical practice"),
    ("26", ANSWERED, "limitations: below"),
    ("27", PARTLY, "usability: poor recordings are flagged or refused; use in care was not studied"),
)
"""TRIPOD+AI (Collins et al., BMJ 2024): item, whether this card answers it, and how."""


def model_card(
    scores: Scores,
    comparison: Comparison,
    bundle: Bundle,
    *,
    leads: str,
    method: str | None = None,
    abstention: str = "not measured",
    data_licence: str = "not stated",
) -> str:
    """The card of the method that the bundle holds, as the main table has it on these leads -> Markdown.

    `method` is the reference by default. `abstention` says what setting doubtful recordings aside is worth. Raises
    LsemvaeError when the card is larger than a bundle's provenance should hold.
    """
    method = method or comparison.reference
    of = _people(scores, leads)
    threshold = "none" if bundle.threshold is None else f"{bundle.threshold:.4g}"
    parts = [
        f"# Model card: {_text(bundle.task)}, {_text(leads)}, {_text(method)}",
        "**For research only: not a medical device.**",
        "## Intended use",
        INTENDED_USE,
        "It must not be used for:",
        _list(NOT_FOR),
        "## Cohort and label",
        _facts(scores.facts, of, data_licence),
        "## Model",
        _list(
            [
                f"Architecture: {_text(bundle.architecture)}",
                f"Leads: {', '.join(bundle.leads)}",
                f"Threshold: {threshold}. A recording whose score reaches it counts as positive. Figures that depend "
                "on a threshold use, for each fold, one that was chosen without it.",
                f"Calibration: {_calibration(bundle)}",
                f"Abstention: {_text(abstention)}",
            ]
        ),
        f"## Results, {_text(leads)}, out of fold",
        _results(comparison, method, leads),
        "### Women and men, age groups",
        _table(subgroups_table(comparison, method, leads, ("auroc", "ppv_at_80_sensitivity", "calibration_slope"))),
        "### Differences from other methods",
        _differences(comparison, method, leads),
        "## Limits",
        _list(LIMITS),
        "## TRIPOD+AI",
        "Items of the checklist (Collins et al., BMJ 2024), and whether this card and the bundle answer them.",
        _list(f"{item} {_text(state)}: {text}" for item, state, text in TRIPOD_AI),
    ]
    card = "\n\n".join(parts) + "\n"
    if len(card.encode()) > MAX_BYTES:
        raise LsemvaeError(
            f"the model card has {len(card.encode()):,} bytes, at most {MAX_BYTES:,} fit: shorten the facts that the "
            "evaluation was given"
        )
    return card


def _people(scores: Scores, leads: str) -> dict[str, Any]:
    main = scores.scores[(scores.scores.analysis == MAIN) & (scores.scores.leads == leads)]
    of = scores.people[scores.people.record_id.isin(main.record_id)]
    ages = of.age_years.dropna()
    return {
        "recordings": f"{len(of):,}",
        "positive": f"{int(of.label.sum()):,} ({100 * of.label.mean():.1f} %)" if len(of) else "none",
        "subjects": f"{of.subject_id.nunique():,}",
        "women, men, sex not known": ", ".join(
            f"{int(count):,}" for count in ((of.female == 1).sum(), (of.female == 0).sum(), of.female.isna().sum())
        ),
        "age, years": f"median {np.median(ages):.0f}, {ages.min():.0f} to {ages.max():.0f}" if len(ages) else "unknown",
    }


def _facts(facts: Mapping[str, Any], people: Mapping[str, Any], data_licence: str) -> str:
    """What was given, and what was counted on these leads, which replaces the counts that were given."""
    counted = {"records", "positive", "subjects", "leads"}
    at_length = {"recipe", "supervised_recipe", "encoders"}  # "policy" says it in words; the bundle has its own
    given = {name: value for name, value in facts.items() if name not in counted | at_length}
    entries = {**given, **people, "licence of the data": data_licence}
    return _list(f"{_text(name)}: {_text(value)}" for name, value in entries.items())


def _calibration(bundle: Bundle) -> str:
    if bundle.calibration is None:
        return "none; the score is no probability."
    slope, intercept = bundle.calibration.slope, bundle.calibration.intercept
    return f"logit(probability) = {slope:.3f} logit(score) {intercept:+.3f}, fitted to the out-of-fold scores."


def _results(comparison: Comparison, method: str, leads: str) -> str:
    found = comparison.line(method, leads)
    if not found:
        return f"None: {_text(method)} has no complete training on {_text(leads)}."
    rows = [[TITLES[name], interval(found[name].value, found[name].low, found[name].high)] for name in ALL_METRICS]
    text = f"95 % bootstrap intervals over subjects, {comparison.draws:,} resamplings; of the scores, uncalibrated."
    return f"{text}\n\n{_table(Table('', ['metric', 'value'], rows))}"


def _differences(comparison: Comparison, method: str, leads: str) -> str:
    if method != comparison.reference:
        return f"Differences were measured for {_text(comparison.reference)}; see the report of the evaluation."
    table = differences_table(comparison)
    rows = [[row[0], *row[2:5]] for row in table.rows if row[1] == leads]
    if not rows:
        return "No other method was measured on the same recordings."
    text = f"AUROC of {_text(method)} minus that of the method; p of DeLong's test, and after Holm's correction."
    return f"{text}\n\n{_table(Table('', ['method', 'difference', 'p', 'p (Holm)'], rows))}"


def _table(table: Table) -> str:
    return markdown(table) if table.rows else "Not measured."


def _list(texts: Any) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _text(value: Any) -> str:
    """A fact in one line, without the password of an address and without HTML."""
    if isinstance(value, Mapping):
        return "; ".join(f"{_text(key)}: {_text(of)}" for key, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return escaped(shown(f"{value:g}" if isinstance(value, float) else str(value)))
