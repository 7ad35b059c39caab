"""Preprocessing on an accelerator gives the numbers of the one definition."""

import numpy as np
import pytest
import torch

from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig, finish, window_signals
from lsemvae.preprocess.on_device import DeviceFinish
from lsemvae.simulate import EcgParameters, simulate_ecg

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def odd_recordings() -> tuple[list[np.ndarray], list[float]]:
    """What refusals and masks depend on: far from zero, gaps, flat, short, slow, loud, few leads."""
    rng = np.random.default_rng(0)
    signals = [simulate_ecg(EcgParameters(severity=b / 8), rng)[0].astype(np.float32) for b in range(9)]
    signals[1] += 5.0
    signals[2][3, 100:400] = np.nan
    signals[3][0] = 0.25
    signals[4] = signals[4][:, :2000]
    signals[5] *= 1000
    signals[6][:8] = np.nan
    signals[7] = signals[7][:, ::2]
    signals[8][:, 0:2500] = np.nan
    return signals, [500.0] * 7 + [250.0, 500.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "config",
    [
        PreprocessConfig(scale="fixed"),
        PreprocessConfig(scale="lead"),
        PreprocessConfig(scale="record"),
        PreprocessConfig(scale="none"),
        PreprocessConfig(samples=4990),  # no whole number of blocks
        PreprocessConfig(mains_hz=0),
        PreprocessConfig(highpass_order=2, samples=2500),  # by the whole matrix
    ],
    ids=["fixed", "lead", "record", "none", "length", "no mains", "matrix"],
)
def test_equals_the_definition(config: PreprocessConfig, device: str):
    signals, rates = odd_recordings()
    windows = window_signals(signals, rates, LEADS, config)
    assert windows.refused_B == [None] * len(signals)
    wanted = finish(windows, LEADS, config)
    tensors = [torch.from_numpy(np.asarray(values)).to(device) for values in windows[:3]]
    tensors[0] = tensors[0].float()
    x_BLT, lead_mask_BL, accepted_B = (t.cpu().numpy() for t in DeviceFinish(config, LEADS, device)(*tensors))
    np.testing.assert_array_equal(accepted_B, wanted.accepted_B)
    assert 0 < accepted_B.sum() < len(accepted_B)
    np.testing.assert_array_equal(lead_mask_BL, wanted.lead_mask_BL)
    np.testing.assert_allclose(x_BLT, wanted.x_BLT, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_compiled_model_gives_the_losses_and_gradients_of_the_cpu():
    torch.manual_seed(0)
    config = LSEMVAEConfig(samples=1000, latent=16, channels=(4, 8, 8))
    batch = {"x_BLT": torch.randn(8, 12, 1000), "lead_mask_BL": torch.ones(8, 12, dtype=torch.bool)}
    batch["lead_mask_BL"][2:5, 3] = False
    batch["noise_BD"] = torch.randn(8, 16)
    model = LSEMVAE(config)
    wanted = model(batch)
    wanted["loss"].backward()
    gradients = {name: values.grad.clone() for name, values in model.named_parameters()}
    model.zero_grad()
    model.cuda().compile(dynamic=False)
    found = model({name: values.cuda() for name, values in batch.items()}, check=False)
    found["loss"].backward()
    for name, term in wanted.items():
        torch.testing.assert_close(found[name].cpu(), term, rtol=2e-3, atol=1e-4)
    for name, values in model.named_parameters():
        error = (values.grad.cpu() - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-2, (name, error)  # convolutions may round to TF32
