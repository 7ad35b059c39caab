"""Folds: stratified by label, with each subject's recordings together."""

from collections.abc import Sequence

import numpy as np

from lsemvae.errors import LsemvaeError

Fold = tuple[np.ndarray, np.ndarray]
"""Training rows and test rows."""


def fold_of(folds: Sequence[Fold], records: int) -> np.ndarray:
    """The number of the fold whose test rows hold each recording, [B]."""
    fold_B = np.zeros(records, dtype=int)
    for number, (_, test) in enumerate(folds):
        fold_B[test] = number
    return fold_B


def require_subjects(y_B: np.ndarray, subject_B: np.ndarray, folds: int, option: str = "--folds") -> None:
    """Raises LsemvaeError, naming the option, when either class has fewer subjects than there are folds."""
    negative, positive = (len(np.unique(subject_B[y_B == value])) for value in (0, 1))
    if min(negative, positive) < folds:
        raise LsemvaeError(
            f"{positive} subjects are positive and {negative} negative: {folds} folds need {folds} of each; "
            f"lower {option} or add recordings"
        )


def make_folds(y_B: np.ndarray, subject_B: np.ndarray, folds: int, seed: int) -> list[Fold]:
    """So many folds; raises LsemvaeError when one would lack a class or tear a subject apart."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes 1 s

    require_subjects(y_B, subject_B, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = list(splitter.split(y_B, y_B, subject_B))
    for number, (train, test) in enumerate(found):
        if torn := set(subject_B[train]) & set(subject_B[test]):
            raise LsemvaeError(
                f"fold {number} tests on recordings of {len(torn)} subjects that it trains on: its scores would mean "
                "nothing, so it is refused"
            )
        if len(np.unique(y_B[test])) < 2:
            raise LsemvaeError(f"fold {number} has one class only: lower --folds (now {folds}) or add recordings")
    return found


def given_folds(fold_B: np.ndarray, y_B: np.ndarray, subject_B: np.ndarray, column: str) -> list[Fold]:
    """The folds that a column gives, in the order of its values: each is the test fold once.

    Raises LsemvaeError when a recording has none, a subject is in two, there is one fold only, or one lacks a class.
    """
    if np.isnan(fold_B).any():
        missing = int(np.isnan(fold_B).sum())
        raise LsemvaeError(
            f"--folds {column}: {missing} of {len(fold_B)} labelled recordings have no fold: fill them in"
        )
    values = np.unique(fold_B)
    if len(values) < 2:
        raise LsemvaeError(f"--folds {column}: every recording is in fold {values[0]:g}: cross-validation needs two")
    _, subject_of_B = np.unique(subject_B, return_inverse=True)
    lowest, highest = np.full(subject_of_B.max() + 1, np.inf), np.full(subject_of_B.max() + 1, -np.inf)
    np.minimum.at(lowest, subject_of_B, fold_B)
    np.maximum.at(highest, subject_of_B, fold_B)
    if torn := int((lowest != highest).sum()):
        raise LsemvaeError(
            f"--folds {column}: {torn} subjects are in two folds: give all recordings of a subject one fold"
        )
    found = []
    for value in values:
        test = np.flatnonzero(fold_B == value)
        if len(np.unique(y_B[test])) < 2:
            raise LsemvaeError(
                f"--folds {column}: all {len(test)} recordings of fold {value:g} have label {y_B[test][0]:g}: "
                "give folds with both classes"
            )
        found.append((np.flatnonzero(fold_B != value), test))
    return found
