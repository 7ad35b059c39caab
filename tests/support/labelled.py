"""A small labelled data set written as shards without Ray."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.random import default_rng

from lsemvae.data.shards import Manifest, Shard, label_counts, pack, shard_bytes
from lsemvae.leads import LEADS
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.storage import Storage


def write_labelled(folder: Path, subjects: int) -> Path:
    """Two recordings of each subject, every second ill: labels `ph`, `female`, `age_years`, and `torn`, a fold for each
    recording that tears subjects apart."""
    place, rows = Storage.open(folder), []
    for number in range(2 * subjects):
        subject = number // 2
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=float(subject % 2)), default_rng(number))
        leads = dict(zip(LEADS, signal_mv_LT[:, ::5], strict=True))
        row = pack(Record.from_leads(leads, 100, record_id=f"r{number:03d}", subject_id=f"s{subject:03d}"))
        labels = {"ph": subject % 2, "female": subject % 3 == 0, "age_years": 40 + subject, "torn": number % 3}
        rows.append(row | {f"label.{name}": float(value) for name, value in labels.items()})
    shards = []
    for split, of_split in (("train", rows[:-8]), ("val", rows[-8:])):  # the last four subjects
        metadata = {"plan": "p", "rows": len(of_split), "unreadable": [], "flags": {}}
        content = shard_bytes(of_split, list(labels), metadata)
        place.write_bytes(f"{split}.parquet", content)
        shards.append(
            Shard(f"{split}.parquet", split, len(of_split), len(content), hashlib.sha256(content).hexdigest())
        )
    counts = {name: label_counts(np.array([row[f"label.{name}"] for row in rows])) for name in labels}
    manifest = Manifest("made up", "folder", "p", len(rows), subjects, 0, counts, shards)
    place.write_bytes("manifest.json", manifest.to_json().encode())
    return folder
