"""AliveCor's `.atc` and Kardia JSON: against a reading by hand of real files, by round trips, and damaged."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.alivecor_files import (
    BLOCKS,
    DERIVED,
    EXAMPLE,
    HEAD,
    INFO,
    KARDIA_EXAMPLE,
    NAMES,
    SIX,
    block,
    ecg,
    fmt,
    kardia,
)

from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import alivecor, read, read_record
from lsemvae.leads import LIMB_LEADS
from lsemvae.quality import quality_flags
from lsemvae.record import Record


def read_bytes(content: bytes, name: str = "a.bin", **options: object) -> Record:
    return read_record(name, {name: content}.__getitem__, **options)


def refusal(content: bytes) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        read_bytes(content)
    assert str(caught.value).startswith("a.bin: ")
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def counts_of(record: Record, lead: str) -> np.ndarray:
    row = record.leads.index(lead)
    counts_T = record.signal_mv_LT[row].astype(np.float64) * 1000 / record.uv_per_lsb_L[row]
    np.testing.assert_allclose(counts_T, np.rint(counts_T), atol=0.02)
    return np.rint(counts_T).astype(np.int64)


# --- .atc ---------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("path", "leads", "samples", "flags"),
    [
        ("formats/alivecor/6_lead.atc", LIMB_LEADS, 9000, ()),
        ("formats/alivecor/1_lead.atc", ("I",), 9000, ()),
        ("odd/test_AFib_ef_signed_checksum.atc", ("I",), 8999, ()),
        ("odd/broken_checksum.atc", ("I",), 9000, ("checksum:I",)),
    ],
)
def test_equals_a_reading_by_hand_of_real_files(
    shared_data: Path, path: str, leads: tuple[str, ...], samples: int, flags: tuple[str, ...]
) -> None:
    content = (shared_data / path).read_bytes()
    record = read(shared_data / path)
    assert (record.leads, record.rate_hz, record.flags) == (leads, 300.0, flags)
    assert (record.record_id, record.subject_id) == (Path(path).stem, None)
    assert record.derived == (DERIVED if len(leads) > 1 else ())
    for lead in leads:
        start = content.index(BLOCKS[lead] + struct.pack("<I", 2 * samples)) + 8
        by_hand = struct.unpack(f"<{samples}h", content[start : start + 2 * samples])
        expected_mv_T = (np.array(by_hand) * 0.0005).astype(np.float32)  # 500 nV
        np.testing.assert_allclose(record.signal_for([lead])[0], expected_mv_T, rtol=1e-6)
        np.testing.assert_array_equal(counts_of(unpack(pack(record)), lead), by_hand)
    assert not {flag.partition(":")[0] for flag in quality_flags(record)} & {"einthoven", "out_of_range", "rail", "nan"}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
    st.integers(1, 1000),
    st.integers(1, 65535),
    st.booleans(),
    st.permutations(LIMB_LEADS),
    st.integers(1, 6),
)
def test_round_trip(
    samples: int, seed: int, rate: int, nv: int, signed: bool, order: Sequence[str], n_leads: int
) -> None:
    """Blocks in any order, either checksum, blocks that nobody knows between."""
    rng = np.random.default_rng(seed)
    counts = {lead: rng.integers(-32768, 32768, samples) for lead in order[:n_leads]}
    blocks = [ecg(lead, row, signed=signed) for lead, row in counts.items()]
    blocks += [block(b"ann ", rng.bytes(5)), fmt(1, rate, nv, signed=signed), INFO]
    rng.shuffle(blocks)
    record = read_bytes(HEAD + b"".join(blocks))
    assert (record.rate_hz, record.flags) == (rate, ())
    for lead, row in counts.items():
        np.testing.assert_array_equal(counts_of(record, lead), row)
        np.testing.assert_allclose(record.signal_for([lead])[0], row * (nv / 1e6), rtol=1e-6)


def test_computed_leads_are_called_derived_and_kept_as_stored() -> None:
    record = read_bytes(EXAMPLE["six.atc"])
    assert (record.leads, record.derived, record.flags) == (LIMB_LEADS, DERIVED, ())
    for lead, row in SIX.items():
        np.testing.assert_array_equal(counts_of(record, lead), row)


def test_what_is_no_arithmetic_on_i_and_ii_passes_as_measured() -> None:
    changed = {lead: row.copy() for lead, row in SIX.items()}
    changed["aVF"][7] += 500
    record = read_bytes(HEAD + fmt() + b"".join(ecg(lead, row) for lead, row in changed.items()))
    assert record.derived == ("III", "aVR", "aVL")
    assert "einthoven" in quality_flags(record)


def test_leads_that_are_absent_are_derived() -> None:
    record = read_bytes(HEAD + fmt() + ecg("I", SIX["I"]) + ecg("II", SIX["II"]))
    assert (record.leads, record.derived) == (LIMB_LEADS, DERIVED)


@pytest.mark.parametrize("byte", [3, 8, 20])
def test_corrupt_byte_is_flagged(byte: int) -> None:
    content = bytearray(EXAMPLE["six.atc"])
    content[content.index(b"ecg3") + 8 + byte] ^= 0x10
    assert read_bytes(bytes(content)).flags == ("checksum:III",)


def test_known_step_replaces_the_resolution() -> None:
    record = read_bytes(HEAD + fmt(nv=0) + ecg("I", [1, 2]), uv_per_lsb=2.0)
    np.testing.assert_allclose(record.signal_mv_LT, [[0.002, 0.004]], rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (HEAD[:10], "truncated"),
        (HEAD, "header"),
        (HEAD + INFO, "header"),
        (HEAD + ecg("I", [1]), "header"),
        (HEAD + fmt(), "no_ecg_lead"),
        (HEAD + fmt() + block(b"ecg7", b"\0\0"), "no_ecg_lead"),
        (HEAD + fmt() + ecg("I", []), "length"),
        (HEAD + fmt() + ecg("I", [1, 2]) + ecg("II", [1]), "length"),
        (HEAD + fmt() + ecg("I", [1]) + ecg("I", [1]), "duplicate_lead"),
        (HEAD + fmt() + block(b"ecg ", b"abc"), "truncated"),
        (HEAD + fmt() + fmt() + ecg("I", [1]), "header"),
        (HEAD + block(b"fmt ", b"\x01") + ecg("I", [1]), "header"),
        (HEAD + fmt(damage=1) + ecg("I", [1]), "checksum"),
        (HEAD + fmt(encoding=2) + ecg("I", [1]), "format"),
        (HEAD + fmt(rate=0) + ecg("I", [1]), "rate"),
        (HEAD + fmt(nv=0) + ecg("I", [1]), "gain"),
        (HEAD + fmt() + ecg("I", [1])[:-1], "truncated"),
        (HEAD + fmt() + b"ecg " + struct.pack("<I", 2**32 - 1), "truncated"),
        (HEAD + fmt() + b"ecg " + struct.pack("<I", 2**32 - 1) + bytes(99), "truncated"),
        (HEAD + fmt() + ecg("I", [1]) + b"\0", "truncated"),
        (HEAD + fmt() + ecg("I", [1]) + block(b"ann ", b"") * 2000, "too_large"),
    ],
)  # fmt: skip
def test_malformed(content: bytes, code: str) -> None:
    assert refusal(content).code == code


def test_damaged_info_is_not_looked_at() -> None:
    content = HEAD + block(b"info", b"SECRET", damage=1) + fmt() + ecg("I", [1])
    assert read_bytes(content).flags == ()


# --- Kardia JSON --------------------------------------------------------------------------------------------


def test_kardia_reads_what_was_recorded() -> None:
    record = read_bytes(KARDIA_EXAMPLE["six.json"], "b.json")
    assert (record.leads, record.derived, record.flags, record.record_id) == (LIMB_LEADS, DERIVED, (), "b")
    assert (record.rate_hz, record.subject_id) == (300.0, None)
    for lead, row in SIX.items():
        np.testing.assert_array_equal(counts_of(record, lead), row)
        np.testing.assert_allclose(record.signal_for([lead])[0], row * 0.0005, rtol=1e-6)


def test_kardia_equals_ecgdatakit(tmp_path: Path) -> None:
    ecgdatakit = pytest.importorskip("ecgdatakit")
    (tmp_path / "a.json").write_bytes(KARDIA_EXAMPLE["six.json"])
    record = read(tmp_path / "a.json")
    for theirs in ecgdatakit.FileParser().parse(tmp_path / "a.json").leads:
        np.testing.assert_allclose(record.signal_for([theirs.label])[0], theirs.samples, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.floats(1, 10_000),
)
def test_kardia_round_trip(names: list[str], samples: int, seed: int, nv: float) -> None:
    rng = np.random.default_rng(seed)
    counts = {name: rng.integers(-32768, 32768, samples).tolist() for name in names}
    record = read_bytes(kardia(counts, block={"frequency": 125.5, "amplitudeResolution": nv}))
    assert record.rate_hz == 125.5
    for name, row in counts.items():
        lead = LIMB_LEADS[NAMES.index(name)]
        np.testing.assert_array_equal(counts_of(record, lead), row)
        np.testing.assert_allclose(record.signal_for([lead])[0], np.array(row) * (nv / 1e6), rtol=1e-5)


def test_kardia_falls_back_to_the_filtered_signal_and_says_so() -> None:
    answer = json.loads(KARDIA_EXAMPLE["six.json"])
    answer["data"].pop("raw")
    record = read_bytes(json.dumps(answer).encode())
    assert record.flags == ("enhanced",)
    assert not record.signal_mv_LT.any()


@pytest.mark.parametrize("first", ["id", "data", "recordedAt", "deviceInfo"])
def test_kardia_is_recognised_in_any_order(first: str) -> None:
    answer = {"deviceInfo": {"hardwareType": "kardia_6l"}} | json.loads(kardia({"leadI": [1] * 9000}))
    ordered = {first: answer[first]} | answer
    for text in (json.dumps(ordered), json.dumps(ordered, indent=1), "\ufeff" + json.dumps(ordered)):
        assert read_bytes(text.encode()).leads == ("I",)


def text_kardia(samples: str = '"leadI":[1,2]', rate: str = "300", nv: str = "500", rest: str = "") -> bytes:
    raw = f'{{"frequency":{rate},"amplitudeResolution":{nv},"samples":{{{samples}}}}}'
    return f'{{"recordedAt":"x","patientID":"SECRET-7","data":{{"raw":{raw}}}{rest}}}'.encode()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (text_kardia('"leadI":[1,NaN]'), "json"),
        (text_kardia('"leadI":[1,Infinity]'), "json"),
        (text_kardia('"leadI":[1,-Infinity]'), "json"),
        (text_kardia('"leadI":[1,1e400]'), "sample"),
        (text_kardia('"leadI":[1,1.5]'), "sample"),
        (text_kardia('"leadI":[1,null]'), "sample"),
        (text_kardia('"leadI":[1,true]'), "sample"),
        (text_kardia('"leadI":[1,"2"]'), "sample"),
        (text_kardia('"leadI":[1,[2]]'), "sample"),
        (text_kardia('"leadI":[1,9999999999]'), "sample"),
        (text_kardia('"leadI":[1,' + "9" * 4000 + "]"), "sample"),
        (text_kardia('"leadI":[1,' + "9" * 5000 + "]"), "json"),
        (text_kardia('"leadI":"1,2"'), "sample"),
        (text_kardia('"leadI":[]'), "length"),
        (text_kardia('"leadI":[1,2],"leadII":[1]'), "length"),
        (text_kardia('"leadI":[1],"leadI":[2]'), "json"),
        (text_kardia('"leadI":[1],"LEADI":[2]'), "duplicate_lead"),
        (text_kardia('"leadI":[1],"leadX":[2]'), "no_ecg_lead"),
        (text_kardia(""), "no_ecg_lead"),
        (text_kardia(rate="0"), "header"),
        (text_kardia(rate="1e400"), "header"),
        (text_kardia(rate="1e9"), "rate"),
        (text_kardia(rate="true"), "header"),
        (text_kardia(rate='"300"'), "header"),
        (text_kardia(rate="9" * 4000), "header"),
        (text_kardia(nv="-500"), "header"),
        (text_kardia(nv="null"), "header"),
        (text_kardia(nv="1e-9"), "gain"),
        (text_kardia(rest=',"data12L":{}'), "format"),
        (text_kardia(rest=',"recordedAt":"y"'), "json"),
        (text_kardia() + b"x", "json"),
        (text_kardia()[:-1], "json"),
        (text_kardia().replace(b"SECRET", b"\xff"), "json"),
        (text_kardia(rest=',"x":' + "[" * 9000 + "]" * 9000), "json"),
        (text_kardia(rest=',"x":' + "[" * 10**5 + "]" * 10**5), "too_large"),
        (b'{"recordedAt":"x"}', "no_signal"),
        (b'{"recordedAt":"x","data":[1]}', "no_signal"),
        (b'{"recordedAt":"x","data":{"raw":{}}}', "no_signal"),
        (b'{"recordedAt":"x","data":{"raw":[1]}}', "no_signal"),
        (b'{"recordedAt":"x","data":{"raw":{"samples":[1]}}}', "no_signal"),
    ],
)  # fmt: skip
def test_malformed_kardia(content: bytes, code: str) -> None:
    assert refusal(content).code == code


def test_kardia_object_is_needed() -> None:
    with pytest.raises(UnreadableRecording) as caught:
        alivecor.read_kardia("a.json", b"[1]", {}.__getitem__)
    assert caught.value.code == "json"


def test_all_checksums_wrong_is_refused() -> None:
    """One wrong checksum is a flag; without one that is right, nothing says that these are samples."""
    content = bytearray(EXAMPLE["six.atc"])
    for kind in (b"ecg ", b"ecg2", b"ecg3", b"ecg4", b"ecg5", b"ecg6"):
        start = content.index(kind) + 8
        content[start] ^= 0x55
    with pytest.raises(UnreadableRecording, match="checksums of all its leads") as caught:
        read_record("six.atc", lambda name: bytes(content))
    assert caught.value.code == "checksum"
