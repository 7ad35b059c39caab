"""The released code's checkpoint and numbers, against an independent computation in plain functions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig, load_released_state_dict, to_released_state_dict

SAMPLES, LATENT, CHANNELS = 64, 6, (3, 4, 5)
CONFIG = LSEMVAEConfig.released(samples=SAMPLES, latent=LATENT, channels=CHANNELS)


def checkpoint(seed=0):
    """A state dict with the keys and shapes of the released code, and random numbers."""
    generator = torch.Generator().manual_seed(seed)
    features = CHANNELS[2] * SAMPLES // 8
    shapes = {}
    for lead in range(12):
        for name, inputs, outputs in zip(("conv1", "conv2", "conv3"), (1, *CHANNELS), CHANNELS, strict=False):
            shapes[f"encoders.{lead}.{name}.weight"] = (outputs, inputs, 3)
            shapes[f"encoders.{lead}.{name}.bias"] = (outputs,)
        for name in ("fc_mu", "fc_logvar"):
            shapes[f"encoders.{lead}.{name}.weight"] = (LATENT, features)
            shapes[f"encoders.{lead}.{name}.bias"] = (LATENT,)
    shapes["shared_decoder.fc.weight"] = (features, LATENT)
    shapes["shared_decoder.fc.bias"] = (features,)
    widths = (*reversed(CHANNELS), 1)
    for step in (1, 2, 3):
        shapes[f"shared_decoder.convtrans{step}.weight"] = (widths[step - 1], widths[step], 4)
        shapes[f"shared_decoder.convtrans{step}.bias"] = (widths[step],)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def encode(state, lead, x_BT):
    h = x_BT.unsqueeze(1)
    for name in ("conv1", "conv2", "conv3"):
        key = f"encoders.{lead}.{name}"
        h = torch.relu(F.conv1d(h, state[f"{key}.weight"], state[f"{key}.bias"], stride=2, padding=1))
    h = h.flatten(1)
    return tuple(
        h @ state[f"encoders.{lead}.{name}.weight"].T + state[f"encoders.{lead}.{name}.bias"]
        for name in ("fc_mu", "fc_logvar")
    )


def decode(state, z_BD):
    h = z_BD @ state["shared_decoder.fc.weight"].T + state["shared_decoder.fc.bias"]
    h = h.reshape(len(z_BD), CHANNELS[2], -1)
    for step in (1, 2, 3):
        key = f"shared_decoder.convtrans{step}"
        h = F.conv_transpose1d(h, state[f"{key}.weight"], state[f"{key}.bias"], stride=2, padding=1)
        h = torch.relu(h) if step < 3 else h
    return h


def plain_posterior(state, x_BLT):
    experts = [encode(state, lead, x_BLT[:, lead]) for lead in range(12)]
    products = []
    for first in (0, 3, 6, 9):
        members = experts[first : first + 3]
        precision = sum(torch.exp(-logvar) for _, logvar in members)
        mu = sum(mu * torch.exp(-logvar) for mu, logvar in members) / precision
        products.append((mu, -torch.log(precision)))
    return experts, sum(mu for mu, _ in products) / 4, sum(logvar for _, logvar in products) / 4


@pytest.fixture(scope="module", name="x_BLT")
def recordings():
    return torch.randn(5, 12, SAMPLES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    model = LSEMVAE(CONFIG, LEADS)
    load_released_state_dict(model, checkpoint())
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_posterior_sample_and_reconstruction_are_those_of_the_checkpoint(x_BLT, prefix):
    state = checkpoint()
    model = LSEMVAE(CONFIG, LEADS).eval()
    load_released_state_dict(model, {prefix + key: values for key, values in state.items()})
    mask_BL = torch.ones(5, 12, dtype=torch.bool)
    noise_BD = torch.randn(5, LATENT)
    experts, mu_BD, logvar_BD = plain_posterior(state, x_BLT)

    with torch.no_grad():
        posterior = model.posterior(x_BLT, mask_BL)
        terms = model({"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "noise_BD": noise_BD, "kl_scale": torch.tensor(0.25)})
        embedding_BF = model.embed(x_BLT, mask_BL)
        from_mean_BLT = model.reconstruct(x_BLT, mask_BL)
    torch.testing.assert_close(posterior.mu_BD, mu_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.logvar_BD, logvar_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding_BF, torch.cat([mu for mu, _ in experts], dim=1), rtol=1e-5, atol=1e-5)
    expected_BLT = decode(state, mu_BD).expand(-1, 12, -1)
    torch.testing.assert_close(from_mean_BLT, expected_BLT, rtol=1e-5, atol=1e-5)

    z_BD = mu_BD + torch.exp(0.5 * logvar_BD) * noise_BD
    squared = ((decode(state, z_BD) - x_BLT) ** 2).sum() / 5
    mean_mu = sum(mu for mu, _ in experts) / 12
    mean_logvar = sum(logvar for _, logvar in experts) / 12
    kl = -0.5 * (1 + mean_logvar - mean_mu**2 - torch.exp(mean_logvar)).sum() / 5
    alignment = sum(F.mse_loss(mu, mean_mu) for mu, _ in experts) / 12
    np.testing.assert_allclose(terms["reconstruction"], squared, rtol=1e-5)
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(terms["alignment"], alignment, rtol=1e-5)
    np.testing.assert_allclose(terms["loss"], 1e-3 * squared + 0.25 * kl + 0.1 * alignment, rtol=1e-5)


def test_the_model_writes_back_what_it_read(model):
    written = to_released_state_dict(model)
    state = checkpoint()
    assert written.keys() == state.keys()
    for key, values in state.items():
        assert torch.equal(written[key], values), key


def test_the_name_of_a_lead_decides_its_encoder(model, x_BLT):
    """A model of the limb leads reads the six first encoders: aVL is the fifth, aVF the sixth."""
    limb = LSEMVAE(CONFIG, LIMB_LEADS)
    load_released_state_dict(limb, checkpoint())
    embedding_BF = limb.embed(x_BLT[:, :6], torch.ones(5, 6, dtype=torch.bool))
    expected_BD = encode(checkpoint(), 4, x_BLT[:, LEADS.index("aVL")])[0]
    start = limb.leads.index("aVL") * LATENT
    torch.testing.assert_close(embedding_BF[:, start : start + LATENT], expected_BD, rtol=1e-5, atol=1e-5)


def test_the_paper_sizes_have_the_keys_and_shapes_of_the_published_checkpoint():
    with torch.device("meta"):
        shapes = {
            key: tuple(values.shape)
            for key, values in to_released_state_dict(LSEMVAE(LSEMVAEConfig.released())).items()
        }
    assert len(shapes) == 12 * 10 + 8
    assert shapes["encoders.11.conv3.weight"] == (64, 32, 3)
    assert shapes["encoders.0.fc_logvar.weight"] == (256, 40_000)
    assert shapes["shared_decoder.fc.weight"] == (40_000, 256)
    assert shapes["shared_decoder.convtrans3.weight"] == (16, 1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoders.4.fc_mu.bias"), r"lacks key encoders\.4\.fc_mu\.bias"),
        (lambda state: state.pop("shared_decoder.fc.weight"), r"lacks key shared_decoder\.fc\.weight"),
        (
            lambda state: state.update({"encoders.12.conv1.bias": torch.zeros(3)}),
            r"unknown key encoders\.12\.conv1\.bias",
        ),
        (
            lambda state: state.update({"encoders.3.conv2.weight": torch.zeros(4, 3, 5)}),
            r"encoders\.3\.conv2\.weight is \[4, 3, 5\]",
        ),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_name_and_changes_nothing(change, message):
    model = LSEMVAE(CONFIG, LEADS)
    before = {key: values.clone() for key, values in model.state_dict().items()}
    state = checkpoint()
    change(state)
    with pytest.raises(BundleError, match=message):
        load_released_state_dict(model, state)
    for key, values in model.state_dict().items():
        assert torch.equal(values, before[key])


def test_only_the_papers_decoder_and_twelve_leads_can_be_written():
    sizes = {"samples": SAMPLES, "latent": LATENT, "channels": CHANNELS}
    with pytest.raises(LsemvaeError, match="decoder='lead'"):
        to_released_state_dict(LSEMVAE(LSEMVAEConfig(**sizes)))
    with pytest.raises(LsemvaeError, match="reads I, II, III, aVR, aVL, aVF"):
        to_released_state_dict(LSEMVAE(CONFIG, LIMB_LEADS))
    with pytest.raises(LsemvaeError, match="decoder='paper'"):
        load_released_state_dict(LSEMVAE(LSEMVAEConfig(**sizes)), checkpoint())
