"""Cohorts: which recordings a source has, whose they are, and what is known about them. One file a source."""

from lsemvae.cohorts.selection import COHORTS, Cohort, Selection, describe_left_out, detect, select
from lsemvae.cohorts.tables import read_labels

__all__ = ["COHORTS", "Cohort", "Selection", "describe_left_out", "detect", "read_labels", "select"]
