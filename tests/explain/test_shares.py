"""Shares are those of the whole recording, and no sample counts twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lsemvae.explain.shares import shares
from lsemvae.explain.waves import WAVES

VALUES = st.floats(-1e3, 1e3, width=32).map(lambda value: value if abs(value) > 1e-3 else 0.0)


@st.composite
def attributions(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    wave_T = draw(arrays.arrays(np.int8, shape[1], elements=st.integers(0, len(WAVES) - 1)))
    return draw(arrays.arrays(np.float32, shape, elements=VALUES)), wave_T


@settings(deadline=None, max_examples=100)
@given(attributions(), st.sampled_from([0.25, 8.0]))
def test_what_holds_for_all_attributions(case, scale):
    values_LT, wave_T = case
    found = shares(values_LT, wave_T)
    assert found.signed_LW.shape == found.absolute_LW.shape == (len(values_LT), len(WAVES))
    assert found.absolute_LW.sum() == pytest.approx(1.0 if values_LT.any() else 0.0, rel=1e-5)
    assert (np.abs(found.signed_LW) <= found.absolute_LW + 1e-6).all() and (found.absolute_LW >= 0).all()
    for before, after in zip(found, shares(scale * values_LT, wave_T), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    np.testing.assert_allclose(shares(-values_LT, wave_T).signed_LW, -found.signed_LW, atol=1e-6)
    total = np.abs(values_LT).sum(dtype=np.float64) or 1.0
    assert found.signed_LW.sum() == pytest.approx(values_LT.sum(dtype=np.float64) / total, abs=1e-4)


def test_each_sample_belongs_to_one_cell():
    """One sample after another is the only one that is not 0: it is in its own lead and wave, and nowhere else."""
    wave_T = np.array([0, 1, 1, 2, 3, 4])
    for lead in range(2):
        for at, wave in enumerate(wave_T):
            values_LT = np.zeros((2, 6), dtype=np.float32)
            values_LT[lead, at] = -3.0
            expected_LW = np.zeros((2, len(WAVES)))
            expected_LW[lead, wave] = 1.0
            found = shares(values_LT, wave_T)
            np.testing.assert_array_equal(found.absolute_LW, expected_LW)
            np.testing.assert_array_equal(found.signed_LW, -expected_LW)


def test_opposite_signs_cancel_in_the_signed_share_only():
    found = shares(np.array([[2.0, -1.0, 1.0]]), np.array([1, 1, 3]))
    np.testing.assert_allclose(found.signed_LW, [[0, 0.25, 0, 0.25, 0]])
    np.testing.assert_allclose(found.absolute_LW, [[0, 0.75, 0, 0.25, 0]])
