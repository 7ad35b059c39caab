"""Synthetic out-of-fold scores of several methods, with everything that tables and reports have to show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lsemvae.evaluation.compare import Scores

METHODS = {
    "LS-EMVAE": 1.4, "ST-MEM": 1.3, "xResNet1d": 1.2, "MoPoE-VAE": 1.2, "beta-VAE": 1.0, "untrained encoder": 1.1,
    "classical features": 1.3, "naive": 0.0,
}  # fmt: skip
"""Method -> by how many standard deviations its scores tell the classes apart."""
FACTS: dict[str, Any] = {
    "task": "ph", "cohort": "simulated", "data": "s3://bucket/ph (0123456789abcdef)", "refused": 3,
    "leads": {"6L": "I, II, III, aVR, aVL, aVF", "12L": "6L and V1 to V6"}, "folds": "5 folds by subject, seed 0",
    "seeds": 2, "policy": "circular shifts, cosine schedule, 20 epochs", "size": "cpu", "recipe": "cpu",
    "preprocess digest": "fedcba9876543210", "release": "0.1.0",
}  # fmt: skip


def people(count: int, seed: int = 0, prefix: str = "r") -> pd.DataFrame:
    """A fifth of the recordings is of a subject's second visit; some have no sex or age."""
    rng = np.random.default_rng(seed)
    subject_B = np.arange(count) - (np.arange(count) % 5 == 4)
    fold_B = subject_B * 7 % 5
    female_B = np.where(rng.random(count) < 0.03, np.nan, rng.random(count) < 0.55)
    age_B = np.where(rng.random(count) < 0.03, np.nan, rng.normal(65, 12, count).round())
    return pd.DataFrame(
        {
            "record_id": [f"{prefix}{number}" for number in range(count)],
            "subject_id": [f"{prefix}s{number}" for number in subject_B],
            "label": (rng.random(count) < 0.3).astype(int),
            "fold": fold_B,
            "female": female_B,
            "age_years": age_B,
        }
    )


def lines(
    of: pd.DataFrame, methods: Mapping[str, float], analysis: str = "main", setting: str = "", leads: str = "12L",
    seeds: Sequence[int] = (0, 1), seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """The methods share a part of their noise, as scores of the same recordings do."""
    rng = np.random.default_rng(seed)
    shared_B = rng.normal(size=len(of))
    parts = []
    for method, distance in methods.items():
        for training in seeds:
            noise_B = 0.8 * shared_B + 0.6 * rng.normal(size=len(of))
            logit_B = distance * (of.label - 0.5) + noise_B - 0.8
            score_B = 1 / (1 + np.exp(-logit_B)) if distance else np.full(len(of), of.label.mean())
            parts.append(
                pd.DataFrame(
                    {
                        "analysis": analysis, "setting": setting, "leads": leads, "method": method, "seed": training,
                        "record_id": of.record_id, "fold": of.fold, "score": score_B, "decision": score_B >= 0.4,
                    }
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def scores(count: int = 150, **facts: Any) -> Scores:
    """A main table on 6 and 12 leads, three other analyses, and a method that failed."""
    of = people(count)
    weaker = {method: 0.85 * distance for method, distance in METHODS.items()}
    parts = [lines(of, METHODS), lines(of, weaker, leads="6L", seed=1)]
    for number, (share, factor) in enumerate({"100 %": 1.0, "50 %": 0.85, "25 %": 0.7, "10 %": 0.4}.items()):
        some = {name: METHODS[name] * factor for name in ("LS-EMVAE", "xResNet1d", "untrained encoder")}
        parts.append(lines(of, some, "fewer labels", share, seeds=[0], seed=number))
    for number, noise in enumerate(("20 dB", "10 dB", "5 dB")):
        some = {name: METHODS[name] * (1 - 0.2 * number) for name in ("LS-EMVAE", "ST-MEM")}
        parts.append(lines(of, some, "noise", noise, seeds=[0], seed=number + 10))
    for number, leads in enumerate(("I", "II", "aVR")):
        parts.append(lines(of, {"LS-EMVAE": 0.7}, "lead sets", "", leads, [0], seed=number + 20))
    failed = pd.DataFrame(
        [("main", "", "12L", "MVAE", 0, 3, "CUDA out of memory <at> fold 3")],
        columns=["analysis", "setting", "leads", "method", "seed", "fold", "reason"],
    )
    return Scores({**FACTS, "records": count, **facts}, of, pd.concat(parts, ignore_index=True), failed)
