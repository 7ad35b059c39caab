"""progress.json: the progress on a cohort, read by the endpoint and by other commands on the same output."""

import json
import logging
import threading
import time
from collections import Counter
from typing import Any

from lsemvae.errors import LsemvaeError
from lsemvae.lease import new_owner, wait_for_others
from lsemvae.storage import Storage

PROGRESS = "progress.json"
BEAT_S = 5.0
SILENT_S = 30.0
"""A command that has not written for this long counts as dead."""

log = logging.getLogger(__name__)


class Progress:
    """Counts, and a thread that writes them. One command at a time works on an output; others wait for it.

    This only avoids doing work twice. The result does not depend on it: parts are the same bytes whoever makes them.
    """

    def __init__(self, output: Storage, about: dict[str, Any], total: int) -> None:
        self._output, self._about, self._total = output, about, total
        self._owner = new_owner()
        self._created, self._beat, self._state = time.time(), 0, "running"
        self._began = self._ended = 0.0
        self._stopped, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beats, daemon=True, name="progress")
        self.done = self.made = self.scored = self.unreadable = 0
        self.refused: Counter[str] = Counter()
        self.unreadable_codes: Counter[str] = Counter()

    def __enter__(self) -> "Progress":
        wait_for_others(self._other, f"writes to {self._output.uri}", SILENT_S)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.stop("done" if kind is None else "failed")

    def stop(self, state: str) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            self._state = state
            if not self._lost:
                self._write()

    def add(self, part: dict[str, Any]) -> None:
        """Counts a part, from its summary. Raises LsemvaeError when another command has taken over the output."""
        if self._lost:
            raise LsemvaeError(
                f"another command writes to {self._output.uri} since this one began: it goes on, this one ends"
            )
        self.done += part["records"]
        self.made += part["made"]
        self.scored += part["scored"]
        self.unreadable += part["unreadable"]
        self.refused.update(part["refused"])
        self.unreadable_codes.update(part["unreadable_codes"])
        if part["made"]:
            self._began = min(self._began or part["began"], part["began"])
            self._ended = max(self._ended, part["ended"])

    @property
    def seconds(self) -> float:
        """From the start of the first part that was made to the end of the last."""
        return self._ended - self._began

    @property
    def startup_s(self) -> float:
        """Until the first part was started: for Ray, loading the model, and waiting for processors."""
        return max(self._began - self._created, 0.0)

    @property
    def rate(self) -> float:
        """Recordings each second, without those that were finished before."""
        return self.made / self.seconds if self.seconds > 0 else 0.0

    def _beats(self) -> None:
        while not self._stopped.wait(BEAT_S):
            other = self._read()
            if other and other["owner"] != self._owner and other["state"] == "running":
                self._lost = True
                return
            try:
                self._write()
            except (LsemvaeError, OSError) as error:  # the fault may pass; the work continues
                log.warning(f"{PROGRESS} cannot be written: {error}")

    def _write(self) -> None:
        self._beat += 1
        left = (self._total - self.done) / self.rate if self.rate else None
        content = self._about | {
            "state": self._state,
            "owner": self._owner,
            "beat": self._beat,
            "records": self._total,
            "done": self.done,
            "scored": self.scored,
            "unreadable": self.unreadable,
            "refused": dict(sorted(self.refused.items())),
            "made": self.made,
            "seconds": round(self.seconds, 3),
            "startup_s": round(self.startup_s, 3),
            "records_per_s": round(self.rate, 3),
            "time_left_s": None if left is None else round(left, 1),
        }
        self._output.write_bytes(PROGRESS, json.dumps(content, indent=2).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            return self._output.read_json(PROGRESS, "It is written again", ("owner", "beat", "state"))
        except (FileNotFoundError, LsemvaeError):  # a damaged file, or a storage that fails, shows no other command
            return None

    def _other(self) -> tuple[str, int] | None:
        """The owner and the beat of a command that writes to the output."""
        found = self._read()
        return (found["owner"], found["beat"]) if found and found["state"] == "running" else None
