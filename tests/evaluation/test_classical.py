"""Classical features: measured on simulated ECGs whose parameters are known, and absent where nothing can be found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.evaluation import classical
from lsemvae.evaluation.embedding import CLASSICAL, QUANTILES, Classical
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import FIXED_MV, PreprocessConfig, preprocess_signals
from lsemvae.simulate import EcgParameters, simulate_ecg

IN_MV = PreprocessConfig(scale="none")


def ecg_mv(**parameters: object) -> np.ndarray:
    signal_mv_LT, _ = simulate_ecg(EcgParameters(**parameters), np.random.default_rng(1))
    return preprocess_signals([signal_mv_LT.astype(np.float32)], [500], LEADS, IN_MV).x_BLT[0].astype(float)


def measured(signal_mv_LT: np.ndarray, leads: tuple[str, ...] = LEADS) -> dict[str, float]:
    mask_L = np.ones(len(leads), dtype=bool)
    rows = [LEADS.index(lead) for lead in leads]
    values = classical.beat_features(signal_mv_LT[rows], mask_L, 500, leads)
    return dict(zip(classical.names(leads), values.tolist(), strict=True))


@pytest.mark.parametrize("rate_bpm", [50, 75, 110, 160])
def test_the_heart_rate_is_found(rate_bpm: float):
    assert measured(ecg_mv(heart_rate_bpm=rate_bpm))["heart_rate_bpm"] == pytest.approx(rate_bpm, rel=0.06)


def test_intervals_and_amplitudes_of_an_average_heart_are_those_of_people():
    found = measured(ecg_mv())
    assert 60 < found["qrs_ms"] < 120 and 90 < found["pr_ms"] < 220 and 300 < found["qt_ms"] < 480
    assert found["V1.s_mv"] < -0.3 < 0.5 < found["V5.r_mv"]
    assert found["II.p_mv"] > 0.05 and found["II.t_mv"] > 0.1
    angle_deg = np.degrees(np.arctan2(found["qrs_axis_sin"], found["qrs_axis_cos"]))
    assert 0 < angle_deg < 90


def test_right_heart_overload_moves_the_axis_to_the_right_and_raises_r_in_v1():
    healthy, ill = measured(ecg_mv(severity=0.0)), measured(ecg_mv(severity=1.6))
    assert ill["qrs_axis_cos"] < healthy["qrs_axis_cos"] - 0.3
    assert ill["V1.r_mv"] > healthy["V1.r_mv"] + 0.2
    assert ill["II.p_mv"] > healthy["II.p_mv"]


def test_the_axis_needs_leads_i_and_ii():
    signal_mv_LT = ecg_mv()
    assert np.isnan(measured(signal_mv_LT, ("II", "V1", "V5"))["qrs_axis_cos"])
    both = measured(signal_mv_LT, LIMB_LEADS)
    assert both["qrs_axis_cos"] ** 2 + both["qrs_axis_sin"] ** 2 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "constant", "one beat", "absent"])
def test_where_no_beats_are_found_everything_is_unknown_and_nothing_fails(kind: str):
    signal_mv_LT, mask_L = np.zeros((12, 5000)), np.ones(12, dtype=bool)
    if kind == "constant":
        signal_mv_LT += 0.3
    if kind == "one beat":
        signal_mv_LT[:, 2500:2510] = 1.0
    if kind == "absent":
        signal_mv_LT, mask_L = ecg_mv(), np.zeros(12, dtype=bool)
    values = classical.beat_features(signal_mv_LT, mask_L, 500, LEADS)
    assert values.shape == (len(classical.names(LEADS)),) and np.isnan(values).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(100, 1500), st.floats(1e-6, 1e3))
def test_noise_of_any_length_and_size_gives_numbers_or_nan(seed: int, samples: int, size: float):
    signal_mv_LT = np.random.default_rng(seed).standard_normal((2, samples)) * size
    mask_L = np.array([True, False])
    values = classical.beat_features(signal_mv_LT, mask_L, 250, ("I", "II"))
    assert not np.isinf(values).any() and np.isnan(values[len(classical.GLOBAL) + len(classical.PER_LEAD) :]).all()


def test_quantiles_are_of_the_deviation_from_the_median():
    signal_mv_LT = np.stack([np.arange(1001.0), np.ones(1001)])
    values = classical.quantile_features(signal_mv_LT, np.array([True, False]))
    np.testing.assert_allclose(values[:9], np.array(classical.QUANTILES) * 1000 - 500, rtol=1e-5)
    assert np.isnan(values[9:]).all()


def test_rows_of_a_scaled_model_are_measured_in_millivolts_without_their_padding():
    signal_mv_LT = ecg_mv()
    x_LT = (signal_mv_LT / FIXED_MV).astype(np.float32)
    short_LT = x_LT.copy()
    short_LT[:, 3000:] = 0
    batch = {"x_LT": np.stack([x_LT, short_LT]), "lead_mask_L": np.ones((2, 12), dtype=bool)}
    found = Classical(LEADS, 500, FIXED_MV)(batch)
    features = {f"{kind}.{name}" for kind in ("h", "observed") for name in (CLASSICAL, QUANTILES)}
    assert found.keys() == {"x_LT", "lead_mask_L"} | features
    for row, samples in enumerate((5000, 3000)):
        part_mv_LT, mask_L = signal_mv_LT[:, :samples], np.ones(12, dtype=bool)
        expected = classical.beat_features(part_mv_LT, mask_L, 500, LEADS)
        assert found[f"observed.{CLASSICAL}"][row].all() and found[f"observed.{QUANTILES}"][row].all()
        np.testing.assert_allclose(found[f"h.{CLASSICAL}"][row], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            found[f"h.{QUANTILES}"][row], classical.quantile_features(part_mv_LT, mask_L), rtol=1e-4, atol=1e-5
        )
