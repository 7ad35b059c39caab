"""Cohorts: which recordings a source has, whose they are, and what is known about them. One file a source."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from pyarrow import fs as pafs

from lsemvae.cohorts import aspire, folder, kardia, ludb, mimic_iv_ecg, ptb_xl, ukb_20205
from lsemvae.cohorts.tables import read_labels
from lsemvae.errors import LsemvaeError
from lsemvae.formats import SUFFIXES
from lsemvae.storage import Storage

__all__ = ["COHORTS", "Cohort", "detect", "read_labels"]


@dataclass(frozen=True)
class Cohort:
    """A kind of source, recognised by a table it comes with, or else by the names of recordings.

    `recordings(storage, labels)` gives one row a recording: `path` (relative to the source), `record_id` and
    `subject_id` (text), and `label.NAME` columns (float64, NaN where a label is not known). `labels` is what
    `read_labels` returns, or None; it adds to the source's own labels, and replaces those of the same name.
    `recognise` is asked about the main files of one folder. `uv_per_lsb` is the step of the raw counts where the
    files themselves state a wrong one.
    """

    recordings: Callable[[Storage, pd.DataFrame | None], pd.DataFrame]
    tables: tuple[str, ...] = ()
    recognise: Callable[[list[str]], bool] | None = None
    uv_per_lsb: float | None = None


COHORTS = {
    "mimic-iv-ecg": Cohort(mimic_iv_ecg.recordings, (mimic_iv_ecg.RECORD_LIST,)),
    "ptb-xl": Cohort(ptb_xl.recordings, (ptb_xl.DATABASE,)),
    "ludb": Cohort(ludb.recordings, (ludb.TABLE,), uv_per_lsb=ludb.UV_PER_LSB),
    "aspire": Cohort(aspire.recordings, (aspire.TABLE,)),
    # Where somebody has withdrawn, nothing but the cohort that leaves them out may read the source.
    "ukb-20205": Cohort(ukb_20205.recordings, (ukb_20205.TABLE, ukb_20205.WITHDRAWN), ukb_20205.recognise),
    "kardia": Cohort(kardia.recordings, (kardia.TABLE,), kardia.recognise),
    "folder": Cohort(folder.recordings),
}
_DEPTH = 5


def detect(storage: Storage) -> str:
    """The name of the cohort whose table the source has, or how whose its files are named; else `"folder"`.

    Files are looked at in one folder, the first that has recordings: no source is listed to its end for this.
    """
    for name, cohort in COHORTS.items():
        if any(storage.exists(table) for table in cohort.tables):
            return name
    if files := _first_recordings(storage):
        for name, cohort in COHORTS.items():
            if cohort.recognise and cohort.recognise(files):
                return name
    return "folder"


def _first_recordings(storage: Storage) -> list[str]:
    folder = storage.base
    for _ in range(_DEPTH):
        try:
            infos = storage.filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise LsemvaeError(f"{storage.uri} cannot be listed ({reason}): check it, or name its --cohort") from error
        files = [info.base_name for info in infos if info.type == pafs.FileType.File]
        if files := [file for file in files if file.lower().endswith(SUFFIXES)]:
            return files
        folders = sorted(info.path for info in infos if info.type == pafs.FileType.Directory)
        if not folders:
            break
        folder = folders[0]
    return []
