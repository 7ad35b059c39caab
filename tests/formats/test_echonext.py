"""EchoNext's waveforms: one row is read, whatever the size of the file, and it is marked as no millivolts."""

import pickle
import tracemalloc
from pathlib import Path

import boto3
import numpy as np
import pytest
from support.echo_files import standardised, write_sparse
from support.plain_files import npy, npy_header

from lsemvae.data.reading import read_or_reason
from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import read_relative
from lsemvae.formats.echonext import NOMINAL_MV, read_row
from lsemvae.leads import LEADS
from lsemvae.preprocess import FIXED_MV, PreprocessConfig, preprocess
from lsemvae.quality import FLAGS, quality_flags
from lsemvae.record import Record
from lsemvae.storage import Storage

NAME = "EchoNext_val_waveforms.npy"


def of_bytes(content: bytes, row: int = 0) -> Record:
    return read_row(f"{NAME}#{row}", lambda name, start, n_bytes: content[start : start + n_bytes])


def reason(content: bytes, row: int = 0) -> tuple[str, str]:
    with pytest.raises(UnreadableRecording) as caught:
        of_bytes(content, row)
    assert "\n" not in str(caught.value) and NAME in str(caught.value)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8"])
def test_a_row_is_the_recording(dtype: str):
    values = standardised(3)
    record = of_bytes(npy(values.astype(dtype)), row=2)
    assert (record.leads, record.rate_hz, record.flags) == (LEADS, 250.0, ("no_millivolts",))
    np.testing.assert_allclose(record.signal_mv_LT, values[2, 0].T * NOMINAL_MV, rtol=1e-6, atol=1e-7)


def test_a_standard_deviation_is_the_unit_of_the_fixed_scale_and_survives_the_shards():
    """So a model sees the published numbers, filtered: the authors' scale differs between leads and recordings."""
    assert NOMINAL_MV == FIXED_MV
    values = standardised(1)
    record = of_bytes(npy(values))
    prepared = preprocess([record], LEADS, PreprocessConfig())
    assert prepared.refused_B == [None] and prepared.lead_mask_BL.all()
    sizes = np.ptp(prepared.x_BLT[0], axis=1) / np.ptp(values[0, 0], axis=0)
    assert ((sizes > 0.6) & (sizes < 1.3)).all(), sizes
    back = unpack(pack(record, path="x", flags=quality_flags(record)))
    assert back.flags == ("no_millivolts", "rate")
    np.testing.assert_allclose(back.signal_mv_LT, record.signal_mv_LT, atol=2 * np.ptp(values) * NOMINAL_MV / 65534)


def test_no_flag_and_no_refusal_of_millivolts_applies():
    """In mV this record would be out of range, contradict Einthoven, clip, wander, hum, and have a lead too small."""
    values = standardised(1)
    time_s = np.arange(2500)[:, None] / 250
    values[0, 0] = 2 * values[0, 0] + 20 * np.sin(0.6 * time_s) + np.sin(100 * np.pi * time_s)
    values[0, 0] = np.clip(values[0, 0], -20, 20)
    values[0, 0, :, 3] *= 1e-4
    record = of_bytes(npy(values))
    as_millivolts = Record(record.leads, record.signal_mv_LT * 10, record.rate_hz)
    kinds = {flag.split(":")[0] for flag in quality_flags(as_millivolts)}
    assert {"out_of_range", "mains", "wander", "rail", "flat", "einthoven"} <= kinds
    assert quality_flags(record) == ("rate",)
    largest = np.where(time_s % 0.5 < 0.25, 60.0, -60.0) * np.ones(12)  # the loudest that the reader takes
    loud = of_bytes(npy(largest[None, None]))
    assert preprocess([loud], LEADS, PreprocessConfig()).refused_B == [None]
    assert "no millivolts" in FLAGS["no_millivolts"]


def test_flags_without_a_unit_still_apply():
    values = standardised(1)
    values[0, 0, 100:120, 6] = np.nan
    values[0, 0, 500:1000, 7] = 0.5
    values[0, 0, :, 0] *= -1
    assert quality_flags(of_bytes(npy(values))) == ("nan:V1", "flat:V2", "swapped:arms", "rate")
    values[:] = np.nan
    assert quality_flags(of_bytes(npy(values)))[:12] == tuple(f"nan:{lead}" for lead in LEADS)


VALUES = standardised(2)


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (npy(VALUES)[:-8], "truncated", "ends 8 bytes too early: copy the whole file again"),
        (npy(VALUES[:1]), "missing_file", "#1: the file has 1 rows"),
        (npy(VALUES.astype(np.int16)), "format", "its numbers are int16, EchoNext's waveforms are float64 [N, 1"),
        (npy(VALUES.astype(np.float16)), "format", "its numbers are float16"),
        (npy(VALUES.astype(np.complex64)), "format", "its numbers are complex64"),
        (npy(VALUES[:, 0]), "length", "its array has shape (2, 2500, 12), EchoNext's"),
        (npy(VALUES.transpose(0, 1, 3, 2).copy()), "length", "(2, 1, 12, 2500)"),
        (npy(np.asfortranarray(VALUES)), "length", "in Fortran's order"),
        (npy(VALUES * 100), "sample", "standardised ones are below 60"),
        (npy(np.where(VALUES > 5, np.inf, VALUES)), "sample", "a number is inf"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "format", "its numbers are object"),
        (pickle.dumps(VALUES), "header", "NPY header cannot be read"),
        (npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (9"), "header", "NPY header cannot be read"),
        (b"", "header", "NPY header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header", "NPY header cannot be read"),
    ],
)  # fmt: skip
def test_what_is_not_as_published_is_refused(content: bytes, code: str, part: str):
    found, message = reason(content, row=1)
    assert found == code and part in message


def test_a_file_of_17_gb_is_not_loaded(tmp_path: Path):
    count = 72_475
    write_sparse(tmp_path / NAME, count)
    path = tmp_path / NAME
    assert path.stat().st_size > 17e9
    values = standardised(1)
    with path.open("r+b") as stream:
        stream.seek(-values.nbytes, 2)
        stream.write(values.tobytes())
    storage = Storage.open(tmp_path)
    tracemalloc.start()
    try:
        last = read_or_reason(storage, f"{NAME}#{count - 1}", lambda record: record)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(last, Record)
    np.testing.assert_allclose(last.signal_mv_LT, values[0, 0].T * NOMINAL_MV, rtol=1e-6, atol=1e-7)
    assert peak < 20 * values.nbytes  # 5 MB


def test_only_files_below_the_source_are_read(tmp_path: Path):
    storage = Storage.open(tmp_path / "source")
    np.save(tmp_path / NAME, VALUES)
    for path in (f"../{NAME}#0", f"/etc/{NAME}#0", f"a/../../{NAME}#0"):
        answer = read_or_reason(storage, path, lambda record: record)
        assert isinstance(answer, UnreadableRecording) and answer.code == "unsafe_name"
    absent = read_or_reason(storage, f"{NAME}#0", lambda record: record)
    assert isinstance(absent, UnreadableRecording) and absent.code == "missing_file"
    with pytest.raises(UnreadableRecording):  # a reader without ranges does not know rows
        read_relative(f"{NAME}#0", storage.read_bytes)


@pytest.mark.server
def test_a_row_in_an_object_store(s3: str):
    boto3.client("s3").put_object(Bucket="ecg", Key=f"echonext/{NAME}", Body=npy(VALUES))
    storage = Storage.open("s3://ecg/echonext")
    assert storage.size(NAME) == len(npy(VALUES))
    record = read_or_reason(storage, f"{NAME}#1", lambda record: record)
    assert isinstance(record, Record)
    np.testing.assert_allclose(record.signal_mv_LT, VALUES[1, 0].T * NOMINAL_MV, rtol=1e-6, atol=1e-7)
    assert storage.read_range(NAME, len(npy(VALUES)) - 3, 100) == npy(VALUES)[-3:]
