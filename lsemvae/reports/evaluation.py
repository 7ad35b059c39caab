"""The report of a comparison, as one page for a cardiologist and a statistician.

The page names no recording and no subject, so it may be mailed. Curves are of the first seed; tables of all.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lsemvae.evaluation import abstention, calibration
from lsemvae.evaluation.cells import MAIN
from lsemvae.evaluation.compare import Comparison, Scores
from lsemvae.evaluation.published import CAUTION, COHORTS, SOURCE, published
from lsemvae.evaluation.tables import (
    OPERATING,
    Table,
    abstention_table,
    analyses,
    analysis_table,
    differences_table,
    interval,
    main_table,
    number,
    probability,
    subgroups_table,
)
from lsemvae.plots import evaluation as plots
from lsemvae.plots.evaluation import Spread
from lsemvae.reports.page import page, picture, share, table
from lsemvae.tracking import shown

FEWER_LABELS = "fewer labels"
LIMITS = (
    "Whether patients are better off with any of these scores. That was not measured; nothing here is a medical "
    "device.",
    "How the methods do elsewhere. All figures are of one cohort, except those of an analysis that names another. "
    "PPV, NPV and net benefit hold where the label is as frequent as here.",
    "What another pre-training would give. Intervals are over subjects, for these folds and these encoders; the "
    "seeds repeat the training on labels only, unless the recipe says otherwise. Where an encoder was pre-trained on "
    "this cohort, it has seen the recordings of the test folds, without their labels.",
    "Probabilities. The methods are trained with losses that balance the classes, so their scores rank recordings. "
    "Brier score, calibration slope and intercept say how far the scores are from probabilities.",
    "Differences between subgroups. Each subgroup is small, and no correction is made for their number: read them as "
    "a search for faults. Holm's correction is over the methods of one analysis, not over the analyses.",
)
"""What the figures do not show."""


class _Leads(NamedTuple):
    """The main table's scores on one set of leads, of the first complete seed of each method. B recordings."""

    leads: str
    y_B: np.ndarray
    subject_B: np.ndarray
    fold_B: np.ndarray
    record_B: np.ndarray
    scores: dict[str, np.ndarray]
    decisions: dict[str, np.ndarray]


def evaluation_report(
    scores: Scores,
    comparison: Comparison,
    *,
    features: Mapping[str, np.ndarray] | None = None,
    reconstructions: bytes | None = None,
) -> str:
    """Scores and what follows from them -> HTML.

    `features` maps a record_id to the reference encoder's features [F], for the latent map. `reconstructions` is a PNG.
    """
    task = str(scores.facts.get("task", "label"))
    sets = [_of_leads(scores, leads) for leads in _main(scores).leads.unique()]
    people = scores.people[scores.people.record_id.isin(_main(scores).record_id)]
    chosen = _chosen(comparison)
    title = f"{task}: {len(people):,} recordings of {people.subject_id.nunique():,} subjects"
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Methods compared on the same recordings, folds and subjects. This page names no recording and no subject. "
        "For research, not for patient care.</p>",
        "<h2>In short</h2>",
        _in_short(comparison, [of.leads for of in sets]),
        "<h2>Cohort</h2>",
        _cohort(people, scores.facts),
        "<h2>Methods</h2>",
        _methods(comparison),
        "<h2>Differences</h2>",
        _differences(comparison),
        *_published(task),
        "<h2>Women and men, age groups</h2>",
        *(_subgroups(comparison, of.leads) for of in sets),
        "<h2>Curves</h2>",
        *(_curves(of, chosen, task) for of in sets if of.scores),
        *_abstention(comparison, [of.leads for of in sets]),
        *_analyses(comparison),
        *_encoder(scores, comparison, features, reconstructions, task),
        "<h2>What failed</h2>",
        _failed(scores.failed),
        "<h2>What these figures do not show</h2>",
        "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in LIMITS) + "</ul>",
        "<h2>What was asked</h2>",
        _asked(scores.facts, comparison),
    ]
    return page(f"Evaluation: {title}", parts)


# --- what is read ---------------------------------------------------------------------------------------------


def _main(scores: Scores) -> pd.DataFrame:
    return scores.scores[scores.scores.analysis == MAIN]


def _of_leads(scores: Scores, leads: str) -> _Leads:
    main = _main(scores)[_main(scores).leads == leads]
    rows = scores.people[scores.people.record_id.isin(main.record_id)]
    score, decision = {}, {}
    for (method, _), of in main.groupby(["method", "seed"], sort=False):
        if method not in score and len(of) == len(rows):
            by_record = of.set_index("record_id").loc[rows.record_id]
            score[str(method)] = by_record.score.to_numpy(dtype=float)
            decision[str(method)] = by_record.decision.to_numpy(dtype=bool)
    fold_by_record = main.drop_duplicates("record_id").set_index("record_id").fold
    return _Leads(
        leads, rows.label.to_numpy(dtype=int), rows.subject_id.to_numpy(),
        fold_by_record.loc[rows.record_id].to_numpy(), rows.record_id.to_numpy(), score, decision,
    )  # fmt: skip


def _html(of: Table) -> str:
    rows = [[escape(cell) for cell in row] for row in of.rows]
    return table(escape(of.caption), [escape(name) for name in of.header], rows)


def _words(value: Any) -> str:
    """A fact in one line, without the password of an address."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(of)}" for key, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return shown(str(value))


# --- parts of the page ----------------------------------------------------------------------------------------


def _asked(facts: Mapping[str, Any], comparison: Comparison) -> str:
    rows = [[str(name), _words(value)] for name, value in facts.items()]
    rows.append(["intervals", f"95 %, bootstrap over subjects, {comparison.draws:,} resamplings"])
    rows.append(["compared with", comparison.reference])
    escaped = [[escape(cell) for cell in row] for row in rows]
    return table("The settings of this evaluation", ["what", "value"], escaped, numbers=False)


def _in_short(comparison: Comparison, sets: Sequence[str]) -> str:
    """A paragraph for each set of leads: the reference, the best, and what stands after the correction."""
    texts = []
    for leads in sets:
        main = comparison.metrics[
            (comparison.metrics.analysis == MAIN) & (comparison.metrics.leads == leads)
            & (comparison.metrics.metric == "auroc") & (comparison.metrics.note == "")
        ].set_index("method")  # fmt: skip
        if main.empty:
            texts.append(f"{leads}: no method has a result.")
            continue
        best = str(main.value.idxmax())
        words = f"{leads}: the highest AUROC is {_auroc(main, best)}, of {best}."
        if comparison.reference in main.index:
            if best != comparison.reference:
                words += f" {comparison.reference} has {_auroc(main, comparison.reference)}."
            words += _stands(comparison, leads)
        texts.append(words)
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _auroc(main: pd.DataFrame, method: str) -> str:
    return interval(*main.loc[method, ["value", "low", "high"]])


def _stands(comparison: Comparison, leads: str) -> str:
    of = comparison.differences
    of = of[(of.analysis == MAIN) & (of.leads == leads)]
    stands = of[of.p_holm < 0.05]
    better, worse = (", ".join(stands.method[stands.difference * sign > 0]) for sign in (1, -1))
    rest = ", ".join(of.method[~(of.p_holm < 0.05)])
    text = f" After Holm's correction {comparison.reference} is better than {better or 'no method'}"
    text += f" and worse than {worse}" if worse else ""
    return text + (f"; no difference is shown from {rest}." if rest else ".")


def _cohort(people: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    groups = {"all": people, "positive": people[people.label == 1], "negative": people[people.label == 0]}
    lines: dict[str, list[str]] = {
        "recordings": [f"{len(of):,} ({share(len(of), len(people))})" for of in groups.values()],
        "subjects": [f"{of.subject_id.nunique():,}" for of in groups.values()],
        "women": [_count(of.female == 1) for of in groups.values()],
        "men": [_count(of.female == 0) for of in groups.values()],
        "sex not known": [_count(of.female.isna()) for of in groups.values()],
        "age, years: median (quartiles)": [_ages(of.age_years) for of in groups.values()],
        "age not known": [_count(of.age_years.isna()) for of in groups.values()],
    }
    refused = f"<p>Refused by the preprocessing: {escape(_words(facts['refused']))}.</p>" if "refused" in facts else ""
    rows = [[name, *cells] for name, cells in lines.items()]
    return _html(Table("Counts are of recordings; a subject may have several", ["", *groups], rows)) + refused


def _count(of_B: pd.Series) -> str:
    return f"{int(of_B.sum()):,} ({share(int(of_B.sum()), len(of_B))})"


def _ages(age_years: pd.Series) -> str:
    known = age_years.dropna()
    return "{1:.0f} ({0:.0f} to {2:.0f})".format(*known.quantile([0.25, 0.5, 0.75])) if len(known) else "–"


def _methods(comparison: Comparison) -> str:
    found = comparison.metrics[(comparison.metrics.analysis == MAIN) & (comparison.metrics.metric == "auroc")]
    spreads: dict[str, dict[str, Spread]] = {}
    for row in found[found.note == ""].itertuples():
        spreads.setdefault(row.method, {})[row.leads] = Spread(row.value, row.low, row.high)
    words = "AUROC of each method with its 95 % interval; the dashed line is chance"
    chart = picture(plots.dots(spreads, "AUROC", 0.5), words, large=True) if spreads else ""
    more = "<p>Operating points, and how far the scores are from probabilities:</p>"
    return _html(main_table(comparison)) + chart + more + _html(main_table(comparison, OPERATING))


def _differences(comparison: Comparison) -> str:
    of = comparison.differences[comparison.differences.analysis == MAIN]
    if of.empty:
        return f"<p>{escape(comparison.reference)} has no scores here, so there are no differences.</p>"
    rows = [
        (
            f"{row.method}, {row.leads}", Spread(row.difference, row.low, row.high),
            f"{interval(row.difference, row.low, row.high, signed=True)}   p {probability(row.p_holm)}",
        )
        for row in of.itertuples()
    ]  # fmt: skip
    label = f"AUROC of {comparison.reference} minus that of the method"
    words = f"{label}: right of the line {comparison.reference} is better; p after Holm's correction"
    text = (
        "<p>Both AUROCs are of the same recordings, and intervals are paired. The test is DeLong's, with the "
        "recordings of a subject together; Holm's correction is over all lines of this table.</p>"
    )
    return text + _html(differences_table(comparison)) + picture(plots.forest(rows, label, 0.0), words, large=True)


def _published(task: str) -> list[str]:
    found = published(task)
    if found is None:
        return []
    rows = [
        [row.method, row.leads, number(row.auroc), number(row.accuracy), number(row.mcc)] for row in found.itertuples()
    ]
    caption = f"Published: {SOURCE}, means of five folds; {COHORTS[task]}"
    header = ["method", "leads", "AUROC", "accuracy", "MCC"]
    return ["<h2>What the paper printed</h2>", f"<p>{escape(CAUTION)}</p>", _html(Table(caption, header, rows))]


def _subgroups(comparison: Comparison, leads: str) -> str:
    """A forest plot and a table of the reference, and the AUROC of every method."""
    of = comparison.subgroups[(comparison.subgroups.leads == leads)]
    reference = of[(of.method == comparison.reference) & (of.metric.isin(["", "auroc"]))]
    html = f"<h3>{escape(leads)}</h3>"
    if len(reference):
        rows: list[tuple[str, Spread | None, str]] = [(f"{comparison.reference}, {leads}", None, "")]
        for row in reference.itertuples():
            size = f"{row.recordings:,} recordings, {share(row.positive, row.recordings)} positive"
            value = None if row.note else Spread(row.value, row.low, row.high)
            rows.append((row.subgroup, value, row.note or f"{interval(row.value, row.low, row.high)}   {size}"))
        words = f"AUROC of {comparison.reference} on {leads} by subgroup; the dashed line is chance"
        html += picture(plots.forest(rows, "AUROC", 0.5), words, large=True)
        html += _html(subgroups_table(comparison, comparison.reference, leads, ("auroc", "auprc", "mcc", *OPERATING)))
    auroc = of[of.metric.isin(["", "auroc"])]
    names = list(auroc.subgroup.unique())
    lines = [
        [str(method), *(row.note or interval(row.value, row.low, row.high) for row in rows.itertuples())]
        for method, rows in auroc.groupby("method", sort=False)
    ]
    return html + (_html(Table(f"AUROC of every method, {leads}", ["method", *names], lines)) if lines else "")


def _curves(of: _Leads, chosen: Sequence[str], task: str) -> str:
    """Pictures of the chosen methods; calibration and decisions are of the first of them."""
    names = [name for name in chosen if name in of.scores] or list(of.scores)[:1]
    some = {name: of.scores[name] for name in names}
    which = f"{of.leads}, out of fold, first seed"
    rest = "" if len(names) == len(of.scores) else "; the other methods are in the table"
    pictures = [
        picture(plots.roc(of.y_B, some), f"ROC curves, {which}{rest}"),
        picture(plots.precision_recall(of.y_B, some), f"Precision-recall curves, {which}{rest}; thin: prevalence"),
    ]
    name = names[0]
    weight_B = calibration.subject_weights(of.subject_B)
    folds = [(np.flatnonzero(of.fold_B != fold), np.flatnonzero(of.fold_B == fold)) for fold in np.unique(of.fold_B)]
    probabilities = {
        method: calibration.cross_fitted(of.y_B, of.scores[method], weight_B, folds) if len(folds) > 1 else None
        for method in names
    }
    calibrated = {method: p_B for method, p_B in probabilities.items() if p_B is not None}
    shown_as = {"score": of.scores[name]} | ({"calibrated": calibrated[name]} if name in calibrated else {})
    diagrams = {}
    for kind, p_B in shown_as.items():
        found = calibration.diagram(of.y_B, p_B, weight_B)
        diagrams[kind] = plots.Diagram(found.probability, found.positive, p_B)
    words = f"Calibration of {name}, {which}; calibrated: Platt's sigmoid fitted on the other folds"
    pictures.append(picture(plots.reliability(diagrams), words))
    if calibrated:
        words = f"Decision curve, {which}, of probabilities that were calibrated on the other folds"
        pictures.append(picture(plots.decision_curve(of.y_B, calibrated), words))
    words = f"{name}, {which}: each fold decided at the threshold chosen without it"
    pictures.append(picture(plots.confusion(of.y_B, of.decisions[name], task), words))
    return f"<h3>{escape(of.leads)}</h3>" + "".join(pictures)


def _abstention(comparison: Comparison, sets: Sequence[str]) -> list[str]:
    found = abstention_table(comparison, comparison.reference)
    if not found.rows:
        return []
    text = (
        "A measure of doubt needs no label: <i>distance</i> is how far a recording's features are from those of the "
        "training recordings, <i>disagreement</i> how much the score changes with circular shifts in time. Each "
        "recording is judged by a model that was trained without its subject. The AUROC of all is what setting aside a "
        "random tenth gives on average; the gain is over that, and its interval is paired. A model carries the measure "
        "with the largest gain if the gain's interval is above 0; choosing the best of two on the same recordings "
        "favours it a little. The idea of setting the least reliable tenth aside is HemoNet's (daphneschles/RHCnet)."
    )
    verdicts = [
        f"<p>{escape(f'{leads}: {abstention.verdict(comparison.set_aside(comparison.reference, leads))}')}</p>"
        for leads in sets
    ]
    return ["<h2>Setting aside the most doubtful tenth</h2>", f"<p>{text}</p>", _html(found), *verdicts]


def _chosen(comparison: Comparison) -> list[str]:
    """At most six methods whose curves are drawn, the same on all leads: the reference, what needs no pre-training, and
    the best others."""
    of = comparison.metrics
    of = of[(of.analysis == MAIN) & (of.metric == "auroc") & (of.note == "") & (of.value != 0.5)]
    ordered = list(of.groupby("method").value.mean().sort_values(ascending=False).index)
    fixed = [name for name in (comparison.reference, "classical features", "untrained encoder") if name in ordered]
    return list(dict.fromkeys([*fixed, *ordered]))[:6]


def _analyses(comparison: Comparison) -> list[str]:
    parts = [_html(analysis_table(comparison, analysis)) for analysis in analyses(comparison)]
    curves = _label_efficiency(comparison)
    return ["<h2>Analyses</h2>", *curves, *parts] if parts else []


def _label_efficiency(comparison: Comparison) -> list[str]:
    """The curve of each set of leads, where settings are shares such as `50 %`."""
    of = comparison.metrics
    of = of[(of.analysis == FEWER_LABELS) & (of.metric == "auroc") & (of.note == "")]
    shares = pd.to_numeric(of.setting.str.replace("%", "").str.strip(), errors="coerce")
    pictures = []
    for leads, rows in of[shares.notna()].groupby("leads", sort=False):
        curves: dict[str, dict[float, Spread]] = {}
        for row, percent in zip(rows.itertuples(), shares[rows.index], strict=True):
            curves.setdefault(row.method, {})[float(percent)] = Spread(row.value, row.low, row.high)
        some = dict(list(curves.items())[: plots.MAX_LINES])
        words = f"AUROC over the share of labelled recordings used for training, {leads}, with 95 % intervals"
        pictures.append(picture(plots.label_efficiency(some), words))
    return pictures


def _encoder(
    scores: Scores,
    comparison: Comparison,
    features: Mapping[str, np.ndarray] | None,
    reconstructions: bytes | None,
    task: str,
) -> list[str]:
    pictures = []
    of = scores.people[scores.people.record_id.isin(features or ())]
    if features and len(of) > 2:
        h_BF = np.stack([np.asarray(features[record], dtype=float) for record in of.record_id])
        words = (
            f"Features of {comparison.reference} by label: two principal components. Overlap here does not mean that "
            "a classifier cannot tell the classes apart"
        )
        pictures.append(picture(plots.latent_map(h_BF, of.label.to_numpy(), task), words))
    if reconstructions:
        words = f"Recordings and their reconstructions by {comparison.reference}"
        pictures.append(picture(reconstructions, words, large=True))
    return ["<h2>What the encoder does</h2>", *pictures] if pictures else []


def _failed(failed: pd.DataFrame) -> str:
    if failed.empty:
        return "<p>Every training finished.</p>"
    columns = ["analysis", "setting", "leads", "method", "seed", "fold", "reason"]
    rows = [[str(row[0]), *map(_words, row[1:])] for row in failed[columns].itertuples(index=False, name=None)]
    text = "<p>A seed with a failed fold is left out of its method's figures.</p>"
    return _html(Table("Trainings that failed", columns, rows)) + text
