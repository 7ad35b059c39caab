"""One part of a cohort: its rows, and the file that is written whole or not at all."""

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

from lsemvae.bundle import Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.scoring.inputs import CohortInput, Read
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
    """What every actor is told. `uri` names one version, not an alias that may move meanwhile."""

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
        """A failure is said in the answer, for Ray would wrap it in pages."""
        try:
            result = {"failure": self._failure} if self._failure else self._finish(row["number"])
        except (LsemvaeError, OSError) as error:
            result = {"failure": " ".join(str(error).split())}
        return {"result": json.dumps(result)}

    def _finish(self, number: int) -> dict[str, Any]:
        job, began, path = self._job, time.time(), part_path(self._job.plan, number)
        content = finished_part(job, path)
        # What could not be read may have been mended since. The rest is not read again.
        made = content is None or job.source.any_mended(number, unreadable_in(content))
        if made:
            content = self._part(number)
            job.output.write_bytes(path, content)
        table = pq.read_table(pa.BufferReader(content))
        refused = Counter(code for code in table["refused"].to_pylist() if code)
        return {
            "number": number,
            "sha256": hashlib.sha256(content).hexdigest(),
            "records": table.num_rows,
            "scored": table.num_rows - refused.total(),
            "refused": dict(sorted(refused.items())),
            "unreadable": len(unreadable_in(content)),
            "made": table.num_rows if made else 0,
            "began": began,
            "ended": time.time(),
        }

    def _part(self, number: int) -> bytes:
        rows, unreadable = [], []
        for chunk in self._job.source.chunks(number, self._scorer.bundle.leads):
            readable = [read for read in chunk if read.signal_mv_LT is not None]
            answers = self._scorer.score_signals([r.signal_mv_LT for r in readable], [r.rate_hz for r in readable])
            of_readable = iter(answers)
            for read in chunk:
                if read.signal_mv_LT is None:
                    unreadable.append(len(rows))
                    rows.append(self._row(read) | {"refused": read.unreadable, "reason": read.reason})
                    continue
                answer = next(of_readable)
                rows.append(
                    self._row(read)
                    | {
                        "score": answer.score,
                        "probability": answer.probability,
                        "decision": answer.decision,
                        "leads_used": ",".join(answer.leads_used),
                        "refused": answer.refused.code if answer.refused else None,
                        "reason": str(answer.refused) if answer.refused else None,
                    }
                )
        metadata = {"plan": self._job.plan, "unreadable": unreadable}
        table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({"lsemvae": json.dumps(metadata)}))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    def _row(self, read: Read) -> dict[str, Any]:
        named = {"subject_id": read.subject_id, "record_id": read.record_id, "flags": ",".join(read.flags)}
        return named | self._job.model


def part_path(plan: str, number: int) -> str:
    return f"parts/{number:06d}-{plan}.parquet"


def finished_part(job: Job, path: str) -> bytes | None:
    """The part's bytes, if it was written before and is whole."""
    try:
        content = job.output.read_bytes(path)
        pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        return content if _metadata(content)["plan"] == job.plan else None
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError):
        return None


def unreadable_in(content: bytes) -> list[int]:
    """Which rows of a part are recordings that could not be read."""
    return _metadata(content)["unreadable"]


def _metadata(content: bytes) -> dict[str, Any]:
    return json.loads((pq.read_schema(pa.BufferReader(content)).metadata or {})[b"lsemvae"])
