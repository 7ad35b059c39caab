"""A bundle says everything that decides a score, and refuses to be anything but what was saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lsemvae import bundle as bundles
from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, Scorer
from lsemvae.errors import BundleError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import ARCHITECTURES, build
from lsemvae.models.classifier import Classifier, ClassifierConfig, Head
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg

SMALL = LSEMVAEConfig(latent=4, channels=(2, 3, 4))
CONFIGS = [SMALL, ClassifierConfig(encoder=SMALL, hidden=8)]


def records(count: int, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    signals = [simulate_ecg(EcgParameters(severity=b / 2), rng)[0] for b in range(count)]
    return [Record.from_leads(dict(zip(LEADS, s, strict=True)), 500, record_id=f"r{b}") for b, s in enumerate(signals)]


def save(folder: Path, config: object = CONFIGS[1], leads: tuple[str, ...] = LIMB_LEADS) -> Bundle:
    torch.manual_seed(1)
    model = build(config, leads)
    described = Bundle.of(model, PreprocessConfig(), task="ph", threshold=0.5, provenance={"data": "made up"})
    return bundles.save(described, model, folder)


def test_every_architecture_is_tested_here():
    assert {type(config) for config in CONFIGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_what_is_saved_is_loaded(config, tmp_path: Path):
    saved = save(tmp_path / "b", config)
    loaded, model = bundles.load(tmp_path / "b")
    assert loaded == saved
    assert loaded.leads == LIMB_LEADS
    assert not model.training
    torch.manual_seed(1)
    for name, tensor in build(config, LIMB_LEADS).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [CONFIG, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]  # no partial folder is left


def test_the_digest_changes_with_weights_and_with_config(tmp_path: Path):
    first = save(tmp_path / "a").digest
    assert save(tmp_path / "again").digest == first
    model = build(CONFIGS[1], LIMB_LEADS)  # other random weights
    other = Bundle.of(model, PreprocessConfig(), task="ph", threshold=0.5, provenance={"data": "made up"})
    assert bundles.save(other, model, tmp_path / "c").digest != first
    torch.manual_seed(1)
    model = build(CONFIGS[1], LIMB_LEADS)
    moved = Bundle.of(model, PreprocessConfig(), task="ph", threshold=0.51, provenance={"data": "made up"})
    assert bundles.save(moved, model, tmp_path / "d").digest != first


def edit(key: str, value: object):
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        if value is None:
            del content[key]
        else:
            content[key] = value
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def tensors(change):
    """Rewrites the weights, and their digest with them, so that only the tensors are off."""

    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
        edit("weights_sha256", bundles._sha256(folder / WEIGHTS))(folder)

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / CONFIG).unlink(), "has no config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
        (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1] + b"\x01"), "SHA-256 differs"),
        (edit("format", 2), "format 2"),
        (edit("leads", None), "lacks leads"),
        (edit("leads", ["I", "II"]), "must be"),
        (edit("leads", ["I", "V7"]), "unknown lead 'V7'"),
        (edit("architecture", "resnet"), "resnet"),
        (edit("preprocess_version", 99), "preprocessing version 99"),
        (edit("preprocess", {"rate_hz": 500, "blur": 3}), "blur"),
        (edit("config", {"hidden": 8}), "lacks"),
        (tensors(lambda state: state.pop("head.fc2.bias")), "lacks 'head.fc2.bias'"),
        (tensors(lambda state: state.update(extra=torch.zeros(1))), "has 'extra'"),
        (tensors(lambda state: state.update({"head.fc2.bias": torch.zeros(2)})), r"is \[2\], must be \[1\]"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(damage, says: str, tmp_path: Path):
    save(tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(BundleError, match=says) as caught:
        bundles.load(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "b")
    before = bundles.describe(tmp_path / "b")
    monkeypatch.setattr(bundles, "save_file", lambda tensors, path: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert bundles.describe(tmp_path / "b") == before


def test_the_scorer_equals_the_model_by_hand_and_says_which_leads_it_used(tmp_path: Path):
    save(tmp_path / "b")
    scorer = Scorer(tmp_path / "b")
    given = records(3)
    given[1].signal_mv_LT[given[1].leads.index("aVL")] = 0.2  # flat
    quiet = Record.from_leads({"V1": np.zeros(5000)}, 500)
    answers = scorer.score([*given, quiet])
    prepared = preprocess(given, LIMB_LEADS, PreprocessConfig())
    torch.manual_seed(1)
    model: Classifier = build(CONFIGS[1], LIMB_LEADS).eval()
    with torch.no_grad():
        expected_B = model.predict(torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL))
    for answer, expected in zip(answers[:3], expected_B.tolist(), strict=True):
        assert answer.score == pytest.approx(expected, abs=1e-6)
        assert answer.decision is (answer.score >= 0.5)
    assert answers[1].leads_used == ("I", "II", "III", "aVR", "aVF")
    assert answers[3].score is None
    assert answers[3].refused.code == "leads"


def test_a_long_list_is_scored_in_pieces_with_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "b")
    given = records(5)
    whole = Scorer(tmp_path / "b").score(given)
    monkeypatch.setattr(bundles, "CHUNK", 2)
    for one, other in zip(Scorer(tmp_path / "b").score(given), whole, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert one.leads_used == other.leads_used


def test_all_windows_of_a_longer_recording_are_averaged(tmp_path: Path):
    torch.manual_seed(1)
    described = Bundle.of(
        model := build(CONFIGS[1], LIMB_LEADS), PreprocessConfig(window="all"), task="ph", threshold=0.5
    )
    bundles.save(described, model, tmp_path / "b")
    scorer = Scorer(tmp_path / "b")
    parts = [record.signal_for(LIMB_LEADS) for record in records(3)]
    alone = [answer.score for answer in scorer.score_signals(parts, [500] * 3)]
    assert len(set(alone)) == 3
    (whole, short) = scorer.score_signals([np.concatenate(parts, axis=1), parts[2]], [500, 500])
    np.testing.assert_allclose(whole.score, np.mean(alone), rtol=1e-6)
    assert whole.decision == (np.mean(alone) >= 0.5)
    assert short.score == pytest.approx(alone[2], rel=1e-6)
    parts[1] = np.full_like(parts[1], np.nan)  # one window is refused, the others still count
    (some,) = scorer.score_signals([np.concatenate(parts, axis=1)], [500])
    np.testing.assert_allclose(some.score, np.mean([alone[0], alone[2]]), rtol=1e-6)
    (none,) = scorer.score_signals([np.full((6, 15000), np.nan, dtype=np.float32)], [500])
    assert none.score is None
    assert none.refused.code == "leads"


def test_six_leads_at_full_size_need_at_most_250_mb():
    with torch.device("meta"):
        model = build(ClassifierConfig(), LIMB_LEADS)
    assert sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) <= 250e6


def test_an_encoder_has_no_score(tmp_path: Path):
    model = build(SMALL, LEADS)
    bundles.save(Bundle.of(model, PreprocessConfig()), model, tmp_path / "b")
    with pytest.raises(BundleError, match="fine-tune it first"):
        Scorer(tmp_path / "b")


def test_a_classifier_made_from_an_encoder_keeps_its_embeddings(tmp_path: Path):
    encoder = build(SMALL, LEADS).eval()
    head = Head(6 * SMALL.latent)
    classifier = Classifier.from_encoder(encoder, LIMB_LEADS, head)
    bundles.save(Bundle.of(classifier, PreprocessConfig(), task="ph", threshold=0.5), classifier, tmp_path / "b")
    prepared = preprocess(records(2), LEADS, PreprocessConfig())
    x_BLT, mask_BL = torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)
    _, loaded = bundles.load(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.embed(x_BLT[:, :6], mask_BL[:, :6]), encoder.embed(x_BLT, mask_BL)[:, : 6 * SMALL.latent]
        )
