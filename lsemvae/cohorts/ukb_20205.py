"""UK Biobank field 20205, the resting 12-lead ECGs of the imaging visits: `{eid}_20205_{instance}_{array}.xml`.

`ukb-20205.csv` in the source (or the table of `--labels`) is optional and decides who belongs to the cohort:

    eid,lv_mass_g,la_volume_ml
    1000012,91.5,74.2

`eid` may be written `f.eid`. Rename the columns of your own export: `lv_mass_g` is the mass of the left ventricle in g,
`la_volume_ml` the largest volume of the left atrium in ml, neither divided by body surface. Columns that are named only
by the number of a field (`22421-2.0`, `f.22421.2.0`, `p22421_i2`) are not used. With a column `instance` (2 or 3) a row
is about that visit only. `elevated_pawp`, the paper's label, is computed from the two; other columns of numbers become
labels unchanged.

`withdrawn.csv` in the source is the list of withdrawn participants as UK Biobank sends it: an eid a line, no header.
"""

import logging
import re

import pandas as pd

from lsemvae.cohorts.folder import as_recordings
from lsemvae.cohorts.source import UKB_FILE
from lsemvae.cohorts.tables import (
    clinical_labels,
    first_row,
    join_labels,
    label_values,
    plain_name,
    plain_names,
    read_table,
    require_columns,
)
from lsemvae.cohorts.withdrawn import WITHDRAWN, read_withdrawn
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

TABLE = "ukb-20205.csv"
_ANY_FIELD = re.compile(r"(?:^|/)\d+_\d+_\d+_\d+\.xml$", re.IGNORECASE)

_FIELD = re.compile(r"(?:f_|p)?\d+(?:_i?\d+)?(?:_a?\d+)?")  # of a plain name
_KEYS = ["subject_id", "instance"]

logger = logging.getLogger(__name__)


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """One recording for each participant: the first one of the first visit that belongs to the cohort.

    Instance 2 comes before 3, array 0 before 1. Participants who have withdrawn are left out, even if a table lists
    them. `labels` with another key than eid (see `join_labels`) only add labels.
    """
    found = _files(storage)
    if not storage.exists(WITHDRAWN):
        logger.info(f"there is no {WITHDRAWN} in {storage.uri}: nobody is taken to have withdrawn")
    withdrawn = pd.Series(read_withdrawn(storage, only_numbers=True).mask(found["subject_id"]), index=found.index)
    table = found[~withdrawn]
    if table.empty:
        raise LsemvaeError(f"all participants with recordings in {storage.uri} have withdrawn: nothing is left")

    own = storage.exists(TABLE)
    is_participants = labels is not None and "eid" in map(plain_name, labels.columns)
    if own or is_participants:
        name = TABLE if own else "the labels"
        cohort = _participants(read_table(storage, TABLE) if own else labels, name)
        keys = [key for key in _KEYS if key in cohort.columns]
        absent = len(cohort) - len(cohort[keys].merge(table[keys].drop_duplicates()))
        table = table.merge(cohort, on=keys)
        logger.info(f"{name}: {absent} of its {len(cohort)} rows have no recording that may be used")
        if table.empty:
            raise LsemvaeError(f"no participant of {name} has a recording in {storage.uri}: check its eid")
    listed = len(table)
    table = table.drop_duplicates("subject_id", ignore_index=True).drop(columns=["instance", "array"])
    logger.info(
        f"{len(table)} of {len(found)} recordings are used; left out are {withdrawn.sum()} recordings of "
        f"{found.loc[withdrawn, 'subject_id'].nunique()} participants who have withdrawn, "
        f"{len(found) - withdrawn.sum() - listed} that are not listed, {listed - len(table)} repeats"
    )
    if labels is None or (is_participants and not own):
        return table
    labels = plain_names(labels, "the labels").rename(columns={"eid": "subject_id"})
    if "subject_id" in labels.columns:
        labels["subject_id"] = labels["subject_id"].str.lstrip("0")
    return join_labels(table, clinical_labels(labels, "the labels"))


def owns(path: str) -> bool:
    """Whether a file is named as UK Biobank names these recordings."""
    return UKB_FILE.search(path) is not None


def is_of_ukb(path: str) -> bool:
    """Whether a file is named as UK Biobank names those of any field, such as the exercise ECGs of 6025."""
    return _ANY_FIELD.search(path) is not None


def eid_of(path: str) -> str:
    """The participant after whom a file is named; empty where it is not named as UK Biobank does."""
    match = UKB_FILE.search(path)
    return match[1] if match else ""


def _files(storage: Storage) -> pd.DataFrame:
    """path, record_id, subject_id (the eid), instance and array of all recordings, the preferred ones first."""
    paths = pd.Series(storage.list(), dtype=str)
    parts = paths.str.extract(UKB_FILE)
    named = parts[0].notna()
    if not named.any():
        raise LsemvaeError(f"{storage.uri} has no recordings: none of its files is named like 1000012_20205_2_0.xml")
    if others := int((paths.str.lower().str.endswith(".xml") & ~named).sum()):
        logger.info(f"{others} XML files are not named like 1000012_20205_2_0.xml and are left out")
    table, parts = as_recordings(paths[named]), parts[named].reset_index(drop=True)
    table["subject_id"] = parts[0].str.lstrip("0")
    table["instance"], table["array"] = parts[1].astype("int64"), parts[2].astype("int64")
    return table.sort_values(["subject_id", "instance", "array", "path"], ignore_index=True)


def _participants(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """subject_id, instance (if the table has it) and labels of the participants who belong to the cohort."""
    table = plain_names(table, name)
    require_columns(table, name, "eid")
    fields = [column for column in table.columns if _FIELD.fullmatch(column)]
    if fields:
        logger.info(f"{name}: {len(fields)} columns named by a field's number alone are not used: rename what you need")
    table = clinical_labels(table.drop(columns=fields), name).rename(columns={"eid": "subject_id"})
    wrong = ~table["subject_id"].fillna("").str.fullmatch(r"\d+")
    if wrong.any():
        raise LsemvaeError(f"{name}, {first_row(wrong)}: its eid is no number: mend it, or delete the row")
    keys = {"subject_id": table["subject_id"].str.lstrip("0")}
    if "instance" in table.columns:
        keys["instance"] = pd.to_numeric(table["instance"], errors="coerce")
        if (wrong := ~(keys["instance"] >= 0)).any():
            raise LsemvaeError(f"{name}, {first_row(wrong)}: its instance is no number such as 2: mend it")
    keys = pd.DataFrame(keys)
    if (again := keys.duplicated()).any():
        raise LsemvaeError(
            f"{name}, {first_row(again)}: a participant who is in it before ({again.sum()} such rows): keep one row, "
            f"or say in a column 'instance' of which visit each is"
        )
    return keys.join(label_values(table.drop(columns=keys.columns), name))
