"""Tables that come with recordings: read them, and join labels by whichever key they have."""

import io
import re

import pandas as pd

from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

LABEL_PREFIX = "label."
KEYS = ("path", "record_id", "study_id", "file", "ecg_id", "subject_id")
"""What may identify a row of a labels table, in the order in which they are tried."""

_SUBJECTS = ("subject_id", "patient_id")
_IDENTIFIERS = {*KEYS, *_SUBJECTS}
_EXTENSION = re.compile(r"\.(hea|dat|mat|xml|dcm|atc)$", re.IGNORECASE)


def read_labels(uri: str) -> pd.DataFrame:
    """A labels CSV in a folder or in S3. Keys stay text: `"00012"` is not 12. Raises LsemvaeError."""
    try:
        return read_table(Storage.open(uri), "")
    except (FileNotFoundError, IsADirectoryError):
        raise LsemvaeError(f"{uri} is no file: give the path or URI of a labels CSV") from None


def read_table(storage: Storage, name: str, leave_out: tuple[str, ...] = ()) -> pd.DataFrame:
    """A CSV of the source, identifiers as text. Raises LsemvaeError; FileNotFoundError when it is absent."""
    content = storage.read_bytes(name)
    try:
        table = pd.read_csv(
            io.BytesIO(content),
            dtype=dict.fromkeys(_IDENTIFIERS, str),
            index_col=False,  # a comma at the end of every row must not shift its columns
            usecols=(lambda column: column not in leave_out) if leave_out else None,
            low_memory=False,
        )
    except (ValueError, pd.errors.ParserError) as error:  # also no UTF-8, and an empty file
        reason = " ".join(str(error).split())[:200]
        raise LsemvaeError(f"{storage.path(name)} is no CSV with a header line ({reason}): mend it") from None
    for column in _IDENTIFIERS & set(table.columns):
        # A column of whole numbers with gaps is often written as 15709.0.
        table[column] = table[column].str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    return table


def require_columns(table: pd.DataFrame, name: str, *columns: str) -> None:
    if absent := [column for column in columns if column not in table.columns]:
        raise LsemvaeError(f"{name} has no column {', '.join(absent)}: it has {_shown(table)}")


def only_present(table: pd.DataFrame, storage: Storage, name: str) -> pd.DataFrame:
    """Rows of recordings whose header is in the source: a part of a data set can be used as it is."""
    folders = sorted({path.partition("/")[0] for path in table["path"]})
    found = {header.removesuffix(".hea") for folder in folders for header in storage.list(folder, ".hea")}
    present = table[table["path"].isin(found)].reset_index(drop=True)
    if present.empty:
        raise LsemvaeError(
            f"{storage.uri} holds none of the {len(table)} recordings that {name} lists below "
            f"{', '.join(folders[:3])}: download them beside it"
        )
    return present


def join_labels(recordings: pd.DataFrame, labels: pd.DataFrame, *, replace_subjects: bool = False) -> pd.DataFrame:
    """`recordings` with the numeric columns of `labels` as `label.NAME`, NaN where it does not mention them.

    The first of `KEYS` by which anything matches decides; `study_id` and `ecg_id` are other names of the
    record, `file` is its file name, and with `subject_id` a label holds for all recordings of a patient. With
    `replace_subjects` a column `subject_id` or `patient_id` says whose the recordings are. Raises
    LsemvaeError when there is no key, a key is there twice, or nothing matches.
    """
    keys = [key for key in KEYS if key in labels.columns]
    if not keys:
        raise LsemvaeError(f"the labels have no key: give a column {' or '.join(KEYS)}; they have {_shown(labels)}")
    for key in keys:
        ours, theirs = _key_values(recordings, key), _key_values(labels, key)
        if ours.isin(theirs.dropna()).any():
            break
    else:
        raise LsemvaeError(
            f"none of the {len(labels)} labels matches one of the {len(recordings)} recordings by "
            f"{' or '.join(keys)}: write these as the source does"
        )
    if repeated := theirs.dropna().duplicated().sum():
        raise LsemvaeError(f"the labels repeat {repeated} values of their key {key!r}: keep one row of each")

    values = _label_values(labels)
    subject = next((column for column in _SUBJECTS if column in labels.columns and column != key), None)
    if values.empty and subject is None:
        raise LsemvaeError(f"the labels have no numeric column beside their key {key!r}: they have {_shown(labels)}")
    known = theirs.notna()
    by_key = values[known].set_axis(theirs[known], axis="index").reindex(ours)
    values = by_key.set_axis(recordings.index, axis="index")
    joined = recordings.drop(columns=values.columns, errors="ignore").join(values)
    if replace_subjects and subject is not None:
        by_key = labels.loc[known, subject].astype("string").set_axis(theirs[known], axis="index").reindex(ours)
        subjects = by_key.set_axis(recordings.index, axis="index").fillna(joined["subject_id"])
        joined["subject_id"] = subjects.astype(object)
    return joined


def _key_values(table: pd.DataFrame, key: str) -> pd.Series:
    """Text that is equal where a recording and a label belong together."""
    column = key
    if key not in table.columns:  # a source names its recordings by path and record_id
        column = "path" if key == "file" else "record_id"
    values = table[column].astype("string")
    if key in ("path", "file"):
        values = values.str.removeprefix("./").str.replace(_EXTENSION, "", regex=True)
    return values.str.rpartition("/")[2] if key == "file" else values


def _label_values(labels: pd.DataFrame) -> pd.DataFrame:
    columns = {}
    for name in labels.columns:
        values = labels[name]
        if name in _IDENTIFIERS or name.startswith("Unnamed"):
            continue
        if values.dtype == object and values.notna().any() and values.dropna().isin([True, False]).all():
            values = values.astype("boolean")  # yes and no with gaps
        if pd.api.types.is_numeric_dtype(values):
            label = LABEL_PREFIX + name.removeprefix(LABEL_PREFIX)
            columns[label] = values.astype("Float64").astype("float64")
    return pd.DataFrame(columns, index=labels.index)


def _shown(table: pd.DataFrame) -> str:
    names = [str(column)[:40] for column in table.columns]
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") if names else "none"
