"""Samples in int16: the error is at most half a step, whatever a lead looks like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.data.layouts import ModelInput
from lsemvae.data.packing import pack
from lsemvae.formats import read
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.training.resident import widened

PACKED = ModelInput(LEADS, PreprocessConfig(), packed=True)


def through_int16(x_BLT: np.ndarray) -> np.ndarray:
    tensors = {name: torch.from_numpy(values) for name, values in pack(x_BLT).items()}
    return widened(PACKED, tensors)["x_BLT"].numpy()


@settings(max_examples=100, deadline=None)
@given(
    level=st.floats(-300, 300, width=32),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1000.0]),
    seed=st.integers(0, 10),
    zeros=st.booleans(),
)
def test_the_error_is_at_most_half_a_step(level: float, size: float, seed: int, zeros: bool):
    x_BLT = (level + size * np.random.default_rng(seed).standard_normal((1, 2, 64))).astype(np.float32)
    x_BLT[:, 1] = level
    if zeros:
        x_BLT[:, 0, 40:] = 0
    found_BLT = through_int16(x_BLT)
    range_BL = x_BLT.max(axis=2) - x_BLT.min(axis=2)
    # Beside half a step: what float32 itself cannot tell apart at this level.
    tolerance_BL = 0.51 * range_BL / 65_534 + 3 * np.spacing(np.abs(x_BLT).max(axis=2))
    assert (np.abs(found_BLT - x_BLT) <= tolerance_BL[..., None]).all()
    np.testing.assert_array_equal(found_BLT[:, 1], x_BLT[:, 1])
    if zeros:
        assert not found_BLT[:, 0, 40:].any()


def test_the_worked_example_is_right():
    packed = pack(np.array([[[-1.0, 0.0, 2.0]]], dtype=np.float32))
    assert packed["zero_BL"].item() == 10_923 and packed["packed_BLT"].tolist() == [[[-32_768, -10_923, 32_767 - 1]]]


@pytest.mark.shared_data
def test_a_recordings_input_stays_within_a_thousandth_of_a_standard_deviation(shared_data: Path):
    """Real recordings and a simulated one; float16 would be off by up to 6e-3."""
    paths = [
        path
        for name, every in (("ptbxl500", 50), ("ludb", 40))
        for path in sorted((shared_data / name).glob("**/*.hea"))[::every]
    ]
    records = [read(path) for path in paths]
    signals, rates_hz = [record.signal_for(LEADS) for record in records], [record.rate_hz for record in records]
    simulated, _ = simulate_ecg(EcgParameters(severity=0.5, heart_rate_bpm=70.0), np.random.default_rng(0))
    prepared = preprocess_signals(
        [*signals, simulated.astype(np.float32)], [*rates_hz, 500.0], LEADS, PreprocessConfig()
    )
    x_BLT = prepared.x_BLT[prepared.accepted_B]
    assert len(x_BLT) > 10
    std_BL1 = x_BLT.std(axis=2, keepdims=True)
    error_BLT = np.abs(through_int16(x_BLT) - x_BLT)
    assert (error_BLT <= 3e-4 * std_BL1).all()
