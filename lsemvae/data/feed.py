"""Bring training records to a worker in the order of `lsemvae.data.order`, through Ray Data or in this process.

The order of an epoch is a function of the data sets, the seed and the epoch alone. Every step has the same records
whatever the number of workers, and every record comes once an epoch (or as often as its data set is to be repeated). So
(epoch, step) is all that a run must remember to resume exactly where it stopped, with as many workers as there are
then.

Worked example: 4 streams, a batch of 16, 2 workers. `batches(epoch=3, worker=1, workers=2, start_step=5)` yields the
steps 5, 6, 7 … of epoch 3. Each has 8 records: 4 of stream 1 and 4 of stream 3. Worker 0 gets the other 8, of streams 0
and 2. The blocks of a worker's streams are read ahead; a row group comes from this machine's cache if it is there.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsemvae.data.ahead import ahead
from lsemvae.data.cache import Cache
from lsemvae.data.cache import require_room as require_cache_room
from lsemvae.data.layouts import Layout, ModelInput, Rows, Windows
from lsemvae.data.order import Block, Order, Piece
from lsemvae.data.row_groups import Damaged, read_row_group
from lsemvae.data.shards import ROWS_PER_GROUP, SIGNAL_COLUMNS, ShardedDataset, signals_mv
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.preprocess import PreprocessConfig
from lsemvae.storage import Storage

log = logging.getLogger(__name__)

PREFETCHED_BLOCKS = 2
COPIED_AT_ONCE, MOST_COPIERS = 32, 8
NOBODY, DAMAGED = -1, -2

Records = Sequence[tuple[Rows, int]]
"""Each record as the arrays that hold it and its index in them: nothing is copied before a batch is made."""


class ShardFile(NamedTuple):
    """One shard, and this machine's cache of its data set."""

    storage: Storage
    path: str
    digest: str
    cache: Cache | None = None


@dataclass(frozen=True)
class Feed:
    """The records of one split in an order, as batches of one layout."""

    shards: tuple[ShardFile, ...]
    order: Order
    layout: Layout
    withdrawn_rows: tuple[int, ...] = ()
    """Rows, as `row_B` numbers them, of subjects who have withdrawn since ingest: they stay in the order, unused."""

    @classmethod
    def of(cls, data: ShardedDataset, split: str, *args: Any, **kwargs: Any) -> "Feed":
        """Like `of_several`, for one data set whose records come once an epoch."""
        return cls.of_several([(data, 1)], split, *args, **kwargs)

    @classmethod
    def of_several(
        cls,
        data: Sequence[tuple[ShardedDataset, int]],
        split: str,
        leads: Sequence[str],
        preprocess: PreprocessConfig,
        *,
        on_device: bool = False,
        cache: Path | str | None = None,
        packed: bool = False,
        **order: Any,
    ) -> "Feed":
        """Several data sets, each with how often its records come in an epoch.

        `cache` is a folder on each worker's machine. With it, or with `packed`, batches are packed from the first epoch
        on: they are the same whether the cache is full or empty. `order` are the settings of `Order` beside its rows
        and repeats.
        Raises LsemvaeError if a data set is named twice or is to come less than once.
        """
        require_different(data)
        layout = (Windows if on_device else ModelInput)(tuple(leads), preprocess, packed=packed or bool(cache))
        shards: list[ShardFile] = []
        rows: list[int] = []
        repeats: list[int] = []
        withdrawn: list[int] = []
        for dataset, times in data:
            withdrawn += (sum(rows) + dataset.withdrawn_rows(split)).tolist()
            meaning = f"{dataset.storage.uri} {dataset.manifest.digest} {layout.meaning}"
            kept = Cache(Path(cache).absolute(), meaning) if cache else None
            for shard in dataset.manifest.of_split(split):
                shards.append(ShardFile(dataset.storage, shard.path, shard.digest, kept))
                rows.append(shard.rows)
                repeats.append(times)
        repeated = tuple(repeats) if max(repeats, default=1) > 1 else ()
        return cls(tuple(shards), Order(tuple(rows), repeats=repeated, **order), layout, tuple(withdrawn))

    @property
    def on_device(self) -> bool:
        """Whether batches hold windows, of which `DeviceFinish` makes model input."""
        return self.layout.on_device

    @property
    def record_bytes(self) -> int:
        return self.layout.record_bytes

    @property
    def cached(self) -> bool:
        """Whether prepared records are kept on the worker's machine."""
        return any(shard.cache for shard in self.shards)

    def cache_bytes(self) -> dict[Cache, int]:
        """What each data set's cache will hold of this feed."""
        needed: dict[Cache, int] = {}
        for shard, rows in zip(self.shards, self.order.rows, strict=True):
            if shard.cache:
                needed[shard.cache] = needed.get(shard.cache, 0) + rows * self.record_bytes
        return needed

    def batches(
        self,
        epoch: int,
        worker: int = 0,
        workers: int = 1,
        start_step: int = 0,
        read: "Callable[[Feed, Sequence[Block], int], Iterator[Records]] | None" = None,
    ) -> Iterator[Rows]:
        """This worker's part of every step: the arrays of the layout, `weight_B` float32 and `row_B` int64.

        A worker's batch has the same size in every step. `weight_B` is 0 if there is no record (at the end of an
        epoch), if its subject has withdrawn, if it was refused and if its row group cannot be read, else 1. `row_B`
        numbers the records of the split, data set by data set; it is NOBODY if there is none or its subject has
        withdrawn, and DAMAGED if it cannot be read. `read` brings the records of the blocks: `read_on_ray` by default,
        or `read_here`. Raises LsemvaeError if a shard is absent, StorageError if the storage fails for longer than its
        clients try again.
        """
        order = self.order
        streams = order.streams_of(worker, workers)
        wanted = order.demand(epoch, streams, start_step)
        arriving = zip((read or read_on_ray)(self, [block for block, _ in wanted], workers), wanted, strict=True)
        queues: dict[int, deque[tuple[Rows, int]]] = {stream: deque() for stream in streams}
        sizes = {stream: sum(b.records - s for b, s in wanted if b.stream == stream) for stream in streams}
        nobody = (self.layout.nothing(1) | {"row_B": np.full(1, NOBODY)}, 0)
        gone = frozenset(self.withdrawn_rows)
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
            if gone:  # here, since the cache does not know of them
                records = [nobody if rows["row_B"][row] in gone else (rows, row) for rows, row in records]
            yield _copied(records)

    def read(self, block: Block) -> Rows:
        """One block's records in their order. The records of a damaged row group have weight 0, and it is logged."""
        return _copied(self.arrange(block, self.gather(block)))

    def gather(self, block: Block) -> list[Rows]:
        """The records of each piece of a block; with a cache, those of its whole row group, which is what is kept."""
        if not self.cached:
            return [self._prepare(piece) for piece in block.pieces]
        return [self._from_cache(piece) or self._prepare(self._whole(piece)) for piece in block.pieces]

    def numbers(self, block: Block) -> list[Rows]:
        """As `gather`, with `row_B` alone: nothing is read."""
        return [{"row_B": self._numbers(self._whole(piece) if self.cached else piece)} for piece in block.pieces]

    def arrange(self, block: Block, parts: Sequence[Rows]) -> Records:
        """Cut to the pieces what `gather` gave, and put it into the block's order."""
        firsts = [0 if self.cached else piece.start for piece in block.pieces]
        records = [
            (part, row - first)
            for piece, first, part in zip(block.pieces, firsts, parts, strict=True)
            for row in range(piece.start, piece.stop)
        ]
        return [records[position] for position in self.order.permutation(block)]

    def is_cached(self, block: Block) -> bool:
        """Whether this machine's disk has all row groups of the block."""
        places = [(*self._cache_of(piece), piece.group) for piece in block.pieces]
        return all(cache is not None and cache.path(name, group).exists() for cache, name, group in places)

    def keep(self, block: Block, parts: Sequence[Rows]) -> None:
        """Put what `gather` gave into this machine's cache, except damaged row groups."""
        for piece, part in zip(block.pieces, parts, strict=True):
            cache, name = self._cache_of(piece)
            if cache and (part["row_B"] >= 0).all():
                cache.put(name, piece.group, {name: values for name, values in part.items() if name != "row_B"})

    def _cache_of(self, piece: Piece) -> tuple[Cache | None, str]:
        """The cache of the piece's data set, and the name of its shard there."""
        shard = self.shards[piece.shard]
        return shard.cache, f"{shard.path} {shard.digest}"

    def rows_of(self, piece: Piece) -> int:
        """Records of the piece's row group."""
        return min(ROWS_PER_GROUP, self.order.rows[piece.shard] - piece.group * ROWS_PER_GROUP)

    def _whole(self, piece: Piece) -> Piece:
        return piece._replace(start=0, stop=self.rows_of(piece))

    def _from_cache(self, piece: Piece) -> Rows | None:
        cache, name = self._cache_of(piece)
        kept = cache.get(name, piece.group) if cache else None
        return kept and kept | {"row_B": self._numbers(self._whole(piece))}

    def _numbers(self, piece: Piece) -> np.ndarray:
        first = sum(self.order.rows[: piece.shard]) + piece.group * ROWS_PER_GROUP
        return np.arange(first + piece.start, first + piece.stop)

    def _prepare(self, piece: Piece) -> Rows:
        """The piece's records: read, decoded and preprocessed."""
        shard, records = self.shards[piece.shard], piece.stop - piece.start
        try:
            table = read_row_group(shard.storage, shard.path, piece.group, self.rows_of(piece))
        except Damaged as error:
            place = f"{shard.storage.uri}/{shard.path}, row group {piece.group},"
            log.error(f"{place} is damaged and left out: {error}")
            return self.layout.nothing(records) | {"row_B": np.full(records, DAMAGED)}
        table = table.slice(piece.start, records)
        columns = {name: table[name].to_numpy(zero_copy_only=False) for name in SIGNAL_COLUMNS}
        prepared = self.layout.prepare(signals_mv(columns, self.layout.leads), columns["rate_hz"])
        return prepared | {"row_B": self._numbers(piece)}


def require_room(*feeds: Feed | None) -> None:
    """Make room for the feeds in this machine's cache; raises LsemvaeError if its disk has not so much."""
    needed: dict[Path, dict[Cache, int]] = {}
    for feed in feeds:
        for cache, size in (feed.cache_bytes() if feed else {}).items():
            of_root = needed.setdefault(cache.root, {})
            of_root[cache] = of_root.get(cache, 0) + size
    for root, of_root in needed.items():
        require_cache_room(root, of_root)


def require_different(data: Sequence[tuple[ShardedDataset, int]]) -> None:
    """Raises LsemvaeError if a data set is named twice or is to come less than once."""
    uris = [dataset.storage.uri for dataset, _ in data]
    for dataset, times in data:
        uri = dataset.storage.uri
        if uris.count(uri) > 1:
            raise LsemvaeError(f"{uri} is named twice: name it once, with repeats, as in {uri}:2")
        if times < 1:
            raise LsemvaeError(f"{uri} is to come {times} times an epoch: give 1 or more repeats")


def read_here(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Records]:
    """The blocks' records in this order, read and preprocessed in this process."""
    for block in blocks:
        yield feed.arrange(block, _gathered_and_kept(feed, block))


def _gathered_and_kept(feed: Feed, block: Block) -> list[Rows]:
    parts = feed.gather(block)
    if feed.cached and not feed.is_cached(block):
        feed.keep(block, parts)
    return parts


def read_on_ray(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Records]:
    """The same by Ray Data's tasks, on any machine that has a CPU, some blocks ahead. Each of `workers` runs its own.

    Blocks that this machine's cache has are mapped from it; the others are kept in it, in a thread.
    """
    return ahead(_from_cache_and_tasks(feed, blocks, workers), PREFETCHED_BLOCKS)


def _from_cache_and_tasks(feed: Feed, blocks: Sequence[Block], workers: int) -> Iterator[Records]:
    missing = [number for number, block in enumerate(blocks) if not feed.is_cached(block)]
    arriving, asked = _from_tasks(feed, blocks, missing, workers), set(missing)
    for number, block in enumerate(blocks):
        if number not in asked:
            yield feed.arrange(block, _gathered_and_kept(feed, block))
            continue
        rows = next(arriving)
        assert (rows.pop("number") == number).all()
        if not feed.cached:
            yield [(rows, row) for row in range(block.records)]
            continue
        ends = np.cumsum([feed.rows_of(piece) for piece in block.pieces])[:-1]
        split = {name: np.split(values, ends) for name, values in rows.items()}
        parts = [{name: values[i] for name, values in split.items()} for i in range(len(block.pieces))]
        feed.keep(block, parts)
        yield feed.arrange(block, parts)
    assert next(arriving, None) is None


def _from_tasks(feed: Feed, blocks: Sequence[Block], numbers: Sequence[int], workers: int) -> Iterator[Rows]:
    """These blocks by Ray Data, in this order: arranged, or as `gather` gives them if the worker keeps them."""
    import ray
    import ray.data

    if not numbers:
        return
    there = ray.cluster_resources()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Without a limit each worker would fill half of the cluster's object store with what it reads ahead.
    share = int(there.get("object_store_memory", 0) / 2 / workers)
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=share)
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a task's result stays one batch, however large

    def read(batch: Rows) -> Rows:
        (number,) = batch["number"]
        block = blocks[number]
        try:
            if feed.cached:
                parts = feed.gather(block)
                rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            else:
                rows = feed.read(block)
        except LsemvaeError as error:  # if it were raised here, Ray would wrap its message into others
            passing = isinstance(error, StorageError) and error.passing
            return {"failure": np.array([str(error)]), "passing": np.array([passing])}
        return rows | {"number": np.full(len(rows["row_B"]), number)}

    items = [{"number": number} for number in numbers]
    # If the workers hold all CPUs, as when machines were lost, a task that needs one would wait forever.
    settings = {} if there.get("CPU", 0) > workers else {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(1)}
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1, **settings)
    for rows in dataset.iter_batches(batch_size=None, prefetch_batches=PREFETCHED_BLOCKS):
        if "failure" in rows:
            raise (StorageError if rows["passing"][0] else LsemvaeError)(str(rows["failure"][0]))
        yield rows


def _copied(records: Records) -> Rows:
    """The records as one batch. Each record is copied once; it may lie in a mapped file."""
    kinds = {name: (values.shape[1:], values.dtype) for name, values in records[0][0].items()}
    copied = {name: np.empty((len(records), *shape), dtype) for name, (shape, dtype) in kinds.items()}

    def copy(first: int) -> None:
        for to, (rows, row) in enumerate(records[first : first + COPIED_AT_ONCE], first):
            for name, values in rows.items():
                copied[name][to] = values[row]

    starts = range(0, len(records), COPIED_AT_ONCE)
    if len(starts) == 1:
        copy(0)
    else:
        list(_copiers().map(copy, starts))  # in a list, so that an error is raised
    return copied


@lru_cache(maxsize=1)
def _copiers() -> ThreadPoolExecutor:
    """Threads that copy records into batches: one core copies fewer than a fast GPU takes. NumPy frees the GIL."""
    return ThreadPoolExecutor(max(1, min(MOST_COPIERS, (os.cpu_count() or 1) // 2)), "copy")
