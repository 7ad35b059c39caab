"""Tables of a cohort that stay where they were computed: blocks in Ray's object store, of which rows are read.

No process holds a whole table unless it asks for every row. Ray keeps the blocks on the nodes that made them, and on
their disks when memory is short.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lsemvae.progress import Bar

Place = np.ndarray | slice


@dataclass(frozen=True)
class Stored:
    """A column of the blocks, indexed like an array [B, …] along its first axis. Small: it holds references.

    place_B   the row of the blocks, counted through all of them, that each row of the column is
    start_N   the first row of each of N blocks
    """

    blocks: tuple[Any, ...]
    start_N: np.ndarray
    column: str
    place_B: np.ndarray

    def __len__(self) -> int:
        return len(self.place_B)

    def __getitem__(self, rows: Place) -> np.ndarray:
        """These rows, read block by block; a copy."""
        place_B = self.place_B[rows]
        block_B = np.searchsorted(self.start_N, place_B, side="right") - 1
        found: np.ndarray | None = None
        for number in np.unique(block_B) if len(place_B) else [0]:  # the first has the shape of no rows
            values = self._of_block(int(number))
            if found is None:
                found = np.empty((len(place_B), *values.shape[1:]), values.dtype)
            here = block_B == number
            found[here] = values[place_B[here] - self.start_N[number]]
        assert found is not None
        return found

    def take(self, rows: np.ndarray, axis: int = 0) -> "Stored":
        """The column of these rows; nothing is read."""
        assert axis == 0
        return replace(self, place_B=self.place_B[rows])

    def _of_block(self, number: int) -> np.ndarray:
        import ray
        from ray.data.block import BlockAccessor

        return BlockAccessor.for_block(ray.get(self.blocks[number])).to_numpy(self.column)


Table = np.ndarray | Stored
"""An array, or one whose rows are read when they are indexed. `take` gives a table of some rows, and an index reads."""


@dataclass(frozen=True)
class Kept:
    """Blocks in Ray's object store: `small` are the columns that this process holds, in the order of `order_B`."""

    blocks: tuple[Any, ...]
    start_N: np.ndarray
    small: dict[str, np.ndarray]
    order_B: np.ndarray

    def column(self, name: str, rows: np.ndarray) -> Stored:
        """A column in the order of `small`, of these of its rows."""
        return Stored(self.blocks, self.start_N, name, self.order_B[rows])


def keep(rows: Any, small: Sequence[str], total: int, what: str) -> Kept:
    """Run a Ray Dataset and leave its blocks where they are made -> all its rows, in the order of their record ids.

    Ray Data keeps no order, and results must depend on data and seed alone. Only the columns `small` come here; of them
    one is `record_id`.
    """
    import ray
    from ray.data.block import BlockAccessor

    @ray.remote(num_cpus=0)  # beside the actors and tasks that make blocks
    def chosen(block: Any) -> dict[str, np.ndarray]:
        return BlockAccessor.for_block(block).to_numpy(list(small))

    blocks: list[Any] = []
    sizes: list[int] = []
    parts: list[dict[str, np.ndarray]] = []
    with Bar(total, what, "records") as bar:
        for bundle in rows.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                if entry.metadata.num_rows:
                    blocks.append(entry.ref)
                    sizes.append(entry.metadata.num_rows)
                    parts.append(ray.get(chosen.remote(entry.ref)))
                    bar.update(entry.metadata.num_rows)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in small}
    order_B = np.argsort(whole["record_id"], kind="stable")
    start_N = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Kept(tuple(blocks), start_N, {name: values[order_B] for name, values in whole.items()}, order_B)
