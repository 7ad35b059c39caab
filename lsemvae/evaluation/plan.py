"""What a comparison runs: rows for methods, cells for analyses, and their scores as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.cells import ALL, MAIN, Cell, Material, Ran, Row, Variant, cells_of
from lsemvae.evaluation.compare import failures, scored
from lsemvae.evaluation.embedding import CLASSICAL, QUANTILES, Pretrained
from lsemvae.evaluation.folds import fold_of
from lsemvae.evaluation.methods import REFERENCE, Method
from lsemvae.evaluation.metrics import best_threshold
from lsemvae.evaluation.noise import STRENGTHS
from lsemvae.evaluation.protocol import NAIVE, UNTRAINED, decisions, untrained_names
from lsemvae.leads import lead_set_name, parse_leads
from lsemvae.models import EncoderConfig
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.training.finetune import new_head

LEAD_SETS, ABLATIONS, FEWER, BALANCE, NOISE, EXTERNAL = (
    "lead-sets", "ablations", "fewer-labels", "balance", "noise", "external",
)  # fmt: skip
ANALYSES = (LEAD_SETS, ABLATIONS, FEWER, BALANCE, NOISE, EXTERNAL)
SMALL_SETS = ("I", "II", "III", "aVR", "aVL", "aVF", "I,II,III", "aVR,aVL,aVF")
"""Lead sets that the authors compare beside 6L and 12L."""
VARIANTS = {
    FEWER: [Variant("fewer labels", f"{100 * share:.0f} %", share=share) for share in (0.5, 0.25, 0.1)],
    BALANCE: [
        Variant("class balance", f"{100 * positives:.0f} % positive", positives=positives)
        for positives in (0.25, 0.5, 0.75)
    ],
}


def analyses(words: Sequence[str], *, external: bool) -> tuple[str, ...]:
    """The analyses of these names; `all` are all, `external` where there is another cohort.

    Raises LsemvaeError naming what is unknown, and where `external` has no cohort.
    """
    if "all" in words:
        words = [name for name in ANALYSES if name != EXTERNAL or external]
    if unknown := [word for word in words if word not in ANALYSES]:
        raise LsemvaeError(f"there is no analysis {unknown[0]!r}: choose all, or some of {', '.join(ANALYSES)}")
    if EXTERNAL in words and not external:
        raise LsemvaeError("the analysis external needs another labelled cohort: give --external URI")
    return tuple(dict.fromkeys([*words, *([EXTERNAL] if external else [])]))


def lead_sets(words: Sequence[str], of_analysis: Sequence[str] = ()) -> dict[tuple[str, ...], str]:
    """Lead sets in the order of the tables, each with the analysis that it belongs to."""
    found = {parse_leads(word): MAIN for word in words}
    return {parse_leads(word): "lead sets" for word in of_analysis} | found


@dataclass(frozen=True)
class Plan:
    """The rows of a lead set, and the methods that do not take it, with the reason."""

    rows: list[Row]
    starts: dict[str, Classifier]
    encoders: dict[str, dict[str, Any]]
    """Frozen encoders by the name of their model input, then by the name of their features."""
    refused: dict[str, str]


def plan(
    methods: Sequence[Method],
    encoders: Mapping[str, Pretrained],
    untrained: Sequence[Any],
    leads: tuple[str, ...],
    training: FinetuneRecipe,
    supervised: FinetuneRecipe,
) -> Plan:
    """Rows for the methods on these leads: pre-trained and untrained encoders by `training`, others by `supervised`.

    Supervised methods see what LS-EMVAE sees. The untrained encoders, one for each seed, are those of LS-EMVAE.
    """
    found, of_reference = Plan([], {}, {}, {}), encoders[REFERENCE].preprocess.digest
    for method in methods:
        try:
            if method.config is not None:
                _add_supervised(found, method.title, method.config, leads, supervised, of_reference)
            elif method.name in encoders:
                _add_pretrained(found, method.title, encoders[method.name], leads, training)
        except LsemvaeError as error:
            found.refused[method.title] = str(error)
    names, frozen = untrained_names(training), _frozen(training)
    for name, model in zip(names, untrained, strict=True):
        found.encoders.setdefault(of_reference, {})[name] = model.embedder(leads, frozen.features)
    kind: Literal["head", "linear"] = "head" if training.trains == "head" else "linear"
    found.rows.append(Row(UNTRAINED, kind, tuple(names), frozen, made_of=repr(untrained[0].config)))
    found.rows.extend(Row(name, "linear", (name,), training) for name in (CLASSICAL, QUANTILES))
    return found


def _frozen(training: FinetuneRecipe) -> FinetuneRecipe:
    """How the untrained encoder's features are used: beside `all`, pooled over all shifts."""
    return replace(training, trains="linear", features="pooled") if training.trains == "all" else training


def _add_supervised(
    found: Plan, title: str, encoder: EncoderConfig, leads: tuple[str, ...], recipe: FinetuneRecipe, preprocess: str
) -> None:
    config = ClassifierConfig(
        encoder=encoder,
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        focal_gamma=recipe.focal_gamma,
        shifts=recipe.shifts,
    )
    found.starts[title] = Classifier(config, leads)
    many = (title,) * recipe.seeds
    found.rows.append(Row(title, "all", many, recipe, scratch=True, made_of=repr(encoder), input=preprocess))


def _add_pretrained(
    found: Plan, title: str, encoder: Pretrained, leads: tuple[str, ...], recipe: FinetuneRecipe
) -> None:
    embedder, place = encoder.model.embedder(leads, recipe.features), encoder.preprocess.digest
    if recipe.trains == "all":
        head = new_head(embedder.embedding_size, np.array([0, 1]), recipe)
        found.starts[title] = Classifier.from_encoder(encoder.model, leads, head, recipe.features, recipe.shifts)
    else:
        found.encoders.setdefault(place, {})[title] = embedder
    names = (title,) * (1 if recipe.trains == "linear" else recipe.seeds)  # a regression has no seed
    found.rows.append(Row(title, recipe.trains, names, recipe, made_of=encoder.digest, input=place))


def cells(found: Plan, folds: int, wanted: Sequence[str], *, main: bool) -> list[Cell]:
    """Every training of a lead set: the main table's, and those of the wanted analyses."""
    made = cells_of(found.rows, folds)
    if main:
        for name in (FEWER, BALANCE):
            if name in wanted:
                made += cells_of(found.rows, folds, VARIANTS[name])
        if EXTERNAL in wanted:
            made += [Cell(row, seed, ALL) for row in found.rows for seed in range(row.seeds)]
    return made


def noises(wanted: Sequence[str], *, main: bool) -> list[Any]:
    """Noise on the test recordings of this lead set."""
    return list(STRENGTHS) if NOISE in wanted and main else []


def table(ran: Ran, material: Material, leads: tuple[str, ...], of: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and failed cells of a lead set, as `lsemvae.evaluation.compare.Scores` has them.

    `of` is the analysis that the lead set belongs to. A method with a failed fold has no scores with that seed. Each
    fold is decided at the threshold that is best on the other folds' scores; noisy recordings at the thresholds of the
    main table, another cohort at the one that is best on all out-of-fold scores. The ids of another cohort begin with
    its name.
    """
    embedded, name = material.embedded, lead_set_name(leads)
    fold_B = fold_of(material.folds, len(embedded.y_B))
    groups: dict[tuple[str, str, str, int], np.ndarray] = {}
    broken = {(c.variant.analysis, c.variant.setting, c.row.name, c.seed) for c in ran.failed if c.fold != ALL}
    for cell, scores in ran.scores.items():
        if cell.fold == ALL:
            continue
        rows = material.folds[cell.fold][1]
        for noise, score_B in scores.items():
            kind = ("noise", noise) if noise else (cell.variant.analysis, cell.variant.setting)
            if (cell.variant.analysis, cell.variant.setting, cell.row.name, cell.seed) not in broken:
                whole = groups.setdefault((*kind, cell.row.name, cell.seed), np.full(len(fold_B), np.nan))
                whole[rows] = score_B
    naive_B = np.full(len(fold_B), embedded.y_B.mean())
    parts = [scored(MAIN, "", name, NAIVE, 0, embedded.record_B, fold_B, naive_B, naive_B >= 0.5)]
    for (analysis, setting, method, seed), score_B in groups.items():
        threshold_of = groups[(MAIN, "", method, seed)] if analysis == "noise" else score_B
        decision_B = decisions(embedded.y_B, threshold_of, material.folds, score_B)
        parts.append(scored(analysis, setting, name, method, seed, embedded.record_B, fold_B, score_B, decision_B))
    for cell, scores in ran.scores.items():
        main_B = groups.get((MAIN, "", cell.row.name, cell.seed))
        if cell.fold == ALL and main_B is not None:
            threshold = best_threshold(embedded.y_B, main_B)
            for other, score_B in scores.items():
                record_B = np.array([f"{other}/{record}" for record in material.others[other].record_B])
                of_other = (cell.row.name, cell.seed, record_B, ALL, score_B, score_B >= threshold)
                parts.append(scored(EXTERNAL, other, name, *of_other))
    found = pd.concat(parts, ignore_index=True)
    if of != MAIN:
        found["analysis"] = of
    return found, failed_table(ran.failed, name)


def failed_table(failed: Mapping[Cell, str], leads: str) -> pd.DataFrame:
    """A line for each failed cell."""
    return failures(
        (cell.variant.analysis, cell.variant.setting, leads, cell.row.name, cell.seed, cell.fold, reason)
        for cell, reason in failed.items()
    )
