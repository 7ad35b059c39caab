"""Explains recordings with one bundle: the same way for a cohort, in a notebook and at the endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lsemvae.bundle import Score, Scorer
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.explain.occlusion import without_leads, without_waves
from lsemvae.explain.shares import Shares, shares
from lsemvae.explain.waves import Delineation, delineate
from lsemvae.preprocess import Prepared, preprocess_signals, windows

CHUNK = 16  # windows explained in one pass: more would only cost memory


@dataclass(frozen=True)
class Window:
    """One window of a recording, as the model sees it.

    x_LT        the model's input, in the bundle's leads and at the preprocessing's rate
    values_LT   attributions, in units of the logit
    logit, baseline_logit, delta, steps   see `lsemvae.explain.attribution.Attributions`
    waves       where its waves are
    lead_drop_L  the logit less that without the lead: occlusion, which needs no gradient; NaN for an absent lead
    wave_drop_LW the logit less that where the wave of the lead is a straight line; NaN where it cannot be said
    gate_L, precision_L  of LS-EMVAE: each lead's gate weight and share of the fused precision; None for others
    """

    x_LT: np.ndarray
    lead_mask_L: np.ndarray
    values_LT: np.ndarray
    logit: float
    baseline_logit: float
    delta: float
    steps: int
    waves: Delineation
    lead_drop_L: np.ndarray
    wave_drop_LW: np.ndarray
    gate_L: np.ndarray | None = None
    precision_L: np.ndarray | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a recording has its score. Refused recordings have no windows, and the refusal of scoring in `score`.

    shares  of each lead and wave over all windows, see `lsemvae.explain.shares`; None without any
    notes   sentences: what this explanation lacks, and why
    unit_mv what 1 is in mV in `x_LT`; None where that differs from recording to recording
    """

    score: Score
    leads: tuple[str, ...]
    rate_hz: float
    windows: tuple[Window, ...] = ()
    shares: Shares | None = None
    notes: tuple[str, ...] = ()
    unit_mv: float | None = None


class Explainer:
    """Explains the scores of one bundle. Raises LsemvaeError for a model that gives no gradient."""

    def __init__(self, folder: Path, settings: Settings | None = None, device: str = "cpu") -> None:
        self.scorer = Scorer(folder, device)
        self.settings = settings or Settings()
        self._device = device

    def explain_signals(self, signals_mv: Sequence[np.ndarray], rates_hz: Sequence[float]) -> list[Explanation]:
        """One explanation for each recording [L, T] in mV of the bundle's leads, NaN where a sample is missing.

        Every window that the score takes is explained. A refused recording has the refusal that scoring gives it.
        """
        bundle = self.scorer.bundle
        scores = self.scorer.score_signals(signals_mv, rates_hz)
        parts = [self._windows(signal, rate) for signal, rate in zip(signals_mv, rates_hz, strict=True)]
        of_parts = [rate for rate, part in zip(rates_hz, parts, strict=True) for _ in part]
        prepared = preprocess_signals(
            [one for part in parts for one in part], of_parts, bundle.leads, bundle.preprocess
        )
        found = iter(self._explained(prepared))
        windows_of = [[next(found) for _ in part] for part in parts]
        return [
            self._explanation(score, [one for one in some if one is not None])
            for score, some in zip(scores, windows_of, strict=True)
        ]

    def _windows(self, signal_mv_LT: np.ndarray, rate_hz: float) -> list[np.ndarray]:
        config = self.scorer.bundle.preprocess
        return windows(signal_mv_LT, rate_hz, config) if config.window == "all" else [signal_mv_LT]

    def _explained(self, prepared: Prepared) -> list[Window | None]:
        """The windows that preprocessing accepts; None for the others."""
        model, bundle = self.scorer.model, self.scorer.bundle
        result: list[Window | None] = [None] * len(prepared.refused_B)
        rows = np.flatnonzero(prepared.accepted_B)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            x_BLT, mask_BL = prepared.x_BLT[chunk], prepared.lead_mask_BL[chunk]
            x, mask = (torch.from_numpy(values).to(self._device) for values in (x_BLT, mask_BL))
            rate_hz = bundle.preprocess.rate_hz
            waves = [
                delineate(x_LT, mask_L, bundle.leads, rate_hz) for x_LT, mask_L in zip(x_BLT, mask_BL, strict=True)
            ]
            made = attribute(model, x, mask, self.settings)
            lead_drop_BL = without_leads(model, x, mask)
            wave_drop_BLW = without_waves(model, x, mask, np.stack([one.wave_T for one in waves]))
            for b, row in enumerate(chunk):
                result[row] = Window(
                    x_BLT[b],
                    mask_BL[b],
                    made.values_BLT[b],
                    float(made.logit_B[b]),
                    float(made.baseline_logit_B[b]),
                    float(made.delta_B[b]),
                    int(made.steps_B[b]),
                    waves[b],
                    lead_drop_BL[b],
                    wave_drop_BLW[b],
                )
        return result

    def _explanation(self, score: Score, of_windows: Sequence[Window]) -> Explanation:
        bundle = self.scorer.bundle
        rate_hz, unit_mv = bundle.preprocess.rate_hz, bundle.preprocess.unit_mv
        if not of_windows:
            return Explanation(score, bundle.leads, rate_hz, unit_mv=unit_mv)
        values_LT = np.concatenate([window.values_LT for window in of_windows], axis=1)
        wave_T = np.concatenate([window.waves.wave_T for window in of_windows])
        reasons = dict.fromkeys(window.waves.reason for window in of_windows if window.waves.reason)
        notes = tuple(f"Explained by lead only: {reason}." for reason in reasons)
        return Explanation(score, bundle.leads, rate_hz, tuple(of_windows), shares(values_LT, wave_T), notes, unit_mv)
