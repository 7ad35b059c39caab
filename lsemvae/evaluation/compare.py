"""Methods compared on the same recordings: from their out-of-fold scores to metrics, differences and subgroups."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lsemvae.cohorts.demographics import AGES
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention
from lsemvae.evaluation.cells import MAIN
from lsemvae.evaluation.metrics import (
    ALL_METRICS,
    Estimate,
    Weighted,
    auroc_difference,
    with_intervals,
)
from lsemvae.evaluation.significance import delong, holm
from lsemvae.progress import Bar
from lsemvae.storage import Storage

REFERENCE = "LS-EMVAE"
CELL = ["analysis", "setting", "leads", "method"]
MIN_SUBGROUP = 20
"""Recordings. A smaller subgroup gets no metrics."""

_COLUMNS = {
    "people": ["record_id", "subject_id", "label", "fold", "female", "age_years"],
    "scores": [*CELL, "seed", "record_id", "fold", "score", "decision"],
    "failed": [*CELL, "seed", "fold", "reason"],
    "metrics": [
        *CELL, "metric", "value", "low", "high", "fold_mean", "fold_sd", "seeds", "seed_sd", "recordings", "positive",
        "note",
    ],
    "differences": [
        *CELL, "reference", "difference", "low", "high", "standard_error", "p", "p_holm", "recordings",
    ],
    "subgroups": [
        "leads", "method", "kind", "subgroup", "recordings", "subjects", "positive", "metric", "value", "low", "high",
        "note",
    ],
    "doubts": ["leads", "method", "seed", "record_id", "doubt", "value"],
    "abstention": list(abstention.COLUMNS),
}  # fmt: skip
_TEXT = [*CELL, "metric", "reference", "kind", "subgroup", "note", "reason", "doubt"]


@dataclass(frozen=True)
class Scores:
    """Out-of-fold scores of every method: the only input of the tables and the report.

    facts    task, source_layout, data (uri and digest), records, positive, subjects, refused, leads, folds, seeds,
             policy, size, recipe, preprocess digest, release; what JSON can hold
    people   record_id, subject_id, label (0 or 1), fold, female (1, 0 or NaN), age_years (NaN where it is not known)
    scores   analysis, setting, leads, method, seed, record_id, fold, score between 0 and 1, decision
    failed   analysis, setting, leads, method, seed, fold, reason
    doubts   leads, method, seed, record_id, doubt (a measure of `lsemvae.models.parts.doubt`) and its value, of the
             main table's recordings, each judged without its fold; empty where nothing was measured

    Within an analysis, setting and leads every method and seed scores the same recordings; a seed that lacks some,
    because a fold failed, is left out. The analysis of the main table is "main".
    """

    facts: Mapping[str, Any]
    people: pd.DataFrame
    scores: pd.DataFrame
    failed: pd.DataFrame
    doubts: pd.DataFrame = field(default_factory=lambda: _frame((), "doubts"))

    def __post_init__(self) -> None:
        for name in ("people", "scores", "failed", "doubts"):
            _require_columns(getattr(self, name), name)
        if self.people.record_id.duplicated().any():
            twice = self.people.record_id[self.people.record_id.duplicated()].iloc[0]
            raise LsemvaeError(f"recording {twice!r} is twice among the people of the scores")
        unknown = set(self.scores.record_id) - set(self.people.record_id)
        if unknown:
            raise LsemvaeError(f"{len(unknown)} scored recordings, such as {min(unknown)!r}, are not among the people")
        if not self.people.label.isin([0, 1]).all():
            raise LsemvaeError("a label is neither 0 nor 1: leave out the recordings that have none")
        wrong = self.scores[~self.scores.score.between(0, 1)]
        if len(wrong):
            cell = ", ".join(str(wrong.iloc[0][name]) for name in CELL)
            raise LsemvaeError(f"{cell}: a score is {wrong.iloc[0].score}, must be between 0 and 1")

    def write(self, place: Storage) -> None:
        """Write facts.json, failed.csv, and people, scores and doubts as Parquet, each file whole or not at all."""
        place.write_bytes("facts.json", json.dumps(dict(self.facts), indent=2, ensure_ascii=False).encode())
        place.write_bytes("failed.csv", self.failed.to_csv(index=False).encode())
        for name in ("people", "scores", "doubts"):
            content = io.BytesIO()
            getattr(self, name).to_parquet(content, index=False)
            place.write_bytes(f"{name}.parquet", content.getvalue())

    @classmethod
    def read(cls, place: Storage) -> "Scores":
        """What `write` wrote; raises LsemvaeError when a file is missing or is none of these."""
        people, scores = (
            pd.read_parquet(io.BytesIO(_content(place, f"{name}.parquet"))) for name in ("people", "scores")
        )
        rest = {}
        if place.exists("doubts.parquet"):
            rest["doubts"] = pd.read_parquet(io.BytesIO(_content(place, "doubts.parquet")))
        return cls(_facts(place, "facts.json"), people, scores, _table(place, "failed"), **rest)

    def doubts_of(self, method: str, leads: str) -> dict[str, pd.DataFrame]:
        """By measure, the doubts of a method's recordings: a row for each seed, a column for each record id."""
        found = self.doubts[(self.doubts["method"] == method) & (self.doubts["leads"] == leads)]
        return {
            str(kind): of.pivot(index="seed", columns="record_id", values="value")
            for kind, of in found.groupby("doubt", sort=False)
        }


@dataclass(frozen=True)
class Comparison:
    """What follows from the scores. Intervals are of 95 %, over `draws` bootstrap samples of subjects.

    metrics      a line for each method and metric of each analysis, setting and leads. `value` is the metric of all
                 out-of-fold scores together, the mean over the seeds; `fold_mean` and `fold_sd` are over the folds,
                 each the mean over the seeds; `seed_sd` is over the seeds. `note` says why a value is absent.
    differences  AUROC of the reference minus that of each other method on the same recordings; DeLong's p, and the same
                 after Holm's correction over all lines of the analysis.
    subgroups    metrics of the main table's methods among women, men and age groups.
    abstention   what setting the most doubtful tenth aside is worth to a method of the main table; a line for each
                 measure of doubt.
    """

    metrics: pd.DataFrame
    differences: pd.DataFrame
    subgroups: pd.DataFrame
    reference: str = REFERENCE
    draws: int = 1000
    seed: int = 0
    abstention: pd.DataFrame = field(default_factory=lambda: _frame((), "abstention"))

    def write(self, place: Storage) -> None:
        """Write each table as CSV, and comparison.json, each file whole or not at all."""
        for name in ("metrics", "differences", "subgroups", "abstention"):
            place.write_bytes(f"{name}.csv", getattr(self, name).to_csv(index=False).encode())
        settings = {"reference": self.reference, "draws": self.draws, "seed": self.seed}
        place.write_bytes("comparison.json", json.dumps(settings, indent=2).encode())

    @classmethod
    def read(cls, place: Storage) -> "Comparison":
        """What `write` wrote; raises LsemvaeError when a file is missing or is none of these."""
        names = ["metrics", "differences", "subgroups"]
        names += ["abstention"] if place.exists("abstention.csv") else []
        tables = {name: _table(place, name) for name in names}
        return cls(**tables, **_facts(place, "comparison.json"))

    def set_aside(self, method: str, leads: str) -> pd.DataFrame:
        """The lines of `abstention` of a method on these leads."""
        return self.abstention[(self.abstention["method"] == method) & (self.abstention["leads"] == leads)]

    def line(self, method: str, leads: str) -> dict[str, Estimate]:
        """The metrics of a method of the main table; empty where it has none."""
        found = self.metrics[
            (self.metrics.analysis == MAIN)
            & (self.metrics.method == method)
            & (self.metrics.leads == leads)
            & (self.metrics.note == "")
        ]
        return {row.metric: Estimate(row.value, row.low, row.high) for row in found.itertuples()}


def scored(
    analysis: str,
    setting: str,
    leads: str,
    method: str,
    seed: int,
    record_B: np.ndarray,
    fold_B: np.ndarray | int,
    score_B: np.ndarray,
    decision_B: np.ndarray,
) -> pd.DataFrame:
    """The lines of `Scores.scores` of one method with one seed."""
    values = (analysis, setting, leads, method, seed, record_B, fold_B, score_B, decision_B)
    return pd.DataFrame(dict(zip(_COLUMNS["scores"], values, strict=True)))


def failures(lines: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """`Scores.failed` of such lines: analysis, setting, leads, method, seed, fold, reason."""
    return pd.DataFrame(list(lines), columns=_COLUMNS["failed"])


class Known(NamedTuple):
    """What was computed before with the same draws and seed, of methods of the main table.

    metrics      by method, every one of ALL_METRICS
    differences  by method, AUROC of the reference minus its AUROC
    """

    metrics: Mapping[str, Mapping[str, Estimate]] = {}
    differences: Mapping[str, Estimate] = {}


def compare(
    scores: Scores, *, draws: int = 1000, seed: int = 0, reference: str = REFERENCE, known: Known | None = None
) -> Comparison:
    """Metrics of every method, its difference from the reference, and metrics of subgroups, with a progress bar.

    What is `known` is not computed again.
    """
    groups = list(_groups(scores))
    main = [group for group in groups if group.analysis == MAIN]
    settings = _Settings(draws, seed)
    metrics, differences, subgroups, doubtful = [], [], [], []
    rows = sum(len(group.methods) for group in groups) + sum(len(group.methods) for group in main)
    with Bar(rows, "compare", "rows") as bar:
        for group in groups:
            for method in group.methods:
                before = known if known and group.analysis == MAIN else Known()
                metrics += _metrics(group, method, settings, before)
                differences += _difference(group, method, reference, settings, before)
                bar.update()
        for group in main:
            for method in group.methods:
                subgroups += _subgroups(group, method, settings)
                doubtful += _abstention(group, method, scores.doubts_of(method.name, group.leads), settings)
                bar.update()
    found = _frame(differences, "differences")
    if len(found):
        found["p_holm"] = found.groupby("analysis", sort=False).p.transform(lambda p: holm(p.tolist()))
    return Comparison(
        _frame(metrics, "metrics"), found, _frame(subgroups, "subgroups"), reference, draws=draws, seed=seed,
        abstention=_frame(doubtful, "abstention"),
    )  # fmt: skip


# --- the scores, as arrays ------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    draws: int
    seed: int


class _Method(NamedTuple):
    """The complete trainings of one method. N seeds, B recordings; `problem` says why there is none."""

    name: str
    score_NB: np.ndarray
    decision_NB: np.ndarray
    problem: str = ""
    seed_N: tuple[int, ...] = ()


class _Group(NamedTuple):
    """What is compared with each other: an analysis in one setting with the same leads, on the same B recordings."""

    analysis: str
    setting: str
    leads: str
    y_B: np.ndarray
    subject_B: np.ndarray
    fold_B: np.ndarray
    female_B: np.ndarray
    age_years_B: np.ndarray
    record_B: np.ndarray
    methods: list[_Method]


def _groups(scores: Scores) -> Iterator[_Group]:
    people = scores.people.set_index("record_id")
    scored, broken = (table.fillna({"setting": ""}) for table in (scores.scores, scores.failed))
    failed = dict(list(broken.groupby(CELL, sort=False)))
    of_cell = dict(list(scored.groupby(CELL, sort=False)))
    keys = pd.concat([scored[CELL], broken[CELL]]).drop_duplicates()
    for key, cells in keys.groupby(CELL[:3], sort=False):
        analysis, setting, leads = map(str, key)
        tables = {method: of_cell.get((analysis, setting, leads, method)) for method in cells.method}
        present = pd.concat([table for table in tables.values() if table is not None] or [scored[:0]])
        fold_by_record = present.drop_duplicates("record_id").set_index("record_id").fold
        rows = people.loc[people.index.isin(fold_by_record.index)]
        methods = [
            _method(method, table, rows.index, failed.get((analysis, setting, leads, method)))
            for method, table in tables.items()
        ]
        yield _Group(
            analysis, setting, leads,
            rows.label.to_numpy(dtype=int), rows.subject_id.to_numpy(), fold_by_record[rows.index].to_numpy(),
            rows.female.to_numpy(dtype=float), rows.age_years.to_numpy(dtype=float), rows.index.to_numpy(), methods,
        )  # fmt: skip


def _method(name: str, table: pd.DataFrame | None, records: pd.Index, failed: pd.DataFrame | None) -> _Method:
    score_NB, decision_NB, seed_N = [], [], []
    for seed, of_seed in table.groupby("seed") if table is not None else []:
        by_record = of_seed.set_index("record_id")
        if by_record.index.has_duplicates:
            raise LsemvaeError(
                f"{name}: recording {by_record.index[by_record.index.duplicated()][0]!r} is scored twice"
            )
        if len(by_record) == len(records):
            score_NB.append(by_record.score[records].to_numpy(dtype=float))
            decision_NB.append(by_record.decision[records].to_numpy(dtype=bool))
            seed_N.append(int(seed))
    empty = np.empty((0, len(records)))
    problem = ""
    if not score_NB:
        problem = f"failed: {failed.reason.iloc[0]}" if failed is not None else "some recordings were not scored"
    scores_NB = np.array(score_NB) if score_NB else empty
    return _Method(name, scores_NB, np.array(decision_NB, dtype=bool), problem, tuple(seed_N))


# --- lines of the tables --------------------------------------------------------------------------------------


def _metrics(group: _Group, method: _Method, settings: _Settings, known: Known) -> list[dict[str, Any]]:
    """A line for each metric of a method."""
    note = method.problem
    if not note and len(np.unique(group.y_B)) < 2:
        note = "all recordings have the same label"
    cell = {
        "analysis": group.analysis, "setting": group.setting, "leads": group.leads, "method": method.name,
        "seeds": len(method.score_NB), "recordings": len(group.y_B), "positive": int(group.y_B.sum()), "note": note,
    }  # fmt: skip
    if note:
        return [cell | {"metric": name} for name in ALL_METRICS]
    found = known.metrics.get(method.name) or with_intervals(
        group.y_B, method.score_NB, method.decision_NB, group.subject_B, metrics=ALL_METRICS, **settings._asdict()
    )
    once_1B = np.ones((1, len(group.y_B)))
    folds_FB = np.array([group.fold_B == fold for fold in np.unique(group.fold_B)], dtype=float)
    folds_FB = folds_FB[(folds_FB @ group.y_B > 0) & (folds_FB @ (1 - group.y_B) > 0)]
    measures = [
        Weighted(group.y_B, score_B, decision_B)
        for score_B, decision_B in zip(method.score_NB, method.decision_NB, strict=True)
    ]
    of_seeds = [measure(once_1B) for measure in measures]
    of_folds = [measure(folds_FB) for measure in measures]
    lines = []
    for name in ALL_METRICS:
        fold_F = np.mean([values[name] for values in of_folds], axis=0)
        seed_N = np.concatenate([values[name] for values in of_seeds])
        lines.append(
            cell
            | {"metric": name, "value": found[name].value, "low": found[name].low, "high": found[name].high}
            | {"fold_mean": fold_F.mean() if len(fold_F) else np.nan, "fold_sd": _sd(fold_F), "seed_sd": _sd(seed_N)}
        )
    return lines


def _sd(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def _difference(
    group: _Group, method: _Method, reference: str, settings: _Settings, known: Known
) -> list[dict[str, Any]]:
    """The reference minus the method; nothing where one of them has no scores."""
    other = next((entry for entry in group.methods if entry.name == reference), None)
    if other is None or method.name == reference or other.problem or method.problem or len(np.unique(group.y_B)) < 2:
        return []
    pair = (other.score_NB, method.score_NB)
    found = known.differences.get(method.name)
    found = found or auroc_difference(group.y_B, *pair, group.subject_B, **settings._asdict())
    error, p = delong(group.y_B, *pair, group.subject_B)
    return [
        {
            "analysis": group.analysis, "setting": group.setting, "leads": group.leads, "method": method.name,
            "reference": reference, "difference": found.value, "low": found.low, "high": found.high,
            "standard_error": error, "p": p, "recordings": len(group.y_B),
        }
    ]  # fmt: skip


def subgroup_rows(female_B: np.ndarray, age_years_B: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(kind, subgroup) -> which recordings are in it, [B] bool; unknown sex or age only where there is any."""
    found = {("sex", "women"): female_B == 1, ("sex", "men"): female_B == 0}
    found |= {("age", name): (age_years_B >= low) & (age_years_B < high) for name, (low, high) in AGES.items()}
    unknown = {("sex", "sex not known"): np.isnan(female_B), ("age", "age not known"): np.isnan(age_years_B)}
    return found | {name: rows_B for name, rows_B in unknown.items() if rows_B.any()}


def _subgroups(group: _Group, method: _Method, settings: _Settings) -> list[dict[str, Any]]:
    """Lines of a main table's method for each subgroup and metric, or one with the reason why it has none."""
    lines: list[dict[str, Any]] = []
    if method.problem:
        return lines
    for (kind, name), rows_B in subgroup_rows(group.female_B, group.age_years_B).items():
        y_B, subject_B = group.y_B[rows_B], group.subject_B[rows_B]
        cell = {
            "leads": group.leads, "method": method.name, "kind": kind, "subgroup": name, "recordings": len(y_B),
            "subjects": len(np.unique(subject_B)), "positive": int(y_B.sum()), "metric": "", "note": "",
        }  # fmt: skip
        if len(y_B) < MIN_SUBGROUP:
            lines.append(cell | {"note": f"fewer than {MIN_SUBGROUP} recordings"})
        elif len(np.unique(y_B)) < 2:
            lines.append(cell | {"note": f"all recordings have label {y_B[0]}"})
        else:
            score_NB, decision_NB = method.score_NB[:, rows_B], method.decision_NB[:, rows_B]
            found = with_intervals(y_B, score_NB, decision_NB, subject_B, metrics=ALL_METRICS, **settings._asdict())
            lines += [
                cell | {"metric": metric, "value": of.value, "low": of.low, "high": of.high}
                for metric, of in found.items()
            ]
    return lines


def _abstention(
    group: _Group, method: _Method, doubts: Mapping[str, pd.DataFrame], settings: _Settings
) -> list[dict[str, Any]]:
    """A line of a main table's method for each measure of doubt that all its complete trainings give."""
    if method.problem or len(np.unique(group.y_B)) < 2:
        return []
    lines = []
    for kind, of_NB in doubts.items():
        doubt_NB = of_NB.reindex(index=list(method.seed_N), columns=group.record_B).to_numpy(dtype=float)
        if np.isnan(doubt_NB).any():
            continue
        found = abstention.set_aside(group.y_B, method.score_NB, doubt_NB, group.subject_B, **settings._asdict())
        cell = {"leads": group.leads, "method": method.name, "doubt": kind, "recordings": len(group.y_B)}
        lines.append(cell | abstention.figures(found))
    return lines


# --- files ----------------------------------------------------------------------------------------------------


def _frame(lines: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    return pd.DataFrame(list(lines), columns=_COLUMNS[name])


def _require_columns(table: pd.DataFrame, name: str) -> None:
    absent = [column for column in _COLUMNS[name] if column not in table.columns]
    if absent:
        raise LsemvaeError(f"{name} lacks the columns {', '.join(absent)}")


@contextmanager
def _required(place: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LsemvaeError(f"{place.uri} has no {name}: run the evaluation again") from None


def _content(place: Storage, name: str) -> bytes:
    with _required(place, name):
        return place.read_bytes(name)


def _facts(place: Storage, name: str) -> dict[str, Any]:
    with _required(place, name):
        return place.read_json(name, "Run the evaluation again")


def _table(place: Storage, name: str) -> pd.DataFrame:
    """A CSV of this module. An empty cell is an empty text or NaN, as its column is of texts or of numbers."""
    texts = [column for column in _COLUMNS[name] if column in _TEXT]
    table = pd.read_csv(
        io.BytesIO(_content(place, f"{name}.csv")), dtype=dict.fromkeys(texts, str), na_values="", keep_default_na=False
    )
    _require_columns(table, name)
    return table.fillna(dict.fromkeys(texts, ""))
