"""Quality flags: each fault alone raises its flag, and good recordings raise none."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as sps

from lsemvae.formats import read
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.quality import FLAGS, heart_rate_bpm, quality_flags
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg

# --- one fault at a time, in a recording that is otherwise good ---------------------------------------------


def good_record(seed: int = 0, samples: int = 5000, rate_hz: float = 500.0) -> Record:
    """Twelve consistent leads at 5 uV: beats that point left and down, with noise."""
    rng = np.random.default_rng(seed)
    phase_T = (np.arange(samples) / rate_hz) % 0.8 - 0.4
    beat_T = 1.2 * np.exp(-((phase_T / 0.01) ** 2)) + 0.2 * np.exp(-(((phase_T - 0.25) / 0.04) ** 2))
    size = {"I": 0.7, "II": 1.0, "V1": -0.9, "V2": -1.2, "V3": 0.4, "V4": 1.2, "V5": 1.0, "V6": 0.8}
    rows = {lead: k * beat_T + rng.normal(0, 0.02, samples) for lead, k in size.items()}
    i, ii = rows["I"], rows["II"]
    rows |= {"III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}
    rounded = {lead: np.rint(row / 0.005) * 0.005 for lead, row in rows.items()}
    return Record.from_leads(rounded, rate_hz, uv_per_lsb=dict.fromkeys(LEADS, 5.0))


def changed(record: Record, lead: str, change: Callable[[np.ndarray], np.ndarray]) -> Record:
    signal_mv_LT = record.signal_mv_LT.copy()
    row = record.leads.index(lead)
    signal_mv_LT[row] = change(signal_mv_LT[row])
    return replace(record, signal_mv_LT=signal_mv_LT)


def with_electrodes(record: Record, ra: str, la: str, ll: str) -> Record:
    """What is recorded when the cable named `ra` is where `ra` says, and so on: "RA", "LA" or "LL"."""
    lead = dict(zip(record.leads, record.signal_mv_LT, strict=True))
    at = {"RA": -(lead["I"] + lead["II"]) / 3}
    at |= {"LA": at["RA"] + lead["I"], "LL": at["RA"] + lead["II"]}
    i, ii = at[la] - at[ra], at[ll] - at[ra]
    lead |= {"I": i, "II": ii, "III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}
    return replace(record, signal_mv_LT=np.stack([lead[name] for name in record.leads]))


def with_arms_swapped(record: Record) -> Record:
    return with_electrodes(record, ra="LA", la="RA", ll="LL")


def with_arm_and_leg_swapped(record: Record) -> Record:
    return with_electrodes(record, ra="LL", la="LA", ll="RA")


def with_rows_exchanged(record: Record, a: str, b: str) -> Record:
    order = [{a: b, b: a}.get(lead, lead) for lead in record.leads]
    return replace(record, signal_mv_LT=record.signal_for(order))


def limb_leads_only(record: Record) -> Record:
    return replace(record, leads=LIMB_LEADS, signal_mv_LT=record.signal_for(LIMB_LEADS), uv_per_lsb_L=None)


def hum(hz: float, amplitude_mv: float, samples: int = 5000, rate_hz: float = 500.0) -> np.ndarray:
    return (amplitude_mv * np.sin(2 * np.pi * hz * np.arange(samples) / rate_hz)).astype(np.float32)


def put(value: float, where: slice) -> Callable[[np.ndarray], np.ndarray]:
    def change(row_T: np.ndarray) -> np.ndarray:
        row_T = row_T.copy()
        row_T[where] = value
        return row_T

    return change


def test_good_recordings_have_no_flags() -> None:
    for seed in range(5):
        assert quality_flags(good_record(seed)) == ()
        assert quality_flags(limb_leads_only(good_record(seed))) == ()


@pytest.mark.parametrize(
    ("lead", "change", "flags"),
    [
        ("V2", put(np.nan, slice(100, 101)), ("nan:V2",)),
        ("V2", put(np.nan, slice(None)), ("nan:V2",)),
        ("V2", put(np.inf, slice(100, 101)), ("nan:V2", "rail:V2", "out_of_range:V2")),
        ("V2", put(0.0, slice(None)), ("flat:V2",)),
        ("V2", put(1.5, slice(None)), ("flat:V2",)),
        ("V2", put(163.835, slice(None)), ("flat:V2", "out_of_range:V2")),
        ("V2", put(0.3, slice(1800, 3200)), ("flat:V2",)),  # 2.8 s contain a whole second
        ("V2", lambda row: row * 0.005, ("flat:V2",)),
        ("V2", lambda row: row + 11, ("out_of_range:V2",)),
        ("V2", lambda row: row - 11, ("out_of_range:V2",)),
        ("V2", lambda row: np.clip(row, -0.6, 0.6), ("rail:V2",)),
        ("V4", lambda row: np.clip(row, -0.7, 0.7), ("rail:V4",)),
        ("V4", put(163.835, slice(7, 8)), ("rail:V4", "out_of_range:V4")),
        ("V4", put(-163.835, slice(7, 8)), ("rail:V4", "out_of_range:V4")),
        ("V4", put(1.9, slice(4950, 5000)), ()),  # a held end, as PTB-XL pads
        ("V3", lambda row: row + hum(50, 0.03), ("mains:V3",)),
        ("V3", lambda row: row + hum(60.2, 0.03), ("mains:V3",)),
        ("V3", lambda row: row + hum(50, 0.015), ()),
        ("V3", lambda row: row + hum(55, 0.05), ()),  # a tremor, not the mains
        ("V3", lambda row: row + hum(50, 0.1) * (np.arange(5000) < 2000), ()),  # less than half of the time
        ("V3", lambda row: row + hum(0.2, 1.1), ("wander:V3",)),
        ("V3", lambda row: row + hum(0.2, 0.9), ()),
        ("V3", lambda row: row + np.linspace(0, 2.3, 5000), ("wander:V3",)),
        ("V3", lambda row: row + hum(1.2, 1.5), ()),  # as slow as a heart, no slower
        ("III", lambda row: row + 0.05, ("einthoven",)),
        ("III", lambda row: row + 0.01, ()),
        ("aVR", lambda row: -row, ("einthoven",)),
        ("aVL", put(0.9, slice(50, 51)), ("einthoven",)),
    ],
)
def test_one_fault(lead: str, change: Callable[[np.ndarray], np.ndarray], flags: tuple[str, ...]) -> None:
    assert quality_flags(changed(good_record(), lead, change)) == flags


def in_steps(record: Record, step_mv: float) -> Record:
    """The recording as a recorder of this resolution stores it."""
    counts_LT = np.rint(record.signal_mv_LT / step_mv)
    steps_uv_L = np.full(len(record.leads), 1000 * step_mv)
    return replace(record, signal_mv_LT=(counts_LT * step_mv).astype(np.float32), uv_per_lsb_L=steps_uv_L)


@pytest.mark.parametrize("step_mv", [1e-6, 3e-5, 0.025, 0.05, 0.1])
def test_no_rail_where_nothing_is_cut_off(step_mv: float) -> None:
    """32 and 24 bits go beyond the counts of 16; with 8 bits a rounded peak has plateaus."""
    record = good_record()
    slow_T = 1.5 * np.sin(2 * np.pi * 1.3 * np.arange(5000) / 500)  # peaks as rounded as T waves
    record = in_steps(changed(record, "V5", lambda row: row + slow_T), step_mv)
    assert not [flag for flag in quality_flags(record) if flag.startswith("rail")]


@pytest.mark.parametrize("step_mv", [1e-6, 0.005, 0.025])
def test_a_rail_is_found_at_any_resolution(step_mv: float) -> None:
    record = in_steps(changed(good_record(), "V4", lambda row: np.clip(row, -0.7, 0.7)), step_mv)
    assert [flag for flag in quality_flags(record) if flag.startswith("rail")] == ["rail:V4"]


@pytest.mark.parametrize("factor", [0.001, 1000.0])
def test_a_gain_a_thousand_times_off_is_named(factor: float) -> None:
    record = good_record()
    assert "scale" in quality_flags(replace(record, signal_mv_LT=record.signal_mv_LT * np.float32(factor)))
    assert "gain and its unit" in FLAGS["scale"]


@pytest.mark.parametrize("factor", [0.0, 0.3, 10.0])
def test_an_ordinary_size_is_no_wrong_gain(factor: float) -> None:
    record = good_record()
    assert "scale" not in quality_flags(replace(record, signal_mv_LT=record.signal_mv_LT * np.float32(factor)))


@pytest.mark.shared_data
def test_no_rail_in_real_recordings_of_coarse_steps(real_records: list[Record]) -> None:
    """One of these recordings is cut off (LUDB 109); in steps of 50 uV it was one in six that was flagged."""
    flagged = [record.record_id for record in real_records if _has_rail(in_steps(record, 0.05))]
    assert len(flagged) <= 2


def _has_rail(record: Record) -> bool:
    return any(flag.startswith("rail") for flag in quality_flags(record))


def test_rounding_of_the_recorder_is_no_contradiction() -> None:
    """I + III - II reaches 20 uV where each lead is rounded to 5 uV."""
    record = good_record()
    assert quality_flags(changed(record, "III", lambda row: row + np.float32(0.0124))) == ()
    coarse = replace(record, uv_per_lsb_L=np.full(12, 20.0))
    assert quality_flags(changed(coarse, "III", lambda row: row + np.float32(0.06))) == ()
    assert quality_flags(changed(coarse, "III", lambda row: row + np.float32(0.1))) == ("einthoven",)


def test_exchanged_rows() -> None:
    record = good_record()
    assert quality_flags(with_rows_exchanged(record, "aVL", "aVF")) == ("swapped:aVL-aVF",)
    assert quality_flags(with_rows_exchanged(record, "I", "II")) == ("einthoven",)
    assert quality_flags(with_arms_swapped(record)) == ("swapped:arms",)
    assert quality_flags(limb_leads_only(with_arms_swapped(record))) == ("swapped:arms",)
    assert quality_flags(with_arm_and_leg_swapped(record)) == ("swapped:arm-leg",)


def test_derived_leads_are_not_evidence() -> None:
    """With I and II alone nothing can contradict, whatever they are."""
    rng = np.random.default_rng(0)
    record = Record.from_leads({lead: rng.normal(size=5000) for lead in ("I", "II")}, 500)
    assert record.leads == LIMB_LEADS
    assert "einthoven" not in quality_flags(record)


def test_missing_samples_do_not_contradict() -> None:
    record = changed(good_record(), "I", put(np.nan, slice(0, 2500)))
    assert quality_flags(record) == ("nan:I",)
    assert quality_flags(changed(good_record(), "I", put(np.nan, slice(None)))) == ("nan:I",)


def test_microvolts_sent_as_millivolts() -> None:
    record = good_record()
    flags = quality_flags(replace(record, signal_mv_LT=record.signal_mv_LT * 1000))
    assert {f"out_of_range:{lead}" for lead in LEADS} <= set(flags)


@pytest.mark.parametrize(
    ("samples", "rate_hz", "flags"),
    [
        (5000, 500, ()),
        (4990, 500, ()),
        (2500, 250, ("rate",)),
        (10_000, 1000, ("rate",)),
        (2500, 500, ("length",)),  # 250 Hz labelled 500
        (5500, 500, ("length",)),
        (9000, 300, ("length", "rate")),
        (400, 500, ("length",)),
    ],
)
def test_length_and_rate(samples: int, rate_hz: float, flags: tuple[str, ...]) -> None:
    assert quality_flags(good_record(samples=samples, rate_hz=rate_hz)) == flags


def labelled(record: Record, recorded_hz: float, labelled_hz: float) -> Record:
    """20 s of the recording as a recorder of this rate would store it, with another rate in its label."""
    twice_mv_LT = np.concatenate([record.signal_mv_LT, record.signal_mv_LT], axis=1)
    signal_mv_LT = sps.resample_poly(twice_mv_LT, int(recorded_hz), int(record.rate_hz), axis=1).astype(np.float32)
    return replace(record, signal_mv_LT=signal_mv_LT, rate_hz=labelled_hz, uv_per_lsb_L=None)


def has_time_scale(record: Record) -> bool:
    return "time_scale" in quality_flags(record)


def test_a_rate_labelled_twice_or_half_as_high_is_flagged_by_its_beats() -> None:
    """5,000 samples at 250 Hz labelled 500 have the right length and the right rate: only the beats contradict."""
    found, rng = Counter(), np.random.default_rng(20)
    for bpm in np.tile([55.0, 66.0, 75.0, 88.0, 100.0], 8):
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=rng.uniform(), heart_rate_bpm=bpm), rng)
        record = Record.from_leads(dict(zip(LEADS, signal_mv_LT, strict=True)), 500)
        fast, slow = labelled(record, 250, 500), replace(record, rate_hz=250.0)
        assert fast.signal_mv_LT.shape == slow.signal_mv_LT.shape == (12, 5000)
        assert {"length", "rate"} <= set(quality_flags(slow)) and not {"length", "rate"} & set(quality_flags(fast))
        given = {"true": record, "true at 250": labelled(record, 250, 250), "fast": fast, "slow": slow}
        found.update(name for name, each in given.items() if has_time_scale(each))
    assert found["true"] == found["true at 250"] == 0
    assert min(found["fast"], found["slow"]) >= 38


@pytest.mark.shared_data
def test_a_wrong_rate_is_found_in_real_recordings(real_records: list[Record]) -> None:
    every = real_records[::5]
    fast = sum(has_time_scale(labelled(record, 250, 500)) for record in every)
    slow = sum(has_time_scale(replace(record, rate_hz=250.0)) for record in every)
    limbs = sum(has_time_scale(limb_leads_only(labelled(record, 250, 500))) for record in every)
    assert min(fast, slow, limbs) >= 0.9 * len(every)


def test_a_single_sample_is_flagged_not_a_crash() -> None:
    assert quality_flags(Record.from_leads({"II": [0.1]}, 500)) == ("flat:II", "length")


@pytest.mark.parametrize("rate_hz", [100.0, 128.5, 240.0, 300.0, 1000.0])
def test_mains_and_wander_at_any_rate(rate_hz: float) -> None:
    """Also at 100 Hz, where the mains cannot be told, and for 30 s, of which only the last ten are disturbed."""
    samples = round(30 * rate_hz)
    record = good_record(samples=samples, rate_hz=rate_hz)
    assert quality_flags(record) == ("length", "rate")
    late = np.arange(samples) > 20 * rate_hz
    wander = hum(0.15, 1.2, samples, rate_hz) * late
    assert quality_flags(changed(record, "V2", lambda row: row + wander)) == ("wander:V2", "length", "rate")
    mains = () if rate_hz == 100 else ("mains:V2",)
    disturbed = changed(record, "V2", lambda row: row + hum(50, 0.06, samples, rate_hz))
    assert quality_flags(disturbed) == (*mains, "length", "rate")


def test_gaps_are_no_mains_and_no_wander() -> None:
    record = changed(good_record(), "V4", lambda row: put(np.nan, slice(500, 4000))(row + 5))
    assert quality_flags(record) == ("nan:V4",)


def test_every_flag_is_explained() -> None:
    """What this file raises, and the kinds named in `FLAGS`, are the same."""
    record = good_record()
    signal_mv_LT = record.signal_mv_LT * 20
    signal_mv_LT[3] = np.nan
    signal_mv_LT[6:8] = 0
    bad = replace(record, signal_mv_LT=signal_mv_LT + hum(50, 1) + hum(0.2, 2), rate_hz=400.0)
    flags = {flag.split(":")[0] for flag in quality_flags(bad)}
    assert {"nan", "out_of_range", "mains", "wander", "length", "rate"} <= flags
    assert flags <= FLAGS.keys()
    assert all(text.endswith(".") for text in FLAGS.values())


@pytest.mark.parametrize("rate_hz", [240.0, 500.0, 1000.0])
@pytest.mark.parametrize("bpm", [38, 75, 152])
def test_heart_rate(bpm: int, rate_hz: float) -> None:
    rng = np.random.default_rng(bpm)
    time_s_T = np.arange(round(10 * rate_hz)) / rate_hz
    phase_s_T = (time_s_T + 0.2) % (60 / bpm) - 0.2
    beat_T = np.exp(-((phase_s_T / 0.012) ** 2)) + 0.25 * np.exp(-(((phase_s_T - 0.25) / 0.05) ** 2))
    leads = {lead: k * beat_T + rng.normal(0, 0.03, beat_T.size) for lead, k in {"I": 0.6, "II": 1.0}.items()}
    assert heart_rate_bpm(Record.from_leads(leads, rate_hz)) == pytest.approx(bpm, rel=0.02)
    leads["I"][100:200] = np.nan
    assert heart_rate_bpm(Record.from_leads(leads, rate_hz)) == pytest.approx(bpm, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(
    rate_hz=st.sampled_from([1e-9, 0.3, 1.0, 49.9, 107.3, 128.0, 500.0, 1e5, 1e9]),
    samples=st.integers(1, 1500),
    bad=st.sampled_from([None, np.nan, np.inf]),
    seed=st.integers(0, 9),
)
def test_no_rate_and_no_length_is_too_odd(rate_hz: float, samples: int, bad: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    leads = {lead: rng.normal(0, 0.2, samples) for lead in ("V1", "V6")}
    if bad is not None:
        leads["V6"][rng.integers(0, samples)] = bad
    record = Record.from_leads(leads, rate_hz)
    flags = quality_flags(record)
    assert ("nan:V6" in flags) == (bad is not None)
    assert {flag.split(":")[0] for flag in flags} <= FLAGS.keys()
    assert np.isnan(heart_rate_bpm(record)) or 0 < heart_rate_bpm(record) <= 240


def test_no_heart_rate_without_beats() -> None:
    for signal_T in (np.zeros(5000), np.full(5000, np.nan), np.zeros(3), np.linspace(0, 1, 5000)):
        assert np.isnan(heart_rate_bpm(Record.from_leads({"II": signal_T}, 500)))


def test_the_recording_is_not_changed() -> None:
    record = good_record()
    before = record.signal_mv_LT.copy()
    quality_flags(record)
    np.testing.assert_array_equal(record.signal_mv_LT, before)


# --- real recordings ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_records(shared_data: Path) -> list[Record]:
    ptb_xl = sorted((shared_data / "ptbxl500/records500").rglob("*.hea"))
    ludb = sorted((shared_data / "ludb/data").glob("*.hea"))
    return [read(path) for path in ptb_xl] + [read(path, uv_per_lsb=1.0) for path in ludb]


@pytest.mark.shared_data
def test_few_flags_on_real_recordings(real_records: list[Record]) -> None:
    """What the docstrings of the limits say: each line below was looked at."""
    flagged = {}
    wandering = 0
    for record in real_records:
        flags = quality_flags(record)
        rest = tuple(flag for flag in flags if not flag.startswith("wander"))
        wandering += rest != flags
        if rest:
            flagged[record.record_id] = rest
    assert wandering == 35
    assert flagged == {
        "00162_hr": ("einthoven",),  # seven samples of aVR and aVF are off by 2.6 mV
        "00197_hr": ("mains:I", "mains:III", "mains:aVL"),  # at the left arm alone
        "00222_hr": ("time_scale",),  # 117 bpm with narrow complexes
        "00351_hr": ("time_scale",),  # atrial fibrillation at 161 bpm
        "00449_hr": ("time_scale",),  # supraventricular tachycardia at 172 bpm
        "00477_hr": ("time_scale",),  # 31 bpm with a right bundle branch block
        "00346_hr": ("swapped:arm-leg",),  # left bundle branch block with a left axis
        "00421_hr": ("out_of_range:V4",),
        "109": ("rail:II", "rail:V4"),
        "111": ("swapped:arms",),
        "127": ("time_scale",),  # 40 bpm
        "24": ("time_scale",),  # 50 bpm with a left bundle branch block
        "74": ("swapped:arms",),
    }


@pytest.mark.shared_data
def test_exchanged_leads_are_found_in_real_recordings(real_records: list[Record]) -> None:
    found = Counter()
    for record in real_records:
        found["aVL-aVF"] += "swapped:aVL-aVF" in quality_flags(with_rows_exchanged(record, "aVL", "aVF"))
        arms, arm_and_leg = with_arms_swapped(record), with_arm_and_leg_swapped(record)
        found["arms"] += "swapped:arms" in quality_flags(arms)
        found["arms, limb leads"] += "swapped:arms" in quality_flags(limb_leads_only(arms))
        found["arm and leg"] += "swapped:arm-leg" in quality_flags(arm_and_leg)
    assert found["aVL-aVF"] >= 0.99 * len(real_records)
    assert found["arms"] >= 0.9 * len(real_records)
    assert found["arms, limb leads"] > 0.6 * len(real_records)
    assert found["arm and leg"] >= 0.94 * len(real_records)


@pytest.mark.shared_data
def test_heart_rates_are_those_of_the_annotated_beats(shared_data: Path) -> None:
    near = []
    for path in sorted((shared_data / "ludb/data").glob("*.hea")):
        annotation = wfdb.rdann(str(path.with_suffix("")), "ii")
        beats = annotation.sample[np.array(annotation.symbol) == "N"]
        annotated_bpm = 60 * 500 / np.median(np.diff(beats))
        near.append(abs(heart_rate_bpm(read(path, uv_per_lsb=1.0)) / annotated_bpm - 1) < 0.05)
    assert len(near) == 200 and sum(near) >= 199


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("JS11438", {f"flat:V{number}" for number in range(1, 7)} | {"time_scale"}),  # a child of 4 years, 131 bpm
        ("E00271", set()),
        ("1111834", {"length", "rate"}),
        (
            "1111554",
            {"flat:V5", "flat:V6", "rail:III", "einthoven", "length", "rate", "time_scale"}
            | {f"out_of_range:{lead}" for lead in LEADS}
            | {f"mains:{lead}" for lead in ("V1", "V3", "V4")}
            | {f"wander:{lead}" for lead in (*LIMB_LEADS, "V2", "V4")},
        ),
    ],
)  # fmt: skip
def test_odd_recordings(shared_data: Path, name: str, flags: set[str]) -> None:
    assert set(quality_flags(read(shared_data / "odd" / name))) == flags
