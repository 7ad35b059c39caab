"""The protocol: cross-validation by Ray Tune, and what it gives, as one result that can write and log itself.

Two rows stand beside the encoder's: the naive score, which is the label's mean, and the same head on an untrained
encoder. Each fold is decided at the threshold that is best on the other folds' scores, never on its own labels.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from lsemvae.bundle import Calibration
from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import calibration
from lsemvae.evaluation.embedding import Embedded
from lsemvae.evaluation.folds import Fold, make_folds
from lsemvae.evaluation.metrics import METRICS, Estimate, best_threshold, with_intervals
from lsemvae.plots import curves
from lsemvae.tracking import Run
from lsemvae.training.finetune import train_head

ENCODER, UNTRAINED, NAIVE = "LS-EMVAE", "untrained encoder", "naive"
RESULTS, SCORES, CURVES, RELIABILITY = "results.csv", "scores.csv", "curves.png", "reliability.png"


@dataclass(frozen=True)
class Result:
    """Out-of-fold scores of every row of the table, and what follows from them."""

    embedded: Embedded
    folds: list[Fold]
    scores: dict[str, np.ndarray]
    """By row, [B]; the naive row is not among them."""
    metrics: dict[str, dict[str, Estimate]]
    """By row, with intervals; the naive row too."""
    errors: dict[str, dict[str, float]]
    """By row, how far probabilities are off: Brier score and expected calibration error, before and after
    calibration."""
    diagrams: dict[str, calibration.Diagram]
    """Of the encoder's scores, as they are and calibrated."""

    @property
    def threshold(self) -> float:
        """Best on all out-of-fold scores of the encoder: what the refitted model decides at."""
        return best_threshold(self.embedded.y_B, self.scores[ENCODER])

    @cached_property
    def calibration(self) -> Calibration | None:
        """From the encoder's out-of-fold scores to probabilities; None where higher scores mean no more positives."""
        weight_B = calibration.subject_weights(self.embedded.subject_B)
        return calibration.fit_sigmoid(self.embedded.y_B, self.scores[ENCODER], weight_B)

    def table(self) -> pd.DataFrame:
        """A line for each row: metrics with intervals, the AUROC of the folds, calibration errors."""
        lines = []
        for name, metrics in self.metrics.items():
            folds = self._auroc_by_fold(name)
            mean_of_folds = f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}" if folds else "-"
            line = {"scored by": name} | {m.upper(): str(metrics[m]) for m in METRICS}
            line |= {"AUROC of folds": mean_of_folds}
            errors = self.errors[name]
            line |= {error: f"{errors[error]:.3f}" if error in errors else "-" for error in self.errors[ENCODER]}
            lines.append(line)
        return pd.DataFrame(lines)

    def out_of_fold(self) -> pd.DataFrame:
        """A line for each recording: its ids, fold, label and scores."""
        embedded = self.embedded
        fold_B = np.zeros(len(embedded.y_B), dtype=int)
        for number, (_, test) in enumerate(self.folds):
            fold_B[test] = number
        return pd.DataFrame(
            {
                "record_id": embedded.record_B,
                "subject_id": embedded.subject_B,
                "fold": fold_B,
                "label": embedded.y_B,
                **self.scores,
            }
        )

    def write(self, folder: Path, title: str) -> list[Path]:
        """Write tables and pictures into the folder -> their paths."""
        self.table().to_csv(folder / RESULTS, index=False)
        self.out_of_fold().to_csv(folder / SCORES, index=False)
        curves.discrimination(self.embedded.y_B, self.scores, folder / CURVES, title)
        curves.reliability(self.diagrams, folder / RELIABILITY, title)
        return [folder / name for name in (RESULTS, SCORES, CURVES, RELIABILITY)]

    def numbers(self) -> dict[str, float]:
        """The table as named numbers, for a tracker: `ROW.METRIC`, with `.low` and `.high` for intervals."""
        found = {
            f"{row.replace(' ', '_')}.{metric}{suffix}": value
            for row, metrics in self.metrics.items()
            for metric, estimate in metrics.items()
            for suffix, value in (("", estimate.value), (".low", estimate.low), (".high", estimate.high))
        }
        return found | {
            f"{row}.{name.lower()}".replace(" ", "_"): value
            for row, values in self.errors.items()
            for name, value in values.items()
        }

    def log(self, run: Run, files: Sequence[Path]) -> None:
        """Log the numbers, and the files that `write` wrote, to a tracked run."""
        for path in files:
            run.file(path)
        run.metrics(self.numbers())

    def _auroc_by_fold(self, row: str) -> list[float]:
        if row not in self.scores:
            return []
        y_B, score_B = self.embedded.y_B, self.scores[row]
        return [float(roc_auc_score(y_B[test], score_B[test])) for _, test in self.folds]


def run_protocol(
    embedded: Embedded, recipe: FinetuneRecipe, name: str, storage: str | None = None, max_concurrent: int = 2
) -> Result:
    """Cross-validate a head on every encoder's embeddings.

    `storage` is where Ray Tune keeps its trials, a temporary folder by default; `name` names them there.
    """
    folds = make_folds(embedded.y_B, embedded.subject_B, recipe.folds, recipe.optim.seed)
    scores = cross_validate(embedded, folds, recipe, name, storage, max_concurrent)
    errors, diagrams = _calibration_errors(embedded, scores, folds)
    return Result(embedded, folds, scores, _with_intervals(embedded, scores, folds, recipe), errors, diagrams)


def fold_trial(config: dict[str, Any], embedded: Embedded, folds: list[Fold], recipe: FinetuneRecipe) -> None:
    """What Tune runs: one head on one fold of one encoder. Reports the scores of its test recordings."""
    from ray import tune

    torch.set_num_threads(1)
    train, test = folds[config["fold"]]
    h_BF, observed_BF = embedded.h_BF[config["row"]], embedded.observed_BF[config["row"]]
    head = train_head(h_BF[train], observed_BF[train], embedded.y_B[train], recipe)
    with torch.inference_mode():
        score_B = head.predict(torch.from_numpy(h_BF[test]), torch.from_numpy(observed_BF[test]))
    tune.report({"scores": score_B.tolist()})


def cross_validate(
    embedded: Embedded,
    folds: list[Fold],
    recipe: FinetuneRecipe,
    name: str,
    storage: str | None,
    max_concurrent: int,
) -> dict[str, np.ndarray]:
    """Out-of-fold scores by encoder, [B]. Raises LsemvaeError when a fold fails."""
    from ray import tune

    class Progress(tune.Callback):
        def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
            bar.update(1)

    rows = list(embedded.h_BF)
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(rows) * len(folds), desc="folds", unit="trial") as bar,
    ):
        trainable = tune.with_parameters(fold_trial, embedded=embedded, folds=folds, recipe=recipe)
        fitted = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"row": tune.grid_search(rows), "fold": tune.grid_search(list(range(len(folds))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=storage or temporary, name=f"folds-{name}", verbose=0, callbacks=[Progress()]
            ),
        ).fit()
        if fitted.errors:
            raise LsemvaeError(f"a fold failed: {str(fitted.errors[0]).strip().splitlines()[-1]}")
        scores = {row: np.full(len(embedded.y_B), np.nan) for row in rows}
        for result in fitted:
            scores[result.config["row"]][folds[result.config["fold"]][1]] = result.metrics["scores"]
    assert all(np.isfinite(values).all() for values in scores.values())
    return scores


def decisions(y_B: np.ndarray, score_B: np.ndarray, folds: list[Fold]) -> np.ndarray:
    """Each fold's decisions at the threshold that is best on the other folds' scores, [B] bool."""
    decision_B = np.zeros(len(y_B), dtype=bool)
    for train, test in folds:
        decision_B[test] = score_B[test] >= best_threshold(y_B[train], score_B[train])
    return decision_B


def _with_intervals(
    embedded: Embedded, scores: Mapping[str, np.ndarray], folds: list[Fold], recipe: FinetuneRecipe
) -> dict[str, dict[str, Estimate]]:
    naive_B = np.full(len(embedded.y_B), embedded.y_B.mean())
    rows = {name: (score_B, decisions(embedded.y_B, score_B, folds)) for name, score_B in scores.items()}
    rows[NAIVE] = (naive_B, naive_B >= 0.5)
    return {
        name: with_intervals(
            embedded.y_B,
            score_B,
            decision_B,
            embedded.subject_B,
            draws=recipe.bootstrap_draws,
            seed=recipe.optim.seed,
        )
        for name, (score_B, decision_B) in tqdm(rows.items(), desc="bootstrap", unit="row")
    }


def _calibration_errors(
    embedded: Embedded, scores: Mapping[str, np.ndarray], folds: list[Fold]
) -> tuple[dict[str, dict[str, float]], dict[str, calibration.Diagram]]:
    """Brier score and expected calibration error by row, of the scores as they are and calibrated on other folds."""
    y_B, weight_B = embedded.y_B, calibration.subject_weights(embedded.subject_B)
    errors: dict[str, dict[str, float]] = {}
    diagrams: dict[str, calibration.Diagram] = {}
    for row, score_B in {**scores, NAIVE: np.full(len(y_B), y_B.mean())}.items():
        errors[row] = {}
        for kind, p_B in (("", score_B), ("calibrated", calibration.cross_fitted(y_B, score_B, weight_B, folds))):
            if p_B is None:
                continue
            errors[row][f"Brier {kind}".strip()] = calibration.brier(y_B, p_B, weight_B)
            errors[row][f"ECE {kind}".strip()] = calibration.expected_calibration_error(y_B, p_B, weight_B)
            if row == ENCODER:
                diagrams[f"{kind}, cross-fitted" if kind else "score"] = calibration.diagram(y_B, p_B, weight_B)
    return errors, diagrams
