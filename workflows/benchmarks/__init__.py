"""What `workflows/bench.py` measures: one module a subject, and `measure`, which all of them use."""
