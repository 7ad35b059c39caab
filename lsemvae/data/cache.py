"""Prepared records on a machine's own disk: the first epoch decodes and preprocesses, those after it read.

A file holds one row group of one shard as a feed gives it: 12 leads of 10 s are 240 kB a record, eight times what it
takes in the shard. What it was made of and how is in its name, so another preprocessing, other leads or a shard that
was ingested again are other files. A file appears whole or not at all, and one that cannot be read is made again.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsemvae.errors import LsemvaeError
from lsemvae.storage import whole_file

log = logging.getLogger(__name__)

VERSION = 1
SPARE_BYTES = 2**30
"""What a cache leaves free on its disk."""
_given_up: set[Path] = set()


@dataclass(frozen=True)
class Cache:
    """A folder on the local disk of each machine. `meaning` names what its files were made by."""

    folder: Path
    meaning: str

    def path(self, shard: str, group: int) -> Path:
        """Where row group `group` is; `shard` names a shard and its bytes."""
        name = hashlib.sha256(f"{VERSION}\n{self.meaning}\n{shard}".encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}-{group:05d}.npy"

    def get(self, shard: str, group: int) -> dict[str, np.ndarray] | None:
        """The arrays that `put` was given, mapped from the file; None where there is none that is whole."""
        path = self.path(shard, group)
        try:
            rows = np.lib.format.open_memmap(path, mode="r")
            return {name: rows[name] for name in rows.dtype.names}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning(f"{path} cannot be read and is made again: {type(error).__name__}")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def put(self, shard: str, group: int, rows: Mapping[str, np.ndarray]) -> None:
        """Arrays [records, …]. Where there is no room the run goes on without, and says so once."""
        path = self.path(shard, group)
        if self.folder in _given_up:
            return
        kinds = np.dtype([(name, values.dtype, values.shape[1:]) for name, values in rows.items()])
        packed = np.empty(len(next(iter(rows.values()))), kinds)
        for name, values in rows.items():
            packed[name] = values
        try:
            with whole_file(path, durable=False) as stream:
                np.lib.format.write_array(stream, packed, allow_pickle=False)
        except OSError as error:
            _given_up.add(self.folder)
            log.warning(f"the cache {self.folder} takes no more ({os.strerror(error.errno or 0)}): going on without")

    def require_room(self, needed_bytes: int) -> None:
        """Raises LsemvaeError where the disk has not room for so much, with what the cache holds by now."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise LsemvaeError(f"the cache {self.folder} cannot be written to: {error}") from None
        held_bytes = sum(path.stat().st_size for path in self.folder.glob("*/*.npy"))
        if free_bytes - SPARE_BYTES < needed_bytes - held_bytes:
            raise LsemvaeError(
                f"the cache {self.folder} needs {needed_bytes / 1e9:.1f} GB, {held_bytes / 1e9:.1f} are in it and "
                f"{free_bytes / 1e9:.1f} GB of its disk are free: give another --cache, or none"
            )
