"""One part of a cohort: the rows of its scores, in a file that is written whole or not at all."""

import hashlib
import io
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.bundle import Score, Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.scoring.inputs import CohortInput, Read
from lsemvae.scoring.reliability import reliability
from lsemvae.storage import Storage
from lsemvae.tracking import fetch

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
        ("model", pa.string()),
        ("version", pa.int64()),
        ("digest", pa.string()),
        ("preprocess_digest", pa.string()),
    ]
)


@dataclass(frozen=True)
class Job:
    """What every actor needs to know. `uri` names one version, not an alias, because an alias can move meanwhile."""

    plan: str
    uri: str
    model: dict[str, Any]
    """The columns that name the model: model, version, digest, preprocess_digest."""
    source: CohortInput
    output: Storage
    use_gpu: bool


class PartScorer:
    """A Ray Data actor: scores one part at a time and writes its file, whole or not at all."""

    def __init__(self, job: Job) -> None:
        self._job, self._failure = job, ""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._scorer = Scorer(fetch(job.uri, Path(folder)).folder, "cuda" if job.use_gpu else "cpu")
        except (LsemvaeError, OSError) as error:
            self._failure = str(error)
        else:
            if self._scorer.bundle.digest != job.model["digest"]:
                self._failure = f"{job.uri} changed while the job was starting: give the command again"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A failure is returned as text, because Ray would wrap an exception in pages of traceback."""
        try:
            result = {"failure": self._failure} if self._failure else self._finish(row["number"])
        except (LsemvaeError, OSError) as error:
            result = {"failure": " ".join(str(error).split())}
        return {"result": json.dumps(result)}

    def _finish(self, number: int) -> dict[str, Any]:
        job, began, path = self._job, time.time(), part_path(self._job.plan, number)
        content = finished_part(job, path)
        # Unreadable recordings may have been mended since. The others are not read again.
        made = content is None or job.source.any_mended(number, unreadable_in(content))
        if content is None or made:
            content = self._part(number)
            job.output.write_bytes(path, content)
        table = pq.read_table(pa.BufferReader(content))
        codes, unreadable = table["refused"].to_pylist(), unreadable_in(content)
        refused = Counter(code for code in codes if code)
        return {
            "number": number,
            "sha256": hashlib.sha256(content).hexdigest(),
            "records": table.num_rows,
            "scored": table.num_rows - refused.total(),
            "refused": dict(sorted(refused.items())),
            "unreadable": len(unreadable),
            "unreadable_codes": dict(sorted(Counter(codes[row] for row in unreadable).items())),
            "made": table.num_rows if made else 0,
            "began": began,
            "ended": time.time(),
        }

    def _part(self, number: int) -> bytes:
        rows: list[dict[str, Any]] = []
        unreadable: list[int] = []
        for chunk in self._job.source.chunks(number, self._scorer.bundle.leads):
            readable = [(read.signal_mv_LT, read.rate_hz) for read in chunk if read.signal_mv_LT is not None]
            answers = iter(self._scorer.score_signals([mv_LT for mv_LT, _ in readable], [hz for _, hz in readable]))
            for read in chunk:
                if read.signal_mv_LT is None:
                    unreadable.append(len(rows))
                    rows.append(self._row(read) | _without_score(read.unreadable, read.reason))
                else:
                    rows.append(self._row(read) | self._answer(read, next(answers)))
        metadata = {"plan": self._job.plan, "unreadable": unreadable}
        table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({"lsemvae": json.dumps(metadata)}))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    def _answer(self, read: Read, answer: Score) -> dict[str, Any]:
        if answer.refused:
            used = {"leads_used": ",".join(answer.leads_used)}
            return used | _without_score(answer.refused.code, str(answer.refused))
        leads = self._scorer.bundle.leads
        doubtful = self._scorer.why_doubtful(answer)
        doubts = reliability(read.present, read.derived, answer.leads_used, read.flags, leads, doubtful)
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

    def _row(self, read: Read) -> dict[str, Any]:
        named = {"subject_id": read.subject_id, "record_id": read.record_id, "flags": ",".join(read.flags)}
        return named | self._job.model


def _without_score(code: str | None, reason: str | None) -> dict[str, Any]:
    return {"refused": code, "reason": reason, "reliability": "limited", "reliability_reasons": reason}


def part_path(plan: str, number: int) -> str:
    return f"parts/{number:06d}-{plan}.parquet"


def finished_part(job: Job, path: str) -> bytes | None:
    """The bytes of a part that was written before and is whole; otherwise None."""
    try:
        content = job.output.read_bytes(path)
        pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        return content if _metadata(content)["plan"] == job.plan else None
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError):
        return None


def unreadable_in(content: bytes) -> list[int]:
    """The rows of a part whose recordings are unreadable."""
    return _metadata(content)["unreadable"]


def _metadata(content: bytes) -> dict[str, Any]:
    return json.loads((pq.read_schema(pa.BufferReader(content)).metadata or {})[b"lsemvae"])
