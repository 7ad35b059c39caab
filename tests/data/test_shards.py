"""Shards keep the recorder's integers, and a data set is what its manifest names."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.session import ROOT

from lsemvae.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    ShardedDataset,
    decode_signals,
    encode_signal,
    label_counts,
    pack,
    shard_bytes,
    signals_mv,
    unpack,
)
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record


@given(hnp.arrays(np.int16, st.tuples(st.just(12), st.integers(1, 60))))
def test_encoding_loses_no_bit(raw_LT: np.ndarray):
    encoded = encode_signal(raw_LT)
    np.testing.assert_array_equal(decode_signals([encoded, encoded], raw_LT.shape[1]), np.stack([raw_LT, raw_LT]))


@settings(max_examples=60, deadline=None)
@given(
    raw=hnp.arrays(np.int32, st.tuples(st.just(3), st.integers(1, 40)), elements=st.integers(-32767, 32767)),
    baseline=st.integers(-30000, 30000),
    step_uv=st.sampled_from([0.5, 1.0, 1.25, 2.44140625, 4.88, 5.0]),
    missing=st.integers(0, 2**10 - 1),
)
def test_the_recorders_integers_come_back_exactly(raw, baseline, step_uv, missing):
    signal_mv = ((raw - baseline) * step_uv / 1000).astype(np.float32)
    signal_mv[:, : 2 if missing % 2 else 0] = np.nan
    names = ("V3", "I", "aVF")
    record = Record.from_leads(
        dict(zip(names, signal_mv, strict=True)), 500, uv_per_lsb=dict.fromkeys(names, step_uv), record_id="r"
    )
    back = unpack(pack(record))
    assert back.leads == record.leads == ("I", "aVF", "V3")
    counts = np.rint(back.signal_mv_LT.astype(np.float64) * 1000 / step_uv)
    expected = np.rint(record.signal_mv_LT.astype(np.float64) * 1000 / step_uv)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(back.uv_per_lsb_L, [step_uv] * 3)


def test_without_a_known_step_the_error_is_a_fraction_of_the_range():
    rng = np.random.default_rng(0)
    record = Record.from_leads({"I": rng.normal(size=500), "II": 50 * rng.normal(size=500)}, 300, record_id="r")
    back = unpack(pack(record, flags=["length"]))
    assert back.derived == ("III", "aVR", "aVL", "aVF")
    assert back.rate_hz == 300
    assert back.flags == ("length",)
    for row, lead in enumerate(back.leads):
        whole_range_mv = np.abs(record.signal_mv_LT[row]).max()
        assert np.abs(back.signal_mv_LT[row] - record.signal_mv_LT[row]).max() < whole_range_mv / 32767, lead


def rows_of(count: int, samples: int = 50) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        pack(
            Record.from_leads(
                {lead: rng.integers(-500, 500, samples + i % 2) / 200 for lead in LEADS},
                500,
                uv_per_lsb=dict.fromkeys(LEADS, 5.0),
                record_id=f"r{i}",
                subject_id=f"s{i // 2}",
            ),
            path=f"p{i}",
        )
        | {"label.ph": None if i == 0 else float(i % 2)}
        for i in range(count)
    ]


def test_columns_of_unequal_length_decode_in_order():
    rows = rows_of(5)
    columns = {name: [row[name] for row in rows] for name in ("signal", "samples", "uv_per_lsb", "offset")}
    for row, signal_mv_LT in zip(rows, signals_mv(columns, ("V6", "I")), strict=True):
        np.testing.assert_array_equal(signal_mv_LT, unpack(row).signal_for(("V6", "I")))


@pytest.fixture
def dataset(tmp_path):
    content = shard_bytes(rows_of(6), ["ph"], {"plan": "x"})
    (tmp_path / "train-00000.parquet").write_bytes(content)
    manifest = Manifest(
        source="here", cohort="folder", plan="x", records=6, subjects=3, unreadable=0,
        labels={"ph": label_counts(np.array([np.nan, 1, 0, 1, 0, 1])), "bad": label_counts(np.array([1.0] * 6)),
                "mpap": label_counts(np.array([0, 1, 20.5]))},
        shards=[Shard("train-00000.parquet", "train", 6, len(content), "0")],
    )  # fmt: skip
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def test_a_data_set_opens_by_its_manifest(dataset):
    (dataset / "train-00001.parquet").write_bytes(b"not named by the manifest: not there")
    data = ShardedDataset.open(str(dataset))
    table = data.read(["record_id", "label.ph"])
    assert table["record_id"].to_pylist() == [f"r{i}" for i in range(6)]
    assert table["label.ph"].to_pylist()[0] is None  # a label that is not known is null, never 0
    assert pq.read_schema(dataset / "train-00000.parquet").field("label.ph").type == "double"
    assert data.require_label("ph") == "label.ph"
    assert data.require_rows("train", 6) == 6


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda folder, data: ShardedDataset.open(str(folder / "nowhere")), "holds no manifest.json"),
        (lambda folder, data: data.require_label("sex"), "no label 'sex': it has bad, mpap, ph"),
        (lambda folder, data: data.require_label("bad"), "6 at 1"),
        (lambda folder, data: data.require_label("mpap"), "1 at other values"),
        (lambda folder, data: data.require_rows("val"), "0 recordings in 'val'"),
    ],
)
def test_mistakes_name_the_thing(dataset, mistake, says):
    with pytest.raises(LsemvaeError, match=says):
        mistake(dataset, ShardedDataset.open(str(dataset)))


def test_a_schema_from_the_future_is_refused(dataset):
    content = json.loads((dataset / MANIFEST).read_text()) | {"schema": 99}
    (dataset / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(LsemvaeError, match="schema 99"):
        ShardedDataset.open(str(dataset))
    (dataset / MANIFEST).write_text("{")
    with pytest.raises(LsemvaeError, match="not JSON"):
        ShardedDataset.open(str(dataset))


@pytest.mark.ray
def test_batches_in_which_nothing_has_a_label(ray_cluster, tmp_path):
    rng = np.random.default_rng(2)
    rows = []
    for i in range(12):
        record = Record.from_leads({lead: rng.normal(size=2000) for lead in LEADS}, 500, record_id=f"r{i:02d}")
        rows.append(pack(record) | {"label.ph": float(i % 2) if 4 <= i < 8 else None})
    content = shard_bytes(rows, ["ph"], {"plan": "x"})
    (tmp_path / "train-00000.parquet").write_bytes(content)
    shards = [Shard("train-00000.parquet", "train", 12, len(content), "0")]
    (tmp_path / MANIFEST).write_text(Manifest("here", "folder", "x", 12, 12, 0, {}, shards).to_json())
    script = f"""
from command import start_ray
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.data.shards import ShardedDataset
start_ray()
data = ShardedDataset.open({str(tmp_path)!r})
columns = ["record_id", "label.ph"]
rows = data.model_input(LEADS, PreprocessConfig(), columns=columns, batch_size=4, labelled="label.ph")
print(*sorted(row["record_id"] for row in rows.iter_rows()))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflows")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].split() == [f"r{i:02d}" for i in range(4, 8)]


# --- what is known since a data set was ingested ---------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Four recordings of subjects 1, 2, 2 and 003, the last one held out; label.ph is 0, 1, 0, 1."""
    entries = [("a", "1", 0.0), ("b", "2", 1.0), ("c", "2", 0.0), ("d", "003", 1.0)]
    rows = [
        pack(record_of(), path=f"{name}.hea") | {"record_id": name, "subject_id": subject, "label.ph": ph}
        for name, subject, ph in entries
    ]
    shards = []
    for split, chosen in (("train", rows[:3]), ("val", rows[3:])):
        content = shard_bytes(chosen, ["ph"], {"plan": "x", "rows": len(chosen), "unreadable": [], "flags": {}})
        (tmp_path / f"{split}.parquet").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(f"{split}.parquet", split, len(chosen), len(content), digest))
    labels = {"ph": {"0": 2, "1": 2, "other": 0, "null": 0}}
    (tmp_path / MANIFEST).write_text(Manifest("here", "folder", "x", 4, 3, 0, labels, shards).to_json())
    return tmp_path


def record_of() -> Record:
    return Record(("I", "II"), np.ones((2, 20), dtype=np.float32), 500.0, record_id="x")


def test_who_withdraws_after_ingest_is_in_no_answer(data_set: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    assert len(ShardedDataset.open(str(data_set)).withdrawn_rows()) == 0
    (data_set / "withdrawn.csv").write_text("eid\n2\n3\n")
    data = ShardedDataset.open(str(data_set))
    assert data.read(["record_id"])["record_id"].to_pylist() == ["a"]
    assert data.read(["label.ph", "record_id"], "val").num_rows == 0
    assert {path: rows.tolist() for path, rows in data.withdrawn_in.items()} == {
        "train.parquet": [1, 2],
        "val.parquet": [0],
    }
    assert [data.withdrawn_rows(split).tolist() for split in ("all", "train", "val")] == [[1, 2, 3], [1, 2], [0]]
    assert data.since_ingest == {"withdrawn": data.withdrawn.digest}
    assert (data.rows("train"), data.manifest.rows_in("train")) == (1, 3)  # the files stay as they are
    assert data.manifest.labels["ph"] == {"0": 1, "1": 0, "other": 0, "null": 0}
    with pytest.raises(LsemvaeError, match="has 0 recordings in 'val'"):
        data.require_rows("val")
    said = "\n".join(record.message for record in caplog.records)
    assert f"3 recordings of subjects who have withdrawn are not used (list {data.withdrawn.digest} of 2" in said
    assert "stored in train.parquet, val.parquet" in said
    data.verify()

    (data_set / "withdrawn.csv").unlink()
    (data_set / "list.txt").write_text("1\n")
    given = ShardedDataset.open(str(data_set), withdrawn=str(data_set / "list.txt"))
    assert given.read(["record_id"])["record_id"].to_pylist() == ["b", "c", "d"]
    assert given.shards_of_withdrawn() == ["train.parquet"]
    with pytest.raises(LsemvaeError, match="does not exist"):
        ShardedDataset.open(str(data_set), withdrawn=str(data_set / "none.txt"))
    (data_set / "withdrawn.csv").write_text("2\n1,3\n")
    with pytest.raises(LsemvaeError, match=r"withdrawn\.csv, line 2, is no eid"):
        ShardedDataset.open(str(data_set))


def test_the_subjects_of_a_shard_are_read_once(data_set: Path):
    (data_set / "withdrawn.csv").write_text("2\n3\n")
    data = ShardedDataset.open(str(data_set))
    for path in ("train.parquet", "val.parquet"):
        (data_set / path).unlink()
    assert data.withdrawn_rows().tolist() == [1, 2, 3] and data.rows("val") == 0
    assert data.shards_of_withdrawn() == ["train.parquet", "val.parquet"]


def test_labels_beside_the_shards_take_the_place_of_theirs(data_set: Path):
    (data_set / "labels.csv").write_text("record_id,ph,af\nd,0,yes\nb,,no\n")
    data = ShardedDataset.open(str(data_set))
    table = data.read(["label.af", "label.ph", "record_id"]).to_pylist()
    assert [(row["record_id"], row["label.ph"], row["label.af"]) for row in table] == [
        ("a", None, None), ("b", None, 0.0), ("c", None, None), ("d", 0.0, 1.0)
    ]  # fmt: skip
    assert data.read(["label.ph"], "val")["label.ph"].to_pylist() == [0.0]
    assert data.manifest.labels["af"] == {"0": 1, "1": 1, "other": 0, "null": 2}
    assert data.manifest.labels["ph"] == {"0": 1, "1": 0, "other": 0, "null": 3}
    assert data.require_label("af") == "label.af"
    (data_set / "withdrawn.csv").write_text("3\n")
    assert ShardedDataset.open(str(data_set)).manifest.labels["af"] == {"0": 1, "1": 0, "other": 0, "null": 2}


@pytest.mark.ray
@pytest.mark.parametrize("batch_size", [1, 32])
def test_model_input_has_the_new_labels_and_nobody_who_has_withdrawn(ray_cluster, data_set: Path, batch_size: int):
    (data_set / "labels.csv").write_text("record_id,af\na,yes\nb,no\nc,yes\n")
    (data_set / "withdrawn.csv").write_text("1\n")
    data = ShardedDataset.open(str(data_set))
    columns = ["record_id", "label.af", "label.ph"]
    rows = data.model_input(
        ("I", "II"), PreprocessConfig(), columns=columns, batch_size=batch_size, labelled="label.af"
    )
    found = sorted((row["record_id"], row["label.af"], row["label.ph"]) for row in rows.take_all())
    assert found == [("b", 0, 1), ("c", 1, 0)]


def test_a_manifest_with_fields_that_this_version_does_not_know_is_read(data_set: Path):
    content = json.loads((data_set / MANIFEST).read_text())
    (data_set / MANIFEST).write_text(json.dumps(content | {"later": 1}))
    assert ShardedDataset.open(str(data_set)).manifest.records == 4
    del content["flagged"]
    (data_set / MANIFEST).write_text(json.dumps(content))
    assert ShardedDataset.open(str(data_set)).manifest.flagged == {}
