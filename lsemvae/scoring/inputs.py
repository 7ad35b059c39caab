"""The recordings of a cohort: shards or original recordings, in parts that are the same at every start."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.cohorts import select
from lsemvae.data.reading import read_or_reason
from lsemvae.data.shards import (
    LABEL_PREFIX,
    MANIFEST,
    ROWS_PER_GROUP,
    SIGNAL_COLUMNS,
    Shard,
    ShardedDataset,
    signals_mv,
)
from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.leads import LEADS
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from lsemvae.storage import Storage

PART_RECORDS = 256
_COLUMNS = ["record_id", "subject_id", "flags", "measured", "derived", *SIGNAL_COLUMNS]


@dataclass(frozen=True)
class Read:
    """One recording: its signal [L, T] in mV of the leads asked for, or why it is `unreadable`.

    `present` are the leads that the recording has, `derived` those of them that were computed from I and II.
    """

    subject_id: str
    record_id: str
    flags: Sequence[str] = ()
    signal_mv_LT: np.ndarray | None = None
    rate_hz: float = 0.0
    present: Sequence[str] = ()
    derived: Sequence[str] = ()
    unreadable: str | None = None
    reason: str | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    """Those asked for that are known."""


def signals_of(reads: Sequence[Read]) -> tuple[list[np.ndarray], list[float]]:
    """The signals and rates of those that are readable, in order."""
    readable = [(read.signal_mv_LT, read.rate_hz) for read in reads if read.signal_mv_LT is not None]
    return [signal_mv_LT for signal_mv_LT, _ in readable], [rate_hz for _, rate_hz in readable]


class CohortInput(Protocol):
    """A cohort in parts. It is sent to other processes. `digest` identifies the recordings and their division."""

    @property
    def uri(self) -> str: ...

    @property
    def records(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def unreadable_before(self) -> int: ...

    @property
    def parts(self) -> Sequence[Any]: ...

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        """The recordings of a part in order, in several lists. Raises StorageError when the storage fails."""
        ...

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        """Whether any of these rows of a part, which were unreadable, can be read now."""
        ...


@dataclass(frozen=True)
class Shards:
    """A data set of shards; each shard is a part."""

    data: ShardedDataset

    @property
    def uri(self) -> str:
        return self.data.storage.uri

    @cached_property
    def records(self) -> int:
        return self.data.rows("all")

    @property
    def digest(self) -> str:
        """Of the shards, and of the list of who has withdrawn: without them the recordings are others."""
        gone = self.data.withdrawn.digest
        return f"{self.data.manifest.digest}-{gone}" if gone else self.data.manifest.digest

    @property
    def unreadable_before(self) -> int:
        return self.data.manifest.unreadable

    @property
    def parts(self) -> list[Shard]:
        return self.data.manifest.of_split("all")

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        return read_shard(self.data, self.parts[number], leads)

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        return False


def read_shard(
    data: ShardedDataset,
    shard: Shard,
    leads: Sequence[str],
    *,
    labels: Sequence[str] = (),
    rows: Set[int] | None = None,
) -> Iterator[list[Read]]:
    """The recordings of a shard without those of subjects who have withdrawn, in several lists; only `rows` of them."""
    try:
        content = data.storage.read_bytes(shard.path)
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != shard.digest:
        raise LsemvaeError(
            f"{data.storage.uri}/{shard.path} is not what was ingested, its SHA-256 is another: remove it and "
            f"{MANIFEST}, and ingest again"
        )
    file, start = pq.ParquetFile(io.BytesIO(content)), 0
    names = [*_COLUMNS, *(name for name in _label_columns(labels) if name in file.schema_arrow.names)]
    for batch in file.iter_batches(ROWS_PER_GROUP, columns=names):
        kept = batch.filter(pa.array(~data.withdrawn.mask(batch.column("subject_id").to_pylist())))
        start, first = start + kept.num_rows, start
        if rows is not None:
            kept = kept.filter(pa.array([row in rows for row in range(first, start)], pa.bool_()))
        if kept.num_rows:
            yield _reads(data, kept, leads, labels)


def _reads(data: ShardedDataset, batch: pa.RecordBatch, leads: Sequence[str], labels: Sequence[str]) -> list[Read]:
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    if data.labels:  # they take the place of those in the shards
        for name in set(_label_columns(labels)) & set(data.labels.columns):
            columns[name] = data.labels.of(name, np.array(columns["record_id"])).tolist()
    signals = signals_mv(columns, leads)
    return [
        Read(
            columns["subject_id"][row],
            columns["record_id"][row],
            flags=columns["flags"][row],
            signal_mv_LT=signals[row],
            rate_hz=columns["rate_hz"][row],
            present=[lead for i, lead in enumerate(LEADS) if measured_L[i] or derived_L[i]],
            derived=[lead for i, lead in enumerate(LEADS) if derived_L[i]],
            labels=_known_labels({name: values[row] for name, values in columns.items()}),
        )
        for row, (measured_L, derived_L) in enumerate(zip(columns["measured"], columns["derived"], strict=True))
    ]


def _label_columns(labels: Sequence[str]) -> list[str]:
    return [LABEL_PREFIX + name for name in labels]


def _known_labels(row: Mapping[str, Any]) -> dict[str, float]:
    labels = {name.removeprefix(LABEL_PREFIX): row[name] for name in row if name.startswith(LABEL_PREFIX)}
    return {name: value for name, value in labels.items() if value is not None and not np.isnan(value)}


@dataclass(frozen=True)
class Recordings:
    """Recordings of a cohort in the order of its table, `part_records` in each part."""

    storage: Storage
    digest: str
    table: pa.Table
    """path, record_id, subject_id; and label columns, which each `Read` has, too."""
    uv_per_lsb: float | None
    threads: int
    patience_s: float = 0.0
    unreadable_before: int = 0
    part_records: int = field(default_factory=lambda: PART_RECORDS)

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def records(self) -> int:
        return self.table.num_rows

    @property
    def parts(self) -> range:
        return range(0, self.records, self.part_records)

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        entries = self._entries(number)
        with ThreadPoolExecutor(self.threads) as pool:
            reads = pool.map(lambda entry: self._read(entry, leads), entries)
            for start in range(0, len(entries), ROWS_PER_GROUP):
                yield [next(reads) for _ in entries[start : start + ROWS_PER_GROUP]]

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        entries = self._entries(number)
        return any(self._read(entries[row], ()).unreadable is None for row in rows)

    def _entries(self, number: int) -> list[dict[str, Any]]:
        return self.table.slice(self.parts[number], self.part_records).to_pylist()

    def _read(self, entry: dict[str, Any], leads: Sequence[str]) -> Read:
        subject_id, record_id, labels = entry["subject_id"], entry["record_id"], _known_labels(entry)

        def read(record: Record) -> Read:
            return Read(
                subject_id,
                record_id,
                flags=[*record.flags, *quality_flags(record)],
                signal_mv_LT=record.signal_for(leads),
                rate_hz=record.rate_hz,
                present=record.leads,
                derived=record.derived,
                labels=labels,
            )

        answer = read_or_reason(
            self.storage, entry["path"], read, uv_per_lsb=self.uv_per_lsb, patience_s=self.patience_s
        )
        if isinstance(answer, UnreadableRecording):
            reason = " ".join(str(answer).split())
            return Read(subject_id, record_id, unreadable=answer.code, reason=reason, labels=labels)
        return answer


def open_shards(uri: str, withdrawn: str | None = None) -> Shards:
    """A data set without the subjects on its own list of who has withdrawn, or on the one at `withdrawn`."""
    data = ShardedDataset.open(uri, withdrawn=withdrawn)
    data.require_rows("all")
    return Shards(data)


def open_recordings(
    uri: str,
    cohort: str,
    labels: str | None,
    limit: int | None,
    threads: int,
    *,
    withdrawn: str | None = None,
    patience_s: float = 0.0,
) -> Recordings:
    """The recordings of the source that belong to the cohort, by the rules of workflows/ingest.py."""
    storage = Storage.open(uri).require()
    chosen = select(storage, cohort, labels, limit, withdrawn)
    table = chosen.table[["path", "record_id", "subject_id"]].astype(str)
    uv_per_lsb = chosen.cohort.uv_per_lsb
    digest = hashlib.sha256(json.dumps([chosen.name, storage.uri, PART_RECORDS, uv_per_lsb]).encode())
    digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy("<u8").tobytes())
    labelled = [name for name in chosen.table.columns if name.startswith(LABEL_PREFIX)]
    packed = pa.Table.from_pandas(table.join(chosen.table[labelled].astype(float)), preserve_index=False)
    return Recordings(storage, digest.hexdigest()[:16], packed, uv_per_lsb, threads, patience_s)
