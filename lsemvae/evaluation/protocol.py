"""The protocol: cross-validation by Ray Tune, and what it gives, as one result that can write and log itself.

Beside the pre-trained encoder the table always has the naive score, which is the label's mean, classical features, and
an untrained encoder; and where all weights are trained, the same training from random weights. Nothing is chosen on a
test fold: strengths and epochs are chosen on inner folds, and each fold is decided at the threshold that is best on the
other folds' scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsemvae.bundle import Calibration
from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention, calibration
from lsemvae.evaluation.cells import ALL, MAIN, Cell, Material, Ran, Row, Trials, cells_of, run_cells, train_row
from lsemvae.evaluation.compare import Scores, failures, scored
from lsemvae.evaluation.embedding import CLASSICAL, QUANTILES, Embedded
from lsemvae.evaluation.folds import Fold, fold_of, make_folds, require_subjects
from lsemvae.evaluation.metrics import ALL_METRICS, METRICS, Estimate, auroc_difference, best_threshold, with_intervals
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts.head import Head
from lsemvae.progress import Bar, over
from lsemvae.tracking import Run

UNTRAINED, SCRATCH, NAIVE = "untrained encoder", "from scratch", "naive"
FROZEN = "frozen"
RESULTS, DIFFERENCES, SCORES = "results.csv", "differences.csv", "scores.csv"
CURVES, RELIABILITY = "curves.png", "reliability.png"


def rows_of(recipe: FinetuneRecipe, title: str) -> list[Row]:
    """The lines of a recipe's table; the first is the pre-trained encoder, whose architecture has this title.

    Frozen features are named in `Embedded`: the title, `untrained_names`, CLASSICAL and QUANTILES.
    """
    seeds, untrained = (title,) * recipe.seeds, tuple(untrained_names(recipe))
    others = [Row(name, "linear", (name,), recipe) for name in (CLASSICAL, QUANTILES)]
    match recipe.trains:
        case "head":
            return [Row(title, "head", seeds, recipe), Row(UNTRAINED, "head", untrained, recipe), *others]
        case "linear":
            return [Row(title, "linear", (title,), recipe), Row(UNTRAINED, "linear", untrained, recipe), *others]
        case "all":
            return [
                Row(title, "all", seeds, recipe),
                Row(f"{title}, {FROZEN}", "linear", (title,), recipe),
                Row(SCRATCH, "all", seeds, recipe, scratch=True),
                Row(f"{UNTRAINED}, {FROZEN}", "linear", untrained, recipe),
                *others,
            ]


def untrained_names(recipe: FinetuneRecipe) -> list[str]:
    """A name for the features of the untrained encoder of each seed."""
    return [f"{UNTRAINED} {seed}" for seed in range(recipe.seeds)]


@dataclass(frozen=True)
class Result:
    """Out-of-fold scores of every row of the table, and what follows from them. N seeds, B recordings."""

    embedded: Embedded
    folds: list[Fold]
    scores: dict[str, np.ndarray]
    """By row, [N, B]; the first is the pre-trained encoder, and the naive row is not among them."""
    metrics: dict[str, dict[str, Estimate]]
    """By row, every one of ALL_METRICS with intervals; the naive row too. Means over the seeds."""
    differences: dict[str, Estimate]
    """AUROC of the pre-trained encoder minus that of each other row, with paired intervals."""
    errors: dict[str, dict[str, float]]
    """By row, how far probabilities are off: Brier score and expected calibration error, before and after
    calibration, of the first seed."""
    diagrams: dict[str, calibration.Diagram]
    """Of the pre-trained encoder's scores, as they are and calibrated."""
    doubts: Mapping[tuple[str, int, str], np.ndarray] = field(default_factory=dict)
    """By row, seed and measure, [B]; see `lsemvae.models.parts.doubt`."""

    @property
    def title(self) -> str:
        """The pre-trained encoder's row."""
        return next(iter(self.scores))

    @property
    def score_B(self) -> np.ndarray:
        """Out-of-fold scores of the pre-trained encoder with the first seed, which the refitted model uses too."""
        return self.scores[self.title][0]

    @property
    def threshold(self) -> float:
        """Best on all out-of-fold scores of the encoder: what the refitted model decides at."""
        return best_threshold(self.embedded.y_B, self.score_B)

    @cached_property
    def calibration(self) -> Calibration | None:
        """From the encoder's out-of-fold scores to probabilities; None where higher scores mean no more positives."""
        weight_B = calibration.subject_weights(self.embedded.subject_B)
        return calibration.fit_sigmoid(self.embedded.y_B, self.score_B, weight_B)

    def table(self) -> pd.DataFrame:
        """A line for each row: metrics with intervals, the AUROC of the folds, calibration errors."""
        lines = []
        for name, metrics in self.metrics.items():
            folds = self._auroc_by_fold(name)
            mean_of_folds = f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}" if folds else "-"
            line = {"scored by": name} | {m.upper(): str(metrics[m]) for m in METRICS}
            line |= {"AUROC of folds": mean_of_folds}
            errors = self.errors[name]
            line |= {error: f"{errors[error]:.3f}" if error in errors else "-" for error in self.errors[self.title]}
            if len(self.scores[self.title]) > 1:
                seeds = len(self.scores[name]) if name in self.scores else 1
                line |= {"seeds": f"{seeds} (SD {self._spread(name):.3f})" if seeds > 1 else "1"}
            lines.append(line)
        return pd.DataFrame(lines)

    def differences_table(self) -> pd.DataFrame:
        """A line for each other row: the pre-trained encoder's AUROC minus that row's, and whether 0 is excluded."""
        return pd.DataFrame(
            {
                "compared with": name,
                f"AUROC of {self.title} minus its AUROC": f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
                "interval excludes 0": "yes" if found.low > 0 or found.high < 0 else "no",
            }
            for name, found in self.differences.items()
        )

    def out_of_fold(self) -> pd.DataFrame:
        """A line for each recording: its ids, fold, label and scores. Other seeds than the first are named."""
        embedded = self.embedded
        return pd.DataFrame(
            {
                "record_id": embedded.record_B,
                "subject_id": embedded.subject_B,
                "fold": fold_of(self.folds, len(embedded.y_B)),
                "label": embedded.y_B,
                **{
                    f"{name} (seed {seed})" if seed else name: score_B
                    for name, score_NB in self.scores.items()
                    for seed, score_B in enumerate(score_NB)
                },
            }
        )

    def as_scores(self, facts: Mapping[str, Any], people: pd.DataFrame, leads: str) -> Scores:
        """The same scores as `lsemvae.evaluation.compare` takes them, with each fold's decisions.

        `people` is what `lsemvae.evaluation.lead_set.read_people` gives.
        """
        y_B, record_B = self.embedded.y_B, self.embedded.record_B
        fold_B = fold_of(self.folds, len(y_B))
        parts = [
            scored(MAIN, "", leads, name, seed, record_B, fold_B, score_B, decisions(y_B, score_B, self.folds))
            for name, score_NB in self.scores.items()
            for seed, score_B in enumerate(score_NB)
        ]
        kept = people.set_index("record_id").loc[record_B].reset_index().assign(fold=fold_B)
        doubts = abstention.table(self.doubts, record_B, leads)
        return Scores(facts, kept.astype({"label": int}), pd.concat(parts, ignore_index=True), failures(()), doubts)

    def write(self, folder: Path, title: str) -> list[Path]:
        """Write tables and pictures into the folder -> their paths."""
        from lsemvae.plots import curves  # imports matplotlib

        self.table().to_csv(folder / RESULTS, index=False)
        self.differences_table().to_csv(folder / DIFFERENCES, index=False)
        self.out_of_fold().to_csv(folder / SCORES, index=False)
        first = {name: score_NB[0] for name, score_NB in self.scores.items()}
        curves.discrimination(self.embedded.y_B, first, folder / CURVES, title)
        curves.reliability(self.diagrams, folder / RELIABILITY, title)
        return [folder / name for name in (RESULTS, DIFFERENCES, SCORES, CURVES, RELIABILITY)]

    def numbers(self) -> dict[str, float]:
        """The tables as named numbers, for a tracker: `ROW.METRIC`, with `.low` and `.high` for intervals."""
        estimates = {f"{row}.{metric}": of[metric] for row, of in self.metrics.items() for metric in METRICS}
        estimates |= {f"difference.{row}.auroc": found for row, found in self.differences.items()}
        found = {
            f"{name}{suffix}": value
            for name, estimate in estimates.items()
            for suffix, value in (("", estimate.value), (".low", estimate.low), (".high", estimate.high))
        }
        found |= {f"{row}.{name.lower()}": value for row, of in self.errors.items() for name, value in of.items()}
        return {name.replace(", ", "_").replace(" ", "_"): value for name, value in found.items()}

    def log(self, run: Run, files: Sequence[Path]) -> None:
        """Log the numbers, and the files that `write` wrote, to a tracked run."""
        for path in files:
            run.file(path)
        run.table("results.json", self.table().to_dict("list"))
        run.metrics(self.numbers())

    def _auroc_by_fold(self, row: str) -> list[float]:
        """Means over the seeds."""
        from sklearn.metrics import roc_auc_score

        if row not in self.scores:
            return []
        y_B = self.embedded.y_B
        return [
            float(np.mean([roc_auc_score(y_B[test], score_B[test]) for score_B in self.scores[row]]))
            for _, test in self.folds
        ]

    def _spread(self, row: str) -> float:
        """Standard deviation of the AUROC over the seeds."""
        from sklearn.metrics import roc_auc_score

        return float(np.std([roc_auc_score(self.embedded.y_B, score_B) for score_B in self.scores[row]], ddof=1))


def material_of(embedded: Embedded, recipe: FinetuneRecipe, title: str, start: Classifier | None = None) -> Material:
    """The recipe's folds of these recordings. `start` is the classifier that `all` trains, with any head; then
    `embedded` has its model input. Raises LsemvaeError when a class has too few subjects."""
    folds = outer_folds(embedded.y_B, embedded.subject_B, recipe)
    return Material(embedded, folds, {title: start, SCRATCH: start} if start else {})


def run_protocol(material: Material, rows: Sequence[Row], trials: Trials | None = None) -> Result:
    """Cross-validate every row of the table; the first is the one that the others are compared with.

    Raises LsemvaeError when a training fails.
    """
    embedded, folds, recipe = material.embedded, material.folds, rows[0].recipe
    ran = _run(material, rows, trials or Trials())
    scores = _out_of_fold(ran, material, rows)
    errors, diagrams = _calibration_errors(embedded, scores, folds)
    settings: dict[str, Any] = {"draws": recipe.bootstrap_draws, "seed": recipe.optim.seed}
    title = rows[0].name
    differences = {
        name: auroc_difference(embedded.y_B, scores[title], scores[name], embedded.subject_B, **settings)
        for name in over([row.name for row in rows[1:]], "paired differences", "rows")
    }
    metrics = _with_intervals(embedded, scores, folds, settings)
    doubts = abstention.out_of_fold(ran, material)
    return Result(embedded, folds, scores, metrics, differences, errors, diagrams, doubts)


def outer_folds(y_B: np.ndarray, subject_B: np.ndarray, recipe: FinetuneRecipe) -> list[Fold]:
    """The recipe's folds. Raises LsemvaeError when a class has too few subjects for them, or for the inner folds that
    the recipe needs."""
    folds = make_folds(y_B, subject_B, recipe.folds, recipe.optim.seed)
    if len(recipe.strengths) > 1 or (recipe.trains == "all" and recipe.early_stop):
        for train, _ in folds:
            require_subjects(y_B[train], subject_B[train], recipe.inner_folds, "--inner-folds")
    return folds


def _run(material: Material, rows: Sequence[Row], trials: Trials) -> Ran:
    ran = run_cells(cells_of(rows, len(material.folds)), material, trials, "folds")
    if ran.failed:
        raise LsemvaeError(f"a fold failed: {next(iter(ran.failed.values()))}")
    return ran


def _out_of_fold(ran: Ran, material: Material, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    scores = {row.name: np.full((row.seeds, len(material.embedded.y_B)), np.nan) for row in rows}
    for cell, found in ran.scores.items():
        scores[cell.row.name][cell.seed, material.folds[cell.fold][1]] = found[""]
    assert all(np.isfinite(values).all() for values in scores.values())
    return scores


def refit(row: Row, material: Material, trials: Trials) -> Head | Classifier:
    """The row trained on all recordings with the first seed, in a Ray task."""
    import ray

    gpus = 0.0 if row.trains == "linear" else trials.gpus
    train = ray.remote(num_cpus=1, num_gpus=gpus)(train_row)
    with Bar(None, "train on all recordings"):
        return ray.get(train.remote(Cell(row, 0, ALL), material, "cuda" if gpus else "cpu"))


def decisions(
    y_B: np.ndarray, score_B: np.ndarray, folds: list[Fold], decided_B: np.ndarray | None = None
) -> np.ndarray:
    """Each fold's decisions at the threshold that is best on the other folds' scores, [B] bool.

    With `decided_B`, these scores of the same recordings are decided at those thresholds.
    """
    decided_B = score_B if decided_B is None else decided_B
    decision_B = np.zeros(len(y_B), dtype=bool)
    for train, test in folds:
        decision_B[test] = decided_B[test] >= best_threshold(y_B[train], score_B[train])
    return decision_B


def _with_intervals(
    embedded: Embedded, scores: Mapping[str, np.ndarray], folds: list[Fold], settings: Mapping[str, Any]
) -> dict[str, dict[str, Estimate]]:
    naive_B = np.full(len(embedded.y_B), embedded.y_B.mean())
    rows = {
        name: (score_NB, np.stack([decisions(embedded.y_B, score_B, folds) for score_B in score_NB]))
        for name, score_NB in scores.items()
    }
    rows[NAIVE] = (naive_B, naive_B >= 0.5)
    return {
        name: with_intervals(embedded.y_B, score_NB, decision_NB, embedded.subject_B, metrics=ALL_METRICS, **settings)
        for name, (score_NB, decision_NB) in over(rows.items(), "bootstrap", "rows")
    }


def _calibration_errors(
    embedded: Embedded, scores: Mapping[str, np.ndarray], folds: list[Fold]
) -> tuple[dict[str, dict[str, float]], dict[str, calibration.Diagram]]:
    """Brier score and expected calibration error by row, of the scores as they are and calibrated on other folds."""
    y_B, weight_B = embedded.y_B, calibration.subject_weights(embedded.subject_B)
    errors: dict[str, dict[str, float]] = {}
    diagrams: dict[str, calibration.Diagram] = {}
    first = {row: score_NB[0] for row, score_NB in scores.items()}
    title = next(iter(first))
    for row, score_B in {**first, NAIVE: np.full(len(y_B), y_B.mean())}.items():
        errors[row] = {}
        for kind, p_B in (("", score_B), ("calibrated", calibration.cross_fitted(y_B, score_B, weight_B, folds))):
            if p_B is None:
                continue
            errors[row][f"Brier {kind}".strip()] = calibration.brier(y_B, p_B, weight_B)
            errors[row][f"ECE {kind}".strip()] = calibration.expected_calibration_error(y_B, p_B, weight_B)
            if row == title:
                diagrams[f"{kind}, cross-fitted" if kind else "score"] = calibration.diagram(y_B, p_B, weight_B)
    return errors, diagrams
