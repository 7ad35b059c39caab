"""A head on embeddings that were computed once, and a head with its whole encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lsemvae.config import FinetuneRecipe, OptimConfig
from lsemvae.models import build
from lsemvae.models.classifier import Classifier
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.training import finetune
from lsemvae.training.finetune import Inputs, _HeldOut, from_scratch, logits, new_head, train_all, train_head
from lsemvae.training.fit import Epoch

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


# --- all weights ------------------------------------------------------------------------------------------------


SAMPLES = 80
ALL = FinetuneRecipe(
    optim=OptimConfig(epochs=6, batch_size=16, learning_rate=5e-3, schedule="cosine"),
    trains="all", hidden=4, dropout=0.0, encoder_rate=5e-3, shifts=2, inner_folds=2,
)  # fmt: skip


def recordings(records: int = 48) -> Inputs:
    """Positive recordings are larger; where their waves begin is random."""
    rng = np.random.default_rng(0)
    y_B = np.arange(records) % 2
    phase_B = rng.uniform(0, 2 * np.pi, records)
    wave_BT = np.sin(np.arange(SAMPLES) / 3 + phase_B[:, None]) * (1 + y_B[:, None])
    x_BLT = (wave_BT[:, None] + 0.1 * rng.standard_normal((records, 3, SAMPLES))).astype(np.float32)
    return Inputs(x_BLT, np.ones((records, 3), dtype=bool), y_B)


def start(features: str = "means", shifts: int = 2) -> Classifier:
    torch.manual_seed(0)
    leads = ("I", "II", "V1")
    encoder = build(LSEMVAEConfig(samples=SAMPLES, latent=3, channels=(2, 3, 2)), leads)
    head = new_head(encoder.embedder(leads, features).embedding_size, recordings().y_B, ALL)
    return Classifier.from_encoder(encoder, leads, head, features, shifts)


@pytest.mark.parametrize("features", ["means", "fused", "pooled"])
def test_all_weights_are_trained_and_the_encoder_that_was_given_stays_as_it_is(features: str):
    inputs, classifier = recordings(), start(features)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    trained = train_all(classifier, inputs, replace(ALL, optim=replace(ALL.optim, epochs=30)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    for name, tensor in trained.encoders.named_parameters():
        assert not torch.equal(tensor, before[f"encoders.{name}"]), name
    assert not trained.training
    logit_B = logits(trained, inputs)
    assert logit_B[inputs.y_B == 1].mean() > logit_B[inputs.y_B == 0].mean() + 0.5
    again = logits(train_all(classifier, inputs, replace(ALL, optim=replace(ALL.optim, epochs=30))), inputs)
    np.testing.assert_array_equal(again, logit_B)  # the seed decides


def test_the_encoder_has_a_rate_of_its_own():
    inputs, classifier = recordings(), start()
    slow = train_all(classifier, inputs, replace(ALL, encoder_rate=1e-9))
    for name, tensor in slow.encoders.named_parameters():
        torch.testing.assert_close(tensor, classifier.encoders.get_parameter(name), rtol=0, atol=1e-4)
    scratch = from_scratch(replace(ALL, scratch_epochs=9, scratch_rate=2e-3))
    assert (scratch.optim.epochs, scratch.optim.learning_rate, scratch.encoder_rate) == (9, 2e-3, 2e-3)


def test_early_stop_takes_the_epochs_with_the_smallest_loss_on_held_out_recordings(monkeypatch: pytest.MonkeyPatch):
    """Held-out losses fall until the fifth epoch and then rise: the whole set is trained on for about so many."""
    inputs, classifier = recordings(), start()
    losses, epochs = iter([5.0, 4, 3, 2, 1, 2, 3, 4, 5, 6]), []
    monkeypatch.setattr(_HeldOut, "on_epoch", lambda self, epoch: self._losses.append(next(losses)))
    original = finetune._train_all
    monkeypatch.setattr(
        finetune, "_train_all", lambda c, i, r, n, *rest: epochs.append((n, len(i.y_B))) or original(c, i, r, n, *rest)
    )
    recipe = replace(ALL, early_stop=True, optim=replace(ALL.optim, epochs=10))
    train_all(classifier, inputs, recipe, (np.arange(32), np.arange(32, 48)))
    assert epochs == [(10, 32), (5, 48)]


def test_the_held_out_loss_is_that_of_the_head():
    inputs, classifier = recordings(), start()
    watcher = _HeldOut(inputs, "cpu")
    watcher.model = classifier
    for index in range(2):
        watcher.on_epoch(Epoch(index, {}, 48, 1.0))
    with torch.inference_mode():
        x_BLT, mask_BL = torch.from_numpy(inputs.x_BLT), torch.from_numpy(inputs.lead_mask_BL)
        logit_B = classifier.eval().logit(x_BLT, mask_BL)
        expected = classifier.head.loss(logit_B, torch.from_numpy(inputs.y_B).float()).mean().item()
    assert watcher._losses == pytest.approx([expected] * 2, rel=1e-5)
