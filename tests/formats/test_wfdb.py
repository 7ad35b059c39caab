"""The WFDB reader: against wfdb and numpy on real files, by round trips, and under attack."""

import math
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from support.apart import in_memory, reads_or_refuses
from support.wfdb_files import VALID, header, record_files

from lsemvae import formats
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import read, read_record, read_relative
from lsemvae.formats import wfdb as reader
from lsemvae.leads import LEADS, canonical
from lsemvae.record import Record
from lsemvae.scoring.reliability import reliability

MIMIC_ORDER = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")


def read_files(files: Mapping[str, bytes], name: str = "r.hea", **options: object) -> Record:
    return read_record(name, in_memory(files), **options)


def refusal(files: Mapping[str, bytes], name: str = "r.hea", **options: object) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        read_files(files, name, **options)
    return caught.value


ZEROS = bytes(2 * 12 * 20)


# --- real recordings against independent readings -----------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("folder", ["ptbxl500/records500/00000", "ludb/data"])
def test_equals_wfdb_on_real_recordings(shared_data: Path, folder: str) -> None:
    for path in sorted((shared_data / folder).glob("*.hea"))[::10]:
        record = read(path)
        theirs = wfdb.rdrecord(str(path.with_suffix("")))
        raw = wfdb.rdrecord(str(path.with_suffix("")), physical=False)
        assert record.leads == LEADS
        assert record.record_id == path.stem
        assert record.rate_hz == theirs.fs
        assert record.flags == record.derived == ()
        for column, name in enumerate(theirs.sig_name):
            row = record.leads.index(canonical(name))
            np.testing.assert_array_equal(record.signal_mv_LT[row], theirs.p_signal[:, column].astype(np.float32))
            counts = np.rint(record.signal_mv_LT[row].astype(float) * 1000 / record.uv_per_lsb_L[row])
            np.testing.assert_array_equal(counts, raw.d_signal[:, column] - raw.baseline[column])


@pytest.mark.shared_data
def test_equals_plain_numpy_on_real_recordings(shared_data: Path) -> None:
    paths = sorted((shared_data / "ptbxl500/records500/00000").glob("*.hea"))[::5]
    for path in paths:
        counts_TL = np.fromfile(path.with_suffix(".dat"), dtype="<i2").reshape(5000, 12)
        record = read(path.with_suffix(""))
        np.testing.assert_allclose(record.signal_mv_LT, counts_TL.T / 1000, rtol=1e-6, atol=0)


@pytest.mark.shared_data
def test_ludb_in_raw_counts_fulfils_einthoven(shared_data: Path) -> None:
    """Its headers' gains are wrong: with them I + III - II is far from 0, in raw counts it is 0."""
    for number in (1, 8, 100, 200):
        path = shared_data / f"ludb/data/{number}"
        lead = dict(zip(LEADS, read(path, uv_per_lsb=1.0).signal_mv_LT, strict=True))
        assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 1e-6
        wrong = dict(zip(LEADS, read(path).signal_mv_LT, strict=True))
        assert np.abs(wrong["I"] + wrong["III"] - wrong["II"]).max() > 0.05


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1111554.hea", (12, 2934, 400.0)),
        ("1111834.hea", (12, 1205, 400.0)),
        ("E00271.hea", (12, 5000, 500.0)),  # its record line is no legal name; wfdb refuses it
        ("E00271", (12, 5000, 500.0)),
        ("JS11438.hea", (12, 5000, 500.0)),
        ("9190_low_sample_rate.hea", "missing_file"),  # names 9190.dat, which lies there under another name
        ("I0001_missing_signal_file.hea", "missing_file"),
        ("20000425025323_erg_garbage.hea", "format"),
        ("311derive_3.hea", "no_ecg_lead"),
        ("1111554.dat", "format"),
        ("E00271.mat", "format"),
        ("empty.xml", "format"),
        ("nothing_there", "missing_file"),
    ],
)
def test_odd_files(shared_data: Path, name: str, expected: object) -> None:
    path = shared_data / "odd" / name
    if isinstance(expected, str):
        with pytest.raises(UnreadableRecording) as caught:
            read(path)
        assert caught.value.code == expected
        assert name.partition(".")[0] in str(caught.value)
    else:
        record = read(path)
        assert (*record.signal_mv_LT.shape, record.rate_hz) == expected
        assert record.leads == LEADS
        assert record.flags == ()
        stem = (shared_data / "odd" / name).with_suffix("")
        data = next(stem.with_suffix(end) for end in (".dat", ".mat") if stem.with_suffix(end).exists())
        offset = 24 if data.suffix == ".mat" else 0
        counts_TL = np.frombuffer(data.read_bytes(), "<i2", offset=offset).reshape(-1, 12)
        np.testing.assert_array_equal(record.signal_mv_LT, (counts_TL.T / 1000).astype(np.float32))


@pytest.mark.shared_data
def test_low_sample_rate_beside_its_signal_file(shared_data: Path) -> None:
    odd = shared_data / "odd"
    files = {f"9190{end}": (odd / f"9190_low_sample_rate{end}").read_bytes() for end in (".hea", ".dat")}
    record = read_files(files, "9190")
    assert (record.rate_hz, record.signal_mv_LT.shape) == (300.0, (12, 2934))


@pytest.mark.shared_data
def test_corrupt_byte_is_flagged(shared_data: Path) -> None:
    folder = shared_data / "ptbxl500/records500/00000"
    files = {name: (folder / name).read_bytes() for name in ("00001_hr.hea", "00001_hr.dat")}
    data = bytearray(files["00001_hr.dat"])
    data[2 * (12 * 1000 + 3)] ^= 0x10  # the fourth signal, AVR
    assert read_files(files, "00001_hr").flags == ()
    assert read_files(files | {"00001_hr.dat": bytes(data)}, "00001_hr").flags == ("checksum:aVR",)


# --- names, scales, layouts ---------------------------------------------------------------------------------


def test_mimic_order_and_subject() -> None:
    raw = {lead: np.full(20, index, dtype=np.int16) for index, lead in enumerate(MIMIC_ORDER)}
    raw["V3"] = np.array([-32768, *range(19)], dtype=np.int16)
    files = record_files(raw, comments=["# <subject_id>: 12177274"])
    record = read_files(files, "r")
    assert record.leads == LEADS
    assert (record.subject_id, record.record_id, record.flags) == ("12177274", "r", ())
    for index, lead in enumerate(MIMIC_ORDER):
        if lead != "V3":
            assert (record.signal_for([lead]) == np.float32(index / 200)).all()
    assert np.isnan(record.signal_for(["V3"])[0, 0])
    assert not np.isnan(record.signal_for(["V3"])[0, 1:]).any()
    np.testing.assert_array_equal(record.uv_per_lsb_L, np.full(12, 5.0))


def cased(draw: st.DrawFn, name: str) -> str:
    return "".join(draw(st.sampled_from((c.lower(), c.upper()))) for c in name)


@st.composite
def any_record(draw: st.DrawFn) -> tuple[dict[str, bytes], dict[str, np.ndarray], dict[str, float]]:
    """Files of a random record, and for each lead the millivolts and the step that they mean."""
    leads = draw(st.lists(st.sampled_from(LEADS), min_size=1, max_size=12, unique=True))
    samples = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    counts_LT = np.random.default_rng(seed).integers(-32768, 32768, (len(leads), samples)).astype("<i2")
    lines, millivolts, steps = [f"r {len(leads)} 500 {samples}"], {}, {}
    offset = draw(st.sampled_from((0, 24)))
    for lead, counts_T in zip(leads, counts_LT, strict=True):
        unit, per_mv = draw(st.sampled_from([("mV", 1.0), ("MV", 1.0), ("uV", 1e3), ("V", 1e-3), ("nv", 1e6)]))
        gain = draw(st.floats(1e-2, 1e5)) * draw(st.sampled_from((1, -1))) / per_mv
        baseline = draw(st.integers(-32768, 32767))
        checksum = int(counts_T.sum(dtype=np.int64))
        checksum = draw(st.sampled_from((checksum % 65536, checksum % 65536 - 65536)))
        layout = f"16+{offset}" if offset else "16"
        lines.append(f"r.dat {layout} {gain!r}({baseline})/{unit} 16 0 0 {checksum} 0 {cased(draw, lead)}")
        value = (counts_T.astype(float) - baseline) / (gain * per_mv)
        millivolts[lead] = np.where(counts_T == -32768, np.nan, value).astype(np.float32)
        steps[lead] = 1000 / abs(gain * per_mv)
    data = bytes(offset) + counts_LT.T.tobytes()
    return {"r.hea": "\n".join(lines).encode(), "r.dat": data}, millivolts, steps


@settings(deadline=None, max_examples=150)
@given(any_record())
def test_round_trip(made: tuple[dict[str, bytes], dict[str, np.ndarray], dict[str, float]]) -> None:
    files, millivolts, steps = made
    record = read_files(files)
    assert record.flags == ()
    measured = [lead for lead in record.leads if lead not in record.derived]
    assert sorted(measured, key=LEADS.index) == sorted(millivolts, key=LEADS.index)
    assert list(record.leads) == sorted(record.leads, key=LEADS.index)
    for lead in measured:
        row = record.leads.index(lead)
        np.testing.assert_allclose(record.signal_mv_LT[row], millivolts[lead], rtol=1e-6)
        assert record.uv_per_lsb_L[row] == pytest.approx(steps[lead], rel=1e-12)
        counts = record.signal_mv_LT[row].astype(float) * 1000 / record.uv_per_lsb_L[row]
        known = np.isfinite(counts)
        assert np.abs(counts[known] - np.rint(counts[known])).max(initial=0) < 0.02  # exact integers come back


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 50), st.sampled_from((0, 24)), st.integers(0, 2**32 - 1))
def test_numpy_decodes_as_wfdb_does(n_signals: int, samples: int, offset: int, seed: int) -> None:
    content = header(LEADS[:n_signals], samples=samples, layout=f"16+{offset}")
    signals = reader._parse(content).signals
    data = np.random.default_rng(seed).bytes(offset + 2 * n_signals * samples)
    fast, general = reader._decode(signals, samples, data), reader._decode_by_wfdb(signals, samples, data)
    for ours, theirs in zip(fast, general, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def encode_bits(counts: np.ndarray, file_format: int) -> bytes:
    """Encoders written from signal(5), for the formats that wfdb cannot write too."""
    flat = counts.T.reshape(-1).astype(np.int64)  # sample by sample, signals in turn
    match file_format:
        case 8:
            return np.diff(counts, axis=1, prepend=0).T.astype(np.int8).tobytes()
        case 24:
            return b"".join(int(v).to_bytes(3, "little", signed=True) for v in flat)
        case 32:
            return flat.astype("<i4").tobytes()
        case 61:
            return flat.astype(">i2").tobytes()
        case 80:
            return (flat + 128).astype(np.uint8).tobytes()
        case 160:
            return (flat + 32768).astype("<u2").tobytes()
        case 212:
            pairs = np.append(flat, np.zeros(len(flat) % 2, dtype=np.int64)).reshape(-1, 2) & 0xFFF
            low, high = pairs[:, 0], pairs[:, 1]
            return np.stack([low & 0xFF, low >> 8 | high >> 8 << 4, high & 0xFF], 1).astype(np.uint8).tobytes()
        case 310 | 311:
            triples = np.append(flat, np.zeros(-len(flat) % 3, dtype=np.int64)).reshape(-1, 3) & 0x3FF
            a, b, c = triples.T
            if file_format == 311:
                return (a | b << 10 | c << 20).astype("<u4").tobytes()
            words = np.stack([a << 1 | (c & 0x1F) << 11, b << 1 | (c >> 5) << 11], 1)
            return words.astype("<u2").tobytes()
    raise AssertionError(file_format)


@pytest.mark.parametrize(
    ("file_format", "bits"),
    [(8, 6), (24, 24), (32, 32), (61, 16), (80, 8), (160, 16), (212, 12), (310, 10), (311, 10)],
)
@pytest.mark.parametrize(("n_signals", "samples"), [(1, 9), (2, 7), (12, 250), (1, 5), (1, 4)])
def test_other_formats(file_format: int, bits: int, n_signals: int, samples: int) -> None:
    half = 2 ** (bits - 1)
    rng = np.random.default_rng(samples)
    counts_LT = rng.integers(-half + 1, half, (n_signals, samples))
    if file_format != 8:
        counts_LT[0, 1] = -half  # "nothing was recorded"
    checksums = [int(row.sum()) % 65536 for row in counts_LT]
    content = header(LEADS[:n_signals], samples=samples, layout=str(file_format), gain="100(0)/mV", checksums=checksums)
    data = encode_bits(counts_LT, file_format)
    record = read_files({"r.hea": content, "r.dat": data})
    assert record.flags == ()
    expected = (counts_LT / 100).astype(np.float32)
    if file_format != 8:
        expected[0, 1] = np.nan
    np.testing.assert_array_equal(record.signal_for(LEADS[:n_signals]), expected)
    padded = {212: 3 / 2, 311: 4 / 3}
    used = math.ceil(n_signals * samples * padded[file_format]) if file_format in padded else len(data)
    used -= 2 * (file_format == 310 and n_signals * samples % 3 == 1)  # two of the four bytes are not used
    assert refusal({"r.hea": content, "r.dat": data[: used - 1]}).code == "truncated"


@pytest.mark.parametrize("file_format", ["16", "24", "32", "80", "212"])
def test_what_wfdb_writes(tmp_path: Path, file_format: str) -> None:
    counts_TL = np.random.default_rng(0).integers(-120, 120, (300, 12))
    wfdb.wrsamp(
        "r", 500, ["mV"] * 12, list(MIMIC_ORDER), d_signal=counts_TL, fmt=[file_format] * 12,
        adc_gain=[200.0] * 12, baseline=[3] * 12, write_dir=str(tmp_path),
    )  # fmt: skip
    record = read(tmp_path / "r")
    assert record.flags == ()
    np.testing.assert_allclose(record.signal_for(MIMIC_ORDER), (counts_TL.T - 3) / 200, rtol=1e-6)


def test_leads_in_several_files_and_signals_that_are_none() -> None:
    rng = np.random.default_rng(0)
    a_TL, b_TL = rng.integers(-99, 99, (30, 2)).astype("<i2"), rng.integers(-99, 99, (30, 1)).astype("<i2")
    lines = [
        "r 4 500 30",
        "a.dat 16 100/mV 16 0 0 0 0 Resp",
        "a.dat 16 100/mV 16 0 0 0 0 ii",
        "b.dat 16 100/mV 16 0 0 0 0 V1",
        "c.dat 16 0/mmHg 16 0 0 0 0 ABP",  # no lead: neither its scale nor its file matters
    ]
    files = {"r.hea": "\n".join(lines).encode(), "a.dat": a_TL.tobytes(), "b.dat": b_TL.tobytes()}
    record = read_files(files)
    assert record.leads == ("II", "V1")
    expected = np.stack([a_TL[:, 1], b_TL[:, 0]]) / 100
    np.testing.assert_allclose(record.signal_mv_LT, expected, rtol=1e-6)


def test_several_samples_a_frame_raise_the_rate() -> None:
    counts_T = np.arange(40, dtype="<i2")
    lines = ["r 2 125 10", "r.dat 16x4 100/mV 16 0 0 0 0 II", "r.dat 16 100/mV 16 0 0 0 0 Resp"]
    frames = np.concatenate([counts_T.reshape(10, 4), np.full((10, 1), 7, dtype="<i2")], axis=1)
    files = {"r.hea": "\n".join(lines).encode(), "r.dat": frames.tobytes()}
    record = read_files(files)
    assert record.rate_hz == 500
    np.testing.assert_allclose(record.signal_mv_LT[0], counts_T / 100, rtol=1e-6)
    mixed = files["r.hea"].replace(b"Resp", b"V1")
    assert refusal(files | {"r.hea": mixed}).code == "format"


def test_skewed_signal_keeps_its_own_end_missing() -> None:
    counts_T = np.arange(10, dtype="<i2")
    content = header(["II"], samples=10, layout="16:3", gain="100/mV")
    signal_mv_T = read_files({"r.hea": content, "r.dat": counts_T.tobytes()}).signal_mv_LT[0]
    np.testing.assert_allclose(signal_mv_T[:7], counts_T[3:] / 100, rtol=1e-6)
    assert np.isnan(signal_mv_T[7:]).all()


def test_baseline_defaults_to_the_adc_zero() -> None:
    content = b"r 1 500 2\nr.dat 16 200 11 1024 0 0 0 II\n"
    files = {"r.hea": content, "r.dat": np.array([1024, 1224], dtype="<i2").tobytes()}
    assert read_files(files).signal_mv_LT.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("text", ["1000/mV", "1000.0(0)/mV", "1e3(0)/MV", "1(0)/uV", "1/\u00b5V", "1e-3/nV", "1e6/V"])
def test_units_and_spellings(text: str) -> None:
    files = {"r.hea": header(["II"], samples=1, gain=text, checksums=[1500])}
    files["r.dat"] = np.array([1500], dtype="<i2").tobytes()
    assert read_files(files).signal_mv_LT.tolist() == [[1.5]]
    latin = files["r.hea"].decode().encode("latin-1")
    assert read_files(files | {"r.hea": latin}).signal_mv_LT.tolist() == [[1.5]]


def test_known_step_replaces_a_wrong_scale() -> None:
    files = {
        "r.hea": header(["II"], samples=1, gain="0(77)/parsec"),
        "r.dat": np.array([250], "<i2").tobytes(),
    }
    record = read_files(files, uv_per_lsb=2.0)
    assert record.signal_mv_LT.tolist() == [[0.5]]
    assert record.uv_per_lsb_L.tolist() == [2.0]


def test_limb_leads_are_derived_only_where_absent() -> None:
    raw = {"I": np.arange(20), "II": 2 * np.arange(20), "aVF": np.full(20, 9)}
    record = read_files(record_files(raw))
    assert record.leads == ("I", "II", "III", "aVR", "aVL", "aVF")
    assert record.derived == ("III", "aVR", "aVL")
    np.testing.assert_allclose(record.signal_for(["III"])[0], np.arange(20) / 200, rtol=1e-6)


# --- attacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../r.dat", "/etc/passwd", "a/b.dat", "..", ".hidden", "a\\b.dat", "C:r.dat", "http://127.0.0.1:9/r.dat",
     "s3://bucket/r.dat", "r\x00.dat", "x" * 300, "\u202er.dat"],
)  # fmt: skip
def test_unsafe_names_are_refused_before_anything_is_fetched(name: str) -> None:
    asked = []

    def fetch(wanted: str) -> bytes:
        asked.append(wanted)
        return header(["II"], file=name)

    with pytest.raises(UnreadableRecording) as caught:
        read_record("r.hea", fetch)
    assert caught.value.code == "unsafe_name"
    assert asked == ["r.hea"]
    with pytest.raises(UnreadableRecording) as caught:
        read_record(name, fetch)
    assert caught.value.code == "unsafe_name"
    assert asked == ["r.hea"]


TWELVE = list(LEADS)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (header(TWELVE, n_signals=10**9), "too_large"),
        (header(TWELVE, n_signals=65), "too_large"),
        (header(TWELVE, n_signals=10**17), "too_large"),
        (header(TWELVE, n_signals=10**40), "format"),
        (header(TWELVE, n_signals=0), "header"),
        (header(TWELVE, n_signals=-1), "header"),
        (header(TWELVE, n_signals=13), "header"),
        (header(TWELVE, n_signals="twelve"), "format"),
        (header(TWELVE, samples=10**12), "too_large"),
        (header(TWELVE, samples=10**7), "too_large"),
        (header(TWELVE, samples=10**40), "header"),
        (header(TWELVE, samples=0), "header"),
        (header(TWELVE, samples=-5), "header"),
        (header(TWELVE, samples=""), "header"),
        (header(TWELVE, samples="1e3"), "header"),
        (header(TWELVE, samples=21), "truncated"),
        (header(TWELVE, samples=1_000_000), "truncated"),
        (header(TWELVE, rate=0), "rate"),
        (header(TWELVE, rate="nan"), "rate"),
        (header(TWELVE, rate="1e300"), "rate"),
        (header(TWELVE, rate="1e-3"), "rate"),
        (header(TWELVE, rate="-500"), "rate"),
        (header(TWELVE, gain="0(0)/mV"), "gain"),
        (header(TWELVE, gain="nan(0)/mV"), "gain"),
        (header(TWELVE, gain="inf/mV"), "gain"),
        (header(TWELVE, gain="1e400/mV"), "gain"),
        (header(TWELVE, gain="1e-300/mV"), "gain"),
        (header(TWELVE, gain="/mV"), "gain"),
        (header(TWELVE, gain="two/mV"), "gain"),
        (header(TWELVE, gain="200(12/mV"), "gain"),
        (header(TWELVE, gain="200(12)x/mV"), "gain"),
        (header(TWELVE, gain="200(x)/mV"), "header"),
        (header(TWELVE, gain="200(99999999999)/mV"), "header"),
        (header(TWELVE, gain="200/mmHg"), "unit"),
        (header(TWELVE, layout="16x100000000"), "too_large"),
        (header(TWELVE, layout="16:999999999"), "header"),
        (header(TWELVE, layout="16+999999999"), "truncated"),
        (header(TWELVE, layout="99"), "format"),
        (header(TWELVE, layout="516"), "format"),
        (header(TWELVE, layout="sixteen"), "format"),
        (header(["ch1", "ABP"]), "no_ecg_lead"),
        (header(["II", "ii", "V1"]), "duplicate_lead"),
        (header(TWELVE, file="other.dat"), "missing_file"),
        (header(TWELVE, record="r/3"), "multi_segment"),
        (header(TWELVE) + b"# " + b"x" * 2**19, "too_large"),
        (b"r 1 500 20\nr.dat 16\n", "no_ecg_lead"),
        (b"r 1 500 20\nr.dat\n", "format"),
        (b"", "format"),
        (b"# only a comment\n", "format"),
        (b"\x00" * 100, "format"),
        (b"r 2 500 20\nr.dat 16 1/mV 16 0 0 0 0 I\nr.dat 212 1/mV 16 0 0 0 0 II\n", "header"),
    ],
)  # fmt: skip
def test_malformed_headers(content: bytes, code: str) -> None:
    """A typed error that names the file, from memory of a few hundred kilobytes."""
    tracemalloc.start()
    error = refusal({"r.hea": content, "r.dat": ZEROS})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == code
    assert "r.hea" in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 400
    assert peak < 4 * 2**20


def test_missing_gain_is_uncalibrated() -> None:
    """The specification's 200 a millivolt is an assumption, not a calibration."""
    content = b"r 1 500 20\nr.dat 16 0 16 0 0 0 0 II\n"
    assert refusal({"r.hea": content, "r.dat": ZEROS}).code == "gain"


def test_largest_record_is_read() -> None:
    samples = reader.MAX_TOTAL_SAMPLES // 12
    content = header(TWELVE, samples=samples)
    assert read_files({"r.hea": content, "r.dat": bytes(24 * samples)}).signal_mv_LT.shape == (12, samples)
    more = header(TWELVE, samples=samples + 1)
    assert refusal({"r.hea": more, "r.dat": bytes(24 * samples + 24)}).code == "too_large"


def test_files_of_an_object_store_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 1000)
    assert refusal({"r.hea": header(TWELVE), "r.dat": bytes(1001)}).code == "too_large"


opened: list[str] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if threading.get_ident() != threading.main_thread().ident:
        return
    if event == "open":
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else "")
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        opened.append(event)


@pytest.fixture
def audited() -> list[str]:
    """What the interpreter opens or connects to, whichever function does it."""
    if _audit not in _installed:
        sys.addaudithook(_audit)
        _installed.append(_audit)
    opened.clear()
    return opened


_installed: list[Callable[..., None]] = []


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in record_files({lead: np.arange(20) for lead in LEADS}).items():
        (folder / name).write_bytes(content)
    return folder / "r.hea"


def test_only_the_two_files_are_opened(recording: Path, audited: list[str]) -> None:
    read(recording.with_suffix(""))
    folder = str(recording.parent.resolve())
    assert sorted(audited) == [f"{folder}/r.dat", f"{folder}/r.hea"]


def test_library_opens_only_its_private_copy(tmp_path: Path, audited: list[str]) -> None:
    counts = np.arange(24).reshape(12, 2)
    (tmp_path / "r.hea").write_bytes(header(TWELVE, samples=2, layout="212"))
    (tmp_path / "r.dat").write_bytes(encode_bits(counts, 212))
    read(tmp_path / "r.hea")
    inside = [path for path in audited if str(tmp_path) in path or "lsemvae-wfdb-" in path]
    assert sorted(set(audited)) == sorted(set(inside))
    private = {Path(path).parent for path in inside if Path(path).parent.name.startswith("lsemvae-wfdb-")}
    assert len(private) == 1
    assert not private.pop().exists()


@pytest.mark.parametrize("name", ["../secret.dat", "/etc/passwd", "http://127.0.0.1:9/x.dat"])
def test_nothing_outside_is_opened(recording: Path, audited: list[str], name: str) -> None:
    (recording.parent.parent / "secret.dat").write_bytes(ZEROS)
    recording.write_bytes(header(TWELVE, file=name))
    audited.clear()
    with pytest.raises(UnreadableRecording):
        read(recording)
    assert audited == [str(recording.resolve())]


def test_links_stay_in_the_folder(recording: Path) -> None:
    data, outside = recording.with_suffix(".dat"), recording.parent.parent / "outside.dat"
    data.rename(outside)
    data.symlink_to(outside)
    with pytest.raises(UnreadableRecording) as caught:
        read(recording)
    assert caught.value.code == "unsafe_name"
    data.unlink()
    outside.rename(recording.parent / "inside.dat")
    data.symlink_to("inside.dat")
    assert read(recording).leads == LEADS


def test_what_is_no_regular_file_is_absent(recording: Path) -> None:
    data = recording.with_suffix(".dat")
    samples = data.read_bytes()
    data.unlink()
    os.mkfifo(data)  # reading it would wait for ever
    with pytest.raises(UnreadableRecording) as caught:
        read(recording)
    assert caught.value.code == "missing_file"
    recording.with_suffix("").mkdir()  # a folder of the record's name does not hide its header
    data.unlink()
    data.write_bytes(samples)
    assert read(recording.with_suffix("")).leads == LEADS


def test_huge_local_file_is_not_read(recording: Path) -> None:
    with recording.with_suffix(".dat").open("r+b") as file:
        file.truncate(formats.MAX_FILE_BYTES + 1)  # sparse
    tracemalloc.start()
    with pytest.raises(UnreadableRecording) as caught:
        read(recording)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "too_large"
    assert peak < 2**20


def test_paths_below_a_source() -> None:
    files = {f"p10/s1/{name}": content for name, content in record_files({"II": np.arange(20)}).items()}
    asked = []

    def read_bytes(path: str, max_bytes: int) -> bytes:
        asked.append(path)
        return in_memory(files)(path)

    assert read_relative("p10/s1/r", read_bytes).record_id == "r"
    assert asked == ["p10/s1/r.hea", "p10/s1/r.dat"]  # an object store is not asked for what is not there
    assert read_relative("p10/s1/r.hea", read_bytes).leads == ("II",)
    top = record_files({"II": np.arange(20)})
    assert read_relative("r", lambda path, max_bytes: in_memory(top)(path)).leads == ("II",)
    for path in ("../p10/s1/r", "/p10/s1/r", "p10/../../r", "", "p10\\r"):
        with pytest.raises(UnreadableRecording) as caught:
            read_relative(path, read_bytes)
        assert caught.value.code == "unsafe_name"


def test_errors_of_the_store_are_not_the_recordings_fault() -> None:
    def fetch(name: str) -> bytes:
        raise ConnectionResetError("mid-body")

    with pytest.raises(ConnectionResetError):
        read_record("r", fetch)


# --- fuzz: only the reader's own error may come out ---------------------------------------------------------

TOKENS = st.sampled_from(
    [b"16", b"212", b"8", b"310", b"508", b"-1", b"0", b"1e9", b"999999999999", b"nan", b"/", b"(", b")",
     b"+24", b"x3", b":2", b"I", b"\n", b" ", b"\t", b"\x00", b"\xff", b"#", b"..", b"~", b"\xc2\xb5V", b"V"]
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=400))
def test_any_bytes_as_header(content: bytes) -> None:
    reads_or_refuses({"r.hea": content, "r.dat": ZEROS})


@settings(deadline=None, max_examples=600)
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 6), TOKENS), min_size=1, max_size=4))
def test_mutated_header(changes: list[tuple[int, int, bytes]]) -> None:
    content = VALID["r.hea"]
    for start, length, token in changes:
        content = content[:start] + token + content[start + length :]
    reads_or_refuses(VALID | {"r.hea": content})


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=600), st.sampled_from(["8", "16", "24", "32", "61", "80", "160", "212", "310", "311"]))
def test_any_bytes_as_signal(data: bytes, layout: str) -> None:
    content = header(["I", "II", "V1"], samples=20, layout=layout)
    reads_or_refuses({"r.hea": content, "r.dat": data})
    reads_or_refuses({"r.hea": content, "r.dat": data}, "r.dat")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_any_name(name: str) -> None:
    reads_or_refuses(VALID, name)


# --- what hospitals' copies look like ------------------------------------------------------------------------


def test_a_header_with_a_byte_order_mark() -> None:
    files = record_files({"II": np.arange(20)})
    files["r.hea"] = b"\xef\xbb\xbf" + files["r.hea"]
    assert formats.wfdb.recognise(files["r.hea"])
    np.testing.assert_allclose(read_files(files).signal_for(["II"])[0], np.arange(20) / 200, rtol=1e-6)


@pytest.mark.parametrize("name", ["r.DAT", "R.DAT", "R.dat"])
def test_a_signal_file_in_other_case(name: str) -> None:
    """Windows tools write X.DAT beside a header that names X.dat."""
    files = record_files({"II": np.arange(20)}, file="R.dat" if name != "R.dat" else "r.dat")
    files[name if name != "R.dat" else "R.DAT"] = files.pop("r.dat")
    assert read_files(files).leads == ("II",)


def test_signal_files_that_differ_in_case_alone_are_ambiguous() -> None:
    files = record_files({"II": np.arange(20)}, file="r.Dat")
    data = files.pop("r.dat")
    with pytest.raises(UnreadableRecording, match=r"may be any of 'r\.DAT', 'r\.dat'") as caught:
        read_files(files | {"r.dat": data, "r.DAT": data})
    assert caught.value.code == "missing_file"
    assert read_files(files | {"r.dat": data, "r.Dat": data}).leads == ("II",)  # the name itself is not ambiguous


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("place", ["samples", "header"])
def test_a_bad_checksum_is_flagged(lead: str, place: str) -> None:
    rng = np.random.default_rng(LEADS.index(lead))
    files = record_files({name: rng.integers(-3000, 3000, 40) for name in LEADS})
    assert read_files(files).flags == ()
    row = LEADS.index(lead)
    if place == "samples":
        data = bytearray(files["r.dat"])
        data[2 * (12 * 17 + row)] ^= 0x10
        damaged = files | {"r.dat": bytes(data)}
    else:
        lines = files["r.hea"].decode().split("\n")
        *before, checksum, block, name = lines[1 + row].split(" ")
        lines[1 + row] = " ".join([*before, str((int(checksum) + 1) % 65536), block, name])
        damaged = files | {"r.hea": "\n".join(lines).encode()}
    record = read_files(damaged)
    assert record.flags == (f"checksum:{lead}",)
    assert reliability(record.leads, (), record.leads, record.flags, LEADS).level == "limited"


def test_samples_of_which_no_lead_has_its_checksum_are_refused() -> None:
    raw = {lead: np.arange(20) * 7 for lead in LEADS}
    files = record_files(raw)
    noise = np.random.default_rng(0).integers(-1000, 1000, (20, 12)).astype("<i2")
    with pytest.raises(UnreadableRecording, match="samples of all 12 leads contradict") as caught:
        read_files(files | {"r.dat": noise.tobytes()})
    assert caught.value.code == "checksum"
    noise[:, 3] = raw["aVR"]
    assert len(read_files(files | {"r.dat": noise.tobytes()}).flags) == 11  # one lead is intact: flagged, not refused
    # A writer that fills in 0 has computed nothing, and one lead alone is no pattern.
    assert len(read_files(record_files(raw, checksums=[0] * 12)).flags) == 12
    assert read_files(record_files({"II": np.arange(20)}, checksums=[1])).flags == ("checksum:II",)


def test_leads_under_other_names_are_read_and_unknown_ones_flagged() -> None:
    names = ["DI", "ECG II", "C1", "V2 (Wilson)", "V7", "patient Smith"]
    record = read_files(record_files({name: np.arange(20) + n for n, name in enumerate(names)}))
    assert [lead for lead in record.leads if lead not in record.derived] == ["I", "II", "V1", "V2"]
    assert record.flags == ("unknown_lead:V7", "unknown_lead:signal 6")


def test_a_signal_in_another_unit_is_no_unknown_lead() -> None:
    files = record_files({"II": np.arange(20), "ABP": np.arange(20)})
    files["r.hea"] = files["r.hea"].replace(b"/mV 16 0 0 190 0 ABP", b"/mmHg 16 0 0 190 0 ABP")
    assert b"mmHg" in files["r.hea"]
    assert read_files(files).flags == ()


def test_an_impossible_gain_hints_at_its_unit() -> None:
    with pytest.raises(UnreadableRecording, match="1000 per mV is 1 per uV") as caught:
        read_files(record_files({"II": np.arange(20)}, gain="2e10(0)/mV"))
    assert caught.value.code == "gain"


@pytest.mark.parametrize(
    "line", ["x 1 {SECRET 5000", "x 1 500 SECRET-7", 'x\t0 {"id": "SECRET-7", ', "x 1 500 9\nSECRET SECRET"]
)
def test_what_is_no_header_is_not_quoted(line: str):
    """It may say who the patient is."""
    with pytest.raises(UnreadableRecording) as refused:
        read_record("x.hea", lambda name: line.encode())
    assert "SECRET" not in str(refused.value)
