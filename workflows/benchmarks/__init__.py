"""The cases of `workflows/bench.py`, one module a subject; `measure` holds what they share."""
