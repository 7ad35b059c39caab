"""One lead set of a comparison: the cohort as its methods see it, and all its trainings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lsemvae import __version__
from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention, plan
from lsemvae.evaluation.cells import MAIN, Material, Ran, Trials, run_cells
from lsemvae.evaluation.embedding import Embedded, Pretrained, embed, merged, untrained
from lsemvae.evaluation.folds import Fold, given_folds, make_folds, require_subjects
from lsemvae.evaluation.methods import REFERENCE, Method
from lsemvae.evaluation.plan import Plan
from lsemvae.leads import lead_set_name
from lsemvae.preprocess import PreprocessConfig
from lsemvae.storage import Storage
from lsemvae.training.grid import digest


@dataclass(frozen=True)
class Cohort:
    """The labelled recordings, sorted by id, and their folds.

    people   record_id, subject_id, label, fold, female (1, 0 or NaN), age_years (NaN where it is not known)
    """

    data: ShardedDataset
    task: str
    people: pd.DataFrame
    folds: list[Fold]
    about_folds: str


def read_people(data: ShardedDataset, task: str, fold: str | None = None) -> pd.DataFrame:
    """The labelled recordings, sorted by id: `Cohort.people`, with the folds of the column `fold`, or NaN.

    Raises LsemvaeError where the data set has no such label or column.
    """
    columns = {"label": data.require_label(task)} | ({"fold": data.require_column(fold)} if fold else {})
    columns |= {name: data.require_column(name) for name in ("female", "age_years") if name in data.manifest.labels}
    read = data.read(["record_id", "subject_id", *dict.fromkeys(columns.values())]).to_pandas()
    people = read[["record_id", "subject_id"]].astype(str)
    for name in ("label", "fold", "female", "age_years"):
        people[name] = read[columns[name]].astype(float) if name in columns else np.nan
    return people[people["label"].notna()].sort_values("record_id", ignore_index=True)


def read_cohort(uri: str, task: str, folds: str, recipe: FinetuneRecipe) -> Cohort:
    """The cohort of the shards at `uri` with the folds that `folds` gives: a number, or a column that holds them.

    Raises LsemvaeError where the task or the folds cannot be had.
    """
    data = ShardedDataset.open(uri)
    people = read_people(data, task, None if folds.isdecimal() else folds)
    y_B, subject_B = people["label"].to_numpy().astype(int), people["subject_id"].to_numpy(str)
    if not folds.isdecimal():
        found = given_folds(people["fold"].to_numpy(), y_B, subject_B, folds)
        about = f"{len(found)} folds, given by {folds}"
    else:
        found = make_folds(y_B, subject_B, int(folds), recipe.optim.seed)
        about = f"{len(found)} folds, stratified by label, each subject in one of them"
    for train, _ in found:
        require_subjects(y_B[train], subject_B[train], recipe.inner_folds, "--folds, or the recipe's inner_folds,")
    for number, (_, test) in enumerate(found):
        people.loc[test, "fold"] = number
    return Cohort(data, task, people.astype({"label": int, "fold": int}), found, about)


@dataclass(frozen=True)
class Setup:
    """What is the same for every lead set.

    encoders   of the methods that pre-train, by name; LS-EMVAE's among them
    external   another labelled cohort
    wanted     names of the analyses
    keep       where finished trainings are kept
    """

    cohort: Cohort
    methods: Sequence[Method]
    encoders: Mapping[str, Pretrained]
    training: FinetuneRecipe
    supervised: FinetuneRecipe
    keep: Storage
    external: ShardedDataset | None = None
    wanted: Sequence[str] = ()
    at_once: int = 2
    gpus: float = 0

    @property
    def inputs(self) -> dict[str, PreprocessConfig]:
        """The preprocessing of each model input, by its digest; LS-EMVAE's first."""
        first = self.encoders[REFERENCE].preprocess
        return {first.digest: first} | {e.preprocess.digest: e.preprocess for e in self.encoders.values()}


@dataclass(frozen=True)
class LeadSet:
    """A lead set with all its trainings done. `analysis` is the one that it belongs to."""

    leads: tuple[str, ...]
    analysis: str
    planned: Plan
    material: Material
    trials: Trials
    ran: Ran = field(default_factory=Ran)

    @property
    def name(self) -> str:
        return lead_set_name(self.leads)

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Scores and failed trainings, as `lsemvae.evaluation.compare.Scores` has them."""
        return plan.table(self.ran, self.material, self.leads, self.analysis)

    def doubts(self) -> pd.DataFrame:
        """Doubts of the main table's rows, as `lsemvae.evaluation.compare.Scores` has them; none of other analyses."""
        ran = self.ran if self.analysis == MAIN else Ran()
        return abstention.table(abstention.out_of_fold(ran, self.material), self.material.embedded.record_B, self.name)


def evaluate(setup: Setup, leads: tuple[str, ...], analysis: str) -> LeadSet:
    """Embed the cohort for these leads and run every training. A training that fails does not stop the others."""
    seed, reference = setup.training.optim.seed, setup.encoders[REFERENCE]
    random = [untrained(reference.model, seed + number) for number in range(setup.training.seeds)]
    planned = plan.plan(setup.methods, setup.encoders, random, leads, setup.training, setup.supervised)
    data, main = setup.cohort.data, analysis == MAIN
    material = _material(setup, planned, leads, main=main)
    made_of = digest(
        data.manifest.digest, data.since_ingest, setup.cohort.task, leads, setup.cohort.about_folds, seed,
        reference.preprocess.digest, setup.external.manifest.digest if setup.external else "", __version__,
    )  # fmt: skip
    trials = Trials(setup.keep / f"cells-{made_of}", setup.at_once, setup.gpus)
    cells = plan.cells(planned, len(material.folds), setup.wanted, main=main)
    ran = run_cells(cells, material, trials, lead_set_name(leads))
    return LeadSet(leads, analysis, planned, material, trials, ran)


def _material(setup: Setup, planned: Plan, leads: tuple[str, ...], *, main: bool) -> Material:
    """The cohort as the lead set's methods see it: as it is, with each noise, and the other cohort."""
    needed = {row.input for row in planned.rows if row.trains == "all"}
    used = [name for name in setup.inputs if name in planned.encoders or name in needed] or [next(iter(setup.inputs))]

    def seen(data: ShardedDataset, what: str = "", noise: Any = None) -> Embedded:
        title = ", ".join(part for part in (lead_set_name(leads), what) if part)
        parts = [
            embed(
                data, setup.cohort.task, leads, setup.inputs[name], planned.encoders.get(name, {}),
                setup.training.embed_batch_size, keep_input=name in needed, name=name, gpus=setup.gpus, noise=noise,
                title=f"embed {title}",
            )
            for name in used
        ]  # fmt: skip
        return merged(parts)

    embedded = seen(setup.cohort.data)
    folds = _accepted(setup.cohort, embedded)
    noisy = {noise.name: seen(setup.cohort.data, noise.name, noise) for noise in plan.noises(setup.wanted, main=main)}
    others = {}
    if setup.external and main:
        others[setup.external.manifest.cohort] = seen(setup.external, "external")
    return Material(embedded, folds, planned.starts, noisy, others)


def _accepted(cohort: Cohort, embedded: Embedded) -> list[Fold]:
    """The cohort's folds without the recordings that preprocessing refused, as rows of `embedded`."""
    fold_of = dict(zip(cohort.people["record_id"], cohort.people["fold"], strict=True))
    fold_B = np.array([fold_of[record] for record in embedded.record_B])
    folds = [
        (np.flatnonzero(fold_B != number), np.flatnonzero(fold_B == number)) for number in range(len(cohort.folds))
    ]
    for number, (_, test) in enumerate(folds):
        if len(np.unique(embedded.y_B[test])) < 2:
            raise LsemvaeError(
                f"fold {number} has one class only among the {len(test)} recordings that preprocessing accepts: "
                "give fewer folds"
            )
    return folds
