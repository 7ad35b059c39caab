"""How long trainings will take here, from one step of each that is run on random numbers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lsemvae.config import PretrainRecipe
from lsemvae.evaluation.cells import Row
from lsemvae.evaluation.linear import train_linear
from lsemvae.models import build
from lsemvae.models.classifier import Classifier
from lsemvae.training.finetune import Inputs, from_scratch, train_all, train_head
from lsemvae.training.fit import make_optimizer

_SHIFTED = 8
"""Passes of a test recording, at most, in passes of a training recording: an upper bound, without gradient."""


def pretrain_seconds(recipe: PretrainRecipe, leads: Sequence[str], recordings: int, workers: int) -> float:
    """Pre-training of a recipe on so many recordings."""
    model = build(recipe.model, leads)
    generator = torch.Generator().manual_seed(0)
    size = min(recipe.optim.batch_size, 16)
    x_BLT = torch.randn(size, len(leads), recipe.preprocess.samples, generator=generator)
    batch = {"x_BLT": x_BLT, "lead_mask_BL": torch.ones(x_BLT.shape[:2], dtype=torch.bool)}
    optimizer = make_optimizer(model, recipe.optim)

    def step() -> None:
        optimizer.zero_grad()
        model(batch, check=False)["loss"].backward()
        optimizer.step()

    return _second(step) / size * recordings * recipe.optim.epochs / workers


def cell_seconds(row: Row, start: Classifier | None, samples: int, features: int, records: int, folds: int) -> float:
    """One training of the row, on all folds but one, and its scores."""
    rng = np.random.default_rng(0)
    trained_on = round(records * (folds - 1) / folds)
    if row.trains == "all":
        assert start is not None
        recipe = from_scratch(row.recipe) if row.scratch else row.recipe
        size = min(recipe.optim.batch_size, 16)
        one = replace(recipe, optim=replace(recipe.optim, epochs=1, batch_size=size), early_stop=False)
        x_BLT = rng.standard_normal((size, len(start.leads), samples)).astype(np.float32)
        inputs = Inputs(x_BLT, np.ones(x_BLT.shape[:2], dtype=bool), np.arange(size) % 2)
        epochs = recipe.optim.epochs * (2 if recipe.early_stop else 1)
        return (
            _second(lambda: train_all(start, inputs, one)) / size * (trained_on * epochs + records / folds * _SHIFTED)
        )
    h_BF = rng.standard_normal((trained_on, features)).astype(np.float32)
    observed_BF, y_B = np.ones(h_BF.shape, dtype=bool), rng.integers(0, 2, trained_on)
    if row.trains == "linear":
        return _second(lambda: train_linear(h_BF, observed_BF, y_B, np.arange(trained_on), row.recipe), warm=False)
    one = replace(row.recipe, optim=replace(row.recipe.optim, epochs=1))
    return _second(lambda: train_head(h_BF, observed_BF, y_B, one)) * row.recipe.optim.epochs


def _second(call: Callable[[], Any], *, warm: bool = True) -> float:
    """Seconds of a call, after one that warms up."""
    if warm:
        call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
