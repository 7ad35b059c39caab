"""The model over every subset of leads and against the paper's plain loop; heads, metrics, configuration."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support.session import ROOT
from torch import nn

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import CHEST_LEADS, LEADS, LIMB_LEADS
from lsemvae.models import architecture_name, build, config_from
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig, to_released_state_dict
from lsemvae.models.parts.augment import hide_leads
from lsemvae.models.parts.blocks import LeadEncoders
from lsemvae.models.parts.diagnostics import Diagnostics, einthoven_rmse
from lsemvae.models.parts.head import Head
from lsemvae.models.parts.objectives import NonFiniteBatch

SMALL = LSEMVAEConfig(samples=64, latent=6, channels=(3, 4, 5))


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(records=6, leads=12, seed=0, full=False):
    generator = torch.Generator().manual_seed(seed)
    x_BLT = torch.randn(records, leads, SMALL.samples, generator=generator)
    lead_mask_BL = torch.rand(records, leads, generator=generator) < 0.5
    lead_mask_BL[torch.arange(records), torch.arange(records) % leads] = True
    if full:
        lead_mask_BL[:] = True
    return {"x_BLT": x_BLT, "lead_mask_BL": lead_mask_BL}


def model_of(seed=0, leads=LEADS, **changes):
    torch.manual_seed(seed)
    return LSEMVAE(replace(SMALL, **changes), leads)


# ------------------------------------------------------------------------------------------------- sizes


def test_the_papers_model_has_exactly_its_parameters_and_ours_is_within_one_percent():
    with torch.device("meta"):
        paper = sum(p.numel() for p in LSEMVAE(LSEMVAEConfig(decoder="paper"), LEADS).parameters())
        ours = sum(p.numel() for p in LSEMVAE(LSEMVAEConfig(), LEADS).parameters())
    assert paper == 256_150_577
    assert abs(ours / paper - 1) < 0.01


def test_a_six_lead_classifier_takes_at_most_250_megabytes():
    with torch.device("meta"):
        classifier = Classifier(ClassifierConfig(), LIMB_LEADS)
    values = classifier.state_dict().values()
    assert sum(v.numel() * v.element_size() for v in values) <= 250e6
    assert not any("logvar" in name or "decoder" in name for name in classifier.state_dict())


def test_each_lead_is_initialised_as_torch_initialises_its_layers():
    torch.manual_seed(0)
    encoders = LeadEncoders(LEADS, samples=512, latent=32, channels=(16, 32, 64))
    for rows, layer in (
        (encoders.conv1, nn.Conv1d(1, 16, 3)),
        (encoders.conv3, nn.Conv1d(32, 64, 3)),
        (encoders.fc_mu, nn.Linear(4096, 32)),
    ):
        for ours, theirs in ((rows.weight, layer.weight), (rows.bias, layer.bias)):
            bound = (layer.weight[0].numel()) ** -0.5
            assert ours.abs().max() <= bound
            np.testing.assert_allclose(ours.std().item(), bound / 3**0.5, rtol=0.15)
            assert ours[0].numel() == theirs.numel()


# --------------------------------------------------------------------------- against the plain loop, by lead


class PlainLead(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = (1, *config.channels)
        self.convs = nn.ModuleList(nn.Conv1d(widths[i], widths[i + 1], 3, stride=2, padding=1) for i in range(3))
        self.fc_mu = nn.Linear(widths[3] * config.samples // 8, config.latent)
        self.fc_logvar = nn.Linear(widths[3] * config.samples // 8, config.latent)

    def forward(self, x_BT):
        h = x_BT.unsqueeze(1)
        for conv in self.convs:
            h = torch.relu(conv(h))
        return self.fc_mu(h.flatten(1)), self.fc_logvar(h.flatten(1))


def plain_leads(encoders, config):
    """Twelve modules with the same weights."""
    modules = [PlainLead(config) for _ in encoders.leads]
    with torch.no_grad():
        for row, module in enumerate(modules):
            for conv, rows in zip(module.convs, (encoders.conv1, encoders.conv2, encoders.conv3), strict=True):
                conv.weight.copy_(rows.weight[row])
                conv.bias.copy_(rows.bias[row])
            for linear, rows in ((module.fc_mu, encoders.fc_mu), (module.fc_logvar, encoders.fc_logvar)):
                linear.weight.copy_(rows.weight[row].T)
                linear.bias.copy_(rows.bias[row])
    return modules


@pytest.mark.parametrize("way", ["_grouped", "_lead_by_lead"])
def test_all_leads_at_once_gives_the_numbers_and_gradients_of_the_loop(way, monkeypatch):
    encoders = model_of().double().encoders
    modules = [module.double() for module in plain_leads(encoders, SMALL)]
    monkeypatch.setattr(encoders, "features", getattr(encoders, way))
    x_BLT = torch.randn(4, 12, SMALL.samples, dtype=torch.float64)
    mu_BLD, logvar_BLD = encoders(x_BLT)
    outputs = [module(x_BLT[:, row]) for row, module in enumerate(modules)]
    plain_mu_BLD = torch.stack([mu for mu, _ in outputs], dim=1)
    plain_logvar_BLD = torch.stack([logvar for _, logvar in outputs], dim=1)
    torch.testing.assert_close(mu_BLD, plain_mu_BLD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logvar_BLD, plain_logvar_BLD, rtol=1e-10, atol=1e-12)

    for mu, logvar in ((mu_BLD, logvar_BLD), (plain_mu_BLD, plain_logvar_BLD)):
        (mu.square().sum() + logvar.sin().sum()).backward()
    for row, module in enumerate(modules):
        pairs = [
            *zip(module.convs, (encoders.conv1, encoders.conv2, encoders.conv3), strict=True),
            (module.fc_mu, encoders.fc_mu),
            (module.fc_logvar, encoders.fc_logvar),
        ]
        for layer, rows in pairs:
            gradient = rows.weight.grad[row].T if isinstance(layer, nn.Linear) else rows.weight.grad[row]
            torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(rows.bias.grad[row], layer.bias.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_the_benchmarks_baseline():
    from benchmarks.model import PaperLoop

    model = model_of(decoder="paper").double()
    loop = PaperLoop(model.config).double()
    loop.load_state_dict(to_released_state_dict(model))
    x_BLT = torch.randn(5, 12, SMALL.samples, dtype=torch.float64)
    noise_BD = torch.randn(5, SMALL.latent, dtype=torch.float64)
    ours = model({"x_BLT": x_BLT, "lead_mask_BL": torch.ones(5, 12, dtype=torch.bool)} | {"noise_BD": noise_BD})
    theirs = loop(x_BLT.clone(), noise_BD)
    # The baseline computes its experts in float32, as autocast would have it.
    torch.testing.assert_close(ours["loss"].float(), theirs.float(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("fusion", ["hime", "product", "mixture", "released"])
def test_every_row_with_another_subset_equals_the_model_of_those_leads_alone(fusion):
    model = model_of(fusion=fusion).eval()
    inputs = batch(records=8)
    x_BLT = inputs["x_BLT"].masked_fill(~inputs["lead_mask_BL"].unsqueeze(-1), float("nan"))
    mask_BL = inputs["lead_mask_BL"]
    posterior = model.posterior(x_BLT, mask_BL)
    embedding_BLD = model.embed(x_BLT, mask_BL).view(8, 12, -1)
    reconstruction_BLT = model.reconstruct(x_BLT, mask_BL)
    for row in range(8):
        leads = [lead for lead, there in zip(LEADS, mask_BL[row], strict=True) if there]
        alone = model.select(leads)
        assert alone.leads == tuple(leads)
        x_1LT, all_1L = x_BLT[row : row + 1, mask_BL[row]], torch.ones(1, len(leads), dtype=torch.bool)
        own = alone.posterior(x_1LT, all_1L)
        torch.testing.assert_close(posterior.mu_BD[row], own.mu_BD[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.logvar_BD[row], own.logvar_BD[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            embedding_BLD[row][mask_BL[row]].flatten(), alone.embed(x_1LT, all_1L)[0], rtol=1e-4, atol=1e-5
        )
        assert (embedding_BLD[row][~mask_BL[row]] == 0).all()
        torch.testing.assert_close(reconstruction_BLT[row], alone.reconstruct(x_1LT, all_1L)[0], rtol=1e-4, atol=1e-5)
        assert alone.decoder_leads == LEADS


def test_leads_may_be_named_in_any_order():
    one, other = model_of(leads=LIMB_LEADS), model_of(leads=LIMB_LEADS[::-1])
    assert one.leads == other.leads == LIMB_LEADS
    inputs = batch(leads=6)
    torch.testing.assert_close(one.embed(**inputs), other.embed(**inputs))
    assert one.select(["V".replace("V", "aVF"), "I"]).leads == ("I", "aVF")
    with pytest.raises(LsemvaeError, match="no encoder for lead V1"):
        one.select(["I", "V1"])


@pytest.mark.parametrize("objective", ["paper", "released"])
@pytest.mark.parametrize("fusion", ["hime", "product", "mixture", "released"])
def test_encoders_of_absent_leads_get_exactly_zero_gradient(fusion, objective):
    model = model_of(fusion=fusion, objective=objective)
    inputs = batch()
    absent = [1, 4, 7, 8, 9]
    inputs["lead_mask_BL"][:, absent] = False
    inputs["lead_mask_BL"][:, 0] = True
    inputs["x_BLT"][:, absent] = float("nan")
    model(inputs)["loss"].backward()
    for name, parameter in model.encoders.named_parameters():
        assert (parameter.grad[absent] == 0).all(), name
        assert parameter.grad.isfinite().all(), name
        if objective == "paper" or "logvar" not in name:
            assert (parameter.grad[0] != 0).any(), name


def test_selecting_adjacent_leads_copies_no_weight():
    model = model_of()
    limb = model.select(LIMB_LEADS)
    assert limb.encoders.fc_mu.weight.data_ptr() == model.encoders.fc_mu.weight.data_ptr()
    assert limb.encoders.fc_mu.weight.shape[0] == 6
    chest = model.encoders.select(CHEST_LEADS, log_variance=False)
    assert chest.fc_logvar is None
    assert chest.fc_mu.weight.data_ptr() == model.encoders.fc_mu.weight[6].data_ptr()


@pytest.mark.parametrize(
    ("x_shape", "mask_shape"), [((2, 6, 64), (2, 6)), ((2, 12, 60), (2, 12)), ((2, 12, 64), (2, 6))]
)
def test_a_wrong_shape_is_refused(x_shape, mask_shape):
    with pytest.raises(LsemvaeError, match=r"give \[batch, 12, 64\] and \[batch, 12\]"):
        model_of().embed(torch.zeros(x_shape), torch.ones(mask_shape, dtype=torch.bool))


# --------------------------------------------------------------------------------- decoder, reconstruction


def test_reconstructions_differ_between_leads_and_the_papers_do_not():
    inputs = batch(full=True)
    differing = model_of().reconstruct(**inputs)
    same = model_of(decoder="paper").reconstruct(**inputs)
    assert differing.shape == same.shape == inputs["x_BLT"].shape
    assert (differing[:, 1:] != differing[:, :1]).any(dim=-1).all()
    assert torch.equal(same, same[:, :1].expand_as(same))


def test_six_limb_leads_are_trained_to_reconstruct_twelve():
    model = model_of(leads=LIMB_LEADS, decoder_leads=LEADS)
    twelve = batch(full=True)
    limb = {
        "x_BLT": twelve["x_BLT"][:, :6],
        "lead_mask_BL": torch.ones(6, 6, dtype=torch.bool),
        "target_BLT": twelve["x_BLT"],
        "target_mask_BL": torch.ones(6, 12, dtype=torch.bool),
    }
    limb["target_mask_BL"][:, :6] = False
    noise_BD = torch.zeros(6, SMALL.latent)
    terms = model(limb | {"noise_BD": noise_BD})
    chest_BLT = model.reconstruct(limb["x_BLT"], limb["lead_mask_BL"])[:, 6:]
    expected = ((chest_BLT - twelve["x_BLT"][:, 6:]) ** 2).mean(dim=-1).sum(dim=-1).mean()
    torch.testing.assert_close(terms["reconstruction"], expected.detach())
    terms["loss"].backward()
    assert (model.decoder.convtrans3.bias.grad[:6] == 0).all()
    assert (model.decoder.convtrans3.bias.grad[6:] != 0).all()

    # Without targets of their own, the leads that were read are the targets.
    read_only = {name: limb[name] for name in ("x_BLT", "lead_mask_BL")}
    limb_BLT = model.reconstruct(**read_only)[:, :6]
    expected = ((limb_BLT - limb["x_BLT"]) ** 2).mean(dim=-1).sum(dim=-1).mean()
    torch.testing.assert_close(model(read_only | {"noise_BD": noise_BD})["reconstruction"], expected.detach())
    with pytest.raises(LsemvaeError, match=r"targets are \[6, 6, 64\]"):
        model(limb | {"target_BLT": limb["x_BLT"]})


def test_einthovens_relations_are_checked_in_millivolts():
    generator = torch.Generator().manual_seed(0)
    i_BT, ii_BT = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    true_BLT = torch.stack([i_BT, ii_BT, ii_BT - i_BT, -(i_BT + ii_BT) / 2, i_BT - ii_BT / 2, ii_BT - i_BT / 2], dim=1)
    assert max(einthoven_rmse(true_BLT, LIMB_LEADS).values()) < 1e-12
    wrong_BLT = true_BLT.clone()
    wrong_BLT[:, LIMB_LEADS.index("aVL")] += 0.3
    residual = einthoven_rmse(wrong_BLT, LIMB_LEADS)
    np.testing.assert_allclose(residual["aVL"], 0.3)
    assert residual["III"] < 1e-12
    assert einthoven_rmse(true_BLT[:, 1:], LIMB_LEADS[1:]) == {}


# -------------------------------------------------------------------------------------- forward, training


def test_the_weighted_terms_sum_to_the_loss_and_only_the_loss_has_a_gradient():
    model = model_of(reconstruction_weight=3.0, beta=0.5, gamma=0.25)
    terms = model(batch() | {"kl_scale": torch.tensor(0.1)})
    torch.testing.assert_close(terms["weighted_reconstruction"], 3.0 * terms["reconstruction"])
    torch.testing.assert_close(terms["weighted_kl"], 0.05 * terms["kl"])
    torch.testing.assert_close(terms["weighted_alignment"], 0.25 * terms["alignment"])
    weighted = [value for name, value in terms.items() if name.startswith("weighted_")]
    torch.testing.assert_close(terms["loss"].detach(), sum(weighted))
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert all(value.shape == () for value in terms.values())


def test_a_generator_repeats_the_noise_and_the_dropout():
    model = model_of(lead_dropout=0.4).train()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(batch())["loss"].item()

    losses = [loss(seed) for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "changes", [{}, {"gamma": 0.0}, {"fusion": "product"}, {"fusion": "mixture"}, {"decoder": "paper"}]
)
def test_ablations_are_settings_and_all_of_them_learn(changes):
    model = model_of(**changes).train()
    inputs = batch(records=16)
    inputs["x_BLT"] = torch.sin(torch.linspace(0, 12, SMALL.samples) + inputs["x_BLT"][:, :, :1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        torch.manual_seed(0)
        terms = model(inputs)
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    if changes.get("gamma") == 0.0:
        assert terms["weighted_alignment"] == 0 < terms["alignment"]


def test_lead_dropout_hides_observed_leads_but_never_all():
    mask_BL = batch(records=4000)["lead_mask_BL"]
    mask_BL[:100] = False
    mask_BL[:100, 3] = True
    torch.manual_seed(0)
    seen_BL = hide_leads(mask_BL, 0.5)
    assert not (seen_BL & ~mask_BL).any()
    assert seen_BL.any(dim=1).all()
    assert torch.equal(seen_BL[:100], mask_BL[:100])
    twelve_BL = torch.ones(13_000, 12, dtype=torch.bool)
    counts = torch.bincount(hide_leads(twelve_BL, 0.5).sum(dim=1), minlength=13)
    assert counts[0] == 0
    assert (counts[2:] > 700).all()  # every number of leads, about as often
    share = 1 - hide_leads(twelve_BL, 0.2).float().mean()
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_hidden_leads_stay_targets_and_evaluation_hides_none():
    model = model_of(lead_dropout=0.5)
    inputs = batch(full=True)
    plain = LSEMVAE(SMALL, LEADS)
    plain.load_state_dict(model.state_dict())
    noise_BD = torch.randn(6, SMALL.latent)
    model.eval()
    assert model(inputs | {"noise_BD": noise_BD})["loss"] == plain(inputs | {"noise_BD": noise_BD})["loss"]
    model.train()
    terms = model(inputs | {"noise_BD": noise_BD})
    terms["loss"].backward()
    assert (model.decoder.convtrans3.bias.grad != 0).all()
    everything = dict(inputs, target_mask_BL=inputs["lead_mask_BL"])
    assert terms["reconstruction"] > 0.5 * plain(everything | {"noise_BD": noise_BD})["reconstruction"]


@pytest.mark.parametrize("changes", [{}, {"fusion": "released", "objective": "released"}])
def test_bf16_autocast_keeps_fusion_and_losses_in_float32(changes):
    model = model_of(**changes)
    inputs = batch()
    noise_BD = torch.randn(6, SMALL.latent)
    exact = model(inputs | {"noise_BD": noise_BD})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encoders(inputs["x_BLT"])[0].dtype == torch.bfloat16
        posterior = model.posterior(**inputs)
        near = model(inputs | {"noise_BD": noise_BD})
        embedding_BF = model.embed(**inputs)
    assert posterior.mu_BD.dtype == posterior.logvar_BD.dtype == embedding_BF.dtype == torch.float32
    for name, value in near.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), exact[name].detach(), rtol=0.05, atol=0.05)
    near["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_finite_guard_names_the_records_before_anything_is_trained(bad):
    model = model_of()
    inputs = batch(full=True)
    inputs["x_BLT"][2, 5, 10] = bad
    inputs["x_BLT"][4, 0, 0] = bad
    with pytest.raises(NonFiniteBatch, match="in 2 of 6 records of the batch, at position 2, 4") as caught:
        model(inputs)
    assert caught.value.positions == (2, 4)
    assert all(parameter.grad is None for parameter in model.parameters())

    inputs["lead_mask_BL"][2, 5] = inputs["lead_mask_BL"][4, 0] = False
    assert model(inputs)["loss"].isfinite()
    inputs["lead_mask_BL"][3] = False
    with pytest.raises(NonFiniteBatch, match="no lead at all in 1 of 6 records"):
        model(inputs)


def test_a_loss_that_overflows_is_refused_though_the_input_is_finite():
    model = model_of()
    with torch.no_grad():
        model.encoders.fc_logvar.bias[:] = 1e3
    with pytest.raises(NonFiniteBatch):
        model(batch())


# -------------------------------------------------------------------------------------------- diagnostics


def test_diagnostics_add_up_over_batches_and_workers():
    model = model_of(channels=(8, 8, 8)).eval()
    inputs = batch(records=9)
    given = inputs | {"noise_BD": torch.randn(9, SMALL.latent)}
    whole, *parts = (model.validation() for _ in range(3))
    whole.update(given)
    for part, rows in zip(parts, (slice(0, 4), slice(4, 9)), strict=True):
        part.update({name: values[rows] for name, values in given.items()})
    for one, first, second in zip(whole.tensors(), *(part.tensors() for part in parts), strict=True):
        torch.testing.assert_close(one, first + second, rtol=1e-6, atol=1e-6)
    assert len(model.validation().tensors()) == len(whole.tensors())  # a worker without records reduces as many

    with torch.no_grad():
        posterior = model.posterior(**inputs)
        prediction_BLT = model.reconstruct(**inputs).double().numpy()
    summary = whole.metrics()
    loss = model(given)
    assert summary["loss"] == pytest.approx(loss["loss"].item(), rel=1e-5)
    assert summary["pearson_r"] == pytest.approx(np.mean([summary[f"r/{lead}"] for lead in LEADS]))
    assert summary["collapsed"] == float(summary["active_units"] < 1)
    mu_BD = posterior.mu_BD.double().numpy()
    assert summary["active_units"] == np.sum(mu_BD.var(axis=0) > 0.01)
    kl_BD = 0.5 * (mu_BD**2 + np.exp(posterior.logvar_BD.numpy()) - 1 - posterior.logvar_BD.numpy())
    np.testing.assert_allclose(summary["kl_per_unit_mean"], kl_BD.mean(), rtol=1e-5)
    for row, lead in enumerate(LEADS):
        there = np.flatnonzero(inputs["lead_mask_BL"][:, row])
        target_BT, prediction_BT = inputs["x_BLT"][there, row].double().numpy(), prediction_BLT[there, row]
        np.testing.assert_allclose(
            summary[f"rmse/{lead}"], np.sqrt(np.mean((target_BT - prediction_BT) ** 2)), rtol=1e-5
        )
        expected = np.mean([np.corrcoef(t, p)[0, 1] for t, p in zip(target_BT, prediction_BT, strict=True)])
        np.testing.assert_allclose(summary[f"r/{lead}"], expected, rtol=1e-4, atol=1e-6)


def test_a_collapsed_posterior_is_said_in_one_sentence():
    alive, dead = Diagnostics.empty(40, 1), Diagnostics.empty(40, 1)
    x_BLT, mask_BL = torch.randn(64, 1, 8), torch.ones(64, 1, dtype=torch.bool)
    mu_BD = torch.zeros(64, 40)
    dead.update(mu_BD + 0.05 * torch.randn(64, 40), torch.zeros(64, 40), x_BLT, x_BLT, mask_BL)
    assert "0 of 40 latent units are active" in dead.collapsed()
    mu_BD[:, :3] = torch.randn(64, 3)
    alive.update(mu_BD, torch.zeros(64, 40), x_BLT, x_BLT, mask_BL)
    assert alive.active_units() == 3
    assert alive.collapsed() is None
    assert alive.collapsed(least_share=0.5) is not None
    assert "\n" not in dead.collapsed()


def test_flat_targets_have_no_correlation_and_flat_reconstructions_have_zero():
    sums = Diagnostics.empty(2, 2)
    target_BLT = torch.stack([torch.zeros(3, 8), torch.randn(3, 8)], dim=1)
    zeros = torch.zeros(3, 2)
    sums.update(zeros, zeros, torch.zeros(3, 2, 8), target_BLT, torch.ones(3, 2, dtype=torch.bool))
    summary = sums.summary(("I", "II"))
    assert "r/I" not in summary
    assert summary["rmse/I"] == 0.0
    assert summary["r/II"] == 0.0


# --------------------------------------------------------------------------------------------- classifier


def test_the_classifier_is_the_encoders_of_the_named_leads_and_the_head():
    model = model_of()
    head = Head(3 * SMALL.latent, hidden=8, dropout=0.2, focal_gamma=1.0, focal_alpha=0.3).eval()
    leads = ("II", "aVF", "V5")
    classifier = Classifier.from_encoder(model, leads, head)
    assert classifier.leads == leads
    assert classifier.config == ClassifierConfig(SMALL, 8, 0.2, 1.0, 0.3)
    rows = [LEADS.index(lead) for lead in leads]
    inputs = batch()
    inputs["lead_mask_BL"][:, rows[0]] = True
    x_BLT, mask_BL = inputs["x_BLT"][:, rows], inputs["lead_mask_BL"][:, rows]
    embedding_BF = model.embed(**inputs).view(6, 12, -1)[:, rows].flatten(1)
    torch.testing.assert_close(classifier.embed(x_BLT, mask_BL), embedding_BF)
    score_B = classifier.predict(x_BLT, mask_BL)
    torch.testing.assert_close(score_B, head.predict(embedding_BF, classifier.observed(mask_BL)))
    assert score_B.shape == (6,)
    assert ((score_B > 0) & (score_B < 1)).all()
    with pytest.raises(LsemvaeError, match="the head reads 18 features"):
        Classifier.from_encoder(model, LIMB_LEADS, head)

    limb = Classifier.from_encoder(model, LIMB_LEADS, Head(6 * SMALL.latent))
    assert limb.encoders.fc_mu.weight.data_ptr() == model.encoders.fc_mu.weight.data_ptr()
    assert limb.encoders.fc_logvar is None


def test_a_head_alone_learns_from_embeddings_and_standardises_them():
    torch.manual_seed(0)
    h_BF = 100 + 1e-2 * torch.randn(200, 12)
    y_B = (h_BF[:, 3] > 100).float()
    head = Head(12, hidden=16, dropout=0.0)
    head.standardise_from(h_BF)
    np.testing.assert_allclose(head.mean_F, h_BF.double().mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(head.scale_F, h_BF.double().std(dim=0, correction=0), rtol=1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        head({"h_BF": h_BF, "y_B": y_B})["loss"].backward()
        optimizer.step()
    assert ((head.predict(h_BF) > 0.5) == (y_B > 0)).float().mean() > 0.95
    h_BF[3, 0] = float("nan")
    with pytest.raises(NonFiniteBatch, match="position 3"):
        head({"h_BF": h_BF, "y_B": y_B})
    with pytest.raises(LsemvaeError, match=r"give \[batch, 12\]"):
        head.predict(h_BF[:, :5])


def test_an_absent_lead_counts_as_its_average_for_the_head():
    h_BF = 5 + torch.randn(50, 4)
    mask_BL = torch.ones(50, 2, dtype=torch.bool)
    mask_BL[10:20, 1] = False
    h_BF[10:20, 2:] = 0.0
    head = Head(4, hidden=3).eval()
    observed_BF = mask_BL.repeat_interleave(2, dim=1)
    head.standardise_from(h_BF, observed_BF)
    there_NF = h_BF[torch.cat([torch.arange(10), torch.arange(20, 50)])][:, 2:]
    np.testing.assert_allclose(head.mean_F[2:], there_NF.mean(dim=0), rtol=1e-5)
    average_BF = torch.cat([h_BF[10:20, :2], head.mean_F[2:].expand(10, 2)], dim=1)
    torch.testing.assert_close(head.predict(h_BF[10:20], observed_BF[10:20]), head.predict(average_BF))
    constant = Head(1)
    constant.standardise_from(torch.full((9, 1), 7.0))
    assert constant.scale_F.item() == 1.0


def test_a_classifier_trains_end_to_end():
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(SMALL, hidden=8), LIMB_LEADS)
    inputs = batch(leads=6) | {"y_B": torch.tensor([0, 1, 0, 1, 1, 0])}
    classifier(inputs)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in classifier.parameters())
    assert (classifier.encoders.conv1.weight.grad != 0).any()


# ------------------------------------------------------------------------------------------ configuration

CONFIGS = [
    LSEMVAEConfig(),
    LSEMVAEConfig.released(samples=64, latent=6, channels=(3, 4, 5)),
    replace(SMALL, decoder_leads=LEADS),
    ClassifierConfig(SMALL, focal_alpha=0.3),
    ClassifierConfig(),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_survives_json(config):
    written = json.dumps({"architecture": architecture_name(config), "config": asdict(config)})
    read = json.loads(written)
    assert config_from(read["architecture"], read["config"]) == config


@pytest.mark.parametrize("config", [SMALL, ClassifierConfig(SMALL, hidden=8)])
def test_a_model_built_without_memory_takes_the_weights_as_they_are(config):
    torch.manual_seed(0)
    original = build(config, LIMB_LEADS).eval()
    with torch.device("meta"):
        copy = build(config, LIMB_LEADS).eval()
    copy.load_state_dict(original.state_dict(), assign=True)
    inputs = batch(leads=6)
    torch.testing.assert_close(copy.embed(**inputs), original.embed(**inputs), rtol=0, atol=0)
    assert original.embed(**inputs).shape == (6, original.embedding_size)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resnet", {}, "unknown architecture 'resnet': this version knows lsemvae, classifier"),
        ("lsemvae", {"latents": 3}, "config has the unknown field latents"),
        ("lsemvae", {"latent": None}, "config.latent is None: not a int"),
        ("lsemvae", {"latent": "6"}, "config.latent is '6': not a int"),
        ("lsemvae", {"samples": True}, "config.samples is True: not a int"),
        ("lsemvae", {"samples": 63}, "samples is 63: give a positive multiple of 8"),
        ("lsemvae", {"channels": [3, 4]}, "config.channels is .*: not a tuple"),
        ("lsemvae", {"channels": [3, 4, "5"]}, r"config.channels\[2\] is '5'"),
        ("lsemvae", {"fusion": "sum"}, "config.fusion is 'sum'"),
        ("lsemvae", {"beta": float("nan")}, "beta is nan"),
        ("lsemvae", {"lead_dropout": 0.9}, "lead_dropout is 0.9"),
        ("lsemvae", {"decoder_leads": ["V1", "I"]}, "decoder_leads is"),
        ("lsemvae", {"decoder_leads": ["V9"]}, "unknown lead 'V9'"),
    ],
)
def test_an_unknown_configuration_is_refused_by_name(name, change, message):
    with pytest.raises(BundleError, match=message):
        config_from(name, asdict(SMALL) | change)


def test_a_missing_field_is_refused_by_name_at_any_depth():
    values = asdict(ClassifierConfig(SMALL))
    del values["encoder"]["gamma"]
    with pytest.raises(BundleError, match=r"config\.encoder lacks gamma"):
        config_from("classifier", values)
    with pytest.raises(BundleError, match=r"config\.encoder is 3: it must hold the fields of a configuration"):
        config_from("classifier", values | {"encoder": 3})
    with pytest.raises(LsemvaeError, match=r"focal_alpha is 1\.5"):
        ClassifierConfig(SMALL, focal_alpha=1.5)
    with pytest.raises(LsemvaeError, match="hidden is -1"):
        ClassifierConfig(SMALL, hidden=-1)


def test_models_need_torch_alone():
    code = (
        "import sys, lsemvae.models\n"
        "heavy = {'ray', 'mlflow', 'pandas', 'sklearn', 'pyarrow', 'wfdb', 'scipy'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
