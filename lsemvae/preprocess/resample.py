"""Resampling by a ratio of small whole numbers, whatever rate a recording declares.

Functions import SciPy, which takes 0.9 s, when they need it: most recordings have the model's rate.
"""

from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import numpy as np

MAX_FACTOR = 4000
"""Largest number in an exact ratio: that of every whole rate up to 4,000 Hz is within it."""
RATE_TOLERANCE = Fraction(1, 10_000)
"""A rate whose exact ratio has larger numbers is taken for the simplest rate that differs by at most 0.01 %. Over 10 s
this moves a sample by at most 1 ms."""


def resample(signal_mv_LT: np.ndarray, missing_LT: np.ndarray, from_hz: float, to_hz: int) -> np.ndarray:
    """[L, T] float64 without gaps -> float32 at `to_hz`, by a polyphase filter; what is missing is NaN again."""
    from scipy.signal import resample_poly

    up, down = ratio(from_hz, to_hz)
    resampled_mv_LT = resample_poly(signal_mv_LT, up, down, axis=1, window=_low_pass(max(up, down)), padtype="line")
    if missing_LT.any():
        nearest = np.minimum(np.arange(resampled_mv_LT.shape[1]) * down // up, missing_LT.shape[1] - 1)
        resampled_mv_LT[missing_LT[:, nearest]] = np.nan
    return resampled_mv_LT.astype(np.float32)


@lru_cache(maxsize=1024)
def ratio(from_hz: float, to_hz: int) -> tuple[int, int]:
    """(up, down), both at most 5,001. Their size decides how long resampling takes and how much memory it needs.

    360 Hz to 500 Hz is 25 : 18. 499.999 Hz would be 500,000 : 499,999, a filter of ten million taps; the simplest
    ratio within 0.01 % of it is 1 : 1.
    """
    exact = Fraction(to_hz) / Fraction(from_hz).limit_denominator(1000)
    if max(exact.numerator, exact.denominator) > MAX_FACTOR:
        wanted = Fraction(to_hz) / Fraction(from_hz).limit_denominator(10**6)
        exact = _simplest(wanted * (1 - RATE_TOLERANCE), wanted * (1 + RATE_TOLERANCE))
    return exact.numerator, exact.denominator


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction from `low` to `high` with the smallest denominator: 22/7 from 3.14 to 3.145."""
    if ceil(low) <= high:
        return Fraction(ceil(low))
    whole = floor(low)
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))


@lru_cache(maxsize=32)
def _low_pass(factor: int) -> np.ndarray:
    """The filter that `scipy.signal.resample_poly` designs anew at each call: 20 taps for each step of the ratio."""
    from scipy.signal import firwin

    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0))
