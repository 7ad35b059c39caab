"""Scoring a cohort: its recordings, the parts that are scored, the progress, the output, and reliability."""
