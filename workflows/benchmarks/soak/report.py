"""The soak's result: its tables, its faults, its JSON and its picture."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import machine
from benchmarks.soak.ledger import Event, Ledger
from benchmarks.soak.processes import FIGURES, Reading, Trend, trends

LIMITS = {"memory_mb": 30.0, "threads": 4.0, "files": 10.0}
"""A single process of the service may grow by so much in an hour. What is below the limit, an hour cannot tell from the
memory that an allocator keeps."""
OURS = ("replica", "explains", "proxy", "fallback proxy", "HAProxy", "controller")
"""The processes of the service. The others are shown, too; they belong to Ray, MLflow and the mock of the store."""
BESIDE = ("mlflow", "store", "this load")
WARM_S, LEAST_S = 120.0, 300.0
COLORS = {"right": "#2f5d8a", "as it must": "#7a9e4c", "failed": "#d98a2b", "wrong": "#c0392b"}
TITLES = {"memory_mb": "memory (PSS), MB", "threads": "threads", "files": "open files"}


@dataclass(frozen=True)
class Report:
    """What came back, and the processes over time."""

    ledger: Ledger
    readings: list[Reading]
    settings: dict[str, Any]

    @property
    def trends(self) -> dict[str, dict[str, Trend]]:
        return trends(self.readings, WARM_S, LEAST_S)

    @property
    def faults(self) -> list[str]:
        """Why the soak has failed; empty when it has not."""
        ledger = self.ledger
        wrong = sum(asked.verdict == "wrong" for asked in ledger.asked)
        faults = [f"{wrong} wrong answers"] if wrong else []
        unexplained = Counter((asked.kind, asked.status) for asked in ledger.unexplained())
        faults += [
            f"{kind}: {count} x {status}, and no event explains it" for (kind, status), count in unexplained.items()
        ]
        faults += [f"{event.kind} at {event.began_s:.0f} s: {event.failed}" for event in ledger.events if event.failed]
        if not any(asked.verdict == "right" for asked in ledger.asked):
            faults.append("no right answer at all")
        found = self.trends
        for kind in OURS:
            for figure, trend in found.get(kind, {}).items():
                if trend.slope is not None and trend.slope > LIMITS[figure]:
                    faults.append(f"{kind}: {TITLES[figure]} grow by {trend.slope:.1f} an hour")
        return faults

    # --- tables ---------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Print the tables."""
        ledger = self.ledger
        print(f"\n{'request':<28} {'status':<22} {'number':>7}  {'right':>7} {'refused':>7} {'failed':>7} {'wrong':>6}")
        for (kind, status), found in ledger.counts().items():
            shown = (found[verdict] or "" for verdict in ("right", "as it must", "failed", "wrong"))
            right, must, failed, wrong = shown
            print(f"{kind:<28} {status:<22} {found.total():>7}  {right:>7} {must:>7} {failed:>7} {wrong:>6}")
        print(
            f"\n{'event':<28} {'number':>7} {'whole after, s':>20} {'last error after, s':>20} {'longest gap, s':>15}"
        )
        print(f"{'':<28} {'':>7} {'median':>12} {'most':>7} {'median':>12} {'most':>7}")
        for row in self.events():
            print(
                f"{row['event']:<28} {row['number']:>7} {row['whole_s'][0]:>12.1f} {row['whole_s'][1]:>7.1f} "
                f"{row['error_s'][0]:>12.1f} {row['error_s'][1]:>7.1f} {row['gap_s']:>15.2f}"
            )
        print("\nlongest times without a right score:")
        for gap in ledger.gaps():
            print(f"  {gap.seconds:.2f} s from {gap.began_s:.1f} s: {', '.join(gap.events) or 'no event'}")
        self._show_processes()
        for line in ledger.wrong:
            print(f"wrong: {line}")
        print(f"\nfaults: {'; '.join(self.faults) or 'none'}")

    def _show_processes(self) -> None:
        print(f"\n{'process':<14}" + "".join(f"{TITLES[figure] + ' (/h)':>34}" for figure in FIGURES))
        for kind, found in sorted(self.trends.items()):
            cells = []
            for figure in FIGURES:
                trend = found[figure]
                slope = "" if trend.slope is None else f" ({trend.slope:+.1f})"
                cells.append(f"{trend.start:.0f} -> {trend.end:.0f}{slope}")
            print(f"{kind:<14}" + "".join(f"{cell:>34}" for cell in cells))

    def events(self) -> list[dict[str, Any]]:
        """For each kind of event: how often, and median and most of the seconds until it was over and to the last
        error that it explains; and the longest time without a right score that touches one."""
        by_kind: dict[str, list[Event]] = defaultdict(list)
        for event in self.ledger.events:
            by_kind[event.kind].append(event)
        rows = []
        for kind, events in sorted(by_kind.items()):
            whole_s = [(event.ended_s or self.ledger.now_s()) - event.began_s for event in events]
            error_s = [self.ledger.last_error_s(event) for event in events]
            rows.append(
                {
                    "event": kind,
                    "number": len(events),
                    "whole_s": (float(np.median(whole_s)), max(whole_s)),
                    "error_s": (float(np.median(error_s)), max(error_s)),
                    "gap_s": self.ledger.longest_gap(events),
                }
            )
        return rows

    def write(self, path: Path) -> None:
        """Everything as JSON, which replaces the file in one step."""
        answer = {
            "machine": machine("cpu"),
            "settings": {
                name: str(value) if isinstance(value, Path) else value for name, value in self.settings.items()
            },
            "faults": self.faults,
            "wrong": self.ledger.wrong,
            "requests": [
                {"kind": kind, "status": status, **found} for (kind, status), found in self.ledger.counts().items()
            ],
            "events": self.events(),
            "gaps": [asdict(gap) for gap in self.ledger.gaps()],
            "processes": {
                kind: {figure: asdict(trend) for figure, trend in found.items()} for kind, found in self.trends.items()
            },
            "happened": [asdict(event) for event in self.ledger.events],
            "unexplained": [asdict(asked) for asked in self.ledger.unexplained()],
            "failed": [asdict(asked) for asked in self.ledger.asked if asked.verdict == "failed"],
            "readings": [asdict(reading) for reading in [*self.readings]],
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(answer, indent=1) + "\n")
        partial.replace(path)

    # --- the picture ----------------------------------------------------------------------------------------------

    def draw(self, path: Path) -> None:
        """Answers, and the processes of the service and beside it, over time; Ray's own are in the tables."""
        figure = Figure(figsize=(13, 13), layout="constrained")
        axes = figure.subplots(1 + len(FIGURES), 1, sharex=True)
        self._draw_answers(axes[0])
        times = sorted({reading.at_s for reading in self.readings})
        for axis, name in zip(axes[1:], FIGURES, strict=True):
            total = {kind: dict.fromkeys(times, 0.0) for kind in (*OURS, *BESIDE)}
            for reading in self.readings:
                if reading.kind in total:
                    total[reading.kind][reading.at_s] += getattr(reading, name)
            for kind, values in total.items():
                style: dict[str, Any] = {} if kind in OURS else {"linewidth": 0.9, "linestyle": "--"}
                axis.plot([t / 60 for t in times], [*values.values()], label=kind, **style)
            axis.set(ylabel=f"{TITLES[name]}, all of a kind", ylim=(0, None))
        axes[1].legend(ncols=5, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02))
        axes[-1].set_xlabel("minutes")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        figure.savefig(path, dpi=110)

    def _draw_answers(self, axis: Any) -> None:
        asked = self.ledger.asked
        end_s = max((one.ended_s for one in asked), default=1.0)
        width_s = max(5.0, end_s / 200)
        edges = np.arange(0, end_s + width_s, width_s)
        for verdict, color in (
            ("right", "#2f5d8a"),
            ("as it must", "#7a9e4c"),
            ("failed", "#d98a2b"),
            ("wrong", "#c0392b"),
        ):
            times = [one.ended_s for one in asked if one.verdict == verdict]
            counts, _ = np.histogram(times, edges)
            label = {"as it must": "refused as it must"}.get(verdict, verdict)
            axis.step(edges[:-1] / 60, counts / width_s, where="post", color=color, label=f"{label} ({len(times)})")
        kinds = sorted({event.kind for event in self.ledger.events if event.kind.startswith("kill")})
        top = axis.get_ylim()[1]
        for row, kind in enumerate(kinds):
            times = [event.began_s / 60 for event in self.ledger.events if event.kind == kind]
            axis.plot(times, [top * (1.05 + 0.07 * row)] * len(times), "|", markersize=7, color=f"C{row}", label=kind)
        axis.set(ylabel="answers a second", title="answers, and when something was killed")
        axis.legend(fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.02))
