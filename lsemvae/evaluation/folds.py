"""Folds: stratified by label, with each subject's recordings together."""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.embedding import Embedded


def require_subjects(y_B: np.ndarray, subject_B: np.ndarray, folds: int) -> None:
    """Raises LsemvaeError when either class has fewer subjects than there are folds."""
    negative, positive = (len(np.unique(subject_B[y_B == value])) for value in (0, 1))
    if min(negative, positive) < folds:
        raise LsemvaeError(
            f"{positive} subjects are positive and {negative} negative: {folds} folds need {folds} of each; "
            "lower --folds or add recordings"
        )


def make_folds(embedded: Embedded, recipe: FinetuneRecipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of each fold; raises LsemvaeError when a fold would lack a class."""
    require_subjects(embedded.y_B, embedded.subject_B, recipe.folds)
    splitter = StratifiedGroupKFold(recipe.folds, shuffle=True, random_state=recipe.optim.seed)
    folds = list(splitter.split(embedded.y_B, embedded.y_B, embedded.subject_B))
    for number, (train, test) in enumerate(folds):
        assert not set(embedded.subject_B[train]) & set(embedded.subject_B[test])
        if len(np.unique(embedded.y_B[test])) < 2:
            raise LsemvaeError(f"fold {number} has one class only: lower --folds (now {recipe.folds})")
    return folds
