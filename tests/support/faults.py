"""The proxy that injects faults: it is the one of `workflows/bench.py soak`."""

from benchmarks.faults import Between, Fault

__all__ = ["Between", "Fault"]
