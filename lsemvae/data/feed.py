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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.data.ahead import ahead
from lsemvae.data.cache import Cache
from lsemvae.data.order import Block, Order, Piece
from lsemvae.data.shards import ROWS_PER_GROUP, SCHEMA, SIGNAL_COLUMNS, ShardedDataset, signals_mv
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.preprocess import PreprocessConfig, preprocess_signals, window_signals
from lsemvae.storage import Storage, explained

log = logging.getLogger(__name__)

_SIGNAL_SCHEMA = pa.schema([SCHEMA.field(name) for name in SIGNAL_COLUMNS])
PREFETCHED_BLOCKS = 2
LOOKS = 3
"""Readings of a row group in an object store that must agree that it is damaged."""
NOBODY, DAMAGED = -1, -2

Rows = dict[str, np.ndarray]
Records = Sequence[tuple[Rows, int]]
"""Each record as the rows that it is among, and its place there: nothing is copied before a batch is made of them."""


@dataclass(frozen=True)
class Feed:
    """Records of one split in an order, for one worker after another: preprocessed, or for a device to finish."""

    storage: Storage
    shards: tuple[str, ...]
    order: Order
    leads: tuple[str, ...]
    preprocess: PreprocessConfig
    on_device: bool = False
    """Batches hold windows, and `DeviceFinish` makes model input of them."""
    digests: tuple[str, ...] = ()
    cache: Cache | None = None

    @classmethod
    def of(
        cls,
        data: ShardedDataset,
        split: str,
        leads: Sequence[str],
        preprocess: PreprocessConfig,
        *,
        on_device: bool = False,
        cache: Path | str | None = None,
        **order: Any,
    ) -> "Feed":
        """`order` are the settings of `Order` beside its rows; `cache` is a folder on each worker's machine."""
        shards = data.manifest.of_split(split)
        return cls(
            data.storage,
            tuple(shard.path for shard in shards),
            Order(tuple(shard.rows for shard in shards), **order),
            tuple(leads),
            preprocess,
            on_device,
            tuple(shard.digest for shard in shards),
            Cache(Path(cache).absolute(), f"{preprocess.digest} {','.join(leads)} {on_device}") if cache else None,
        )

    @property
    def record_bytes(self) -> int:
        """What a record takes in memory, and in the cache."""
        return 4 * len(self.leads) * self.preprocess.samples

    def batches(
        self,
        epoch: int,
        worker: int = 0,
        workers: int = 1,
        start_step: int = 0,
        read: "Callable[[Feed, Sequence[Block], int], Iterator[Records]] | None" = None,
    ) -> Iterator[Rows]:
        """This worker's part of every step: `x_BLT` float32, `lead_mask_BL` bool, `weight_B` float32, `row_B` int64.

        With `on_device` it has, in place of the first two, what `DeviceFinish.batch` makes them of: `filled_mv_BLT`
        float32, `nan_share_BL` and `length_B`. A worker's batch has the same size in every step. `weight_B` is 0
        where there is no record (at the end of an epoch), where it was refused, and where its row group cannot be
        read, else 1. `row_B` numbers the records of the split; it is NOBODY where there is none, and DAMAGED where it
        cannot be read. `read` brings the blocks' records: `read_on_ray` by default, or `read_here`. Raises
        LsemvaeError where a shard is absent, StorageError where the storage fails for longer than its clients try
        again.
        """
        order = self.order
        streams = order.streams_of(worker, workers)
        wanted = order.demand(epoch, streams, start_step)
        arriving = zip((read or read_on_ray)(self, [block for block, _ in wanted], workers), wanted, strict=True)
        queues: dict[int, deque[tuple[Rows, int]]] = {stream: deque() for stream in streams}
        sizes = {stream: sum(b.records - s for b, s in wanted if b.stream == stream) for stream in streams}
        nobody = (self._nothing(1), 0)
        for _ in range(start_step, order.steps):
            records: list[tuple[Rows, int]] = []
            for stream in streams:
                take = min(order.per_stream, sizes[stream])
                sizes[stream] -= take
                while len(queues[stream]) < take:
                    found, (block, skipped) = next(arriving)
                    queues[block.stream].extend(found[skipped:])
                records += [queues[stream].popleft() for _ in range(take)]
                records += [nobody] * (order.per_stream - take)
            yield _copied(records)

    def read(self, block: Block) -> Rows:
        """One block's records in their order. A row group that is damaged has weight 0, and is logged."""
        return _copied(self.arrange(block, self.gather(block)))

    def gather(self, block: Block) -> list[Rows]:
        """The records of a block's pieces; with a cache those of their row groups, from it or for it."""
        if not self.cache:
            return [self._prepare(piece) for piece in block.pieces]
        return [self._from_cache(piece) or self._prepare(self._whole(piece)) for piece in block.pieces]

    def arrange(self, block: Block, parts: Sequence[Rows]) -> Records:
        """What `gather` gave, cut to the pieces, in the order of the block."""
        firsts = [0 if self.cache else piece.start for piece in block.pieces]
        records = [
            (part, row - first)
            for piece, first, part in zip(block.pieces, firsts, parts, strict=True)
            for row in range(piece.start, piece.stop)
        ]
        return [records[position] for position in self.order.permutation(block)]

    def is_cached(self, block: Block) -> bool:
        """Whether this machine's disk has all of it."""
        return self.cache is not None and all(
            self.cache.path(self._name(piece.shard), piece.group).exists() for piece in block.pieces
        )

    def keep(self, block: Block, parts: Sequence[Rows]) -> None:
        """Puts what `gather` gave into this machine's cache, but for what is damaged."""
        for piece, part in zip(block.pieces, parts, strict=True):
            if (part["row_B"] >= 0).all():
                kept = {name: values for name, values in part.items() if name != "row_B"}
                self.cache.put(self._name(piece.shard), piece.group, kept)

    def _name(self, shard: int) -> str:
        return f"{self.storage.uri}/{self.shards[shard]} {self.digests[shard]}"

    def rows_of(self, piece: Piece) -> int:
        """Records of the piece's row group."""
        return min(ROWS_PER_GROUP, self.order.rows[piece.shard] - piece.group * ROWS_PER_GROUP)

    def _whole(self, piece: Piece) -> Piece:
        return piece._replace(start=0, stop=self.rows_of(piece))

    def _from_cache(self, piece: Piece) -> Rows | None:
        kept = self.cache.get(self._name(piece.shard), piece.group)
        return kept and kept | {"row_B": self._numbers(self._whole(piece))}

    def _numbers(self, piece: Piece) -> np.ndarray:
        first = sum(self.order.rows[: piece.shard]) + piece.group * ROWS_PER_GROUP
        return np.arange(first + piece.start, first + piece.stop)

    def _prepare(self, piece: Piece) -> Rows:
        """Read, decoded and preprocessed."""
        path = self.shards[piece.shard]
        looks = 1 if self.storage.is_local else LOOKS
        for look in range(1, looks + 1):
            try:
                table = _read_row_group(self.storage, path, piece.group, self.rows_of(piece))
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
        signals, rates_hz = signals_mv(columns, self.leads), columns["rate_hz"]
        numbers_B = self._numbers(piece)
        # A refused record has no lead: its place is filled, so that every batch has the same size, and it counts 0.
        if self.on_device:
            windows = window_signals(signals, rates_hz, self.leads, self.preprocess, np.float32)
            accepted_B = np.array([reason is None for reason in windows.refused_B], dtype=bool)
            return {
                "filled_mv_BLT": windows.filled_mv_BLT,
                "nan_share_BL": windows.nan_share_BL.astype(np.float32),
                "length_B": windows.length_B,
                "weight_B": accepted_B.astype(np.float32),
                "row_B": numbers_B,
            }
        prepared = preprocess_signals(signals, rates_hz, self.leads, self.preprocess)
        accepted_B = prepared.accepted_B
        return {
            "x_BLT": prepared.x_BLT,
            "lead_mask_BL": prepared.lead_mask_BL | ~accepted_B[:, None],
            "weight_B": accepted_B.astype(np.float32),
            "row_B": numbers_B,
        }

    def _nothing(self, records: int, row: int = NOBODY) -> Rows:
        shape = (records, len(self.leads), self.preprocess.samples)
        none = {"weight_B": np.zeros(records, dtype=np.float32), "row_B": np.full(records, row)}
        if self.on_device:
            return {
                "filled_mv_BLT": np.zeros(shape, dtype=np.float32),
                "nan_share_BL": np.zeros(shape[:2], dtype=np.float32),
                "length_B": np.full(records, self.preprocess.samples),
            } | none
        return {"x_BLT": np.zeros(shape, dtype=np.float32), "lead_mask_BL": np.ones(shape[:2], dtype=bool)} | none


def read_here(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Records]:
    """The blocks' records in this order, read and preprocessed in this process."""
    for block in blocks:
        parts = feed.gather(block)
        if feed.cache and not feed.is_cached(block):
            feed.keep(block, parts)
        yield feed.arrange(block, parts)


def read_on_ray(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Records]:
    """The same by Ray Data's tasks, wherever there is a CPU, some blocks ahead. Every one of `workers` does so.

    What this machine's cache has by now is mapped from it; what comes from elsewhere is kept in it, in a thread.
    """
    return ahead(_from_cache_and_tasks(feed, blocks, workers), PREFETCHED_BLOCKS)


def _from_cache_and_tasks(feed: Feed, blocks: Sequence[Block], workers: int) -> Iterator[Records]:
    missing = [number for number, block in enumerate(blocks) if not feed.is_cached(block)]
    arriving, asked = _from_tasks(feed, blocks, missing, workers), set(missing)
    for number, block in enumerate(blocks):
        if number not in asked:
            yield feed.arrange(block, feed.gather(block))
            continue
        rows = next(arriving)
        assert (rows.pop("number") == number).all()
        if not feed.cache:
            yield [(rows, row) for row in range(block.records)]
            continue
        ends = np.cumsum([feed.rows_of(piece) for piece in block.pieces])[:-1]
        split = {name: np.split(values, ends) for name, values in rows.items()}
        parts = [{name: values[i] for name, values in split.items()} for i in range(len(block.pieces))]
        feed.keep(block, parts)
        yield feed.arrange(block, parts)
    assert next(arriving, None) is None


def _from_tasks(feed: Feed, blocks: Sequence[Block], numbers: Sequence[int], workers: int) -> Iterator[Rows]:
    """These blocks by Ray Data, in this order: arranged, or as gathered where the worker keeps them."""
    import ray
    import ray.data

    if not numbers:
        return
    there = ray.cluster_resources()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Else each worker would fill half of the cluster's object store with what it reads ahead.
    share = int(there.get("object_store_memory", 0) / 2 / workers)
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=share)
    context.enable_progress_bars = False
    context.target_max_block_size = None  # what a task gives stays one batch, however large

    def read(batch: Rows) -> Rows:
        (number,) = batch["number"]
        block = blocks[number]
        try:
            if feed.cache:
                parts = feed.gather(block)
                rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            else:
                rows = feed.read(block)
        except LsemvaeError as error:  # raised here it would arrive as text within text
            passing = isinstance(error, StorageError) and error.passing
            return {"failure": np.array([str(error)]), "passing": np.array([passing])}
        return rows | {"number": np.full(len(rows["row_B"]), number)}

    items = [{"number": number} for number in numbers]
    # Training workers that hold all processors, as when machines were lost, would wait for ever for a task's.
    settings = {} if there.get("CPU", 0) > workers else {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(1)}
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1, **settings)
    for rows in dataset.iter_batches(batch_size=None, prefetch_batches=PREFETCHED_BLOCKS):
        if "failure" in rows:
            raise (StorageError if rows["passing"][0] else LsemvaeError)(str(rows["failure"][0]))
        yield rows


def _copied(records: Records) -> Rows:
    """One after another. Each is one copy of what may lie in a mapped file."""
    kinds = {name: (values.shape[1:], values.dtype) for name, values in records[0][0].items()}
    copied = {name: np.empty((len(records), *shape), dtype) for name, (shape, dtype) in kinds.items()}
    for to, (rows, row) in enumerate(records):
        for name, values in rows.items():
            copied[name][to] = values[row]
    return copied


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
