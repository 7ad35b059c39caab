"""MVAE, MoPoE-VAE and MMVAE+ against what their papers define, computed here on its own on small cases."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.mmvae_plus import MMVAEPlusConfig
from lsemvae.models.mopoe import MoPoEConfig
from lsemvae.models.mvae import MVAEConfig
from lsemvae.models.parts import subsets

THREE = ("I", "V1", "V5")
SIZES: dict[str, Any] = {"samples": 64, "latent": 4, "channels": (3, 4, 5), "reconstruction_weight": 5.0, "beta": 0.5}
CONFIGS = [MVAEConfig(**SIZES), MoPoEConfig(**SIZES), MMVAEPlusConfig(**SIZES, private=3)]

every_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(config: Any, leads: Sequence[str] = THREE) -> Any:
    torch.manual_seed(0)
    return build(config, leads).double()


def batch_of(model: Any, records: int = 5) -> dict[str, Tensor]:
    """Recordings with all leads, and noise; a lead of record 1 and two of record 2 are absent."""
    generator = torch.Generator().manual_seed(1)
    mask_BL = torch.ones(records, len(model.leads), dtype=torch.bool)
    if records > 2:
        mask_BL[1, 1] = mask_BL[2, 0] = mask_BL[2, 2] = False
    return {
        "x_BLT": torch.randn(records, len(model.leads), 64, generator=generator, dtype=torch.float64),
        "lead_mask_BL": mask_BL,
        "noise_BD": torch.randn(records, model.noise_size, generator=generator, dtype=torch.float64),
    }


def noise_of(share: Tensor | Sequence[float]) -> Tensor:
    """The normal numbers with these values of Phi."""
    return torch.special.ndtri(torch.as_tensor(share, dtype=torch.float64))


def evenly(count: int) -> Tensor:
    """Shares that fall into each of so many equal parts once."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def normal(mu: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mu, (0.5 * logvar).exp()), 1)


def log_standard(z: Tensor) -> Tensor:
    return normal(torch.zeros_like(z), torch.zeros_like(z)).log_prob(z)


# ----------------------------------------------------------------------------------------------- random subsets


def test_as_many_choices_as_there_are_subsets_give_each_of_them_once():
    mask_BL = torch.tensor([[True, True, True, False], [False, True, True, True], [True, False, True, True]])
    for share in (0.01, 0.5, 0.93):
        chosen_BSL = subsets.random_subsets(noise_of([share] * 3), 7, mask_BL)
        assert not (chosen_BSL & ~mask_BL.unsqueeze(1)).any()
        for chosen_SL in chosen_BSL:
            assert len({tuple(row) for row in chosen_SL.tolist()}) == 7 and chosen_SL.any(dim=1).all()
        assert {*subsets.random_leads(noise_of([share] * 3), 3, mask_BL)[1].tolist()} == {1, 2, 3}
    nothing_BL = torch.zeros(1, 4, dtype=torch.bool)
    assert not subsets.random_subsets(torch.zeros(1), 2, nothing_BL).any()
    assert subsets.random_leads(torch.zeros(1), 2, nothing_BL).tolist() == [[0, 0]]


@pytest.mark.parametrize("count", [1, 3])
def test_every_choice_alone_is_equally_likely_even_at_the_ends(count: int):
    mask_BL = torch.tensor([[True, True, False, True]]).expand(70, -1)
    chosen_BSL = subsets.random_subsets(noise_of(evenly(70)), count, mask_BL)
    for choice in range(count):
        _, times = chosen_BSL[:, choice].unique(dim=0, return_counts=True)
        assert times.tolist() == [10] * 7
    for extreme in (-40.0, 40.0):  # where Phi is 0 and 1
        assert subsets.random_subsets(torch.tensor([extreme]), count, mask_BL[:1]).any(dim=2).all()


# ----------------------------------------------------------------------------------------------------------- MVAE


def test_mvae_multiplies_the_observed_experts_and_the_prior():
    config, generator = MVAEConfig(**SIZES), torch.Generator().manual_seed(3)
    mu_BLD, logvar_BLD = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask_BL = torch.tensor([[True, True, True], [True, False, True]])
    posterior = config.fuse(mu_BLD, logvar_BLD, mask_BL, THREE)
    for row, seen in enumerate(mask_BL):
        precision_LD = np.exp(-logvar_BLD[row, seen].numpy())
        variance_D = 1 / (1 + precision_LD.sum(axis=0))
        mu_D = variance_D * (precision_LD * mu_BLD[row, seen].numpy()).sum(axis=0)
        np.testing.assert_allclose(posterior.mu_BD[row], mu_D, rtol=1e-12)
        np.testing.assert_allclose(posterior.logvar_BD[row].exp(), variance_D, rtol=1e-12)
    nothing_BL = torch.zeros(2, 3, dtype=torch.bool)
    assert (config.fuse(mu_BLD, logvar_BLD, nothing_BL, THREE).mu_BD == 0).all()


def test_mvaes_loss_is_the_sum_of_the_negative_elbos_of_its_subsets():
    model = model_of(MVAEConfig(**SIZES, random_subsets=2))
    batch = batch_of(model, records=1)
    # Of seven subsets, Phi = 2.5 / 7 and two choices take the numbers floor(2.5) + 1 = 3 and floor(6) + 1 = 7.
    batch["noise_BD"][:, -1] = noise_of([2.5 / 7])
    random = [[0, 1], [0, 1, 2]]
    mu_LD, logvar_LD = (values[0] for values in model.encoders(batch["x_BLT"]))
    noise_SD = batch["noise_BD"][0, :-1].view(6, 4)
    reconstruction, kl = 0.0, 0.0
    for subset, noise_D in zip([[0, 1, 2], *random, [0], [1], [2]], noise_SD, strict=True):
        variance_D = 1 / (1 + (-logvar_LD[subset]).exp().sum(dim=0))
        mu_D = variance_D * (mu_LD[subset] * (-logvar_LD[subset]).exp()).sum(dim=0)
        q = Normal(mu_D, variance_D.sqrt())
        kl += kl_divergence(q, Normal(torch.zeros_like(mu_D), 1.0)).sum()
        prediction_LT = model.decoder((mu_D + variance_D.sqrt() * noise_D).unsqueeze(0))[0]
        reconstruction += (prediction_LT - batch["x_BLT"][0])[subset].square().mean(dim=1).sum()
    terms = model(batch | {"kl_scale": torch.tensor(0.2)})
    torch.testing.assert_close(terms["reconstruction"], reconstruction.detach())
    torch.testing.assert_close(terms["kl"], kl.detach())
    torch.testing.assert_close(terms["loss"], 5.0 * reconstruction + 0.5 * 0.2 * kl)


def test_mvae_with_one_observed_lead_has_nothing_but_that_leads_elbo():
    model = model_of(MVAEConfig(**SIZES, random_subsets=0))
    batch = batch_of(model, records=1)
    batch["lead_mask_BL"][:, 1:] = False
    batch["noise_BD"][:] = 0
    terms = model(batch)
    alone_BLT = model.reconstruct(batch["x_BLT"], batch["lead_mask_BL"])
    error = (alone_BLT - batch["x_BLT"])[0, 0].square().mean()
    torch.testing.assert_close(terms["reconstruction"], 2 * error.detach())  # together and alone


def test_mvae_reconstructs_a_lead_that_it_does_not_read_only_from_all_leads_together():
    model = model_of(MVAEConfig(**SIZES, random_subsets=1, decoder_leads=THREE), ("V1",))
    target_BLT = torch.randn(2, 3, 64, dtype=torch.float64)
    batch = {"x_BLT": target_BLT[:, 1:2], "lead_mask_BL": torch.ones(2, 1, dtype=torch.bool)}
    targets = {"target_BLT": target_BLT, "target_mask_BL": torch.ones(2, 3, dtype=torch.bool)}
    noise_BD = torch.zeros(2, model.noise_size, dtype=torch.float64)
    error_BL = (model.reconstruct(**batch) - target_BLT).square().mean(dim=2).detach()
    # V1 is all leads together, the random subset, and the lead alone.
    expected = (error_BL * torch.tensor([1.0, 3.0, 1.0])).sum(dim=1).mean()
    torch.testing.assert_close(model(batch | targets | {"noise_BD": noise_BD})["reconstruction"], expected)


# ------------------------------------------------------------------------------------------------------ MoPoE-VAE


def every_subset(count: int) -> list[list[int]]:
    return [[*subset] for size in range(1, count + 1) for subset in combinations(range(count), size)]


def mixture_density(grid_N: np.ndarray, mu_L: np.ndarray, std_L: np.ndarray) -> np.ndarray:
    """The mean over all subsets of the normalised product of their leads' densities, by sums on a grid."""
    density_LN = np.exp(-0.5 * ((grid_N - mu_L[:, None]) / std_L[:, None]) ** 2) / std_L[:, None]
    products = [density_LN[subset].prod(axis=0) for subset in every_subset(len(mu_L))]
    return np.mean([product / np.trapezoid(product, grid_N) for product in products], axis=0)


def test_mopoes_mixture_is_the_direct_sum_over_all_subsets_and_its_kl_is_bounded():
    model = model_of(MoPoEConfig(**SIZES | {"latent": 1}, sampled_subsets=7))
    batch = batch_of(model, records=1)
    mu_L, logvar_L = (values[0, :, 0].detach() for values in model.encoders(batch["x_BLT"]))
    mu_L = mu_L + torch.tensor([-1.0, 0.3, 2.0])
    drawn_BSL = subsets.random_subsets(batch["noise_BD"][:, -1], 7, batch["lead_mask_BL"])
    q = subsets.products(mu_L.view(1, 3, 1), logvar_L.view(1, 3, 1), drawn_BSL)
    grid_N = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    mixture_N = normal(q.mu[0], q.logvar[0]).log_prob(grid_N.view(-1, 1, 1)).exp().mean(dim=1)
    expected_N = mixture_density(grid_N.numpy(), mu_L.numpy(), (0.5 * logvar_L).exp().numpy())
    np.testing.assert_allclose(mixture_N, expected_N, atol=1e-9)

    bound = kl_divergence(normal(q.mu[0], q.logvar[0]), normal(torch.zeros(7, 1), torch.zeros(7, 1))).mean()
    prior_N = log_standard(grid_N.unsqueeze(1)).exp()
    true = np.trapezoid(mixture_N * (mixture_N / prior_N).log(), grid_N)
    assert 0 < true < bound


def test_mopoes_kl_is_exact_with_all_subsets_and_in_expectation_with_a_few():
    shares = evenly(70)
    model = model_of(MoPoEConfig(**SIZES, sampled_subsets=7))
    batch = batch_of(model, records=1)
    mu_LD, logvar_LD = (values[0] for values in model.encoders(batch["x_BLT"]))
    kl, means = 0.0, []
    for subset in every_subset(3):
        variance_D = 1 / (-logvar_LD[subset]).exp().sum(dim=0)
        means.append(variance_D * (mu_LD[subset] * (-logvar_LD[subset]).exp()).sum(dim=0))
        kl += kl_divergence(Normal(means[-1], variance_D.sqrt()), Normal(torch.zeros(4), 1.0)).sum() / 7
    torch.testing.assert_close(model(batch)["kl"], kl.detach())

    few = model_of(replace(model.config, sampled_subsets=2))
    codes: list[Tensor] = []
    few.decoder.register_forward_hook(lambda module, given, result: codes.append(given[0]))
    many = {name: values.expand(70, *values.shape[1:]).clone() for name, values in batch.items()}
    many["noise_BD"][:, :-1], many["noise_BD"][:, -1] = 0, noise_of(shares)
    torch.testing.assert_close(few(many)["kl"], kl.detach())
    # Without noise z is its subset's mean; every subset gives z equally often.
    found = [(codes[0] - mean_D).abs().amax(dim=1).lt(1e-9).sum().item() for mean_D in means]
    assert found == [10] * 7


# --------------------------------------------------------------------------------------------------------- MMVAE+


def direct_bound(model: Any, batch: dict[str, Tensor], row: int, sources: Sequence[int]) -> Tensor:
    """The bound of a record by torch.distributions: the mean over the sources of log mean over k."""
    config, seen = model.config, batch["lead_mask_BL"][row].nonzero().flatten().tolist()
    x_LT, count, width = batch["x_BLT"][row], len(model.leads), config.private
    h_LBF = model.encoders.features(model.encoders.masked(batch["x_BLT"], batch["lead_mask_BL"]))[:, row : row + 1]
    mu_LD, logvar_LD = model.encoders.fc_mu(h_LBF)[:, 0], model.encoders.fc_logvar(h_LBF)[:, 0]
    own_mu_LW, own_logvar_LW = model.private_mu(h_LBF)[:, 0], model.private_logvar(h_LBF)[:, 0]
    joint = MixtureSameFamily(Categorical(logits=torch.zeros(len(seen))), normal(mu_LD[seen], logvar_LD[seen]))
    noise_JKN = batch["noise_BD"][row, :-1].view(len(sources), config.importance_samples, -1)
    bounds = []
    for source, noise_KN in zip(sources, noise_JKN, strict=True):
        ratios = []
        for noise_N in noise_KN:
            z_D = mu_LD[source] + (0.5 * logvar_LD[source]).exp() * noise_N[: config.latent]
            own = normal(own_mu_LW[source], own_logvar_LW[source])
            rest_N = noise_N[config.latent :]
            w_W = own_mu_LW[source] + (0.5 * own_logvar_LW[source]).exp() * rest_N[:width]
            v_LW = model.log_scale.exp() * rest_N[width:].view(count, width)
            log_ratio = log_standard(z_D) + log_standard(w_W) - joint.log_prob(z_D) - own.log_prob(w_W)
            log_likelihood = 0.0
            for lead in seen:
                code = torch.cat([z_D, w_W if lead == source else v_LW[lead]])
                prediction_T = model.decoder(code.expand(1, count, -1))[0, lead]
                log_likelihood -= config.reconstruction_weight * (prediction_T - x_LT[lead]).square().mean()
            ratios.append(log_likelihood + config.beta * log_ratio)
        bounds.append(torch.logsumexp(torch.stack(ratios), dim=0) - math.log(len(ratios)))
    return torch.stack(bounds).mean()


def test_mmvae_plus_bound_and_gradient_are_those_of_the_direct_sum():
    config = MMVAEPlusConfig(**SIZES, private=3, importance_samples=3, sources=3)
    model, plain = model_of(config), model_of(config)
    batch = batch_of(model, records=3)
    with torch.no_grad():
        for each in (model, plain):
            each.log_scale.copy_(torch.linspace(-1, 1, 9).view(3, 3))
    # Phi = 1/6: of three leads floor(0.5 + j), of two floor(1/3 + 2j/3), of one always that one.
    batch["noise_BD"][:, -1] = noise_of([1 / 6] * 3)
    sources = [[0, 1, 2], [0, 2, 2], [1, 1, 1]]
    batch["noise_BD"][1, -1] = noise_of([1 / 6 + 1e-6])
    expected = -sum(direct_bound(plain, batch, row, sources[row]) for row in range(3)) / 3
    loss = model(batch)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_mmvae_plus_terms_sum_to_the_loss_and_one_sample_has_equal_weights():
    model = model_of(MMVAEPlusConfig(**SIZES, private=3, importance_samples=4))
    terms = model(batch_of(model))
    assert terms["importance"] > 0
    single = model_of(MMVAEPlusConfig(**SIZES, private=3, importance_samples=1))
    assert single(batch_of(single))["importance"] == 0


def test_a_leads_private_latent_reaches_no_other_lead():
    model = model_of(MMVAEPlusConfig(**SIZES, private=3, sources=3))
    batch = batch_of(model, records=2)
    batch["noise_BD"][:, -1] = noise_of([1 / 6] * 2)  # sources 0, 1, 2
    found: list[Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, result: found.append(result))
    for _ in range(2):
        model(batch)
        model.reconstruct(batch["x_BLT"], batch["lead_mask_BL"])
        with torch.no_grad():
            model.private_mu.bias[1] += 1.0
    trained, trained_too = (predictions.view(2, 3, 2, 3, 64) for predictions in found[::2])  # [B, J, K, L, T]
    changed_JL = (trained != trained_too).any(dim=-1).any(dim=2).any(dim=0)
    assert changed_JL.nonzero().tolist() == [[1, 1]]  # lead 1, and only from its own z
    whole, whole_too = found[1::2]
    assert (whole != whole_too).any(dim=-1).any(dim=0).tolist() == [False, True, False]


def test_the_scale_of_the_auxiliary_priors_may_be_fixed():
    for learned in (True, False):
        model = model_of(MMVAEPlusConfig(**SIZES, private=3, learn_scale=learned))
        model(batch_of(model))["loss"].backward()
        assert (model.log_scale.grad is not None) == learned


# ------------------------------------------------------------------------------------------------------------ all


def without_noise(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in batch.items() if name != "noise_BD"}


@every_model
def test_the_given_noise_is_all_that_is_random(config: Any):
    model = model_of(config)
    batch = batch_of(model)
    losses = []
    for seed, given in ((1, batch), (2, batch), (1, without_noise(batch)), (2, without_noise(batch))):
        torch.manual_seed(seed)
        losses.append(model(given)["loss"].item())
    assert losses[0] == losses[1] and losses[2] != losses[3]


@every_model
def test_the_weighted_terms_sum_to_the_loss(config: Any):
    model = model_of(config)
    terms = model(batch_of(model) | {"kl_scale": torch.tensor(0.1)})
    torch.testing.assert_close(terms["weighted_reconstruction"], 5.0 * terms["reconstruction"])
    torch.testing.assert_close(terms["weighted_kl"], 0.05 * terms["kl"])
    weighted = [value for name, value in terms.items() if name.startswith("weighted_")]
    torch.testing.assert_close(terms["loss"].detach(), sum(weighted))
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]


@every_model
def test_the_parameters_of_absent_leads_get_exactly_zero_gradient(config: Any):
    model = model_of(config, LEADS)
    batch = batch_of(model)
    absent = [1, 4, 7, 8, 9]
    batch["lead_mask_BL"][:, absent] = False
    batch["x_BLT"][:, absent] = float("nan")
    model(batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if not name.startswith("decoder"):
            assert (parameter.grad[absent] == 0).all(), name
            assert (parameter.grad != 0).any(), name
    assert (model.decoder.convtrans3.bias.grad[absent] == 0).all()


@every_model
def test_a_record_without_any_lead_pads_a_batch_and_is_refused_in_one(config: Any):
    model = model_of(config)
    batch = batch_of(model)
    batch["x_BLT"][4], batch["lead_mask_BL"][4] = 0, False
    four = {name: values[:4] for name, values in batch.items()}
    terms = model(batch | {"share_B": torch.tensor([0.25, 0.25, 0.25, 0.25, 0])}, check=False)
    assert terms["good_B"].tolist() == [True] * 4 + [False]
    terms["loss"].backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = model(four)["loss"]
    alone.backward()
    torch.testing.assert_close(terms["loss"], alone)
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    with pytest.raises(LsemvaeError, match="no lead at all in 1 of 5 records of the batch, at position 4"):
        model(batch)


@every_model
def test_features_are_of_the_shared_latent_and_fused_is_the_models_own_posterior(config: Any):
    model = model_of(config, LEADS)
    twelve = batch_of(model)
    limb_mask_BL = torch.zeros_like(twelve["lead_mask_BL"])
    limb_mask_BL[:, :6] = twelve["lead_mask_BL"][:, :6]
    x_BLT, mask_BL = twelve["x_BLT"][:, :6], limb_mask_BL[:, :6]
    posterior = model.posterior(twelve["x_BLT"], limb_mask_BL)
    fused = model.embedder(LIMB_LEADS, "fused")
    torch.testing.assert_close(fused.embed(x_BLT, mask_BL), posterior.mu_BD)
    assert [model.embedder(LIMB_LEADS, kind).embedding_size for kind in ("means", "pooled", "fused")] == [24, 48, 4]
    mu_BLD, _ = model.encoders(torch.where(limb_mask_BL.unsqueeze(2), twelve["x_BLT"], 0))
    expected_BF = (mu_BLD * limb_mask_BL.unsqueeze(2))[:, :6].flatten(1)
    torch.testing.assert_close(model.embedder(LIMB_LEADS).embed(x_BLT, mask_BL), expected_BF)
    assert (config.embedder(LIMB_LEADS).fc_logvar is None) and config.embedder(LIMB_LEADS, "fused").embedding_size == 4


@every_model
def test_six_limb_leads_are_trained_to_reconstruct_twelve(config: Any):
    model = model_of(replace(config, decoder_leads=LEADS), LIMB_LEADS)
    twelve = batch_of(model_of(config, LEADS))
    batch = {
        "x_BLT": twelve["x_BLT"][:, :6],
        "lead_mask_BL": torch.ones(5, 6, dtype=torch.bool),
        "target_BLT": twelve["x_BLT"],
        "target_mask_BL": torch.ones(5, 12, dtype=torch.bool),
    }
    model(batch)["loss"].backward()
    assert (model.decoder.convtrans3.bias.grad != 0).all()
    model.zero_grad()
    model({name: batch[name] for name in ("x_BLT", "lead_mask_BL")})["loss"].backward()
    assert (model.decoder.convtrans3.bias.grad[6:] == 0).all()
    assert model.reconstruct(batch["x_BLT"], batch["lead_mask_BL"]).shape == twelve["x_BLT"].shape


@every_model
def test_bf16_autocast_keeps_fusion_and_losses_in_float32(config: Any):
    model = model_of(config).float()
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch_of(model).items()}
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model(batch)
        assert model.posterior(batch["x_BLT"], batch["lead_mask_BL"]).mu_BD.dtype == torch.float32
    for name, value in near.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), exact[name].detach(), rtol=0.05, atol=0.1)
    near["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (MVAEConfig, {"random_subsets": -1}),
        (MoPoEConfig, {"sampled_subsets": 0}),
        (MMVAEPlusConfig, {"private": 0}),
        (MMVAEPlusConfig, {"importance_samples": 0}),
        (MMVAEPlusConfig, {"sources": 0}),
        (MVAEConfig, {"samples": 63}),
        (MoPoEConfig, {"beta": -1.0}),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(config: type, change: dict[str, Any]):
    ((name, value),) = change.items()
    with pytest.raises(LsemvaeError, match=f"{name} is {value}"):
        config(**change)
