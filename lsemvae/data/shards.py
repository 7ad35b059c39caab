"""Shards: Parquet files that hold recordings as they were recorded, and the manifest that names the valid ones.

One row is one recording: the recorder's integers for twelve leads in the fixed order, the step and offset that convert
them to millivolts, which leads were measured or derived, subject, quality flags and labels. A data set is a folder with
`manifest.json` and the shards that it names; a shard that the manifest does not name is not part of the data set.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.cohorts.withdrawn import NOBODY, Withdrawn, read_withdrawn, require_withdrawn
from lsemvae.data.overlay import NO_LABELS, Labels, has_labels, read_labels_beside
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig, lead_positions, preprocess_signals
from lsemvae.quality import FLAGS
from lsemvae.record import Record
from lsemvae.storage import Storage, explained

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
UNREADABLE = "unreadable.csv"
LABEL_PREFIX = "label."
CONCURRENT_READS = 8
ROWS_PER_GROUP = 64  # the smallest unit that a reader can read: about 0.5 MB on disk

_MISSING = -32768  # the sentinel that WFDB uses, and MIMIC-IV-ECG with it
_HALF_RANGE = 32767

SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("subject_id", pa.string()),
        ("path", pa.string()),
        ("rate_hz", pa.float64()),
        ("samples", pa.int32()),
        ("signal", pa.binary()),
        ("uv_per_lsb", pa.list_(pa.float64())),
        ("offset", pa.list_(pa.int32())),
        ("measured", pa.list_(pa.bool_())),
        ("derived", pa.list_(pa.bool_())),
        ("flags", pa.list_(pa.string())),
    ]
)


SIGNAL_COLUMNS = ["signal", "samples", "rate_hz", "uv_per_lsb", "offset"]
"""The columns that `signals_mv` needs, and the rate."""


# --- one recording <-> one row -------------------------------------------------------------------------------


def pack(record: Record, *, path: str = "", flags: Sequence[str] = ()) -> dict[str, Any]:
    """A row of `SCHEMA`. Lossless where the recorder's step is known, else to 1/32767 of each lead's range."""
    signal_mv_LT = record.signal_for(LEADS)
    present = [record.leads.index(lead) if lead in record.leads else None for lead in LEADS]
    raw_LT: np.ndarray = np.full(signal_mv_LT.shape, _MISSING, dtype=np.int16)
    steps_uv, offsets = np.ones(len(LEADS)), np.zeros(len(LEADS), dtype=np.int32)
    for row, index in enumerate(present):
        if index is None:
            continue
        known_step_uv = float(record.uv_per_lsb_L[index]) if record.uv_per_lsb_L is not None else None
        raw_LT[row], steps_uv[row], offsets[row] = _to_integers(signal_mv_LT[row], known_step_uv)
    return {
        "record_id": record.record_id,
        "subject_id": record.subject_id if record.subject_id is not None else record.record_id,
        "path": path,
        "rate_hz": record.rate_hz,
        "samples": raw_LT.shape[1],
        "signal": encode_signal(raw_LT),
        "uv_per_lsb": steps_uv.tolist(),
        "offset": offsets.tolist(),
        "measured": [record.origin(lead) == "measured" for lead in LEADS],
        "derived": [lead in record.derived for lead in LEADS],
        "flags": [*record.flags, *flags],
    }


def _to_integers(signal_mv_T: np.ndarray, step_uv: float | None) -> tuple[np.ndarray, float, int]:
    """int16 with `_MISSING` for NaN, the step in microvolts, and the offset added to the integers."""
    missing_T = ~np.isfinite(signal_mv_T)
    signal_uv_T = np.where(missing_T, 0.0, signal_mv_T.astype(np.float64) * 1000)
    if step_uv is None:
        step_uv = max(float(np.abs(signal_uv_T).max()) / _HALF_RANGE, 1e-6)
    counts_T = np.rint(signal_uv_T / step_uv)
    seen_T = counts_T[~missing_T]
    low, high = (seen_T.min(), seen_T.max()) if seen_T.size else (0.0, 0.0)
    offset = 0.0
    if max(-low, high) > _HALF_RANGE:  # a baseline far from zero
        offset = np.floor((low + high) / 2)
    while high - low > 2 * _HALF_RANGE:  # more than 16 bits: coarser steps
        step_uv, counts_T = step_uv * 2, np.rint(signal_uv_T / (step_uv * 2))
        low, high = low / 2, high / 2
        offset = np.floor((low + high) / 2)
    raw_T = np.where(missing_T, _MISSING, np.clip(counts_T - offset, -_HALF_RANGE, _HALF_RANGE))
    return raw_T.astype(np.int16), step_uv, int(offset)


def encode_signal(raw_LT: np.ndarray) -> bytes:
    """int16 [L, T] -> bytes: differences along time, zigzag, then the low and the high bytes apart.

    Lossless. On PTB-XL zstd brings it to 24 % of the raw bytes, against 45 % of the raw integers.
    """
    difference_LT = np.diff(raw_LT, axis=1, prepend=np.int16(0))  # wraps round, and back again in decoding
    zigzag_LT = ((difference_LT << 1) ^ (difference_LT >> 15)).view(np.uint16)
    return np.ascontiguousarray(zigzag_LT).view(np.uint8).reshape(-1, 2).T.tobytes()


def decode_signals(encoded: Sequence[bytes], samples: int) -> np.ndarray:
    """The inverse of `encode_signal`, for records of equal length -> int16 [B, 12, T]."""
    parts = np.frombuffer(b"".join(encoded), dtype=np.uint8).reshape(len(encoded), 2, len(LEADS), samples)
    zigzag_BLT = parts[:, 0].astype(np.uint16) | (parts[:, 1].astype(np.uint16) << 8)
    difference_BLT = ((zigzag_BLT >> 1) ^ (-(zigzag_BLT & 1).astype(np.int16)).view(np.uint16)).view(np.int16)
    return np.cumsum(difference_BLT, axis=-1, dtype=np.int16)


def signals_mv(columns: Mapping[str, Any], leads: Sequence[str] = LEADS) -> list[np.ndarray]:
    """Columns of shard rows -> one float32 array [L, T] in mV for each row, NaN where nothing was recorded."""
    positions = lead_positions(leads)
    signals = []
    for row, samples in enumerate(columns["samples"]):  # one by one, so that a record stays in the cache of a core
        raw_LT = decode_signals([columns["signal"][row]], int(samples))[0, positions]
        step_mv_L1 = np.asarray(columns["uv_per_lsb"][row], dtype=np.float64)[positions, None] / 1000
        offset_L1 = np.asarray(columns["offset"][row])[positions, None]
        counts_LT = raw_LT + offset_L1 if offset_L1.any() else raw_LT
        signal_mv_LT = np.empty(raw_LT.shape, dtype=np.float32)
        np.multiply(counts_LT, step_mv_L1, out=signal_mv_LT, casting="same_kind")
        missing_LT = raw_LT == _MISSING
        if missing_LT.any():
            signal_mv_LT[missing_LT] = np.nan
        signals.append(signal_mv_LT)
    return signals


def flag_kind(flag: str) -> str:
    """`"flat:V1"` -> `"flat"`: the key of `FLAGS` that explains it."""
    return flag if flag in FLAGS else flag.split(":")[0]


def unpack(row: Mapping[str, Any]) -> Record:
    """The `Record` that `pack` was given. Leads that are neither measured nor derived are absent again."""
    kept = [i for i in range(len(LEADS)) if row["measured"][i] or row["derived"][i]]
    signal_mv_LT = signals_mv({key: [row[key]] for key in ("samples", "signal", "uv_per_lsb", "offset")})[0]
    return Record(
        leads=tuple(LEADS[i] for i in kept),
        signal_mv_LT=signal_mv_LT[kept],
        rate_hz=float(row["rate_hz"]),
        record_id=row["record_id"],
        subject_id=row["subject_id"],
        derived=tuple(LEADS[i] for i in kept if row["derived"][i]),
        uv_per_lsb_L=np.asarray(row["uv_per_lsb"])[kept],
        flags=tuple(row["flags"]),
    )


def shard_bytes(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], metadata: Mapping[str, Any]) -> bytes:
    """A whole Parquet file in memory, so that it can be written in one step. `labels` are names without prefix."""
    schema = pa.schema([*SCHEMA, *(pa.field(LABEL_PREFIX + name, pa.float64()) for name in labels)])
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    table = table.replace_schema_metadata({"lsemvae": json.dumps({"schema": SCHEMA_VERSION, **metadata})})
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", use_dictionary=False, write_page_checksum=True, row_group_size=ROWS_PER_GROUP
    )
    return buffer.getvalue()


# --- the data set --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the data set; `digest` is the SHA-256 of its bytes."""

    path: str
    split: str
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. It is written last and in one step: a data set is complete when it has a manifest."""

    source: str
    cohort: str
    plan: str
    """Digest of the recordings to ingest and of the settings: the same plan gives the same shards."""
    records: int
    subjects: int
    unreadable: int
    labels: dict[str, dict[str, int]]
    """For each label, the number of recordings where it is 0, 1, another number, and absent."""
    shards: list[Shard]
    config: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    """For each kind of flag, how many leads have it; a flag of a whole recording counts once."""
    flagged: dict[str, int] = field(default_factory=dict)
    """For each kind of flag, how many recordings have it, on any lead."""
    schema: int = SCHEMA_VERSION

    def of_split(self, split: str) -> list[Shard]:
        """Shards with rows of `"train"`, `"val"`, or of both for `"all"`."""
        return [shard for shard in self.shards if shard.rows and split in (shard.split, "all")]

    def rows_in(self, split: str) -> int:
        return sum(shard.rows for shard in self.of_split(split))

    @property
    def digest(self) -> str:
        text = json.dumps([shard.digest for shard in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)


@dataclass(frozen=True)
class ShardedDataset:
    """A data set in a folder or bucket, opened by its manifest.

    Recordings of subjects who have `withdrawn` are in no answer of `read` and `model_input`. The `labels` of a table
    beside the shards take the place of theirs.
    """

    storage: Storage
    manifest: Manifest
    withdrawn: Withdrawn = NOBODY
    labels: Labels | None = None
    withdrawn_in: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Path of a shard -> its rows of subjects who have withdrawn. Without an entry a shard has none."""

    @classmethod
    def open(cls, uri: str, *, withdrawn: str | None = None) -> "ShardedDataset":
        """With withdrawn.csv and labels.csv beside the shards; `withdrawn` is the URI of another such list.

        The counts of labels in `manifest` are then those of the recordings that are left. Raises LsemvaeError when
        there is no manifest, or one of a version that this code does not know.
        """
        data = cls._of_manifest(uri)
        gone = read_withdrawn(data.storage) | (require_withdrawn(withdrawn) if withdrawn else NOBODY)
        if gone.subjects:
            data = replace(data, withdrawn=gone, withdrawn_in=data._rows_of(gone))
            held = data.shards_of_withdrawn()
            log.info(
                f"{len(data.withdrawn_rows())} recordings of subjects who have withdrawn are not used (list "
                f"{gone.digest} of {len(gone.subjects)} subjects); stored in {', '.join(held) or 'no shard'}"
            )
        if has_labels(data.storage):
            keys = (
                replace(data, withdrawn=NOBODY, withdrawn_in={}).read(["path", "record_id", "subject_id"]).to_pandas()
            )
            data = replace(data, labels=read_labels_beside(data.storage, keys))
        return data._counted() if gone.subjects or data.labels else data

    def without(self, subjects: Withdrawn) -> "ShardedDataset":
        """The data set without the recordings of these subjects too, as if they had withdrawn."""
        gone = self.withdrawn | subjects
        return replace(self, withdrawn=gone, withdrawn_in=self._rows_of(gone))._counted()

    @property
    def since_ingest(self) -> dict[str, str]:
        """The digests of the list of who has withdrawn and of the changed labels, where there are any."""
        found = {"withdrawn": self.withdrawn.digest, "labels": self.labels.digest if self.labels else ""}
        return {name: digest for name, digest in found.items() if digest}

    @property
    def columns(self) -> dict[str, str]:
        """Name -> type of each column, labels included."""
        labels = {LABEL_PREFIX + name: "double" for name in self.manifest.labels}
        return {field.name: str(field.type) for field in SCHEMA} | labels

    def _counted(self) -> "ShardedDataset":
        names = {LABEL_PREFIX + name for name in self.manifest.labels} | set((self.labels or NO_LABELS).columns)
        table = self.read(sorted(names))
        counts = {
            name.removeprefix(LABEL_PREFIX): label_counts(table[name].to_pandas().to_numpy(float))
            for name in sorted(names)
        }
        return replace(self, manifest=replace(self.manifest, labels=counts))

    @classmethod
    def _of_manifest(cls, uri: str) -> "ShardedDataset":
        storage = Storage.open(uri)
        try:
            content = storage.read_json(MANIFEST, "Ingest again")
        except FileNotFoundError:
            raise LsemvaeError(
                f"{storage.uri} holds no {MANIFEST}: make one with `python workflows/ingest.py --source … --output …`"
            ) from None
        if content.get("schema") != SCHEMA_VERSION:
            raise LsemvaeError(
                f"{storage.uri}/{MANIFEST} has schema {content.get('schema')}, this version reads "
                f"{SCHEMA_VERSION}: ingest again, or use the version that wrote it"
            )
        known = {f.name for f in fields(Manifest)}  # later versions of the same schema may add fields
        content = {name: value for name, value in content.items() if name in known}
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return cls(storage, Manifest(**content))

    def withdrawn_rows(self, split: str = "all") -> np.ndarray:
        """Which rows are of subjects who have withdrawn, counted from 0 through the shards of the split."""
        found, start = [np.empty(0, dtype=np.int64)], 0
        for shard in self.manifest.of_split(split):
            if shard.path in self.withdrawn_in:
                found.append(start + self.withdrawn_in[shard.path])
            start += shard.rows
        return np.concatenate(found)

    def _rows_of(self, subjects: Withdrawn) -> dict[str, np.ndarray]:
        """Path of each shard that has rows of these subjects -> those rows. Reads one column of every shard."""

        def look(shard: Shard) -> np.ndarray:
            return np.flatnonzero(subjects.mask(self._read(shard, ["subject_id"])["subject_id"].to_pylist()))

        shards = self.manifest.of_split("all")
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            rows = zip(shards, pool.map(look, shards), strict=True)
            return {shard.path: rows_N for shard, rows_N in rows if len(rows_N)}

    def shards_of_withdrawn(self) -> list[str]:
        """The files that still hold recordings of subjects who have withdrawn: ingest again to have them removed."""
        return [shard.path for shard in self.manifest.of_split("all") if shard.path in self.withdrawn_in]

    def rows(self, split: str) -> int:
        """Recordings of the split that may be used."""
        return self.manifest.rows_in(split) - len(self.withdrawn_rows(split))

    def require_rows(self, split: str, at_least: int = 1) -> int:
        rows = self.rows(split)
        if rows < at_least:
            raise LsemvaeError(f"{self.storage.uri} has {rows} recordings in {split!r}: {at_least} are needed")
        return rows

    def read(self, columns: Sequence[str], split: str = "all") -> pa.Table:
        """The chosen columns of every row, in memory: for labels and ids, not for signals.

        Raises LsemvaeError when a shard is absent or damaged, StorageError when the storage fails.
        """
        labels = self.labels or NO_LABELS
        overlaid = [name for name in columns if name in labels.columns]
        needed = [name for name in columns if name not in overlaid]
        needed += ["record_id"] if overlaid and "record_id" not in needed else []
        needed += ["subject_id"] if self.withdrawn.subjects and "subject_id" not in needed else []
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            table = pa.concat_tables(pool.map(lambda shard: self._read(shard, needed), self.manifest.of_split(split)))
        if self.withdrawn.subjects:
            table = table.filter(pa.array(~self.withdrawn.mask(table["subject_id"].to_pylist())))
        for name in overlaid:
            values = labels.of(name, table["record_id"].to_numpy())
            table = table.append_column(name, pa.array(values, from_pandas=True))
        return table.select(list(columns))

    def _read(self, shard: Shard, columns: Sequence[str]) -> pa.Table:
        path = self.storage.path(shard.path)
        try:
            with explained(path), self.storage.filesystem.open_input_file(path) as stream:
                if stream.size() != shard.bytes:
                    raise pa.ArrowInvalid(f"it has {stream.size()} bytes, not {shard.bytes}")
                return pq.read_table(stream, columns=list(columns), page_checksum_verification=True)
        except (FileNotFoundError, StorageError) as error:
            cause = error.__cause__ or error
            # Errors of the Parquet format are OSErrors too, but without an errno.
            if isinstance(error, StorageError) and (getattr(cause, "errno", None) or "AWS Error" in str(cause)):
                raise
            raise self._damaged(shard, " ".join(str(cause).split())[:200]) from error

    def _damaged(self, shard: Shard, why: str) -> LsemvaeError:
        return LsemvaeError(
            f"{self.storage.uri}/{shard.path} is not what was ingested ({why}): remove it and {MANIFEST}, and ingest "
            "again"
        )

    def verify(self) -> None:
        """Reads every shard; raises LsemvaeError when the digest of one is not that of the manifest."""

        def check(shard: Shard) -> None:
            try:
                content = self.storage.read_bytes(shard.path)
            except FileNotFoundError:
                raise self._damaged(shard, "it is gone") from None
            if hashlib.sha256(content).hexdigest() != shard.digest:
                raise self._damaged(shard, "its SHA-256 is another")

        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            list(pool.map(check, self.manifest.shards))

    def require_label(self, name: str) -> str:
        """The column of a binary label; raises LsemvaeError when it is absent, or is not 0 and 1."""
        column = self.require_column(name)
        counts = self.manifest.labels[name]
        if not counts["0"] or not counts["1"] or counts["other"]:
            raise LsemvaeError(
                f"label {name!r} has {counts['0']} recordings at 0, {counts['1']} at 1 and {counts['other']} at "
                "other values: a task needs both 0 and 1, and nothing else"
            )
        return column

    def require_column(self, name: str) -> str:
        """The column of a label or measurement with any values; raises LsemvaeError when it is absent."""
        if name not in self.manifest.labels:
            known = ", ".join(sorted(self.manifest.labels)) or "none"
            raise LsemvaeError(f"{self.storage.uri} has no label {name!r}: it has {known}")
        return LABEL_PREFIX + name

    def dataset(self, split: str = "all") -> "ray.data.Dataset":
        """All rows of the files as a Ray Dataset, streamed: nothing is read before it is consumed."""
        import ray.data

        paths = [self.storage.path(shard.path) for shard in self.manifest.of_split(split)]
        return ray.data.read_parquet(paths, filesystem=self.storage.filesystem)

    def model_input(
        self,
        leads: Sequence[str],
        config: PreprocessConfig,
        split: str = "all",
        columns: Iterable[str] = ("record_id",),
        batch_size: int = 32,
        *,
        labelled: str | None = None,
    ) -> "ray.data.Dataset":
        """Preprocessed rows: `x_LT`, `lead_mask_L`, `refused` (None or the reason's code), and `columns`.

        `labelled` is one of `columns`: rows where it is null are left out before they are preprocessed.
        """
        leads, columns = tuple(leads), list(columns)
        labels, withdrawn = self.labels or NO_LABELS, self.withdrawn
        overlaid = [name for name in columns if name in labels.columns]

        def prepare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            for name in overlaid:
                batch[name] = labels.of(name, batch["record_id"])
            kept_B = np.ones(len(batch["rate_hz"]), dtype=bool)
            if withdrawn.subjects:
                kept_B &= ~withdrawn.mask(batch["subject_id"])
            if labelled:
                kept_B &= ~np.isnan(batch[labelled])
            if not kept_B.all():
                batch = {name: values[kept_B] for name, values in batch.items()}
            prepared = preprocess_signals(signals_mv(batch, leads), batch["rate_hz"].tolist(), leads, config)
            refused = [reason.code if reason else None for reason in prepared.refused_B]
            return {
                "x_LT": prepared.x_BLT,
                "lead_mask_L": prepared.lead_mask_BL,
                "refused": np.array(refused, dtype=object),
                **{name: batch[name] for name in columns},
            }

        stored = [*SIGNAL_COLUMNS, *(name for name in columns if name not in overlaid)]
        stored += ["record_id"] if overlaid else []
        stored += ["subject_id"] if withdrawn.subjects else []
        chosen = self.dataset(split).select_columns(list(dict.fromkeys(stored)))
        return chosen.map_batches(prepare, batch_size=batch_size, zero_copy_batch=True)


def label_counts(values: np.ndarray) -> dict[str, int]:
    """How often a label is 0, 1, another number, or null (NaN)."""
    null = np.isnan(values)
    return {
        "0": int((values == 0).sum()),
        "1": int((values == 1).sum()),
        "other": int((~null & (values != 0) & (values != 1)).sum()),
        "null": int(null.sum()),
    }
