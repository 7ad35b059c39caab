"""The DICOM reader: against pydicom's own arrays on real files, by round trips, and under attack."""

import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian
from pydicom.uid import ImplicitVRLittleEndian as ImplicitVR
from support.apart import reads_or_refuses
from support.dicom_files import NUMBERS, channel, code, dicom_bytes, group, random_raw

from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import dicom
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.record import Record

IN_THE_WHEEL = Path(pydicom.__file__).parent / "data/test_files/waveform_ecg.dcm"
REAL = ["formats/dicom/resting_12lead_500hz.dcm", "odd/hemodynamic_sop_240Hz.dcm"]


# --- files as pydicom writes them ----------------------------------------------------------------------------


def read(content: bytes, name: str = "a.dcm", **options: object) -> Record:
    assert dicom.recognise(content[:4096])
    return dicom.read(name, content, no_fetch, **options)


def no_fetch(name: str) -> bytes:
    raise AssertionError(f"{name} was asked for")


def refusal(content: bytes, **options: object) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        dicom.read("a.dcm", content, no_fetch, **options)
    assert str(caught.value).startswith("a.dcm: ")
    return caught.value


def rows(record: Record) -> dict[str, np.ndarray]:
    return dict(zip(record.leads, record.signal_mv_LT, strict=True))


def assert_holds(record: Record, raw: Mapping[str, np.ndarray], step_uv: float = 5.0) -> None:
    found = rows(record)
    for lead, counts_T in raw.items():
        np.testing.assert_allclose(found[lead], np.asarray(counts_T) * step_uv / 1000, rtol=1e-6, atol=1e-9)


# --- real recordings against pydicom ---------------------------------------------------------------------------


def assert_equals_pydicom(path: Path, rate_hz: float, samples: int) -> None:
    content = path.read_bytes()
    record = read(content, path.name)
    assert (record.leads, record.rate_hz, record.signal_mv_LT.shape) == (LEADS, rate_hz, (12, samples))
    assert (record.record_id, record.subject_id, record.flags, record.derived) == (path.stem, None, (), ())
    dataset = pydicom.dcmread(path)
    physical_TC, raw_TC = dataset.waveform_array(0), pydicom.waveforms.multiplex_array(dataset, 0)
    for index, definition in enumerate(dataset.WaveformSequence[0].ChannelDefinitionSequence):
        lead = definition.ChannelSourceSequence[0].CodeMeaning.split("(")[0].removeprefix("Lead").strip()
        per_mv = {"uV": 1000, "mV": 1}[definition.ChannelSensitivityUnitsSequence[0].CodeValue]
        row = record.leads.index(lead)
        np.testing.assert_allclose(record.signal_mv_LT[row], physical_TC[:, index] / per_mv, rtol=1e-6, atol=1e-9)
        counts = np.rint(record.signal_mv_LT[row].astype(float) * 1000 / record.uv_per_lsb_L[row])
        np.testing.assert_array_equal(counts, raw_TC[:, index])
    lead = rows(record)
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 0.0051


@pytest.mark.shared_data
@pytest.mark.parametrize(("path", "rate_hz", "samples"), [(REAL[0], 500, 5000), (REAL[1], 240, 2400)])
def test_equals_pydicom_on_real_recordings(shared_data: Path, path: str, rate_hz: float, samples: int) -> None:
    assert_equals_pydicom(shared_data / path, rate_hz, samples)


def test_equals_pydicom_on_the_recording_in_its_wheel() -> None:
    """1000 Hz, a rhythm and a median group."""
    assert_equals_pydicom(IN_THE_WHEEL, 1000, 10_000)


def test_a_real_recording_cut_short_is_never_read_as_another() -> None:
    """A file that is cut before the end of its waveforms is refused; what follows them does not matter."""
    content = IN_THE_WHEEL.read_bytes()
    whole = read(content)
    median = content.index(b"MEDIAN BEAT")
    for cut in (*range(200, median, 40_011), median - 100, median + 100):
        assert refusal(content[:cut]).code in ("truncated", "header", "no_ecg_lead"), cut
    np.testing.assert_array_equal(read(content[:-1]).signal_mv_LT, whole.signal_mv_LT)


# --- leads, units, rates -----------------------------------------------------------------------------------------


ORDERS = {"shuffled": ("V3", "aVF", "II", "V6", "I", "aVR", "V1", "III", "V5", "aVL", "V2", "V4"), "six": LIMB_LEADS}
SPELLINGS = {
    "SCP-ECG": lambda lead: code(f"5.6.3-9-{NUMBERS[lead]}", "SCPECG", "anything"),
    "MDC": lambda lead: code(f"2:{NUMBERS[lead]}", "MDC", "anything"),
    "text": lambda lead: code("X-17", "99LOCAL", f"Lead {lead.upper()} (Einthoven)"),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_leads_are_known_by_name_whatever_their_order(order: tuple[str, ...], spelling) -> None:
    raw = random_raw(*order)
    record = read(dicom_bytes(group(raw, [channel(lead, source=spelling(lead)) for lead in order])))
    assert record.leads == tuple(lead for lead in LEADS if lead in order)
    assert_holds(record, raw)


def test_a_code_outranks_the_text_beside_it() -> None:
    raw = random_raw("I", "II", "V1")
    sources = [code("5.6.3-9-1", "SCPECG", "Lead II"), code("2:2", "MDC", "Lead I"), code("5.6.3-9-3", "SCPECG", "V6")]
    record = read(dicom_bytes(group(raw, [channel("", source=source) for source in sources])))
    assert_holds(record, raw)


def test_what_is_no_lead_is_left_out() -> None:
    sources = [code("5.6.3-9-2", "SCPECG"), code("5.6.3-9-11", "SCPECG", "Lead V1"), code("2:65", "MDC", "-aVR")]
    sources += [code("X", "99LOCAL", "-aVR"), code("X", "99LOCAL", "Respiration")]
    raw = random_raw("II", "V2R", "-aVR", "-aVR too", "breath")
    record = read(dicom_bytes(group(raw, [channel("", source=source) for source in sources])))
    assert record.leads == ("II",)
    assert_holds(record, {"II": raw["II"]})


def test_a_label_names_the_lead_where_the_source_does_not() -> None:
    item = channel("", source=code("X", "99LOCAL", "?"), ChannelLabel="avl")
    assert read(dicom_bytes(group(random_raw("aVL"), [item]))).leads == ("aVL",)


def test_eight_leads_give_twelve() -> None:
    raw = random_raw("V6", "V5", "V4", "V3", "V2", "V1", "II", "I")
    record = read(dicom_bytes(group(raw)))
    assert record.leads == LEADS
    assert record.derived == ("III", "aVR", "aVL", "aVF")
    assert_holds(record, raw)
    np.testing.assert_allclose(rows(record)["III"], (raw["II"] - raw["I"]) * 0.005, atol=1e-5)


@pytest.mark.parametrize(
    ("elements", "step_uv", "offset_uv"),
    [
        ({"unit": "uV", "ChannelSensitivity": "1.25"}, 1.25, 0),
        ({"unit": "mV", "ChannelSensitivity": "0.00122"}, 1.22, 0),
        ({"unit": "V", "ChannelSensitivity": "5e-6"}, 5, 0),
        ({"unit": "nV", "ChannelSensitivity": "4880"}, 4.88, 0),
        ({"ChannelSensitivityCorrectionFactor": "0.5", "ChannelBaseline": "20"}, 2.5, 20),
        ({"unit": "mV", "ChannelSensitivity": "0.005", "ChannelBaseline": "-0.1"}, 5, -100),
        ({"ChannelSensitivityCorrectionFactor": None, "ChannelBaseline": None}, 5, 0),
        ({"ChannelSensitivity": "-5"}, -5, 0),
    ],
)
def test_values_are_in_the_channels_own_unit(elements: dict, step_uv: float, offset_uv: float) -> None:
    raw = random_raw("I", "V2")
    record = read(dicom_bytes(group(raw, [channel("I", **elements), channel("V2")])))
    np.testing.assert_allclose(rows(record)["I"], (raw["I"] * step_uv + offset_uv) / 1000, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rows(record)["V2"], raw["V2"] * 0.005, rtol=1e-6)
    np.testing.assert_allclose(record.uv_per_lsb_L, [abs(step_uv), 5])


@pytest.mark.parametrize("rate", ["250", "1000", "240", "499.5"])
def test_the_rate_is_the_groups_own(rate: str) -> None:
    assert read(dicom_bytes(group(random_raw(), SamplingFrequency=rate))).rate_hz == float(rate)


@pytest.mark.parametrize(
    ("bits", "kind", "dtype", "low", "high"),
    [
        (8, "SB", "i1", -100, 100),
        (8, "UB", "u1", 0, 250),
        (16, "US", "<u2", 0, 60_000),
        (32, "SL", "<i4", -100_000, 100_000),
        (32, "UL", "<u4", 0, 100_000),
    ],
)
def test_sample_formats(bits: int, kind: str, dtype: str, low: int, high: int) -> None:
    raw = {"I": np.arange(low, high, (high - low) // 20)[:20]}
    assert_holds(
        read(dicom_bytes(group(raw, dtype=dtype, WaveformBitsAllocated=bits, WaveformSampleInterpretation=kind))), raw
    )


@pytest.mark.parametrize("syntax", [ImplicitVR, ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.name)
@pytest.mark.parametrize("undefined_length", [False, True])
def test_encodings(syntax: str, undefined_length: bool) -> None:
    raw = random_raw()
    raw["V1"][3] = -32768
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    item = group(raw, dtype=f"{order}i2", WaveformPaddingValue=np.array([-32768], f"{order}i2").tobytes())
    item["WaveformPaddingValue"].VR = "OW"
    record = read(dicom_bytes(item, syntax=syntax, undefined_length=undefined_length))
    assert np.argwhere(np.isnan(record.signal_mv_LT)).tolist() == [[LEADS.index("V1"), 3]]
    assert_holds(record, {lead: counts_T for lead, counts_T in raw.items() if lead != "V1"})


def test_a_file_without_its_preamble() -> None:
    raw = random_raw()
    content = dicom_bytes(group(raw))
    assert content[128:132] == b"DICM"
    assert_holds(read(content[132:]), raw)


def test_padding_is_kept_as_missing_in_shards() -> None:
    raw = random_raw("I", "II")
    raw["I"][5:9] = -32768
    content = dicom_bytes(group(raw, WaveformPaddingValue=b"\x00\x80"))
    back = unpack(pack(read(content)))
    assert np.flatnonzero(np.isnan(rows(back)["I"])).tolist() == [5, 6, 7, 8]
    assert_holds(back, {"II": raw["II"]})


def test_a_known_step_replaces_scale_and_unit() -> None:
    raw = random_raw("I", "II")
    channels = [channel("I", ChannelSensitivity=None, unit=None), channel("II", ChannelBaseline="7", unit="mm[Hg]")]
    record = read(dicom_bytes(group(raw, channels)), uv_per_lsb=2.0)
    assert_holds(record, raw, step_uv=2.0)


# --- which group, and when ---------------------------------------------------------------------------------------


BEATS = {
    "labelled": {"MultiplexGroupLabel": "MEDIAN BEAT"},
    "labelled alone": {"MultiplexGroupLabel": "Median", "WaveformOriginality": "ORIGINAL"},
    "derived": {"MultiplexGroupLabel": None},
    "representative": {"MultiplexGroupLabel": "REPRESENTATIVE"},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("label", ["RHYTHM", None])
@pytest.mark.parametrize("beat", BEATS.values(), ids=BEATS)
def test_the_rhythm_is_taken_wherever_it_stands(beat: dict, label: str | None, first: bool) -> None:
    """Also where the beat has more samples and leads than the rhythm."""
    raw, median = random_raw(*LIMB_LEADS, samples=40), random_raw(*LEADS, samples=99, seed=1)
    beat = group(median, **{"WaveformOriginality": "DERIVED"} | beat)
    groups = [beat, group(raw, MultiplexGroupLabel=label)]
    record = read(dicom_bytes(*groups if first else reversed(groups)))
    assert record.leads == LIMB_LEADS
    assert_holds(record, raw)


@pytest.mark.parametrize("beat", BEATS.values(), ids=BEATS)
def test_a_beat_alone_is_refused(beat: dict) -> None:
    content = dicom_bytes(group(random_raw(), **{"WaveformOriginality": "DERIVED"} | beat))
    assert refusal(content).code == "no_ecg_lead"


def test_original_before_derived_then_most_leads_then_longest() -> None:
    raws = [
        random_raw(*leads, samples=n, seed=n) for leads, n in ((LEADS, 90), (("II",), 80), (LEADS, 30), (LEADS, 50))
    ]
    originality = ["DERIVED", "ORIGINAL", "ORIGINAL", "ORIGINAL"]
    groups = [group(raw, WaveformOriginality=word) for raw, word in zip(raws, originality, strict=True)]
    assert_holds(read(dicom_bytes(*groups)), raws[3])
    assert_holds(read(dicom_bytes(groups[0])), raws[0])  # a filtered rhythm, where there is no other


def test_leads_in_several_groups_are_put_on_one_time_axis() -> None:
    """3 x 4 leads of 40 samples, one after the other at 500 Hz: 80 ms each."""
    parts = [("I", "II", "III"), ("aVR", "aVL", "aVF"), ("V1", "V2", "V3"), ("V4", "V5", "V6")]
    raws = [random_raw(*leads, seed=number) for number, leads in enumerate(parts)]
    groups = [group(raw, MultiplexGroupTimeOffset=str(1000 + 80 * number)) for number, raw in enumerate(raws)]
    groups.append(group(random_raw("V1", seed=9), SamplingFrequency="250"))
    record = read(dicom_bytes(*reversed(groups)))
    assert record.leads == LEADS
    assert record.signal_mv_LT.shape == (12, 160)
    for number, raw in enumerate(raws):
        for lead, counts_T in raw.items():
            expected = np.full(160, np.nan)
            expected[40 * number : 40 * number + 40] = counts_T * 0.005
            np.testing.assert_allclose(rows(record)[lead], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "skews",
    [{"ChannelSampleSkew": "3"}, {"ChannelSampleSkew": None, "ChannelTimeSkew": "0.006"}, {"ChannelSampleSkew": "2.8"}],
)
def test_a_skewed_channel_is_put_in_its_place(skews: dict) -> None:
    raw = random_raw("I", "V2")
    record = read(dicom_bytes(group(raw, [channel("I", **skews), channel("V2", ChannelSampleSkew="0.4")])))
    assert record.signal_mv_LT.shape == (2, 43)
    np.testing.assert_array_equal(np.isnan(rows(record)["I"]), np.arange(43) < 3)
    np.testing.assert_allclose(rows(record)["I"][3:], raw["I"] * 0.005, rtol=1e-6)
    np.testing.assert_allclose(rows(record)["V2"][:40], raw["V2"] * 0.005, rtol=1e-6)


# --- what is refused, and with which reason ------------------------------------------------------------------------


def one_channel(**elements: object) -> bytes:
    return dicom_bytes(group(random_raw("I"), [channel("I", **elements)]))


def one_group(**elements: object) -> bytes:
    return dicom_bytes(group(random_raw("I"), **elements))


@pytest.mark.parametrize(
    ("make", "expected", "mention"),
    [
        (lambda: dicom_bytes(), "no_ecg_lead", "no waveform"),
        (lambda: one_channel(source=code("X", "L", "ABP")), "no_ecg_lead", "ECG"),
        (lambda: one_channel(ChannelSensitivity=None), "gain", "lead I"),
        (lambda: one_channel(ChannelSensitivity="0"), "gain", "lead I"),
        (lambda: one_channel(ChannelSensitivity="1e30"), "gain", "lead I"),
        (lambda: one_channel(ChannelSensitivityCorrectionFactor="0"), "gain", "lead I"),
        (lambda: one_channel(ChannelBaseline="1e30"), "gain", "offset"),
        (lambda: one_channel(unit=None), "unit", "absent"),
        (lambda: one_channel(unit="mm[Hg]"), "unit", "mm[Hg]"),
        (lambda: one_channel(ChannelSampleSkew="1e12"), "header", "skew"),
        (lambda: one_group(MultiplexGroupTimeOffset="1e12"), "header", "skew"),
        (lambda: one_group(WaveformBitsAllocated=8, WaveformSampleInterpretation="MB"), "format", "mu-law"),
        (lambda: one_group(WaveformBitsAllocated=8, WaveformSampleInterpretation="AB"), "format", "A-law"),
        (lambda: one_group(WaveformBitsAllocated=64, WaveformSampleInterpretation="SV"), "format", "64 bits"),
        (lambda: one_group(WaveformSampleInterpretation=None), "format", "16 SS"),
        (lambda: one_group(WaveformData=bytes(78)), "truncated", "80 are declared"),
        (lambda: one_group(WaveformData=None), "truncated", "0 bytes"),
        (lambda: one_group(NumberOfWaveformSamples=41), "truncated", "82 are declared"),
        (lambda: one_group(NumberOfWaveformSamples=0), "header", "NumberOfWaveformSamples"),
        (lambda: one_group(NumberOfWaveformSamples=2**32 - 1), "too_large", "4294967295"),
        (lambda: one_group(NumberOfWaveformSamples=[4, 5]), "header", "NumberOfWaveformSamples"),
        (lambda: one_group(NumberOfWaveformChannels=65_535), "too_large", "65535"),
        (lambda: one_group(NumberOfWaveformChannels=2), "header", "1 defined"),
        (lambda: one_group(ChannelDefinitionSequence=[]), "header", "0 defined"),
        (lambda: one_group(SamplingFrequency=None), "rate", "nan"),
        (lambda: one_group(SamplingFrequency="0"), "rate", "the rate is 0"),
        (lambda: one_group(SamplingFrequency="1e9"), "rate", "1e+09"),
        (lambda: dicom_bytes(group(random_raw("I", "II"), [channel("I"), channel("I")])), "duplicate_lead", "lead I"),
        (lambda: dicom_bytes(group(random_raw("I")), syntax=DeflatedExplicitVRLittleEndian), "format", "deflated"),
    ],
)  # fmt: skip
def test_refusals(make, expected: str, mention: str) -> None:
    error = refusal(make())
    assert error.code == expected, str(error)
    assert mention in str(error)


def test_recognised_by_content() -> None:
    assert not any(
        map(dicom.recognise, (b"", b"DICM", bytes(132), bytes(128) + b"DICN", b"r 1 500 10\n", b"\x02\x00\x00\x00"))
    )


def swollen(sequence: bytes, *, length: int | None = None) -> bytes:
    """A file whose Waveform Sequence holds these bytes."""
    content = dicom_bytes()
    return (
        content
        + b"\x00\x54\x00\x01SQ\0\0"
        + (len(sequence) if length is None else length).to_bytes(4, "little")
        + sequence
    )


ITEM = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
ATTACKS = {
    "items without end": swollen(bytes(2**23)),
    "items without end, of undefined length": swollen(bytes(2**23), length=0xFFFFFFFF),
    "nested without end": swollen((ITEM + b"\x3a\x00\x00\x02SQ\0\0\xff\xff\xff\xff") * 200_000),
    "a channel for every 8 bytes": swollen(
        ITEM + b"\x3a\x00\x00\x02SQ\0\0" + (2**23).to_bytes(4, "little") + b"\xfe\xff\x00\xe0\0\0\0\0" * 2**20
    ),
    "declares 4 GB": swollen(ITEM, length=0xFFFFFFF0),
    "elements without end": dicom_bytes() + b"\x09\x00\x00\x00SQ\0\0\xff\xff\xff\xff" + bytes(2**23),
}


@pytest.mark.parametrize("content", ATTACKS.values(), ids=ATTACKS)
def test_memory_is_bounded(content: bytes) -> None:
    refusal(dicom_bytes())  # imports what it imports
    tracemalloc.start()
    try:
        assert refusal(content).code in ("too_large", "header", "truncated")
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content) + 120 * 2**20
    finally:
        tracemalloc.stop()


def test_nothing_is_said_about_a_header(tmp_path: Path) -> None:
    """Damaged files, read in threads with every warning on: no warning, no log line, nobody's name."""
    content = dicom_bytes(group(random_raw(), MultiplexGroupLabel="RHYTHM"))
    named = b"\x08\x00\x05\x00CS\x10\x00Jane\\ISO 2022 IR"
    start = content.index(b"\x08\x00\x16\x00UI")
    damaged = [content[:start] + named + content[start:], content.replace(b"RHYTHM", b"Jane\\x"), content[:-50]]
    damaged += [
        content.replace(b"DS\x02\x005 ", b"DS\x02\x00J "),
        content.replace(b"5.6.3-9-1 ", b"Jane\\Doe^J"),
        content[:4000],
    ]
    for index, changed in enumerate(damaged):
        (tmp_path / f"{index}.dcm").write_bytes(changed)
    program = """
import logging, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from lsemvae.formats import dicom
def attempt(path):
    try:
        return "read" if dicom.read(path.name, path.read_bytes(), None).record_id else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(attempt, sorted(Path(sys.argv[1]).iterdir()) * 3)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "UnreadableRecording" in done.stdout and "read" in done.stdout
    assert "Jane" not in done.stdout + done.stderr and "SECRET" not in done.stdout


# --- round trips, and bytes gone wrong -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_round_trip(data) -> None:
    order = data.draw(st.lists(st.sampled_from(LEADS), unique=True, min_size=1, max_size=12))
    samples = data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    raw = {lead: rng.integers(-32768, 32768, samples) for lead in order}
    units = {
        lead: data.draw(st.sampled_from([("uV", "5", 5), ("mV", "0.0025", 2.5), ("nV", "4880", 4.88)]))
        for lead in order
    }
    spelling = data.draw(st.sampled_from(list(SPELLINGS.values())))
    channels = [
        channel(lead, source=spelling(lead), unit=unit, ChannelSensitivity=sensitivity)
        for lead, (unit, sensitivity, _) in units.items()
    ]
    record = read(
        dicom_bytes(group(raw, channels), syntax=data.draw(st.sampled_from([ImplicitVR, ExplicitVRLittleEndian])))
    )
    assert record.derived == tuple(lead for lead in LIMB_LEADS[2:] if {"I", "II"} <= set(order) and lead not in order)
    for lead, counts_T in raw.items():
        row = record.leads.index(lead)
        assert record.uv_per_lsb_L[row] == pytest.approx(units[lead][2])
        back = np.rint(record.signal_mv_LT[row].astype(float) * 1000 / record.uv_per_lsb_L[row])
        np.testing.assert_array_equal(back, counts_T)


DAMAGEABLE = [
    dicom_bytes(group(random_raw(samples=4))),
    dicom_bytes(group(random_raw("I", "II", samples=4)), group(random_raw("V1", samples=3)), undefined_length=True),
    dicom_bytes(group(random_raw("I", "II", samples=4)), syntax=ImplicitVR),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DAMAGEABLE), st.data())
def test_damaged_bytes_raise_nothing_else(content: bytes, data) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    reads_or_refuses({"a.dcm": bytes(damaged[:cut])})


def test_leads_named_by_text_alone_and_those_unknown() -> None:
    """Names that other standards use, where no code says which lead it is; a voltage of another name is flagged."""
    names = ["ECG I", "DII", "C1", "Lead V2 (Wilson)", "X", "Muster"]
    channels = [channel("I", source=code("", "", name)) for name in names]
    channels += [channel("I", source=code("", "", "ABP"), unit="mm[Hg]")]
    raw = dict(zip([*names, "ABP"], random_raw("I", "II", "III", "V1", "V2", "V3", "V4").values(), strict=True))
    record = dicom.read("a.dcm", dicom_bytes(group(raw, channels)), no_fetch)
    assert [lead for lead in record.leads if lead not in record.derived] == ["I", "II", "V1", "V2"]
    assert record.flags == ("unknown_lead:X", "unknown_lead:signal 6")
