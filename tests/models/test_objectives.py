"""Each term against a closed form written here on its own, in float64."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import objectives


def signals(records=4, leads=3, samples=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction_BLT = torch.randn(records, leads, samples, generator=generator, dtype=torch.float64)
    target_BLT = torch.randn(records, leads, samples, generator=generator, dtype=torch.float64)
    mask_BL = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [True, True, False]])
    return prediction_BLT, target_BLT, mask_BL


def test_reconstruction_is_the_weighted_sum_of_mean_squared_errors_over_target_leads():
    prediction_BLT, target_BLT, mask_BL = signals()
    weight_L = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    got_B = objectives.reconstruction(prediction_BLT, target_BLT, mask_BL, weight_L)
    for row in range(4):
        expected = sum(
            weight * np.mean((p - t) ** 2)
            for weight, p, t, there in zip(
                weight_L.numpy(),
                prediction_BLT[row].numpy(),
                target_BLT[row].numpy(),
                mask_BL[row],
                strict=True,
            )
            if there
        )
        np.testing.assert_allclose(got_B[row], expected, rtol=1e-12)


def test_leads_that_are_no_target_may_hold_anything_and_give_no_gradient():
    prediction_BLT, target_BLT, mask_BL = signals()
    prediction_BLT.requires_grad_()
    target_BLT = target_BLT.masked_fill(~mask_BL.unsqueeze(-1), float("nan"))
    objectives.reconstruction(prediction_BLT, target_BLT, mask_BL).sum().backward()
    assert prediction_BLT.grad.isfinite().all()
    assert (prediction_BLT.grad[~mask_BL] == 0).all()
    assert (prediction_BLT.grad[mask_BL] != 0).all()


def test_kl_is_that_of_torch_distributions():
    mu_BD = torch.randn(5, 7, dtype=torch.float64)
    logvar_BD = 3 * torch.randn(5, 7, dtype=torch.float64)
    expected_BD = kl_divergence(Normal(mu_BD, (0.5 * logvar_BD).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(objectives.kl_to_prior(mu_BD, logvar_BD), expected_BD, rtol=1e-12, atol=1e-12)
    assert (objectives.kl_to_prior(torch.zeros(3, 4), torch.zeros(3, 4)) == 0).all()
    assert objectives.kl_to_prior(mu_BD.bfloat16(), logvar_BD.bfloat16()).dtype == torch.float32


def test_kl_is_never_negative_near_the_prior():
    tiny_BD = torch.linspace(-1e-3, 1e-3, 2001).unsqueeze(0)
    assert (objectives.kl_to_prior(torch.zeros_like(tiny_BD), tiny_BD) >= 0).all()


def test_alignment_is_the_mean_squared_distance_of_the_observed_experts():
    expert_mu_BKD = torch.randn(4, 3, 6, dtype=torch.float64)
    mu_BD = torch.randn(4, 6, dtype=torch.float64)
    *_, mask_BK = signals()
    got_B = objectives.alignment(expert_mu_BKD, mask_BK, mu_BD)
    for row in range(4):
        members = expert_mu_BKD[row][mask_BK[row]].numpy()
        expected = np.mean(np.sum((members - mu_BD[row].numpy()) ** 2, axis=1))
        np.testing.assert_allclose(got_B[row], expected, rtol=1e-12)


def test_released_terms_are_those_of_the_plain_mean_of_the_leads():
    prediction_BLT, target_BLT, _ = signals()
    mu_BLD = torch.randn(4, 3, 6, dtype=torch.float64)
    logvar_BLD = torch.randn(4, 3, 6, dtype=torch.float64)
    everything_BL = torch.ones(4, 3, dtype=torch.bool)
    squared = objectives.released_reconstruction(prediction_BLT, target_BLT, everything_BL).sum()
    np.testing.assert_allclose(squared, np.sum((prediction_BLT.numpy() - target_BLT.numpy()) ** 2))

    kl_B, alignment_B = objectives.released_kl_and_alignment(mu_BLD, logvar_BLD, everything_BL)
    mean_mu, mean_logvar = mu_BLD.numpy().mean(axis=1), logvar_BLD.numpy().mean(axis=1)
    expected = -0.5 * np.sum(1 + mean_logvar - mean_mu**2 - np.exp(mean_logvar)) / 4
    np.testing.assert_allclose(kl_B.mean(), expected, rtol=1e-12)
    expected = np.mean([np.mean((mu_BLD[:, row].numpy() - mean_mu) ** 2) for row in range(3)])
    np.testing.assert_allclose(alignment_B.mean(), expected, rtol=1e-12)


def test_released_terms_with_fewer_leads_are_those_of_the_leads_that_are_there():
    mu_BLD = torch.randn(4, 3, 6, dtype=torch.float64)
    logvar_BLD = torch.randn(4, 3, 6, dtype=torch.float64)
    mask_BL = torch.tensor([[True, False, True]] * 4)
    masked = objectives.released_kl_and_alignment(
        mu_BLD.masked_fill(~mask_BL.unsqueeze(-1), float("nan")), logvar_BLD, mask_BL
    )
    alone = objectives.released_kl_and_alignment(mu_BLD[:, ::2], logvar_BLD[:, ::2], mask_BL[:, ::2])
    torch.testing.assert_close(masked, alone)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (2.0, None), (2.0, 0.25), (1.5, 0.9)])
def test_focal_loss_is_the_closed_form(gamma, alpha):
    logit_B = torch.linspace(-6, 6, 25, dtype=torch.float64)
    y_B = (torch.arange(25) % 3 == 0).long()
    p = 1 / (1 + np.exp(-logit_B.numpy()))
    p_t = np.where(y_B == 1, p, 1 - p)
    alpha_t = 1.0 if alpha is None else np.where(y_B == 1, alpha, 1 - alpha)
    got_B = objectives.binary_focal(logit_B, y_B, gamma, alpha)
    np.testing.assert_allclose(got_B, -alpha_t * (1 - p_t) ** gamma * np.log(p_t), rtol=1e-9)


def test_focal_loss_is_finite_with_its_gradient_at_extreme_logits():
    logit_B = torch.tensor([-1e4, -100.0, 100.0, 1e4, -1e4, 1e4], requires_grad=True)
    objectives.binary_focal(logit_B, torch.tensor([0, 0, 1, 1, 1, 0])).sum().backward()
    assert logit_B.grad.isfinite().all()


def test_finite_guard_names_the_positions():
    x_BLT = torch.zeros(4, 2, 8)
    x_BLT[1, 0, 3] = float("nan")
    x_BLT[3, 1, 0] = float("inf")
    assert objectives.finite_records(x_BLT).tolist() == [True, False, True, False]
    mask_BL = torch.tensor([[True, True], [False, True], [True, True], [True, True]])
    assert objectives.finite_records(x_BLT, mask_BL).tolist() == [True, True, True, False]
    objectives.require(torch.ones(4, dtype=torch.bool), "NaN")
    with pytest.raises(objectives.NonFiniteBatch, match=r"NaN in 2 of 4 records .* position 1, 3") as caught:
        objectives.require(objectives.finite_records(x_BLT), "NaN")
    assert caught.value.positions == (1, 3)
    assert isinstance(caught.value, LsemvaeError)
