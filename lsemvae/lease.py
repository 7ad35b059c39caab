"""One command at a time works in a folder or a bucket's prefix; another one waits until that has ended or is silent.

    running.json   who works there, and a beat that counts up while it lives

No clock is compared: a waiting command measures for how long the beat has stood still. Object stores have no locks that
all of them keep, so two commands may overlap for some seconds after a long silence: then the one that was silent ends.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from lsemvae.errors import DamagedFile, LsemvaeError
from lsemvae.storage import Storage

RUNNING = "running.json"
BEAT_S = 5.0
SILENT_S = 30.0
"""A command that has not written for this long counts as dead."""
_SETTLE_S = 0.5  # two commands that begin at the same moment see by then which of them wrote last

log = logging.getLogger(__name__)


class Lease:
    """A command holds it while it works in `place`. Raises StorageError where the place cannot be written to."""

    def __init__(self, place: Storage) -> None:
        self._place, self._owner, self._beat = place, new_owner(), 0
        self._ended, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beats, daemon=True, name="lease")

    def __enter__(self) -> "Lease":
        while self._holder() != self._owner:
            if not wait_for_others(self._read, f"works in {self._place.uri}", SILENT_S):
                log.warning(f"the command that worked in {self._place.uri} is silent: this one goes on")
            self._write()
            time.sleep(_SETTLE_S)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(LsemvaeError, OSError):  # what is left is the beat of a process that has ended
            if self._holder() == self._owner:
                self._place.remove(RUNNING)

    def __getstate__(self) -> dict[str, Any]:
        """Without its thread: Ray Tune writes down its callbacks, one of which knows the lease."""
        return {name: value for name, value in vars(self).items() if name not in ("_thread", "_ended")}

    def require(self) -> None:
        """Raises LsemvaeError where another command has taken over, because this one was silent."""
        if self._lost:
            raise LsemvaeError(f"another command works in {self._place.uri} by now: it goes on, this one ends")

    def _beats(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if self._holder() not in (self._owner, None):
                    self._lost = True
                    return
                self._write()
            except (LsemvaeError, OSError) as error:  # the fault may pass; the work continues
                log.warning(f"{RUNNING} cannot be written: {error}")

    def _write(self) -> None:
        self._beat += 1
        self._place.write_bytes(RUNNING, json.dumps({"owner": self._owner, "beat": self._beat}).encode())

    def _read(self) -> tuple[str, int] | None:
        """Whoever works there, and the beat; None where nobody does, or the file is damaged."""
        try:
            found = self._place.read_json(RUNNING, "It is written again", ("owner", "beat"))
        except (FileNotFoundError, DamagedFile):
            return None
        return (str(found["owner"]), found["beat"]) if isinstance(found["beat"], int) else None

    def _holder(self) -> str | None:
        found = self._read()
        return found[0] if found else None


def wait_for_others(read: Callable[[], tuple[str, int] | None], does: str, silent_s: float) -> bool:
    """Wait while another command lives -> False where it has been silent for so long.

    `read` gives its owner and its beat, or None where there is no other; `does` says what it does, and where.
    """
    last, since, said = None, time.monotonic(), False
    while (found := read()) and not is_dead(found[0]):
        if found != last:
            last, since = found, time.monotonic()
        elif time.monotonic() - since > silent_s:
            return False
        if not said:
            log.info(
                f"another command {does}: this one waits until it has ended, or has been silent for {silent_s:g} s"
            )
            said = True
        time.sleep(1)
    return True


def new_owner() -> str:
    """A name for this command, by which `is_dead` finds its process."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    host, _, rest = owner.rpartition(":")[0].rpartition(":")
    if host != socket.gethostname() or not rest.isdecimal():
        return False
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
