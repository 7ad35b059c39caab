"""Beats of simulated and real recordings are found where they are; what has no beat says so."""

import warnings

import numpy as np
import pytest
from benchmarks.waves import found_beats, read_ludb, reference, score
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lsemvae.explain.waves import WAVES, Delineation, delineate
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import EcgParameters, simulate_ecg

P, QRS, ST, T, REST = range(len(WAVES))


def model_input(signal_mv_LT: np.ndarray, recorded_hz: float = 500, rate_hz: int = 500, leads=LEADS) -> np.ndarray:
    config = PreprocessConfig(rate_hz=rate_hz, samples=10 * rate_hz, min_seconds=0.5)
    prepared = preprocess_signals([signal_mv_LT], [recorded_hz], leads, config)
    assert prepared.accepted_B[0], prepared.refused_B
    return prepared.x_BLT[0]


def simulated(**parameters) -> tuple[np.ndarray, dict[str, float]]:
    return simulate_ecg(EcgParameters(**parameters), np.random.default_rng(3))


def waves_of(x_LT: np.ndarray, rate_hz: float = 500) -> Delineation:
    """Delineates what is there, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return delineate(x_LT, np.any(x_LT != 0, axis=1), LEADS[: len(x_LT)], rate_hz)


@pytest.fixture(scope="module")
def x_LT() -> np.ndarray:
    return model_input(simulated()[0])


@pytest.mark.parametrize("rate_hz", [250, 500])
@pytest.mark.parametrize("bpm", [45, 70, 100, 120])
@pytest.mark.parametrize("leads", [12, 6, 1])
def test_intervals_of_simulated_recordings_are_the_true_ones(bpm, rate_hz, leads):
    signal_mv_LT, true = simulated(heart_rate_bpm=bpm)
    found = waves_of(model_input(signal_mv_LT[:leads], rate_hz=rate_hz, leads=LEADS[:leads]), rate_hz)
    assert found.reason is None and abs(found.beats - 10_000 / true["rr_interval"]) <= 1.5
    p_N3, qrs_N3, t_N3 = (1000 * found.edges[wave] / rate_hz for wave in ("P", "QRS", "T"))
    intervals = {
        "PR": (qrs_N3[:, 0] - p_N3[:, 0], true["qrs_onset"] - true["p_onset"], 25),
        "QRS": (qrs_N3[:, 2] - qrs_N3[:, 0], true["qrs_end"] - true["qrs_onset"], 25),
        "QT": (t_N3[:, 2] - qrs_N3[:, 0], true["t_end"] - true["qrs_onset"], 40),
    }
    for name, (found_ms_N, true_ms, tolerance_ms) in intervals.items():
        assert abs(np.nanmedian(found_ms_N) - true_ms) < tolerance_ms, (name, np.nanmedian(found_ms_N), true_ms)
    assert all(found.failures[wave] <= 1 + (wave == "T") for wave in ("P", "QRS", "T")), found.failures


def test_windows_follow_the_edges_and_do_not_overlap(x_LT):
    found = waves_of(x_LT)
    expected_T = np.full(x_LT.shape[1], REST)
    counted_T = np.zeros(x_LT.shape[1], dtype=int)
    for beat in range(found.beats):
        (p_on, _, p_off), (qrs_on, _, qrs_off), (t_on, _, t_off) = (found.edges[w][beat] for w in ("P", "QRS", "T"))
        for wave, start, end in ((P, p_on, p_off), (QRS, qrs_on, qrs_off), (ST, qrs_off, t_on), (T, t_on, t_off)):
            if np.isfinite([start, end]).all():
                expected_T[int(start) : int(end)] = wave
                counted_T[int(start) : int(end)] += 1
    assert counted_T.max() == 1
    assert np.array_equal(found.wave_T, expected_T) and set(found.wave_T) == set(range(len(WAVES)))
    for edges_N3 in found.edges.values():
        there_N3 = edges_N3[np.isfinite(edges_N3).all(axis=1)]
        assert (np.diff(there_N3, axis=1) > 0).all() and (there_N3[1:, 0] >= there_N3[:-1, 2]).all()


def test_the_order_the_polarity_and_the_unit_of_leads_do_not_matter(x_LT):
    found = waves_of(x_LT)
    for changed_LT in (x_LT[::-1], -x_LT, 7 * x_LT, x_LT.astype(np.float64)):
        other = waves_of(changed_LT)
        assert np.mean(other.wave_T != found.wave_T) < 0.002 and other.failures == found.failures
    again = waves_of(x_LT)
    assert np.array_equal(again.wave_T, found.wave_T) and again.edges["T"].tobytes() == found.edges["T"].tobytes()


def test_absent_leads_and_padding_change_nothing():
    signal_mv_LT, _ = simulated()
    limb_LT = model_input(signal_mv_LT[:6], leads=LIMB_LEADS)
    with_absent_LT = np.concatenate([limb_LT, np.full_like(limb_LT, 9.0)])  # the mask decides, not the values
    mask_L = np.arange(12) < 6
    assert np.array_equal(delineate(with_absent_LT, mask_L, LEADS, 500).wave_T, waves_of(limb_LT).wave_T)
    short_LT = model_input(signal_mv_LT[:, :2000])
    assert not short_LT[:, 2000:].any()
    found = waves_of(short_LT)
    assert (found.wave_T[2000:] == REST).all() and found.beats >= 4
    assert np.array_equal(found.wave_T[:2000], waves_of(short_LT[:, :2000]).wave_T)


def test_atrial_fibrillation_has_no_p_and_counts_that():
    found = waves_of(model_input(simulated(atrial_fibrillation=True, heart_rate_bpm=80)[0]))
    assert found.beats >= 10 and found.failures["P"] >= 0.7 * found.beats
    assert found.failures["QRS"] == 0 and np.mean(found.wave_T == P) < 0.05


@pytest.mark.parametrize(("name", "beats"), [("220 a minute", 25), ("30 a minute", 5), ("one beat", 1)])
def test_unusual_rhythms(name, beats):
    if name == "220 a minute":
        x_LT = model_input(simulated(heart_rate_bpm=150)[0], recorded_hz=500 * 220 / 150)  # 6.8 s
    else:
        signal_mv_LT, _ = simulated(heart_rate_bpm=30 if name == "30 a minute" else 60)
        x_LT = model_input(signal_mv_LT[:, :500] if name == "one beat" else signal_mv_LT)
    found = waves_of(x_LT)
    assert abs(found.beats - beats) <= (beats > 1), found
    assert found.failures["QRS"] == 0


def test_an_artefact_and_a_silent_end_do_not_hide_the_beats():
    signal_mv_LT, _ = simulated()
    expected = waves_of(model_input(signal_mv_LT)).edges["QRS"][:, 1]
    signal_mv_LT[:, 3000:] = signal_mv_LT[:, 2999:3000]
    signal_mv_LT[:, 1400] += 30.0
    found = waves_of(model_input(signal_mv_LT)).edges["QRS"][:, 1]
    expected = expected[(expected < 2900) & (np.abs(expected - 1400) > 200)]
    assert (np.abs(found[:, None] - expected).min(axis=0) < 20).all() and len(found) <= len(expected) + 2


def test_pacing_spikes_do_not_hide_the_beats():
    signal_mv_LT, _ = simulated()
    qrs_N3 = waves_of(model_input(signal_mv_LT)).edges["QRS"]
    for onset in qrs_N3[:, 0].astype(int):
        signal_mv_LT[:, max(onset - 80, 0) : max(onset - 80, 0) + 1] += 2.0  # 2 ms, before P
    found = waves_of(model_input(signal_mv_LT)).edges["QRS"]
    near = np.abs(found[:, 1][:, None] - qrs_N3[:, 1]).min(axis=0)
    assert (near < 50).mean() > 0.8


@pytest.mark.parametrize(
    ("name", "x_LT", "reason"),
    [
        ("zeros", np.zeros((12, 5000)), "the signal is flat"),
        ("a constant", np.full((12, 5000), 3.0), "no beat was found"),
        ("noise", np.random.default_rng(0).standard_normal((12, 5000)), "no beat was found"),
        ("noise of one lead", np.random.default_rng(1).standard_normal((1, 5000)), "no beat was found"),
        ("a sine", np.tile(np.sin(np.arange(5000) / 20), (6, 1)), "no beat was found"),
        ("0.2 s", np.random.default_rng(0).standard_normal((12, 100)), "no beat was found"),
        ("one sample", np.ones((12, 1)), "no beat was found"),
        ("not a number", np.full((12, 5000), np.nan), "the signal is not finite"),
        ("no lead", np.zeros((0, 5000)), "the signal is flat"),
    ],
)
def test_what_has_no_beat_says_so(name, x_LT, reason, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = delineate(x_LT, np.ones(len(x_LT), dtype=bool), LEADS[: len(x_LT)], 500)
    assert (found.reason, found.beats) == (reason, 0)
    assert found.wave_T.shape == (x_LT.shape[1],) and (found.wave_T == REST).all()
    assert capfd.readouterr() == ("", "")


@settings(deadline=None, max_examples=80)
@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.sampled_from([0.0, 1.0, -1.0, 50.0])
    ),
    st.integers(1, 40),
    st.sampled_from([100, 250, 500]),
)
def test_whatever_the_signal_there_is_an_answer(steps_LK, length, rate_hz):
    """Signals of steps and pulses, which look like no ECG: no error and no warning, and each sample has a wave."""
    x_LT = np.repeat(steps_LK, length, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = delineate(x_LT, np.ones(len(x_LT), dtype=bool), LEADS[: len(x_LT)], rate_hz)
    assert (found.reason is None) == (found.beats > 0)
    assert found.wave_T.shape == (x_LT.shape[1],) and np.isin(found.wave_T, range(len(WAVES))).all()
    for edges_N3 in found.edges.values():
        there_N3 = edges_N3[~np.isnan(edges_N3[:, 0])]
        assert (there_N3 >= 0).all() and (there_N3 <= x_LT.shape[1]).all() and (np.diff(there_N3, axis=1) >= 0).all()


@pytest.mark.shared_data
@pytest.mark.parametrize(("leads", "floors"), [(LEADS, (0.93, 0.98, 0.98)), (LIMB_LEADS, (0.92, 0.98, 0.95))])
def test_beats_of_real_recordings_are_those_of_the_experts(shared_data, leads, floors):
    records = read_ludb(shared_data / "ludb", [str(number) for number in range(2, 61, 2)], leads)
    found = [found_beats(record.x_LT, record.lead_mask_L, leads) for record in records]
    truth = [reference(record.marks, leads) for record in records]
    scores = {wave: score([one and one[wave] for one in found], truth, wave) for wave in ("P", "QRS", "T")}
    for (wave, one), floor in zip(scores.items(), floors, strict=True):
        assert one.sensitivity > floor and one.predictive_value > floor, (wave, one)
    largest_sd_ms = {"P": (25, 25, 25), "QRS": (18, 20, 18), "T": (40, 30, 35)}
    for wave, one in scores.items():
        assert (np.abs(one.mean_ms) < 20).all() and (one.sd_ms < largest_sd_ms[wave]).all(), (wave, one)
