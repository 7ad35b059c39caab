"""Zero-phase filters over whole arrays: the numbers of SciPy's `sosfiltfilt` and `filtfilt`, in less time.

A recursive filter goes sample by sample. Its effect on a block of samples is a matrix, though, if what a block hands on
to the next is known: the filter's state, a few numbers a section. So a block costs one matrix product, for the way
forward and the way back at once, and only the states go from block to block.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import signal as sps
from scipy.linalg import toeplitz

BLOCK, AVERAGED = 64, 32
"""Samples a block, of the high-pass and of the moving average: what was quickest at 5,000 samples."""


class _Blocks(NamedTuple):
    """A filter forward, then backward, over blocks of K samples with N numbers of state in each direction."""

    edge: int
    """Samples by which `sosfiltfilt` extends a signal at each end."""
    rest_N: np.ndarray
    """The state in which a constant 1 leaves the filter."""
    block: np.ndarray
    """[K, K + 2 N]: what a block's samples do to its result, and to both states where they leave it."""
    states: np.ndarray
    """[2 N, K]: what the states that enter it do to its result."""
    step_NN: np.ndarray
    """A state across a block of zeros."""
    turned_NN: np.ndarray
    """What the forward state that enters does to the backward state that leaves."""
    last_K: np.ndarray
    """The block's last sample on the way forward, from its samples …"""
    last_N: np.ndarray
    """… and from the state that enters."""


@lru_cache(maxsize=8)
def _highpass(order: int, cutoff_hz: float, rate_hz: int) -> _Blocks:
    sos = sps.butter(order, cutoff_hz, "highpass", fs=rate_hz, output="sos")
    count = 2 * len(sos)
    # The filter itself says what a sample, or a number of its state, does to a block and to the state after it.
    unit = np.vstack([np.eye(BLOCK), np.zeros((count, BLOCK))])
    state = np.zeros((len(sos), BLOCK + count, 2))
    for number in range(count):
        state[number // 2, BLOCK + number, number % 2] = 1
    result, state = sps.sosfilt(sos, unit, zi=state)
    state = state.transpose(1, 0, 2).reshape(BLOCK + count, count)
    forth_KK, leaves_KN, enters_NK, step_NN = result[:BLOCK], state[:BLOCK], result[BLOCK:], state[BLOCK:]
    back_KK, leaves_back_KN = forth_KK[::-1, ::-1], leaves_KN[::-1]
    taps = 2 * len(sos) + 1 - min((sos[:, 2] == 0).sum(), (sos[:, 5] == 0).sum())
    return _Blocks(
        edge=3 * taps,
        rest_N=sps.sosfilt_zi(sos).reshape(-1),
        block=np.hstack([forth_KK @ back_KK, leaves_KN, forth_KK @ leaves_back_KN]),
        states=np.vstack([enters_NK @ back_KK, enters_NK[:, ::-1]]),
        step_NN=step_NN,
        turned_NN=enters_NK @ leaves_back_KN,
        last_K=forth_KK[:, -1].copy(),
        last_N=enters_NK[:, -1].copy(),
    )


def highpass(x: np.ndarray, order: int, cutoff_hz: float, rate_hz: int) -> np.ndarray:
    """Butterworth, forward and backward along the last axis -> float64. Equals `sosfiltfilt` within rounding."""
    blocks = _highpass(order, cutoff_hz, rate_hz)
    samples, count = x.shape[-1], len(blocks.rest_N)
    if samples <= blocks.edge:
        raise ValueError(f"{samples} samples: a high-pass of order {order} needs more than {blocks.edge}")
    # Filled up to whole blocks at the front, by a constant: it does not change the state in which the filter begins.
    front = blocks.edge + -(samples + 2 * blocks.edge) % BLOCK
    padded = np.empty((*x.shape[:-1], front + samples + blocks.edge))
    _extend(padded, x, front, blocks.edge)
    result = padded.reshape(*x.shape[:-1], -1, BLOCK) @ blocks.block
    leaves = np.moveaxis(result[..., BLOCK:], -2, 0)  # block by block
    enters = np.empty(leaves.shape)
    forth, back = enters[..., :count], enters[..., count:]

    state = padded[..., :1] * blocks.rest_N
    for number in range(len(enters)):
        forth[number] = state
        state = state @ blocks.step_NN + leaves[number, ..., :count]
    last = padded[..., -BLOCK:] @ blocks.last_K + forth[-1] @ blocks.last_N
    state = last[..., None] * blocks.rest_N
    leaves_back = leaves[..., count:] + forth @ blocks.turned_NN
    for number in reversed(range(len(enters))):
        back[number] = state
        state = state @ blocks.step_NN + leaves_back[number]

    filtered = np.moveaxis(enters, 0, -2) @ blocks.states
    filtered += result[..., :BLOCK]
    return filtered.reshape(padded.shape)[..., front : front + samples]


def moving_average(x: np.ndarray, taps: int) -> np.ndarray:
    """Over `taps` samples, forward and backward along the last axis: `filtfilt` of ones, within rounding."""
    if taps < 2:
        return x
    samples, edge = x.shape[-1], taps - 1
    padded = np.zeros((*x.shape[:-1], samples + -samples % AVERAGED + 2 * edge))
    _extend(padded[..., : samples + 2 * edge], x, edge, edge)
    windows = sliding_window_view(padded, AVERAGED + 2 * edge, axis=-1)[..., ::AVERAGED, :]
    return (windows @ _triangle(taps)).reshape(*x.shape[:-1], -1)[..., :samples]


@lru_cache(maxsize=8)
def _triangle(taps: int) -> np.ndarray:
    """[AVERAGED + 2 (taps - 1), AVERAGED]: a window of samples to the averages in its middle."""
    weights = np.convolve(np.ones(taps), np.ones(taps)) / taps**2
    return toeplitz(np.pad(weights, (0, AVERAGED - 1)), np.zeros(AVERAGED))


def _extend(padded: np.ndarray, x: np.ndarray, front: int, edge: int) -> None:
    """`x` from `front` on, `edge` samples mirrored through its first and last point, and a constant before them."""
    samples = x.shape[-1]
    padded[..., front : front + samples] = x
    np.subtract(2 * x[..., :1], x[..., edge:0:-1], out=padded[..., front - edge : front])
    np.subtract(2 * x[..., -1:], x[..., -2 : -edge - 2 : -1], out=padded[..., front + samples :])
    padded[..., : front - edge] = padded[..., front - edge : front - edge + 1]
