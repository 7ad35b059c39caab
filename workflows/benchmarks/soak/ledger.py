"""What came back, and what happened meanwhile: which answers were wrong, which errors an event explains, and gaps."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Verdict = Literal["right", "as it must", "failed", "wrong"]
AFTER_S = 2.0
"""An error this long after an event has ended still counts as its: a request may have begun within it."""
MAX_WRONG = 50
"""So many wrong answers are written down in full; all are counted."""


@dataclass(frozen=True)
class Asked:
    """One request and its end: `status` is the HTTP status, or the name of the client's error.

    Verdicts: `right` for a score that is right; `as it must` for what is no score and was answered as it must be;
    `failed` for an error in place of an answer; `wrong` for a wrong score, or a score for what must be refused.
    """

    began_s: float
    ended_s: float
    kind: str
    status: str
    verdict: Verdict
    fault: str = ""


@dataclass
class Event:
    """A fault or a promotion. `breaks` are the kinds of requests that may fail because of it, "" all of them.

    It ends when what was broken is whole again. `failed` says that this did not happen in time.
    """

    kind: str
    detail: str
    began_s: float
    breaks: tuple[str, ...] = ()
    ended_s: float | None = None
    failed: str | None = None

    def explains(self, asked: Asked, now_s: float) -> bool:
        end_s = (self.ended_s if self.ended_s is not None else now_s) + AFTER_S
        return any(asked.kind.startswith(kind) for kind in self.breaks) and (
            asked.ended_s >= self.began_s and asked.began_s <= end_s
        )


@dataclass(frozen=True)
class Gap:
    """The longest time without a right score, and the events within it."""

    seconds: float
    began_s: float
    events: tuple[str, ...]


@dataclass
class Ledger:
    """Everything that was asked, and every event. Times are seconds since the ledger was made."""

    asked: list[Asked] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def now_s(self) -> float:
        return time.monotonic() - self._began

    def add(self, began_s: float, kind: str, status: str, verdict: Verdict, fault: str = "") -> None:
        self.asked.append(Asked(began_s, self.now_s(), kind, status, verdict, fault))
        if verdict == "wrong" and len(self.wrong) < MAX_WRONG:
            self.wrong.append(f"{self.now_s():.1f} s, {kind}: {fault}")

    @contextmanager
    def event(self, kind: str, detail: str = "", breaks: tuple[str, ...] = ()) -> Iterator[Event]:
        """An event that lasts as long as the block."""
        event = Event(kind, detail, self.now_s(), breaks)
        self.events.append(event)
        try:
            yield event
        finally:
            event.ended_s = self.now_s()

    def unexplained(self) -> list[Asked]:
        """Errors in place of answers that no event explains."""
        now_s = self.now_s()
        failed = (asked for asked in self.asked if asked.verdict == "failed")
        return [asked for asked in failed if not any(event.explains(asked, now_s) for event in self.events)]

    def counts(self) -> dict[tuple[str, str], Counter[str]]:
        """Kind and status -> number of each verdict."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for asked in self.asked:
            found.setdefault((asked.kind, asked.status), Counter())[asked.verdict] += 1
        return dict(sorted(found.items()))

    def gaps(self, count: int = 5) -> list[Gap]:
        """The longest times between two right scores one after another, the longest first."""
        times = sorted(asked.ended_s for asked in self.asked if asked.verdict == "right")
        longest = sorted(((b - a, a) for a, b in pairwise(times)), reverse=True)[:count]
        return [Gap(seconds, began_s, self._during(began_s, began_s + seconds)) for seconds, began_s in longest]

    def longest_gap(self, events: Sequence[Event]) -> float:
        """The longest gap that touches one of these events."""
        times = sorted(asked.ended_s for asked in self.asked if asked.verdict == "right")
        return max(
            (
                b - a
                for event in events
                for a, b in pairwise(times)
                if b >= event.began_s and a <= (event.ended_s or b) + AFTER_S
            ),
            default=0.0,
        )

    def last_error_s(self, event: Event) -> float:
        """Seconds from the event to the last error that it explains; 0 where there is none. A cohort job that fails
        does not count: when it ends says nothing of the service."""
        now_s, failed = self.now_s(), (asked for asked in self.asked if asked.verdict == "failed")
        ends = [a.ended_s for a in failed if a.kind != "cohort job" and event.explains(a, now_s)]
        return max(ends) - event.began_s if ends else 0.0

    def _during(self, began_s: float, ended_s: float) -> tuple[str, ...]:
        return tuple(
            event.kind for event in self.events if event.began_s <= ended_s and (event.ended_s or ended_s) >= began_s
        )
