"""Explanations of many recordings as one table: means over subjects with bootstrap intervals, by label and subgroup."""

from collections.abc import Sequence

import pandas as pd

COLUMNS = ("group", "lead", "wave", "signed", "signed_low", "signed_high", "absolute", "absolute_low", "absolute_high")
"""Of `summary`; `records` and `subjects` follow. `lead` and `wave` are "all" for sums over leads and over waves."""


def summary(table: pd.DataFrame, leads: Sequence[str], *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean shares of each group, lead and wave, with 95 % intervals over subjects.

    table  a row for each explained recording: subject_id, and `signed.LEAD.WAVE` and `absolute.LEAD.WAVE`; optionally
           label (0, 1 or missing), female (0, 1 or missing) and age_years, which make groups beside "all"
    """
    raise NotImplementedError
