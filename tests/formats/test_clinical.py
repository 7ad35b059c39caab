"""MUSE, Sierra, aECG and SCP-ECG through ecgdatakit: against readings by hand, by round trips, and under attack."""

import base64
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.apart import reads_or_refuses
from support.clinical_files import (
    AECG_ORDER,
    BUILDERS,
    STEPS_UV,
    STORED,
    Raw,
    aecg,
    lzw,
    muse,
    pulse,
    random_raw,
    scp,
    scp_record,
    sierra,
)

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import clinical
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.record import Record

MUSE, PHILIPS = "formats/muse/example1.xml", "formats/philips/sierra_1_03.xml"


# --- files as the recorders write them -----------------------------------------------------------------------


def no_fetch(name: str) -> bytes:
    raise AssertionError(f"{name} was asked for")


def read(content: bytes, name: str = "a.ecg", **options: object) -> Record:
    assert clinical.recognise(content[:4096])
    return clinical.read(name, content, no_fetch, **options)


def refusal(content: bytes, **options: object) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        clinical.read("a.ecg", content, no_fetch, **options)
    assert str(caught.value).startswith("a.ecg: ")
    return caught.value


def rows(record: Record) -> dict[str, np.ndarray]:
    return dict(zip(record.leads, record.signal_mv_LT, strict=True))


def assert_holds(record: Record, raw: Raw, step_uv: float) -> None:
    """The same integers, and their millivolts."""
    for lead, counts_T in raw.items():
        row = record.leads.index(lead)
        assert record.uv_per_lsb_L[row] == pytest.approx(step_uv)
        back = np.rint(record.signal_mv_LT[row].astype(float) * 1000 / step_uv)
        np.testing.assert_array_equal(back, counts_T)


# --- real recordings against readings by hand ------------------------------------------------------------------


@pytest.mark.shared_data
def test_muse_equals_a_reading_by_hand(shared_data: Path) -> None:
    path = shared_data / MUSE
    record = read(path.read_bytes(), path.name)
    assert (record.leads, record.rate_hz, record.signal_mv_LT.shape) == (LEADS, 500, (12, 5000))
    assert (record.record_id, record.subject_id, record.flags) == ("example1", None, ())
    assert record.derived == ("III", "aVR", "aVL", "aVF")
    rhythm = ElementTree.fromstring(path.read_bytes()).findall("Waveform")[1]
    assert rhythm.findtext("WaveformType") == "Rhythm"
    for lead in rhythm.findall("LeadData"):
        counts_T = np.frombuffer(base64.b64decode(lead.findtext("WaveFormData")), dtype="<i2")
        assert_holds(record, {lead.findtext("LeadID"): counts_T}, 4.88)


@pytest.mark.shared_data
def test_philips_equals_what_its_recorder_measured(shared_data: Path) -> None:
    """The file's own Q, R and S amplitudes of each lead, in microvolts; and Einthoven, to six leads' roundings."""
    path = shared_data / PHILIPS
    content = path.read_bytes()
    record = read(content, path.name)
    assert (record.leads, record.rate_hz, record.derived, record.flags) == (LEADS, 500, (), ())
    lead = rows(record)
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 0.0101
    assert np.abs(lead["aVF"] - lead["II"] + lead["I"] / 2).max() < 0.0101
    measured = list(ElementTree.fromstring(content).iter("{http://www3.medical.philips.com}leadmeasurement"))
    assert len(measured) == 12
    for found in measured:
        beat_mv_T = lead[found.get("leadname")]
        last_qrs_uv_T = 1000 * (beat_mv_T[4985:5045] - np.median(beat_mv_T[4850:4900]))
        q, r, s = (float(found.findtext(f"{{*}}{tag}")) for tag in ("qamp", "ramp", "samp"))
        assert last_qrs_uv_T.min() == pytest.approx(min(q, s), abs=20), found.get("leadname")
        if r:  # in aVF it found none
            assert last_qrs_uv_T.max() == pytest.approx(r, abs=20), found.get("leadname")


@pytest.mark.shared_data
def test_philips_calibration_is_cut_off(shared_data: Path) -> None:
    """5,500 samples are declared: 5,264 of ECG, then the same zeros and pulse of 1 mV in every lead."""
    content = (shared_data / PHILIPS).read_bytes()
    whole = clinical._parse("restingecgdata", content)
    tails = [lead.samples[5264:] * lead.resolution for lead in whole.leads]
    assert len(tails) == 12
    for tail_T in tails:
        np.testing.assert_array_equal(tail_T, np.repeat([0, 1000, 0], [86, 100, 50]))
    record = read(content)
    assert record.signal_mv_LT.shape == (12, 5264)
    np.testing.assert_allclose(rows(record)["V6"], whole.leads[11].samples[:5264] * 0.005, rtol=1e-6)


@pytest.mark.shared_data
def test_an_empty_document(shared_data: Path) -> None:
    error = refusal((shared_data / "odd/empty.xml").read_bytes())
    assert error.code == "format" and "HL7 aECG" in str(error)


# --- round trips -----------------------------------------------------------------------------------------------


WRITTEN = {
    "muse": (muse, STORED),
    "muse, all leads": (muse, AECG_ORDER),
    "sierra, plain": (lambda raw: sierra(raw, how="Plain"), LEADS),
    "sierra, base64": (lambda raw: sierra(raw, how="Base64"), LEADS),
    "sierra, xli": (lambda raw: sierra(raw, how="XLI"), LEADS),
    "sierra, utf-16": (lambda raw: sierra(raw).decode().replace("UTF-8", "UTF-16").encode("utf-16"), LEADS),
    "aecg": (aecg, AECG_ORDER),
    "scp": (scp, AECG_ORDER),
    "scp, first differences": (lambda raw: scp(raw, difference=1), STORED),
    "scp, huffman": (lambda raw: scp(raw, difference=2, huffman=True), STORED),
}


@pytest.mark.parametrize(("build", "order"), WRITTEN.values(), ids=WRITTEN)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 50))
def test_round_trip(build, order: tuple[str, ...], seed: int, samples: int) -> None:
    raw = random_raw(order, samples, seed)
    content = build(raw)
    record = read(content)
    assert (record.leads, record.rate_hz, record.flags) == (LEADS, 500, ())
    assert record.derived == tuple(lead for lead in LIMB_LEADS if lead not in order)
    assert (record.record_id, record.subject_id) == ("a", None)
    assert_holds(record, raw, 4.88 if build is muse else 5.0)


@pytest.mark.parametrize("name", ["muse", "aecg", "scp"])
def test_leads_are_known_by_name(name: str) -> None:
    order = ("V3", "aVF", "II", "V6", "I", "aVR")
    record = read(BUILDERS[name](random_raw(order)))
    assert_holds(record, random_raw(order), STEPS_UV[name])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_known_step_replaces_the_files(name: str) -> None:
    raw = random_raw()
    record = read(BUILDERS[name](raw), uv_per_lsb=2.0)
    assert_holds(record, raw, 2.0)


UNSCALED = {
    "muse": lambda raw: muse(raw, LeadAmplitudeUnits=""),
    "muse, no step": lambda raw: muse(raw, LeadAmplitudeUnitsPerBit=""),
    "sierra": lambda raw: sierra(raw, resolution=None),
    "aecg": lambda raw: aecg(raw, scale='value="5" unit="mm[Hg]"'),
    "aecg, no step": lambda raw: aecg(raw, scale='value="five" unit="uV"'),
    "scp": lambda raw: scp(raw, nv=0),
}


@pytest.mark.parametrize("build", UNSCALED.values(), ids=UNSCALED)
def test_without_a_step_it_is_refused_until_one_is_given(build) -> None:
    content = build(random_raw())
    error = refusal(content)
    assert error.code == "gain" and "uv_per_lsb" in str(error)
    assert_holds(read(content, uv_per_lsb=5.0), random_raw(), 5.0)


def test_aecg_units_and_origin() -> None:
    raw = random_raw(("I", "V2"))
    record = read(aecg(raw, scale='value="0.00122" unit="mV"', origin="100"))
    for lead, counts_T in raw.items():
        np.testing.assert_allclose(rows(record)[lead], counts_T * 0.00122 + 0.1, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "rate_hz"),
    [
        (aecg(random_raw(), increment="1", unit="ms"), 1000),
        (aecg(random_raw(), increment="0.001667"), 600),  # in few digits
        (aecg(random_raw(), increment="0.0032"), 312.5),
        (scp(random_raw(), interval_us=1667), 600),
        (scp(random_raw(), interval_us=3200), 312.5),
        (scp(random_raw(), interval_us=4000), 250),
        (muse(random_raw(), rate="240"), 240),
    ],
)
def test_rates(content: bytes, rate_hz: float) -> None:
    assert read(content).rate_hz == rate_hz


def test_muse_median_is_never_taken() -> None:
    median = random_raw(AECG_ORDER, samples=90, seed=1)
    assert_holds(read(muse(random_raw(STORED), median=median)), random_raw(STORED), 4.88)
    assert refusal(muse({}, median=median)).code == "format"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda raw: pulse(raw), 40),
        (lambda raw: pulse(raw, 100), 40),
        (lambda raw: {lead: np.append(counts_T, [0] * 20) for lead, counts_T in raw.items()}, 60),
        (lambda raw: {lead: np.append(counts_T, [9] * 20) for lead, counts_T in raw.items()}, 60),
        (lambda raw: pulse(raw) | {"V6": pulse(raw, 199)["V6"]}, 60),
        (lambda raw: pulse(pulse(raw)), 80),
        (lambda raw: dict.fromkeys(raw, raw["I"]), 40),
    ],
    ids=["1 mV", "0.5 mV", "zeros", "held", "not in every lead", "two pulses", "all leads the same"],
)
def test_only_a_calibration_pulse_is_cut_off(change, kept: int) -> None:
    raw = change(random_raw())
    record = read(sierra(raw, how="Base64"))
    assert record.signal_mv_LT.shape == (12, kept)
    assert_holds(record, {lead: counts_T[:kept] for lead, counts_T in raw.items()}, 5.0)


def test_scp_leads_that_begin_apart_are_put_on_one_time_axis() -> None:
    raw = random_raw(("I", "V1", "V4"), samples=20)
    record = read(scp(raw, starts={"I": 101, "V1": 111, "V4": 131}))
    assert record.signal_mv_LT.shape == (3, 50)
    for lead, begin in {"I": 0, "V1": 10, "V4": 30}.items():
        present = np.isin(np.arange(50), np.arange(begin, begin + 20))
        np.testing.assert_array_equal(~np.isnan(rows(record)[lead]), present)
        np.testing.assert_allclose(rows(record)[lead][present], raw[lead] * 0.005, rtol=1e-6)


def test_what_is_no_lead_is_left_out() -> None:
    raw = random_raw(("II", "V7", "-aVR"))
    assert read(scp(raw, codes=[2, 9, 65])).leads == ("II",)
    assert read(muse(raw)).leads == ("II",)
    assert refusal(scp(random_raw(("V7",)), codes=[9])).code == "no_ecg_lead"


def test_a_wrong_checksum_is_flagged() -> None:
    content = bytearray(scp(random_raw()))
    content[-5] ^= 1
    assert read(bytes(content)).flags == ("checksum",)
    assert read(muse(random_raw(), crc=5)).flags == ("checksum",)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (muse({"I": [1, 2], "twice I": [3, 4]}), "duplicate_lead"),
        (scp(random_raw(("I", "II")), codes=[1, 1]), "duplicate_lead"),
        (aecg(random_raw(), increment="0"), "format"),
        (aecg(random_raw(), increment="1e-9"), "rate"),
        (aecg({"I": ["1", "x"]}), "format"),
        (aecg({"I": ["1", "1e400"]}), "sample"),
        (aecg({"I": ["1", "1e20"]}), "sample"),
        (aecg({}), "format"),
        (aecg(random_raw(), scale='value="1e-30" unit="uV"'), "gain"),
        (muse(random_raw(), rate="0"), "format"),
        (muse(random_raw(), LeadSampleCountTotal="41"), "format"),
        (muse(random_raw(), LeadAmplitudeUnitsPerBit="0"), "gain"),
        (muse(random_raw()).replace(b"<WaveFormData>", b"<WaveFormData>*"), "format"),
        (sierra(random_raw(), data="1 2 3"), "format"),
        (sierra(random_raw()).replace(b">1.03<", b">9.99<"), "format"),
        (sierra(random_raw(), how="XLI", data="*"), "format"),
        (scp(random_raw())[:200], "format"),
        (scp(random_raw(), starts={"I": 4_000_000_000}), "too_large"),
        (scp_record({3: struct.pack("<BBIIB", 1, 4, 1, 4_000_000_000, 1), 6: bytes(10)}), "format"),
        (scp(random_raw(), interval_us=0), "format"),
    ],
)
def test_refusals(content: bytes, expected: str) -> None:
    error = refusal(content)
    assert error.code == expected, str(error)
    assert "SECRET" not in str(error) and "/tmp" not in str(error)


def test_messages_say_what_can_be_acted_on() -> None:
    assert "9.99" in str(refusal(sierra(random_raw()).replace(b">1.03<", b">9.99<")))
    assert "declares" in str(refusal(scp(random_raw())[:200]))


def test_without_ecgdatakit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    clinical._ecgdatakit.cache_clear()
    monkeypatch.setitem(sys.modules, "ecgdatakit.parsing.parsers.scp_ecg", None)
    error = refusal(scp(random_raw()))
    clinical._ecgdatakit.cache_clear()
    assert error.code == "missing_package" and "pip install 'lsemvae[formats]'" in str(error)


def test_recognised_by_content() -> None:
    assert not any(map(clinical.recognise, (b"", bytes(64), b"<html>", b"<CardiologyXML>", b"r 1 500 10\n")))
    comment = b"<?xml version='1.0'?><!-- <RestingECG> -->"
    assert not clinical.recognise(comment + b"<other/>")
    assert clinical.recognise(comment + b"\n<a:AnnotatedECG xmlns:a='x'/>")


BOMB = '<!DOCTYPE {0} [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "{1}"><!ENTITY c "{2}"><!ENTITY d "{3}">]>'
DECLARATIONS = {
    "bomb": BOMB.format("{}", "&a;" * 200, "&b;" * 200, "&c;" * 200),
    "external entity": '<!DOCTYPE {} [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
    "parameter entity": '<!DOCTYPE {} [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x"> %a;]>',
}


@pytest.mark.parametrize("name", ["muse", "sierra", "aecg"])
@pytest.mark.parametrize("declaration", DECLARATIONS.values(), ids=DECLARATIONS)
def test_declarations_are_refused_before_the_library_sees_them(
    name: str, declaration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clinical, "_parse", lambda kind, content: pytest.fail("it was given to the library"))
    text = re.sub("<!DOCTYPE.*?>", "", BUILDERS[name](random_raw()).decode("latin-1"))
    head, root, body = re.fullmatch(r"(<\?xml.*?\?>)\s*<(\w+)(.*)", text, re.DOTALL).groups()
    assert refusal(f"{head}{declaration.format(root)}<{root}{body}".encode("latin-1")).code == "unsafe_xml"


def test_a_named_dtd_is_muses_alone() -> None:
    content = sierra(random_raw()).replace(
        b"<restingecgdata", b'<!DOCTYPE restingecgdata SYSTEM "x.dtd"><restingecgdata'
    )
    assert refusal(content).code == "unsafe_xml"


LONGEST = [0, *range(256, 1023), *[1022] * 11_000]  # each code one byte more than the one before: 8.7 MB of 14 kB
ATTACKS = {
    "xli that unpacks to 100 MB": sierra(
        random_raw(), how="XLI", data=base64.b64encode(lzw(LONGEST) * 12).decode()
    ),
    "xli of many leads": sierra(random_raw(), how="XLI", data=base64.b64encode(lzw([1] * 8) * 100_000).decode()),
    "xml too long": aecg({"I": [0] * (2**23 // 2)}),
    "scp too long": scp(random_raw()) + bytes(2**20),
    "4 billion samples": scp_record(
        {2: struct.pack("<H", 19999), 3: struct.pack("<BBIIB", 1, 4, 1, 2**32 - 1, 1), 6: bytes(2**15)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", ATTACKS.values(), ids=ATTACKS)
def test_memory_is_bounded(content: bytes) -> None:
    read(scp(random_raw()))  # imports what it imports
    before = int(Path("/proc/self/statm").read_text().split()[1])
    tracemalloc.start()
    try:
        assert refusal(content).code in ("too_large", "format")
        # What numpy reserves and never touches (4 billion samples) counts for tracemalloc; what is resident does not.
        if len(content) > 2**16:
            assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert (int(Path("/proc/self/statm").read_text().split()[1]) - before) * 4096 < 60 * 2**20


def test_nothing_is_said_about_a_file(tmp_path: Path) -> None:
    """Odd and damaged files, read in threads with every warning on: no warning, no log line, nobody's name."""
    for index, content in enumerate([
        muse(random_raw(), crc=5, LeadAmplitudeUnits="Jane", FirstSampleBaseline="3"),
        muse(random_raw(), crc=5),
        aecg(random_raw(), increment="0.0032", scale='value="1" unit="Jane"'),
        sierra(random_raw(), resolution=None),
        scp(random_raw(), nv=0)[:-1] + b"x",
        scp(random_raw())[:-1] + b"x",
    ]):  # fmt: skip
        (tmp_path / f"{index}.ecg").write_bytes(content)
    program = """
import logging, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from lsemvae.formats import clinical
def attempt(path):
    try:
        return f"read {clinical.read(path.name, path.read_bytes(), None).flags}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(attempt, sorted(Path(sys.argv[1]).iterdir()) * 3)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "UnreadableRecording" in done.stdout and "read ('checksum',)" in done.stdout
    assert "Jane" not in done.stdout and "SECRET" not in done.stdout


DAMAGEABLE = [build(random_raw(samples=4)) for build, order in WRITTEN.values() if order != STORED]
DAMAGEABLE += [scp(random_raw(STORED, samples=4), difference=2, huffman=True)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DAMAGEABLE), st.data())
def test_damaged_bytes_raise_nothing_else(content: bytes, data) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    reads_or_refuses({"a.ecg": bytes(damaged[:cut])})


def test_scp_that_deviates_from_the_standard_is_recognised_and_explained() -> None:
    """Some devices count pointers from 0. Section 0 still names SCP-ECG; what cannot be read says why."""
    content = scp(random_raw())
    assert content[16:22] == b"SCPECG" and content[28:32] == b"\7\0\0\0"
    assert_holds(read(content[:28] + b"\6" + content[29:]), random_raw(), 5.0)
    shifted = bytearray(content)
    for pointer in (38, 48):
        position = int.from_bytes(content[pointer : pointer + 4], "little") - 1
        shifted[pointer : pointer + 4] = position.to_bytes(4, "little")
    error = refusal(bytes(shifted))
    assert error.code == "format"
    assert "points to section 3" in str(error) and "export DICOM, XML or CSV instead" in str(error)
