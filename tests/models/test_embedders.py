"""Features that do not depend on where the beats fall: circular shifts, pooling over them, the fused mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.models.parts import augment, shifts
from lsemvae.models.parts.blocks import STRIDE
from lsemvae.models.parts.head import Head

SAMPLES, UNITS = 80, 3
POSITIONS = SAMPLES // STRIDE
ALL = torch.ones(1, 6, dtype=torch.bool)


def model(fusion: str = "hime") -> LSEMVAE:
    torch.manual_seed(0)
    return build(LSEMVAEConfig(samples=SAMPLES, latent=UNITS, channels=(2, 3, 2), fusion=fusion), LEADS)


def recording(samples: int = SAMPLES, records: int = 1) -> Tensor:
    """Noise, with zeros after so many samples, as preprocessing pads a short recording."""
    x_BLT = torch.randn(records, 6, SAMPLES, generator=torch.Generator().manual_seed(samples))
    x_BLT[..., samples:] = 0
    return x_BLT


@settings(max_examples=30, deadline=None)
@given(st.integers(1, SAMPLES), st.floats(0, 1, exclude_max=True))
def test_a_shift_moves_what_was_recorded_and_nothing_else(samples: int, shift: float):
    x_BLT = recording(samples)
    assert shifts.recorded_samples(x_BLT).tolist() == [samples]
    for moved_BLT in (
        shifts.each_shifted(x_BLT, torch.tensor([shift])),
        shifts.shifted(x_BLT, shifts.recorded_samples(x_BLT), shift),
    ):
        assert (moved_BLT[..., samples:] == 0).all()
        steps = int(shift * samples)
        expected_LT = torch.cat([x_BLT[0, :, steps:samples], x_BLT[0, :, :steps]], dim=1)
        # float32 and float64 products may differ by one sample where the product is nearly whole
        others = [torch.roll(expected_LT, by, dims=1) for by in (-1, 0, 1)]
        assert any(torch.equal(moved_BLT[0, :, :samples], other_LT) for other_LT in others)


def test_records_of_a_batch_are_shifted_each_within_its_own_length():
    x_BLT = torch.cat([recording(80), recording(48), recording(48), recording(17)])
    size_B = shifts.recorded_samples(x_BLT)
    together = shifts.shifted(x_BLT, size_B, 0.25)
    alone = torch.cat([shifts.shifted(x_BLT[b : b + 1], size_B[b : b + 1], 0.25) for b in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(shifts.each_shifted(x_BLT, torch.full((4,), 0.25)), together)
    assert shifts.recorded_samples(torch.zeros(2, 6, SAMPLES)).tolist() == [SAMPLES, SAMPLES]


@pytest.mark.parametrize("samples", [80, 72, 50, 33])
@pytest.mark.parametrize("features", ["means", "fused"])
def test_shifting_the_convolutions_output_is_shifting_the_input_but_for_the_ends(features: str, samples: int):
    """Of a signal that is zero at both ends the edges are the same either way, so the embeddings are equal."""
    x_BLT = recording(samples)
    whole = samples // STRIDE * STRIDE
    x_BLT[..., : 2 * STRIDE] = 0
    x_BLT[..., whole - 2 * STRIDE : samples] = 0
    x_BLT[..., whole - 1] = 1e-30  # so that the recording still ends there
    encoder = model().embedder(LIMB_LEADS, features)
    for conv in (encoder.conv1, encoder.conv2, encoder.conv3):
        torch.nn.init.zeros_(conv.bias)
    position = 1 / (whole // STRIDE)
    (by_features,) = encoder.embed_shifted(x_BLT, ALL, [position + 1e-6])
    moved = torch.cat([torch.roll(x_BLT[..., :whole], -STRIDE, dims=-1), x_BLT[..., whole:]], dim=-1)
    torch.testing.assert_close(by_features, encoder.embed(moved, ALL), rtol=1e-4, atol=1e-5)
    (unmoved,) = encoder.embed_shifted(x_BLT, ALL, [0.0])
    assert torch.equal(unmoved, encoder.embed(x_BLT, ALL))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(STRIDE, SAMPLES), min_size=1, max_size=3))
def test_pooled_features_are_mean_and_deviation_over_all_explicit_shifts(lengths: list[int]):
    x_BLT = torch.cat([recording(samples) for samples in lengths])
    mask_BL = torch.ones(len(lengths), 6, dtype=torch.bool)
    mask_BL[0, 2] = False
    means, pooled = (model().embedder(LIMB_LEADS, features) for features in ("means", "pooled"))
    found_BF = pooled.embed(x_BLT, mask_BL)
    assert found_BF.shape == (len(lengths), pooled.embedding_size) == (len(lengths), 2 * 6 * UNITS)
    assert pooled.observed(mask_BL).shape == found_BF.shape and (found_BF[~pooled.observed(mask_BL)] == 0).all()
    for b, samples in enumerate(lengths):
        count = samples // STRIDE
        row = slice(b, b + 1)
        h_SF = means.embed_shifted(x_BLT[row], mask_BL[row], [(s + 1e-6) / count for s in range(count)])[:, 0]
        deviation_F = (h_SF.var(dim=0, unbiased=False) + 1e-6).sqrt()
        deviation_F = deviation_F * means.observed(mask_BL[row])[0]
        torch.testing.assert_close(found_BF[b], torch.cat([h_SF.mean(dim=0), deviation_F]), rtol=1e-4, atol=2e-5)


def test_pooled_features_are_the_same_for_every_shift_and_have_a_gradient():
    encoder = model().embedder(LIMB_LEADS, "pooled")
    x_BLT = recording(records=3)
    h_SBF = encoder.embed_shifted(x_BLT, ALL.expand(3, -1), [0.0, 0.5])
    assert torch.equal(h_SBF[0], h_SBF[1])
    h_SBF[0].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("fusion", ["hime", "product", "mixture", "released"])
def test_fused_features_are_the_posterior_mean_of_the_leads_that_are_there(fusion: str):
    whole, x_BLT = model(fusion), recording(records=2)
    mask_BL = torch.tensor([[True] * 6, [True, True, False, False, False, True]])
    encoder = whole.embedder(LIMB_LEADS, "fused")
    expected_BD = whole.select(LIMB_LEADS).posterior(x_BLT, mask_BL).mu_BD
    torch.testing.assert_close(encoder.embed(x_BLT, mask_BL), expected_BD)
    assert encoder.observed(mask_BL).all() and encoder.embedding_size == UNITS


@pytest.mark.parametrize("features", ["means", "fused", "pooled"])
@pytest.mark.parametrize("hidden", [0, 4])
def test_a_score_over_shifts_is_the_mean_logit(features: str, hidden: int):
    encoder, x_BLT = model(), recording(records=2)
    size = encoder.embedder(LIMB_LEADS, features).embedding_size
    head = Head(size, hidden=hidden).eval()
    one, four = (Classifier.from_encoder(encoder, LIMB_LEADS, head, features, count) for count in (1, 4))
    mask_BL = ALL.expand(2, -1)
    h_SBF = one.encoders.embed_shifted(x_BLT, mask_BL, [0.0, 0.25, 0.5, 0.75])
    expected_B = torch.sigmoid(torch.stack([head.logit(h_BF) for h_BF in h_SBF]).mean(dim=0))
    torch.testing.assert_close(four.predict(x_BLT, mask_BL), expected_B)
    assert torch.equal(one.predict(x_BLT, mask_BL), head.predict(one.embed(x_BLT, mask_BL)))


def test_settings_that_make_no_sense_are_refused():
    encoder = LSEMVAEConfig(samples=SAMPLES, latent=UNITS, channels=(2, 3, 2))
    with pytest.raises(LsemvaeError, match="shifts is 0: give 1 or more"):
        ClassifierConfig(encoder=encoder, shifts=0)


def test_augmentation_leaves_padding_and_absent_leads_alone():
    x_BLT = recording(48, records=4)
    torch.manual_seed(0)
    noisy_BLT = augment.noisy(x_BLT, 0.5)
    assert (noisy_BLT[..., 48:] == 0).all() and 0.4 < (noisy_BLT - x_BLT)[..., :48].std() < 0.6
    ratio_BLT = augment.rescaled(x_BLT, 0.2)[..., :48] / x_BLT[..., :48]
    torch.testing.assert_close(ratio_BLT, ratio_BLT[:, :1, :1].expand_as(ratio_BLT))
    assert len(ratio_BLT[:, 0, 0].unique()) == 4
