"""Which record comes when: the order of an epoch, as a function of the data sets, the seed and the epoch alone.

1. The row groups of all shards are shuffled. A data set with repeats k contributes each of its row groups k times.
2. The shuffled row groups, laid end to end, are cut into streams of equal length.
3. A stream is cut into blocks of a few row groups, and the records of a block are shuffled once more.
4. Step s of an epoch takes records [s q, (s + 1) q) of every stream.

Worked example: five row groups a to e of 64 records, 2 streams, a batch of 16, so q = 8. The shuffle gives c a e b d.
Stream 0 holds c, a and the first 32 records of e; stream 1 holds the last 32 of e, then b and d: 160 records each. Step
0 takes 8 records of each stream, and 20 steps make the epoch. Two workers read one stream each, one worker reads both:
the records of a step are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lsemvae.data.shards import ROWS_PER_GROUP
from lsemvae.errors import LsemvaeError

ORDER_VERSION = 2
"""Raised when the same settings come to mean another order: a run cannot then resume in the middle of an epoch."""


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
    """The order of every epoch. `shuffle` is off for validation."""

    rows: tuple[int, ...]
    """Records of each shard."""
    batch_size: int
    streams: int = 8
    buffer: int = 1024
    """Shuffle-buffer size in records, over all streams."""
    seed: int = 0
    shuffle: bool = True
    repeats: tuple[int, ...] = ()
    """How often each shard's records come in an epoch; empty means once."""

    def __post_init__(self) -> None:
        assert not self.repeats or (len(self.repeats) == len(self.rows) and min(self.repeats) >= 1)
        if self.batch_size % self.streams:
            raise LsemvaeError(
                f"batch_size={self.batch_size} is no multiple of streams={self.streams}: every stream gives the same "
                "number of records to a step"
            )
        if self.records < self.streams:
            raise LsemvaeError(f"{self.records} recordings for {self.streams} streams: ingest more, or ask for fewer")

    @property
    def records(self) -> int:
        """Records of an epoch; one that comes k times counts k times."""
        return sum(rows * times for rows, times in zip(self.rows, self._times, strict=True))

    @property
    def _times(self) -> tuple[int, ...]:
        return self.repeats or (1,) * len(self.rows)

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
        """The streams that a worker reads; raises LsemvaeError if there are more workers than streams."""
        if workers > self.streams:
            raise LsemvaeError(f"{workers} workers and {self.streams} streams: each worker needs at least one stream")
        return range(worker, self.streams, workers)

    def blocks(self, epoch: int, stream: int) -> list[Block]:
        """All blocks of one stream in one epoch. They end where row groups end, except at the ends of the stream.

        A block has `buffer / streams` records or a little more. First blocks have different lengths, so that streams
        do not all need their next block at the same step, when a device would have to wait for all of them. Worked
        example: with a buffer of 1,024 and 2 streams a block has 8 row groups. Stream 0's first block has 4 and stream
        1's has 8. So stream 0 needs its next blocks after 256, 768, 1280 … records, stream 1 after 512, 1024, 1536 ….
        """
        groups = self._shuffled_groups(epoch)
        ends_G = np.cumsum(groups.rows_G)
        begin, end = (share * self.records // self.streams for share in (stream, stream + 1))
        blocks: list[Block] = []
        pieces: list[Piece] = []
        enough = self.buffer // self.streams
        least = -(-enough * (stream + 1) // self.streams)  # in the first block
        first, last = np.searchsorted(ends_G, begin, side="right"), np.searchsorted(ends_G, end, side="left")
        for g in range(first, last + 1):
            before = ends_G[g] - groups.rows_G[g]
            start, stop = max(begin - before, 0), min(end - before, groups.rows_G[g])
            pieces.append(Piece(int(groups.shard_G[g]), int(groups.number_G[g]), int(start), int(stop)))
            if sum(p.stop - p.start for p in pieces) >= (enough if blocks else least) or g == last:
                blocks.append(Block(stream, (self.seed, epoch, stream, len(blocks)), tuple(pieces)))
                pieces = []
        return blocks

    def _shuffled_groups(self, epoch: int) -> "_RowGroups":
        """The row groups of an epoch, end to end; each comes as often as its repeats say.

        Copies of a row group are spread over the epoch. Copy j of k gets the time ((j + u + v / 2) / k) modulo 1 of the
        epoch, where u is one random number for the row group and v one for the copy. Copies that follow each other
        are then at least 1 / (2 k) of the epoch apart. Sorted by time, the row groups are dealt to the streams in
        turn, since all streams are read at the same time.

        Worked example with 2 streams: a comes twice, b, c and d come once. With u = 0.1 and v = 0.4 and 0.8 the copies
        of a get (0 + 0.1 + 0.2) / 2 = 0.15 and (1 + 0.1 + 0.4) / 2 = 0.75. If b, c and d get 0.9, 0.05 and 0.3, the
        sequence is c a d a' b. Stream 0 is dealt c d b and stream 1 is dealt a a', so the answer is c d b a a'.
        """
        groups, copies = _row_groups(self.rows, self._times)
        if not self.shuffle:
            return groups
        rng = np.random.default_rng([self.seed, epoch])
        if (copies.repeats_G == 1).all():
            return groups.take(rng.permutation(len(groups.rows_G)))
        u_G = rng.random(int(copies.group_G[-1]) + 1)[copies.group_G]
        v_G = rng.random(len(groups.rows_G))
        by_time_G = np.argsort((copies.copy_G + u_G + v_G / 2) / copies.repeats_G % 1, kind="stable")
        return groups.take(np.concatenate([by_time_G[stream :: self.streams] for stream in range(self.streams)]))

    def demand(self, epoch: int, streams: Sequence[int], start_step: int = 0) -> list[tuple[Block, int]]:
        """The blocks of these streams, in the order in which the steps from `start_step` on need them.

        With each comes the number of its records that earlier steps have taken.

        Worked example: q = 8, stream 0 has blocks of 64 and 128 records, stream 1 of 128 and 64, and the first step is
        9: earlier steps took 72 records of each stream. Stream 0's first block is used up, and 8 of its second are
        gone; 72 of stream 1's first are gone. After 7 steps stream 1 has none left of the remaining 56 and needs its
        second block. So the answer is (stream 0's second, 8), (stream 1's first, 72), (stream 1's second, 0).
        """
        left = {stream: iter(self.blocks(epoch, stream)) for stream in streams}
        have = dict.fromkeys(streams, -start_step * self.per_stream)  # below 0: taken by earlier steps
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


class _RowGroups(NamedTuple):
    """A sequence of row groups: the shard of each, its number within the shard, and its rows."""

    shard_G: np.ndarray
    number_G: np.ndarray
    rows_G: np.ndarray

    def take(self, order_G: np.ndarray) -> "_RowGroups":
        return _RowGroups(self.shard_G[order_G], self.number_G[order_G], self.rows_G[order_G])


class _Copies(NamedTuple):
    """Which row group of the data set each one is, which copy of it, and how many copies there are."""

    group_G: np.ndarray
    copy_G: np.ndarray
    repeats_G: np.ndarray


@lru_cache(maxsize=8)
def _row_groups(rows: tuple[int, ...], times: tuple[int, ...]) -> tuple[_RowGroups, _Copies]:
    """All row groups, shard by shard; one that comes k times in an epoch is there k times in a row."""
    found = [
        (shard, number, min(ROWS_PER_GROUP, count - start), times[shard])
        for shard, count in enumerate(rows)
        for number, start in enumerate(range(0, count, ROWS_PER_GROUP))
    ]
    shard_N, number_N, rows_N, repeats_N = np.array(found, dtype=np.int64).reshape(-1, 4).T
    group_G = np.repeat(np.arange(len(found)), repeats_N)
    copy_G = np.arange(len(group_G)) - np.repeat(np.cumsum(repeats_N) - repeats_N, repeats_N)
    groups = _RowGroups(shard_N, number_N, rows_N).take(group_G)
    return groups, _Copies(group_G, copy_G, repeats_N[group_G])
