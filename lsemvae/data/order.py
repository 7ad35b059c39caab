"""Which record comes when: the order of an epoch, as a function of the data set, the seed and the epoch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lsemvae.data.shards import ROWS_PER_GROUP
from lsemvae.errors import LsemvaeError

ORDER_VERSION = 2
"""Raised when the same settings come to mean another order: a run cannot go on in the middle of an epoch then."""


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
        enough = self.buffer // self.streams
        # The first is shorter, by more in one stream than in the next: else all would need another at the same step.
        least = -(-enough * (stream + 1) // self.streams)
        first, last = np.searchsorted(ends_G, begin, side="right"), np.searchsorted(ends_G, end, side="left")
        for g in range(first, last + 1):
            before = ends_G[g] - rows_G[g]
            start, stop = max(begin - before, 0), min(end - before, rows_G[g])
            pieces.append(Piece(int(shard_G[g]), int(group_G[g]), int(start), int(stop)))
            if sum(p.stop - p.start for p in pieces) >= (enough if blocks else least) or g == last:
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
