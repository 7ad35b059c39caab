"""Which cohort a source is, which of its recordings are used, and what is left out and why."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from lsemvae.cohorts import aspire, echonext, folder, kardia, ludb, mimic_iv_ecg, mimic_iv_echo, ptb_xl, ukb_20205
from lsemvae.cohorts.mimic_iv_echo import EchoOptions
from lsemvae.cohorts.source import Source
from lsemvae.cohorts.tables import read_labels
from lsemvae.cohorts.withdrawn import NOBODY, WITHDRAWN, Withdrawn, read_withdrawn, require_withdrawn
from lsemvae.errors import LsemvaeError
from lsemvae.formats import PassedOver
from lsemvae.formats.readers import HEAD_BYTES, reader_of
from lsemvae.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """A kind of source, recognised by a table that it comes with, or else by the names of its recordings.

    `recordings(storage, labels)` gives one row for each recording: `path` (relative to the source), `record_id` and
    `subject_id` (text), and `label.NAME` columns (float64, NaN where a label is not known). `labels` is what
    `read_labels` returns, or None; it adds to the source's own labels, and replaces those of the same name.
    `owns` says whether a recording belongs to this cohort, by its path. `lists` is False where a table alone decides
    which recordings there are. `uv_per_lsb` is the step of the raw counts where the files state a wrong one.
    """

    recordings: Callable[[Storage, pd.DataFrame | None], pd.DataFrame]
    tables: tuple[str, ...] = ()
    owns: Callable[[str], bool] | None = None
    lists: bool = True
    uv_per_lsb: float | None = None


COHORTS = {
    "mimic-iv-ecg": Cohort(mimic_iv_ecg.recordings, (mimic_iv_ecg.RECORD_LIST,), lists=False),
    "mimic-iv-echo": Cohort(mimic_iv_echo.recordings, mimic_iv_echo.MEASUREMENTS, lists=False),
    "echonext": Cohort(echonext.recordings, echonext.TABLES, lists=False),
    "ptb-xl": Cohort(ptb_xl.recordings, (ptb_xl.DATABASE,), lists=False),
    "ludb": Cohort(ludb.recordings, (ludb.TABLE,), lists=False, uv_per_lsb=ludb.UV_PER_LSB),
    "aspire": Cohort(aspire.recordings, (aspire.TABLE,)),
    "ukb-20205": Cohort(ukb_20205.recordings, (ukb_20205.TABLE,), ukb_20205.owns),
    "kardia": Cohort(kardia.recordings, (kardia.TABLE,), kardia.owns),
    "folder": Cohort(folder.recordings),
}
_TABLES = (WITHDRAWN, "labels.csv")
"""Files that any source may have beside its recordings."""


@dataclass(frozen=True)
class Selection:
    """The recordings of a cohort that are used. `left_out` are files of the source that are in no row, and why."""

    name: str
    cohort: Cohort
    table: pd.DataFrame
    left_out: list[PassedOver]
    withdrawn: Withdrawn


def select(
    storage: Storage,
    name: str = "auto",
    labels: str | None = None,
    limit: int | None = None,
    withdrawn: str | None = None,
    echo: EchoOptions | None = None,
) -> Selection:
    """The recordings of a source that belong to the cohort `name`, or to the one that it is (`"auto"`).

    `labels` and `withdrawn` are paths or URIs, `limit` keeps only the first recordings. Subjects who have withdrawn
    are left out of every cohort. `echo` is for mimic-iv-echo only. Raises LsemvaeError when the cohort is unknown or
    ambiguous, when there are no recordings, and when two have one id.
    """
    source = Source.of(storage)
    if name == "auto":
        name = detect(source)
    if name not in COHORTS:
        raise LsemvaeError(f"there is no cohort {name!r}: choose one of {', '.join(COHORTS)}")
    cohort = COHORTS[name]
    if echo is not None:
        if name != "mimic-iv-echo":
            raise LsemvaeError(f"{storage.uri} is {name}: --echo-days and --echo-columns are for mimic-iv-echo only")
        cohort = replace(cohort, recordings=partial(mimic_iv_echo.recordings, echo=echo))
    gone = read_withdrawn(source) | (require_withdrawn(withdrawn) if withdrawn else NOBODY)
    given = read_labels(labels) if labels else None
    try:
        table = cohort.recordings(source, given)
    except FileNotFoundError as error:
        raise LsemvaeError(f"{storage.uri} lacks a table of the cohort {name} ({error}): check --cohort") from None
    left_out = _left_out(source, name, table, labels) if cohort.lists else []
    if gone.subjects:
        # A file that is named for its participant is known by its name, whichever cohort reads it.
        is_gone = gone.mask(table["subject_id"]) | gone.mask(table["path"].map(ukb_20205.eid_of))
        log.info(
            f"{is_gone.sum()} recordings of subjects who have withdrawn are left out (list {gone.digest} of "
            f"{len(gone.subjects)} subjects)"
        )
        table = table[~is_gone].reset_index(drop=True)
    if left_out:
        codes = Counter(file.code.replace("_", " ") for file in left_out).most_common()
        log.info(f"files that are left out: {', '.join(f'{count} {code}' for code, count in codes)}")
    table = table if limit is None else table.head(limit)
    if table.empty:
        raise LsemvaeError(f"{storage.uri} has no recordings of the cohort {name!r}")
    _require_own_ids(storage, table)
    return Selection(name, cohort, table, left_out, gone)


def _require_own_ids(storage: Storage, table: pd.DataFrame) -> None:
    repeated = table[table["record_id"].duplicated(keep=False)]
    if len(repeated):
        first, second = repeated["path"][repeated["record_id"] == repeated["record_id"].iloc[0]].iloc[:2]
        count = int(table["record_id"].duplicated().sum())
        raise LsemvaeError(
            f"{storage.uri}: {count} recordings have the id of another, the first are {first} and {second}: give "
            "each its own"
        )


def detect(storage: Storage) -> str:
    """The cohort whose table the source has, or whose file names its recordings have; otherwise `"folder"`.

    Raises LsemvaeError where it is ambiguous, because every choice would change what is used: the user must choose.
    """
    source = Source.of(storage)
    tables = {name: t for name, c in COHORTS.items() for t in reversed(c.tables) if source.exists(t)}
    if "mimic-iv-echo" in tables:  # its table counts beside the recordings of MIMIC-IV-ECG, and then as theirs
        del tables["mimic-iv-ecg" if "mimic-iv-ecg" in tables else "mimic-iv-echo"]
    if len(tables) > 1:
        shown = " and ".join(f"{table} (of {name})" for name, table in tables.items())
        raise LsemvaeError(f"{source.uri} has {shown}: say with --cohort which of them it is")
    if tables:
        return next(iter(tables))
    recordings = source.found.recordings
    if named := [path for path in recordings if ukb_20205.owns(path)]:
        if others := [path for path in recordings if not ukb_20205.is_of_ukb(path) and _is_known(source, path)]:
            raise LsemvaeError(
                f"{source.uri} has {len(named)} recordings named as those of UK Biobank and {len(others)} others "
                f"({_examples(others)}): give --cohort ukb-20205 to use the first, one for each participant, or "
                "--cohort folder to use all, each as a subject of its own unless --labels says whose it is"
            )
        return "ukb-20205"
    # As kardia, recordings of other formats would be left out; as a folder nothing is.
    is_kardia = all(map(kardia.owns, recordings)) and any(path.lower().endswith(".atc") for path in recordings)
    return "kardia" if is_kardia else "folder"


def _is_known(source: Source, path: str) -> bool:
    """Whether it is surely a recording: XML that is cut short or empty counts as one until it is read."""
    return not path.lower().endswith(".xml") or reader_of(source.head(path, HEAD_BYTES)) is not None


def _left_out(source: Source, name: str, table: pd.DataFrame, labels: str | None) -> list[PassedOver]:
    """Files that are in no row of the table, without those that belong to a recording or to the cohort itself.

    What a cohort leaves out by its own rules (repeated visits, who has withdrawn) is not among them: these files are
    named for participants, and the cohort has counted them.
    """
    cohort, used = COHORTS[name], set(table["path"])
    own = {*cohort.tables, *_TABLES}
    unused = [] if name == "folder" else [path for path in source.found.recordings if path not in used]
    others = [path for path in unused if not (cohort.owns and cohort.owns(path))]
    return [PassedOver(path, "other_recording", f"the cohort {name} does not take it") for path in others] + [
        file
        for file in source.found.passed_over
        if file.code != "hidden" and file.path not in used | own and not _is_at(source, file.path, labels)
    ]


def _is_at(source: Source, path: str, uri: str | None) -> bool:
    return uri is not None and Storage.open(uri).base == source.path(path)


def describe_left_out(left_out: list[PassedOver]) -> str:
    """One line: how many files are left out for which reason, with the first names of each. For a person, not a log."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for file in left_out:
        by_reason[file.reason].append(file.path)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(paths)} ({_examples(paths)}): {reason}" for reason, paths in ordered)


def _examples(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (", …" if len(paths) > 2 else "")
