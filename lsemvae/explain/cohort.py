"""Explanations of many recordings as one table: means over subjects with bootstrap intervals, by label and subgroup."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lsemvae.cohorts.demographics import AGES
from lsemvae.explain.igar import PEAKS
from lsemvae.explain.intervals import times
from lsemvae.explain.waves import WAVES

COLUMNS = ("group", "lead", "wave", "signed", "signed_low", "signed_high", "absolute", "absolute_low", "absolute_high")
"""Of `summary`; `records` and `subjects` follow. `lead` and `wave` are "all" for sums over leads and over waves."""
DIFFERENCE = "label 1 - label 0"
"""The group whose values are differences of the means of two groups."""
_CELLS = 2_000_000  # draws times subjects in one pass, for the memory


def summary(table: pd.DataFrame, leads: Sequence[str], *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean shares of each group, lead and wave, with 95 % intervals over subjects.

    table  a row for each explained recording: subject_id, and `signed.LEAD.WAVE` and `absolute.LEAD.WAVE`; optionally
           label (0, 1 or missing), female (0, 1 or missing) and age_years, which make groups beside "all"

    Groups are "all", "label 0", "label 1", "women", "men", those of `AGES`, a subgroup with a label ("women, label 1"),
    and `DIFFERENCE`. A group without recordings is left out; one of fewer than two subjects has no intervals (NaN).
    """
    cells = [(lead, wave) for lead in (*leads, "all") for wave in (*WAVES, "all")]
    value_BK = np.concatenate([_with_sums(table, kind, leads) for kind in ("signed", "absolute")], axis=1)
    subject_B = pd.factorize(table["subject_id"])[0]
    rng = np.random.default_rng(seed)
    parts = []
    for group, members in _groups(table):
        used_B = np.logical_or.reduce(members)
        low_K, mean_K, high_K = _interval(value_BK, subject_B, members, draws, rng)
        part = pd.DataFrame(cells, columns=["lead", "wave"])
        part.insert(0, "group", group)
        for kind, of in (("signed", slice(0, len(cells))), ("absolute", slice(len(cells), None))):
            part[kind], part[f"{kind}_low"], part[f"{kind}_high"] = mean_K[of], low_K[of], high_K[of]
        parts.append(part.assign(records=int(used_B.sum()), subjects=len(np.unique(subject_B[used_B]))))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS, "records", "subjects"])


def igar_summary(table: pd.DataFrame, leads: Sequence[str], *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean IGAR of each lead, and of each peak as the mean over leads, with 95 % intervals over subjects.

    table  a row for each recording: subject_id, `igar.LEAD` and `igar.LEAD.PEAK`. Columns: kind (lead or wave), name,
           ratio, low, high
    """
    lead_BL = table[[f"igar.{lead}" for lead in leads]].to_numpy(dtype=float)
    peak_BLP = table[[f"igar.{lead}.{peak}" for lead in leads for peak in PEAKS]].to_numpy(dtype=float)
    peak_BP = pd.DataFrame(peak_BLP).T.groupby(np.tile(np.arange(len(PEAKS)), len(leads))).mean().T.to_numpy()
    value_BK = np.concatenate([lead_BL, peak_BP], axis=1)
    everyone_B = np.ones(len(table), dtype=bool)
    subject_B = pd.factorize(table["subject_id"])[0]
    low_K, mean_K, high_K = _interval(value_BK, subject_B, (everyone_B,), draws, np.random.default_rng(seed))
    found = pd.DataFrame({"kind": ["lead"] * len(leads) + ["wave"] * len(PEAKS), "name": [*leads, *PEAKS]})
    return found.assign(ratio=mean_K, low=low_K, high=high_K)


def _with_sums(table: pd.DataFrame, kind: str, leads: Sequence[str]) -> np.ndarray:
    """[B, (L + 1) * (W + 1)]: the cells of each recording and their sums over leads, over waves and over both."""
    columns = [f"{kind}.{lead}.{wave}" for lead in leads for wave in WAVES]
    cell_BLW = table[columns].to_numpy(dtype=float).reshape(len(table), len(leads), len(WAVES))
    cell_BLW = np.concatenate([cell_BLW, cell_BLW.sum(axis=1, keepdims=True)], axis=1)
    cell_BLW = np.concatenate([cell_BLW, cell_BLW.sum(axis=2, keepdims=True)], axis=2)
    return cell_BLW.reshape(len(table), (len(leads) + 1) * (len(WAVES) + 1))


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Names of groups, and which recordings are in each [B]; for a difference, in the first and in the second."""
    everyone_B = np.ones(len(table), dtype=bool)
    nowhere = pd.Series(np.nan, index=table.index)
    label_B, female_B, age_B = (
        pd.to_numeric(table.get(name, nowhere)).to_numpy(dtype=float, na_value=np.nan)
        for name in ("label", "female", "age_years")
    )
    labels = {f"label {value}": label_B == value for value in (0, 1)}
    people = {"women": female_B == 1, "men": female_B == 0}
    people |= {name: (age_B >= low) & (age_B < high) for name, (low, high) in AGES.items()}
    found = {"all": everyone_B} | labels | people
    found |= {f"{name}, {label}": in_B & of_B for name, in_B in people.items() for label, of_B in labels.items()}
    yield from ((name, (in_B,)) for name, in_B in found.items() if in_B.any())
    if all(of_B.any() for of_B in labels.values()):
        yield DIFFERENCE, (labels["label 1"], labels["label 0"])


def _interval(
    value_BK: np.ndarray, subject_B: np.ndarray, members: Sequence[np.ndarray], draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2.5 % point, mean and 97.5 % point of the mean over subjects, or of the first group's mean less the second's.

    A subject's recordings are averaged first. A draw takes subjects with replacement: of a difference, the same
    subjects for both groups, since a subject may have recordings in both.
    """
    used_B = np.logical_or.reduce(members)
    subjects, code_B = np.unique(subject_B[used_B], return_inverse=True)
    of_groups = [_by_subject(value_BK[used_B], code_B, in_B[used_B], len(subjects)) for in_B in members]
    mean_K = _difference([_mean(np.ones((1, len(subjects))), *of_group) for of_group in of_groups])[0]
    of_groups = [(mean_SK.astype(np.float32), there_SK) for mean_SK, there_SK in of_groups]  # enough for intervals
    if len(subjects) < 2 or any(there_SK.any(axis=1).sum() < 2 for _, there_SK in of_groups):
        return np.full_like(mean_K, np.nan), mean_K, np.full_like(mean_K, np.nan)
    found = []
    size = max(_CELLS // len(subjects), 1)
    for start in range(0, draws, size):
        weight_DS = times(len(subjects), min(size, draws - start), rng).astype(np.float32)
        found.append(_difference([_mean(weight_DS, *of_group) for of_group in of_groups]))
    low_K, high_K = _percentiles(np.concatenate(found))
    return low_K, mean_K, high_K


def _percentiles(drawn_DK: np.ndarray) -> np.ndarray:
    """2.5 and 97.5 % points [2, K], of the draws that have a value. NumPy is much slower where one is missing."""
    if not np.isnan(drawn_DK).any():
        return np.percentile(drawn_DK, [2.5, 97.5], axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell that nobody has
        return np.nanpercentile(drawn_DK, [2.5, 97.5], axis=0)


def _by_subject(
    value_BK: np.ndarray, code_B: np.ndarray, in_B: np.ndarray, subjects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each subject's mean over the group's recordings, 0 where there is none, and where there is one."""
    frame = pd.DataFrame(value_BK[in_B]).groupby(code_B[in_B]).mean().reindex(range(subjects))
    mean_SK = frame.to_numpy()
    return np.nan_to_num(mean_SK), ~np.isnan(mean_SK)


def _mean(weight_DS: np.ndarray, mean_SK: np.ndarray, there_SK: np.ndarray) -> np.ndarray:
    total_DK = weight_DS @ mean_SK
    if there_SK.all():
        return total_DK / weight_DS.sum(axis=1, keepdims=True)
    count_DK = weight_DS @ there_SK.astype(weight_DS.dtype)
    return np.divide(total_DK, count_DK, out=np.full_like(total_DK, np.nan), where=count_DK > 0)


def _difference(of_groups: Sequence[np.ndarray]) -> np.ndarray:
    return of_groups[0] if len(of_groups) == 1 else of_groups[0] - of_groups[1]
