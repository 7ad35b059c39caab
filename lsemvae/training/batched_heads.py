"""Heads of many folds and seeds, trained together: the weights of K heads are tensors with a leading dimension K.

Each head has the batches, dropout masks, clipping and learning rates that `train_head` gives it alone, so its numbers
do not depend on the heads beside it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lsemvae.config import FinetuneRecipe
from lsemvae.models.parts.head import Head
from lsemvae.models.parts.objectives import binary_focal
from lsemvae.training.finetune import new_head, shuffled, steps_per_epoch, train_head
from lsemvae.training.fit import learning_rate, make_optimizer

FLOATS = 2**24
"""Most weights, or values of a batch, of the heads that are trained at once: 42 heads of the full size. With gradients
and moments the weights take 16 bytes each, or 256 MiB."""


class Training(NamedTuple):
    """One head: its training recordings, as positions in the tables, and its seed in place of the recipe's."""

    rows_N: np.ndarray
    seed: int


def train_heads(
    h_BF: np.ndarray,
    observed_BF: np.ndarray,
    y_B: np.ndarray,
    trainings: Sequence[Training],
    recipe: FinetuneRecipe,
    device: str = "cpu",
) -> list[Head]:
    """What `train_head` returns for each training, up to rounding.

    On a CPU it takes 2/3 of the time at full size (3,072 features, 128 units), and 1/3 to 1/5 with 40 features.

    The dropout masks are always drawn on the CPU: on a GPU they are not those that `train_head` draws there. Heads
    with a step that is not finite are trained again one by one, because `train_head` leaves such a step out; raises
    NonFiniteBatch as it does.
    """

    def alone(training: Training) -> Head:
        rows_N, own = training.rows_N, _with_seed(recipe, training)
        return train_head(h_BF[rows_N], observed_BF[rows_N], y_B[rows_N], own, device)

    if recipe.optim.accumulate > 1:  # each part of a batch has dropout masks of its own
        return [alone(training) for training in trainings]
    tables = _Tables(
        torch.tensor(h_BF, device=device),  # copies: arrays of Ray's object store cannot be written to
        None if observed_BF.all() else torch.tensor(observed_BF, device=device),
        torch.tensor(y_B, dtype=torch.float32, device=device),
    )
    found: dict[int, Head] = {}
    for places in _together(trainings, h_BF.shape[1], recipe):
        chosen = [trainings[place] for place in places]
        heads = _train(tables, y_B, chosen, recipe) or [alone(training) for training in chosen]
        found |= zip(places, heads, strict=True)
    return [found[place] for place in range(len(trainings))]


class _Tables(NamedTuple):
    """The embeddings and labels that all heads share. `observed_BF` is None where every feature was observed."""

    h_BF: Tensor
    observed_BF: Tensor | None
    y_B: Tensor


class _Stack(nn.Module):
    """K heads as one: the same layers as `Head`, with weights [K, in, out]."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.gamma, self.dropout = heads[0].focal_gamma, heads[0].dropout.p
        self.mean_K1F = torch.stack([head.mean_F for head in heads]).unsqueeze(1)
        self.scale_K1F = torch.stack([head.scale_F for head in heads]).unsqueeze(1)
        alphas = [head.focal_alpha for head in heads if head.focal_alpha is not None]
        self.alpha_K1 = torch.tensor(alphas, device=self.mean_K1F.device).unsqueeze(1) if alphas else None
        layers = list(zip(*(_layers(head) for head in heads), strict=True))
        self.weights = nn.ParameterList(torch.stack([linear.weight.detach().T for linear in of]) for of in layers)
        self.biases = nn.ParameterList(torch.stack([linear.bias.detach()[None] for linear in of]) for of in layers)

    def loss(self, h_KbF: Tensor, observed_KbF: Tensor | None, y_Kb: Tensor, kept_KbH: Tensor | None) -> Tensor:
        """The focal loss of each record, loss_Kb. `kept_KbH` are the dropout masks of the last layer's input."""
        value_KbH = (h_KbF - self.mean_K1F) / self.scale_K1F
        if observed_KbF is not None:
            value_KbH = torch.where(observed_KbF, value_KbH, torch.zeros_like(value_KbH))
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            value_KbH = F.relu(torch.baddbmm(bias, value_KbH, weight))
        if kept_KbH is not None:
            value_KbH = value_KbH * kept_KbH
        logit_Kb = torch.baddbmm(self.biases[-1], value_KbH, self.weights[-1]).squeeze(-1)
        return binary_focal(logit_Kb, y_Kb, self.gamma, self.alpha_K1)

    def clip(self, norm: float) -> Tensor:
        """Scale each head's gradient to this norm at most, or not with 0 -> its norm before, norm_K."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm_K = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in gradients]).norm(dim=0)
        factor_K = (norm / (norm_K + 1e-6)).clamp(max=1) if norm else torch.ones_like(norm_K)
        if (factor_K < 1).any():
            for gradient in gradients:
                gradient.mul_(factor_K[:, None, None])
        return norm_K

    @torch.no_grad()
    def copy_to(self, heads: Sequence[Head]) -> None:
        for place, head in enumerate(heads):
            for linear, weight, bias in zip(_layers(head), self.weights, self.biases, strict=True):
                linear.weight.copy_(weight[place].T)
                linear.bias.copy_(bias[place, 0])


def _train(
    tables: _Tables, y_B: np.ndarray, trainings: Sequence[Training], recipe: FinetuneRecipe
) -> list[Head] | None:
    """Heads whose epochs have equally many steps; None when a step of one is not finite."""
    optim, device = recipe.optim, tables.h_BF.device
    heads, generators = zip(*(_start(tables, y_B, training, recipe) for training in trainings), strict=True)
    stack = _Stack(heads)
    optimizer = make_optimizer(stack, optim)
    steps = steps_per_epoch(len(trainings[0].rows_N), recipe)
    for step, parts in enumerate(part for epoch in range(optim.epochs) for part in _steps(trainings, recipe, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, optim.epochs * steps)
        # A shorter batch is filled up with the first recording, which counts nothing.
        rows_Kb = pad_sequence(parts, batch_first=True).to(device)
        share_Kb = pad_sequence([torch.full((len(p),), 1 / len(p)) for p in parts], batch_first=True).to(device)
        observed_KbF = None if tables.observed_BF is None else tables.observed_BF[rows_Kb]
        kept_KbH = (
            _kept(parts, stack.weights[-1].shape[1], stack.dropout, generators).to(device) if stack.dropout else None
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bf16"):
            loss_Kb = stack.loss(tables.h_BF[rows_Kb], observed_KbF, tables.y_B[rows_Kb], kept_KbH)
            loss = (loss_Kb * share_Kb).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm_K = stack.clip(optim.clip_norm)
        if not (norm_K + loss.detach()).isfinite().all():
            return None
        optimizer.step()
    stack.copy_to(heads)
    return [head.cpu().eval() for head in heads]


def _start(
    tables: _Tables, y_B: np.ndarray, training: Training, recipe: FinetuneRecipe
) -> tuple[Head, torch.Generator]:
    """An untrained head, standardised on its recordings, and the generator that draws its dropout masks."""
    torch.manual_seed(training.seed)
    head = new_head(tables.h_BF.shape[1], y_B[training.rows_N], recipe)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())  # alone, a head's masks follow its initial weights
    rows_N = torch.tensor(training.rows_N, device=tables.h_BF.device)  # a copy: arrays of Ray's store are read-only
    head.to(rows_N.device)
    head.standardise_from(tables.h_BF[rows_N], None if tables.observed_BF is None else tables.observed_BF[rows_N])
    return head, generator


def _steps(trainings: Sequence[Training], recipe: FinetuneRecipe, epoch: int) -> Iterator[list[Tensor]]:
    """For each step of the epoch, the batch of each head, as positions in the tables."""
    orders = [shuffled(len(training.rows_N), _with_seed(recipe, training), epoch) for training in trainings]
    rows = [torch.tensor(training.rows_N) for training in trainings]
    for parts in zip(*orders, strict=True):
        yield [rows_N[part] for rows_N, part in zip(rows, parts, strict=True)]


def _kept(parts: Sequence[Tensor], width: int, dropout: float, generators: Sequence[torch.Generator]) -> Tensor:
    """The dropout masks that `nn.Dropout` would draw for each head alone, kept_KbH."""
    kept_KbH = torch.zeros(len(parts), max(map(len, parts)), width)
    for mask_bH, part, generator in zip(kept_KbH, parts, generators, strict=True):
        mask_bH[: len(part)].bernoulli_(1 - dropout, generator=generator)
    return kept_KbH.div_(1 - dropout)


def _together(trainings: Sequence[Training], features: int, recipe: FinetuneRecipe) -> Iterator[list[int]]:
    """Positions of trainings that fit into memory together and whose epochs have equally many steps.

    With a batch of 32, a fold of 704 recordings has 22 steps and one of 705 has 23. They need different schedules.
    """
    by_steps: defaultdict[int, list[int]] = defaultdict(list)
    for place, training in enumerate(trainings):
        by_steps[steps_per_epoch(len(training.rows_N), recipe)].append(place)
    most = max(1, FLOATS // (features * max(recipe.hidden, recipe.optim.batch_size)))
    for places in by_steps.values():
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _with_seed(recipe: FinetuneRecipe, training: Training) -> FinetuneRecipe:
    return replace(recipe, optim=replace(recipe.optim, seed=training.seed))


def _layers(head: Head) -> list[nn.Linear]:
    return [head.fc2] if head.fc1 is None else [head.fc1, head.fc2]
