"""Score a whole data set with a registered model: Parquet in, Parquet out, each recording exactly once.

One part is written for each shard, whole or not at all; the same command again makes only what is missing, and
does nothing when all is there. Scores of another model are never put beside them.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from command import run_command, start_ray
from tqdm import tqdm

from lsemvae.bundle import Scorer, describe
from lsemvae.errors import LsemvaeError
from lsemvae.shards import ROWS_PER_GROUP, ShardedDataset, signals_mv
from lsemvae.storage import Storage
from lsemvae.tracking import fetch

SUMMARY = "scores.json"
_COLUMNS = ["record_id", "subject_id", "flags", "signal", "samples", "rate_hz", "uv_per_lsb", "offset"]

SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("subject_id", pa.string()),
        ("score", pa.float64()),
        ("decision", pa.bool_()),
        ("leads_used", pa.string()),
        ("flags", pa.string()),
        ("refused", pa.string()),
        ("reason", pa.string()),
        ("model", pa.string()),
        ("digest", pa.string()),
    ]
)


@dataclass(frozen=True)
class Args:
    model: str
    """models:/NAME@champion, models:/NAME/VERSION, a bundle's folder or s3:// URI."""
    data: str
    """Shards: the --output of workflows/ingest.py."""
    output: str
    """Where the scores go (folder or s3:// URI)."""
    actors: int = 1
    """Processes that hold the model."""
    use_gpu: bool = False
    """One GPU for each of them."""


@dataclass(frozen=True)
class Job:
    """What every actor is told. `model` names one version, not an alias that may move meanwhile."""

    model: str
    digest: str
    data: ShardedDataset
    output: Storage
    use_gpu: bool


class ShardScorer:
    """A Ray Data actor: scores one shard at a time and writes its part."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._scorer = Scorer(fetch(job.model).folder, "cuda" if job.use_gpu else "cpu")
        if self._scorer.bundle.digest != job.digest:
            raise LsemvaeError(f"{job.model} changed while the job was starting: run the command again")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job, name = self._job, part_name(row["item"])
        try:
            content = job.output.read_bytes(name)
        except FileNotFoundError:
            content = self._part(row["item"])
            job.output.write_bytes(name, content)
        part = pq.read_table(io.BytesIO(content), columns=["score", "decision", "refused"])
        return {"result": json.dumps(_part_summary(part))}

    def _part(self, shard: str) -> bytes:
        job, rows = self._job, []
        with job.data.storage.filesystem.open_input_file(job.data.storage.path(shard)) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(ROWS_PER_GROUP, columns=_COLUMNS):
                columns = {name: batch.column(name).to_pylist() for name in _COLUMNS}
                signals = signals_mv(columns, self._scorer.bundle.leads)
                answers = self._scorer.score_signals(signals, columns["rate_hz"])
                for row, answer in enumerate(answers):
                    rows.append(
                        {
                            "record_id": columns["record_id"][row],
                            "subject_id": columns["subject_id"][row],
                            "score": answer.score,
                            "decision": answer.decision,
                            "leads_used": ",".join(answer.leads_used),
                            "flags": ",".join(columns["flags"][row]),
                            "refused": answer.refused.code if answer.refused else None,
                            "reason": str(answer.refused) if answer.refused else None,
                            "model": job.model,
                            "digest": job.digest,
                        }
                    )
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()


def main(args: Args) -> None:
    data, output = ShardedDataset.open(args.data), Storage.open(args.output)
    rows = data.require_rows("all")
    fetched = fetch(args.model)
    bundle = describe(fetched.folder)
    if bundle.task is None:
        raise LsemvaeError(f"{args.model} is a pre-trained encoder, it has no task: fine-tune it first")
    model = f"models:/{fetched.name}/{fetched.version}" if fetched.name else str(args.model)
    job = {
        "model": model,
        "digest": bundle.digest,
        "data_digest": data.manifest.digest,
        "data": data.storage.uri,
    }
    if output.exists("job.json"):
        before = json.loads(output.read_bytes("job.json"))
        if (before["digest"], before["data_digest"]) != (job["digest"], job["data_digest"]):
            raise LsemvaeError(
                f"{output.uri} holds scores of {before['model']} (digest {before['digest']}) on {before['data']}: "
                "choose another --output"
            )
    output.write_bytes("job.json", json.dumps(job, indent=2).encode())
    if output.exists(SUMMARY):
        print(f"{output.uri} is complete: nothing to do.")
        show(json.loads(output.read_bytes(SUMMARY)), output)
        return

    start_ray()
    import ray.data

    shards = data.manifest.of_split("all")
    print(f"{rows} recordings in {len(shards)} shards with {model} (digest {bundle.digest})")
    dataset = ray.data.from_items([shard.path for shard in shards], override_num_blocks=len(shards)).map(
        ShardScorer,
        fn_constructor_args=(Job(model, bundle.digest, data, output, args.use_gpu),),
        compute=ray.data.ActorPoolStrategy(size=min(args.actors, len(shards))),
        num_gpus=1 if args.use_gpu else None,
    )
    parts = []
    with tqdm(total=rows, desc="score", unit="records") as bar:
        for row in dataset.iter_rows():
            parts.append(json.loads(row["result"]))
            bar.update(parts[-1]["records"])
    summary = job | combine(parts)
    assert summary["records"] == rows
    output.write_bytes(SUMMARY, json.dumps(summary, indent=2).encode())
    show(summary, output)


def part_name(shard: str) -> str:
    return f"scores-{shard}"


def _part_summary(part: pa.Table) -> dict[str, Any]:
    scores = np.array([score for score in part["score"].to_pylist() if score is not None])
    return {
        "records": part.num_rows,
        "scored": len(scores),
        "positive": sum(bool(decision) for decision in part["decision"].to_pylist()),
        "refused": dict(Counter(code for code in part["refused"].to_pylist() if code)),
        "histogram": np.histogram(scores, bins=10, range=(0, 1))[0].tolist(),
    }


def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts' counts added up."""
    refused: Counter[str] = Counter()
    for part in parts:
        refused.update(part["refused"])
    return {name: sum(part[name] for part in parts) for name in ("records", "scored", "positive")} | {
        "refused": dict(refused),
        "histogram": np.sum([part["histogram"] for part in parts], axis=0).tolist(),
    }


def show(summary: dict[str, Any], output: Storage) -> None:
    refused = ", ".join(f"{code} {count}" for code, count in sorted(summary["refused"].items())) or "none"
    print(f"{summary['scored']} scored, {summary['positive']} at or above the threshold; refused: {refused}")
    tallest = max(summary["histogram"]) or 1
    for tenth, count in enumerate(summary["histogram"]):
        print(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {'█' * round(30 * count / tallest):30s} {count}")
    print(f"scores: {output.uri}")


if __name__ == "__main__":
    run_command(main, Args)
