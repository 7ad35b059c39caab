"""Tables that come with recordings: read them, check what they measure, join labels by whichever key they have."""

import io
import logging
import re
from collections.abc import Callable, Collection

import numpy as np
import pandas as pd

from lsemvae.cohorts import labels as definitions
from lsemvae.cohorts.demographics import with_demographics
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

LABEL_PREFIX = "label."
KEYS = ("path", "record_id", "study_id", "file", "ecg_id", "subject_id")
"""Columns that can identify a row of a labels table, in the order in which they are tried."""
SUBJECTS = ("subject_id", "patient_id")

_IDENTIFIERS = {*KEYS, *SUBJECTS, "eid"}
# Other common names. Names are compared in lower case, with _ for everything that is not a letter or a digit.
_ALSO = {"patient": "patient_id", "f_eid": "eid", "mpap": "mpap_mmhg", "pawp": "pawp_mmhg", "pasp": "pasp_mmhg"}
_ALSO |= {"ecg_key": "ecg_id", "patient_key": "patient_id"}  # of EchoNext
_DECIMAL_COMMA = r"[+-]?\d+(?:,\d+)?"
_EXTENSION = re.compile(r"\.(hea|dat|mat|xml|dcm|atc|npy|csv|json|scp)$", re.IGNORECASE)

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?")

logger = logging.getLogger(__name__)


def read_labels(uri: str) -> pd.DataFrame:
    """A labels CSV in a folder or in S3. Keys stay text: `"00012"` is not 12. Raises LsemvaeError."""
    try:
        return read_table(Storage.open(uri), "")
    except (FileNotFoundError, IsADirectoryError):
        raise LsemvaeError(f"{uri} is not a file: give the path or URI of a labels CSV") from None


def read_table(storage: Storage, name: str, only: Collection[str] | None = None) -> pd.DataFrame:
    """A CSV of the source, identifiers as text, blanks around column names removed.

    Cells are separated by commas, or by semicolons or tabs where the header has no comma. With semicolons, numbers may
    have decimal commas. `only` reads these columns, where they are there: large tables have columns that nobody needs.
    Raises LsemvaeError; FileNotFoundError when the file is absent.
    """
    content = storage.read_bytes(name)
    separator = _separator(content)
    try:
        columns = pd.read_csv(io.BytesIO(content), sep=separator, nrows=0, index_col=False).columns
        table = pd.read_csv(
            io.BytesIO(content),
            sep=separator,
            dtype={column: str for column in columns if plain_name(column) in _IDENTIFIERS},
            index_col=False,  # a comma at the end of every row must not shift its columns
            usecols=None if only is None else [column for column in columns if str(column).strip() in only],
            low_memory=False,
        )
    except (ValueError, pd.errors.ParserError) as error:  # also where it is not UTF-8, or empty
        reason = " ".join(str(error).split())[:200]
        raise LsemvaeError(f"{storage.path(name)} is not a CSV with a header line ({reason}): correct it") from None
    table.columns = [str(column).strip() for column in table.columns]
    if repeated := sorted(set(table.columns[table.columns.duplicated()])):
        raise LsemvaeError(
            f"{storage.path(name)} has the column {', '.join(repeated)} more than once: keep one of each"
        )
    for column in table.columns:
        if plain_name(column) in _IDENTIFIERS:
            # A column of whole numbers with gaps is often written as 15709.0.
            table[column] = table[column].str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)
        elif separator == ";" and table[column].dtype == object:
            cells = table[column].astype("string").str.strip()
            if cells.dropna().str.fullmatch(_DECIMAL_COMMA).all():
                table[column] = pd.to_numeric(cells.str.replace(",", ".", regex=False)).astype("float64")
    return table


def _separator(content: bytes) -> str:
    header = content.split(b"\n", 1)[0]
    return next((mark for mark in ("\t", ";") if b"," not in header and mark.encode() in header), ",")


def plain_name(column: str) -> str:
    """`"mPAP (mmHg)"` -> `"mpap_mmhg"`, `"f.eid"` -> `"eid"`."""
    name = re.sub(r"[^0-9a-z]+", "_", str(column).lower().removeprefix(LABEL_PREFIX)).strip("_")
    return _ALSO.get(name, name)


def plain_names(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with plain column names. Raises LsemvaeError when two of them become the same."""
    plain = [plain_name(column) for column in table.columns]
    if repeated := sorted({column for column in plain if plain.count(column) > 1}):
        raise LsemvaeError(f"{name} has {', '.join(repeated)} more than once, written differently: keep one of each")
    return table.set_axis(plain, axis="columns")


def require_columns(table: pd.DataFrame, name: str, *columns: str) -> None:
    if absent := [column for column in columns if column not in table.columns]:
        raise LsemvaeError(f"{name} has no column {', '.join(absent)}: it has {_shown(table)}")


def only_present(table: pd.DataFrame, storage: Storage, name: str) -> pd.DataFrame:
    """The rows whose WFDB header is in the source, so that a part of a data set can be used without changes."""
    folders = sorted({path.partition("/")[0] for path in table["path"]})
    found = {header.removesuffix(".hea") for folder in folders for header in storage.list(folder, ".hea")}
    present = table[table["path"].isin(found)].reset_index(drop=True)
    if present.empty:
        raise LsemvaeError(
            f"{storage.uri} holds none of the {len(table)} recordings that {name} lists below "
            f"{', '.join(folders[:3])}: download them beside it"
        )
    if len(present) < len(table):
        logger.info(f"{name}: {len(table) - len(present)} of its {len(table)} recordings are not in the source")
    return present


def clinical_labels(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """`documented_labels` of a cohort's table, with plain names for all of its columns."""
    return documented_labels(plain_names(table, name), name, compute_anew=True)


def documented_labels(table: pd.DataFrame, name: str, *, compute_anew: bool = False) -> pd.DataFrame:
    """The table with the labels that docs/labels.md defines, wherever it has the columns that they need.

    `ph` needs mpap_mmhg, `post_capillary` also pawp_mmhg; `cmr_pawp_mmhg` and `elevated_pawp` need la_volume_ml and
    lv_mass_g; `_FOLLOWING` lists all. These columns get their plain names, the others keep theirs. Sex and age become
    `female` and `age_years`. Where the table has a column of the label's
    name, that one is kept, or replaced if `compute_anew`; a warning counts the values that differ. Raises LsemvaeError
    for a measurement that is not a number or outside `lsemvae.cohorts.labels.PLAUSIBLE`, with its row: a wrong label
    would be learnt.
    """
    names = {column: plain for column in table.columns if (plain := plain_name(column)) in definitions.PLAUSIBLE}
    if repeated := sorted({plain for plain in names.values() if list(names.values()).count(plain) > 1}):
        raise LsemvaeError(f"{name} has {', '.join(repeated)} more than once, written differently: keep one of each")
    table = with_demographics(table.rename(columns=names), plain_name)
    for column, (low, high) in definitions.PLAUSIBLE.items():
        if column in table.columns:
            table[column] = _measured(table[column], name, low, high)
    for label, (define, measured) in _FOLLOWING.items():
        if set(measured) <= set(table.columns):
            computed = define(*(table[column] for column in measured))
            if label in table.columns:
                kept = f"the values of {' and '.join(measured)} are used" if compute_anew else "the column is used"
                _say_what_differs(table[label], computed, f"{name}: column {label}", kept)
                if not compute_anew:
                    continue
            table[label] = computed
    return table


def _say_what_differs(own: pd.Series, computed: np.ndarray, what: str, consequence: str) -> None:
    given = pd.to_numeric(own.map(_number), errors="coerce").to_numpy(float)
    differing = int((~np.isclose(given, computed, atol=0.01) & ~np.isnan(given)).sum())
    if differing:
        logger.warning(
            f"{what}: {differing} values are not what docs/labels.md computes from the measurements; {consequence}"
        )


_FOLLOWING: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "ph": (definitions.pulmonary_hypertension, ("mpap_mmhg",)),
    "post_capillary": (definitions.post_capillary, ("mpap_mmhg", "pawp_mmhg")),
    "cmr_pawp_mmhg": (definitions.cmr_pawp_mmhg, ("la_volume_ml", "lv_mass_g")),
    "elevated_pawp": (definitions.elevated_pawp, ("cmr_pawp_mmhg",)),
    "pasp_ge_45": (definitions.pasp_at_least_45, ("pasp_mmhg",)),
    "elevated_pasp_35": (definitions.elevated_pasp, ("pasp_mmhg",)),
    "tr_velocity_ge_3_2": (definitions.tr_velocity_at_least_3_2, ("tr_velocity_m_s",)),
}


def _measured(values: pd.Series, name: str, low: float, high: float) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    wrong = values.astype("string").str.strip().fillna("").ne("").astype(bool) & ~numbers.between(low, high)
    if wrong.any():
        value = numbers[wrong].iloc[0]
        shown = repr(str(values[wrong].iloc[0])[:20]) if np.isnan(value) else f"{value:g}"
        raise LsemvaeError(
            f"{name}, {first_row(wrong)}: {values.name} is {shown}, no number from {low:g} to {high:g} "
            f"({wrong.sum()} such rows): mend it, or leave it empty if it was not measured"
        )
    return numbers


def plausible(values: pd.Series, measurement: str, name: str, factor: pd.Series | float = 1.0) -> pd.Series:
    """Numbers times `factor`; NaN outside `lsemvae.cohorts.labels.PLAUSIBLE[measurement]`, which a warning counts.

    For published tables, which a user cannot correct.
    """
    low, high = definitions.PLAUSIBLE[measurement]
    numbers = pd.to_numeric(values, errors="coerce").astype("float64") * factor
    kept = numbers.where(numbers.between(low, high))
    wrong = values.astype("string").str.strip().fillna("").ne("").astype(bool) & kept.isna()
    if wrong.any():
        logger.warning(
            f"{name}: {wrong.sum()} values for {measurement} are no number from {low:g} to {high:g}, such as "
            f"{str(values[wrong].iloc[0])[:20]!r}; they count as not measured"
        )
    return kept


def first_row(wrong: pd.Series) -> str:
    """The first wrong row, counted as a spreadsheet does. Identifiers are not shown."""
    return f"row {int(np.flatnonzero(wrong.to_numpy())[0]) + 2} (the header is row 1)"


def join_labels(
    recordings: pd.DataFrame, labels: pd.DataFrame, *, replace_subjects: bool = False, only_labelled: bool = False
) -> pd.DataFrame:
    """`recordings` with the columns of `labels` as `label.NAME` (see `label_values`), NaN where they have no row.

    The key is the first of `KEYS` by which any recording matches. `study_id` and `ecg_id` are other names of
    `record_id`; `file` is a path or a file name; with `subject_id` a label is valid for all recordings of a patient.
    With `replace_subjects` a column `subject_id` or `patient_id` says whose the recordings are; with `only_labelled`
    recordings without a row are left out. Raises LsemvaeError when there is no key, a key is repeated, nothing matches,
    or two recordings have the file name of one label.
    """
    labels = documented_labels(_plain_identifiers(labels), "the labels")
    keys = [key for key in KEYS if key in labels.columns]
    if not keys:
        raise LsemvaeError(f"the labels have no key: give a column {' or '.join(KEYS)}; they have {_shown(labels)}")
    for key in keys:
        ours, theirs = _key_values(recordings, labels, key)
        if (mentioned := ours.isin(theirs.dropna())).any():
            break
    else:
        raise LsemvaeError(
            f"none of the {len(labels)} labels matches one of the {len(recordings)} recordings by "
            f"{' or '.join(keys)}: write these as the source does"
        )
    if repeated := theirs.dropna().duplicated().sum():
        raise LsemvaeError(f"the labels repeat {repeated} values of their key {key!r}: keep one row of each")
    if key == "file" and (shared := ours[mentioned].duplicated().sum()):
        named = ours[mentioned]
        first, second = recordings["path"][mentioned][named == named[named.duplicated()].iloc[0]].iloc[:2]
        raise LsemvaeError(
            f"{shared} file names of the labels belong to several recordings, the first to {first} and {second}: write "
            "their paths instead"
        )

    values = label_values(labels)
    subject = next((column for column in SUBJECTS if column in labels.columns and column != key), None)
    if values.empty and subject is None:
        raise LsemvaeError(f"the labels have no numeric column beside their key {key!r}: they have {_shown(labels)}")
    known = theirs.notna()
    by_key = values[known].set_axis(theirs[known], axis="index").reindex(ours)
    values = by_key.set_axis(recordings.index, axis="index")
    joined = recordings.drop(columns=values.columns, errors="ignore").join(values)
    if replace_subjects and subject is not None:
        subjects = labels.loc[known, subject].astype("string")
        _require_one_spelling(subjects, subject)
        by_key = subjects.set_axis(theirs[known], axis="index").reindex(ours)
        subjects = by_key.set_axis(recordings.index, axis="index").fillna(joined["subject_id"])
        joined["subject_id"] = subjects.astype(object)

    without_recording = len(labels) - int(theirs.isin(ours.dropna()).sum())
    unmentioned = len(recordings) - int(mentioned.sum())
    if without_recording or unmentioned:
        consequence = "are left out" if only_labelled else "no label"
        logger.info(
            f"labels by {key}: {without_recording} of {len(labels)} rows have no recording and are left out, "
            f"{unmentioned} of {len(recordings)} recordings have no row and {consequence}"
        )
    return joined[mentioned].reset_index(drop=True) if only_labelled else joined


def _plain_identifiers(labels: pd.DataFrame) -> pd.DataFrame:
    """The table with `Patient ID` called patient_id, and other keys alike, unless that name is taken."""
    names: dict[str, str] = {}
    for column in labels.columns:
        plain = plain_name(column)
        if plain in (*KEYS, *SUBJECTS) and plain not in labels.columns and plain not in names.values():
            names[column] = plain
    return labels.rename(columns=names)


def _key_values(recordings: pd.DataFrame, labels: pd.DataFrame, key: str) -> tuple[pd.Series, pd.Series]:
    """The values of the key, of recordings and of labels, in a form that is equal where they belong together."""
    if key not in ("path", "file"):  # study_id and ecg_id are called record_id in the recordings
        ours = recordings[key if key in recordings.columns else "record_id"]
        return ours.astype("string"), labels[key].astype("string")
    ours, theirs = _without_extension(recordings["path"]), _without_extension(labels[key])
    if key == "path" or (theirs.str.contains("/", regex=False).any() and ours.isin(theirs.dropna()).any()):
        return ours, theirs
    return tuple(paths.str.replace(r"^.*/", "", regex=True) for paths in (ours, theirs))


def _without_extension(paths: pd.Series) -> pd.Series:
    paths = paths.astype("string").str.replace("\\", "/", regex=False).str.removeprefix("./")
    return paths.str.replace(_EXTENSION, "", regex=True)


def _require_one_spelling(subjects: pd.Series, column: str) -> None:
    """Raises LsemvaeError when 12 and 00012 are both there: most likely one patient, who would be in two folds."""
    spellings = subjects.dropna().drop_duplicates()
    if twice := spellings.str.lstrip("0").duplicated().sum():
        raise LsemvaeError(
            f"{twice} values of {column} are there with and without leading zeros: write them in one way"
        )


def label_values(labels: pd.DataFrame, name: str = "the labels") -> pd.DataFrame:
    """The columns that are no keys and hold only numbers, yes and no, or true and false, as `label.NAME` in float64.

    Yes and true are 1, no and false are 0, in any case; an empty cell is NaN. A warning names every other column and
    says why it is no label.
    """
    columns: dict[str, pd.Series] = {}
    nearly, text = [], []
    for column in labels.columns:
        if plain_name(column) in _IDENTIFIERS or str(column).startswith("Unnamed"):
            continue
        values = labels[column]
        is_number = pd.api.types.is_numeric_dtype(values)
        numbers = values.astype("Float64").astype("float64") if is_number else values.map(_number).astype("float64")
        wrong = numbers.isna() & values.notna()
        if not wrong.any():
            columns[LABEL_PREFIX + str(column).removeprefix(LABEL_PREFIX)] = numbers
        elif 2 * wrong.sum() <= values.notna().sum():
            nearly.append(_why_no_label(column, values, wrong))
        else:
            text.append(repr(str(column)[:40]))
    reasons = nearly + ([f"{', '.join(text)} (mostly text)"] if text else [])
    if reasons:
        logger.warning(f"{name}: no label is made of {'; '.join(reasons)}")
    return pd.DataFrame(columns, index=labels.index)


_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


def _number(value: object) -> float:
    """1 and 0 for yes and no, NaN for what is empty or neither number nor answer."""
    if isinstance(value, str):
        text = value.strip().casefold()
        if text in _WORDS:
            return _WORDS[text]
        value = text if _NUMBER.fullmatch(text) else "nan"
    number = float(value) if isinstance(value, int | float | str | np.number | np.bool_) else np.nan
    return number if np.isfinite(number) else np.nan


def _why_no_label(column: str, values: pd.Series, wrong: pd.Series) -> str:
    """Shows a value, because most others are numbers or answers: in a column of text it might be a name."""
    row = int(np.flatnonzero(wrong.to_numpy())[0])
    return (
        f"{str(column)[:40]!r} ({wrong.sum()} of {values.notna().sum()} values are no number, yes or no, such as "
        f"{str(values.iloc[row])[:12]!r}, the first in row {row + 2}: correct them, or leave the cells empty)"
    )


def _shown(table: pd.DataFrame) -> str:
    names = [str(column)[:40] for column in table.columns]
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") if names else "none"
