"""Each method that LS-EMVAE is compared with, against its paper: sizes, reach, tokens, masking, objectives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsemvae.bundle import Bundle, load, save
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import PRESETS, build
from lsemvae.models.beta_vae import BetaVAEConfig
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.parts.head import Head
from lsemvae.models.parts.whole import POOLED_SHIFTS, PreNormLayers
from lsemvae.models.resnet1d import ResNet1dConfig
from lsemvae.models.st_mem import STMEMConfig, normalised, patches
from lsemvae.models.transformer import TransformerConfig
from lsemvae.models.xresnet1d import XResNet1dConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import PRETRAIN
from lsemvae.training.launch import make_job

SAMPLES, RECORDS = 96, 5
SMALL = {
    "resnet1d": ResNet1dConfig(samples=SAMPLES, filters=4, blocks=4, kernel=4, dropout=0.0),
    "xresnet1d": XResNet1dConfig(samples=SAMPLES, width=4, blocks=(1, 1), kernel=3),
    "transformer": TransformerConfig(samples=SAMPLES, patch=12, width=16, depth=1, heads=2, dropout=0.0),
    "beta-vae": BetaVAEConfig(samples=SAMPLES, latent=3, channels=(2, 3, 4)),
    "st-mem": STMEMConfig(
        samples=SAMPLES, patch=12, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2
    ),
}
each_method = pytest.mark.parametrize("name", SMALL)
each_resnet = pytest.mark.parametrize("name", ["resnet1d", "xresnet1d"])


def model_of(config: Any, leads: tuple[str, ...] = LIMB_LEADS) -> Any:
    torch.manual_seed(0)
    return build(config, leads)


def inputs(leads: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    x_BLT = torch.randn(RECORDS, leads, SAMPLES, generator=torch.Generator().manual_seed(seed))
    return x_BLT, torch.ones(RECORDS, leads, dtype=torch.bool)


# --- sizes -----------------------------------------------------------------------------------------------------


def transformer_layers(width: int, depth: int) -> int:
    """Four W x W maps of attention and two W x 4W maps with biases, two norms a layer; one norm at the end."""
    attention = 4 * (width * width + width)
    maps = 2 * width * 4 * width + 4 * width + width
    return depth * (attention + maps + 4 * width) + 2 * width


def resnet1d_parameters() -> int:
    """Kernels of 16 without biases: a stem of 64 filters, and 4 x 4 blocks of 64, 128, 256 and 512."""
    total = 16 * 12 * 64 + 2 * 64
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(4):
            given = inputs if block == 0 else width
            total += 16 * (given * width + width * width) + 2 * given + 2 * width
        inputs = width
    return total - 2 * 64 + 2 * 512  # the first block has one norm, and one norm follows the last


def xresnet1d50_parameters() -> int:
    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel + 2 * outputs  # and its norm

    total = conv(12, 32, 5) + conv(32, 32, 5) + conv(32, 64, 5)
    inputs = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            total += conv(inputs, inner, 1) + conv(inner, inner, 5) + conv(inner, 4 * inner, 1)
            total += conv(inputs, 4 * inner, 1) if inputs != 4 * inner else 0
            inputs = 4 * inner
    return total


BETA_VAE = (
    3 * (12 * 16 + 16 * 32 + 32 * 64) + 16 + 32 + 64  # three convolutions
    + 2 * (40_000 * 256 + 256)  # mean and log-variance
    + 256 * 40_000 + 40_000 + 4 * (64 * 32 + 32 * 16 + 16 * 12) + 32 + 16 + 12  # the decoder
)  # fmt: skip
ST_MEM = (
    transformer_layers(768, 12) + 125 * 768 + 768 + 12 * 768 + 768  # ViT-B, patches, lead embeddings, SEP
    + transformer_layers(256, 4) + 768 * 256 + 256 + 256 + 256 * 125 + 125  # in, mask token, out
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [
        ("resnet1d", resnet1d_parameters(), 512),
        ("xresnet1d", xresnet1d50_parameters(), 2 * 2048),
        ("transformer", transformer_layers(512, 6) + 12 * 50 * 512 + 512, 512),
        ("beta-vae", BETA_VAE, 256),
        ("st-mem", ST_MEM, 768),
    ],
)
def test_the_full_size_is_the_papers(name: str, parameters: int, features: int):
    with torch.device("meta"):
        model: Any = build(PRESETS[name]["full"], LEADS)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.embedding_size == features


@each_method
def test_each_size_has_its_recipes_window(name: str):
    """pre-training's recipes of these sizes prepare windows of so many samples"""
    assert {size: config.samples for size, config in PRESETS[name].items()} == {
        "full": 5000, "cpu": 2496, "smoke": 5000,
    }  # fmt: skip


@pytest.mark.parametrize(
    "config", [ResNet1dConfig(samples=20_480, filters=1), XResNet1dConfig(width=2)], ids=["resnet1d", "xresnet1d"]
)
def test_a_resnets_feature_sees_as_far_as_its_kernels_reach(config: Any):
    """With positive weights only, every input sample within reach of an output position has a gradient there."""
    model = model_of(config, ("II",)).eval()
    if isinstance(config, XResNet1dConfig):
        model.stem[6] = nn.AvgPool1d(3, stride=2, padding=1)  # a maximum has a gradient at one of its inputs only
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm1d):
            module.running_mean.zero_(), module.running_var.fill_(1.0), nn.init.constant_(module.weight, 1.0)
    x_BLT = torch.ones(1, 1, model.config.samples, requires_grad=True)
    h_BCP = model.positions(x_BLT)
    if isinstance(config, ResNet1dConfig):
        # Sixteen blocks of two kernels of 16; every second block's first convolution halves the time.
        kernels = [(16, 1)] + [(16, 2 if conv == 0 and block % 2 else 1) for block in range(16) for conv in range(2)]
    else:
        # The stem and its pool, then a kernel of 5 a block; stages two to four begin with stride 2.
        kernels = [(5, 2), (5, 1), (5, 1), (3, 2)]
        kernels += [(5, 2 if stage and not block else 1) for stage, n in enumerate((3, 4, 6, 3)) for block in range(n)]
    reach, jump = 1, 1
    for kernel, stride in kernels:
        reach += (kernel - 1) * jump
        jump *= stride
    assert jump == model.config.stride and h_BCP.shape[2] == -(-model.config.samples // jump)
    h_BCP[0, 0, h_BCP.shape[2] // 2].backward()
    seen = (x_BLT.grad[0, 0] != 0).nonzero().flatten()
    assert len(seen) == seen[-1] - seen[0] + 1
    assert len(seen) == reach == (19_141 if isinstance(config, ResNet1dConfig) else 857)


@pytest.mark.parametrize(
    ("config", "leads", "tokens"),
    [
        (TransformerConfig(width=8, depth=1, heads=1), LEADS, 100),
        (PRESETS["transformer"]["cpu"], LEADS, 64),
        # 40 patches and two SEP tokens a lead
        (STMEMConfig(width=8, depth=1, heads=1), LEADS, 12 * 42),
        (STMEMConfig(width=8, depth=1, heads=1), LIMB_LEADS, 6 * 42),
        (PRESETS["st-mem"]["cpu"], ("II",), 26),
    ],
)
def test_a_transformer_reads_so_many_tokens(config: Any, leads: tuple[str, ...], tokens: int):
    model: Any = config.embedder(leads)
    lengths = []
    model.layers.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    with torch.inference_mode():
        model.embed(torch.zeros(1, len(leads), config.samples), torch.ones(1, len(leads), dtype=torch.bool))
    assert lengths == [tokens]


def test_wrong_sizes_are_refused():
    for make, says in (
        (lambda: ResNet1dConfig(blocks=2), "blocks=2"),
        (lambda: ResNet1dConfig(samples=256), "samples is 256: 16 blocks need more than 256"),
        (lambda: XResNet1dConfig(kernel=4), "kernel=4"),
        (lambda: XResNet1dConfig(samples=32), "samples is 32: 4 stages need more than 32"),
        (lambda: TransformerConfig(patch=33), "patch is 33 and samples 5000: give a patch length that divides"),
        (lambda: TransformerConfig(heads=7), "width=512, depth=6, heads=7"),
        (lambda: BetaVAEConfig(samples=100), "samples is 100"),
        (lambda: BetaVAEConfig(objective="gamma"), "objective is 'gamma': choose from beta, capacity"),  # type: ignore
        (lambda: BetaVAEConfig(capacity=-1.0), "capacity is -1.0"),
        (lambda: STMEMConfig(patch=75), "patch is 75 and samples 5000"),
        (lambda: STMEMConfig(masked_share=1.0), "masked_share is 1.0: of 40 patches some must be masked, and some not"),
    ):
        with pytest.raises(LsemvaeError, match=says.replace("(", r"\(")):
            make()


# --- what all of them share ------------------------------------------------------------------------------------


@each_method
def test_pooled_features_are_moments_over_shifts(name: str):
    encoder: Any = SMALL[name].embedder(LIMB_LEADS).eval()
    pooled: Any = SMALL[name].embedder(LIMB_LEADS, "pooled").eval()
    pooled.inner.load_state_dict(encoder.state_dict())
    x_BLT, mask_BL = inputs()
    with torch.inference_mode():
        each = [
            encoder.embed(torch.roll(x_BLT, -SAMPLES * shift // POOLED_SHIFTS, dims=2), mask_BL)
            for shift in range(POOLED_SHIFTS)
        ]
        h_SBF = torch.stack(each).double()
        mean_BF = h_SBF.mean(dim=0)
        expected = torch.cat([mean_BF, ((h_SBF - mean_BF).square().mean(dim=0) + 1e-6).sqrt()], dim=1)
        found = pooled.embed(x_BLT, mask_BL)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(pooled.embed_shifted(x_BLT, mask_BL, [0.0, 0.3])[1], found)
        assert pooled.observed(mask_BL).shape == found.shape
        nothing = pooled.embed(x_BLT, torch.zeros_like(mask_BL))
    assert (nothing == 0).all() and not pooled.observed(torch.zeros_like(mask_BL)).any()


@pytest.mark.parametrize("name", ["beta-vae", "st-mem"])
def test_a_pooled_classifier_keeps_the_trained_weights_in_its_bundle(name: str, tmp_path: Path):
    model = model_of(SMALL[name]).eval()
    head = Head(2 * model.embedding_size, hidden=0).eval()
    classifier = Classifier.from_encoder(model, LIMB_LEADS, head, "pooled")
    save(Bundle.of(classifier, PreprocessConfig()), classifier, tmp_path / "bundle")
    loaded: Any = load(tmp_path / "bundle")[1]
    x_BLT, mask_BL = inputs()
    assert torch.equal(loaded.predict(x_BLT, mask_BL), classifier.predict(x_BLT, mask_BL))
    shifted = torch.roll(x_BLT, -SAMPLES // POOLED_SHIFTS, dims=2)
    torch.testing.assert_close(loaded.predict(shifted, mask_BL), loaded.predict(x_BLT, mask_BL))


@pytest.mark.parametrize("name", ["beta-vae", "st-mem"])
@pytest.mark.parametrize("leads", [LIMB_LEADS, ("II", "V1", "V5")], ids=len)
def test_the_encoder_of_some_leads_is_the_model_without_the_others(name: str, leads: tuple[str, ...]):
    model = model_of(SMALL[name], LEADS).eval()
    x_BLT, mask_BL = inputs(12)
    rows = [LEADS.index(lead) for lead in leads]
    only_BL = torch.zeros_like(mask_BL)
    only_BL[:, rows] = True
    encoder = model.embedder(leads)
    assert encoder.leads == leads and not encoder.training
    torch.testing.assert_close(
        encoder.embed(x_BLT[:, rows], mask_BL[:, rows]), model.embed(x_BLT, only_BL), rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(model.embed(x_BLT, only_BL), model.embed(x_BLT, mask_BL))


@each_method
def test_an_absent_leads_parameters_get_no_gradient(name: str):
    config = SMALL[name]
    pretrains = name in ("beta-vae", "st-mem")
    model = model_of(config if pretrains else ClassifierConfig(encoder=config, dropout=0.0))
    x_BLT, mask_BL = inputs()
    mask_BL[:, 2] = False
    x_BLT[:, 2] = torch.nan
    model({"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "y_B": torch.arange(RECORDS) % 2})["loss"].backward()
    rows = {
        "resnet1d": lambda e: e.stem.weight.grad[:, 2],
        "xresnet1d": lambda e: e.stem[0][0].weight.grad[:, 2],
        "transformer": lambda e: e.patch.weight.grad.unflatten(1, (6, -1))[:, 2],
        "beta-vae": lambda e: e.convs[0].weight.grad[:, 2],
        "st-mem": lambda e: e.lead_LW.grad[2],
    }
    assert (rows[name](model.encoder if pretrains else model.encoders) == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each_method
def test_half_the_amplitude_is_another_recording(name: str):
    """Voltages are evidence: no method may divide them away."""
    encoder: Any = SMALL[name].embedder(LIMB_LEADS).eval()
    x_BLT, mask_BL = inputs()
    with torch.inference_mode():
        whole, half = encoder.embed(x_BLT, mask_BL), encoder.embed(x_BLT / 2, mask_BL)
    assert (whole - half).norm() > 0.02 * whole.norm()


@each_resnet
def test_an_untrained_resnet_has_one_scale_in_training_and_in_evaluation(name: str):
    """Otherwise a head that is standardised before training would see features of another scale in training."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    encoder: Any = PRESETS[name]["cpu"].embedder(LIMB_LEADS)
    x_BLT = torch.randn(8, 6, 2496, generator=torch.Generator().manual_seed(7))
    mask_BL = torch.ones(8, 6, dtype=torch.bool)
    with torch.no_grad():
        evaluated = encoder.eval().embed(x_BLT, mask_BL)
        in_training = encoder.train().embed(x_BLT, mask_BL)
    assert 0.6 < in_training.square().mean() / evaluated.square().mean() < 1.6
    # the reference noise is not drawn from the caller's generator: dropping it changes no weight
    torch.set_rng_state(state)
    again: Any = PRESETS[name]["cpu"].embedder(LIMB_LEADS)
    ours, theirs = (dict(module.named_parameters()) for module in (encoder, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@each_resnet
def test_a_resnet_trains_on_a_batch_of_one(name: str):
    model = model_of(ClassifierConfig(encoder=SMALL[name]))
    x_BLT, mask_BL = inputs()
    loss = model({"x_BLT": x_BLT[:1], "lead_mask_BL": mask_BL[:1], "y_B": torch.ones(1)})["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@each_resnet
def test_a_batch_that_is_not_finite_leaves_no_trace_in_a_resnet(name: str):
    model = model_of(ClassifierConfig(encoder=SMALL[name]))
    before = {key: values.clone() for key, values in model.state_dict().items() if "running" in key}
    x_BLT, mask_BL = inputs()
    x_BLT[0, 0, 0] = torch.nan
    batch = {"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "y_B": torch.arange(RECORDS) % 2}
    assert not model(batch, check=False)["good_B"].all()
    assert all(torch.equal(model.state_dict()[key], values) for key, values in before.items())
    model(batch | {"x_BLT": inputs()[0]})
    assert not any(torch.equal(model.state_dict()[key], values) for key, values in before.items())


@pytest.mark.parametrize("name", ["resnet1d", "xresnet1d", "transformer"])
def test_a_method_that_learns_from_labels_alone_cannot_be_pretrained(name: str, tmp_path: Path):
    from finetune import load_encoder

    config = SMALL[name]
    model = model_of(config)
    save(Bundle.of(model, PreprocessConfig()), model, tmp_path / "bundle")
    with pytest.raises(LsemvaeError, match=f"bundle is a {name}: this command takes a pre-trained encoder"):
        load_encoder(str(tmp_path / "bundle"), LIMB_LEADS)
    nothing: Any = None
    with pytest.raises(LsemvaeError, match=f"{name} learns from labels alone: it cannot be pre-trained"):
        make_job([], replace(PRETRAIN["smoke"], model=config), nothing, None)
    assert f"{name}-smoke" not in PRETRAIN


def test_hidden_tokens_are_attended_to_by_none():
    torch.manual_seed(0)
    layers = PreNormLayers(8, 2, 2).eval()
    h_BNW, hidden_BN = torch.randn(2, 5, 8), torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    with torch.inference_mode():
        found, alone = layers(h_BNW, hidden_BN), layers(h_BNW[:1, [0, 1, 3]])
    torch.testing.assert_close(found[:1, [0, 1, 3]], alone)
    assert found.isfinite().all()


# --- beta-VAE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective", ["beta", "capacity"])
def test_the_objectives_of_beta_vae(objective: Any, kl_scale: float):
    """Against the integral of the definitions by torch.distributions, record by record."""
    config = replace(SMALL["beta-vae"], objective=objective, beta=3.0, gamma=7.0, capacity=0.5)
    model = model_of(config).double()
    x_BLT, mask_BL = inputs()
    x_BLT = x_BLT.double()
    mask_BL[0, 1:3] = False
    noise_BD = torch.randn(RECORDS, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = {"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "noise_BD": noise_BD, "kl_scale": torch.tensor(kl_scale)}
    losses, reached = [], []
    for b in range(RECORDS):
        seen_BLT = (x_BLT[b] * mask_BL[b, :, None])[None]
        mu_BD, logvar_BD = model.encoder(seen_BLT)
        posterior = torch.distributions.Normal(mu_BD, (0.5 * logvar_BD).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mu_BD), torch.ones_like(mu_BD))
        kl = torch.distributions.kl_divergence(posterior, prior).sum()
        decoded_LT = model.decoder(mu_BD + posterior.stddev * noise_BD[b])[0]
        error = sum(((decoded_LT[row] - x_BLT[b, row]) ** 2).mean() for row in range(6) if mask_BL[b, row])
        penalty = 3.0 * kl_scale * kl if objective == "beta" else 7.0 * abs(kl - 0.5 * kl_scale)
        losses.append(1000.0 * error + penalty)
        reached.append(float(kl.detach()))
    terms = model(given)
    torch.testing.assert_close(terms["loss"], torch.stack(losses).mean())
    torch.testing.assert_close(terms["weighted_reconstruction"] + terms["weighted_kl"], terms["loss"].detach())
    assert terms["kl"].item() == pytest.approx(sum(reached) / RECORDS)


def test_a_capacity_pulls_the_kl_to_it():
    config = replace(SMALL["beta-vae"], objective="capacity", reconstruction_weight=0.0, gamma=1.0, capacity=4.0)
    model = model_of(config)
    x_BLT, mask_BL = inputs()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        terms = model({"x_BLT": x_BLT, "lead_mask_BL": mask_BL})
        terms["loss"].backward()
        optimizer.step()
    assert terms["kl"].item() == pytest.approx(4.0, abs=0.5)


# --- ST-MEM ----------------------------------------------------------------------------------------------------


def st_mem() -> Any:
    return model_of(SMALL["st-mem"]).eval()


def batch_of(model: Any) -> dict[str, Tensor]:
    x_BLT, mask_BL = inputs()
    noise_BD = torch.randn(RECORDS, model.noise_size, generator=torch.Generator().manual_seed(3))
    return {"x_BLT": x_BLT, "lead_mask_BL": mask_BL, "noise_BD": noise_BD}


def hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Which patches are masked, [B, L, N]: all but the two with the smallest numbers of each lead's eight."""
    score_BLN = batch["noise_BD"].view(RECORDS, 6, 8)
    return score_BLN > score_BLN.sort(dim=2).values[:, :, 1:2]


@pytest.mark.parametrize(("config", "share"), [(STMEMConfig(), 0.75), (PRESETS["st-mem"]["cpu"], 0.75)])
def test_three_quarters_of_the_patches_are_masked(config: STMEMConfig, share: float):
    assert 1 - config.visible / config.patches == share
    assert config.patches * config.patch == config.samples


def test_masking_follows_the_noise_of_each_record_and_is_random_without():
    model = st_mem()
    batch = batch_of(model)
    now = model.fill(batch, batch["noise_BD"].view(RECORDS, 6, 8))
    assert torch.equal(now.masked_BLN, hidden(model, batch))
    assert now.masked_BLN.float().mean() == 0.75
    # a record's masking does not depend on the other records of its batch
    alone = {name: values[3:4] for name, values in batch.items()}
    parts = [model({name: values[b : b + 1] for name, values in batch.items()})["loss"] for b in range(RECORDS)]
    torch.testing.assert_close(model(batch)["loss"], torch.stack(parts).mean())
    del alone["noise_BD"]
    seen = []
    fill, model.fill = model.fill, lambda given, score: seen.append(fill(given, score)) or seen[-1]
    for _ in range(100):
        model(alone)
    share_LN = torch.stack([found.masked_BLN[0] for found in seen]).float().mean(dim=0)
    assert (share_LN - 0.75).abs().max() < 0.2  # more than four standard errors


def test_the_encoder_sees_visible_patches_only():
    """Another signal in the masked patches changes no output of the encoder, and so no prediction; but the target."""
    model = st_mem()
    batch = batch_of(model)
    hidden_BLN = hidden(model, batch)
    other_BLT = torch.randn(batch["x_BLT"].shape, generator=torch.Generator().manual_seed(9))
    mixed = torch.where(hidden_BLN.repeat_interleave(12, dim=2), other_BLT, batch["x_BLT"])
    score_BLN = batch["noise_BD"].view(RECORDS, 6, 8)
    lengths = []
    model.encoder.layers.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    one, two = (model.fill(batch | {"x_BLT": x_BLT}, score_BLN) for x_BLT in (batch["x_BLT"], mixed))
    assert lengths == [6 * (2 + 2)] * 2
    assert torch.equal(one.h_BF, two.h_BF) and torch.equal(one.prediction_BLNP, two.prediction_BLNP)
    assert not torch.equal(one.error_B, two.error_B)
    # and another signal in the visible ones changes the encoder's output
    mixed = torch.where(hidden_BLN.repeat_interleave(12, dim=2), batch["x_BLT"], other_BLT)
    assert not torch.allclose(model.fill(batch | {"x_BLT": mixed}, score_BLN).h_BF, one.h_BF)


def test_the_loss_is_on_normalised_masked_patches_of_observed_leads():
    model = st_mem()
    batch = batch_of(model)
    batch["lead_mask_BL"][0, 3:] = False
    now = model.fill(batch, batch["noise_BD"].view(RECORDS, 6, 8))
    hidden_BLN = hidden(model, batch)
    expected = []
    for b in range(RECORDS):
        errors = []
        for row in range(3 if b == 0 else 6):
            for n in range(8):
                if hidden_BLN[b, row, n]:
                    patch = batch["x_BLT"][b, row, 12 * n : 12 * n + 12].double()
                    target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                    errors.append((now.prediction_BLNP[b, row, n].double() - target).square().mean())
        assert len(errors) == 6 * (3 if b == 0 else 6)
        expected.append(torch.stack(errors).mean())
    torch.testing.assert_close(model(batch)["loss"].double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    flat = normalised(patches(torch.zeros(1, 1, 24), 12))
    assert (flat == 0).all()


def test_lead_and_separator_embeddings_tell_leads_apart():
    model = st_mem()
    x_BLT, mask_BL = inputs()
    h_BF = model.embed(x_BLT, mask_BL)
    assert not torch.allclose(model.embed(x_BLT[:, [1, 0, 2, 3, 4, 5]], mask_BL), h_BF, atol=1e-4)  # I and II exchanged
    with torch.no_grad():
        kept = model.encoder.lead_LW.clone()
        model.encoder.lead_LW.copy_(kept[:1].expand(6, -1))
        alike = model.embed(x_BLT, mask_BL)
        torch.testing.assert_close(model.embed(x_BLT[:, [1, 0, 2, 3, 4, 5]], mask_BL), alike)  # nothing else does
        model.encoder.lead_LW.copy_(kept)
        model.encoder.sep_W.copy_(model.encoder.sep_W.flip(0))
        assert not torch.allclose(model.embed(x_BLT, mask_BL), h_BF, atol=1e-4)
    # The features are the mean over patch tokens alone.
    h_BLNW = model.encoder.encode(patches(x_BLT, 12), mask_BL)
    assert h_BLNW.shape == (RECORDS, 6, 8 + 2, 16)
    torch.testing.assert_close(model.embed(x_BLT, mask_BL), h_BLNW[:, :, 1:-1].mean(dim=(1, 2)))


def test_the_decoder_fills_in_each_lead_by_itself():
    model = st_mem()
    visible_BLV = torch.tensor([0, 5]).expand(1, 6, 2)
    h_BLVW = torch.randn(1, 6, 4, 16, generator=torch.Generator().manual_seed(4))
    other = h_BLVW.clone()
    other[:, 1:] += 1.0
    one, two = (model.decoder(h, visible_BLV) for h in (h_BLVW, other))
    assert one.shape == (1, 6, 8, 12)
    torch.testing.assert_close(one[:, 0], two[:, 0])
    assert not torch.allclose(one[:, 1], two[:, 1])
    other = h_BLVW.clone()
    other[:, 0, 0] += torch.randn(16, generator=torch.Generator().manual_seed(5))  # the first SEP token
    assert not torch.allclose(model.decoder(other, visible_BLV)[:, 0], one[:, 0], atol=1e-4)


def test_validation_masks_the_same_patches_in_every_epoch_and_for_any_leads():
    model = st_mem()
    batch = batch_of(model)
    batch["lead_mask_BL"][0, 2] = False
    first, again = model.validation(), model.validation()
    first.update(batch)
    for b in range(RECORDS):  # in other batches
        again.update({name: values[b : b + 1] for name, values in batch.items()})
    metrics = first.metrics()
    assert again.metrics() == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert metrics["collapsed"] == 0.0 and len([name for name in metrics if name.startswith("r/")]) == 6
    now = model.fill(batch, batch["noise_BD"].view(RECORDS, 6, 8))
    assert metrics["loss"] == pytest.approx(now.error_B.mean().item(), rel=1e-5)
    r = []
    for b in range(1, RECORDS):
        taken = now.masked_BLN[b, 2]
        pair = torch.stack([now.prediction_BLNP[b, 2, taken].flatten(), now.target_BLNP[b, 2, taken].flatten()])
        r.append(torch.corrcoef(pair)[0, 1].item())
    assert metrics["r/III"] == pytest.approx(sum(r) / len(r), abs=1e-5)
    # without noise, one masking for all records, by lead and place in time
    del batch["noise_BD"]
    table, more = model.validation(), model.validation()
    table.update(batch)
    for b in range(RECORDS):
        more.update({name: values[b : b + 1] for name, values in batch.items()})
    assert more.metrics() == pytest.approx(table.metrics(), rel=1e-4, abs=1e-6)
    some: Any = model_of(SMALL["st-mem"], ("II", "V1")).validation()
    assert torch.equal(some._score_LN[0], first._score_LN[1])


def test_an_encoder_that_gives_everyone_the_same_has_collapsed():
    model = st_mem()
    with torch.no_grad():
        model.encoder.layers.norm.weight.zero_()
    found = model.validation()
    found.update(batch_of(model))
    assert found.metrics()["collapsed"] == 1.0
