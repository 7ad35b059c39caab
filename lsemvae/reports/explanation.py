"""The report of a run of explanations, as one page for a cardiologist and a statistician."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lsemvae.explain.checks import Checks
from lsemvae.explain.explainer import Explanation
from lsemvae.plots.attribution import Picture


def record_pictures(explanation: Explanation) -> dict[str, Picture]:
    """The pictures of one recording by name (paper, beat, leads, waves); none for a refused recording."""
    raise NotImplementedError


def explanation_report(
    about: Mapping[str, Any],
    records: pd.DataFrame,
    summary: pd.DataFrame,
    checks: Checks | None,
    shown: Sequence[tuple[str, Explanation]],
    igar: pd.DataFrame | None = None,
) -> str:
    """A run of explanations -> HTML.

    about    facts in the order in which the page shows them, such as model, version, digest, task, leads, threshold,
             baseline, bound, data; a value may be a mapping or a list
    records  a row for each recording that was asked for: record_id, reason (None where it was explained), and where it
             was explained score, decision, logit, delta (convergence), steps, beats
    summary  see `lsemvae.explain.cohort`
    shown    record ids with their explanations, which are drawn
    igar     the published ratio, means over recordings: kind (lead, wave), name, ratio, low, high
    """
    raise NotImplementedError
