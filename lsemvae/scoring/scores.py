"""The rows of a cohort's scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lsemvae.bundle import Bundle, Score, Scorer
from lsemvae.scoring.inputs import Read, signals_of
from lsemvae.scoring.parts import MODEL_FIELDS, Product
from lsemvae.scoring.reliability import reliability

SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("record_id", pa.string()),
        ("score", pa.float64()),
        ("probability", pa.float64()),
        ("decision", pa.bool_()),
        ("flags", pa.string()),
        ("leads_used", pa.string()),
        ("leads_derived", pa.string()),
        ("leads_missing", pa.string()),
        ("reliability", pa.string()),
        ("reliability_reasons", pa.string()),
        ("refused", pa.string()),
        ("reason", pa.string()),
        *MODEL_FIELDS,
    ]
)


class ScoreRows:
    """Scores recordings: rows of `SCHEMA`."""

    def __init__(self, folder: Path, device: str) -> None:
        self._scorer = Scorer(folder, device)

    @property
    def bundle(self) -> Bundle:
        return self._scorer.bundle

    def __call__(self, reads: Sequence[Read]) -> list[dict[str, Any]]:
        answers = iter(self._scorer.score_signals(*signals_of(reads)))
        return [
            {"flags": ",".join(read.flags)}
            | (
                _without_score(read.unreadable, read.reason)
                if read.signal_mv_LT is None
                else self._answer(read, next(answers))
            )
            for read in reads
        ]

    def _answer(self, read: Read, answer: Score) -> dict[str, Any]:
        if answer.refused:
            used = {"leads_used": ",".join(answer.leads_used)}
            return used | _without_score(answer.refused.code, str(answer.refused))
        doubtful = self._scorer.why_doubtful(answer)
        doubts = reliability(read.present, read.derived, answer.leads_used, read.flags, self.bundle.leads, doubtful)
        return {
            "score": answer.score,
            "probability": answer.probability,
            "decision": answer.decision,
            "leads_used": ",".join(answer.leads_used),
            "leads_derived": ",".join(doubts.derived),
            "leads_missing": ",".join(doubts.missing),
            "reliability": doubts.level,
            "reliability_reasons": " ".join(doubts.reasons),
        }


def _without_score(code: str | None, reason: str | None) -> dict[str, Any]:
    return {"refused": code, "reason": reason, "reliability": "limited", "reliability_reasons": reason}


SCORES = Product("scores", SCHEMA, ScoreRows)
