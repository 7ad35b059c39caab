"""The cells of a comparison: one training each, on Ray Tune. A finished cell is kept and not run again.

A cell trains one row of the table with one seed on the training recordings of one fold, and scores the recordings of
that fold. Fold -1 trains on all recordings; such a cell scores other cohorts.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lsemvae.config import FinetuneRecipe
from lsemvae.errors import DamagedFile, LsemvaeError
from lsemvae.evaluation.embedding import Embedded
from lsemvae.evaluation.folds import Fold, make_folds
from lsemvae.evaluation.linear import train_linear
from lsemvae.fields import as_json
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts.doubt import distance
from lsemvae.models.parts.head import Head
from lsemvae.progress import Bar
from lsemvae.storage import Storage
from lsemvae.training.batched_heads import Training, train_heads
from lsemvae.training.finetune import Inputs, from_scratch, logits_and_doubts, train_all, train_head
from lsemvae.training.grid import digest

log = logging.getLogger(__name__)

ALL = -1
"""The fold that trains on all recordings."""
MAIN = "main"
_DOUBTS = "/doubts"
"""In a finished cell's file, beside the names of test sets, which hold no slash at their start."""


class Row(NamedTuple):
    """A line of the table: what is trained and how.

    features   for frozen features, their name in `Embedded` for each seed; for `all` only their number counts
    scratch    `all` starts from random weights, with the recipe's schedule for that
    made_of    digest of the encoder or of the architecture that the row is trained on
    input      for `all`, the name of its model input in `Embedded.inputs`
    """

    name: str
    trains: Literal["head", "linear", "all"]
    features: tuple[str, ...]
    recipe: FinetuneRecipe
    scratch: bool = False
    made_of: str = ""
    input: str = ""

    @property
    def seeds(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Variant:
    """Which training recordings a cell uses: all of its fold's, or some of them, the same for every method.

    share       share of the subjects
    positives   share of positive recordings; the class that has too many is thinned
    """

    analysis: str = MAIN
    setting: str = ""
    share: float = 1.0
    positives: float | None = None

    def rows(self, rows: np.ndarray, y_B: np.ndarray, subject_B: np.ndarray, seed: int) -> np.ndarray:
        """The chosen ones of `rows`. A smaller share is part of a larger one."""
        rng = np.random.default_rng([seed, len(rows)])
        if self.share < 1:
            kept = []
            positive = set(subject_B[rows][y_B[rows] == 1])
            for group in (sorted(positive), sorted(set(subject_B[rows]) - positive)):  # stratified by subject
                shuffled = rng.permutation(len(group))[: max(1, round(self.share * len(group)))]
                kept += [group[place] for place in shuffled]
            rows = rows[np.isin(subject_B[rows], kept)]
        if self.positives is not None:
            ones, zeros = rows[y_B[rows] == 1], rows[y_B[rows] == 0]
            total = min(len(ones) / self.positives, len(zeros) / (1 - self.positives))
            ones = rng.permutation(ones)[: max(1, round(total * self.positives))]
            zeros = rng.permutation(zeros)[: max(1, round(total * (1 - self.positives)))]
            rows = np.sort(np.concatenate([ones, zeros]))
        return rows


class Cell(NamedTuple):
    """One training."""

    row: Row
    seed: int
    fold: int
    variant: Variant = Variant()

    @property
    def name(self) -> str:
        """Its file: readable, and different for another recipe or encoder."""
        row, variant = self.row, self.variant
        made_of = [row.trains, row.scratch, row.made_of, as_json(row.recipe), variant.share, variant.positives]
        words = [row.name, variant.setting, str(self.seed), str(self.fold), digest(*made_of)]
        text = " ".join(word for word in words if word).replace(", ", "-").replace(" ", "-")
        return "".join(c for c in text if c.isalnum() or c in "-._")


@dataclass(frozen=True)
class Material:
    """What the cells of one lead set train and test on.

    starts   by row name, the classifier that `all` starts from: pre-trained, or an architecture from scratch
    noisy    the same recordings with noise, by the noise's name; each fold's test recordings are scored there too
    others   other cohorts, which cells of the fold ALL score
    """

    embedded: Embedded
    folds: list[Fold]
    starts: Mapping[str, Classifier] = field(default_factory=dict)
    noisy: Mapping[str, Embedded] = field(default_factory=dict)
    others: Mapping[str, Embedded] = field(default_factory=dict)

    def train_rows(self, cell: Cell) -> np.ndarray:
        y_B, subject_B = self.embedded.y_B, self.embedded.subject_B
        rows = np.arange(len(y_B)) if cell.fold == ALL else self.folds[cell.fold][0]
        return cell.variant.rows(rows, y_B, subject_B, cell.row.recipe.optim.seed)

    def tests(self, cell: Cell) -> dict[str, tuple[Embedded, np.ndarray]]:
        """What the cell scores: by name, recordings and which of them. The fold's own has the name ""."""
        if cell.fold == ALL:
            return {name: (other, np.arange(len(other.y_B))) for name, other in self.others.items()}
        rows = self.folds[cell.fold][1]
        found = {"": (self.embedded, rows)}
        if cell.variant.analysis == MAIN:
            found |= {name: (noisy, rows) for name, noisy in self.noisy.items()}
        return found


@dataclass(frozen=True)
class Trials:
    """How the trainings run on Ray.

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


@dataclass
class Ran:
    """Scores by cell and test set, doubts by cell and measure, and why cells failed.

    Doubts are of the fold's own test recordings, by cells of the main table; runs of before them have none.
    """

    scores: dict[Cell, dict[str, np.ndarray]] = field(default_factory=dict)
    doubts: dict[Cell, dict[str, np.ndarray]] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)


def cells_of(rows: Sequence[Row], folds: int, variants: Iterable[Variant] = (Variant(),)) -> list[Cell]:
    """Every row with every seed on every fold."""
    return [
        Cell(row, s, f, variant) for variant in variants for row in rows for s in range(row.seeds) for f in range(folds)
    ]


def train_row(cell: Cell, material: Material, device: str = "cpu") -> Head | Classifier:
    """Train what the cell says: a head for frozen features, or a whole classifier."""
    row, embedded, rows = cell.row, material.embedded, material.train_rows(cell)
    recipe = replace(row.recipe, optim=replace(row.recipe.optim, seed=row.recipe.optim.seed + cell.seed))
    y_B, subject_B = embedded.y_B[rows], embedded.subject_B[rows]
    if row.trains == "all":
        start = material.starts[row.name]
        if row.scratch:
            recipe = from_scratch(recipe)
            torch.manual_seed(recipe.optim.seed)
            start = Classifier(start.config, start.leads)
        held_out = make_folds(y_B, subject_B, recipe.inner_folds, recipe.optim.seed)[0] if recipe.early_stop else None
        return train_all(start, _inputs(embedded, rows, row.input), recipe, held_out, device)
    name = row.features[cell.seed]
    h_BF, observed_BF = embedded.h_BF[name][rows], embedded.observed_BF[name][rows]
    if row.trains == "linear":
        return train_linear(h_BF, observed_BF, y_B, subject_B, recipe)
    return train_head(h_BF, observed_BF, y_B, recipe, device)


def train_together(cells: Sequence[Cell], material: Material, device: str = "cpu") -> Sequence[Head | Classifier]:
    """Train cells of one of `groups`, as `train_row` does."""
    first = cells[0]
    if len(cells) == 1:
        return [train_row(first, material, device)]
    embedded, name, seed = material.embedded, first.row.features[first.seed], first.row.recipe.optim.seed
    trainings = [Training(material.train_rows(cell), seed + cell.seed) for cell in cells]
    tables = embedded.h_BF[name][:], embedded.observed_BF[name][:], embedded.y_B
    return train_heads(*tables, trainings, first.row.recipe, device)


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that are trained together: the heads of a row and variant on the same features. All others are alone."""
    found: dict[Any, list[Cell]] = {}
    for cell in cells:
        row = cell.row
        key = (row, cell.variant, row.features[cell.seed]) if row.trains == "head" else cell
        found.setdefault(key, []).append(cell)
    return list(found.values())


class Judged(NamedTuple):
    """Scores of recordings, and by measure how doubtful each is; see `lsemvae.models.parts.doubt`."""

    score_B: np.ndarray
    doubts: dict[str, np.ndarray]


def judge(trained: Head | Classifier, cell: Cell, embedded: Embedded, rows: np.ndarray, device: str) -> Judged:
    """Scores of these recordings, with every measure of doubt that the model gives."""
    if isinstance(trained, Classifier):
        trained = trained.to(device)
        logit_B, doubts = logits_and_doubts(trained, _inputs(embedded, rows, cell.row.input), trained.doubts, device)
    else:
        name = cell.row.features[cell.seed]
        with torch.inference_mode():
            h_BF, observed_BF = (torch.from_numpy(v[name][rows]) for v in (embedded.h_BF, embedded.observed_BF))
            standard_BF = trained.standardised(h_BF, observed_BF)
            logit_B, doubts = trained.logit_of(standard_BF), {"distance": distance(standard_BF, observed_BF)}
    return Judged(torch.sigmoid(logit_B).numpy(), {kind: doubt_B.numpy() for kind, doubt_B in doubts.items()})


def run_cells(cells: Sequence[Cell], material: Material, trials: Trials, title: str = "trainings") -> Ran:
    """Train and score every cell that `trials.keep` does not have. A cell that fails does not stop the others."""
    ran, kept = Ran(), _Kept(trials.keep)
    missing = []
    for cell in cells:
        if (done := kept.read(cell, material.tests(cell))) is None:
            missing.append(cell)
        else:
            ran.scores[cell], ran.doubts[cell] = done
    with Bar(len(cells), title, "trainings", done=len(cells) - len(missing)) as bar:
        # Frozen features need no GPU.
        for gpus, frozen in ((0.0, True), (trials.gpus, False)):
            group = [cell for cell in missing if (cell.row.trains == "linear") == frozen]
            if group:
                _tune(group, material, replace(trials, gpus=gpus), kept, ran, bar)
    return ran


def _tune(cells: Sequence[Cell], material: Material, trials: Trials, kept: "_Kept", ran: Ran, bar: Any) -> None:
    from ray import tune

    trained_together = groups(cells)

    class Progress(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            group = trained_together[trial.config["group"]]
            for cell, result in zip(group, trial.last_result["cells"], strict=True):
                if "failed" in result:
                    ran.failed[cell] = result["failed"]
                else:
                    ran.scores[cell], ran.doubts[cell] = _arrays(result["scores"]), _arrays(result["doubts"])
                    kept.write(cell, result["scores"], result["doubts"])
            bar.update(len(group))

    with tempfile.TemporaryDirectory() as temporary:
        fitted = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_run_group, groups=trained_together, material=material, device=trials.device),
                {"cpu": 1, "gpu": trials.gpus},
            ),
            param_space={"group": tune.grid_search(list(range(len(trained_together))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=trials.at_once, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=temporary, name="cells", verbose=0, callbacks=[Progress()]),
        ).fit()
    for cell in cells:  # its process ended
        if cell not in ran.scores and cell not in ran.failed:
            error = next((str(e) for e in fitted.errors), "it ended without a result")
            ran.failed[cell] = error.strip().splitlines()[-1]


def _run_group(config: dict[str, Any], groups: Sequence[Sequence[Cell]], material: Material, device: str) -> None:
    """What Tune runs. Reports the outcome of each cell of the group."""
    from ray import tune

    torch.set_num_threads(1)
    tune.report({"cells": outcomes(groups[config["group"]], material, device)})


def outcomes(cells: Sequence[Cell], material: Material, device: str) -> list[dict[str, Any]]:
    """For each cell of a group, its scores by test set and the doubts of the fold, or why there are none."""
    try:
        found = []
        for cell, trained in zip(cells, train_together(cells, material, device), strict=True):
            judged = {name: judge(trained, cell, *test, device) for name, test in material.tests(cell).items()}
            if not all(np.isfinite(of.score_B).all() for of in judged.values()):
                raise ArithmeticError("scores are not finite: the training diverged")
            doubts = judged[""].doubts if "" in judged and cell.variant.analysis == MAIN else {}
            scores = {name: of.score_B.tolist() for name, of in judged.items()}
            found.append({"scores": scores, "doubts": {kind: doubt_B.tolist() for kind, doubt_B in doubts.items()}})
    except (LsemvaeError, ArithmeticError, RuntimeError, ValueError) as error:
        if len(cells) > 1:  # one of them fails: the others must not
            return [outcome for cell in cells for outcome in outcomes([cell], material, device)]
        return [{"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}]
    return found


def _arrays(values: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    return {name: np.array(of) for name, of in values.items()}


def _inputs(embedded: Embedded, rows: np.ndarray, name: str) -> Inputs:
    x_BLT, lead_mask_BL = embedded.inputs[name]
    return Inputs(x_BLT[rows], lead_mask_BL[rows], embedded.y_B[rows])


class _Kept:
    """Scores and doubts of finished cells, a file each."""

    def __init__(self, place: Storage | None) -> None:
        self._place = place

    def read(
        self, cell: Cell, tests: Mapping[str, tuple[Embedded, np.ndarray]]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """Scores and doubts, unless the cell is not finished or has not scored all of these tests."""
        if self._place is None or not self._place.exists(f"{cell.name}.json"):
            return None
        try:
            found = self._place.read_json(f"{cell.name}.json", "It is trained again")
        except DamagedFile as error:
            log.warning(str(error))
            return None
        doubts = found.pop(_DOUBTS, {})  # files of before doubts have none
        if any(len(found.get(name, ())) != len(rows) for name, (_, rows) in tests.items()):
            return None
        return _arrays({name: found[name] for name in tests}), _arrays(doubts)

    def write(
        self, cell: Cell, scores: Mapping[str, Sequence[float]], doubts: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        if self._place is not None:
            content = {**scores, **({_DOUBTS: doubts} if doubts else {})}
            self._place.write_bytes(f"{cell.name}.json", json.dumps(content).encode())
