"""The contract, for every architecture and for one that only tests define (tests/support/tiny.py)."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.losses import Losses
from support.tiny import Tiny, TinyConfig
from torch import Tensor

from lsemvae import fields
from lsemvae.bundle import Bundle, load, save
from lsemvae.config import OptimConfig, PretrainRecipe, recipe_from
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import ARCHITECTURES, Embeds, EncoderConfig, Predicts, Pretrains, Reconstructs, Trains, build
from lsemvae.models.beta_vae import BetaVAEConfig
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.ecg_fm import ECGFMConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.models.mmvae_plus import MMVAEPlusConfig
from lsemvae.models.mopoe import MoPoEConfig
from lsemvae.models.mvae import MVAEConfig
from lsemvae.models.parts.head import Head
from lsemvae.models.resnet1d import ResNet1dConfig
from lsemvae.models.st_mem import STMEMConfig
from lsemvae.models.timesfm import TimesFMConfig
from lsemvae.models.transformer import TransformerConfig
from lsemvae.models.xresnet1d import XResNet1dConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import PRETRAIN, recipe_json
from lsemvae.training.fit import fit, make_optimizer
from lsemvae.training.validation import validate

SAMPLES = 80
ENCODERS = [
    LSEMVAEConfig(samples=SAMPLES, latent=3, channels=(2, 2, 2)),
    TinyConfig(samples=SAMPLES),
    BetaVAEConfig(samples=SAMPLES, latent=3, channels=(2, 2, 2)),
    STMEMConfig(
        samples=SAMPLES, patch=8, width=8, depth=1, heads=2, decoder_width=4, decoder_depth=1, decoder_heads=1
    ),
    MVAEConfig(samples=SAMPLES, latent=3, channels=(2, 2, 2)),
    MoPoEConfig(samples=SAMPLES, latent=3, channels=(2, 2, 2), sampled_subsets=4),
    MMVAEPlusConfig(samples=SAMPLES, latent=3, channels=(2, 2, 2), private=2),
]  # fmt: skip
SUPERVISED = [
    ResNet1dConfig(samples=SAMPLES, filters=2, blocks=4, kernel=4, dropout=0.0),
    XResNet1dConfig(samples=SAMPLES, width=4, blocks=(1, 1), kernel=3),
    TransformerConfig(samples=SAMPLES, patch=8, width=8, depth=1, heads=2, dropout=0.0),
]
"""Encoders that learn from labels alone: they stand under a head, and have no loss of their own."""
EXTERNAL = [
    ECGFMConfig(
        samples=SAMPLES, segment=40, convolutions=2, channels=4, width=8, depth=1, heads=2, hidden=8,
        position_kernel=4, position_groups=2,
    ),
    TimesFMConfig(samples=SAMPLES, patch=8, width=4, depth=1, heads=2, hidden=8, hidden_embedding=8),
]  # fmt: skip
"""Encoders that have learned elsewhere: they have no loss either, and `embedder` gives what is under a head."""
CONFIGS = [
    *ENCODERS,
    *(ClassifierConfig(encoder=config, hidden=4, dropout=0.0) for config in (*ENCODERS, *SUPERVISED, *EXTERNAL)),
    ClassifierConfig(encoder=ENCODERS[0], hidden=0, features="pooled"),
    ClassifierConfig(encoder=ENCODERS[0], hidden=4, dropout=0.0, features="fused", shifts=3),
    ClassifierConfig(encoder=ENCODERS[2], hidden=4, dropout=0.0, shifts=3),
    ClassifierConfig(encoder=ENCODERS[3], hidden=0, dropout=0.0, features="pooled"),
    ClassifierConfig(encoder=SUPERVISED[0], hidden=0, dropout=0.0, features="pooled"),
    ClassifierConfig(encoder=EXTERNAL[0], hidden=0, dropout=0.0, features="pooled"),
    ClassifierConfig(encoder=EXTERNAL[1], hidden=0, dropout=0.0, features="pooled"),
]
OPTIM = OptimConfig(epochs=1, batch_size=6, learning_rate=1e-2)

every_architecture = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
every_encoder = pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config.architecture)
any_leads = pytest.mark.parametrize("leads", [LEADS, LIMB_LEADS, ("II", "V1", "V5")], ids=len)


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, TinyConfig, Tiny)


def model_of(config: Any, leads: tuple[str, ...] = LIMB_LEADS) -> Any:
    torch.manual_seed(0)
    return build(config, leads)


def batch_of(model: Any, records: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {
        "x_BLT": torch.randn(records, len(model.leads), SAMPLES, generator=generator),
        "lead_mask_BL": torch.ones(records, len(model.leads), dtype=torch.bool),
        "y_B": torch.arange(records) % 2,
    }
    if size := getattr(model, "noise_size", 0):
        found["noise_BD"] = torch.randn(records, size, generator=generator)
    return found


def test_every_architecture_is_among_the_cases():
    assert {type(config) for config in (*CONFIGS, *SUPERVISED, *EXTERNAL)} == set(ARCHITECTURES)


@pytest.mark.parametrize("config", [*SUPERVISED, *EXTERNAL], ids=lambda config: config.architecture)
def test_an_encoder_without_a_loss_says_so(config: EncoderConfig):
    """The commands ask `Pretrains` and `Embeds`. The module embeds as the classifier's encoder does."""
    model = model_of(config).eval()
    assert not isinstance(model, Pretrains)
    assert isinstance(model, Embeds) == (config in EXTERNAL)
    batch = batch_of(model)
    h_BF = model.embed(batch["x_BLT"], batch["lead_mask_BL"])
    encoder: Any = config.embedder(LIMB_LEADS)
    encoder.load_state_dict(model.state_dict())
    assert torch.equal(encoder.eval().embed(batch["x_BLT"], batch["lead_mask_BL"]), h_BF)
    with pytest.raises(LsemvaeError, match=f"{config.title} gives no fused features: choose means or pooled"):
        config.embedder(LIMB_LEADS, "fused")


@every_architecture
@any_leads
def test_shapes_for_any_leads(config: Any, leads: tuple[str, ...]):
    model = model_of(config, leads).eval()
    batch = batch_of(model)
    batch["lead_mask_BL"][0, 0] = False
    h_BF = model.embed(batch["x_BLT"], batch["lead_mask_BL"])
    assert h_BF.shape == (6, model.embedding_size) and h_BF.dtype == torch.float32
    observed_BF = model.observed(batch["lead_mask_BL"])
    assert observed_BF.shape == h_BF.shape and observed_BF.dtype == torch.bool
    assert (h_BF[~observed_BF] == 0).all()
    terms = model(batch)
    assert all(term.shape == () for term in terms.values())
    assert model(batch, check=False)["good_B"].tolist() == [True] * 6
    if isinstance(model, Predicts):
        score_B = model.predict(batch["x_BLT"], batch["lead_mask_BL"])
        assert score_B.shape == (6,) and ((score_B > 0) & (score_B < 1)).all()
    if isinstance(model, Reconstructs):
        assert model.reconstruct(batch["x_BLT"], batch["lead_mask_BL"]).shape == batch["x_BLT"].shape
    with pytest.raises(LsemvaeError, match=r"the input is \[6, "):
        model.embed(batch["x_BLT"][:, 1:], batch["lead_mask_BL"][:, 1:])


@every_architecture
def test_each_parameter_gets_a_gradient(config: Any):
    model = model_of(config)
    model(batch_of(model))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@every_architecture
def test_what_is_saved_is_loaded_bit_for_bit(config: Any, tmp_path: Path):
    model = model_of(config).eval()
    saved = save(Bundle.of(model, PreprocessConfig()), model, tmp_path / "bundle")
    bundle, loaded = load(tmp_path / "bundle")
    assert bundle == saved and loaded.config == config and loaded.leads == model.leads
    batch = batch_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    one, other = (m.embed(batch["x_BLT"], batch["lead_mask_BL"]) for m in (model, loaded))
    assert torch.equal(one, other)


@every_architecture
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_trains_it_for_three_steps(config: Any, accumulate: int):
    model, losses = model_of(config), Losses()
    assert isinstance(model, Trains)
    batch = batch_of(model) | {"kl_scale": torch.tensor(0.5)}
    optim = replace(OPTIM, accumulate=accumulate)
    fit(model, make_optimizer(model, optim), optim, lambda epoch: [batch] * 3, losses)
    assert len(losses.found) == 3 and losses.found[2] < losses.found[0]


@every_architecture
def test_a_record_of_share_zero_takes_no_part(config: Any):
    model = model_of(config).eval()
    batch = batch_of(model)
    share_B = torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 0])
    four = {name: values[:4] for name, values in batch.items()}
    assert model(batch | {"share_B": share_B})["loss"].item() == pytest.approx(model(four)["loss"].item(), rel=1e-5)


@every_architecture
def test_an_absent_lead_changes_nothing(config: Any):
    """The absent lead holds NaN, which would spread to every result and gradient that it reaches."""
    model = model_of(config).eval()
    batch = batch_of(model)
    batch["lead_mask_BL"][:, 2] = False
    other = batch | {"x_BLT": batch["x_BLT"].clone()}
    other["x_BLT"][:, 2] = float("nan")
    for name in ("embed", "predict"):
        if hasattr(model, name):
            one, two = (getattr(model, name)(given["x_BLT"], given["lead_mask_BL"]) for given in (batch, other))
            assert torch.equal(one, two)
    terms, terms_too = model(batch), model(other)
    assert terms["loss"].item() == terms_too["loss"].item()
    terms_too["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_architecture
def test_a_record_is_embedded_alike_in_any_batch(config: Any):
    model = model_of(config).eval()
    batch = batch_of(model)
    whole = model.embed(batch["x_BLT"], batch["lead_mask_BL"])
    alone = torch.cat([model.embed(batch["x_BLT"][b : b + 1], batch["lead_mask_BL"][b : b + 1]) for b in range(6)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", EXTERNAL, ids=lambda config: config.architecture)
def test_what_has_learned_elsewhere_hands_on_fewer_leads(config: EncoderConfig):
    """The encoder of six leads gives what that of twelve gives for these leads."""
    model = model_of(config, LEADS).eval()
    batch = batch_of(model)
    batch["lead_mask_BL"][:, 6:] = False
    h_BF = model.embed(batch["x_BLT"], batch["lead_mask_BL"])
    encoder: Any = model.embedder(LIMB_LEADS)
    given = encoder.embed(batch["x_BLT"][:, :6], batch["lead_mask_BL"][:, :6])
    torch.testing.assert_close(given, h_BF[:, : encoder.embedding_size])
    assert not h_BF[:, encoder.embedding_size :].any()
    pooled: Any = model.embedder(LIMB_LEADS, "pooled")
    assert pooled.embed(batch["x_BLT"][:, :6], batch["lead_mask_BL"][:, :6]).shape == (6, 2 * encoder.embedding_size)
    with pytest.raises(LsemvaeError, match="no encoder for lead V1: this model reads I, II"):
        encoder.select(("I", "V1"))


@every_encoder
def test_it_validates_and_hands_on_what_embeds(config: EncoderConfig):
    model = model_of(config)
    assert isinstance(model, Pretrains)
    batch = batch_of(model)
    del batch["y_B"]
    metrics, example = validate(model, [batch | {"weight_B": torch.tensor([1.0, 1, 1, 1, 0, 1])}])
    assert metrics["records"] == 5 and {"loss", "collapsed"} <= metrics.keys()
    assert (example is not None) == isinstance(model, Reconstructs)
    encoder = model.embedder(LIMB_LEADS)
    x_BLT, mask_BL = batch["x_BLT"], batch["lead_mask_BL"]
    assert torch.equal(encoder.embed(x_BLT, mask_BL), model.embed(x_BLT, mask_BL))
    head = Head(encoder.embedding_size).eval()
    classifier = Classifier.from_encoder(model, LIMB_LEADS, head)
    h_BF = encoder.embed(x_BLT, mask_BL)
    assert torch.equal(classifier.predict(x_BLT, mask_BL), head.predict(h_BF, encoder.observed(mask_BL)))
    with pytest.raises(LsemvaeError):
        model.embedder(("V1",))


class Sized:
    """A validation pass that notes how many records it is given at a time."""

    def __init__(self, inner: Any, sizes: list[int]) -> None:
        self.inner, self.sizes = inner, sizes
        self.tensors, self.metrics = inner.tensors, inner.metrics

    def update(self, batch: dict[str, Tensor]) -> None:
        self.sizes.append(len(batch["x_BLT"]))
        self.inner.update(batch)


@every_encoder
@pytest.mark.parametrize("parts", [2, 4, 9])
def test_validation_in_parts_gives_the_metrics_of_the_whole_batch(
    config: EncoderConfig, parts: int, monkeypatch: pytest.MonkeyPatch
):
    """One of the records counts nothing, so the parts are of different sizes; nine parts are more than there are."""
    model = model_of(config)
    batch = batch_of(model) | {"weight_B": torch.tensor([1.0, 1, 1, 1, 0, 1])}
    del batch["y_B"]
    whole, example = validate(model, [batch])
    sizes: list[int] = []
    monkeypatch.setattr(model, "validation", lambda empty=model.validation: Sized(empty(), sizes))
    metrics, of_parts = validate(model, [batch], accumulate=parts)
    assert sum(sizes) == 5 and max(sizes) == -(-5 // parts)
    assert metrics == pytest.approx(whole, rel=1e-5, abs=1e-6)
    if example is not None:
        assert torch.equal(of_parts["x_BLT"], example["x_BLT"])


CLASSIFIERS = [config for config in CONFIGS if isinstance(config, ClassifierConfig)]


@pytest.mark.parametrize("config", CLASSIFIERS, ids=lambda c: f"{c.encoder.architecture}-{c.features}-{c.shifts}")
def test_a_doubt_comes_with_the_score_and_depends_on_the_recording_alone(config: ClassifierConfig):
    """Not on the batch, and not on what an absent lead holds."""
    model = model_of(config).eval()
    batch = batch_of(model)
    x_BLT, mask_BL = batch["x_BLT"], batch["lead_mask_BL"]
    model.head.standardise_from(model.embed(x_BLT, mask_BL))
    mask_BL[:3, 2] = False
    nan_BLT = torch.where(mask_BL.unsqueeze(-1), x_BLT, torch.nan)
    assert ("disagreement" in model.doubts) == (config.shifts > 1 and config.features != "pooled")
    for kind in model.doubts:
        score_B, doubt_B = model.predict_with_doubt(x_BLT, mask_BL, kind)
        assert torch.equal(score_B, model.predict(x_BLT, mask_BL))
        assert doubt_B.shape == (6,) and doubt_B.isfinite().all() and (doubt_B > 0).all()
        assert torch.equal(doubt_B, model.predict_with_doubt(nan_BLT, mask_BL, kind)[1])
        alone = [model.predict_with_doubt(x_BLT[b : b + 1], mask_BL[b : b + 1], kind)[1] for b in range(6)]
        torch.testing.assert_close(torch.cat(alone), doubt_B, rtol=1e-4, atol=1e-5)


# --- configurations as JSON ------------------------------------------------------------------------------------


@every_encoder
def test_a_recipe_in_json_names_its_architecture(config: EncoderConfig):
    recipe = replace(PRETRAIN["smoke"], model=config)
    values = json.loads(recipe_json(recipe))
    assert values["model"]["architecture"] == config.architecture
    assert recipe_from(PretrainRecipe, values) == recipe


def test_a_recipe_of_before_is_of_the_only_architecture_of_then():
    recipe = PRETRAIN["smoke"]
    values = json.loads(recipe_json(recipe))
    del values["model"]["architecture"]
    assert recipe_from(PretrainRecipe, values) == recipe
    assert "architecture" not in fields.as_json(recipe)["model"]  # names and digests of runs stay as they were


def test_an_unknown_architecture_is_refused_by_name():
    values = json.loads(recipe_json(PRETRAIN["smoke"])) | {"model": {"architecture": "resnet"}}
    with pytest.raises(LsemvaeError, match=r"recipe\.model has the unknown architecture 'resnet': .* lsemvae, "):
        recipe_from(PretrainRecipe, values)


@dataclass(frozen=True)
class Circle:
    architecture: ClassVar[str] = "circle"
    radius: float


@dataclass(frozen=True)
class Square:
    architecture: ClassVar[str] = "square"
    side: float


@dataclass(frozen=True)
class Drawing:
    shape: Circle | Square
    other: Circle | Square | None = None


@pytest.mark.parametrize("drawing", [Drawing(Circle(1.0)), Drawing(Square(2.0), Circle(3.0))])
def test_a_union_of_two_configurations_is_read_by_its_tag(drawing: Drawing):
    assert fields.read(Drawing, json.loads(json.dumps(fields.as_json(drawing))), "drawing") == drawing


def test_a_union_says_what_is_wrong_with_a_value():
    assert fields.read(Drawing, {"shape": {"radius": 1}, "other": None}, "drawing") == Drawing(Circle(1.0))
    for value, says in (
        ({"architecture": "star"}, "drawing.shape has the unknown architecture 'star': this version knows circle, sq"),
        ({"architecture": "square", "radius": 1}, "drawing.shape lacks side"),
        (3, "drawing.shape is 3: it must hold the fields of a configuration"),
    ):
        with pytest.raises(BundleError, match=says):
            fields.read(Drawing, {"shape": value, "other": None}, "drawing")
