"""The protocol: cross-validation by Ray Tune, and what it gives, as one result that can write and log itself.

Beside the pre-trained encoder the table always has the naive score, which is the label's mean, classical features, and
an untrained encoder; and where all weights are trained, the same training from random weights. Nothing is chosen on a
test fold: strengths and epochs are chosen on inner folds, and each fold is decided at the threshold that is best on the
other folds' scores.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from lsemvae.bundle import Calibration
from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import calibration
from lsemvae.evaluation.embedding import CLASSICAL, QUANTILES, Embedded
from lsemvae.evaluation.folds import Fold, make_folds, require_subjects
from lsemvae.evaluation.linear import train_linear
from lsemvae.evaluation.metrics import METRICS, Estimate, auroc_difference, best_threshold, with_intervals
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts.head import Head
from lsemvae.plots import curves
from lsemvae.storage import Storage
from lsemvae.tracking import Run
from lsemvae.training.finetune import Inputs, from_scratch, logits, train_all, train_head

UNTRAINED, SCRATCH, NAIVE = "untrained encoder", "from scratch", "naive"
FROZEN = "frozen"
RESULTS, DIFFERENCES, SCORES = "results.csv", "differences.csv", "scores.csv"
CURVES, RELIABILITY = "curves.png", "reliability.png"


class Row(NamedTuple):
    """A line of the table: what is trained, and on which features, one name for each seed."""

    name: str
    trains: Literal["head", "linear", "all"]
    features: tuple[str, ...]


def rows_of(recipe: FinetuneRecipe, title: str) -> list[Row]:
    """The lines of a recipe's table; the first is the pre-trained encoder, whose architecture has this title.

    `features` are names in `Embedded`: the title, `untrained_names`, CLASSICAL and QUANTILES. For `all` they only count
    the seeds.
    """
    seeds, untrained = (title,) * recipe.seeds, tuple(untrained_names(recipe))
    others = [Row(CLASSICAL, "linear", (CLASSICAL,)), Row(QUANTILES, "linear", (QUANTILES,))]
    match recipe.trains:
        case "head":
            return [Row(title, "head", seeds), Row(UNTRAINED, "head", untrained), *others]
        case "linear":
            return [Row(title, "linear", (title,)), Row(UNTRAINED, "linear", untrained), *others]
        case "all":
            return [
                Row(title, "all", seeds),
                Row(f"{title}, {FROZEN}", "linear", (title,)),
                Row(SCRATCH, "all", seeds),
                Row(f"{UNTRAINED}, {FROZEN}", "linear", untrained),
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
    """By row, with intervals; the naive row too. Means over the seeds."""
    differences: dict[str, Estimate]
    """AUROC of the pre-trained encoder minus that of each other row, with paired intervals."""
    errors: dict[str, dict[str, float]]
    """By row, how far probabilities are off: Brier score and expected calibration error, before and after
    calibration, of the first seed."""
    diagrams: dict[str, calibration.Diagram]
    """Of the pre-trained encoder's scores, as they are and calibrated."""

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
        fold_B = np.zeros(len(embedded.y_B), dtype=int)
        for number, (_, test) in enumerate(self.folds):
            fold_B[test] = number
        return pd.DataFrame(
            {
                "record_id": embedded.record_B,
                "subject_id": embedded.subject_B,
                "fold": fold_B,
                "label": embedded.y_B,
                **{
                    f"{name} (seed {seed})" if seed else name: score_B
                    for name, score_NB in self.scores.items()
                    for seed, score_B in enumerate(score_NB)
                },
            }
        )

    def write(self, folder: Path, title: str) -> list[Path]:
        """Write tables and pictures into the folder -> their paths."""
        self.table().to_csv(folder / RESULTS, index=False)
        self.differences_table().to_csv(folder / DIFFERENCES, index=False)
        self.out_of_fold().to_csv(folder / SCORES, index=False)
        first = {name: score_NB[0] for name, score_NB in self.scores.items()}
        curves.discrimination(self.embedded.y_B, first, folder / CURVES, title)
        curves.reliability(self.diagrams, folder / RELIABILITY, title)
        return [folder / name for name in (RESULTS, DIFFERENCES, SCORES, CURVES, RELIABILITY)]

    def numbers(self) -> dict[str, float]:
        """The tables as named numbers, for a tracker: `ROW.METRIC`, with `.low` and `.high` for intervals."""
        estimates = {f"{row}.{metric}": found for row, of in self.metrics.items() for metric, found in of.items()}
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
        run.metrics(self.numbers())

    def _auroc_by_fold(self, row: str) -> list[float]:
        """Means over the seeds."""
        if row not in self.scores:
            return []
        y_B = self.embedded.y_B
        return [
            float(np.mean([roc_auc_score(y_B[test], score_B[test]) for score_B in self.scores[row]]))
            for _, test in self.folds
        ]

    def _spread(self, row: str) -> float:
        """Standard deviation of the AUROC over the seeds."""
        return float(np.std([roc_auc_score(self.embedded.y_B, score_B) for score_B in self.scores[row]], ddof=1))


@dataclass(frozen=True)
class Trials:
    """How the trainings of the protocol run on Ray.

    keep      where finished trainings are kept, so that the same run continues; None keeps nothing
    at_once   trainings at a time, one CPU each
    gpus      share of a GPU for each training; 0 trains on the CPU
    """

    keep: Storage | None = None
    at_once: int = 2
    gpus: float = 0

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def run_protocol(
    embedded: Embedded,
    recipe: FinetuneRecipe,
    title: str,
    start: Classifier | None = None,
    trials: Trials | None = None,
) -> Result:
    """Cross-validate every row of the table.

    `title` is the pre-trained encoder's row. `start` is the classifier on it, with any head, which `all` trains; then
    `embedded` has its model input. Raises LsemvaeError when a class has too few subjects for the folds or the inner
    folds, or a training fails.
    """
    folds = outer_folds(embedded.y_B, embedded.subject_B, recipe)
    rows = rows_of(recipe, title)
    scores = cross_validate(embedded, folds, rows, recipe, start, trials or Trials())
    errors, diagrams = _calibration_errors(embedded, scores, folds)
    settings: dict[str, Any] = {"draws": recipe.bootstrap_draws, "seed": recipe.optim.seed}
    differences = {
        name: auroc_difference(embedded.y_B, scores[title], scores[name], embedded.subject_B, **settings)
        for name in tqdm([row.name for row in rows[1:]], desc="paired differences", unit="row")
    }
    metrics = _with_intervals(embedded, scores, folds, settings)
    return Result(embedded, folds, scores, metrics, differences, errors, diagrams)


def outer_folds(y_B: np.ndarray, subject_B: np.ndarray, recipe: FinetuneRecipe) -> list[Fold]:
    """The recipe's folds. Raises LsemvaeError when a class has too few subjects for them, or for the inner folds that
    the recipe needs."""
    folds = make_folds(y_B, subject_B, recipe.folds, recipe.optim.seed)
    if len(recipe.strengths) > 1 or (recipe.trains == "all" and recipe.early_stop):
        for train, _ in folds:
            require_subjects(y_B[train], subject_B[train], recipe.inner_folds, "--inner-folds")
    return folds


class Job(NamedTuple):
    """One training: a row with one seed, on the training recordings of a fold."""

    row: Row
    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"{self.row.name} {self.seed} {self.fold}".replace(", ", "-").replace(" ", "-")


def train_row(
    job: Job, rows: np.ndarray, embedded: Embedded, recipe: FinetuneRecipe, start: Classifier | None, device: str
) -> Head | Classifier:
    """Train what the job says on these recordings: a head for frozen features, or a whole classifier."""
    recipe = replace(recipe, optim=replace(recipe.optim, seed=recipe.optim.seed + job.seed))
    y_B, subject_B = embedded.y_B[rows], embedded.subject_B[rows]
    if job.row.trains == "all":
        assert start is not None and embedded.x_BLT is not None and embedded.lead_mask_BL is not None
        if job.row.name == SCRATCH:
            recipe = from_scratch(recipe)
            torch.manual_seed(recipe.optim.seed)
            start = Classifier(start.config, start.leads)
        inputs = Inputs(embedded.x_BLT[rows], embedded.lead_mask_BL[rows], y_B)
        held_out = make_folds(y_B, subject_B, recipe.inner_folds, recipe.optim.seed)[0] if recipe.early_stop else None
        return train_all(start, inputs, recipe, held_out, device)
    name = job.row.features[job.seed]
    h_BF, observed_BF = embedded.h_BF[name][rows], embedded.observed_BF[name][rows]
    if job.row.trains == "linear":
        return train_linear(h_BF, observed_BF, y_B, subject_B, recipe)
    return train_head(h_BF, observed_BF, y_B, recipe, device)


def fold_trial(
    config: dict[str, Any],
    jobs: Sequence[Job],
    embedded: Embedded,
    folds: list[Fold],
    recipe: FinetuneRecipe,
    start: Classifier | None,
    device: str,
) -> None:
    """What Tune runs: one training. Reports the scores of the fold's test recordings."""
    from ray import tune

    torch.set_num_threads(1)
    job = jobs[config["job"]]
    train, test = folds[job.fold]
    trained = train_row(job, train, embedded, recipe, start, device)
    if isinstance(trained, Classifier):
        assert embedded.x_BLT is not None and embedded.lead_mask_BL is not None
        inputs = Inputs(embedded.x_BLT[test], embedded.lead_mask_BL[test], embedded.y_B[test])
        logit_B = logits(trained.to(device), inputs, device)
    else:
        name = job.row.features[job.seed]
        with torch.inference_mode():
            h_BF, observed_BF = (torch.from_numpy(v[name][test]) for v in (embedded.h_BF, embedded.observed_BF))
            logit_B = trained.logit(h_BF, observed_BF)
    tune.report({"scores": torch.sigmoid(logit_B).tolist()})


def cross_validate(
    embedded: Embedded,
    folds: list[Fold],
    rows: Sequence[Row],
    recipe: FinetuneRecipe,
    start: Classifier | None,
    trials: Trials,
) -> dict[str, np.ndarray]:
    """Out-of-fold scores by row, [N, B]. Trainings that `trials.keep` has are not run again.

    Raises LsemvaeError when a training fails.
    """
    from ray import tune

    jobs = [Job(row, s, f) for row in rows for s in range(len(row.features)) for f in range(len(folds))]
    kept = _Kept(trials.keep)
    found = {number: done for number, job in enumerate(jobs) if (done := kept.read(job)) is not None}
    missing = [number for number in range(len(jobs)) if number not in found]

    class Progress(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            kept.write(jobs[trial.config["job"]], trial.last_result["scores"])
            bar.update(1)

    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(jobs), initial=len(found), desc="folds", unit="trial") as bar,
    ):
        if missing:
            trainable = tune.with_parameters(
                fold_trial, jobs=jobs, embedded=embedded, folds=folds, recipe=recipe, start=start, device=trials.device
            )
            fitted = tune.Tuner(
                tune.with_resources(trainable, {"cpu": 1, "gpu": trials.gpus}),
                param_space={"job": tune.grid_search(missing)},
                tune_config=tune.TuneConfig(max_concurrent_trials=trials.at_once, reuse_actors=True),
                run_config=tune.RunConfig(storage_path=temporary, name="folds", verbose=0, callbacks=[Progress()]),
            ).fit()
            if fitted.errors:
                raise LsemvaeError(f"a fold failed: {str(fitted.errors[0]).strip().splitlines()[-1]}")
            found |= {result.config["job"]: result.metrics["scores"] for result in fitted}
    scores = {row.name: np.full((len(row.features), len(embedded.y_B)), np.nan) for row in rows}
    for number, values in found.items():
        job = jobs[number]
        scores[job.row.name][job.seed, folds[job.fold][1]] = values
    assert all(np.isfinite(values).all() for values in scores.values())
    return scores


def refit(
    embedded: Embedded, recipe: FinetuneRecipe, title: str, start: Classifier | None, trials: Trials
) -> Head | Classifier:
    """The pre-trained encoder's row trained on all recordings with the first seed, in a Ray task."""
    import ray

    job = Job(rows_of(recipe, title)[0], 0, -1)
    train = ray.remote(num_cpus=1, num_gpus=trials.gpus)(_refitted)
    return ray.get(train.remote(job, embedded, recipe, start, trials.device))


def _refitted(
    job: Job, embedded: Embedded, recipe: FinetuneRecipe, start: Classifier | None, device: str
) -> Head | Classifier:
    return train_row(job, np.arange(len(embedded.y_B)), embedded, recipe, start, device)


class _Kept:
    """Scores of finished trainings, a file each."""

    def __init__(self, place: Storage | None) -> None:
        self._place = place

    def read(self, job: Job) -> list[float] | None:
        if self._place is None or not self._place.exists(f"{job.name}.json"):
            return None
        return json.loads(self._place.read_bytes(f"{job.name}.json"))

    def write(self, job: Job, scores: list[float]) -> None:
        if self._place is not None:
            self._place.write_bytes(f"{job.name}.json", json.dumps(scores).encode())


def decisions(y_B: np.ndarray, score_B: np.ndarray, folds: list[Fold]) -> np.ndarray:
    """Each fold's decisions at the threshold that is best on the other folds' scores, [B] bool."""
    decision_B = np.zeros(len(y_B), dtype=bool)
    for train, test in folds:
        decision_B[test] = score_B[test] >= best_threshold(y_B[train], score_B[train])
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
        name: with_intervals(embedded.y_B, score_NB, decision_NB, embedded.subject_B, **settings)
        for name, (score_NB, decision_NB) in tqdm(rows.items(), desc="bootstrap", unit="row")
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
