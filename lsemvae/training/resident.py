"""Batches on the device: samples from int16 to float32, and data sets that stay in the device's memory.

A data set that fits there is read once a run, not once an epoch. The order is that of `Feed.batches`, and so are the
batches. A recording of 12 leads and 10 s takes 120 kB: 48,000 of them take 5.8 GB.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lsemvae.data.feed import NOBODY, Feed, Records, read_on_ray
from lsemvae.data.layouts import Layout, Rows
from lsemvae.data.order import Block
from lsemvae.data.packing import PACKED, STEP, ZERO
from lsemvae.errors import LsemvaeError

_READ_AT_ONCE = 256


def widened(layout: Layout, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of this layout with its samples as float32, see `lsemvae.data.packing`."""
    if not layout.packed:
        return dict(rows)
    rest = {name: values for name, values in rows.items() if name not in (PACKED, ZERO, STEP)}
    x_BLT = rows[PACKED].float().add_(rows[ZERO].unsqueeze(2)).mul_(rows[STEP].unsqueeze(2))
    return {layout.signal: x_BLT, **rest}


class Resident:
    """The records of a feed on a device; every worker holds all of them, since each epoch deals them anew."""

    def __init__(
        self,
        feed: Feed,
        device: torch.device,
        workers: int = 1,
        read: "Callable[[Feed, Sequence[Block], int], Iterator[Records]] | None" = None,
    ) -> None:
        """Reads the records. `workers` do so at the same time; `read` is that of `Feed.batches`."""
        self.feed = feed
        self._arrays: dict[str, Tensor] = {}
        self._row_N = np.full(rows_in(feed), NOBODY)
        """What `row_B` is of each record: its number, DAMAGED or NOBODY."""
        in_turn = replace(feed.order, batch_size=_READ_AT_ONCE, streams=1, shuffle=False, repeats=())

        def shared(feed: Feed, blocks: Sequence[Block], _: int) -> Iterator[Records]:
            return (read or read_on_ray)(feed, blocks, workers)

        first = 0
        for rows in replace(feed, order=in_turn).batches(0, read=shared):
            count = min(_READ_AT_ONCE, len(self._row_N) - first)  # the last batch is filled up with nobody
            self._row_N[first : first + count] = rows.pop("row_B")[:count]
            for name, values in rows.items():
                if name not in self._arrays:
                    shape = (len(self._row_N) + 1, *values.shape[1:])
                    self._arrays[name] = torch.empty(shape, dtype=torch.from_numpy(values).dtype, device=device)
                self._arrays[name][first : first + count] = torch.from_numpy(values[:count])
            first += count
        for name, values in feed.layout.nothing(1).items():  # the last row: where there is no record
            self._arrays[name][-1] = torch.from_numpy(values)[0]

    def rows(self, epoch: int, worker: int, workers: int, start_step: int) -> Iterator[Rows]:
        """Of each step `row_B`, as `Feed.batches` gives it, and `at_B`, where `take` finds its records."""
        layout = _Numbers(self.feed.layout.leads, self.feed.layout.preprocess)
        numbers = replace(self.feed, layout=layout, withdrawn_rows=())  # `_row_N` knows who has withdrawn
        for rows in numbers.batches(epoch, worker, workers, start_step, _numbers):
            wanted_B = rows["row_B"]
            yield {
                "row_B": np.where(wanted_B >= 0, self._row_N[wanted_B], NOBODY),
                "at_B": np.where(wanted_B >= 0, wanted_B, len(self._row_N)),
            }

    def take(self, at_B: Tensor) -> dict[str, Tensor]:
        """The arrays of a batch, without `row_B`."""
        return {name: values.index_select(0, at_B) for name, values in self._arrays.items()}


def rows_in(feed: Feed) -> int:
    """Records of the feed; one that comes several times an epoch counts once."""
    return sum(feed.order.rows)


def require_memory(feeds: Sequence[Feed], device: torch.device, spare_bytes: int) -> None:
    """Raises LsemvaeError where a GPU has not the memory for all records beside `spare_bytes`."""
    if device.type != "cuda":
        return
    needed = sum(rows_in(feed) * feed.record_bytes for feed in feeds)
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free - spare_bytes:
        raise LsemvaeError(
            f"--device-cache needs {needed / 1e9:.1f} GB for {sum(map(rows_in, feeds))} recordings, and the GPU has "
            f"{max(free - spare_bytes, 0) / 1e9:.1f} GB free beside the model: leave it out, and give --cache"
        )


@dataclass(frozen=True)
class _Numbers(Layout):
    """A layout without arrays, for the order of records alone."""

    def _prepare(self, signals_mv: Sequence[np.ndarray], rates_hz: np.ndarray) -> Rows:
        raise AssertionError("no record is read")

    def _nothing(self, records: int) -> Rows:
        return {}


def _numbers(feed: Feed, blocks: Sequence[Block], workers: int = 1) -> Iterator[Records]:
    for block in blocks:
        yield feed.arrange(block, feed.numbers(block))
