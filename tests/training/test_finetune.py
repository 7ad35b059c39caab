"""A head on embeddings that were computed once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lsemvae.config import FinetuneRecipe, OptimConfig
from lsemvae.training.finetune import train_head

RECIPE = FinetuneRecipe(optim=OptimConfig(epochs=4, batch_size=16, learning_rate=1e-2), hidden=4, dropout=0.0)


def made_up() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y_B = np.arange(60) % 2
    h_BF = (rng.standard_normal((60, 5)) + y_B[:, None]).astype(np.float32)
    observed_BF = rng.random((60, 5)) > 0.1
    return np.where(observed_BF, h_BF, np.float32(0)), observed_BF, y_B


def travel(recipe: FinetuneRecipe) -> float:
    """How far training moves the weights from where they start."""
    torch.manual_seed(recipe.optim.seed)
    start = train_head(*made_up(), replace(recipe, optim=replace(recipe.optim, learning_rate=1e-12)))
    end = train_head(*made_up(), recipe)
    return float(sum((a - b).detach().abs().sum() for a, b in zip(start.parameters(), end.parameters(), strict=True)))


@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"warmup_steps": 12}], ids=str)
def test_the_schedule_and_the_warm_up_are_followed(changes: dict):
    """16 steps: a rate that falls, or first rises, moves the weights less than a constant one."""
    slower = replace(RECIPE, optim=replace(RECIPE.optim, **changes))
    assert 0 < travel(slower) < 0.9 * travel(RECIPE)


def test_a_head_is_standardised_on_what_was_observed_and_learns():
    h_BF, observed_BF, y_B = made_up()
    head = train_head(h_BF, observed_BF, y_B, replace(RECIPE, optim=replace(RECIPE.optim, epochs=30)))
    assert not head.training
    there = np.ma.masked_array(h_BF, ~observed_BF)
    np.testing.assert_allclose(head.mean_F, there.mean(axis=0), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        score_B = head.predict(torch.from_numpy(h_BF), torch.from_numpy(observed_BF)).numpy()
    assert score_B[y_B == 1].mean() > score_B[y_B == 0].mean() + 0.3
