"""Drift: how far the scores that a model gives are from the scores of its training cohort.

The distribution of the training cohort's out-of-fold scores travels in the bundle (`provenance`), as the shares of a
few bins. The population stability index compares the scores given since with it. infra/prometheus/alerts.yaml computes
the same index from the endpoint's counters; a test compares the two.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lsemvae.errors import LsemvaeError

SCORE_BINS = "score_bins"
"""The name in a bundle's `provenance`. Bundles of earlier releases lack it."""
MOST_BINS = 10
RECORDINGS_IN_A_BIN = 30
"""With fewer, the index is large by chance: without drift it is about (bins - 1) * (1 / trained + 1 / scored)."""
LEAST_SCORES = 200
"""With fewer scores the index is not judged."""
DRIFT = 0.25
"""From this index on, the scores have another distribution. This limit is a convention; 0.1 is called a small shift."""


@dataclass(frozen=True)
class ScoreBins:
    """The scores of a training cohort in bins of about equally many.

    edges       ascending; a score on an edge belongs to the bin above it
    shares      of the cohort's recordings, one more than edges, each above 0; they add up to 1
    recordings  of the cohort
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    recordings: int

    def __post_init__(self) -> None:
        good = (
            len(self.shares) == len(self.edges) + 1 >= 2
            and all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False))
            and all(share > 0 for share in self.shares)
            and math.isclose(sum(self.shares), 1, abs_tol=1e-6)
        )
        if not good:
            raise LsemvaeError(
                f"{SCORE_BINS} has edges {self.edges} and shares {self.shares}: give ascending edges, and one share "
                "more, each above 0, with the sum 1"
            )

    @classmethod
    def of(cls, score_B: np.ndarray) -> "ScoreBins | None":
        """The bins of these scores; None where they are too few, or too equal, for two bins."""
        bins = min(MOST_BINS, len(score_B) // RECORDINGS_IN_A_BIN)
        if bins < 2:
            return None
        # "higher" makes each edge a score, so that no bin is empty.
        edges = np.unique(np.quantile(score_B, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
        edges = edges[edges > score_B.min()]
        if not len(edges):
            return None
        counts = np.bincount(np.searchsorted(edges, score_B, side="right"), minlength=len(edges) + 1)
        return cls(tuple(edges.tolist()), tuple((counts / len(score_B)).tolist()), len(score_B))

    @classmethod
    def read(cls, provenance: Mapping[str, Any]) -> "ScoreBins | None":
        """Those of a bundle's provenance; None where it has none. Raises LsemvaeError on values that are no bins."""
        found = provenance.get(SCORE_BINS)
        if found is None:
            return None
        try:
            return cls(tuple(map(float, found["edges"])), tuple(map(float, found["shares"])), int(found["recordings"]))
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, LsemvaeError):
                raise
            raise LsemvaeError(f"{SCORE_BINS} cannot be read: {error!r}") from None

    def as_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return asdict(self) | {"edges": list(self.edges), "shares": list(self.shares)}

    def counts(self, score_B: np.ndarray) -> list[int]:
        """How many of these scores are in each bin."""
        return np.bincount(self.bin_of(score_B), minlength=len(self.shares)).tolist()

    def bin_of(self, score_B: np.ndarray | float) -> np.ndarray:
        """The number of each score's bin, from 0."""
        return np.searchsorted(self.edges, score_B, side="right")


def stability_index(counts: Sequence[float], shares: Sequence[float]) -> float:
    """The population stability index of counts by bin against the shares of a training cohort: 0 when equal.

    The sum over the bins of (q - p) ln(q / p), with the expected share p and the found share q. Half a score is added
    to each bin, so that an empty one does not make it infinite.

    Worked example: expected shares (0.5, 0.5), counts (30, 10): q = (30.5, 10.5) / 41 = (0.744, 0.256), so the index is
    0.244 ln 1.488 - 0.244 ln 0.512 = 0.097 + 0.163 = 0.26.
    """
    found = np.asarray(counts, dtype=float) + 0.5
    found /= found.sum()
    expected = np.asarray(shares, dtype=float)
    return float(((found - expected) * np.log(found / expected)).sum())


def drift_of(score_B: np.ndarray, bins: ScoreBins | None) -> dict[str, Any] | None:
    """The counts and the index of these scores; None without bins. `judged` is False where they are too few."""
    if bins is None:
        return None
    counts = bins.counts(score_B)
    index = stability_index(counts, bins.shares) if len(score_B) else None
    return {"index": index, "counts": counts, "judged": len(score_B) >= LEAST_SCORES, "expected": list(bins.shares)}
