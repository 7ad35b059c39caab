"""A made-up run of explanations: real explanations of a tiny model, and tables of which the numbers are chosen."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lsemvae.explain.checks import Checks
from lsemvae.explain.explainer import Explanation
from lsemvae.explain.waves import WAVES


def records(of: Sequence[tuple[str, Explanation]]) -> pd.DataFrame:
    """The table of workflows/explain.py, of the columns that the report reads."""
    rows = []
    for record_id, explanation in of:
        refused = explanation.score.refused
        row = {"record_id": record_id, "subject_id": f"patient-{record_id}", "refused": refused and refused.code}
        if not refused:
            (window,) = explanation.windows
            row |= {
                "score": explanation.score.score,
                "decision": explanation.score.decision,
                "logit": window.logit,
                "baseline_logit": window.baseline_logit,
                "delta": window.delta,
                "steps": window.steps,
                "beats": window.waves.beats,
                "notes": " ".join(explanation.notes) or None,
            } | {f"failures.{wave}": window.waves.failures.get(wave, 0) for wave in ("P", "QRS", "T")}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(leads: Sequence[str], groups: Sequence[str]) -> pd.DataFrame:
    """Every share is its own number: group g, lead l and wave w have (g + 1) * (l + 1) * (w + 1) / 1000."""
    rows = []
    for g, group in enumerate(groups):
        cells_LW = (g + 1) * np.outer(np.arange(1, len(leads) + 1), np.arange(1, len(WAVES) + 1)) / 1000
        whole_LW = np.vstack([cells_LW, cells_LW.sum(axis=0)])
        whole_LW = np.hstack([whole_LW, whole_LW.sum(axis=1, keepdims=True)])
        for (lead, wave), value in np.ndenumerate(whole_LW):
            spread = {"signed": -value, "signed_low": -value - 0.001, "signed_high": -value + 0.001}
            spread |= {"absolute": value, "absolute_low": value - 0.001, "absolute_high": value + 0.001}
            place = {"group": group, "lead": [*leads, "all"][lead], "wave": [*WAVES, "all"][wave]}
            rows.append(place | spread | {"records": 10 + g, "subjects": 5 + g})
    return pd.DataFrame(rows)


def checks(
    correlation: tuple[float, float, float] = (0.1, 0.0, 0.2),
    deletion: tuple[float, float, float] = (-0.2, -0.3, -0.1),
    insertion: tuple[float, float, float] = (0.2, 0.1, 0.3),
    truth: dict[str, tuple[float, float, float]] | None = None,
    evidence: tuple[float, float, float] | None = None,
) -> Checks:
    """Good ones by default: each is a value with its interval, of deletion and insertion the area less random's."""
    random = pd.DataFrame(
        [("head", 0.9, 0.8, 1.0, 0.9, 0.8, 1.0), ("all", *correlation, 0.9, 0.8, 0.95)],
        columns=["layers", "correlation", "low", "high", "absolute", "absolute_low", "absolute_high"],
    )
    curves, areas = [], []
    for kind, against in (("deletion", deletion), ("insertion", insertion)):
        for order in ("attribution", "occlusion", "random"):
            for share in (0.0, 0.5, 1.0):
                logit = 1 - share if kind == "deletion" else share
                curves.append((kind, order, share, logit, logit - 0.1, logit + 0.1))
            nothing = (np.nan,) * 3
            areas.append(
                (kind, order, 0.5, 0.4, 0.6, *(nothing if order == "random" else against), *(0.01, -0.02, 0.03))
            )
    against_both = [
        "against_random",
        "against_low",
        "against_high",
        "against_occlusion",
        "occlusion_low",
        "occlusion_high",
    ]
    found = None
    if truth is not None:
        found = pd.DataFrame(
            [(what, *spread, 50) for what, spread in truth.items()],
            columns=["what", "correlation", "low", "high", "records"],
        )
    return Checks(
        random,
        pd.DataFrame(curves, columns=["kind", "order", "share", "logit", "low", "high"]),
        pd.DataFrame(areas, columns=["kind", "order", "area", "low", "high", *against_both]),
        32,
        found,
        None if evidence is None else pd.DataFrame([("all", *evidence)], columns=["wave", "evidence", "low", "high"]),
    )
