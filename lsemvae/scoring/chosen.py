"""Some recordings of a cohort with their labels, in smaller parts than those of scoring."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lsemvae.data.shards import LABEL_PREFIX, ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.scoring.inputs import CohortInput, Read, Recordings, Shards, read_shard

Part = tuple[int, tuple[int, ...]]
"""The position of a shard in the manifest, and some of its rows, counted without those of withdrawn subjects."""


@dataclass(frozen=True)
class SomeOfShards:
    """Some recordings of a data set of shards. No part has recordings of two shards."""

    data: ShardedDataset
    digest: str
    labels: tuple[str, ...]
    parts: tuple[Part, ...]
    unreadable_before: int = 0

    @property
    def uri(self) -> str:
        return self.data.storage.uri

    @property
    def records(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def chunks(self, number: int, leads: Sequence[str]) -> Iterator[list[Read]]:
        shard, rows = self.parts[number]
        shards = self.data.manifest.of_split("all")
        return read_shard(self.data, shards[shard], leads, labels=self.labels, rows=frozenset(rows))

    def any_mended(self, number: int, rows: Sequence[int]) -> bool:
        return False


def table_of(source: Shards | Recordings) -> pd.DataFrame:
    """record_id and the label columns of every recording, in order."""
    if isinstance(source, Recordings):
        return source.table.drop_columns(["path", "subject_id"]).to_pandas()
    labels = [LABEL_PREFIX + name for name in sorted(source.data.manifest.labels)]
    return source.data.read(["record_id", *labels]).to_pandas()


def choose(source: Shards | Recordings, rows: Sequence[int], labels: Sequence[str], part_records: int) -> CohortInput:
    """These rows of `table_of`, with these labels, at most so many in a part."""
    told = json.dumps([source.digest, [int(row) for row in rows], list(labels), part_records])
    digest = hashlib.sha256(told.encode())
    if isinstance(source, Recordings):
        columns = ["path", "record_id", "subject_id", *(LABEL_PREFIX + name for name in labels)]
        table = source.table.select(columns).take(list(rows))
        values = table.select(columns[3:]).to_pandas().to_numpy(float)
        digest.update(values.tobytes())
        return replace(source, table=table, digest=digest.hexdigest()[:16], part_records=part_records)
    digest.update(json.dumps(source.data.since_ingest).encode())
    parts = _parts(source.data, rows, part_records)
    return SomeOfShards(source.data, digest.hexdigest()[:16], tuple(labels), parts, source.unreadable_before)


def _parts(data: ShardedDataset, rows: Sequence[int], part_records: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    wanted_N, start = np.unique(np.asarray(rows, dtype=np.int64)), 0
    for number, shard in enumerate(data.manifest.of_split("all")):
        end = start + shard.rows - len(data.withdrawn_in.get(shard.path, ()))
        of_shard = wanted_N[(wanted_N >= start) & (wanted_N < end)] - start
        for first in range(0, len(of_shard), part_records):
            parts.append((number, tuple(of_shard[first : first + part_records].tolist())))
        start = end
    return tuple(parts)


def read_all(source: CohortInput | None, leads: Sequence[str]) -> list[Read]:
    """All recordings of a few, in memory; none of None."""
    parts = range(len(source.parts)) if source else ()
    return [read for number in parts for chunk in source.chunks(number, leads) for read in chunk] if source else []


def rows_of(table: pd.DataFrame, record_ids: Sequence[str], where: str) -> list[int]:
    """The rows of `table_of` with these ids, in its order. Raises LsemvaeError that names absent ids."""
    there = set(table["record_id"])
    absent = [record_id for record_id in record_ids if record_id not in there]
    if absent:
        some, all_there = ", ".join(map(repr, absent[:3])), ", ".join(map(repr, table["record_id"].iloc[:3]))
        raise LsemvaeError(
            f"{where} has no recording {some}{' …' if len(absent) > 3 else ''} ({len(absent)} of {len(record_ids)} ids "
            f"are not there): it has {len(table)}, such as {all_there}"
        )
    return np.flatnonzero(table["record_id"].isin(list(record_ids))).tolist()


def sample(rows: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """At most `count` of the rows, in order; the same for the same seed."""
    if len(rows) <= count:
        return list(rows)
    return sorted(np.random.default_rng(seed).choice(np.asarray(rows), count, replace=False).tolist())
