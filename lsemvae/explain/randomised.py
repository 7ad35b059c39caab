"""Model randomisation: attributions must change when the weights do (Adebayo et al. 2018, arXiv 1810.03292).

Weights are randomised from the head to the first layer, layer by layer, by permuting the values within each parameter.
That works for every architecture, and the parameter keeps its distribution: signals neither vanish nor explode in the
random model, as they may with fresh weights under a trained normalisation. Biases of one value stay as they are.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


def layers_of(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, most: int) -> list[tuple[str, ...]]:
    """The names of the parameters that the logit depends on, in at most so many groups, from the head downwards.

    A module registers its parts in the order in which the signal passes them, so the order is the reverse of that.
    """
    copied = copy.deepcopy(model).requires_grad_(True)
    named = dict(copied.named_parameters())
    with torch.inference_mode(False), torch.enable_grad():
        logit_B = copied.logit(x_BLT.clone(), lead_mask_BL.clone())
        gradients = torch.autograd.grad(logit_B.sum(), list(named.values()), allow_unused=True)
    of_modules: dict[str, list[str]] = {}
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            of_modules.setdefault(name.rpartition(".")[0], []).append(name)
    modules = list(of_modules.values())[::-1]
    parts = np.array_split(np.arange(len(modules)), min(most, len(modules)))
    return [tuple(name for at in part for name in modules[at]) for part in parts]


def cascade(model: Any, layers: Sequence[Sequence[str]], seed: int) -> Iterator[Any]:
    """A copy of the model, with one layer more of random weights each time. The model itself is not changed."""
    copied = copy.deepcopy(model)
    named = dict(copied.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for names in layers:
        with torch.no_grad():
            for name in names:
                flat = named[name].flatten()
                order = torch.randperm(len(flat), generator=generator).to(flat.device)
                named[name].copy_(flat[order].view_as(named[name]))
        yield copied


def module_of(names: Sequence[str]) -> str:
    """What a table calls the last module of these parameters, the farthest from the score."""
    return names[-1].rpartition(".")[0] or names[-1]


def rank_correlation(one_DN: np.ndarray, other_DN: np.ndarray) -> np.ndarray:
    """Spearman's over the last dimension; NaN where one of them is constant."""
    middle = (one_DN.shape[-1] + 1) / 2
    one_DN, other_DN = (rankdata(values_DN, axis=-1) - middle for values_DN in (one_DN, other_DN))
    size_D = np.sqrt((one_DN**2).sum(axis=-1) * (other_DN**2).sum(axis=-1))
    return np.where(size_D > 0, (one_DN * other_DN).sum(axis=-1) / np.where(size_D > 0, size_D, 1.0), np.nan)
