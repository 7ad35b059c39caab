"""IGAR against cases computed by hand from its published definition."""

import numpy as np
import pytest

from lsemvae.explain.igar import PEAKS, SETTINGS, igar, peaks
from lsemvae.explain.waves import delineate
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import EcgParameters, simulate_ecg

NOWHERE = {name: np.full((3, 1), np.nan) for name in PEAKS}


def test_leads_and_waves_of_a_small_case():
    """At 25 Hz, 40 ms is one sample.

    Lead 0 from -1 to 1: 1, 0.7, 0.2, 0.65 and 0 after scaling, 6 times 0: 2 of 10 samples at 0.7 or above.
    Lead 1 from 0 to 10: 10, 8, 7 and 7 times 0: 3 of 10. Lead 2 is absent.
    """
    scaled_0 = np.array([1, 0.7, 0.2, 0.65, 0, 0, 0, 0, 0, 0])
    values_LT = np.zeros((3, 10))
    values_LT[0] = 2 * scaled_0 - 1
    values_LT[0, 1] += 1e-9  # rounding does not decide
    values_LT[1, :3] = [10, 8, 7.001]
    at = {"P": [np.nan, 1], "Q": [1, np.nan], "R": [2, 0], "S": [3, 9], "T": [8, np.nan]}
    found = igar(
        values_LT,
        np.array([True, True, False]),
        {name: np.array([[found[0]], [found[1]], [5.0]]) for name, found in at.items()},
        25,
    )
    np.testing.assert_allclose(found.lead_L, [0.4, 0.6, np.nan])
    # Lead 0 at 0.6 or above: samples 0, 1, 3. Q (0 to 2): 2. R (1 to 3): 2. S (2 to 4): 1. T (7 to 9): 0. No P.
    np.testing.assert_allclose(found.wave_LP[0], [0, 0.4, 0.4, 0.2, 0])
    # Lead 1: samples 0, 1, 2. P (0 to 2): 3. R (0 to 1): 2. S (8 to 9): 0.
    np.testing.assert_allclose(found.wave_LP[1], [0.6, 0, 0.4, 0, 0])
    assert np.isnan(found.wave_LP[2]).all()


def test_windows_of_one_wave_do_not_count_a_sample_twice():
    values_LT = np.ones((1, 12))
    values_LT[0, 6:] = 0
    at = {name: np.full((1, 2), np.nan) for name in PEAKS} | {"R": np.array([[2.0, 3.0]]), "S": np.array([[4.0, 9.0]])}
    # R: 1 to 4, 4 samples. S: 3 to 5 and 8 to 10, 3 of them at the threshold.
    np.testing.assert_allclose(igar(values_LT, np.array([True]), at, 25).wave_LP[0], [0, 0, 4 / 7, 3 / 7, 0])


def test_size_and_sign_are_lost_as_published():
    """What the docstring says of its weaknesses is so."""
    values_LT = np.random.default_rng(0).standard_normal((3, 500))
    everywhere = np.ones(3, dtype=bool)
    found = igar(values_LT, everywhere, NOWHERE, 500)
    tiny_LT = values_LT * [[1.0], [1e-6], [1.0]]
    np.testing.assert_allclose(igar(tiny_LT, everywhere, NOWHERE, 500).lead_L, found.lead_L)
    np.testing.assert_allclose(igar(values_LT - 100, everywhere, NOWHERE, 500).lead_L, found.lead_L)
    assert not np.allclose(igar(-values_LT, everywhere, NOWHERE, 500).lead_L, found.lead_L)


def test_constant_attributions_have_no_share():
    found = igar(np.ones((2, 50)), np.array([True, True]), {name: np.array([[5.0], [5.0]]) for name in PEAKS}, 500)
    assert found.lead_L.tolist() == [0, 0] and not found.wave_LP.any()


def test_peaks_of_each_lead_are_where_the_signal_is_largest_and_least():
    signal_mv_LT, _ = simulate_ecg(EcgParameters(), np.random.default_rng(0))
    x_LT = preprocess_signals([signal_mv_LT], [500], LEADS, PreprocessConfig()).x_BLT[0]
    waves = delineate(x_LT, np.ones(12, dtype=bool), LEADS, 500)
    found = peaks(x_LT, waves)
    assert all(found[name].shape == (12, waves.beats) for name in PEAKS)
    at = {name: found[name].astype(int) for name in ("Q", "R", "S")}
    assert (at["Q"] <= at["R"]).all() and (at["R"] <= at["S"]).all()
    onset, _, offset = waves.edges["QRS"].astype(int).T
    assert (at["Q"] >= onset).all() and (at["S"] <= offset).all()
    lead = LEADS.index("V1")  # rS
    for beat in range(waves.beats):
        qrs_T = x_LT[lead, onset[beat] : offset[beat] + 1]
        assert x_LT[lead, at["R"][lead, beat]] == qrs_T.max() and x_LT[lead, at["S"][lead, beat]] == qrs_T.min()
    np.testing.assert_array_equal(found["T"][3], waves.edges["T"][:, 1])
    result = igar(x_LT, np.ones(12, dtype=bool), found, 500)
    assert result.lead_L.sum() == pytest.approx(1)


def test_nothing_is_found_without_beats():
    waves = delineate(np.zeros((2, 500)), np.array([True, True]), LEADS[:2], 500)
    found = peaks(np.zeros((2, 500)), waves)
    assert all(values.shape == (2, 0) for values in found.values())
    values_LT = np.random.default_rng(0).standard_normal((2, 500))
    assert not igar(values_LT, np.array([True, True]), found, 500).wave_LP.any()


def test_its_settings_are_those_published():
    assert (SETTINGS.baseline, SETTINGS.steps, SETTINGS.most_steps) == ("zero", 50, 50)
