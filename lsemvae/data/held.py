"""Which files still hold recordings of subjects who have withdrawn, or were made from them.

- A table (Parquet or CSV) with a row of the subject, or of one of the subject's recordings: shards, parts, scores,
  explanations, embeddings' scores, labels.
- A JSON file or a report with a recording's id, and a file that is named for a recording: pictures, and recordings
  themselves. The report of ingest shows some recordings without their ids: it is named if its data set holds them.
- A bundle, also that of a checkpoint, whose provenance names a data set that holds the subject, and one that was
  fine-tuned from such a bundle.

The ids of the recordings come from the tables that have both columns, so give all places at once. A model is found by
the data set that it was trained on: look before you delete or ingest again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.cohorts.withdrawn import SUBJECT_COLUMNS, WITHDRAWN, Withdrawn
from lsemvae.data.shards import CONCURRENT_READS, MANIFEST, ShardedDataset
from lsemvae.errors import FileTooLarge, StorageError
from lsemvae.storage import Storage

RECORD_COLUMNS = {"record_id", "study_id"}
_COLUMNS = SUBJECT_COLUMNS | RECORD_COLUMNS
MAX_TEXT_BYTES = 2**26
REPORTS = (".html", ".md")
ROWS, TEXT, NAME, MODEL, PERHAPS, NOT_READ = "rows", "text", "name", "model", "model, perhaps", "not read"
"""What a file holds. `PERHAPS` is a model whose training left out another list of subjects than this one."""


@dataclass(frozen=True)
class Held:
    """One file, and how many rows or values of these subjects it has."""

    place: str
    path: str
    what: str
    count: int


@dataclass
class Search:
    """All that is found. `data_digests` and `model_digests` are those of data sets and bundles, for MLflow."""

    gone: Withdrawn
    records: set[str] = field(default_factory=set)
    found: list[Held] = field(default_factory=list)
    data_digests: dict[str, str] = field(default_factory=dict)
    """Digest of each data set that holds such a subject -> its URI."""
    model_digests: set[str] = field(default_factory=set)

    def look(self, places: Sequence[Storage]) -> "Search":
        """Itself, when all places have been looked through. Raises StorageError when a place fails."""
        paths = {place: [path for path in place.list() if not path.endswith(WITHDRAWN)] for place in places}
        tables = {place: _each(partial(_table, place), _tables(found)) for place, found in paths.items()}
        for table in (table for of in tables.values() for table in of.values() if table is not None):
            self.records |= _recordings(table[self._of_subjects(table)])
        for place, of in tables.items():
            for path, table in of.items():
                self._add(place, path, NOT_READ if table is None else ROWS, self._rows(table))
        documents = {
            place: _each(partial(_document, place), [path for path in found if path.endswith(".json")])
            for place, found in paths.items()
        }
        for place, of_place in documents.items():
            self._data_sets(place, of_place, paths[place])
        self._models(documents)
        for place, found in paths.items():
            self._named(place, found, documents[place])
        return self

    def _of_subjects(self, table: pd.DataFrame) -> pd.Series:
        """Which rows are of these subjects."""
        found = pd.Series(False, table.index)
        for name in sorted(SUBJECT_COLUMNS & set(table)):
            found |= self.gone.mask(table[name].map(_last))
        return found

    def _rows(self, table: pd.DataFrame | None) -> int:
        if table is None:
            return 0
        found = self._of_subjects(table)
        for name in sorted(RECORD_COLUMNS & set(table)):
            found |= table[name].map(_last).isin(self.records)
        return int(found.sum())

    def _add(self, place: Storage, path: str, what: str, count: int) -> None:
        if count or what == NOT_READ:
            self.found.append(Held(place.uri, path, what, count))

    def _data_sets(self, place: Storage, documents: Mapping[str, "Document"], paths: Sequence[str]) -> None:
        """The data sets that have a shard with such a subject."""
        held = {found.path for found in self.found if found.place == place.uri}
        for path in (path for path in documents if PurePosixPath(path).name == MANIFEST):
            folder = path.removesuffix(MANIFEST).rstrip("/")
            data = ShardedDataset.open((place / folder if folder else place).uri)
            if any(str(PurePosixPath(folder, shard.path)) in held for shard in data.manifest.shards):
                self.data_digests[data.manifest.digest] = data.storage.uri
                if (report := str(PurePosixPath(folder, "report.html"))) in paths:
                    self._add(place, report, TEXT, 1)

    def _models(self, documents: Mapping[Storage, Mapping[str, "Document"]]) -> None:
        """Bundles that were trained on these data sets, then those that were made from such an encoder."""
        bundles = {
            (place, path): (document.digest, document.content["provenance"])
            for place, of_place in documents.items()
            for path, document in of_place.items()
            if isinstance(document.content, dict) and isinstance(document.content.get("provenance"), dict)
        }
        for (place, path), (digest, provenance) in bundles.items():
            if kind := self._trained_on(provenance.get("data")):
                self.model_digests.add(digest)
                self._add(place, path, kind, 1)
        for (place, path), (digest, provenance) in bundles.items():
            if provenance.get("encoder", {}).get("digest") in self.model_digests and digest not in self.model_digests:
                self.model_digests.add(digest)
                self._add(place, path, MODEL, 1)

    def _trained_on(self, data: Any) -> str | None:
        """Whether a model was, by what its provenance says of its data."""
        if not isinstance(data, dict):
            return None
        # Several data sets have one digest together, and their URIs are joined; a repeated one is `URI:2`.
        uris = {uri.rpartition(":")[0] if uri.rpartition(":")[2].isdigit() else uri for uri in data["uri"].split()}
        together = len(uris) > 1 and uris & set(self.data_digests.values())
        if data.get("digest") not in self.data_digests and not together:
            return None
        left_out = [text for name, text in _named_strings(data.get("since_ingest", {})) if name == "withdrawn" and text]
        if left_out and all(digest == self.gone.digest for digest in left_out):
            return None
        return PERHAPS if left_out else MODEL

    def _named(self, place: Storage, paths: Sequence[str], documents: Mapping[str, "Document"]) -> None:
        """Files that are named for a recording, and JSON files and reports with its id."""
        names = {_safe(record) for record in self.records}
        reports = _each(partial(_words, place), [path for path in paths if path.endswith(REPORTS)])
        for path in paths:
            stem = PurePosixPath(path).name.partition(".")[0]
            # A recording is named RECORD.xml, a picture RECORD-….
            if {_safe(stem), _safe(stem.partition("-")[0])} & names:
                self._add(place, path, NAME, 1)
            elif path in reports:
                self._add(place, path, TEXT, len(reports[path] & names))
            elif path in documents:
                strings = _named_strings(documents[path].content)
                self._add(place, path, TEXT, sum(_last(text) in self.records for pair in strings for text in pair))


@dataclass(frozen=True)
class Document:
    """A JSON file: its content, None where it cannot be read, and the digest of its bytes, which is a bundle's."""

    content: Any
    digest: str


def _each(call: Callable[[str], Any], paths: Sequence[str]) -> dict[str, Any]:
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        return dict(zip(paths, pool.map(call, paths), strict=True))


def _tables(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.endswith((".parquet", ".csv"))]


def _table(place: Storage, path: str) -> pd.DataFrame | None:
    """The columns that name subjects and recordings, as text; None where it cannot be read."""
    try:
        with place.reading(path) as stream:
            if path.endswith(".csv"):
                return pd.read_csv(stream, dtype=str, keep_default_na=False, usecols=lambda name: name in _COLUMNS)
            file = pq.ParquetFile(stream)
            return file.read([name for name in file.schema_arrow.names if name in _COLUMNS]).to_pandas().astype(str)
    except (ValueError, pa.ArrowException) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, pa.ArrowException):
            raise
        return None


def _document(place: Storage, path: str) -> Document:
    try:
        content = place.read_bytes(path, MAX_TEXT_BYTES)
    except FileTooLarge:
        return Document(None, "")
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        return Document(json.loads(content), digest)
    except ValueError:
        return Document(None, digest)


def _words(place: Storage, path: str) -> set[str]:
    try:
        text = place.read_bytes(path, MAX_TEXT_BYTES).decode(errors="replace")
    except FileTooLarge:
        return set()
    return set(re.findall(r"[A-Za-z0-9_]+", text)) | {_safe(word) for word in re.findall(r"[\w.-]+", text)}


def _recordings(table: pd.DataFrame) -> set[str]:
    return {_last(value) for name in RECORD_COLUMNS & set(table) for value in table[name]}


def _named_strings(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a JSON document, with the name that it has there; also names alone."""
    if isinstance(content, str):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key, ""
            yield from _named_strings(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _named_strings(value, "")


def _last(identifier: str) -> str:
    """evaluate.py writes COHORT/RECORD for recordings of further cohorts."""
    return identifier.rpartition("/")[2]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")
