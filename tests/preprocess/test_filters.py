"""Filters by matrix products give the numbers of SciPy's, for any order, rate, length and baseline."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as sps

from lsemvae.preprocess.filters import highpass, moving_average, slow_part


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(), (3,), (2, 12)]),
    samples=st.integers(30, 2000),
    order=st.integers(1, 6),
    cutoff_hz=st.sampled_from([0.05, 0.5, 0.67, 5.0, 40.0]),
    rate_hz=st.sampled_from([100, 500, 1000]),
    baseline_mv=st.sampled_from([0.0, 1.0, -300.0]),
)
def test_highpass_equals_sosfiltfilt(seed, shape, samples, order, cutoff_hz, rate_hz, baseline_mv):
    x = np.random.default_rng(seed).normal(size=(*shape, samples)).cumsum(-1) * 0.05 + baseline_mv
    sos = sps.butter(order, cutoff_hz, "highpass", fs=rate_hz, output="sos")
    expected = sps.sosfiltfilt(sos, x, axis=-1)
    np.testing.assert_allclose(highpass(x, order, cutoff_hz, rate_hz), expected, atol=1e-8 * np.abs(x).max())


@pytest.mark.parametrize("samples", [5000, 4990])
def test_a_window_of_ten_seconds_takes_the_quick_way_and_is_exact_at_its_ends(samples):
    assert slow_part(5, 0.5, 500, samples) is not None
    sos = sps.butter(5, 0.5, "highpass", fs=500, output="sos")
    steps = np.zeros((4, samples))
    for row, at in enumerate((0, 18, samples - 19, samples - 1)):  # where the extension begins and ends
        steps[row, at] = 1.0
    noise = np.random.default_rng(0).normal(size=(12, samples)).cumsum(-1) + 1000
    for x in (steps, noise):
        expected = sps.sosfiltfilt(sos, x, axis=-1)
        np.testing.assert_allclose(highpass(x, 5, 0.5, 500), expected, rtol=0, atol=1e-10 * np.abs(x).max())


@pytest.mark.parametrize(
    ("order", "cutoff_hz", "samples"), [(1, 0.5, 5000), (2, 0.5, 5000), (5, 5.0, 5000), (5, 0.5, 110)]
)
def test_where_what_is_taken_away_is_not_smooth_scipy_filters(order, cutoff_hz, samples):
    assert slow_part(order, cutoff_hz, 500, samples) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(), (2, 12)]), taps=st.integers(2, 20))
def test_moving_average_equals_filtfilt(seed, shape, taps):
    x = np.random.default_rng(seed).normal(size=(*shape, 200)) + 5
    expected = sps.filtfilt(np.ones(taps), [taps], x, axis=-1)
    np.testing.assert_allclose(moving_average(x, taps), expected, atol=1e-12)
    assert moving_average(x, 1) is x


def test_a_signal_is_filtered_alike_alone_and_among_others():
    x = np.random.default_rng(0).normal(size=(7, 12, 1000))
    together = highpass(x, 5, 0.5, 500)
    for b in range(len(x)):
        np.testing.assert_array_equal(highpass(x[b : b + 1], 5, 0.5, 500)[0], together[b])


def test_what_is_too_short_to_extend_is_refused():
    with pytest.raises(ValueError, match="18 samples: a high-pass of order 5 needs more than 18"):
        highpass(np.zeros(18), 5, 0.5, 500)
