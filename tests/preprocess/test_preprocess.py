"""The one definition: equal to NeuroKit2's, the same for any batch, and refusing for stated reasons."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as sps

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS, in_order
from lsemvae.preprocess import FIXED_MV, PreprocessConfig, preprocess, preprocess_signals, windows
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg


def ecg_mv(seed: int = 0) -> np.ndarray:
    signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=0.5), np.random.default_rng(seed))
    return signal_mv_LT.astype(np.float32)


def test_equals_neurokit_lead_by_lead():
    neurokit2 = pytest.importorskip("neurokit2")
    signal_mv_LT = ecg_mv()
    cleaned_LT = np.stack(
        [neurokit2.ecg_clean(lead.astype(float), sampling_rate=500, method="neurokit") for lead in signal_mv_LT]
    )
    expected_LT = (cleaned_LT - cleaned_LT.mean(1, keepdims=True)) / cleaned_LT.std(1, ddof=1, keepdims=True)
    prepared = preprocess_signals([signal_mv_LT], [500], LEADS, PreprocessConfig(scale="lead"))
    np.testing.assert_allclose(prepared.x_BLT[0], expected_LT, atol=1e-6)


def test_no_recordings_are_an_empty_batch():
    prepared = preprocess_signals([], [], LIMB_LEADS, PreprocessConfig())
    assert prepared.x_BLT.shape == (0, 6, 5000) and prepared.lead_mask_BL.shape == (0, 6)
    assert prepared.accepted_B.shape == (0,) and prepared.refused_B == []


@pytest.mark.parametrize("scale", ["fixed", "lead", "record", "none"])
def test_what_each_scale_keeps(scale: str):
    signal_mv_LT = ecg_mv()
    config = PreprocessConfig(scale=scale, mains_hz=0)
    x_LT = preprocess_signals([signal_mv_LT], [500], LEADS, config).x_BLT[0].astype(np.float64)
    std_L = x_LT.std(axis=1, ddof=1)
    einthoven_T = x_LT[LEADS.index("I")] + x_LT[LEADS.index("III")] - x_LT[LEADS.index("II")]
    if scale == "lead":
        np.testing.assert_allclose(std_L, 1, rtol=1e-5)
        assert np.abs(einthoven_T).max() > 0.1  # a factor for each lead breaks the relation
    else:
        assert np.abs(einthoven_T).max() < 0.02 * std_L.max()
        assert std_L.max() / std_L.min() > 1.5
    if scale == "record":
        assert np.sqrt((std_L**2).mean()) == pytest.approx(1, rel=1e-5)
    if scale == "fixed":
        in_mv = preprocess_signals([signal_mv_LT], [500], LEADS, PreprocessConfig(scale="none", mains_hz=0)).x_BLT[0]
        np.testing.assert_allclose(x_LT * FIXED_MV, in_mv - in_mv.mean(axis=1, keepdims=True), atol=1e-6)
    if scale == "none":
        sos = sps.butter(5, 0.5, "highpass", fs=500, output="sos")
        np.testing.assert_allclose(x_LT, sps.sosfiltfilt(sos, signal_mv_LT.astype(float), axis=1), atol=1e-6)


@pytest.mark.parametrize("scale", ["fixed", "lead", "record", "none"])
def test_a_record_alone_equals_the_record_in_a_batch(scale: str):
    config = PreprocessConfig(scale=scale)
    signals = [ecg_mv(seed) for seed in range(3)] + [ecg_mv(3)[:, :2000], ecg_mv(4)]
    signals[4][2, 100:200] = np.nan
    rates = [500, 500, 400, 500, 500]
    together = preprocess_signals(signals, rates, LEADS, config)
    for b, (signal_mv_LT, rate_hz) in enumerate(zip(signals, rates, strict=True)):
        alone = preprocess_signals([signal_mv_LT], [rate_hz], LEADS, config)
        np.testing.assert_array_equal(alone.x_BLT[0], together.x_BLT[b])
        np.testing.assert_array_equal(alone.lead_mask_BL[0], together.lead_mask_BL[b])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(LEADS), min_size=1, unique=True),
    st.lists(st.sampled_from(LEADS), max_size=6, unique=True),
    st.sampled_from([1200, 5000]),
)
def test_a_lead_is_the_same_number_whatever_other_leads_are_asked_for_or_missing(asked, missing, samples):
    """The default scale: a twelve-lead encoder sees in six-lead fine-tuning what it saw in pre-training."""
    config = PreprocessConfig(min_lead_share=0.01)
    leads = in_order(asked)
    signal_mv_LT = ecg_mv()[:, :samples]
    whole = preprocess_signals([signal_mv_LT], [500], LEADS, config).x_BLT[0]
    damaged_mv_LT = signal_mv_LT.copy()
    damaged_mv_LT[[LEADS.index(lead) for lead in missing]] = np.nan
    part = preprocess_signals([damaged_mv_LT[[LEADS.index(lead) for lead in leads]]], [500], leads, config)
    for row, lead in enumerate(leads):
        if lead not in missing:
            np.testing.assert_array_equal(part.x_BLT[0, row], whole[LEADS.index(lead)])


@pytest.mark.parametrize("rate_hz", [240, 250, 300, 400, 1000])
def test_another_rate_gives_the_same_beats_at_the_same_time(rate_hz: int):
    time_s = np.arange(5000) / 500
    pure_mv = lambda at: np.stack([(1 + k / 12) * np.sin(2 * np.pi * (3 + k) * at) for k in range(12)])  # noqa: E731
    other_mv = pure_mv(np.arange(10 * rate_hz) / rate_hz)
    config = PreprocessConfig(mains_hz=0, scale="record")
    expected = preprocess_signals([pure_mv(time_s)], [500], LEADS, config).x_BLT[0]
    resampled = preprocess_signals([other_mv], [rate_hz], LEADS, config).x_BLT[0]
    middle = slice(1250, 3750)  # the high-pass rings for seconds after the ends, which padding decides
    assert np.abs(resampled[:, middle] - expected[:, middle]).max() < 0.02


def test_long_recordings_give_their_first_window_and_short_ones_are_padded():
    config = PreprocessConfig(scale="lead")
    signal_mv_LT = ecg_mv()
    long_mv_LT = np.concatenate([signal_mv_LT, ecg_mv(9)], axis=1)
    first = preprocess_signals([long_mv_LT], [500], LEADS, config).x_BLT
    np.testing.assert_array_equal(first, preprocess_signals([signal_mv_LT], [500], LEADS, config).x_BLT)
    short = preprocess_signals([signal_mv_LT[:, :3000]], [500], LEADS, config)
    assert short.refused_B == [None]
    assert not short.x_BLT[0, :, 3000:].any()
    np.testing.assert_allclose(short.x_BLT[0, :, :3000].std(axis=1, ddof=1), 1, rtol=1e-4)


def test_gaps_are_filled_linearly_and_a_lead_that_is_mostly_gap_is_masked():
    signal_mv_LT = ecg_mv()
    with_gap_LT, bridged_LT = signal_mv_LT.copy(), signal_mv_LT.astype(np.float64)
    with_gap_LT[3, 1000:1100] = np.nan
    bridged_LT[3, 1000:1100] = np.interp(np.arange(1000, 1100), [999, 1100], signal_mv_LT[3, [999, 1100]])
    config = PreprocessConfig()
    given, expected = (preprocess_signals([s], [500], LEADS, config) for s in (with_gap_LT, bridged_LT))
    np.testing.assert_allclose(given.x_BLT, expected.x_BLT, atol=1e-6)
    with_gap_LT[3, :2000] = np.nan
    masked = preprocess_signals([with_gap_LT], [500], LEADS, config)
    assert masked.lead_mask_BL[0].tolist() == [lead != "aVR" for lead in LEADS]
    assert not masked.x_BLT[0, 3].any()


def test_a_flat_lead_is_masked_whatever_its_level():
    signal_mv_LT = ecg_mv()
    signal_mv_LT[7] = 0.37  # a z-score would turn this into noise of unit variance
    prepared = preprocess_signals([signal_mv_LT], [500], LEADS, PreprocessConfig())
    assert prepared.lead_mask_BL[0].tolist() == [lead != "V2" for lead in LEADS]
    assert not prepared.x_BLT[0, 7].any()


@pytest.mark.parametrize(
    ("signal_mv_LT", "rate_hz", "code", "says"),
    [
        (ecg_mv() * 1000, 500, "amplitude", "microvolts"),
        (ecg_mv()[:, :900], 500, "too_short", "1.80 s"),
        (ecg_mv(), 50, "rate", "50 Hz"),
        (np.zeros((12, 5000)), 500, "leads", "0 of 12"),
        (np.where(np.arange(12)[:, None] < 5, ecg_mv(), np.nan), 500, "leads", "V6"),
    ],
)
def test_refusals_say_why(signal_mv_LT: np.ndarray, rate_hz: float, code: str, says: str):
    prepared = preprocess_signals([ecg_mv(), signal_mv_LT], [500, rate_hz], LEADS, PreprocessConfig())
    assert prepared.accepted_B.tolist() == [True, False]
    assert prepared.refused_B[1].code == code
    assert says in str(prepared.refused_B[1])
    assert np.isfinite(prepared.x_BLT).all()
    assert not prepared.lead_mask_BL[1].any()


def test_leads_are_taken_by_name():
    signal_mv_LT = ecg_mv()
    backwards = {lead.upper(): signal_mv_LT[LEADS.index(lead)] for lead in reversed(LEADS)}
    record = Record.from_leads(backwards, 500)
    config = PreprocessConfig()
    expected = preprocess_signals([signal_mv_LT[:6]], [500], LIMB_LEADS, config)
    np.testing.assert_array_equal(preprocess([record], LIMB_LEADS, config).x_BLT, expected.x_BLT)


def test_the_digest_names_every_setting():
    assert PreprocessConfig().digest == PreprocessConfig().digest
    assert len({PreprocessConfig(scale=s).digest for s in ("lead", "record", "none")}) == 3
    with pytest.raises(LsemvaeError, match="highpass_hz=400"):
        PreprocessConfig(highpass_hz=400)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    nan_share=st.floats(0, 1),
    scale=st.sampled_from(["lead", "record", "none"]),
    size_mv=st.sampled_from([0.0, 1e-6, 1.0, 1e4, 1e30]),
    samples=st.integers(1, 1500),
)
def test_whatever_comes_in_what_goes_on_is_finite(seed, nan_share, scale, size_mv, samples):
    rng = np.random.default_rng(seed)
    signal_mv_LT = (rng.normal(size=(3, samples)) * size_mv).astype(np.float32)
    signal_mv_LT[rng.random((3, samples)) < nan_share] = np.nan
    config = PreprocessConfig(samples=1000, scale=scale, min_seconds=1)
    prepared = preprocess_signals([signal_mv_LT], [500], ("I", "II", "V1"), config)
    assert np.isfinite(prepared.x_BLT).all()
    assert prepared.accepted_B[0] == prepared.lead_mask_BL[0].any()


def long_mv() -> np.ndarray:
    """30 s of six leads at 300 Hz, as a handheld has them: noise in the first 10 s, wander in the last."""
    rng = np.random.default_rng(5)
    at_s = np.arange(8999) / 300
    signal_mv_LT = np.tile(np.exp(-(((at_s % 0.8) - 0.4) ** 2) / 2e-4), (6, 1))
    signal_mv_LT[:, :3000] += rng.normal(scale=0.2, size=(6, 3000))
    signal_mv_LT[:, 6000:] += np.sin(2 * np.pi * 0.3 * at_s[6000:])
    return signal_mv_LT.astype(np.float32)


def test_windows_cover_a_recording_once():
    signal_mv_LT = long_mv()
    parts = windows(signal_mv_LT, 300, PreprocessConfig())
    assert [part.shape[1] for part in parts] == [3000, 3000, 2999]  # one sample short of three, in real files too
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), signal_mv_LT)
    for seconds in (2.5, 10, 15):
        (only,) = windows(signal_mv_LT[:, : int(seconds * 300)], 300, PreprocessConfig())
        assert only.shape[1] == seconds * 300


@pytest.mark.parametrize(("window", "chosen"), [("first", 0), ("cleanest", 1), ("all", 0)])
def test_which_window_of_a_longer_recording_is_seen(window: str, chosen: int):
    signal_mv_LT = long_mv()
    config = PreprocessConfig(window=window)
    seen = preprocess_signals([signal_mv_LT], [300], LIMB_LEADS, config).x_BLT[0]
    for index in range(3):
        alone = preprocess_signals([windows(signal_mv_LT, 300, config)[index]], [300], LIMB_LEADS, config).x_BLT[0]
        # A window that is cut out has an edge where the recording goes on, which the filters feel.
        close = np.abs(seen[:, 2000:3000] - alone[:, 2000:3000]).max() < 0.05
        assert close == (index == chosen), index


def test_missing_samples_count_before_noise():
    signal_mv_LT = long_mv()
    signal_mv_LT[:, 4000:4100] = np.nan
    config = PreprocessConfig(window="cleanest")
    seen = preprocess_signals([signal_mv_LT], [300], LIMB_LEADS, config).x_BLT[0]
    first = preprocess_signals([windows(signal_mv_LT, 300, config)[0]], [300], LIMB_LEADS, config).x_BLT[0]
    np.testing.assert_array_equal(seen, first)  # it is noisy, but nothing of it is missing
