"""Tests of whether explanations are true: model randomisation, deletion and insertion."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Checks:
    """What the checks found, as tables. Intervals are 95 %, over recordings.

    randomisation  layers, correlation, low, high: rank correlation of attributions with those of the model in which
                   these layers and all nearer to the score have random weights (Adebayo et al. 2018)
    curves         kind (deletion, insertion), order (attribution, occlusion, random), share, logit, low, high: the mean
                   logit, as a share of the way from the whole recording to the baseline, when so large a share of the
                   recording is taken away, or is there
    areas          kind, order, area, low, high, against_random, against_low, against_high: the area under each curve
                   and its paired difference from the random order
    truth          what, correlation, low, high, records: on a simulated cohort, rank correlation of the attributions of
                   leads and waves with those that the label depends on; None elsewhere
    """

    randomisation: pd.DataFrame
    curves: pd.DataFrame
    areas: pd.DataFrame
    records: int
    truth: pd.DataFrame | None = None
