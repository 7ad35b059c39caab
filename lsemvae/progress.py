"""Progress of a long step: a bar with the time left in a terminal, a line every ten seconds in a job's log."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

FIRST_S = 0.3
"""A step that ends sooner shows no bar."""
TERMINAL_S, LOG_S = 1.0, 10.0

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Bar:
    """Progress of one step, to be used as a context. `total` is None where nobody knows how long the step takes.

    It is shown from a thread, so that the time goes on while a step waits. A copy in another process, to which Ray Tune
    takes what its callbacks hold, shows nothing.
    """

    def __init__(self, total: int | None, what: str, unit: str = "", done: int = 0) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._first = self._done = done
        self._began, self._in_terminal = time.monotonic(), sys.stderr.isatty()
        self._bar: Any = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True, name="bar")
        self._thread.start()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], "Bar"], tuple[()]]:
        return _elsewhere, ()

    @property
    def done(self) -> int:
        return self._done

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._draw()

    def set_total(self, total: int) -> None:
        """For a step that learns only later how long it is."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def set_description(self, what: str) -> None:
        self._what = what
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=False)

    def write(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar. In a log, a last line says how long the step took, unless that is less than a second."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if self._bar is not None:
            self._draw()
            self._bar.close()
        elif not self._in_terminal and self._elapsed_s >= 1:
            count = f"{self._done - self._first} {self._unit} " if self._unit else ""
            log.info(f"{self._what}: {count}in {tqdm.format_interval(self._elapsed_s)}")

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def _show(self) -> None:
        if not self._in_terminal:
            while not self._closed.wait(LOG_S):
                log.info(self._line())
            return
        if self._closed.wait(FIRST_S):
            return
        told = None if self._unit else "{desc}: {elapsed} so far"
        self._bar = tqdm(total=self._total, desc=self._what, unit=self._unit, initial=self._first, bar_format=told)
        while not self._closed.wait(TERMINAL_S):
            with self._lock:
                self._bar.n = self._done
                self._bar.refresh()

    def _draw(self) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(self._done - self._bar.n)

    def _line(self) -> str:
        done, elapsed_s = self._done - self._first, self._elapsed_s
        if self._total is None:
            return f"{self._what}: {tqdm.format_interval(elapsed_s)} so far"
        line = f"{self._what}: {self._done} of {self._total} {self._unit}".rstrip()
        if not (done and self._total):
            return f"{line}, {tqdm.format_interval(elapsed_s)} so far"
        left_s = elapsed_s / done * max(self._total - self._done, 0)
        rate = f"{done / elapsed_s:.3g} {self._unit}/s".replace(" /", "/")
        return f"{line} ({100 * self._done / self._total:.0f} %), {rate}, {tqdm.format_interval(left_s)} left"


class _Elsewhere(Bar):
    def __init__(self) -> None:
        self._done = 0

    def update(self, count: int = 1) -> None:
        self._done += count

    def write(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _elsewhere() -> Bar:
    return _Elsewhere()


def over(items: Iterable[Item], what: str, unit: str = "") -> Iterator[Item]:
    """The items, with a bar that counts those that are done."""
    listed = list(items)
    with Bar(len(listed), what, unit) as bar:
        for item in listed:
            yield item
            bar.update()
