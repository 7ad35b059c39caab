"""CardioSoft XML: against a reading by hand of a real export, by round trips, and where exports differ."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cardiosoft_files import EXAMPLE, TWELVE, document, strip

from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import read, read_record
from lsemvae.leads import LEADS
from lsemvae.quality import quality_flags
from lsemvae.record import Record


def read_bytes(content: bytes, **options: object) -> Record:
    return read_record("a.xml", {"a.xml": content}.__getitem__, **options)


def refusal(content: bytes) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        read_bytes(content)
    assert str(caught.value).startswith("a.xml: ")
    assert "SECRET" not in str(caught.value)
    return caught.value


def counts_of(record: Record, lead: str) -> np.ndarray:
    row = record.leads.index(lead)
    counts_T = record.signal_mv_LT[row].astype(np.float64) * 1000 / record.uv_per_lsb_L[row]
    np.testing.assert_allclose(counts_T, np.rint(counts_T), atol=0.02)
    return np.rint(counts_T).astype(np.int64)


@pytest.mark.shared_data
def test_equals_a_reading_by_hand_of_a_real_export(shared_data: Path) -> None:
    path = shared_data / "formats/cardiosoft/resting_12lead.xml"
    text = path.read_bytes().decode("latin-1").partition("<StripData>")[2].partition("</StripData>")[0]
    by_hand = {
        lead: [int(number) for number in numbers.split(",")]
        for lead, numbers in re.findall(r'<WaveformData lead="(\w+)">([^<]*)<', text)
    }
    record = read(path)
    assert (record.leads, record.rate_hz, record.record_id) == (LEADS, 500.0, "resting_12lead")
    assert (record.subject_id, record.derived, record.flags) == (None, (), ())
    assert record.signal_mv_LT.shape == (12, 5000)
    for lead, numbers in by_hand.items():
        np.testing.assert_array_equal(record.signal_for([lead])[0], (np.array(numbers) * 5 / 1000).astype(np.float32))
    np.testing.assert_array_equal(counts_of(unpack(pack(record)), "V3"), by_hand["V3"])
    assert not {"einthoven", "swapped:aVL-aVF", "rate", "length"} & set(quality_flags(record))


@pytest.mark.shared_data
def test_real_export_without_its_strip(shared_data: Path) -> None:
    content = (shared_data / "formats/cardiosoft/resting_12lead.xml").read_bytes()
    before, _, rest = content.partition(b"<StripData>")
    error = refusal(before + rest.partition(b"</StripData>")[2])
    assert error.code == "no_signal"
    assert "RestECG" in str(error) and "20205" in str(error)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(LEADS), min_size=1, max_size=12, unique=True),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
    st.sampled_from((1, 2.5, 4.88, 5)),
    st.sampled_from((240, 500, 1000)),
    st.sampled_from((str.upper, str.lower, str)),
)
def test_round_trip(leads: list[str], samples: int, seed: int, step: float, rate: int, case: type) -> None:
    rng = np.random.default_rng(seed)
    counts = {lead: rng.integers(-32768, 32768, samples).tolist() for lead in leads}
    inside = strip(
        {case(lead): row for lead, row in counts.items()},
        rate=f'<SampleRate units="Hz">{rate}</SampleRate>',
        resolution=f'<Resolution units="uVperLsb">{step}</Resolution>',
    )
    record = read_bytes(document(inside))
    assert record.rate_hz == rate
    assert set(record.leads) - set(record.derived) == set(leads)
    for lead, row in counts.items():
        np.testing.assert_array_equal(counts_of(record, lead), row)
        np.testing.assert_allclose(record.signal_for([lead])[0], np.array(row) * step / 1000, rtol=1e-6)


@pytest.mark.parametrize("encoding", ["ISO8859-1", "iso-8859-1", "latin1", "windows-1252"])
def test_encodings_as_they_are_spelled(encoding: str) -> None:
    assert read_bytes(document(strip(TWELVE), encoding)).leads == LEADS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode(encoding: str) -> None:
    text = document(strip(TWELVE)).decode("latin-1").replace("ISO8859-1", encoding.removesuffix("-sig"))
    np.testing.assert_array_equal(counts_of(read_bytes(text.encode(encoding)), "V6"), TWELVE["V6"])


@pytest.mark.parametrize("encoding", ["rot13", "zlib_codec", "idna", "undefined", "x" * 40, "utf-7"])
def test_other_encodings_are_refused(encoding: str) -> None:
    assert refusal(document(strip(TWELVE), encoding)).code == "xml"


def test_only_the_strip_is_read() -> None:
    """The medians, written under the same names before it, hold other numbers at another rate."""
    record = read_bytes(EXAMPLE["a_20205_2_0.xml"])
    assert record.rate_hz == 500
    assert counts_of(record, "aVF").tolist() == TWELVE["aVF"]
    assert refusal(document("")).code == "no_signal"


def test_electrodes_that_are_no_lead_are_left_out() -> None:
    record = read_bytes(document(strip({"V4R": [1, 2], "II": [3, 4], "": [5, 6]})))
    assert record.leads == ("II",)
    assert counts_of(record, "II").tolist() == [3, 4]


def test_absent_limb_leads_are_derived() -> None:
    record = read_bytes(document(strip({"I": [2, 4], "II": [6, 2]})))
    assert record.derived == ("III", "aVR", "aVL", "aVF")
    np.testing.assert_allclose(record.signal_for(["III"])[0], [0.02, -0.01], atol=1e-7)


def test_known_step_replaces_the_resolution() -> None:
    record = read_bytes(document(strip(TWELVE, resolution="<Resolution></Resolution>")), uv_per_lsb=2.0)
    np.testing.assert_allclose(record.signal_for(["I"])[0], np.array(TWELVE["I"]) * 0.002, rtol=1e-6)


def test_length_need_not_be_declared() -> None:
    for declared in ("", "<ChannelSampleCountTotal></ChannelSampleCountTotal>"):
        assert read_bytes(document(strip(TWELVE, declared=declared))).signal_mv_LT.shape == (12, 5)


RATE = '<SampleRate units="{}">{}</SampleRate>'
STEP = '<Resolution units="{}">{}</Resolution>'


@pytest.mark.parametrize(
    ("inside", "code"),
    [
        ("", "no_signal"),
        ("<StripData></StripData>", "no_signal"),
        ("<FullDisclosure><FullDisclosureData>1,2</FullDisclosureData></FullDisclosure>", "no_signal"),
        ("<StripData><Strip>" + strip({"I": [1]}) + "</Strip></StripData>", "no_signal"),  # of an exercise test
        (strip({"I": [1]}) * 2, "no_signal"),
        (strip({"V7": [1, 2]}), "no_ecg_lead"),
        (strip({"II": [1, 2], "ii": [1, 2]}), "duplicate_lead"),
        (strip({"I": [1, 2, 3], "II": [1, 2]}), "length"),
        (strip({"I": [1, 2, 3], "II": [1, 2]}, declared=""), "length"),
        (strip({"I": []}), "length"),
        (strip({"I": [1, 2]}, declared="<ChannelSampleCountTotal>3</ChannelSampleCountTotal>"), "length"),
        (strip({"I": [1, 2]}, declared="<ChannelSampleCountTotal>many</ChannelSampleCountTotal>"), "header"),
        (strip({"I": "1,,2"}), "sample"),
        (strip({"I": "1,2,x"}), "sample"),
        (strip({"I": "1.5,2"}), "sample"),
        (strip({"I": "1;2"}), "sample"),
        (strip({"I": "1 2"}), "sample"),
        (strip({"I": ","}), "length"),
        (strip({"I": "1,-,2"}), "sample"),
        (strip({"I": "nan,1"}), "sample"),
        (strip({"I": "1,99999999999999999999"}), "sample"),
        (strip({"I": "1,-99999999999999999999"}), "sample"),
        (strip({"I": "1,<b/>2"}, declared=""), "sample"),
        (strip(TWELVE, rate=RATE.format("Hz", "")), "header"),
        (strip(TWELVE, rate=""), "header"),
        (strip(TWELVE, rate=RATE.format("Hz", "0")), "rate"),
        (strip(TWELVE, rate=RATE.format("Hz", "nan")), "rate"),
        (strip(TWELVE, rate=RATE.format("Hz", "1e400")), "rate"),
        (strip(TWELVE, rate=RATE.format("ms", "2")), "unit"),
        (strip(TWELVE, resolution=""), "header"),
        (strip(TWELVE, resolution=STEP.format("uVperLsb", "")), "header"),
        (strip(TWELVE, resolution=STEP.format("uVperLsb", "0")), "gain"),
        (strip(TWELVE, resolution=STEP.format("uVperLsb", "-5")), "gain"),
        (strip(TWELVE, resolution=STEP.format("uVperLsb", "nan")), "gain"),
        (strip(TWELVE, resolution=STEP.format("lsbPerMv", "5")), "unit"),
        (strip(TWELVE, resolution="<Resolution>5</Resolution>"), "unit"),
        (strip(TWELVE)[:-20], "xml"),
        ("<unclosed>", "xml"),
        ("\x00", "xml"),
        ("&undefined;", "xml"),
    ],
)  # fmt: skip
def test_malformed(inside: str, code: str) -> None:
    assert refusal(document(inside)).code == code


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="0123456789,+- \t\nx.e", max_size=40))
def test_samples_are_what_python_reads_or_nothing(text: str) -> None:
    """numpy alone would read as far as it can, and a sign without digits as 0."""
    content = document(strip({"I": text}, declared=""))
    try:
        counts_T = counts_of(read_bytes(content), "I")
    except UnreadableRecording:
        return
    expected_T = [int(cell) for cell in text.strip().removesuffix(",").split(",")]
    np.testing.assert_allclose(counts_T, expected_T, rtol=2**-23)  # exact below 4 million; float32 holds no more


def test_a_lead_that_is_not_known_is_flagged() -> None:
    record = read_bytes(document(strip({"DI": [1, 2], "C1": [3, 4], "V9": [5, 6], "Meier": [7, 8]})))
    assert record.leads == ("I", "V1")
    assert record.flags == ("unknown_lead:V9", "unknown_lead:signal 4")
