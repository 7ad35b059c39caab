"""Prepared records on a machine's own disk: the first epoch decodes and preprocesses, later epochs read.

A file holds one row group of one shard as a feed gives it: 12 leads of 10 s are 120 kB a record in int16, four times
what they take in the shard. A file appears whole or not at all. It ends with a checksum, which each process checks when
it first maps the file; a file that is cut or altered is made again.

    ROOT/3f9a…/                  one data set, prepared in one way: one `Cache`
        0c41…-00007.npy          row group 7 of one shard
        used                     touched while a run uses this folder

The name of a folder is a digest of the data set and of how it was prepared, so other preprocessing, other leads or a
data set that was ingested again are another folder. When room is needed, whole folders are removed, the least recently
used first, but none that was used within the last day. Removing a folder that a run still uses costs that run time, not
correctness: the run prepares the records again.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsemvae.errors import LsemvaeError
from lsemvae.storage import whole_file

log = logging.getLogger(__name__)

VERSION = 3
SPARE_BYTES = 2**30
"""What a cache leaves free on its disk."""
IN_USE_S = 24 * 3600.0
"""A folder that was used within this time is never removed."""
USED = "used"
_SAY_USED_EVERY_S = 600.0
_CHECKSUM_BYTES = 4
# Folders of versions 2 and 3, and those of version 1, in which the files of all data sets lay together.
_FOLDER = re.compile(r"[0-9a-f]{16}|[0-9a-f]{2}")
_FILE = re.compile(r"\.?[0-9a-f]{32}-\d{5}\.npy(\.[0-9a-f]+\.partial)?")

# What this process knows: caches that took no more, when it last touched a folder, and files that it has checked.
_given_up: set[Path] = set()
_said_used_s: dict[Path, float] = {}
_checked: dict[Path, tuple[int, int]] = {}


@dataclass(frozen=True)
class Cache:
    """One data set, prepared in one way, in the folder `root` on the local disk of each machine.

    `meaning` names the data set and how it was prepared.
    """

    root: Path
    meaning: str

    @property
    def folder(self) -> Path:
        return self.root / hashlib.sha256(f"{VERSION}\n{self.meaning}".encode()).hexdigest()[:16]

    def path(self, shard: str, group: int) -> Path:
        """Where row group `group` of a shard is; `shard` names the shard and its bytes."""
        return self.folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}-{group:05d}.npy"

    def get(self, shard: str, group: int) -> dict[str, np.ndarray] | None:
        """The arrays that `put` was given, mapped from the file; None if there is no intact file."""
        path = self.path(shard, group)
        try:
            _check(path)
            rows = np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning(f"{path} is damaged and is made again: {' '.join(str(error).split())[:200]}")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.say_used()
        return {name: rows[name] for name in rows.dtype.names or ()}

    def put(self, shard: str, group: int, rows: Mapping[str, np.ndarray]) -> None:
        """Keep arrays [records, …]. If there is no room, the run goes on without, and one warning says so."""
        if self.root in _given_up:
            return
        header, packed = _packed(rows)
        path = self.path(shard, group)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _make_room(self.root, packed.nbytes):
                self._give_up(f"its disk has less than {SPARE_BYTES / 1e9:.1f} GB to spare")
                return
            with whole_file(path, durable=False) as stream:
                stream.write(header)
                stream.write(packed)
                stream.write(zlib.crc32(packed, zlib.crc32(header)).to_bytes(_CHECKSUM_BYTES, "little"))
            _checked[path] = _identity(path)
        except OSError as error:
            self._give_up(os.strerror(error.errno or 0))
            return
        self.say_used()

    def _give_up(self, why: str) -> None:
        _given_up.add(self.root)
        log.warning(f"the cache {self.root} takes no more ({why}): going on without")

    def say_used(self) -> None:
        """Touch the folder's mark, at most once in ten minutes, so that no other run removes the folder."""
        now_s = time.monotonic()
        if now_s - _said_used_s.get(self.folder, -np.inf) > _SAY_USED_EVERY_S:
            _said_used_s[self.folder] = now_s
            with contextlib.suppress(OSError):
                (self.folder / USED).touch()


def require_room(root: Path, needed_bytes: Mapping[Cache, int]) -> None:
    """Make room in `root` for all that these caches will hold, counting what they hold by now.

    Raises LsemvaeError if the disk has not so much room, or cannot be written to.
    """
    try:
        for cache in needed_bytes:
            cache.folder.mkdir(parents=True, exist_ok=True)
            (cache.folder / USED).touch()
            _remove_partial_files(cache.folder)
        held_bytes = {cache: _bytes_in(cache.folder) for cache in needed_bytes}
        missing = sum(max(needed - held_bytes[cache], 0) for cache, needed in needed_bytes.items())
        enough = _make_room(root, missing)
        free_bytes = shutil.disk_usage(root).free
    except OSError as error:
        raise LsemvaeError(f"the cache {root} cannot be written to: {error}") from None
    if not enough:
        raise LsemvaeError(
            f"the cache {root} needs {sum(needed_bytes.values()) / 1e9:.1f} GB for this data set, "
            f"{sum(held_bytes.values()) / 1e9:.1f} of them are there and {free_bytes / 1e9:.1f} GB of its disk are "
            f"free, {SPARE_BYTES / 1e9:.1f} of which stay free: give another --cache, or none"
        )


def _make_room(root: Path, needed_bytes: int) -> bool:
    """Whether so much is free beside the spare bytes; removes folders that nothing uses while it is not."""

    def enough() -> bool:
        return shutil.disk_usage(root).free - SPARE_BYTES >= needed_bytes

    if enough():
        return True
    for folder in _unused_folders(root):
        freed_bytes = _remove(folder)
        log.info(f"removed {folder} from the cache, which no run used for a day: {freed_bytes / 1e9:.1f} GB")
        if enough():
            return True
    return False


def _unused_folders(root: Path) -> list[Path]:
    """Folders that were not used within `IN_USE_S`, the least recently used first."""
    used_s = {}
    for folder in root.iterdir():
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            mark = folder / USED
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                used_s[folder] = (mark if mark.exists() else folder).stat().st_mtime
    now_s = time.time()
    return sorted((folder for folder in used_s if now_s - used_s[folder] > IN_USE_S), key=lambda folder: used_s[folder])


def _remove(folder: Path) -> int:
    """Remove the cache's own files in a folder, and the folder if it is then empty -> bytes that were freed."""
    freed_bytes = 0
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:  # another process has removed it
        return 0
    for path in paths:
        if _FILE.fullmatch(path.name) or path.name == USED:
            with contextlib.suppress(FileNotFoundError):
                freed_bytes += path.stat().st_size
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed_bytes


def _remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left behind."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > IN_USE_S:
                path.unlink()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process found it damaged
            total += path.stat().st_size
    return total


def _packed(rows: Mapping[str, np.ndarray]) -> tuple[bytes, memoryview]:
    """Arrays [records, …] as the content of an .npy file of structs: its header and its data."""
    kinds = np.dtype([(name, values.dtype, values.shape[1:]) for name, values in rows.items()])
    structs = np.empty(len(next(iter(rows.values()))), kinds)
    for name, values in rows.items():
        structs[name] = values
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(structs))
    return header.getvalue(), structs.view(np.uint8).data


def _check(path: Path) -> None:
    """Raises ValueError if the content does not fit its checksum; a file that was checked before is not read again."""
    identity = _identity(path)
    if _checked.get(path) == identity:
        return
    content = np.memmap(path, np.uint8, mode="r").data
    if zlib.crc32(content[:-_CHECKSUM_BYTES]).to_bytes(_CHECKSUM_BYTES, "little") != bytes(content[-_CHECKSUM_BYTES:]):
        raise ValueError("its checksum does not fit its content")
    _checked[path] = identity


def _identity(path: Path) -> tuple[int, int]:
    """Changes when a file is replaced or written to."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
