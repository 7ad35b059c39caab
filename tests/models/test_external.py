"""ECG-FM and TimesFM: published weights land where they should, and a file that is none of them is refused.

The contract of both is in test_contract.py. Here the published names are computed with by hand.
"""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import run_command
from safetensors.torch import save_file
from support import external_files
from torch import Tensor, nn

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.embedding import load_encoder
from lsemvae.external import EXTERNAL, read_weights
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import Embeds, build
from lsemvae.models import ecg_fm as ecg_fms
from lsemvae.models import timesfm as timesfms
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import EcgParameters, simulate_ecg

PUBLISHED = {"ecg-fm": external_files.ecg_fm, "timesfm": external_files.timesfm}


def model_of(name: str) -> tuple[dict[str, Tensor], Any]:
    """A published state dict, and the model with its weights."""
    state = PUBLISHED[name]()
    config, weights = EXTERNAL[name].from_published(state)
    model = build(config, LEADS)
    model.load_state_dict(weights)
    return state, model.eval()


def signal(model: Any, records: int = 3) -> tuple[Tensor, Tensor]:
    x_BLT = torch.randn(records, 12, model.config.samples, generator=torch.Generator().manual_seed(1))
    return x_BLT, torch.ones(records, 12, dtype=torch.bool)


# --- the networks ----------------------------------------------------------------------------------------------


def test_the_full_sizes_are_the_published_ones():
    """ECG-FM's README gives 90,883,072 parameters. 509,824 of them only its pre-training needs, by the sizes in its
    configuration; 128 are the lengths of the normalised weight, which is stored multiplied. TimesFM's package has
    231,289,280, its two blocks for forecasts 4,915,200 and 27,852,800."""
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build(config, LEADS).parameters())
                 for config in (ecg_fms.ECGFMConfig(), timesfms.TimesFMConfig())]  # fmt: skip
    codebook = 640 * 128 + (256 * 640 + 640)
    assert sizes[0] == 90_883_072 - (768 + codebook + (256 * 256 + 256) + (768 * 256 + 256)) - 128
    assert sizes[1] == 231_289_280 - 3 * 1280 * 1280 - (2 * 1280 * 10_240 + 1280 * 1280)
    assert ecg_fms.ECGFMConfig().tokens == 156  # of 5 s


def test_ecg_fm_is_wav2vec_2_with_the_published_weights():
    state, model = model_of("ecg-fm")
    assert model.config == ecg_fms.ECGFMConfig(
        convolutions=2, channels=4, width=24, depth=2, hidden=40, position_kernel=6, position_groups=4
    )
    x_BLT = signal(model)[0][:, :, :200]

    def mapped(h: Tensor, name: str) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    front = "feature_extractor.conv_layers"
    h_BCT = F.conv1d(x_BLT, state[f"{front}.0.0.weight"], stride=2)
    h_BCT = F.gelu(F.group_norm(h_BCT, 4, state[f"{front}.0.2.weight"], state[f"{front}.0.2.bias"]))
    h_BCT = F.gelu(F.conv1d(h_BCT, state[f"{front}.1.0.weight"], stride=2))
    h_BNW = mapped(norm(h_BCT.transpose(1, 2), "layer_norm"), "post_extract_proj")
    position = nn.utils.parametrizations.weight_norm(nn.Conv1d(24, 24, 6, padding=3, groups=4), dim=2)
    names = {"original0": "weight_g", "original1": "weight_v", "bias": "bias"}
    position.load_state_dict(
        {name: state[f"conv_pos.pos_conv.0.{names[name.rpartition('.')[2]]}"] for name in position.state_dict()}
    )
    h_BNW = h_BNW + F.gelu(position(h_BNW.transpose(1, 2))[:, :, :-1]).transpose(1, 2)
    torch.testing.assert_close(model.embed_tokens(x_BLT), h_BNW, rtol=1e-4, atol=1e-5)

    h_BNW = norm(h_BNW, "encoder.layer_norm")
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        q, k, v = (
            mapped(h_BNW, f"{layer}.self_attn.{name}_proj").unflatten(2, (12, 2)).transpose(1, 2) for name in "qkv"
        )
        seen_BNW = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h_BNW = norm(h_BNW + mapped(seen_BNW, f"{layer}.self_attn.out_proj"), f"{layer}.self_attn_layer_norm")
        between_BNH = F.gelu(mapped(h_BNW, f"{layer}.fc1"))
        h_BNW = norm(h_BNW + mapped(between_BNH, f"{layer}.fc2"), f"{layer}.final_layer_norm")
    found_BNW = model.encode(x_BLT, torch.ones(3, 50, dtype=torch.bool))
    torch.testing.assert_close(found_BNW, h_BNW, rtol=1e-4, atol=1e-5)


def test_ecg_fm_is_read_under_the_names_of_a_newer_torch():
    state, model = model_of("ecg-fm")
    old, new = "conv_pos.pos_conv.0", "conv_pos.pos_conv.0.parametrizations.weight"
    state[f"{new}.original0"], state[f"{new}.original1"] = state.pop(f"{old}.weight_g"), state.pop(f"{old}.weight_v")
    _, weights = ecg_fms.from_published(state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_ecg_fm_averages_the_tokens_of_both_segments_and_none_of_the_padding():
    _, model = model_of("ecg-fm")
    x_BLT, mask_BL = signal(model, 2)
    x_BLT[1, :, 2500:] = 0  # a recording of 5 s
    every_BN = torch.ones(2, 625, dtype=torch.bool)
    first_BF, second_BF = (model.encode(half, every_BN).mean(dim=1) for half in x_BLT.split(2500, dim=2))
    expected_BF = torch.stack([(first_BF[0] + second_BF[0]) / 2, first_BF[1]])
    torch.testing.assert_close(model.embed(x_BLT, mask_BL), expected_BF, rtol=1e-4, atol=1e-5)
    # A token that is left out has no effect on the others.
    kept_BN = torch.arange(625).expand(2, -1) < 400
    cut_BNW = model.encode(x_BLT[:, :, :2500], kept_BN)[:, :400]
    assert not torch.allclose(cut_BNW, model.encode(x_BLT[:, :, :2500], every_BN)[:, :400], atol=1e-3)
    alone_BNW = model.first_norm(model.embed_tokens(x_BLT[:, :, :2500])[:, :400])
    for layer in model.layers:
        alone_BNW = layer(alone_BNW)
    torch.testing.assert_close(cut_BNW, alone_BNW, rtol=1e-4, atol=1e-5)


def test_timesfm_is_a_decoder_with_the_published_weights():
    state, model = model_of("timesfm")
    assert model.config == timesfms.TimesFMConfig(width=16, depth=2, heads=2, hidden=24, hidden_embedding=20)
    x_BT = signal(model)[0][:, 0, :320].cumsum(dim=1)

    def mapped(h: Tensor, name: str) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(h: Tensor, name: str) -> Tensor:
        return h / (h.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.scale"]

    def turned(h_BHNE: Tensor) -> Tensor:
        """Pairs of numbers as complex ones, times exp(i angle)."""
        angle_NE = torch.arange(10)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
        pair = torch.complex(h_BHNE[..., :4], h_BHNE[..., 4:]) * torch.polar(torch.ones(10, 4), angle_NE)
        return torch.cat([pair.real, pair.imag], dim=-1)

    ends = [32 * (patch + 1) for patch in range(10)]
    patches = [(x_BT[:, end - 32 : end] - x_BT[:, :end].mean(1, keepdim=True))
               / x_BT[:, :end].std(1, keepdim=True, correction=0) for end in ends]  # fmt: skip
    given = F.pad(torch.stack(patches, dim=1), (0, 32))  # no sample is missing
    h_BNW = mapped(F.silu(mapped(given, "tokenizer.hidden_layer")), "tokenizer.output_layer")
    h_BNW = h_BNW + mapped(given, "tokenizer.residual_layer")
    for layer in ("stacked_xf.0", "stacked_xf.1"):
        parts = mapped(norm(h_BNW, f"{layer}.pre_attn_ln"), f"{layer}.attn.qkv_proj").split(16, dim=2)
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in parts)
        scale_E = 1.442695041 / 8**0.5 * F.softplus(state[f"{layer}.attn.per_dim_scale.per_dim_scale"])
        q, k = norm(turned(q), f"{layer}.attn.query_ln") * scale_E, norm(turned(k), f"{layer}.attn.key_ln")
        weight = (q @ k.transpose(2, 3)).masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf)
        seen_BNW = (weight.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        h_BNW = h_BNW + norm(mapped(seen_BNW, f"{layer}.attn.out"), f"{layer}.post_attn_ln")
        between_BNH = F.silu(mapped(norm(h_BNW, f"{layer}.pre_ff_ln"), f"{layer}.ff0"))
        h_BNW = h_BNW + norm(mapped(between_BNH, f"{layer}.ff1"), f"{layer}.post_ff_ln")
    torch.testing.assert_close(model.encode(x_BT), h_BNW, rtol=1e-4, atol=1e-5)


def test_timesfm_gives_each_lead_the_mean_of_its_tokens_without_padding():
    _, model = model_of("timesfm")
    x_BLT, mask_BL = signal(model, 2)
    mask_BL[:, 1] = False
    x_BLT[1, :, 2510:] = 0  # 78 whole patches and 14 samples
    h_BLF = model.embed(x_BLT, mask_BL).unflatten(1, (12, 16))
    for lead in (0, 11):
        tokens_BNW = model.encode(x_BLT[:, lead])
        expected_BF = torch.stack([tokens_BNW[0].mean(dim=0), tokens_BNW[1, :78].mean(dim=0)])
        torch.testing.assert_close(h_BLF[:, lead], expected_BF)
    assert not h_BLF[:, 1].any()
    assert model.observed(mask_BL).unflatten(1, (12, 16)).all(dim=2).equal(mask_BL)
    # Each lead is standardised by itself, so another unit changes nothing.
    torch.testing.assert_close(model.embed(1000 * x_BLT, mask_BL), h_BLF.flatten(1), rtol=1e-3, atol=1e-4)


def test_pooled_features_of_an_absent_lead_are_zeros():
    _, model = model_of("timesfm")
    x_BLT, mask_BL = signal(model, 1)
    mask_BL[:, 1] = False
    pooled = model.embedder(LEADS, "pooled")
    h_BF, observed_BF = pooled.embed(x_BLT, mask_BL), pooled.observed(mask_BL)
    assert observed_BF.sum() == 2 * 11 * 16 and not h_BF[~observed_BF].any() and h_BF[observed_BF].all()


# --- from a file to a bundle -----------------------------------------------------------------------------------


class Poison:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["adapt.py", *map(str, words)])
    run_command(adapt.main, adapt.Args)


@pytest.mark.parametrize(("name", "suffix"), [("ecg-fm", ".pt"), ("timesfm", ".safetensors")])
def test_a_file_becomes_a_bundle_that_commands_take(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    state, model = model_of(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":  # as fairseq-signals writes it
        cfg = {"model": {"_name": "wav2vec2_cmsc", "encoder_layers": 2}, "optimization": {"lr": [5e-5]}}
        torch.save({"cfg": cfg, "args": None, "model": state, "extra_state": {"epoch": 3}}, path)
    else:
        save_file(state, path)
    run(monkeypatch, name, "--weights", path, "--output", tmp_path / "bundle")
    bundle = describe(tmp_path / "bundle")
    encoder = load_encoder(str(tmp_path / "bundle"), LIMB_LEADS).model
    assert f"digest {bundle.digest}" in capsys.readouterr().out
    assert bundle.leads == LEADS and bundle.task is None and isinstance(encoder, Embeds)
    weights = bundle.provenance["weights"]
    assert weights["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and weights["uri"] == str(path)
    assert weights["licence"] in ("MIT", "Apache-2.0")
    assert bundle.preprocess.samples == model.config.samples and bundle.preprocess.rate_hz == 500
    x_BLT, mask_BL = signal(model)
    assert torch.equal(encoder.embed(x_BLT, mask_BL), model.embed(x_BLT, mask_BL))
    run(monkeypatch, name, "--weights", path, "--output", tmp_path / "bundle")  # replaced
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        run(monkeypatch, name, "--weights", path, "--output", tmp_path)
    assert "exists and is no bundle: name a new folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_bundle_becomes_a_registered_version(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(external_files.ecg_fm(), tmp_path / "weights.pt")
    words = ("--weights", tmp_path / "weights.pt", "--output", tmp_path / "bundle", "--register", "ecg-fm-test")
    run(monkeypatch, "ecg-fm", *words)
    found = load_encoder("models:/ecg-fm-test@candidate", LEADS)
    assert found.digest == describe(tmp_path / "bundle").digest and found.model.config.title == "ECG-FM"


def test_ecg_fm_gets_standardised_leads_that_are_not_filtered():
    settings = replace(EXTERNAL["ecg-fm"].preprocess, samples=2500)
    signal_mv_LT = simulate_ecg(EcgParameters(severity=0.5), np.random.default_rng(0))[0][:, :2500].astype(np.float32)
    x_LT = preprocess_signals([signal_mv_LT], [500.0], LEADS, settings).x_BLT[0]
    expected_LT = (signal_mv_LT - signal_mv_LT.mean(axis=1, keepdims=True)) / signal_mv_LT.std(axis=1, keepdims=True)
    assert np.sqrt(((x_LT - expected_LT) ** 2).mean(axis=1)).max() < 0.05
    # This project's default smooths and removes wander.
    other = preprocess_signals([signal_mv_LT], [500.0], LEADS, PreprocessConfig(samples=2500, scale="lead"))
    assert np.sqrt(((other.x_BLT[0] - expected_LT) ** 2).mean(axis=1)).min() > 0.1


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "state", "says"),
    [
        (
            "ecg-fm",
            changed(external_files.ecg_fm(), **{"encoder.layers.1.fc2.bias": None, "head.weight": torch.zeros(2)}),
            r"not fit: encoder\.layers\.1\.fc2\.bias missing; head\.weight unexpected\. ECG-FM's weights are the file",
        ),
        (
            "ecg-fm",
            changed(external_files.ecg_fm(), **{"encoder.layers.0.fc2.weight": torch.zeros(24, 41)}),
            r"encoder\.layers\.0\.fc2\.weight \[24, 41\] instead of \[24, 40\] of the wrong shape",
        ),
        ("ecg-fm", external_files.ecg_fm(leads=8), "the weights read 8 leads: they must read 12"),
        ("ecg-fm", external_files.timesfm(), "no tensor feature_extractor.conv_layers.0.0.weight: they are not of thi"),
        ("timesfm", external_files.ecg_fm(), "no tensor tokenizer.hidden_layer.weight: they are not of this architect"),
        (
            "timesfm",
            changed(external_files.timesfm(), **{"tokenizer.hidden_layer.weight": torch.zeros(20)}),
            r"tokenizer\.hidden_layer\.weight has the shape \[20\]: it must have 2 dimensions",
        ),
        (
            "timesfm",
            changed(external_files.timesfm(), **{"stacked_xf.0.attn.query_ln.scale": torch.zeros(5)}),
            "width=16, depth=2, heads=3: give positive sizes",
        ),
        (
            "timesfm",
            {f"decoder.{n}": t for n, t in external_files.timesfm().items() if "ln" in n} | external_files.timesfm(),
            r"do not fit: decoder\.stacked_xf\.0\.attn\.key_ln\.scale, \S+, \S+ and 9 more unexpected",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, state: dict[str, Tensor], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--weights", tmp_path / "weights.safetensors", "--output", tmp_path / "bundle")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    with pytest.raises(LsemvaeError, match=says):
        raise LsemvaeError(line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]


def test_a_poisoned_checkpoint_is_refused_and_does_not_run(tmp_path: Path):
    state = external_files.ecg_fm()
    torch.save({"model": state, "cfg": Poison(tmp_path / "ran")}, tmp_path / "poisoned.pt")
    torch.save(Poison(tmp_path / "ran"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("poisoned.pt", "old.pt"):
        with pytest.raises(LsemvaeError, match=r"plain values \(posix\.mkdir\)\. Nothing else .*: convert it to safe"):
            read_weights(tmp_path / file)
    assert not (tmp_path / "ran").exists()
    call, arguments = Poison(tmp_path / "ran").__reduce__()
    call(*arguments)
    assert (tmp_path / "ran").is_dir()  # it would have run


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("weights.pt", b"no checkpoint", "cannot be read as a PyTorch checkpoint"),
        ("weights.pt", b"", "cannot be read as a PyTorch checkpoint"),
        ("weights.safetensors", b"no tensors", "cannot be read as safetensors"),
        ("weights.pt", {"model": {"epoch": 3}}, "it holds no state dict"),
        ("weights.pt", {}, "it holds no state dict"),
        ("weights.pt", [torch.zeros(2)], "it holds no state dict"),
    ],
)
def test_a_file_of_something_else_is_refused(file: str, content: Any, says: str, tmp_path: Path):
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        torch.save(content, tmp_path / file)
    with pytest.raises(LsemvaeError, match=says):
        read_weights(tmp_path / file)


@pytest.mark.parametrize(("name", "licence"), [("ecg-fm", "MIT"), ("timesfm", "Apache-2.0")])
def test_absent_weights_are_reported_with_their_place(
    name: str, licence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for words in ((), ("--weights", tmp_path / "absent.pt"), ("--weights", tmp_path)):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, name, "--output", tmp_path / "bundle", *words)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert f"weights are the file {EXTERNAL[name].file} at https://huggingface.co/" in line
        assert f"(licence {licence})" in line
        assert not (tmp_path / "bundle").exists()
