"""Noise on test recordings: its strength, and that it depends on the recording alone."""

import numpy as np
import pytest

from lsemvae.evaluation.noise import STRENGTHS, AddNoise, Noise

RATE_HZ = 250


@pytest.fixture
def x_LT() -> np.ndarray:
    x_LT = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32) * np.array([[1.0], [3.0], [0.0]])
    x_LT[:, 4000:] = 0  # padding
    return x_LT.astype(np.float32)


@pytest.mark.parametrize("noise", STRENGTHS, ids=lambda noise: noise.name)
def test_noise_has_its_strength_and_leaves_padding_and_absent_leads(noise: Noise, x_LT: np.ndarray):
    added_LT = (AddNoise(noise, RATE_HZ).of(x_LT, "a") - x_LT).astype(float)
    assert (added_LT[:, 4000:] == 0).all() and (added_LT[2] == 0).all()
    expected = 10 ** (-noise.snr_db / 10) + (noise.wander**2 + noise.mains**2) / 2  # white, and two sines
    for row in (0, 1):
        power = added_LT[row, :4000].var() / x_LT[row, :4000].var()
        assert power == pytest.approx(expected, rel=0.1)
    spectrum = np.abs(np.fft.rfft(added_LT[1, :4000] / x_LT[1, :4000].std())) / 2000
    at_hz = np.fft.rfftfreq(4000, 1 / RATE_HZ)
    assert spectrum[np.abs(at_hz - 50).argmin()] == pytest.approx(noise.mains, abs=0.02)


def test_noise_depends_on_recording_and_strength_alone(x_LT: np.ndarray):
    add = AddNoise(STRENGTHS[0], RATE_HZ)
    batch = add({"x_LT": np.stack([x_LT, x_LT]), "record_id": np.array(["a", "b"], dtype=object)})
    assert np.array_equal(batch["x_LT"][0], add.of(x_LT, "a")) and batch["x_LT"].dtype == np.float32
    assert not np.array_equal(batch["x_LT"][0], batch["x_LT"][1])
    assert not np.array_equal(add.of(x_LT, "a"), AddNoise(STRENGTHS[1], RATE_HZ).of(x_LT, "a"))
