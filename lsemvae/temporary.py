"""Temporary folders for large files: what a killed process leaves behind, the next one removes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "lsemvae-fetched-"


@contextmanager
def temporary_folder(within: Path | None = None) -> Iterator[Path]:
    """A new folder that is gone after the block. Folders that killed processes left beside it are removed, too.

    A killed process removes nothing, but the kernel releases its lock: a folder without a lock has no owner any more.
    """
    place = Path(tempfile.gettempdir()) if within is None else within
    for other in place.glob(f"{PREFIX}*"):
        if (lock := _lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = _lock(folder, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path, how: int) -> int | None:
    """The descriptor that holds the folder's lock; None where another process has it or has removed the folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        return None
    if not folder.exists():  # removed between the two calls
        os.close(descriptor)
        return None
    return descriptor
