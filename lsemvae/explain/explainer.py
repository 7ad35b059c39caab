"""Explains recordings with one bundle: the same way for a cohort, in a notebook and at the endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsemvae.bundle import Score, Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.explain.experts import encoder_for, experts
from lsemvae.explain.occlusion import without_leads, without_waves
from lsemvae.explain.reference import Reference
from lsemvae.explain.shares import Shares, shares
from lsemvae.explain.waves import DELINEATED, WAVES, Delineation, delineate
from lsemvae.preprocess import Prepared, preprocess_signals, windows
from lsemvae.record import Record

CHUNK = 16  # windows explained in one pass: more would only cost memory
REST = WAVES.index("rest")
NOT_CONVERGED = "The attributions do not add up to within the bound"
"""How the note of such a recording begins; reports count it."""


@dataclass(frozen=True)
class Window:
    """One window of a recording, as the model sees it.

    x_LT        the model's input, in the bundle's leads and at the preprocessing's rate
    values_LT   attributions, in units of the logit
    logit, baseline_logit, delta, steps   see `lsemvae.explain.attribution.Attributions`
    waves       where its waves are
    lead_drop_L  the logit less that without the lead, by `lsemvae.explain.occlusion`; NaN for an absent lead
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

    shares  of each lead and wave over all windows, see `lsemvae.explain.shares`; None without any window. Where no
            window has a beat, "rest" holds all of each lead and the waves are NaN: they are not known
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

    @property
    def there_L(self) -> np.ndarray:
        """Which leads some window has."""
        return np.any([window.lead_mask_L for window in self.windows], axis=0)

    @property
    def lead_drop_L(self) -> np.ndarray:
        """The mean over the windows in which it is known; NaN where it is known in none. So, too, of the following."""
        return mean_over_windows([window.lead_drop_L for window in self.windows])

    @property
    def wave_drop_LW(self) -> np.ndarray:
        return mean_over_windows([window.wave_drop_LW for window in self.windows])

    @property
    def gate_L(self) -> np.ndarray | None:
        """None where the model has no such weights."""
        known = [window.gate_L for window in self.windows if window.gate_L is not None]
        return mean_over_windows(known) if known else None

    @property
    def precision_L(self) -> np.ndarray | None:
        """None where the model has no such weights."""
        known = [window.precision_L for window in self.windows if window.precision_L is not None]
        return mean_over_windows(known) if known else None

    @property
    def beats(self) -> int:
        """Of all windows."""
        return sum(window.waves.beats for window in self.windows)

    @property
    def failures(self) -> dict[str, int]:
        """How many of the beats lack each wave."""
        return {wave: sum(window.waves.failures.get(wave, 0) for window in self.windows) for wave in DELINEATED}


def mean_over_windows(of_windows: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the windows in which the value is known, in float64; NaN where it is known in none."""
    values = np.stack(of_windows).astype(np.float64)
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


class Explainer:
    """Explains the scores of one bundle.

    reference  recordings for the baselines "mean-beat" and "expected"
    encoder    the bundle of a pre-trained encoder whose weights of the leads are given beside the explanation; needed
               where the classifier has no log-variances, so for all features but `fused`

    Raises LsemvaeError for a baseline without a reference, and for a model that gives no gradient.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings | None = None,
        device: str = "cpu",
        *,
        reference: Reference | None = None,
        encoder: Path | None = None,
    ) -> None:
        self.scorer = Scorer(folder, device)
        self.settings = settings or Settings()
        self._device, self._reference = device, reference
        bundle = self.scorer.bundle
        if reference is None and self.settings.baseline != "zero":
            raise LsemvaeError(
                f"the baseline {self.settings.baseline!r} needs reference recordings: give some, or choose zero"
            )
        given = (len(bundle.leads), bundle.preprocess.samples)
        if reference is not None and (reference.leads != bundle.leads or reference.x_RLT.shape[1:] != given):
            raise LsemvaeError(
                f"the reference holds {reference.x_RLT.shape[2]} samples of {', '.join(reference.leads)}, the model "
                f"reads {given[1]} of {', '.join(bundle.leads)}: prepare it with the model's leads and preprocessing"
            )
        self._embedder: Any = encoder_for(encoder, bundle, device) if encoder else self.scorer.model.encoders

    def explain(self, records: Sequence[Record]) -> list[Explanation]:
        """One explanation for each record, in order. Leads are taken by name."""
        leads = self.scorer.bundle.leads
        return self.explain_signals([r.signal_for(leads) for r in records], [r.rate_hz for r in records])

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
        result: list[Window | None] = [None] * len(prepared.refused_B)
        rows = np.flatnonzero(prepared.accepted_B)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            made = self._chunk(prepared.x_BLT[chunk], prepared.lead_mask_BL[chunk])
            for row, window in zip(chunk, made, strict=True):
                result[row] = window
        return result

    def _chunk(self, x_BLT: np.ndarray, mask_BL: np.ndarray) -> list[Window]:
        """Some windows in one pass."""
        model, bundle = self.scorer.model, self.scorer.bundle
        rate_hz = bundle.preprocess.rate_hz
        x, mask = (torch.from_numpy(values).to(self._device) for values in (x_BLT, mask_BL))
        waves = [delineate(x_LT, mask_L, bundle.leads, rate_hz) for x_LT, mask_L in zip(x_BLT, mask_BL, strict=True)]
        made = attribute(model, x, mask, self.settings, self.baseline(x_BLT, waves))
        lead_drop_BL = without_leads(model, x, mask)
        wave_drop_BLW = without_waves(model, x, mask, np.stack([one.wave_T for one in waves]))
        weights = experts(self._embedder, x, mask)
        return [
            Window(
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
                weights.gate_BL[b] if weights else None,
                weights.precision_BL[b] if weights else None,
            )
            for b in range(len(x_BLT))
        ]

    def baseline(self, x_BLT: np.ndarray, waves: Sequence[Delineation]) -> torch.Tensor | None:
        """What the settings ask for, as `attribute` takes it."""
        reference, settings = self._reference, self.settings
        if reference is None or settings.baseline == "zero":
            return None
        if settings.baseline == "mean-beat":
            found = np.stack([reference.beats_like(x_LT, one) for x_LT, one in zip(x_BLT, waves, strict=True)])
            return torch.from_numpy(found).to(self._device)
        drawn_RLT = torch.from_numpy(reference.drawn(settings.references, settings.seed)).to(self._device)
        return drawn_RLT.unsqueeze(1).expand(-1, len(x_BLT), -1, -1)

    def _explanation(self, score: Score, of_windows: Sequence[Window]) -> Explanation:
        bundle = self.scorer.bundle
        rate_hz, unit_mv = bundle.preprocess.rate_hz, bundle.preprocess.unit_mv
        if not of_windows:
            return Explanation(score, bundle.leads, rate_hz, unit_mv=unit_mv)
        values_LT = np.concatenate([window.values_LT for window in of_windows], axis=1)
        wave_T = np.concatenate([window.waves.wave_T for window in of_windows])
        found = shares(values_LT, wave_T)
        if not any(window.waves.beats for window in of_windows):
            for cells_LW in found:
                cells_LW[:, np.arange(len(WAVES)) != REST] = np.nan
        return Explanation(score, bundle.leads, rate_hz, tuple(of_windows), found, self._notes(of_windows), unit_mv)

    def _limit(self, window: Window) -> float:
        return self.settings.limit(window.logit - window.baseline_logit, float(np.abs(window.values_LT).sum()))

    def _notes(self, of_windows: Sequence[Window]) -> tuple[str, ...]:
        """What the explanation of these windows lacks, and why."""
        notes = []
        reasons = [window.waves.reason for window in of_windows if window.waves.reason]
        which = "" if len(reasons) == len(of_windows) else f" in {len(reasons)} of {len(of_windows)} windows"
        if reasons:
            notes.append(f"Explained by lead only{which}: {', '.join(dict.fromkeys(reasons))}.")
            if self.settings.baseline == "mean-beat":
                notes.append(f"Compared with no signal{which}, since the mean beat has no place.")
        over = [one for one in of_windows if abs(one.delta) > self._limit(one)]
        if over:
            worst = max(over, key=lambda one: abs(one.delta))
            notes.append(
                f"{NOT_CONVERGED} after {worst.steps} steps: {abs(worst.delta):.2g} "
                f"of a difference of {abs(worst.logit - worst.baseline_logit):.2g} is missing."
            )
        return tuple(notes)
