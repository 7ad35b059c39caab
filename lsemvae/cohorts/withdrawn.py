"""Who has withdrawn: a list that is consulted whenever recordings are used, not only when they are ingested.

The file has an identifier a line, as UK Biobank sends it, with or without a header line. It is `withdrawn.csv` in the
source or beside the shards. An identifier matches a subject with or without leading zeros: leaving out too many is
the smaller mistake here.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

WITHDRAWN = "withdrawn.csv"
SUBJECT_COLUMNS = {"eid", "f.eid", "subject_id", "patient_id", "subject", "patient", "participant"}
"""What tables call the column of subjects; a list may have such a header."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Withdrawn:
    """Identifiers of subjects whose recordings must not be used; those that are numbers without leading zeros."""

    subjects: frozenset[str] = frozenset()

    @classmethod
    def of(cls, subjects: Iterable[str]) -> "Withdrawn":
        """These subjects."""
        return cls(frozenset(_plain(subject) for subject in subjects))

    def mask(self, subjects: Iterable[str]) -> np.ndarray:
        """Which of these have withdrawn, bool [B]."""
        return np.array([_plain(subject) in self.subjects for subject in subjects], dtype=bool)

    @property
    def digest(self) -> str:
        """Names the list in logs and plans without listing it; empty if nobody has withdrawn.

        It keeps no secret: whoever tries all seven-digit numbers finds the identifier in a list of one.
        """
        text = "\n".join(sorted(self.subjects))
        return hashlib.sha256(text.encode()).hexdigest()[:16] if self.subjects else ""

    def __or__(self, other: "Withdrawn") -> "Withdrawn":
        return Withdrawn(self.subjects | other.subjects)


NOBODY = Withdrawn()


def read_withdrawn(storage: Storage, name: str = WITHDRAWN, *, only_numbers: bool = False) -> Withdrawn:
    """The list in the file `name`; nobody where there is no such file.

    Raises LsemvaeError for a line that is no identifier (with `only_numbers`, no eid), without showing it.
    """
    shown = name or storage.uri
    try:
        text = storage.read_bytes(name).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return NOBODY
    except UnicodeDecodeError:
        raise LsemvaeError(f"{shown} is no plain text: give an eid a line") from None
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        identifier = line.strip(" \t\"',;")
        if not identifier or (number == 1 and identifier.lower() in SUBJECT_COLUMNS):
            continue
        identifier = identifier.removesuffix(".0")
        if any(mark in identifier for mark in ",;\t") or (only_numbers and not identifier.isdecimal()):
            raise LsemvaeError(f"{shown}, line {number}, is no eid: give an eid a line and nothing else")
        found.add(_plain(identifier))
    return Withdrawn(frozenset(found))


def require_withdrawn(uri: str) -> Withdrawn:
    """The list that a user names. Raises LsemvaeError where it is absent, so that a mistyped path keeps nobody in."""
    storage = Storage.open(uri)
    if not storage.exists():
        raise LsemvaeError(f"{uri} does not exist: give the path or URI of the list of withdrawn subjects")
    return read_withdrawn(storage, "")


def _plain(subject: str) -> str:
    return subject.lstrip("0") or "0" if subject.isdecimal() else subject
