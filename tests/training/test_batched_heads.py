"""Heads that are trained together have the numbers that each has alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lsemvae.config import FinetuneRecipe, OptimConfig
from lsemvae.models.parts.head import Head
from lsemvae.models.parts.objectives import NonFiniteBatch
from lsemvae.training import batched_heads
from lsemvae.training.batched_heads import Training, train_heads
from lsemvae.training.finetune import train_head

OPTIM = OptimConfig(epochs=5, batch_size=8, learning_rate=1e-2, seed=7)
RECIPE = FinetuneRecipe(optim=OPTIM, hidden=6, dropout=0.5)
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


def tables(records: int = 60) -> Tables:
    rng = np.random.default_rng(0)
    y_B = (rng.random(records) < 0.3).astype(np.int64)
    h_BF = (rng.standard_normal((records, 5)) + y_B[:, None]).astype(np.float32)
    observed_BF = rng.random((records, 5)) > 0.1
    return np.where(observed_BF, h_BF, np.float32(0)), observed_BF, y_B


def folds(*sizes: int) -> list[Training]:
    """Training recordings of folds of these sizes, each with two seeds."""
    rng = np.random.default_rng(1)
    rows = [np.sort(rng.permutation(60)[:size]) for size in sizes]
    return [Training(rows_N, seed) for seed in (0, 3) for rows_N in rows]


def alone(data: Tables, training: Training, recipe: FinetuneRecipe) -> Head:
    own = replace(recipe, optim=replace(recipe.optim, seed=training.seed))
    return train_head(*(values[training.rows_N] for values in data), own)


def logit(head: Head, data: Tables) -> np.ndarray:
    with torch.inference_mode():
        return head.logit(torch.from_numpy(data[0]), torch.from_numpy(data[1])).numpy()


def require_equal(data: Tables, trainings: list[Training], recipe: FinetuneRecipe) -> None:
    heads = train_heads(*data, trainings, recipe)
    assert len({logit(head, data).tobytes() for head in heads}) == len(trainings)
    for head, training in zip(heads, trainings, strict=True):
        expected = alone(data, training, recipe)
        assert not head.training
        assert head.state_dict().keys() == expected.state_dict().keys()
        np.testing.assert_allclose(logit(head, data), logit(expected, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "optim"),
    [
        ({}, {}),
        ({"dropout": 0.0, "balance": False, "focal_gamma": 0.0}, {}),
        ({"hidden": 0}, {}),
        ({}, {"clip_norm": 0.02}),
        ({}, {"clip_norm": 0.0, "weight_decay": 0.5}),
        ({}, {"schedule": "cosine", "warmup_steps": 7}),
        ({}, {"accumulate": 2}),
        ({}, {"batch_size": 64}),
    ],
    ids=str,
)
def test_heads_trained_together_are_those_trained_alone(changes: dict, optim: dict):
    """The last batches of the folds differ in size, and the fold of 40 recordings has fewer steps."""
    recipe = replace(RECIPE, **changes, optim=replace(OPTIM, **optim))
    require_equal(tables(), folds(48, 47, 41, 40), recipe)


def test_every_feature_observed_needs_no_mask():
    h_BF, observed_BF, y_B = tables()
    require_equal((h_BF, np.ones_like(observed_BF), y_B), folds(48, 47), RECIPE)


def test_each_head_sees_its_own_batches(monkeypatch: pytest.MonkeyPatch):
    data, trainings = tables(), folds(48, 45)
    seen: list[list[np.ndarray]] = [[] for _ in trainings]
    original = batched_heads._Stack.loss

    def loss(self: batched_heads._Stack, h_KbF: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        for batches, h_bF in zip(seen, h_KbF, strict=True):
            batches.append(h_bF.numpy())
        return original(self, h_KbF, *rest)

    monkeypatch.setattr(batched_heads._Stack, "loss", loss)
    train_heads(*data, trainings, RECIPE)
    monkeypatch.setattr(
        Head,
        "logit",
        lambda self, h_BF, observed_BF: expected.append(h_BF.numpy()) or self.fc2(h_BF[:, :1]).squeeze(-1),
    )
    for training, batches in zip(trainings, seen, strict=True):
        expected: list[np.ndarray] = []
        alone(data, training, replace(RECIPE, hidden=1))
        assert len(batches) == len(expected) == 5 * 6
        for together, own in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(together[: len(own)], own)


def test_no_more_heads_are_trained_at_once_than_fit_into_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batched_heads, "FLOATS", 100)  # two heads: 5 features, and batches of 8
    stacked = []
    original = batched_heads._Stack.__init__
    monkeypatch.setattr(
        batched_heads._Stack, "__init__", lambda self, heads: stacked.append(len(heads)) or original(self, heads)
    )
    require_equal(tables(), folds(48, 48, 40), RECIPE)
    assert stacked == [2, 2, 2]
    monkeypatch.setattr(batched_heads, "FLOATS", 1)
    require_equal(tables(), folds(48), RECIPE)
    assert stacked[3:] == [1, 1]


def test_a_step_that_is_not_finite_is_left_out_as_it_is_alone():
    h_BF, observed_BF, y_B = tables()
    trainings = folds(48, 48)
    y_B = y_B.astype(np.float64)
    y_B[trainings[0].rows_N[3]] = np.nan
    require_equal((h_BF, observed_BF, y_B), trainings, replace(RECIPE, balance=False))
    with pytest.raises(NonFiniteBatch, match="lower the learning rate"):
        train_heads(h_BF, observed_BF, np.full(60, np.nan), trainings, replace(RECIPE, balance=False))
