"""The tables of a comparison as texts: for Markdown, for the report and for the model card."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from lsemvae.bundle import SET_ASIDE
from lsemvae.evaluation import abstention
from lsemvae.evaluation.cells import MAIN
from lsemvae.evaluation.compare import Comparison
from lsemvae.evaluation.metrics import ALL_METRICS, METRICS, TITLES

OPERATING = tuple(name for name in ALL_METRICS if name not in METRICS)


class Table(NamedTuple):
    """A caption, the names of the columns, and rows of texts."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def number(value: float, signed: bool = False) -> str:
    """Three decimals; a dash where nothing is defined."""
    return "–" if not math.isfinite(value) else f"{value:+.3f}" if signed else f"{value:.3f}"


def interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """`0.852 [0.810, 0.893]`, or the value alone where it has no interval."""
    if not math.isfinite(low + high):
        return number(value, signed)
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def probability(p: float) -> str:
    return "–" if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def main_table(comparison: Comparison, metrics: Sequence[str] = METRICS) -> Table:
    """A row for each method and set of leads, with intervals; with AUROC also the mean of the folds and the seeds."""
    main = comparison.metrics[comparison.metrics.analysis == MAIN]
    rows = []
    for (leads, method), of in main.groupby(["leads", "method"], sort=False):
        by_metric = of.set_index("metric")
        first = of.iloc[0]
        if first.note:
            rows.append([method, leads, first.note, *[""] * len(metrics[1:]), *["", ""] * ("auroc" in metrics)])
            continue
        row = [method, leads, *(interval(*by_metric.loc[name, ["value", "low", "high"]]) for name in metrics)]
        if "auroc" in metrics:
            auroc = by_metric.loc["auroc"]
            spread = f" (SD {number(auroc.seed_sd)})" if first.seeds > 1 else ""
            row += [f"{number(auroc.fold_mean)} ± {number(auroc.fold_sd)}", f"{first.seeds}{spread}"]
        rows.append(row)
    header = ["method", "leads", *(TITLES[name] for name in metrics)]
    return Table(
        "All out-of-fold scores together; 95 % bootstrap intervals over subjects",
        header + ["AUROC of folds", "seeds"] * ("auroc" in metrics),
        rows,
    )


def differences_table(comparison: Comparison, analysis: str = MAIN) -> Table:
    """A row for each other method: the reference's AUROC minus its AUROC, and the tests."""
    found = comparison.differences[comparison.differences.analysis == analysis]
    rows = [
        [row.method, row.leads, interval(row.difference, row.low, row.high, signed=True), probability(row.p),
         probability(row.p_holm), "yes" if row.p_holm < 0.05 else "no"]
        for row in found.itertuples()
    ]  # fmt: skip
    return Table(
        f"AUROC of {comparison.reference} minus that of the method, on the same recordings",
        ["method", "leads", "difference", "p (DeLong)", "p (Holm)", "stands at 5 %"],
        rows,
    )


def subgroups_table(comparison: Comparison, method: str, leads: str, metrics: Sequence[str] = ("auroc",)) -> Table:
    """A row for each subgroup of one method: its size, its share of positives, and its metrics."""
    found = comparison.subgroups[(comparison.subgroups.method == method) & (comparison.subgroups.leads == leads)]
    rows = []
    for subgroup, of in found.groupby("subgroup", sort=False):
        first, by_metric = of.iloc[0], of.set_index("metric")
        share = f"{100 * first.positive / first.recordings:.1f} %" if first.recordings else "–"
        row = [str(subgroup), f"{first.recordings:,}", f"{first.subjects:,}", share]
        if first.note:
            row += [first.note, *[""] * (len(metrics) - 1)]
        else:
            row += [interval(*by_metric.loc[name, ["value", "low", "high"]]) for name in metrics]
        rows.append(row)
    header = ["subgroup", "recordings", "subjects", "positive", *(TITLES[name] for name in metrics)]
    return Table(f"{method}, {leads}: women, men and age groups", header, rows)


def abstention_table(comparison: Comparison, method: str) -> Table:
    """A row for each set of leads and measure of doubt of one method: AUROC with and without the doubtful tenth."""
    found = comparison.abstention[comparison.abstention["method"] == method]
    rows = [
        [row.leads, row.doubt, interval(row.all, row.all_low, row.all_high),
         interval(row.rest, row.rest_low, row.rest_high), interval(row.gain, row.gain_low, row.gain_high, signed=True),
         "yes" if abstention.helpful(comparison.set_aside(method, row.leads)) == row.doubt else "no"]
        for row in found.itertuples()
    ]  # fmt: skip
    remaining = f"AUROC of the remaining {100 * (1 - SET_ASIDE):.0f} %"
    return Table(
        f"{method}: setting aside the most doubtful tenth, against a random tenth",
        ["leads", "measure of doubt", "AUROC of all", remaining, "gain", "the model carries it"],
        rows,
    )


def analyses(comparison: Comparison) -> list[str]:
    """The analyses beside the main table, in order."""
    return [str(name) for name in comparison.metrics.analysis.unique() if name != MAIN]


def analysis_table(comparison: Comparison, analysis: str, metric: str = "auroc") -> Table:
    """A row for each method, a column for each setting and set of leads; the settings as they come."""
    found = comparison.metrics[(comparison.metrics.analysis == analysis) & (comparison.metrics.metric == metric)]
    columns = list(found[["setting", "leads"]].drop_duplicates().itertuples(index=False, name=None))
    rows = []
    for method, of in found.groupby("method", sort=False):
        cells = of.set_index(["setting", "leads"])
        rows.append([str(method), *(_cell(cells, column) for column in columns)])
    header = [f"{setting}, {leads}" if setting else leads for setting, leads in columns]
    return Table(f"{analysis}: {TITLES[metric]}", ["method", *header], rows)


def _cell(cells: pd.DataFrame, column: tuple[str, str]) -> str:
    if column not in cells.index:
        return "not run"
    row = cells.loc[column]
    return row.note or interval(row.value, row.low, row.high)


def markdown(table: Table) -> str:
    """A Markdown table, without the caption."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def escaped(text: str) -> str:
    """A text that stands in one cell of a Markdown table, as it is."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def all_as_markdown(comparison: Comparison) -> str:
    """Every table of the comparison, each below its caption."""
    main = comparison.metrics[comparison.metrics.analysis == MAIN]
    tables = [main_table(comparison), main_table(comparison, OPERATING), differences_table(comparison)]
    tables += [
        subgroups_table(comparison, method, leads)
        for leads, method in main[["leads", "method"]].drop_duplicates().itertuples(index=False, name=None)
        if method == comparison.reference
    ]
    tables.append(abstention_table(comparison, comparison.reference))
    for analysis in analyses(comparison):
        tables.append(analysis_table(comparison, analysis))
    return "\n\n".join(f"**{table.caption}**\n\n{markdown(table)}" for table in tables if table.rows) + "\n"
