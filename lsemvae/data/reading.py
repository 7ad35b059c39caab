"""Read one recording of many: a fault of the recording is returned, a fault of the storage is raised."""

import random
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TypeVar

from lsemvae.errors import StorageError, UnreadableRecording
from lsemvae.formats import read_relative
from lsemvae.record import Record
from lsemvae.storage import Storage

T = TypeVar("T")
LONGEST_PAUSE_S = 30.0


def read_or_reason(
    storage: Storage,
    path: str,
    use: Callable[[Record], T],
    *,
    uv_per_lsb: float | None = None,
    patience_s: float = 0.0,
) -> T | UnreadableRecording:
    """What `use` makes of the recording, or why it cannot be read.

    A reader that fails in an unexpected way is a reason too: one recording must not end a day's work on the others.
    Raises StorageError, OSError and MemoryError, which say nothing about the recording. Their messages do not name it,
    because a file name often tells whose recording it is.
    """

    def fetch(name: str, max_bytes: int, /) -> bytes:
        return patiently(lambda: storage.read_bytes(name, max_bytes), patience_s)

    def fetch_range(name: str, start: int, n_bytes: int) -> bytes:
        return patiently(lambda: storage.read_range(name, start, n_bytes), patience_s)

    try:
        return use(read_relative(path, fetch, uv_per_lsb=uv_per_lsb, read_range=fetch_range))
    except UnreadableRecording as error:
        return error
    except (NotADirectoryError, IsADirectoryError) as error:
        return UnreadableRecording("missing_file", error.strerror or type(error).__name__)
    except StorageError as error:
        text = str(error).replace(str(PurePosixPath(path).with_suffix("")), "(a recording)")
        raise StorageError(text, passing=error.passing, overloaded=error.overloaded) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        return UnreadableRecording("reader_failed", f"{type(error).__name__}: {error}")


def patiently(call: Callable[[], T], patience_s: float) -> T:
    """The result of `call`, tried again while the object store says that it is overloaded.

    Pauses grow from about one second to `LONGEST_PAUSE_S` and are random, so that tasks do not return together. Raises
    the last StorageError when the pauses add up to more than `patience_s`.
    """
    pause_s, waited_s = 1.0, 0.0
    while True:
        try:
            return call()
        except StorageError as error:
            if not error.overloaded or waited_s >= patience_s:
                raise
        chosen_s = random.uniform(0.5, 1.5) * pause_s
        time.sleep(chosen_s)
        waited_s += chosen_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
