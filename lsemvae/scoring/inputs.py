"""What workflows/score.py reads: shards, or recordings as they came, in parts that are the same at every start."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.cohorts import COHORTS, detect, read_labels
from lsemvae.data.shards import MANIFEST, ROWS_PER_GROUP, SIGNAL_COLUMNS, Shard, ShardedDataset, signals_mv
from lsemvae.errors import LsemvaeError, StorageError, UnreadableRecording
from lsemvae.formats import read_relative
from lsemvae.quality import quality_flags
from lsemvae.storage import Storage

PART_RECORDS = 256
_COLUMNS = ["record_id", "subject_id", "flags", *SIGNAL_COLUMNS]


@dataclass(frozen=True)
class Read:
    """One recording: its signal [L, T] in mV of the leads asked for, or why it is `unreadable`."""

    subject_id: str
    record_id: str
    flags: Sequence[str] = ()
    signal_mv_LT: np.ndarray | None = None
    rate_hz: float = 0.0
    unreadable: str | None = None
    reason: str | None = None


class CohortInput(Protocol):
    """Both kinds are sent to other processes. `digest` names which recordings these are, in which parts."""

    uri: str
    records: int
    digest: str
    unreadable_before: int
    parts: Sequence[Any]

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        """The recordings of a part in order, some at a time. Raises StorageError when the place fails."""
        ...

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        """Whether any of these rows of a part, which could not be read, can be now."""
        ...


@dataclass(frozen=True)
class Shards:
    """A shard is a part."""

    data: ShardedDataset

    @property
    def uri(self) -> str:
        return self.data.storage.uri

    @property
    def records(self) -> int:
        return self.data.manifest.rows_in("all")

    @property
    def digest(self) -> str:
        return self.data.manifest.digest

    @property
    def unreadable_before(self) -> int:
        return self.data.manifest.unreadable

    @property
    def parts(self) -> list[Shard]:
        return self.data.manifest.of_split("all")

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        shard = self.parts[number]
        try:
            content = self.data.storage.read_bytes(shard.path)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != shard.digest:
            raise LsemvaeError(
                f"{self.uri}/{shard.path} is not what was ingested, its SHA-256 is another: remove it and {MANIFEST}, "
                "and ingest again"
            )
        for batch in pq.ParquetFile(io.BytesIO(content)).iter_batches(ROWS_PER_GROUP, columns=_COLUMNS):
            columns = {name: batch.column(name).to_pylist() for name in _COLUMNS}
            yield [
                Read(subject_id, record_id, flags, signal_mv_LT, rate_hz)
                for subject_id, record_id, flags, signal_mv_LT, rate_hz in zip(
                    columns["subject_id"],
                    columns["record_id"],
                    columns["flags"],
                    signals_mv(columns, leads),
                    columns["rate_hz"],
                    strict=True,
                )
            ]

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        return False


@dataclass(frozen=True)
class Recordings:
    """Recordings of a cohort in the order of its table, `PART_RECORDS` to a part. The table travels with it."""

    storage: Storage
    digest: str
    table: pa.Table
    """path, record_id, subject_id."""
    uv_per_lsb: float | None
    threads: int
    unreadable_before: int = 0

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def records(self) -> int:
        return self.table.num_rows

    @property
    def parts(self) -> range:
        return range(0, self.records, PART_RECORDS)

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        entries = self._entries(number)
        with ThreadPoolExecutor(self.threads) as pool:
            reads = pool.map(lambda entry: self._read(entry, leads), entries)
            for start in range(0, len(entries), ROWS_PER_GROUP):
                yield [next(reads) for _ in entries[start : start + ROWS_PER_GROUP]]

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        entries = self._entries(number)
        return any(self._read(entries[row], ()).unreadable is None for row in rows)

    def _entries(self, number: int) -> list[dict[str, str]]:
        return self.table.slice(self.parts[number], PART_RECORDS).to_pylist()

    def _read(self, entry: dict[str, str], leads: Sequence[str]) -> Read:
        named = {"subject_id": entry["subject_id"], "record_id": entry["record_id"]}
        try:
            record = read_relative(entry["path"], self.storage.read_bytes, uv_per_lsb=self.uv_per_lsb)
            flags = [*record.flags, *quality_flags(record)]
            return Read(**named, flags=flags, signal_mv_LT=record.signal_for(leads), rate_hz=record.rate_hz)
        except UnreadableRecording as error:
            return Read(**named, unreadable=error.code, reason=" ".join(str(error).split()))
        except (NotADirectoryError, IsADirectoryError) as error:
            return Read(**named, unreadable="missing_file", reason=error.strerror)
        except StorageError as error:  # without the recording's name, which often says whose it is
            text = str(error).replace(str(PurePosixPath(entry["path"]).with_suffix("")), "(a recording)")
            raise StorageError(text, passing=error.passing) from None
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a reader that fails on one recording must not end a day's work on the others
            return Read(**named, unreadable="reader_failed", reason=f"{type(error).__name__}: {error}")


def open_shards(uri: str) -> Shards:
    data = ShardedDataset.open(uri)
    data.require_rows("all")
    return Shards(data)


def open_recordings(uri: str, cohort: str, labels: str | None, limit: int | None, threads: int) -> Recordings:
    """Which recordings of the source belong to the cohort, by the rules of workflows/ingest.py."""
    storage = Storage.open(uri).require()
    name = detect(storage) if cohort == "auto" else cohort
    if name not in COHORTS:
        raise LsemvaeError(f"there is no cohort {name!r}: choose one of {', '.join(COHORTS)}")
    table = COHORTS[name].recordings(storage, read_labels(labels) if labels else None)
    if limit is not None:
        table = table.head(limit)
    if table.empty:
        raise LsemvaeError(f"{storage.uri} has no recordings of the cohort {name!r}")
    if repeated := int(table["record_id"].duplicated().sum()):
        raise LsemvaeError(f"{storage.uri}: {repeated} recordings have the id of another: give each its own")
    chosen = table[["path", "record_id", "subject_id"]].astype(str)
    digest = hashlib.sha256(json.dumps([name, storage.uri, PART_RECORDS, COHORTS[name].uv_per_lsb]).encode())
    digest.update(pd.util.hash_pandas_object(chosen, index=False).to_numpy("<u8").tobytes())
    packed = pa.Table.from_pandas(chosen, preserve_index=False)
    return Recordings(storage, digest.hexdigest()[:16], packed, COHORTS[name].uv_per_lsb, threads)
