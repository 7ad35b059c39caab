"""Shards keep the recorder's integers, and a data set is what its manifest names."""

import json
import os
import subprocess
import sys

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
