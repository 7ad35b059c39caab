"""What is answered for one recording. The process that explains imports this, too: nothing here needs Ray."""

from collections.abc import Iterable

from lsemvae.bundle import Score, Scorer
from lsemvae.errors import LsemvaeError, Refused, UnreadableRecording
from lsemvae.record import Record
from lsemvae.scoring.reliability import reliability
from serve.schema import ModelOut, RefusedOut, Reliability, ScoreOut


def answered(
    id: str, record: Record, described: ModelOut, scorer: Scorer, answer: Score, flags: Iterable[str]
) -> ScoreOut:
    """The answer for a recording that this model scored or refused."""
    flags = (*record.flags, *flags)
    out = ScoreOut(id=id, flags=list(flags), model=described)
    if answer.refused:
        out.refused = RefusedOut(code=answer.refused.code, reason=str(answer.refused))
        out.reliability = Reliability(level="limited", reasons=[out.refused.reason])
        return out
    out.score, out.decision, out.probability = answer.score, answer.decision, answer.probability
    out.leads_used = list(answer.leads_used)
    out.leads_derived = [lead for lead in answer.leads_used if lead in record.derived]
    doubts = reliability(
        record.leads, record.derived, answer.leads_used, flags, scorer.bundle.leads, scorer.why_doubtful(answer)
    )
    out.reliability = Reliability(level=doubts.level, reasons=list(doubts.reasons))
    return out


def refused(id: str, error: LsemvaeError, flags: Iterable[str] = ()) -> ScoreOut:
    """The answer for a recording that reached no model."""
    code = error.code if isinstance(error, Refused | UnreadableRecording) else "record"
    return ScoreOut(
        id=id,
        flags=list(flags),
        refused=RefusedOut(code=code, reason=str(error)),
        reliability=Reliability(level="limited", reasons=[str(error)]),
    )
