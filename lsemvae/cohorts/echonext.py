"""EchoNext: ECGs of Columbia University with labels from echocardiography. https://physionet.org/content/echonext/

The table lists the ECGs of four splits, and `EchoNext_{split}_waveforms.npy` holds the signals of each: an ECG is in
the row that is its place among those of its split. A flag of the table, such as `pasp_gte_45_flag`, is 0 also where
nothing was measured. So labels come from the values, and a label is NaN where its value is empty.
"""

import logging

import numpy as np
import pandas as pd

from lsemvae.cohorts import labels as definitions
from lsemvae.cohorts.demographics import age_years, female
from lsemvae.cohorts.tables import LABEL_PREFIX, documented_labels, join_labels, plausible, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.formats import echonext as files
from lsemvae.storage import Storage

TABLES = ("echonext_metadata_100k.csv", "EchoNext_metadata_100k.csv")
SPLITS = {"train": 0.0, "val": 1.0, "test": 2.0, "no_split": np.nan}
"""Split -> its number in the label `split`."""

_KEYS = ("ecg_key", "patient_key", "split")
# Label -> the table's flag for it, and the value that the flag was made of.
_FLAGS = {
    "pasp_ge_45": ("pasp_gte_45_flag", "pasp_value"),
    "tr_velocity_ge_3_2": ("tr_max_gte_32_flag", "tr_max_velocity_value"),
    "rv_dysfunction": ("rv_systolic_dysfunction_moderate_or_greater_flag", "rv_systolic_function_value"),
}
_NUMBERS = {"pasp_mmhg": "pasp_value", "tr_velocity_m_s": "tr_max_velocity_value"}
_SEXES = {"0": 1.0, "1": 0.0}  # "0 = female, 1 = male", says the README of the release

logger = logging.getLogger(__name__)


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """The ECGs of the table whose split has its file of waveforms in the source.

    Raises LsemvaeError where a file is not as published, or does not have a row for each ECG of its split.
    """
    name = next((table for table in TABLES if storage.exists(table)), TABLES[0])
    columns = {*_KEYS, "sex", "age_at_ecg", *(column for pair in _FLAGS.values() for column in pair)}
    listed = read_table(storage, name, only=columns)
    require_columns(
        listed, name, *_KEYS, *_FLAGS["pasp_ge_45"], *_FLAGS["tr_velocity_ge_3_2"], *_FLAGS["rv_dysfunction"]
    )
    if listed[list(_KEYS)].isna().any(axis=None) or not set(listed["split"]) <= set(SPLITS):
        raise LsemvaeError(
            f"{name} has rows without {', '.join(_KEYS)}, or a split that is none of {', '.join(SPLITS)}: download it "
            "again"
        )
    place = listed.groupby("split").cumcount()
    table = pd.DataFrame(
        {
            "path": [files.row_path(_file(split), row) for split, row in zip(listed["split"], place, strict=True)],
            "record_id": listed["ecg_key"],
            "subject_id": listed["patient_key"],
        }
    )
    table = table.join(_labels(listed, name).add_prefix(LABEL_PREFIX))
    present = [split for split in SPLITS if _is_whole(storage, split, int((listed["split"] == split).sum()), name)]
    used = listed["split"].isin(present)
    if not used.any():
        raise LsemvaeError(f"{storage.uri} has none of the files that {name} lists, such as {_file('val')}: add them")
    if not used.all():
        logger.info(f"{name}: {(~used).sum()} of its {len(listed)} ECGs are in files that are not in the source")
    table = table[used].reset_index(drop=True)
    return table if labels is None else join_labels(table, labels)


def _file(split: str) -> str:
    return f"EchoNext_{split}_waveforms.npy"


def _is_whole(storage: Storage, split: str, listed: int, name: str) -> bool:
    """Whether the split's file is there; raises LsemvaeError where it is cut short or has another number of rows."""
    file = _file(split)
    if not storage.exists(file):
        return False
    layout = files.waveforms(file, storage.head(file, 4096))
    if layout.rows != listed:
        raise LsemvaeError(
            f"{file} has {layout.rows} rows, and {name} lists {listed} ECGs of the split {split}: an ECG is found by "
            "its place among these, so download both from the same release"
        )
    if (size := storage.size(file)) != layout.bytes:
        raise LsemvaeError(f"{file} has {size} bytes, its header declares {layout.bytes}: download it again")
    return True


def _labels(listed: pd.DataFrame, name: str) -> pd.DataFrame:
    """The labels of docs/labels.md, without prefix, in the order of the table."""
    found = pd.DataFrame(index=listed.index)
    for label, column in _NUMBERS.items():
        found[label] = plausible(listed[column], label, name)
    found = documented_labels(found, name)
    flag_name, value_name = _FLAGS["rv_dysfunction"]
    grades = [None if pd.isna(cell) else str(cell) for cell in listed[value_name]]
    known = definitions.rv_dysfunction(grades)
    # A grade in words that are not known here: the authors made the flag of it.
    flag = pd.to_numeric(listed[flag_name], errors="coerce").astype("float64")
    is_judged = np.array([definitions.is_judged(grade) for grade in grades], dtype=bool)
    found["rv_dysfunction"] = np.where(np.isnan(known), flag.where(is_judged & flag.isin([0, 1])), known)
    for label, (flag_name, value_name) in _FLAGS.items():
        flags = pd.to_numeric(listed[flag_name], errors="coerce")
        if contrary := int((flags.isin([0, 1]) & found[label].notna() & (flags != found[label])).sum()):
            logger.warning(f"{name}: {flag_name} contradicts {value_name} in {contrary} rows; the value is used")
        if unmeasured := int((flags.notna() & found[label].isna()).sum()):
            logger.info(f"{name}: {flag_name} has no measured {value_name} in {unmeasured} rows; {label} is null there")
    if "sex" in listed.columns:
        found["female"] = female(listed["sex"], _SEXES)
    if "age_at_ecg" in listed.columns:
        found["age_years"] = age_years(listed["age_at_ecg"])
    found["split"] = listed["split"].map(SPLITS).astype("float64")
    return found
