"""Resampling: the ordinary rates as they always were, and no rate that takes much longer than they do."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as sps

from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals, window_signals
from lsemvae.preprocess.resample import RATE_TOLERANCE, ratio

ORDINARY_HZ = [
    100,
    120,
    125,
    128,
    200,
    240,
    250,
    256,
    257,
    300,
    333,
    360,
    400,
    480,
    512,
    600,
    977,
    997,
    999,
    1000,
    1024,
]
ORDINARY_HZ += [1200, 2000, 2048, 3999, 4000, 250.5, 499.5, 1000 / 3.9, 333.3333]


def recording_mv(rate_hz: float) -> np.ndarray:
    rng = np.random.default_rng(int(rate_hz))
    return (rng.normal(size=(3, int(11.5 * rate_hz))).cumsum(axis=1) * 0.01).astype(np.float32)


def before(signal_mv_LT: np.ndarray, rate_hz: float, config: PreprocessConfig) -> np.ndarray:
    """The resampling that bundles of preprocessing version 1 were trained with, written out once more."""
    exact = Fraction(config.rate_hz) / Fraction(rate_hz).limit_denominator(1000)
    part_mv_LT = signal_mv_LT[:, : int(np.ceil((config.samples / config.rate_hz + 1) * rate_hz))].astype(np.float64)
    resampled_mv_LT = sps.resample_poly(part_mv_LT, exact.numerator, exact.denominator, axis=1, padtype="line")
    return resampled_mv_LT[:, : config.samples].astype(np.float32)


@pytest.mark.parametrize(
    "config", [PreprocessConfig(), PreprocessConfig(rate_hz=250, samples=2500)], ids=["500", "250"]
)
def test_ordinary_rates_give_the_bits_of_version_1(config: PreprocessConfig):
    for rate_hz in ORDINARY_HZ:
        signal_mv_LT = recording_mv(rate_hz)
        found = window_signals([signal_mv_LT], [rate_hz], LEADS[:3], config).filled_mv_BLT[0]
        if rate_hz == config.rate_hz:
            np.testing.assert_array_equal(found, signal_mv_LT[:, : config.samples])
        else:
            np.testing.assert_array_equal(found, before(signal_mv_LT, rate_hz, config), err_msg=f"{rate_hz} Hz")


@pytest.mark.parametrize(
    ("rate_hz", "taken_for_hz"), [(499.999, 500), (500.001, 500), (499.95, 500), (3999.995, 4000), (249.9999, 250)]
)
def test_a_rate_within_the_tolerance_is_the_simple_one(rate_hz: float, taken_for_hz: float):
    signal_mv_LT = recording_mv(taken_for_hz)
    near, exact = (
        preprocess_signals([signal_mv_LT], [hz], LEADS[:3], PreprocessConfig()).x_BLT for hz in (rate_hz, taken_for_hz)
    )
    np.testing.assert_array_equal(near, exact)


@settings(max_examples=200, deadline=None)
@given(rate_hz=st.floats(100, 4000), to_hz=st.sampled_from([100, 250, 500, 1000]))
def test_every_ratio_is_small_and_close(rate_hz: float, to_hz: int):
    up, down = ratio(rate_hz, to_hz)
    assert max(up, down) <= 5001
    assert abs(up / down * rate_hz / to_hz - 1) <= 1.0001 * float(RATE_TOLERANCE)


def test_no_legal_rate_takes_gigabytes():
    """499.999 Hz needed a filter of ten million taps, and 3999.995 Hz 0.9 GB."""
    worst_hz = [499.999, 3999.995, 499.949, 999.9, 256.41, 333.333, 101.00001, 3999.0001]
    signals = [recording_mv(rate_hz) for rate_hz in worst_hz]
    tracemalloc.start()
    try:
        prepared = preprocess_signals(signals, worst_hz, LEADS[:3], PreprocessConfig())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert prepared.refused_B == [None] * len(worst_hz)
    assert peak < 50 * 2**20


def test_an_impossible_sample_is_refused_and_one_outside_the_window_does_not_count():
    signal_mv_LT = recording_mv(500)
    for value_mv in (2e6, -2e6, np.inf, -np.inf):
        spoilt_mv_LT = signal_mv_LT.copy()
        spoilt_mv_LT[1, 99] = value_mv
        (refused,) = preprocess_signals([spoilt_mv_LT], [500], LEADS[:3], PreprocessConfig()).refused_B
        assert refused is not None and refused.code == "amplitude" and "check the unit" in str(refused)
    late_mv_LT = signal_mv_LT.copy()
    late_mv_LT[1, 5600] = 2e6
    given, expected = (
        preprocess_signals([s], [500], LEADS[:3], PreprocessConfig()) for s in (late_mv_LT, signal_mv_LT)
    )
    np.testing.assert_array_equal(given.x_BLT, expected.x_BLT)
