"""HiME and its parts against closed forms written here on their own, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models.parts import fusion

FUSIONS = {
    "hime": fusion.hime,
    "product": fusion.product_of_leads,
    "mixture": fusion.mixture_of_leads,
    "released": lambda mu, logvar, mask: fusion.released(mu, logvar, mask, LEADS),
}


def experts(records=7, leads=12, units=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mu_BLD = torch.randn(records, leads, units, generator=generator, dtype=dtype)
    logvar_BLD = 2 * torch.randn(records, leads, units, generator=generator, dtype=dtype)
    mask_BL = torch.rand(records, leads, generator=generator) < 0.5
    mask_BL[torch.arange(records), torch.arange(records) % leads] = True
    return mu_BLD, logvar_BLD, mask_BL


# Plain numpy, one record at a time, only the observed experts, formulas as the paper prints them.


def plain_product(mu_KD, var_KD):
    precision_D = (1 / var_KD).sum(axis=0)
    return (mu_KD / var_KD).sum(axis=0) / precision_D, 1 / precision_D


def plain_gate(var_KD):
    score_K = np.exp(-np.log(var_KD).mean(axis=1))
    return score_K / score_K.sum()


def plain_mixture(mu_KD, var_KD, weight_K):
    mu_D = weight_K @ mu_KD
    return mu_D, weight_K @ (var_KD + mu_KD**2) - mu_D**2


def plain_hime(mu_LD, var_LD):
    mu_D, var_D = plain_product(mu_LD, var_LD)
    mu_KD, var_KD = np.vstack([mu_LD, mu_D]), np.vstack([var_LD, var_D])
    return plain_mixture(mu_KD, var_KD, plain_gate(var_KD))


def plain_released(mu_LD, var_LD, leads):
    groups = [("I", "II", "III"), ("aVR", "aVL", "aVF"), ("V1", "V2", "V3"), ("V4", "V5", "V6")]
    products = []
    for group in groups:
        rows = [row for row, lead in enumerate(leads) if lead in group]
        if rows:
            products.append(plain_product(mu_LD[rows], var_LD[rows]))
    return np.mean([mu for mu, _ in products], axis=0), np.exp(np.mean([np.log(var) for _, var in products], axis=0))


PLAIN = {
    "hime": lambda mu, var, leads: plain_hime(mu, var),
    "product": lambda mu, var, leads: plain_product(mu, var),
    "mixture": lambda mu, var, leads: plain_mixture(mu, var, plain_gate(var)),
    "released": plain_released,
}


@pytest.mark.parametrize("name", FUSIONS)
def test_posterior_is_the_closed_form_over_the_observed_leads(name):
    mu_BLD, logvar_BLD, mask_BL = experts()
    posterior = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    for row, mask_L in enumerate(mask_BL.numpy()):
        leads = [lead for lead, there in zip(LEADS, mask_L, strict=True) if there]
        mu_D, var_D = PLAIN[name](mu_BLD[row].numpy()[mask_L], np.exp(logvar_BLD[row].numpy()[mask_L]), leads)
        np.testing.assert_allclose(posterior.mu_BD[row], mu_D, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(posterior.logvar_BD[row].exp(), var_D, rtol=1e-11)


def test_gate_weights_are_the_closed_form_and_sum_to_one():
    _, logvar_BKD, mask_BK = experts()
    weight_BK = fusion.gate_weights(logvar_BKD, mask_BK)
    assert torch.equal(weight_BK != 0, mask_BK)
    np.testing.assert_allclose(weight_BK.sum(dim=1), 1.0, rtol=1e-14)
    for row, mask_K in enumerate(mask_BK.numpy()):
        expected_K = plain_gate(np.exp(logvar_BKD[row].numpy()[mask_K]))
        np.testing.assert_allclose(weight_BK[row][mask_BK[row]], expected_K, rtol=1e-12)


@pytest.mark.parametrize("leads", [1, 3, 12])
def test_equally_sure_leads_share_one_half_with_the_shared_expert(leads):
    mu_BLD = torch.randn(2, leads, 4, dtype=torch.float64)
    posterior = fusion.hime(mu_BLD, torch.full_like(mu_BLD, 0.7), torch.ones(2, leads, dtype=torch.bool))
    np.testing.assert_allclose(posterior.weight_BK[:, -1], 0.5, rtol=1e-12)
    np.testing.assert_allclose(posterior.weight_BK[:, :-1], 0.5 / leads, rtol=1e-12)


def test_mixture_has_the_moments_of_samples_from_it():
    mu_BKD, logvar_BKD, _ = experts(records=1, leads=4, units=3, seed=3)
    mask_BK = torch.tensor([[True, True, False, True]])
    posterior = fusion.mixture_of_leads(mu_BKD, logvar_BKD, mask_BK)
    generator = torch.Generator().manual_seed(1)
    draws = 400_000
    chosen_N = torch.multinomial(posterior.weight_BK[0], draws, replacement=True, generator=generator)
    noise_ND = torch.randn(draws, 3, generator=generator, dtype=torch.float64)
    z_ND = mu_BKD[0, chosen_N] + (0.5 * logvar_BKD[0, chosen_N]).exp() * noise_ND
    std_D = posterior.logvar_BD[0].exp().sqrt()
    assert ((z_ND.mean(dim=0) - posterior.mu_BD[0]).abs() < 5 * std_D / draws**0.5).all()
    np.testing.assert_allclose(z_ND.var(dim=0), std_D**2, rtol=0.03)


@pytest.mark.parametrize("name", ["hime", "product", "mixture"])
def test_order_of_the_leads_changes_nothing(name):
    mu_BLD, logvar_BLD, mask_BL = experts()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    one = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    other = FUSIONS[name](mu_BLD[:, order], logvar_BLD[:, order], mask_BL[:, order])
    torch.testing.assert_close(one.mu_BD, other.mu_BD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.logvar_BD, other.logvar_BD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.weight_BK[:, :12][:, order], other.weight_BK[:, :12])


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("hidden", [0.0, 1e30, float("nan"), float("inf")])
def test_absent_leads_count_nothing_and_get_exactly_zero_gradient(name, hidden):
    mu_BLD, logvar_BLD, mask_BL = experts(dtype=torch.float32)
    expected = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    mu_BLD = mu_BLD.masked_fill(~mask_BL.unsqueeze(-1), hidden).requires_grad_()
    logvar_BLD = logvar_BLD.masked_fill(~mask_BL.unsqueeze(-1), hidden).requires_grad_()
    posterior = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    assert torch.equal(posterior.mu_BD, expected.mu_BD)
    assert torch.equal(posterior.logvar_BD, expected.logvar_BD)
    assert torch.equal(posterior.weight_BK, expected.weight_BK)
    (posterior.mu_BD.square().sum() + posterior.logvar_BD.square().sum()).backward()
    for gradient in (mu_BLD.grad, logvar_BLD.grad):
        assert gradient.isfinite().all()
        assert (gradient[~mask_BL] == 0).all()
        assert (gradient[mask_BL] != 0).any(dim=-1).all()


@pytest.mark.parametrize("name", FUSIONS)
def test_a_record_without_any_lead_gets_the_prior(name):
    mu_BLD, logvar_BLD, mask_BL = experts(dtype=torch.float32)
    mask_BL[2] = False
    mu_BLD.requires_grad_()
    logvar_BLD.requires_grad_()
    posterior = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    assert (posterior.mu_BD[2] == 0).all()
    assert (posterior.logvar_BD[2] == 0).all()
    assert (posterior.weight_BK[2] == 0).all()
    (posterior.mu_BD.sum() + posterior.logvar_BD.sum()).backward()
    assert mu_BLD.grad.isfinite().all()
    assert logvar_BLD.grad.isfinite().all()
    assert (mu_BLD.grad[2] == 0).all()


def test_released_fusion_of_six_limb_leads_leaves_out_the_chest_groups():
    mu_BLD, logvar_BLD, _ = experts()
    mask_BL = torch.zeros(7, 12, dtype=torch.bool)
    mask_BL[:, :6] = True
    masked = fusion.released(mu_BLD, logvar_BLD, mask_BL, LEADS)
    alone = fusion.released(mu_BLD[:, :6], logvar_BLD[:, :6], mask_BL[:, :6], LIMB_LEADS)
    assert masked.weight_BK[0].tolist() == [0.5, 0.5, 0.0, 0.0]
    torch.testing.assert_close(masked.mu_BD, alone.mu_BD, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(masked.logvar_BD, alone.logvar_BD, rtol=1e-14, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    mu_BLD, logvar_BLD, mask_BL = experts(records=3, leads=4, units=2)
    mu_BLD.requires_grad_()
    logvar_BLD.requires_grad_()
    for fuse in (fusion.hime, fusion.product_of_leads, fusion.mixture_of_leads):
        assert torch.autograd.gradcheck(
            lambda mu, logvar, fuse=fuse: fuse(mu, logvar, mask_BL)[:2], (mu_BLD, logvar_BLD)
        )


@st.composite
def extreme_experts(draw):
    """Up to five experts with three units; log-variances over all that an encoder could ever say."""
    count = draw(st.integers(1, 5))
    numbers = st.lists(
        st.sampled_from([-1e4, -300.0, -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 90.0, 300.0, 1e4])
        | st.floats(-1e4, 1e4, width=32),
        min_size=3 * count,
        max_size=3 * count,
    )
    means = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3 * count, max_size=3 * count)
    mask = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    shape = (1, count, 3)
    return (
        torch.tensor(draw(means)).view(shape),
        torch.tensor(draw(numbers)).view(shape),
        torch.tensor([mask]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hime", "product", "mixture", "released"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(given_experts=extreme_experts())
def test_nothing_overflows_at_extreme_log_variances(name, dtype, given_experts):
    mu_BLD, logvar_BLD, mask_BL = given_experts
    mu_BLD, logvar_BLD = mu_BLD.to(dtype).requires_grad_(), logvar_BLD.to(dtype).requires_grad_()
    if name == "released":
        posterior = fusion.released(mu_BLD, logvar_BLD, mask_BL, LEADS[: mu_BLD.shape[1]])
    else:
        posterior = FUSIONS[name](mu_BLD, logvar_BLD, mask_BL)
    assert posterior.mu_BD.dtype == posterior.logvar_BD.dtype == torch.float32
    assert posterior.mu_BD.isfinite().all()
    assert posterior.logvar_BD.isfinite().all()
    assert posterior.weight_BK.isfinite().all()
    (posterior.mu_BD.sum() + posterior.logvar_BD.sum()).backward()
    assert mu_BLD.grad.isfinite().all()
    assert logvar_BLD.grad.isfinite().all()
    assert (mu_BLD.grad[~mask_BL] == 0).all()
    assert (logvar_BLD.grad[~mask_BL] == 0).all()
    # Between the extremes of its experts: a mean of their means, with no smaller variance than the product.
    observed_KD = mu_BLD.detach().float()[mask_BL]
    slack = 1e-4 * (1 + observed_KD.abs().max())
    assert (posterior.mu_BD[0] >= observed_KD.min(dim=0).values - slack).all()
    assert (posterior.mu_BD[0] <= observed_KD.max(dim=0).values + slack).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 60.0))
def test_float32_follows_float64_over_wide_log_variances(seed, scale):
    mu_BLD, logvar_BLD, mask_BL = experts(records=3, leads=6, units=4, seed=seed)
    exact = fusion.hime(mu_BLD, scale * logvar_BLD / 2, mask_BL)
    near = fusion.hime(mu_BLD.float(), (scale * logvar_BLD / 2).float(), mask_BL)
    np.testing.assert_allclose(near.mu_BD, exact.mu_BD, rtol=1e-3, atol=1e-4)
    # Below the rounding of the means, float32 cannot know a smaller spread between them.
    floor = -25.0
    np.testing.assert_allclose(near.logvar_BD.clamp(min=floor), exact.logvar_BD.clamp(min=floor), rtol=1e-3, atol=1e-2)
