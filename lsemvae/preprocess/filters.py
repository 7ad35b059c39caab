"""Zero-phase filters over whole arrays: the numbers of SciPy's `sosfiltfilt` and `filtfilt`, in less time.

A recursive filter computes sample by sample. But what a zero-phase high-pass takes away is slow: over a tenth of a
second it is a polynomial, and it depends only on the part of the signal that is a polynomial there. So a window of
fixed length takes three small matrix products:

    samples -> polynomials of each block -> polynomials of what is taken away -> its samples

A worked example, in the default configuration: 5,000 samples of one lead at 500 Hz, high-pass at 0.5 Hz.

    1. A block is 0.1 * 500 / 0.5 = 100 samples, so there are 50 blocks. Each is described by 9 numbers, its Legendre
       coefficients:                              [50, 100] @ basis_KP [100, 9]  ->  50 * 9 = 450 numbers
    2. `sosfiltfilt` extends the signal at its ends from the first and last 19 samples (`edge`). These are not smooth,
       so they are added one by one:              450 + 2 * 19                   ->  488 numbers
    3. The slow part's 450 numbers:               [488] @ into_CR @ out_RC       ->  450 numbers
       (into_CR [488, 125] @ out_RC [125, 450], a matrix of rank R = 125 in two factors)
    4. Its samples:                               [50, 9] @ basis_KP.T [9, 100]  ->  5,000 samples
    5. The result is the signal minus these samples.

A constant signal shows it: each block's coefficients are one number and eight zeros, step 3 gives them back, and the
result is zero.

Functions import SciPy's filters when they need them: that takes 0.9 s, and most processes that import this module never
filter.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

AVERAGED = 32
"""Samples a block of the moving average: the fastest at 5,000 samples."""
DEGREES = 9
"""Numbers that describe a smooth block: coefficients of Legendre polynomials."""
EXACT = 1e-9
"""Largest difference from SciPy's result, as a share of the signal's size; beyond it SciPy's filter is used."""
MIN_BLOCK = 24
"""In a shorter block, `DEGREES` numbers would hardly be fewer than its samples."""


class SlowPart(NamedTuple):
    """The matrices of the example above: K samples a block, P numbers a block, C numbers in all, rank R."""

    basis_KP: np.ndarray
    edge: int
    """Samples at each end that count one by one: those from which `sosfiltfilt` extends the signal."""
    into_CR: np.ndarray
    """From the numbers of all blocks and the samples at both ends …"""
    out_RC: np.ndarray
    """… to the numbers of what is taken away from each block."""


def highpass(x: np.ndarray, order: int, cutoff_hz: float, rate_hz: int) -> np.ndarray:
    """Butterworth, forward and backward along the last axis -> float64. Equals `sosfiltfilt` within 1e-9 of its input.

    Raises ValueError for a signal that is too short to be extended at its ends.
    """
    sos, edge = _sections(order, cutoff_hz, rate_hz)
    samples = x.shape[-1]
    if samples <= edge:
        raise ValueError(f"{samples} samples: a high-pass of order {order} needs more than {edge}")
    slow = slow_part(order, cutoff_hz, rate_hz, samples)
    if slow is None:
        from scipy.signal import sosfiltfilt

        return sosfiltfilt(sos, x, axis=-1)
    block = len(slow.basis_KP)
    whole = x if samples % block == 0 else np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -samples % block)])
    described = (whole.reshape(*x.shape[:-1], -1, block) @ slow.basis_KP).reshape(*x.shape[:-1], -1)
    ends = [x[..., : slow.edge], x[..., -slow.edge :]]
    # Row by row: BLAS would share a larger product among threads, which wait for each other on a busy machine.
    taken = np.concatenate([described, *ends], axis=-1)[..., None, :] @ slow.into_CR @ slow.out_RC
    low = taken.reshape(*x.shape[:-1], -1, slow.basis_KP.shape[1]) @ slow.basis_KP.T
    low = low.reshape(whole.shape)[..., :samples]
    return np.subtract(x, low, out=low)


@lru_cache(maxsize=8)
def _sections(order: int, cutoff_hz: float, rate_hz: int) -> tuple[np.ndarray, int]:
    """The filter, and the number of samples by which `sosfiltfilt` extends a signal at each end."""
    from scipy.signal import butter

    sos = butter(order, cutoff_hz, "highpass", fs=rate_hz, output="sos")
    return sos, 3 * (2 * len(sos) + 1 - min((sos[:, 2] == 0).sum(), (sos[:, 5] == 0).sum()))


@lru_cache(maxsize=8)
def slow_part(order: int, cutoff_hz: float, rate_hz: int, samples: int) -> SlowPart | None:
    """Takes half a second at 5,000 samples. None where the slow part is not smooth enough, or the window too short."""
    from scipy.linalg import svd
    from scipy.signal import sosfiltfilt

    sos, extended = _sections(order, cutoff_hz, rate_hz)
    edge = extended + 1
    block = int(0.1 * rate_hz / cutoff_hz)  # a tenth of the cutoff's period, over which the slow part is smooth
    blocks = -(-samples // block) if block else 0
    last = samples - (blocks - 1) * block  # samples of the last block
    if block < max(MIN_BLOCK, edge + DEGREES) or last < edge + DEGREES or blocks < 2:
        return None
    basis_KP = np.linalg.qr(np.polynomial.legendre.legvander(np.linspace(-1, 1, block), DEGREES - 1))[0]
    matrix_CC = np.zeros((blocks * DEGREES + 2 * edge, blocks * DEGREES))
    worst_T = np.zeros(samples)
    for b in range(blocks):
        rows = np.arange(b * block, min((b + 1) * block, samples))
        unit_ST = np.zeros((len(rows), samples))
        unit_ST[np.arange(len(rows)), rows] = 1
        # Filtering unit impulses shows the effect of each sample of the block on every other.
        taken_ST = unit_ST - sosfiltfilt(sos, unit_ST, axis=-1)
        described_SC = _describe(taken_ST, basis_KP)
        # The ends are not smooth: their samples get rows of their own, for what the block's polynomials leave over.
        inner = (rows >= edge) & (rows < samples - edge)
        part_PC = np.linalg.lstsq(basis_KP[: len(rows)][inner], described_SC[inner], rcond=None)[0]
        matrix_CC[b * DEGREES : (b + 1) * DEGREES] = part_PC
        rest_SC = described_SC - basis_KP[: len(rows)] @ part_PC
        if b == 0:
            matrix_CC[blocks * DEGREES :][:edge] = rest_SC[:edge]
        if b == blocks - 1:
            matrix_CC[blocks * DEGREES + edge :] = rest_SC[-edge:]
        made_SC = described_SC.copy()
        made_SC[inner] = basis_KP[: len(rows)][inner] @ part_PC
        made_ST = (made_SC.reshape(len(rows), blocks, DEGREES) @ basis_KP.T).reshape(len(rows), -1)[:, :samples]
        worst_T += np.abs(made_ST - taken_ST).sum(axis=0)
    if worst_T.max() > EXACT:
        return None
    u_CR, size_R, v_RC = svd(matrix_CC, full_matrices=False)
    rank = int((size_R > EXACT / np.sqrt(samples)).sum())
    return SlowPart(basis_KP, edge, u_CR[:, :rank] * size_R[:rank], v_RC[:rank].copy())


def _describe(rows_ST: np.ndarray, basis_KP: np.ndarray) -> np.ndarray:
    """[rows, blocks * P]: the coefficients of each block; those of the last block from the samples that it has."""
    block, samples = len(basis_KP), rows_ST.shape[1]
    whole = samples // block * block
    parts = [(rows_ST[:, :whole].reshape(len(rows_ST), -1, block) @ basis_KP).reshape(len(rows_ST), -1)]
    if whole < samples:
        parts.append(np.linalg.lstsq(basis_KP[: samples - whole], rows_ST[:, whole:].T, rcond=None)[0].T)
    return np.concatenate(parts, axis=1)


def moving_average(x: np.ndarray, taps: int) -> np.ndarray:
    """Over `taps` samples, forward and backward along the last axis: `filtfilt` of ones, within rounding."""
    if taps < 2:
        return x
    samples, edge = x.shape[-1], taps - 1
    padded = np.zeros((*x.shape[:-1], samples + -samples % AVERAGED + 2 * edge))
    _extend(padded[..., : samples + 2 * edge], x, edge)
    windows = sliding_window_view(padded, AVERAGED + 2 * edge, axis=-1)[..., ::AVERAGED, :]
    return (windows @ triangle(taps)).reshape(*x.shape[:-1], -1)[..., :samples]


@lru_cache(maxsize=8)
def triangle(taps: int) -> np.ndarray:
    """[AVERAGED + 2 (taps - 1), AVERAGED]: from a window of samples to the averages in its middle."""
    from scipy.linalg import toeplitz

    weights = np.convolve(np.ones(taps), np.ones(taps)) / taps**2
    return toeplitz(np.pad(weights, (0, AVERAGED - 1)), np.zeros(AVERAGED))


def _extend(padded: np.ndarray, x: np.ndarray, edge: int) -> None:
    """Writes `x` to `padded`, with `edge` samples before and after it, mirrored through its first and last point."""
    samples = x.shape[-1]
    padded[..., edge : edge + samples] = x
    np.subtract(2 * x[..., :1], x[..., edge:0:-1], out=padded[..., :edge])
    np.subtract(2 * x[..., -1:], x[..., -2 : -edge - 2 : -1], out=padded[..., edge + samples :])
