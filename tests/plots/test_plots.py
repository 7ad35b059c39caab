"""ECG paper: the millimetres are right, nothing is hidden, and any recording can be drawn."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.plots.curves import histogram
from lsemvae.plots.ecg_paper import ecg_paper
from lsemvae.record import Record
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

SVG = "{http://www.w3.org/2000/svg}"


class Paper:
    """What is drawn: millimetres, and the strokes of the traces as arrays [T, 2] of them."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg)
        self.width_mm, self.height_mm = (float(root.get(name).removesuffix("mm")) for name in ("width", "height"))
        assert root.get("viewBox") == f"0 0 {self.width_mm:g} {self.height_mm:g}"  # one unit is one millimetre
        self.label = root.get("aria-label")
        self.texts = {text.text: (float(text.get("x")), float(text.get("y"))) for text in root.iter(f"{SVG}text")}
        self.minor, self.major = (path.get("d") for path in root.findall(f"{SVG}path"))
        self.strokes, self.pulses_mm = [], []
        for start, commands in re.findall(r"M(-?\d+ -?\d+)([^M]*)", root.find(f"{SVG}g/{SVG}path").get("d")):
            numbers = [int(number) for number in re.findall(r"-?\d+", commands)]
            if commands[0] == "l":
                steps = np.array(numbers).reshape(-1, 2)
                first = np.array([int(number) for number in start.split()])
                self.strokes.append(np.concatenate([[first], first + steps.cumsum(axis=0)]) / 100)
            elif commands[0] == "h":
                self.pulses_mm.append((numbers[2] / 100, -numbers[1] / 100))


def record_of(leads: tuple[str, ...], seconds: float = 10, rate_hz: float = 500, **changed: np.ndarray) -> Record:
    """A spike of 1 mV at 0.6 s of each second, the same in each lead."""
    time_s_T = np.arange(round(seconds * rate_hz)) / rate_hz
    beat_T = np.exp(-(((time_s_T % 1 - 0.6) / 0.01) ** 2))
    return Record.from_leads({lead: changed.get(lead, beat_T) for lead in leads}, rate_hz)


def test_a_millivolt_is_10_mm_and_a_second_25_mm() -> None:
    paper = Paper(ecg_paper(record_of(LEADS)))
    assert "25 mm/s   10 mm/mV" in paper.texts
    assert paper.pulses_mm == [(5.0, 10.0)] * 4  # 1 mV for 0.2 s
    assert len(paper.strokes) == 13
    strip = max(paper.strokes, key=len)
    assert np.ptp(strip[:, 0]) == pytest.approx(250, abs=0.1)
    for stroke in paper.strokes:
        assert np.ptp(stroke[:, 1]) == pytest.approx(10, abs=0.02)
    tops_mm = strip[strip[:, 1] < strip[:, 1].min() + 0.01, 0]
    np.testing.assert_allclose(np.diff(tops_mm), 25, atol=0.05)
    assert paper.major.count("v") == 1 + paper.width_mm // 5 and paper.major.count("h") == 1 + paper.height_mm // 5
    assert (paper.minor + paper.major).count("v") == 1 + paper.width_mm


def test_three_rows_of_four_leads_one_after_the_other() -> None:
    """Each lead has a mark at a time of its own, and lies where its name is."""
    signals = {}
    for number, lead in enumerate(LEADS):
        signals[lead] = np.zeros(5000)
        signals[lead][[round((number // 3 * 2.5 + 1.5) * 500)]] = 0.1 * (number + 1)
    paper = Paper(ecg_paper(record_of(LEADS, **signals)))
    assert len(paper.strokes) == 13
    for stroke, lead in zip(paper.strokes, LEADS, strict=False):
        number = LEADS.index(lead)
        assert np.ptp(stroke[:, 1]) == pytest.approx(number + 1, abs=0.02)
        column_mm = 15 + 62.5 * (number // 3)
        assert stroke[0, 0] == pytest.approx(column_mm, abs=0.01)
        assert stroke[stroke[:, 1].argmin(), 0] == pytest.approx(column_mm + 37.5, abs=0.05)
        if lead != "II":  # which is there twice
            assert paper.texts[lead] == (column_mm + 1, stroke[-1, 1] - 7)
    rows_mm = [stroke[-1, 1] for stroke in paper.strokes]
    assert rows_mm[0] == rows_mm[3] == rows_mm[6] == rows_mm[9] < rows_mm[1] < rows_mm[2] < rows_mm[12]


def test_six_leads_and_derived_or_missing_ones() -> None:
    six = Paper(ecg_paper(record_of(("I", "II"))))
    assert {"I", "II", "III derived", "aVR derived", "aVL derived", "aVF derived"} <= six.texts.keys()
    assert not any("V1" in text for text in six.texts)
    assert six.texts["aVR derived"][0] == 15 + 125 + 1
    assert "derived: III aVR aVL aVF" in six.label
    some = Paper(ecg_paper(record_of(("I", "V2"))))
    assert {"II missing", "V1 missing", "V2"} <= some.texts.keys() and "missing: II III" in some.label
    assert len(some.strokes) == 3  # I, V2, and I again as the rhythm strip
    assert list(some.texts).count("I") == 1 and some.strokes[-1][0, 1] > some.strokes[0][0, 1]
    empty = Paper(ecg_paper(record_of(LEADS, II=np.full(5000, np.nan))))
    assert "II has no values" in empty.texts and len(empty.strokes) == 12


def test_gaps_stay_gaps() -> None:
    signal_T = np.zeros(5000)
    signal_T[[100, 200, 202]] = np.nan
    strokes = Paper(ecg_paper(record_of(LEADS, V1=signal_T, II=signal_T))).strokes
    assert len(strokes) == 13 + 3 + 3  # in II and in the rhythm strip; V1's are not in its 2.5 s
    dot = min(strokes, key=np.ptp)
    assert len(dot) == 2 and (dot[0] == dot[1]).all() and dot[0, 0] == 15 + 201 * 0.05


@pytest.mark.parametrize(("height_mv", "gain"), [(2.5, "10"), (2.6, "5"), (5.0, "5"), (5.1, "2.5"), (10.0, "2.5")])
def test_a_tall_recording_gets_a_smaller_gain_and_says_so(height_mv: float, gain: str) -> None:
    signal_T = np.zeros(5000)
    signal_T[4000] = -height_mv
    paper = Paper(ecg_paper(record_of(LEADS, V5=signal_T)))
    assert f"25 mm/s   {gain} mm/mV" in paper.texts
    assert any("smaller gain" in text for text in paper.texts) == (gain != "10")
    assert paper.pulses_mm == [(5.0, float(gain))] * 4
    assert max(np.ptp(stroke[:, 1]) for stroke in paper.strokes) == pytest.approx(height_mv * float(gain), abs=0.02)
    assert not any("cut off" in text for text in paper.texts)


def test_a_lead_that_does_not_fit_is_cut_off_and_named() -> None:
    signal_T = np.zeros(5000)
    signal_T[4000] = 163.835
    paper = Paper(ecg_paper(record_of(LEADS, V5=signal_T)))
    assert "25 mm/s   10 mm/mV" in paper.texts  # the others can still be read
    assert "cut off at 2.5 mV: V5 (up to 164 mV)" in paper.texts and "V5 (up to 164 mV)" in paper.label
    everything = Paper(ecg_paper(record_of(LEADS, **dict.fromkeys(LEADS, np.linspace(-40, 40, 5000)))))
    assert "cut off at 10 mV: all leads (up to 40 mV)" in everything.texts


@pytest.mark.parametrize("size_mv", [0.01, 1.0, 3.0, 9.0, 50.0])
def test_rows_do_not_meet(size_mv: float) -> None:
    rng = np.random.default_rng(0)
    signals = {lead: np.clip(rng.normal(0, size_mv / 3, 5000), -size_mv, size_mv) for lead in LEADS}
    strokes = Paper(ecg_paper(record_of(LEADS, **signals))).strokes
    rows = [np.concatenate(strokes[row:12:3])[:, 1] for row in range(3)] + [strokes[12][:, 1]]
    for upper, lower in pairwise(rows):
        assert upper.max() < lower.min()


def test_long_and_short_recordings() -> None:
    long = Paper(ecg_paper(record_of(LIMB_LEADS, seconds=30, rate_hz=300)))
    assert "300 Hz · unfiltered · the first 10 of 30.0 s" in long.texts
    short = Paper(ecg_paper(record_of(LEADS, seconds=3, rate_hz=250)))
    assert "250 Hz · unfiltered · 3.0 s, each lead from its beginning" in short.texts
    assert len(short.strokes) == 13 and np.ptp(short.strokes[-1][:, 0]) == pytest.approx(75, abs=0.2)
    for stroke in short.strokes[:12]:
        assert stroke[stroke[:, 1].argmin(), 0] - stroke[0, 0] == pytest.approx(0.6 * 25, abs=0.1)


@settings(max_examples=40, deadline=None)
@given(
    leads=st.lists(st.sampled_from(LEADS), min_size=1, unique=True),
    rate_hz=st.sampled_from([1e-3, 1.0, 99.9, 240.0, 500.0, 1e6]),
    samples=st.integers(1, 3000),
    size_mv=st.sampled_from([0.0, 1e-3, 1.0, 4.0, 30.0, 1e6]),
    bad_share=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 9),
)
def test_any_recording_stays_on_its_paper(leads, rate_hz, samples, size_mv, bad_share, seed) -> None:
    rng = np.random.default_rng(seed)
    signal_LT = rng.normal(0, size_mv, (len(leads), samples)) + rng.normal(0, size_mv)
    signal_LT[rng.random(signal_LT.shape) < bad_share] = rng.choice([np.nan, np.inf])
    with np.errstate(invalid="ignore"):  # of infinities, while the limb leads are derived
        record = Record.from_leads(dict(zip(leads, signal_LT, strict=True)), rate_hz)
    paper = Paper(ecg_paper(record, '<a> & "b"'))
    assert paper.height_mm % 5 == 0 and paper.width_mm == 270
    for stroke in paper.strokes:
        assert (stroke[:, 0] >= 15).all() and (stroke[:, 0] <= 265 + 25 / rate_hz).all()
        assert (stroke[:, 1] >= 0).all() and (stroke[:, 1] <= paper.height_mm - 10).all()
    assert '<a> & "b"' in paper.texts and '<a> & "b"' in paper.label


# SHA-256 of the pictures, which a change of the code must keep.
PICTURES = {
    "twelve": "34b3643ef2407ca7",
    "titled": "4a383291692f2889",
    "six": "bc659dd67f6c719e",
    "derived": "235ad5bf5e32af98",
    "missing": "b082972d27f28c72",
    "short": "2e0946135b042171",
    "long": "4083bb8194cf80d2",
    "slower": "2c9cd10a83f16e06",
    "tall": "5d7694df2bf24e76",
    "clipped": "5e4264249384b096",
    "all clipped": "45a19456be86ad21",
    "gaps": "9d9bc7b498dec1f2",
}


def pictures() -> dict[str, str]:
    """One simulated heart drawn in many ways; in steps of 5 uV, so that a processor's rounding errors do not matter."""
    signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=0.9), np.random.default_rng(3))
    heart = dict(zip(LEADS, np.rint(200 * signal_mv_LT) / 200, strict=True))
    gaps = np.where(np.arange(5000) % 700 < 90, np.nan, heart["V1"])

    def drawn(signals: dict[str, np.ndarray], rate_hz: float = RATE_HZ, title: str = "") -> str:
        return ecg_paper(Record.from_leads(signals, rate_hz), title)

    return {
        "twelve": drawn(heart),
        "titled": drawn(heart, title='A <heart> & its "title"'),
        "six": drawn({lead: heart[lead] for lead in LIMB_LEADS}),
        "derived": drawn({lead: heart[lead] for lead in ("I", "II")}),
        "missing": drawn({lead: heart[lead] for lead in ("I", "V2", "V5")}),
        "short": drawn({lead: signal[:1500] for lead, signal in heart.items()}, title="short"),
        "long": drawn({lead: np.tile(signal, 3) for lead, signal in heart.items()}),
        "slower": drawn({lead: signal[::2] for lead, signal in heart.items()}, 250),
        "tall": drawn(heart | {"V3": 3 * heart["V3"]}),
        "clipped": drawn(heart | {"V3": 60 * heart["V3"]}),
        "all clipped": drawn({lead: 100 * signal for lead, signal in heart.items()}, title="x"),
        "gaps": drawn(heart | {"V1": gaps, "V4": np.full(5000, np.nan)}),
    }


def test_the_pictures_stay_as_they_are() -> None:
    assert {name: hashlib.sha256(svg.encode()).hexdigest()[:16] for name, svg in pictures().items()} == PICTURES


def test_the_same_recording_gives_the_same_picture(tmp_path: Path) -> None:
    simulate.draw(tmp_path)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    simulate.draw(tmp_path)
    assert first == {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert first.keys() == {"healthy.svg", "overloaded.svg"} and first["healthy.svg"] != first["overloaded.svg"]
    assert "severity 1.6" in Paper(first["overloaded.svg"]).label


def test_a_histogram_counts_every_finite_value() -> None:
    values = np.array([1.5, 1.5, 2.5, 99.0, -99.0, np.nan, np.inf])
    svg = histogram(values, np.arange(4.0), "mV & more")
    assert svg == histogram(values, np.arange(4.0), "mV & more")
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "mV & more" in texts and "count" in texts
    bars = ElementTree.fromstring(svg).find(f".//{SVG}g[@id='patch_3']/{SVG}path").get("d")
    heights = {round(float(y), 3) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", bars)}
    assert len(heights) == 3  # the ground, 1 and 2: bars of 1 (-99), 2 and 2 (99 with 2.5)
