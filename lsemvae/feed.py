"""The way of training records: which record comes when, and Ray Data that brings them to one worker in that order.

The order of an epoch is a function of the data set, the seed and the epoch alone. The shards' row groups are shuffled
and dealt to a fixed number of streams; within a block of a few row groups the records are shuffled once more. Step s of
an epoch takes records [s q, (s + 1) q) of every stream, and a worker reads some of the streams. So every step has the
same records whatever the number of workers, every record comes once an epoch, and (epoch, step) is all that a run must
remember to go on exactly where it was, with as many workers as there are then.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.shards import ROWS_PER_GROUP, SCHEMA, ShardedDataset, signals_mv
from lsemvae.storage import Storage, explained

log = logging.getLogger(__name__)

SIGNAL_COLUMNS = ["signal", "samples", "rate_hz", "uv_per_lsb", "offset"]
_SIGNAL_SCHEMA = pa.schema([SCHEMA.field(name) for name in SIGNAL_COLUMNS])
PREFETCHED_BLOCKS = 2
LOOKS = 3
"""Readings of a row group in an object store that must agree that it is damaged."""
NOBODY, DAMAGED = -1, -2

Rows = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Rows [start, stop) of one row group of one shard."""

    shard: int
    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Consecutive records of one stream, which are shuffled among themselves."""

    stream: int
    seed: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def records(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Order:
    """Which record comes when. `rows` are those of each shard; `shuffle` is off for validation."""

    rows: tuple[int, ...]
    batch_size: int
    streams: int = 8
    buffer: int = 1024
    """Records that are mixed at any time, over all streams together."""
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size % self.streams:
            raise LsemvaeError(
                f"batch_size={self.batch_size} is no multiple of streams={self.streams}: every stream gives the same "
                "number of records to a step"
            )
        if sum(self.rows) < self.streams:
            raise LsemvaeError(f"{sum(self.rows)} recordings for {self.streams} streams: ingest more, or ask for fewer")

    @property
    def records(self) -> int:
        return sum(self.rows)

    @property
    def per_stream(self) -> int:
        """Records that a step takes of every stream."""
        return self.batch_size // self.streams

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last may be smaller than a batch."""
        longest = -(-self.records // self.streams)
        return -(-longest // self.per_stream)

    def streams_of(self, worker: int, workers: int) -> range:
        """The streams a worker reads; raises LsemvaeError where there are more workers than streams."""
        if workers > self.streams:
            raise LsemvaeError(f"{workers} workers and {self.streams} streams: a worker needs one at least")
        return range(worker, self.streams, workers)

    def blocks(self, epoch: int, stream: int) -> list[Block]:
        """The whole of one stream in one epoch, whose boundaries are those of row groups."""
        shard_G, group_G, rows_G = _row_groups(self.rows)
        if self.shuffle:
            order_G = np.random.default_rng([self.seed, epoch]).permutation(len(rows_G))
            shard_G, group_G, rows_G = shard_G[order_G], group_G[order_G], rows_G[order_G]
        ends_G = np.cumsum(rows_G)
        begin, end = (share * self.records // self.streams for share in (stream, stream + 1))
        blocks: list[Block] = []
        pieces: list[Piece] = []
        first, last = np.searchsorted(ends_G, begin, side="right"), np.searchsorted(ends_G, end, side="left")
        for g in range(first, last + 1):
            before = ends_G[g] - rows_G[g]
            start, stop = max(begin - before, 0), min(end - before, rows_G[g])
            pieces.append(Piece(int(shard_G[g]), int(group_G[g]), int(start), int(stop)))
            if sum(p.stop - p.start for p in pieces) >= self.buffer // self.streams or g == last:
                blocks.append(Block(stream, (self.seed, epoch, stream, len(blocks)), tuple(pieces)))
                pieces = []
        return blocks

    def demand(self, epoch: int, streams: Sequence[int], start_step: int = 0) -> list[tuple[Block, int]]:
        """The blocks of these streams in the order in which steps from `start_step` on need them.

        With each, how many of its records earlier steps have taken.
        """
        left = {stream: iter(self.blocks(epoch, stream)) for stream in streams}
        have = dict.fromkeys(streams, -start_step * self.per_stream)
        wanted: list[tuple[Block, int]] = []
        for _ in range(start_step, self.steps):
            for stream in streams:
                while have[stream] < self.per_stream and (block := next(left[stream], None)):
                    skipped = min(max(-have[stream], 0), block.records)
                    have[stream] += block.records
                    if skipped < block.records:
                        wanted.append((block, skipped))
                have[stream] -= min(self.per_stream, max(have[stream], 0))
        return wanted

    def permutation(self, block: Block) -> np.ndarray:
        """The order of a block's records."""
        if not self.shuffle:
            return np.arange(block.records)
        return np.random.default_rng(block.seed).permutation(block.records)


@lru_cache(maxsize=8)
def _row_groups(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, number within the shard, and rows of every row group of the data set."""
    groups = [
        (shard, group, min(ROWS_PER_GROUP, count - start))
        for shard, count in enumerate(rows)
        for group, start in enumerate(range(0, count, ROWS_PER_GROUP))
    ]
    return tuple(np.array(groups, dtype=np.int64).reshape(-1, 3).T)


@dataclass(frozen=True)
class Feed:
    """Preprocessed records of one split in an order, for one worker after another."""

    storage: Storage
    shards: tuple[str, ...]
    order: Order
    leads: tuple[str, ...]
    preprocess: PreprocessConfig

    @classmethod
    def of(
        cls, data: ShardedDataset, split: str, leads: Sequence[str], preprocess: PreprocessConfig, **order: Any
    ) -> "Feed":
        """`order` are the settings of `Order` beside its rows."""
        shards = data.manifest.of_split(split)
        rows = tuple(shard.rows for shard in shards)
        return cls(data.storage, tuple(shard.path for shard in shards), Order(rows, **order), tuple(leads), preprocess)

    def batches(
        self,
        epoch: int,
        worker: int = 0,
        workers: int = 1,
        start_step: int = 0,
        read: "Callable[[Feed, Sequence[Block], int], Iterator[Rows]] | None" = None,
    ) -> Iterator[Rows]:
        """This worker's part of every step: `x_BLT` float32, `lead_mask_BL` bool, `weight_B` float32, `row_B` int64.

        A worker's batch has the same size in every step. `weight_B` is 0 where there is no record (at the end of an
        epoch), where it was refused, and where its row group cannot be read, else 1. `row_B` numbers the records of
        the split; it is NOBODY where there is none, and DAMAGED where it cannot be read. `read` brings the blocks'
        records: `read_on_ray` by default, or `read_here`. Raises LsemvaeError where a shard is absent, StorageError
        where the storage fails for longer than its clients try again.
        """
        order = self.order
        streams = order.streams_of(worker, workers)
        wanted = order.demand(epoch, streams, start_step)
        arriving = zip((read or read_on_ray)(self, [block for block, _ in wanted], workers), wanted, strict=True)
        queues: dict[int, list[Rows]] = {stream: [] for stream in streams}
        sizes = {stream: sum(b.records - s for b, s in wanted if b.stream == stream) for stream in streams}
        for _ in range(start_step, order.steps):
            parts = []
            for stream in streams:
                take = min(order.per_stream, sizes[stream])
                sizes[stream] -= take
                while sum(len(rows["row_B"]) for rows in queues[stream]) < take:
                    rows, (block, skipped) = next(arriving)
                    queues[block.stream].append({name: values[skipped:] for name, values in rows.items()})
                parts += _take(queues[stream], take)
                if take < order.per_stream:
                    parts.append(self._nothing(order.per_stream - take))
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def read(self, block: Block) -> Rows:
        """One block's records in their order. A row group that is damaged has weight 0, and is logged."""
        parts = [self._piece(piece) for piece in block.pieces]
        order_B = self.order.permutation(block)
        return {name: np.concatenate([part[name] for part in parts])[order_B] for name in parts[0]}

    def _piece(self, piece: Piece) -> Rows:
        path = self.shards[piece.shard]
        rows = min(ROWS_PER_GROUP, self.order.rows[piece.shard] - piece.group * ROWS_PER_GROUP)
        looks = 1 if self.storage.is_local else LOOKS
        for look in range(1, looks + 1):
            try:
                table = _read_row_group(self.storage, path, piece.group, rows)
                break
            except _Damaged as error:
                if look < looks:  # perhaps something on the way cut it
                    _footer.cache_clear()
                    time.sleep(random.uniform(0, look))
                    continue
                log.error(f"{self.storage.uri}/{path}, row group {piece.group}, is damaged and left out: {error}")
                return self._nothing(piece.stop - piece.start, DAMAGED)
        table = table.slice(piece.start, piece.stop - piece.start)
        columns = {name: table[name].to_numpy(zero_copy_only=False) for name in SIGNAL_COLUMNS}
        prepared = preprocess_signals(signals_mv(columns, self.leads), columns["rate_hz"], self.leads, self.preprocess)
        first = sum(self.order.rows[: piece.shard]) + piece.group * ROWS_PER_GROUP
        accepted_B = prepared.accepted_B
        # A refused record has no lead: its place is filled, so that every batch has the same size, and it counts 0.
        return {
            "x_BLT": prepared.x_BLT,
            "lead_mask_BL": prepared.lead_mask_BL | ~accepted_B[:, None],
            "weight_B": accepted_B.astype(np.float32),
            "row_B": np.arange(first + piece.start, first + piece.stop),
        }

    def _nothing(self, records: int, row: int = NOBODY) -> Rows:
        return {
            "x_BLT": np.zeros((records, len(self.leads), self.preprocess.samples), dtype=np.float32),
            "lead_mask_BL": np.ones((records, len(self.leads)), dtype=bool),
            "weight_B": np.zeros(records, dtype=np.float32),
            "row_B": np.full(records, row),
        }


def read_here(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Rows]:
    """The blocks' records in this order, read and preprocessed in this process."""
    return map(feed.read, blocks)


def read_on_ray(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Rows]:
    """The same by Ray Data's tasks, wherever there is a CPU, some blocks ahead. Every one of `workers` does so."""
    import ray
    import ray.data

    if not blocks:
        return
    there = ray.cluster_resources()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Else each worker would fill half of the cluster's object store with what it reads ahead.
    share = int(there.get("object_store_memory", 0) / 2 / workers)
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=share)
    context.enable_progress_bars = False

    def read(batch: Rows) -> Rows:
        (number,) = batch["number"]
        try:
            rows = feed.read(blocks[number])
        except LsemvaeError as error:  # raised here it would arrive as text within text
            passing = isinstance(error, StorageError) and error.passing
            return {"failure": np.array([str(error)]), "passing": np.array([passing])}
        return rows | {"number": np.full(len(rows["row_B"]), number)}

    items = [{"number": number} for number in range(len(blocks))]
    # Training workers that hold all processors, as when machines were lost, would wait for ever for a task's.
    settings = {} if there.get("CPU", 0) > workers else {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(1)}
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1, **settings)
    arriving = dataset.iter_batches(batch_size=None, prefetch_batches=PREFETCHED_BLOCKS)
    for number, (block, rows) in enumerate(zip(blocks, arriving, strict=True)):
        if "failure" in rows:
            raise (StorageError if rows["passing"][0] else LsemvaeError)(str(rows["failure"][0]))
        assert (rows.pop("number") == number).all() and len(rows["row_B"]) == block.records
        yield rows


def _take(queue: list[Rows], count: int) -> list[Rows]:
    """The first `count` records of a queue of parts, which are removed from it."""
    taken = []
    while count:
        part = queue.pop(0)
        size = len(part["row_B"])
        taken.append({name: values[:count] for name, values in part.items()})
        if size > count:
            queue.insert(0, {name: values[count:] for name, values in part.items()})
        count -= min(size, count)
    return taken


class _Damaged(Exception):
    """A row group that is not what was written."""


def _read_row_group(storage: Storage, path: str, group: int, rows: int) -> pa.Table:
    """Raises _Damaged, StorageError where it is the storage that fails, LsemvaeError where there is no such shard."""
    try:
        with explained(f"{storage.uri}/{path}"):
            try:
                with storage.filesystem.open_input_file(storage.path(path)) as stream:
                    file = pq.ParquetFile(stream, metadata=_footer(storage, path), page_checksum_verification=True)
                    table = file.read_row_group(group, columns=SIGNAL_COLUMNS, use_threads=False)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                # Parquet's own complaints are OSErrors too, without a number.
                if isinstance(error, OSError) and (error.errno or "AWS Error" in str(error)):
                    raise
                raise _Damaged(" ".join(str(error).split())) from error
    except FileNotFoundError:
        raise LsemvaeError(
            f"{storage.uri}/{path} is gone, though the manifest names it: put it back, or ingest again"
        ) from None
    if table.num_rows != rows or not table.schema.equals(_SIGNAL_SCHEMA):
        raise _Damaged(f"it has {table.num_rows} rows of {table.schema.names}, not {rows} of {SIGNAL_COLUMNS}")
    return table


@lru_cache(maxsize=4096)
def _footer(storage: Storage, path: str) -> pq.FileMetaData:
    """Read once by each process, not once for each row group."""
    with storage.filesystem.open_input_file(storage.path(path)) as stream:
        return pq.read_metadata(stream)
