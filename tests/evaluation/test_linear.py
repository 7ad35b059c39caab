"""Logistic regression as a linear head: scikit-learn's answer, in fewer dimensions, its strength chosen inside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.linear import train_linear
from lsemvae.recipes import FINETUNE

RECIPE = replace(FINETUNE["linear"], inner_folds=3)


def made_up(records: int, features: int, informative: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y_B = np.arange(records) % 2
    h_BF = rng.standard_normal((records, features))
    h_BF[:, :informative] += y_B[:, None]
    return (h_BF * rng.uniform(0.1, 10, features)).astype(np.float32), np.ones((records, features), dtype=bool), y_B


@pytest.mark.parametrize("features", [5, 300], ids=["few features", "more features than recordings"])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_it_is_the_regression_of_scikit_learn(features: int, strength: float):
    h_BF, observed_BF, y_B = made_up(120, features)
    head = train_linear(h_BF, observed_BF, y_B, np.arange(120), replace(RECIPE, strengths=(strength,)))
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=5000))
    expected_B = reference.fit(h_BF, y_B).predict_proba(h_BF)[:, 1]
    with torch.inference_mode():
        np.testing.assert_allclose(head.predict(torch.from_numpy(h_BF)).numpy(), expected_B, atol=2e-3)


def test_a_feature_that_was_not_observed_counts_as_its_average():
    h_BF, observed_BF, y_B = made_up(60, 4)
    observed_BF[::3, 0] = False
    h_BF[::3, 0] = 1e6
    head = train_linear(h_BF, observed_BF, y_B, np.arange(60), replace(RECIPE, strengths=(0.1,)))
    assert head.mean_F[0] == pytest.approx(h_BF[observed_BF[:, 0], 0].mean(), rel=1e-4)
    with torch.inference_mode():
        logit_B = head.logit(torch.from_numpy(h_BF), torch.from_numpy(observed_BF))
    assert logit_B.abs().max() < 20


def test_the_strength_is_chosen_on_inner_folds():
    """Few recordings, many useless features: hardly any regularisation overfits, and inner folds show it."""
    h_BF, observed_BF, y_B = made_up(60, 400)
    weights = {
        strengths: train_linear(h_BF, observed_BF, y_B, np.arange(60), replace(RECIPE, strengths=strengths)).fc2.weight
        for strengths in ((1e-4,), (1e2,), (1e2, 1e-4))
    }
    chosen = weights[(1e2, 1e-4)]
    assert any(torch.equal(chosen, weights[(strength,)]) for strength in (1e-4, 1e2))
    shuffled = np.random.default_rng(1).permutation(60)  # the order of recordings only changes the folds
    again = train_linear(h_BF[shuffled], observed_BF[shuffled], y_B[shuffled], np.arange(60)[shuffled], RECIPE)
    assert again.fc2.weight.isfinite().all()


def test_recordings_of_a_subject_stay_together_when_the_strength_is_chosen():
    """Thirty subjects twice, told apart by noise: with a subject in both inner sets, the weakest strength would win."""
    rng = np.random.default_rng(0)
    subject_B = np.repeat(np.arange(30), 2)
    h_BF = (np.repeat(rng.standard_normal((30, 200)), 2, axis=0) + 0.01 * rng.standard_normal((60, 200))).astype("f4")
    y_B = np.repeat(rng.permutation(30) % 2, 2)
    with pytest.raises(LsemvaeError, match="15 subjects are positive and 15 negative: 16 folds need 16 of each"):
        train_linear(h_BF, np.ones_like(h_BF, bool), y_B, subject_B, replace(RECIPE, inner_folds=16))
