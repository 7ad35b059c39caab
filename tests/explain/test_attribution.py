"""Integrated gradients of every classifier: they add up, and equal those of a plain computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from support.bundles import CONFIGS
from torch import nn

from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.ecg_fm import ECGFMConfig

LEADS = ("I", "II", "V1")
SAMPLES = 320
ENCODERS = [
    replace(
        config,
        samples=SAMPLES,
        **({"segment": SAMPLES} if isinstance(config, ECGFMConfig) else {}),
        **({"patch": 40} if hasattr(config, "patch") else {}),
    )
    for config in CONFIGS
    if not isinstance(config, ClassifierConfig)
]
SHORT = 192  # recorded samples of the second record


def classifiers():
    """Every encoder with every kind of features, one shift and several, and both heads."""
    for encoder in ENCODERS:
        for features, shifts, hidden in (("means", 1, 0), ("means", 4, 8), ("pooled", 1, 8), ("fused", 4, 8)):
            config = ClassifierConfig(encoder=encoder, features=features, shifts=shifts, hidden=hidden)
            try:
                build(config, LEADS)
            except LsemvaeError:
                continue  # this encoder has no posterior to fuse
            yield pytest.param(config, id=f"{encoder.architecture}-{features}-{shifts}-{hidden}")


def made(config, seed=0):
    """The model, and a complete record, a short one, and one without its second lead."""
    torch.manual_seed(seed)
    model = build(config, LEADS).eval()
    x_BLT = torch.randn(3, len(LEADS), SAMPLES).cumsum(2) / 4
    mask_BL = torch.ones(3, len(LEADS), dtype=torch.bool)
    x_BLT[1, :, SHORT:] = 0
    mask_BL[2, 1], x_BLT[2, 1] = False, torch.nan
    return model, x_BLT, mask_BL


SMALL = ClassifierConfig(encoder=ENCODERS[0], hidden=8, shifts=4)


@pytest.mark.parametrize("config", classifiers())
def test_every_classifier_is_explained_within_the_bound(config):
    model, x_BLT, mask_BL = made(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = Settings(steps=8, bound=0.05)
    found = attribute(model, x_BLT, mask_BL, settings)

    difference_B = found.logit_B - found.baseline_logit_B
    np.testing.assert_allclose(found.values_BLT.sum((1, 2)) - difference_B, found.delta_B, atol=1e-5)
    total_B = np.abs(found.values_BLT).sum((1, 2))
    limit_B = [settings.limit(*pair) for pair in zip(difference_B, total_B, strict=True)]
    assert (np.abs(found.delta_B) <= limit_B).all()
    assert (found.steps_B >= 8).all()
    assert (found.steps_B <= 512).all()
    assert not found.values_BLT[2, 1].any()
    assert not found.values_BLT[1, :, SHORT:].any()
    with torch.no_grad():
        np.testing.assert_allclose(found.logit_B, model.logit(x_BLT, mask_BL), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("config", classifiers())
def test_attributions_are_those_of_a_plain_computation(config):
    """Here over the only point of a rule with one, which lies in the middle of the path."""
    model, x_BLT, mask_BL = made(config)
    found = attribute(model, x_BLT[:1], mask_BL[:1], Settings(steps=1, bound=1e9, most_steps=1))
    x_BLT = x_BLT[:1] / 2
    x_BLT.requires_grad_()
    (gradient_BLT,) = torch.autograd.grad(model.logit(x_BLT, mask_BL[:1]).sum(), x_BLT)
    expected_BLT = (2 * x_BLT * gradient_BLT).detach().numpy()
    np.testing.assert_allclose(found.values_BLT, expected_BLT, atol=1e-3 * np.abs(expected_BLT).max() + 1e-7)


def test_with_as_many_points_as_captum_the_attributions_are_captums():
    model, x_BLT, mask_BL = made(SMALL)
    found = attribute(model, x_BLT, mask_BL, Settings(steps=50, bound=1e9))
    for b in (0, 1):
        expected_LT = IntegratedGradients(model.logit).attribute(
            x_BLT[b : b + 1], additional_forward_args=(mask_BL[b : b + 1],)
        )[0]
        difference_LT = found.values_BLT[b] - expected_LT.detach().numpy()
        assert np.abs(difference_LT).max() <= 1e-4 * expected_LT.abs().max()


@pytest.mark.parametrize("baseline", ["zero", "mean-beat", "expected"])
def test_a_record_alone_is_explained_as_in_a_batch(baseline):
    model, x_BLT, mask_BL = made(SMALL)
    generator = torch.Generator().manual_seed(1)
    given = {"zero": None, "mean-beat": torch.randn(x_BLT.shape, generator=generator)}
    given["expected"] = torch.randn((5, *x_BLT.shape), generator=generator)
    settings, start = Settings(baseline, steps=10, bound=1e-3), given[baseline]
    together = attribute(model, x_BLT, mask_BL, settings, start)
    for b in range(3):
        of_b = None if start is None else start[..., b : b + 1, :, :]
        alone = attribute(model, x_BLT[b : b + 1], mask_BL[b : b + 1], settings, of_b)
        np.testing.assert_allclose(alone.values_BLT[0], together.values_BLT[b], atol=1e-6)
        np.testing.assert_allclose(
            [alone.delta_B[0], alone.steps_B[0]], [together.delta_B[b], together.steps_B[b]], atol=1e-6
        )


def test_several_baselines_give_the_mean_over_their_paths():
    model, x_BLT, mask_BL = made(SMALL)
    start_RBLT = torch.randn(4, *x_BLT.shape, generator=torch.Generator().manual_seed(1))
    settings = Settings("expected", steps=40, bound=1e9)
    together = attribute(model, x_BLT, mask_BL, settings, start_RBLT)
    one_by_one = [attribute(model, x_BLT, mask_BL, replace(settings, steps=10), start) for start in start_RBLT]
    np.testing.assert_allclose(together.values_BLT, np.mean([one.values_BLT for one in one_by_one], axis=0), atol=1e-6)
    np.testing.assert_allclose(
        together.baseline_logit_B, np.mean([one.baseline_logit_B for one in one_by_one], axis=0), atol=1e-6
    )
    difference_B = together.values_BLT.sum((1, 2)) - (together.logit_B - together.baseline_logit_B)
    np.testing.assert_allclose(together.delta_B, difference_B, atol=1e-5)


def test_a_baseline_counts_as_zero_in_absent_leads_and_in_the_padding():
    model, x_BLT, mask_BL = made(SMALL)
    start_BLT = torch.randn(x_BLT.shape, generator=torch.Generator().manual_seed(1))
    clean_BLT = start_BLT.clone()
    clean_BLT[1, :, SHORT:] = 0
    clean_BLT[2, 1] = 0
    start_BLT[2, 1] = torch.nan
    settings = Settings("mean-beat", steps=4, bound=1e9)
    found, expected = (attribute(model, x_BLT, mask_BL, settings, start) for start in (start_BLT, clean_BLT))
    np.testing.assert_array_equal(found.values_BLT, expected.values_BLT)
    assert not found.values_BLT[1, :, SHORT:].any()
    assert not found.values_BLT[2, 1].any()


def test_the_baseline_of_a_short_record_is_as_short_as_the_record():
    """At zeros alone its padding could not be told, and the logit would be that of a silent record of full length."""
    model, x_BLT, mask_BL = made(replace(SMALL, hidden=0))
    with torch.no_grad():
        silent, nearly = model.logit(0 * x_BLT[1:2], mask_BL[1:2]), model.logit(1e-4 * x_BLT[1:2], mask_BL[1:2])
    found = attribute(model, x_BLT[1:2], mask_BL[1:2], Settings(bound=1e-3))
    assert abs(silent - nearly) > 1e-3  # else this test would show nothing
    np.testing.assert_allclose(found.baseline_logit_B, nearly, atol=1e-5)
    assert abs(found.delta_B[0]) <= 1e-3 * max(0.1, np.abs(found.values_BLT).sum() / 10)


class Weighted(nn.Module):
    """A logit that is linear in the signal, or has the shape of `bend`."""

    def __init__(self, bend=None):
        super().__init__()
        self.weight_LT = nn.Parameter(torch.randn(len(LEADS), SAMPLES, generator=torch.Generator().manual_seed(0)))
        self.bend = bend or nn.Identity()

    def logit(self, x_BLT, lead_mask_BL):
        x_BLT = torch.where(lead_mask_BL.unsqueeze(2), x_BLT, 0.0)
        return self.bend((x_BLT * self.weight_LT).sum(dim=(1, 2)) / 10)


def test_attributions_of_a_linear_model_are_weight_times_signal():
    model = Weighted().eval()
    _, x_BLT, mask_BL = made(SMALL)
    found = attribute(model, x_BLT, mask_BL, Settings(steps=1))
    expected_BLT = (torch.where(mask_BL.unsqueeze(2), x_BLT, 0.0) * model.weight_LT / 10).detach()
    np.testing.assert_allclose(found.values_BLT, expected_BLT, rtol=1e-5, atol=1e-6)
    assert (found.steps_B == 1).all()


def test_halved_pieces_are_put_together_to_the_whole_integral():
    """Along the path the logit is tanh(a z) for a linear z: each sample's attribution is its share of z."""
    model = Weighted(lambda logit_B: torch.tanh(20 * logit_B)).eval()
    x_BLT = model.weight_LT.detach().expand(2, -1, -1) * torch.rand(2, len(LEADS), SAMPLES) / 40
    x_BLT[1] /= 50  # nearly linear
    mask_BL = torch.ones(2, len(LEADS), dtype=torch.bool)
    found = attribute(model, x_BLT, mask_BL, Settings(steps=3, bound=1e-4))
    z_BLT = x_BLT * model.weight_LT.detach()
    expected_BLT = z_BLT / z_BLT.sum((1, 2), keepdim=True) * torch.tanh(2 * z_BLT.sum((1, 2), keepdim=True))
    assert found.steps_B[0] > found.steps_B[1] == 3
    np.testing.assert_allclose(found.values_BLT, expected_BLT, rtol=1e-3, atol=1e-6)


def test_points_are_added_only_where_and_until_the_bound_holds():
    model = Weighted(lambda logit_B: torch.relu(logit_B - 0.9).square()).eval()
    x_BLT, mask_BL = torch.zeros(2, len(LEADS), SAMPLES), torch.ones(2, len(LEADS), dtype=torch.bool)
    x_BLT[0] = model.weight_LT.detach() / 40  # beyond the bend
    x_BLT[1] = model.weight_LT.detach() / 400  # flat
    coarse, fine, few = (
        attribute(model, x_BLT, mask_BL, settings)
        for settings in (Settings(steps=2), Settings(steps=2, bound=1e-4), Settings(steps=2, bound=1e-4, most_steps=7))
    )
    difference = coarse.logit_B[0] - coarse.baseline_logit_B[0]
    assert difference > 1
    assert abs(fine.delta_B[0]) <= 1e-4 * difference < abs(few.delta_B[0])
    assert coarse.steps_B[0] < fine.steps_B[0] < 60
    assert few.steps_B.tolist() == [6, 2]
    assert coarse.steps_B[1] == fine.steps_B[1] == 2


class Blind(nn.Module):
    """The logit depends on weights, which have gradients, but on the signal only through numbers that have none."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def logit(self, x_BLT, lead_mask_BL):
        with torch.no_grad():
            h_B = x_BLT.mean(dim=(1, 2))
        return self.scale * h_B


def test_a_model_without_gradients_says_so_and_names_occlusion():
    with pytest.raises(LsemvaeError, match=r"no gradient .* Occlusion"):
        attribute(Blind().eval(), torch.randn(1, 2, 10), torch.ones(1, 2, dtype=torch.bool), Settings())


def test_it_works_inside_inference_mode_and_needs_few_records_and_points_at_once(monkeypatch):
    model, x_BLT, mask_BL = made(SMALL)
    expected = attribute(model, x_BLT, mask_BL, Settings())
    monkeypatch.setattr("lsemvae.explain.attribution.SAVED_BYTES", {"cpu": 1})
    with torch.inference_mode():
        found = attribute(model, x_BLT.clone(), mask_BL.clone(), Settings())
    np.testing.assert_allclose(found.values_BLT, expected.values_BLT, atol=1e-6)
    assert attribute(model, x_BLT[:0], mask_BL[:0], Settings()).values_BLT.shape == (0, len(LEADS), SAMPLES)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 64, "most_steps": 32}, {"bound": 0.0}, {"references": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(LsemvaeError, match=next(iter(wrong))):
        Settings(**wrong)
