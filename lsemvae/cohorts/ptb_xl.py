"""PTB-XL: Wagner et al., Scientific Data 2020, doi 10.1038/s41597-020-0495-6. https://physionet.org/content/ptb-xl/

`scp_codes` gives statements with their likelihood; 0 means that the likelihood is not known. As in the data set's own
example and the published benchmarks, every statement that is listed counts, whatever its likelihood.
"""

import ast
from collections.abc import Mapping

import pandas as pd

from lsemvae.cohorts.demographics import OLDER_THAN_89, age_years, female
from lsemvae.cohorts.labels import stated
from lsemvae.cohorts.tables import LABEL_PREFIX, join_labels, only_present, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

DATABASE = "ptbxl_database.csv"
STATEMENTS = "scp_statements.csv"

_SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
_DIAGNOSES = {
    "lafb": ("LAFB",),
    "rbbb": ("CRBBB", "IRBBB"),
    "lbbb": ("CLBBB", "ILBBB"),
    "lvh": ("LVH",),
    "rvh": ("RVH",),
    "ra_enlargement": ("RAO/RAE",),
}
_RHYTHMS = {"af": ("AFIB",), "afl": ("AFLT",)}
_LEFT_AXIS, _RIGHT_AXIS = ("LAD", "ALAD", "AXL"), ("RAD", "ARAD", "AXR")
_MAX_CODES_LENGTH = 2000
_SEXES = {"0": 0.0, "1": 1.0}  # 0 is a man, 1 a woman
_HIDDEN_AGE = 300  # older than 89


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """The 500 Hz recordings of the database that are in the source.

    `labels` may be a PTB-XL database itself (a part of it, or another version), which then replaces that of the source;
    any other labels are added.
    """
    database = labels if labels is not None and is_database(labels) else read_table(storage, DATABASE)
    table = only_present(label_table(database, storage), storage, DATABASE)
    return table if labels is None or is_database(labels) else join_labels(table, labels)


def is_database(labels: pd.DataFrame) -> bool:
    return {"scp_codes", "filename_hr"} <= set(labels.columns)


def label_table(database: pd.DataFrame, storage: Storage) -> pd.DataFrame:
    """path, record_id (ecg_id), subject_id (patient_id) and labels of every row of the database.

    A label is NaN where the database does not state it: superclasses and diagnoses if there is no diagnostic statement,
    rhythms if there is no rhythm statement, an axis if none is noted. `left_axis` is also 1 with a left anterior
    fascicular block, because that includes left axis deviation. Sex, age and fold follow. Raises LsemvaeError.
    """
    require_columns(database, DATABASE, "ecg_id", "patient_id", "scp_codes", "filename_hr", "heart_axis")
    try:
        statements = read_table(storage, STATEMENTS)
    except FileNotFoundError:
        raise LsemvaeError(f"{storage.uri} has no {STATEMENTS}: copy it there, beside the recordings") from None
    require_columns(statements, STATEMENTS, "Unnamed: 0", "diagnostic", "rhythm", "diagnostic_class")
    statements = statements.set_index("Unnamed: 0")
    superclass = statements.loc[statements["diagnostic"] == 1, "diagnostic_class"]
    rhythms = set(statements.index[statements["rhythm"] == 1])

    codes = [_codes(cell, row) for cell, row in zip(database["scp_codes"], database["ecg_id"], strict=True)]
    table = pd.DataFrame(
        {
            "path": database["filename_hr"],
            "record_id": database["ecg_id"],
            "subject_id": database["patient_id"],
        }
    )
    if table.isna().any(axis=None):
        raise LsemvaeError(f"{DATABASE} has rows without filename_hr, ecg_id or patient_id: mend it")
    groups = {name.lower(): set(superclass.index[superclass == name]) for name in _SUPERCLASSES}
    groups |= {name: set(chosen) for name, chosen in (_DIAGNOSES | _RHYTHMS).items()}
    for name, chosen in groups.items():
        kind = rhythms if name in _RHYTHMS else set(superclass.index)
        table[f"label.{name}"] = stated([found.keys() for found in codes], chosen, kind)
    axis = database["heart_axis"]
    for name, deviations in (("left_axis", _LEFT_AXIS), ("right_axis", _RIGHT_AXIS)):
        table[f"label.{name}"] = axis.isin(deviations).astype(float).where(axis.notna())
    table.loc[["LAFB" in found for found in codes], "label.left_axis"] = 1.0
    return table.join(_about_subjects(database).add_prefix(LABEL_PREFIX))


def _about_subjects(database: pd.DataFrame) -> pd.DataFrame:
    """`female`, `age_years` and `strat_fold`, the published folds; each where the database has its column."""
    columns = pd.DataFrame(index=database.index)
    if "sex" in database.columns:
        columns["female"] = female(database["sex"], _SEXES)
    if "age" in database.columns:
        ages = pd.to_numeric(database["age"], errors="coerce")
        columns["age_years"] = age_years(ages.where(ages != _HIDDEN_AGE, OLDER_THAN_89))
    if "strat_fold" in database.columns:
        columns["strat_fold"] = pd.to_numeric(database["strat_fold"], errors="coerce").astype("float64")
    return columns


def _codes(cell: object, ecg_id: str) -> Mapping[str, float]:
    """`"{'NORM': 100.0, 'SR': 0.0}"` -> the mapping; an empty cell is an empty one."""
    if not isinstance(cell, str):
        return {}
    try:
        codes = ast.literal_eval(cell) if len(cell) <= _MAX_CODES_LENGTH else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        codes = None
    if not isinstance(codes, dict) or not all(
        isinstance(code, str) and isinstance(likelihood, int | float) for code, likelihood in codes.items()
    ):
        raise LsemvaeError(
            f"{DATABASE}: scp_codes of ecg_id {ecg_id} is {cell[:80]!r}, not like {{'NORM': 100.0}}: mend it"
        )
    return codes
