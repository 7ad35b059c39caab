"""A source of recordings whose files are listed, and looked into, once."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from lsemvae.formats import Listing, find_recordings
from lsemvae.storage import Storage

UKB_FILE = re.compile(r"(?:^|/)(\d+)_20205_(\d+)_(\d+)\.xml$", re.IGNORECASE)
"""The name of a recording of UK Biobank's field 20205: participant, instance, array."""


@dataclass(frozen=True)
class Source(Storage):
    """A storage that keeps its listing: detection, the cohort and the report of files left out all need it."""

    inner: Storage

    @classmethod
    def of(cls, storage: Storage) -> "Source":
        return storage if isinstance(storage, Source) else cls(storage.uri, storage)

    @cached_property
    def found(self) -> Listing:
        """Recordings and files passed over. UK Biobank's recordings are known by name, so they are not opened here."""
        paths = self._all
        found = find_recordings([path for path in paths if not UKB_FILE.search(path)], self.head)
        named = [path for path in paths if UKB_FILE.search(path)]
        return Listing(sorted([*named, *found.recordings]), found.passed_over)

    @cached_property
    def _all(self) -> Sequence[str]:
        return tuple(self.inner.list())

    def list(self, prefix: str = "", suffix: str | None = None) -> Iterator[str]:
        if prefix and "_all" not in self.__dict__:  # a part of a large source: do not list the whole
            yield from self.inner.list(prefix, suffix)
            return
        start = f"{prefix}/" if prefix else ""
        yield from (path for path in self._all if path.startswith(start) and path.endswith(suffix or ""))
