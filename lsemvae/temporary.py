"""Temporary folders for large files: what a killed process leaves behind, the next one removes."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lsemvae.errors import StorageError

PREFIX = "lsemvae-fetched-"
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def needing_room(place: Path) -> Iterator[None]:
    """Raises StorageError that names the temporary folder where it has no room for what the block writes there."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        mend = f"make room in this temporary folder, or set TMPDIR to another one: {os.strerror(error.errno)}"
        raise StorageError(f"{place}: {mend}", passing=False) from error


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
        with needing_room(place):
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
