"""Whether attributions find what a simulated cohort's label depends on: on hearts that are healthy and overloaded.

Each heart is simulated twice, with the same anatomy, beats and noise, once with the severity of a healthy subject and
once with that of pulmonary hypertension. So the two differ in what the label depends on, and in nothing else.
A cell is one wave of one lead. Of each cell three things are known:

truth         effect size of the overload on the model's input: how far it moves the wave, relative to how much the wave
              differs between healthy hearts. It is what a reader of that cell alone could use, whatever the model
effect        how the logit changes where the cell alone is exchanged between the two recordings: what the model uses
attribution   the cell's attributions in the overloaded recording less those in the healthy one, in units of the logit

Differences, because attributions by themselves are about as large as the signal under every model, also a random one.
They keep their signs: a random model gives large differences, too, but as often against its score as for it. So over
models that learned shuffled labels their rank correlation with the truth is 0 on average, but not that of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lsemvae.cohorts.simulated import CohortConfig, draw_another_day, draw_heart, severity_of
from lsemvae.errors import LsemvaeError
from lsemvae.explain import intervals
from lsemvae.explain.attribution import Settings, attribute, logits
from lsemvae.explain.randomised import rank_correlation
from lsemvae.explain.waves import WAVES
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import RATE_HZ, SAMPLES, simulate_ecg, true_waves

CELL_WAVES = WAVES[: WAVES.index("rest")]
"""The waves of the cells. What is left of a beat is the baseline between the waves, where the heart does nothing."""
HEALTHY_MMHG, OVERLOADED_MMHG = 14.0, 45.0
"""The mean pressures of the two groups of the simulated cohort, see docs/simulation.md."""
CHECKED_HEARTS, TRUTH_HEARTS = 48, 200
ALL_WAVES = (1.0, 1.0, 1.0)

_POINTS = 8  # of each wave, from its onset to its end
_PASS = 32


@dataclass(frozen=True)
class Hearts:
    """B hearts as model input, healthy and overloaded, in the same beats; and their waves, positions in `WAVES`."""

    healthy_BLT: np.ndarray
    overloaded_BLT: np.ndarray
    lead_mask_BL: np.ndarray
    wave_BT: np.ndarray

    def cells(self, values_BLT: np.ndarray) -> np.ndarray:
        """values_BLW, the sum over the samples of each cell."""
        inside_BTW = self.wave_BT[..., None] == np.arange(len(CELL_WAVES))
        return values_BLT.astype(np.float64) @ inside_BTW

    def of(self, rows: slice) -> "Hearts":
        """These hearts."""
        return Hearts(self.healthy_BLT[rows], self.overloaded_BLT[rows], self.lead_mask_BL[rows], self.wave_BT[rows])


def draw_hearts(
    count: int, leads: Sequence[str], config: PreprocessConfig, *, seed: int = 0, overload: Sequence[float] = ALL_WAVES
) -> Hearts:
    """Hearts in sinus rhythm, as various and noisy as in the simulated cohort. `overload`: see `EcgParameters`."""
    rng = np.random.default_rng(seed)
    cohort = CohortConfig(af_share=0.0)
    config = replace(config, window="first")  # whose samples are known
    positions = [LEADS.index(lead) for lead in leads]
    signals, wave_BT = [], []
    for number in range(count):
        heart = replace(draw_another_day(draw_heart(cohort, rng), rng), overload=tuple(overload))
        for pressure_mmhg in (HEALTHY_MMHG, OVERLOADED_MMHG):
            beats = np.random.default_rng([seed, number])
            parameters = replace(heart, severity=float(severity_of(pressure_mmhg)))
            signals.append(simulate_ecg(parameters, beats)[0][positions].astype(np.float32))
        wave_BT.append(_wave_T(true_waves(heart, np.random.default_rng([seed, number])), config))
    prepared = preprocess_signals(signals, [RATE_HZ] * len(signals), leads, config)
    reasons = [reason for reason in prepared.refused_B if reason is not None]
    if reasons:
        raise LsemvaeError(f"this model's preprocessing refuses simulated recordings ({reasons[0]}): they cannot show "
                           "whether its explanations are true")  # fmt: skip
    mask_BL = prepared.lead_mask_BL
    return Hearts(prepared.x_BLT[::2], prepared.x_BLT[1::2], mask_BL[::2] & mask_BL[1::2], np.stack(wave_BT))


def _wave_T(edges_s: Mapping[str, np.ndarray], config: PreprocessConfig) -> np.ndarray:
    """The wave of each sample; ST is from the end of QRS to the onset of T. Where waves overlap, QRS goes first."""
    at_s = np.arange(config.samples) / config.rate_hz
    inside_T = at_s < SAMPLES / RATE_HZ
    wave_T = np.full(config.samples, WAVES.index("rest"), dtype=np.int8)
    st_N2 = np.stack([edges_s["QRS"][:, 1], edges_s["T"][:, 0]], axis=1)
    for wave, bounds_N2 in (("P", edges_s["P"]), ("T", edges_s["T"]), ("ST", st_N2), ("QRS", edges_s["QRS"])):
        for onset_s, end_s in bounds_N2.tolist():
            wave_T[(at_s >= onset_s) & (at_s < end_s) & inside_T] = WAVES.index(wave)
    return wave_T


def truth_of(hearts: Hearts) -> np.ndarray:
    """truth_LW: root mean square, over the points of a wave, of mean change / standard deviation of healthy hearts."""
    healthy_BLWP = _profiles(hearts.healthy_BLT, hearts.wave_BT)
    change_LWP = (_profiles(hearts.overloaded_BLT, hearts.wave_BT) - healthy_BLWP).mean(axis=0)
    deviation_LWP = healthy_BLWP.std(axis=0)
    effect_LWP = change_LWP / np.where(deviation_LWP > 0, deviation_LWP, np.inf)
    return np.sqrt(np.mean(effect_LWP**2, axis=-1))


def _profiles(x_BLT: np.ndarray, wave_BT: np.ndarray) -> np.ndarray:
    """The mean wave of each recording, [B, L, W, P], at P points from its onset to its end."""
    found = np.zeros((*x_BLT.shape[:2], len(CELL_WAVES), _POINTS))
    for b, wave_T in enumerate(wave_BT):
        edges = np.flatnonzero(np.diff(wave_T)) + 1  # the first and the last wave may be cut off
        for w in range(len(CELL_WAVES)):
            waves = [(first, last) for first, last in pairwise(edges) if wave_T[first] == w]
            at_NP = np.array([np.rint(np.linspace(first, last - 1, _POINTS)) for first, last in waves], dtype=int)
            if len(at_NP):
                found[b, :, w] = x_BLT[b][:, at_NP].mean(axis=1)
    return found


@dataclass(frozen=True)
class Found:
    """What is known of the cells of the checked hearts: in units of the logit, and the truth of other hearts."""

    attribution_BLW: np.ndarray
    effect_BLW: np.ndarray
    truth_LW: np.ndarray
    healthy_logit_B: np.ndarray

    def evidence(self, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """wave, evidence, low, high: how far the overload moves the logit through each wave, by the attributions.

        It is the mean difference of the wave's attributions, over all leads, in standard deviations of the logit of
        healthy hearts: the part of the model's own effect size (Cohen's d) that the attributions place in that wave. A
        model that does not separate the groups has about 0 everywhere. "all" is the sum.
        """
        hearts = len(self.healthy_logit_B)
        times_DB = np.vstack([np.ones(hearts), intervals.resampled(np.arange(hearts), draws, seed)])
        mean_D, square_D = (times_DB @ of_B / hearts for of_B in (self.healthy_logit_B, self.healthy_logit_B**2))
        variance_D = square_D - mean_D**2
        deviation_D = np.sqrt(np.where(variance_D > 1e-12 * square_D, variance_D, np.nan))
        by_wave_BW = self.attribution_BLW.sum(axis=1)
        parts = dict(zip(CELL_WAVES, by_wave_BW.T, strict=True)) | {"all": by_wave_BW.sum(axis=1)}
        rows = []
        for wave, part_B in parts.items():
            evidence_D = times_DB @ part_B / hearts / deviation_D  # the first with each heart once
            rows.append((wave, *intervals.interval(evidence_D[0], evidence_D[1:])))
        return pd.DataFrame(rows, columns=["wave", "evidence", "low", "high"])

    def rows(self, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """what, correlation, low, high, records: Spearman's over cells, with 95 % intervals over hearts."""
        hearts = len(self.attribution_BLW)
        times_DB = np.vstack([np.ones(hearts), intervals.resampled(np.arange(hearts), draws, seed)])
        attribution_DN, effect_DN = (
            times_DB @ of_BLW.reshape(hearts, -1) for of_BLW in (self.attribution_BLW, self.effect_BLW)
        )
        truth_DN = np.broadcast_to(self.truth_LW.ravel(), attribution_DN.shape)
        pairs = {
            ATTRIBUTION_TRUTH: (attribution_DN, truth_DN),
            ATTRIBUTION_EFFECT: (attribution_DN, effect_DN),
            EFFECT_TRUTH: (effect_DN, truth_DN),
        }
        found = {}
        for what, pair in pairs.items():
            correlation_D = rank_correlation(*pair)  # the first with each heart once
            found[what] = intervals.interval(correlation_D[0], correlation_D[1:])
        lines = [(what, *spread, hearts) for what, spread in found.items()]
        return pd.DataFrame(lines, columns=["what", "correlation", "low", "high", "records"])


ATTRIBUTION_TRUTH = "attribution and truth"
ATTRIBUTION_EFFECT = "attribution and effect on the score"
EFFECT_TRUTH = "effect on the score and truth"


class OnHearts(NamedTuple):
    """`Checks.truth` and `Checks.evidence`: see `Found.rows` and `Found.evidence`."""

    truth: pd.DataFrame
    evidence: pd.DataFrame


def truth_check(
    model: Any,
    leads: Sequence[str],
    config: PreprocessConfig,
    settings: Settings,
    *,
    hearts: int = CHECKED_HEARTS,
    draws: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> OnHearts:
    """Check a model whose task is `ph` of a simulated cohort; explained from a baseline of zeros.

    `model` is the bundle's, in evaluation mode, for these leads and this preprocessing; it is not changed. `progress`
    is told how many hearts are done, and of how many.
    """
    truth_LW = truth_of(draw_hearts(TRUTH_HEARTS, leads, config, seed=2 * seed + 1))
    checked = draw_hearts(hearts, leads, config, seed=2 * seed)
    found = look(model, checked, truth_LW, settings, progress=progress)
    return OnHearts(found.rows(draws=draws, seed=seed), found.evidence(draws=draws, seed=seed))


def look(
    model: Any,
    hearts: Hearts,
    truth_LW: np.ndarray,
    settings: Settings,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Found:
    """What `truth_check` correlates, of these hearts and the truth of others like them."""
    attributions, effects, healthy = [], [], []
    count = len(hearts.wave_BT)
    for start in range(0, count, _PASS):
        part = hearts.of(slice(start, start + _PASS))
        attributions.append(_attribution(model, part, settings))
        effects.append(_effect(model, part))
        healthy.append(_logit(model, part, part.healthy_BLT))
        if progress:
            progress(min(start + _PASS, count), count)
    return Found(np.concatenate(attributions), np.concatenate(effects), truth_LW, np.concatenate(healthy))


def _attribution(model: Any, hearts: Hearts, settings: Settings) -> np.ndarray:
    zero = replace(settings, baseline="zero")
    healthy_BLT, overloaded_BLT = (
        attribute(model, *_tensors(model, x_BLT, hearts.lead_mask_BL), zero).values_BLT
        for x_BLT in (hearts.healthy_BLT, hearts.overloaded_BLT)
    )
    return hearts.cells(overloaded_BLT - healthy_BLT)


def _effect(model: Any, hearts: Hearts) -> np.ndarray:
    """effect_BLW: the mean of putting an overloaded cell into the healthy recording, and of taking it out again."""
    healthy_BLT, overloaded_BLT = hearts.healthy_BLT, hearts.overloaded_BLT
    healthy_B, overloaded_B = _logit(model, hearts, healthy_BLT), _logit(model, hearts, overloaded_BLT)
    effect_BLW = np.zeros((*healthy_BLT.shape[:2], len(CELL_WAVES)))
    for lead in range(healthy_BLT.shape[1]):
        for w in range(len(CELL_WAVES)):
            cell_BLT = np.zeros(healthy_BLT.shape, dtype=bool)
            cell_BLT[:, lead] = hearts.wave_BT == w
            put_B = _logit(model, hearts, np.where(cell_BLT, overloaded_BLT, healthy_BLT)) - healthy_B
            taken_B = overloaded_B - _logit(model, hearts, np.where(cell_BLT, healthy_BLT, overloaded_BLT))
            effect_BLW[:, lead, w] = (put_B + taken_B) / 2
    return effect_BLW


def _logit(model: Any, hearts: Hearts, x_BLT: np.ndarray) -> np.ndarray:
    return logits(model, *_tensors(model, x_BLT, hearts.lead_mask_BL))


def _tensors(model: Any, x_BLT: np.ndarray, lead_mask_BL: np.ndarray) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return torch.from_numpy(x_BLT).to(device), torch.from_numpy(lead_mask_BL).to(device)
