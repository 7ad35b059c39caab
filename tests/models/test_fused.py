"""The fused kernel of the lead encoders' convolutions against the plain form: on a GPU, and in Triton's interpreter."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lsemvae.config import OptimConfig
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.models.parts.blocks import LeadEncoders, fuse
from lsemvae.training.fit import prepare

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
pytest.importorskip("triton", reason="Triton is not installed: the kernel cannot run")
runs = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED,
    reason="no GPU: test_all_of_this_in_the_interpreter runs it in a process of its own",
)

CASES = {
    "one record of one lead, one position": (("II",), 1, 8, (2, 2, 4)),
    "several tiles and channels that fill none": (("I", "V1"), 9, 64, (3, 8, 5)),
    "the paper's channels": (LIMB_LEADS[:3], 3, 40, (16, 32, 64)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def encoders_of(leads: tuple[str, ...], samples: int, channels: tuple[int, int, int]) -> LeadEncoders:
    torch.manual_seed(0)
    return LeadEncoders(leads, samples=samples, latent=3, channels=channels).to(DEVICE)


def features_and_gradients(encoders: LeadEncoders, x_BLT: Tensor, fused: bool, bf16: bool = False) -> list[Tensor]:
    """The features, and the gradients of half their squared norm."""
    encoders.fused = fused
    encoders.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        h_LBF = encoders.features(x_BLT)
    (0.5 * h_LBF.float().square().sum()).backward()
    convs = (encoders.conv1, encoders.conv2, encoders.conv3)
    return [h_LBF.detach().float()] + [p.grad.clone() for conv in convs for p in (conv.weight, conv.bias)]


def input_of(leads: tuple[str, ...], records: int, samples: int) -> Tensor:
    """Random samples, with zeros where a lead is absent."""
    x_BLT = torch.randn(records, len(leads), samples, generator=torch.Generator().manual_seed(1))
    x_BLT[-1, 0] = x_BLT[-1, 0] if records == 1 else 0
    return x_BLT.to(DEVICE)


@pytest.fixture(autouse=True)
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would compute the plain form in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@runs
@every_case
def test_float32_is_the_plain_form(case: tuple, monkeypatch: pytest.MonkeyPatch):
    from lsemvae.models.parts import fused

    monkeypatch.setattr(fused, "PROGRAMS", 1)  # one program a lead, which takes all tiles in turn
    leads, records, samples, channels = case
    encoders, x_BLT = encoders_of(leads, samples, channels), input_of(leads, records, samples)
    expected = features_and_gradients(encoders, x_BLT, fused=False)
    found = features_and_gradients(encoders, x_BLT, fused=True)
    assert found[0].shape == (len(leads), records, channels[2] * samples // 8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@runs
@every_case
def test_bf16_is_near_the_plain_form_in_float32(case: tuple):
    leads, records, samples, channels = case
    encoders, x_BLT = encoders_of(leads, samples, channels), input_of(leads, records, samples)
    expected = features_and_gradients(encoders, x_BLT, fused=False)
    found = features_and_gradients(encoders, x_BLT, fused=True, bf16=True)
    assert (found[0] - expected[0]).norm() <= 1e-2 * expected[0].norm()
    gradients = [torch.cat([gradient.flatten() for gradient in given[1:]]) for given in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() <= 2e-2 * gradients[1].norm()


@runs
def test_the_model_has_the_same_loss_and_gradients_with_any_leads_masked():
    torch.manual_seed(0)
    model = LSEMVAE(LSEMVAEConfig(samples=48, latent=3, channels=(2, 4, 4)), LIMB_LEADS).to(DEVICE)
    x_BLT, mask_BL = torch.randn(5, 6, 48), torch.rand(5, 6) > 0.4
    mask_BL[:, 0] = True
    x_BLT[~mask_BL] = float("nan")
    batch = {"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "noise_BD": torch.randn(5, 3)}
    batch = {name: values.to(DEVICE) for name, values in batch.items()}
    found = []
    for fused in (False, True):
        model.encoders.fused = fused
        model.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@runs
def test_what_is_not_finite_stays_so():
    encoders, x_BLT = encoders_of(("I", "II"), 16, (2, 2, 2)), input_of(("I", "II"), 2, 16)
    x_BLT[1, 1, 5] = float("nan")
    encoders.fused = True
    h_LBF = encoders.features(x_BLT)
    assert [[bool(h_F.isfinite().all()) for h_F in h_BF] for h_BF in h_LBF] == [[True, True], [True, False]]


@runs
def test_torch_compile_knows_its_shapes_and_its_gradient():
    from lsemvae.models.parts import fused

    encoders, x_BLT = encoders_of(("I", "II"), 16, (2, 2, 2)), input_of(("I", "II"), 2, 16)
    parameters = [p for conv in (encoders.conv1, encoders.conv2, encoders.conv3) for p in (conv.weight, conv.bias)]
    given = (x_BLT, *(matrix.detach().requires_grad_() for matrix in fused._matrices(parameters)), 2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused._convolutions, given, test_utils=checks)


def test_all_of_this_in_the_interpreter():
    """In a process of its own: Triton must not have been imported before it is told to interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not interpreter", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout and "skipped" not in done.stdout


def test_the_log_says_which_form_is_used(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "lsemvae")
    encoders = LeadEncoders(LEADS, samples=16, latent=2, channels=(2, 2, 2))
    prepare(encoders, OptimConfig(1, 2, fused_encoder=True), torch.device("cpu"))
    assert not encoders.fused and "keep their plain form: the fused kernel runs on a GPU, not on cpu" in caplog.text
    assert "run as one fused kernel on cuda" in fuse(encoders, torch.device("cuda")) and encoders.fused
    x_BLT = torch.zeros(1, 12, 16, requires_grad=True)  # an attribution asks for this gradient, which the kernel lacks
    encoders.features(x_BLT).sum().backward()
    assert x_BLT.grad is not None
    assert "nothing to fuse" in fuse(torch.nn.Linear(1, 1), torch.device("cuda"))
