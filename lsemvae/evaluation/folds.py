"""Folds: stratified by label, with each subject's recordings together."""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from lsemvae.errors import LsemvaeError

Fold = tuple[np.ndarray, np.ndarray]
"""Training rows and test rows."""


def require_subjects(y_B: np.ndarray, subject_B: np.ndarray, folds: int, option: str = "--folds") -> None:
    """Raises LsemvaeError, naming the option, when either class has fewer subjects than there are folds."""
    negative, positive = (len(np.unique(subject_B[y_B == value])) for value in (0, 1))
    if min(negative, positive) < folds:
        raise LsemvaeError(
            f"{positive} subjects are positive and {negative} negative: {folds} folds need {folds} of each; "
            f"lower {option} or add recordings"
        )


def make_folds(y_B: np.ndarray, subject_B: np.ndarray, folds: int, seed: int) -> list[Fold]:
    """So many folds; raises LsemvaeError when one would lack a class."""
    require_subjects(y_B, subject_B, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = list(splitter.split(y_B, y_B, subject_B))
    for number, (train, test) in enumerate(found):
        assert not set(subject_B[train]) & set(subject_B[test])
        if len(np.unique(y_B[test])) < 2:
            raise LsemvaeError(f"fold {number} has one class only: lower --folds (now {folds})")
    return found
