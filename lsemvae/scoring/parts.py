"""One part of a cohort: its rows, in a file that is written whole or not at all."""

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.bundle import Bundle
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.scoring.inputs import CohortInput, Read
from lsemvae.storage import Storage
from lsemvae.tracking import fetched

MODEL_FIELDS = [
    pa.field("model", pa.string()),
    pa.field("version", pa.int64()),
    pa.field("digest", pa.string()),
    pa.field("preprocess_digest", pa.string()),
]
"""The columns that name the model, in every row."""


class Rows(Protocol):
    """Makes the rows of recordings with the model of one bundle."""

    @property
    def bundle(self) -> Bundle: ...

    def __call__(self, reads: Sequence[Read]) -> list[dict[str, Any]]:
        """One row for each recording, in order; an unreadable one has a row too. It need not name model or subject."""
        ...


@dataclass(frozen=True)
class Product:
    """What a command makes of a cohort. It is sent to other processes.

    `name` begins the names of the output's files, `rows(folder, device)` loads the bundle in `folder`. Each schema has
    subject_id, record_id, score, decision, refused, and the columns that name the model.
    """

    name: str
    schema: pa.Schema
    rows: Callable[[Path, str], Rows]


@dataclass(frozen=True)
class Job:
    """What every actor needs to know. `uri` names one version, not an alias, because an alias can move meanwhile."""

    plan: str
    uri: str
    model: dict[str, Any]
    """The values of `MODEL_FIELDS`."""
    source: CohortInput
    output: Storage
    use_gpu: bool
    product: Product


class Failure(NamedTuple):
    """Why a worker could not go on, as text: Ray would wrap an exception in pages of traceback.

    `passing` says whether the same command may succeed when it is given again.
    """

    failure: str
    passing: bool

    @classmethod
    def of(cls, error: LsemvaeError | OSError) -> Self:
        passing = (
            error.passing if isinstance(error, StorageError) else isinstance(error, ConnectionError | TimeoutError)
        )
        return cls(" ".join(str(error).split()), passing)

    def error(self) -> LsemvaeError:
        """What the command ends with."""
        if self.passing:
            return StorageError(f"{self.failure}; finished parts are kept: give the same command again to continue")
        return LsemvaeError(f"{self.failure}; finished parts are kept, but the same command fails until this is mended")


class PartMaker:
    """A Ray Data actor: makes the rows of one part at a time and writes its file, whole or not at all."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failure: Failure | None = None
        try:
            with fetched(job.uri) as found:
                self._rows = job.product.rows(found.folder, "cuda" if job.use_gpu else "cpu")
        except (LsemvaeError, OSError) as error:
            self._failure = Failure.of(error)
        else:
            if self._rows.bundle.digest != job.model["digest"]:
                self._failure = Failure(f"{job.uri} changed while the job was starting", passing=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is known of the part, or a `Failure`, as JSON."""
        try:
            result = self._failure._asdict() if self._failure else self._finish(row["number"])
        except (LsemvaeError, OSError) as error:
            result = Failure.of(error)._asdict()
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
        job = self._job
        rows: list[dict[str, Any]] = []
        unreadable: list[int] = []
        for chunk in job.source.chunks(number, self._rows.bundle.leads):
            unreadable += [len(rows) + row for row, read in enumerate(chunk) if read.signal_mv_LT is None]
            made = zip(chunk, self._rows(chunk), strict=True)
            rows += [{"subject_id": r.subject_id, "record_id": r.record_id} | job.model | row for r, row in made]
        metadata = {"plan": job.plan, "unreadable": unreadable}
        schema = job.product.schema.with_metadata({"lsemvae": json.dumps(metadata)})
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()


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
