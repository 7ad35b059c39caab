"""Baselines from reference recordings: for expected gradients, and the mean beat.

References are model input of the same preprocessing as the recordings that are explained, usually recordings that the
model was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from lsemvae.errors import LsemvaeError
from lsemvae.explain.waves import Delineation, delineate
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.record import Record

BEFORE_S, AFTER_S = 0.25, 0.45
"""The mean beat round its R peak: from before the P wave to after the T wave at 60 to 90 beats a minute."""
TAPER_S = 0.04
"""At both ends the mean beat falls to zero, so that it does not begin or end in a step."""


@dataclass(frozen=True)
class Reference:
    """Accepted model input of R reference recordings: x_RLT, zeros where a lead is absent, and lead_mask_RL."""

    x_RLT: np.ndarray
    lead_mask_RL: np.ndarray
    leads: tuple[str, ...]
    rate_hz: float

    def __post_init__(self) -> None:
        if not len(self.x_RLT):
            raise LsemvaeError("there is no reference recording: give at least one that preprocessing accepts")

    @classmethod
    def of(cls, records: Sequence[Record], leads: Sequence[str], config: PreprocessConfig) -> Self:
        """From recordings; those that preprocessing refuses are left out. Raises LsemvaeError where none is left."""
        return cls.of_signals([r.signal_for(leads) for r in records], [r.rate_hz for r in records], leads, config)

    @classmethod
    def of_signals(
        cls, signals_mv: Sequence[np.ndarray], rates_hz: Sequence[float], leads: Sequence[str], config: PreprocessConfig
    ) -> Self:
        """The same from arrays [L, T] in mV of these leads, NaN where a sample is missing."""
        prepared = preprocess_signals(signals_mv, rates_hz, leads, config)
        accepted_B = prepared.accepted_B
        x_RLT, lead_mask_RL = prepared.x_BLT[accepted_B], prepared.lead_mask_BL[accepted_B]
        return cls(x_RLT, lead_mask_RL, tuple(leads), config.rate_hz)

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """The input of so many reference recordings, or of all if there are fewer. A seed always draws the same."""
        if count >= len(self.x_RLT):
            return self.x_RLT
        return self.x_RLT[np.sort(np.random.default_rng(seed).choice(len(self.x_RLT), count, replace=False))]

    @cached_property
    def mean_beat_LT(self) -> np.ndarray:
        """The mean over recordings of each recording's mean beat, with the R peak after `BEFORE_S`; zeros without any.

        A lead's mean is over the recordings that have it.
        """
        before, after = self._around
        sum_LT, count_L = np.zeros((len(self.leads), before + after)), np.zeros(len(self.leads))
        for x_LT, mask_L in zip(self.x_RLT, self.lead_mask_RL, strict=True):
            r_N = peaks(delineate(x_LT, mask_L, self.leads, self.rate_hz))
            r_N = r_N[(r_N >= before) & (r_N + after <= x_LT.shape[1])]
            if len(r_N):
                sum_LT += np.mean([x_LT[:, r - before : r + after] for r in r_N], axis=0)
                count_L += mask_L
        ramp = np.linspace(0, 1, round(TAPER_S * self.rate_hz) + 2)[1:-1]
        taper_T = np.ones(before + after)
        taper_T[: len(ramp)], taper_T[-len(ramp) :] = ramp, ramp[::-1]
        return (sum_LT / np.maximum(count_L, 1)[:, None] * taper_T).astype(np.float32)

    def beats_like(self, x_LT: np.ndarray, waves: Delineation) -> np.ndarray:
        """The mean beat at each R peak of a recording, [L, T]; zeros between beats, and where there is no beat.

        Where two beats lie closer than the mean beat is long, the gap between their R peaks is divided between them in
        the ratio of `AFTER_S` to `BEFORE_S`.
        """
        before, after = self._around
        samples, r_N = x_LT.shape[1], peaks(waves)
        found_LT = np.zeros_like(x_LT)
        borders_N = r_N[:-1] + np.diff(r_N) * AFTER_S / (BEFORE_S + AFTER_S)
        firsts_N = np.concatenate([[0], borders_N]).astype(int)
        lasts_N = np.concatenate([borders_N, [samples]]).astype(int)
        for r, first, last in zip(r_N, firsts_N, lasts_N, strict=False):
            start, end = max(r - before, first), min(r + after, last)
            found_LT[:, start:end] = self.mean_beat_LT[:, start - (r - before) : end - (r - before)]
        return found_LT

    @property
    def _around(self) -> tuple[int, int]:
        return round(BEFORE_S * self.rate_hz), round(AFTER_S * self.rate_hz)


def peaks(waves: Delineation) -> np.ndarray:
    """The R peaks of a recording, in samples, in order."""
    if not waves.beats:
        return np.zeros(0, dtype=int)
    found_N = waves.edges["QRS"][:, 1]
    return np.unique(np.round(found_N[np.isfinite(found_N)]).astype(int))
