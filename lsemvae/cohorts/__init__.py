"""Cohorts: which recordings a source has, whose they are, and what is known about them. One file a source."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from lsemvae.cohorts import folder, ludb, mimic_iv_ecg, ptb_xl
from lsemvae.cohorts.tables import read_labels
from lsemvae.storage import Storage

__all__ = ["COHORTS", "Cohort", "detect", "read_labels"]


@dataclass(frozen=True)
class Cohort:
    """A kind of source, recognised by the table it comes with.

    `recordings(storage, labels)` gives one row a recording: `path` (relative to the source), `record_id` and
    `subject_id` (text), and `label.NAME` columns (float64, NaN where a label is not known). `labels` is what
    `read_labels` returns, or None; it adds to the source's own labels, and replaces those of the same name.
    `uv_per_lsb` is the step of the raw counts where the files themselves state a wrong one.
    """

    recordings: Callable[[Storage, pd.DataFrame | None], pd.DataFrame]
    table: str | None = None
    uv_per_lsb: float | None = None


COHORTS = {
    "mimic-iv-ecg": Cohort(mimic_iv_ecg.recordings, mimic_iv_ecg.RECORD_LIST),
    "ptb-xl": Cohort(ptb_xl.recordings, ptb_xl.DATABASE),
    "ludb": Cohort(ludb.recordings, ludb.TABLE, ludb.UV_PER_LSB),
    "folder": Cohort(folder.recordings),
}


def detect(storage: Storage) -> str:
    """The name of the cohort whose table the source has; `"folder"` when there is none."""
    for name, cohort in COHORTS.items():
        if cohort.table and storage.exists(cohort.table):
            return name
    return "folder"
