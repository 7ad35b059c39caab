"""Integrated gradients of the score with respect to the model's input (Sundararajan et al. 2017, arXiv 1703.01365).

What is explained is the logit of the score that is served: mean over the classifier's circular shifts, through the
pooling of features where there is one. An attribution is in units of the logit: those of a record sum to the difference
between its logit and that of the baseline. What is left of that difference is the convergence delta.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

Baseline = Literal["zero", "mean-beat", "expected"]
"""zero: no signal. mean-beat: the mean beat of reference recordings at each beat of the recording. expected: the mean
over reference recordings as baselines (expected gradients, Erion et al. 2021)."""


@dataclass(frozen=True)
class Settings:
    """How attributions are computed.

    steps       points on the way from the baseline to the recording; more are taken until `bound` holds
    bound       largest convergence delta, as a share of the logit's difference from the baseline (at least 1)
    most_steps  where the bound does not hold with so many, the delta that is left is reported
    """

    baseline: Baseline = "zero"
    steps: int = 32
    bound: float = 0.01
    most_steps: int = 512


class Attributions(NamedTuple):
    """values_BLT in units of the logit, exactly 0 in absent leads; and for each record how they were computed.

    delta_B is the sum of the values less (logit_B - baseline_logit_B), and steps_B the points that were taken.
    """

    values_BLT: np.ndarray
    logit_B: np.ndarray
    baseline_logit_B: np.ndarray
    delta_B: np.ndarray
    steps_B: np.ndarray


def attribute(
    model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, settings: Settings, baseline_BLT: Tensor | None = None
) -> Attributions:
    """Attributions of `model.logit`. `baseline_BLT` is what `settings.baseline` asks for; None is zeros.

    Raises LsemvaeError where the model gives no gradient.
    """
    if baseline_BLT is None:
        baseline_BLT = torch.zeros_like(x_BLT)
    method = IntegratedGradients(model.logit)
    values_BLT, delta_B = method.attribute(
        x_BLT,
        baseline_BLT,
        additional_forward_args=(lead_mask_BL,),
        n_steps=settings.steps,
        return_convergence_delta=True,
    )
    with torch.no_grad():
        logit_B, baseline_B = model.logit(x_BLT, lead_mask_BL), model.logit(baseline_BLT, lead_mask_BL)
    steps_B = np.full(len(x_BLT), settings.steps)
    values, logits, baselines, deltas = (
        found.detach().float().cpu().numpy() for found in (values_BLT, logit_B, baseline_B, delta_B)
    )
    return Attributions(values, logits, baselines, deltas, steps_B)
