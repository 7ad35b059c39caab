"""Noise on test recordings, at the three strengths that the LS-EMVAE authors publish (arXiv 2503.13470, analyses).

Each strength is white noise at a signal-to-noise ratio, baseline wander (a sine of 0.33 Hz), and mains hum (a sine of
50 Hz). Amplitudes are in standard deviations of the lead, because the authors add noise to standardised signals.
"""

import hashlib
from typing import NamedTuple

import numpy as np

WANDER_HZ, MAINS_HZ = 0.33, 50.0


class Noise(NamedTuple):
    """Signal-to-noise ratio of the white noise in dB; amplitudes of wander and hum in standard deviations."""

    snr_db: float
    wander: float
    mains: float

    @property
    def name(self) -> str:
        return f"{self.snr_db:g} dB"


STRENGTHS = (Noise(20, 0.05, 0.02), Noise(10, 0.15, 0.05), Noise(5, 0.30, 0.10))


class AddNoise:
    """A Ray Data function: adds the noise to `x_LT` of rows that have a `record_id`.

    The noise of a recording depends on its id and the strength alone, so every method meets the same. Samples that are
    exactly zero, which pad short recordings and fill absent leads, stay zero.
    """

    def __init__(self, noise: Noise, rate_hz: int) -> None:
        self._noise, self._rate_hz = noise, rate_hz

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        noisy = [self.of(x_LT, str(name)) for x_LT, name in zip(batch["x_LT"], batch["record_id"], strict=True)]
        return batch | {"x_LT": np.stack(noisy)}

    def of(self, x_LT: np.ndarray, record_id: str) -> np.ndarray:
        """x_LT with noise, float32."""
        key = hashlib.sha256(f"{record_id} {self._noise.name}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(key[:16], dtype=np.uint32))
        recorded_LT = x_LT != 0
        time_s_T = np.arange(x_LT.shape[1]) / self._rate_hz
        sines_T = np.zeros(x_LT.shape[1])
        for amplitude, rate_hz in ((self._noise.wander, WANDER_HZ), (self._noise.mains, MAINS_HZ)):
            sines_T += amplitude * np.sin(2 * np.pi * (rate_hz * time_s_T + rng.random()))
        white_LT = rng.standard_normal(x_LT.shape) * 10 ** (-self._noise.snr_db / 20)
        count_L1 = np.maximum(recorded_LT.sum(axis=1, keepdims=True), 1)
        mean_L1 = x_LT.sum(axis=1, keepdims=True) / count_L1
        spread_L1 = np.sqrt((np.where(recorded_LT, x_LT - mean_L1, 0) ** 2).sum(axis=1, keepdims=True) / count_L1)
        return (x_LT + recorded_LT * spread_L1 * (white_LT + sines_T)).astype(np.float32)
