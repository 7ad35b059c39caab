"""A bundle holds everything that decides a score, and is refused if it is not what was saved."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.bundles import CONFIGS, SMALL, records, save

from lsemvae import bundle as bundles
from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, Calibration, Doubt, Ready, Scorer, example_record, ready
from lsemvae.errors import BundleError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import ARCHITECTURES, build
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.parts.head import Head
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record


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
        (edit("calibration", {"slope": -1.0, "intercept": 0.0}), "slope -1.0"),
        (edit("calibration", {"slope": 1.0, "intercept": float("nan")}), "intercept nan"),
        (edit("calibration", {"slope": 1.0}), "intercept"),
        (edit("calibration", {"slope": "steep", "intercept": 0.0}), "real number"),
        (edit("calibration", [1.0, 0.0]), "must be a mapping"),
        (edit("doubt", {"kind": "depth", "limit": 1.0}), "knows distance, disagreement"),
        (edit("doubt", {"kind": "distance", "limit": float("inf")}), "limit of the doubt is inf"),
        (edit("doubt", {"kind": "distance"}), "limit"),
        (edit("example", 1.5), "example is 1.5"),
        (edit("example", float("nan")), "example is nan"),
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


def test_a_bundle_that_goes_while_it_is_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process deletes it between two looks: safetensors opens the file, then torch opens it again."""
    save(tmp_path / "b")
    from_file = torch.UntypedStorage.from_file

    def deleted_before(*args: object, **rest: object) -> torch.UntypedStorage:
        shutil.rmtree(tmp_path / "b")
        return from_file(*args, **rest)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", deleted_before)
    with pytest.raises(BundleError, match="cannot be read"):
        bundles.load(tmp_path / "b")


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
    bundles.save(replace(described, doubt=Doubt("distance", 1.0)), model, tmp_path / "doubting")
    doubting = Scorer(tmp_path / "doubting")
    of_parts = [answer.doubt for answer in doubting.score_signals(parts, [500] * 3)]
    (of_whole,) = doubting.score_signals([np.concatenate(parts, axis=1)], [500])
    assert len(set(of_parts)) == 3 and of_whole.doubt == pytest.approx(np.mean(of_parts), rel=1e-5)
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


def test_a_bundle_knows_the_score_of_its_example(tmp_path: Path):
    saved = save(tmp_path / "b")
    scorer = Scorer(tmp_path / "b")
    assert saved.example == scorer.bundle.example == pytest.approx(scorer.score([example_record()])[0].score, abs=1e-6)
    scorer.check_example()
    edit("example", saved.example + 2e-4)(tmp_path / "b")
    with pytest.raises(BundleError, match="scores its example"):
        Scorer(tmp_path / "b").check_example()


@pytest.mark.parametrize("changed", [{"highpass_hz": 1.0}, {"scale": "lead"}, {"min_std_mv": 5.0}])
def test_the_example_finds_other_preprocessing(changed: dict, tmp_path: Path):
    """As if the code had changed and not the version: the same weights on an otherwise prepared signal."""
    save(tmp_path / "b")
    content = json.loads((tmp_path / "b" / CONFIG).read_text())
    edit("preprocess", content["preprocess"] | changed)(tmp_path / "b")
    with pytest.raises(BundleError, match="scores its example"):
        Scorer(tmp_path / "b").check_example()


def test_a_bundle_carries_a_measure_of_doubt_or_has_the_digest_of_before_it(tmp_path: Path):
    plain = save(tmp_path / "b")
    bundle, model = bundles.load(tmp_path / "b")
    assert "doubt" not in json.loads((tmp_path / "b" / CONFIG).read_text())
    assert Scorer(tmp_path / "b").score(records(1))[0].doubt is None
    doubt = Doubt("distance", 1.25, {"gain": 0.02, "recordings": 99})
    saved = bundles.save(replace(bundle, doubt=doubt), model, tmp_path / "doubting")
    assert saved.doubt == doubt and bundles.load(tmp_path / "doubting")[0] == saved and saved.digest != plain.digest
    one, other = (Scorer(tmp_path / name).score(records(2)) for name in ("b", "doubting"))
    assert [a.score for a in one] == [a.score for a in other] and all(a.doubt > 0 for a in other)


def test_bundles_of_before_calibration_and_example_still_score(tmp_path: Path):
    save(tmp_path / "b")
    with_both = Scorer(tmp_path / "b").score(records(1))[0]
    edit("calibration", None)(tmp_path / "b")
    edit("example", None)(tmp_path / "b")
    old = Scorer(tmp_path / "b")
    old.check_example()
    assert (old.bundle.calibration, old.bundle.example) == (None, None)
    (answer,) = old.score(records(1))
    assert (answer.score, answer.probability) == (with_both.score, None)
    assert save(tmp_path / "encoder", SMALL).example is None


EXAMPLE_MEAN_MV = [
    0.042057,
    0.071695,
    0.040376,
    0.05581,
    0.026735,
    0.053237,
    0.044373,
    0.025317,
    0.081726,
    0.10646,
    0.099181,
    0.073417,
]
EXAMPLE_PEAK_MV = [
    0.463002,
    1.130505,
    0.678425,
    0.298687,
    0.065058,
    0.902637,
    0.276744,
    0.330101,
    0.890841,
    1.307541,
    1.262864,
    0.946927,
]


def test_the_example_is_for_ever():
    """Every bundle holds the score of this recording. If this fails, a change has made all of them invalid."""
    record = example_record()
    assert record.leads == LEADS and record.rate_hz == 500 and record.signal_mv_LT.shape == (12, 5000)
    np.testing.assert_allclose(np.abs(record.signal_mv_LT).mean(axis=1), EXAMPLE_MEAN_MV, atol=2e-6)
    np.testing.assert_allclose(record.signal_mv_LT.max(axis=1), EXAMPLE_PEAK_MV, atol=2e-6)
    assert int(record.signal_mv_LT[1].argmax()) == 3297


def test_a_probability_is_the_calibrated_score_and_moves_no_decision(tmp_path: Path):
    save(tmp_path / "b")
    answers = Scorer(tmp_path / "b").score(records(6))
    for answer in answers:
        odds = (answer.score / (1 - answer.score)) ** 2.5 * np.exp(-0.75)
        assert answer.probability == pytest.approx(odds / (1 + odds), rel=1e-6)
        assert answer.decision is (answer.score >= 0.5)
    assert np.argsort([a.score for a in answers]).tolist() == np.argsort([a.probability for a in answers]).tolist()
    (refused,) = Scorer(tmp_path / "b").score([Record.from_leads({"V1": np.zeros(5000)}, 500)])
    assert refused.probability is None


@settings(max_examples=50)
@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20),
    slope=st.floats(0.01, 20),
    intercept=st.floats(-20, 20),
)
def test_calibration_keeps_the_order_of_any_scores(scores: list[float], slope: float, intercept: float):
    probability = Calibration(slope, intercept).probability(np.array(sorted(scores)))
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (np.diff(probability) >= 0).all()


def test_a_record_with_its_model_input_has_the_same_score(tmp_path: Path):
    """One that is refused, too; made ready for another bundle, or beside records that are not, it is prepared anew."""
    save(tmp_path / "b")
    torch.manual_seed(5)
    bundle, model = bundles.load(tmp_path / "b")
    bundles.save(replace(bundle, preprocess=replace(bundle.preprocess, highpass_hz=1.0)), model, tmp_path / "other")
    scorer, other = Scorer(tmp_path / "b"), Scorer(tmp_path / "other")
    quiet = Record(("I",), np.zeros((1, 5000), dtype=np.float32), 500.0)
    given = [*records(5), quiet]
    made = ready(given, scorer.bundle)
    assert all(isinstance(record, Ready) for record in made)
    for answers, expected in (
        (scorer.score(made), scorer.score(given)),
        (scorer.score([*made[:2], *given[2:]]), scorer.score(given)),
        (other.score(made), other.score(given)),
    ):
        assert [answer.score for answer in answers[:5]] == [answer.score for answer in expected[:5]]
        assert [answer.leads_used for answer in answers] == [answer.leads_used for answer in expected]
        assert (answers[5].refused.code, str(answers[5].refused)) == ("leads", str(expected[5].refused))
    assert scorer.score(made)[0].score != other.score(made)[0].score


def test_records_whose_every_window_is_scored_keep_no_model_input(tmp_path: Path):
    save(tmp_path / "b")
    bundle = bundles.describe(tmp_path / "b")
    given = records(2)
    assert ready(given, replace(bundle, preprocess=replace(bundle.preprocess, window="all"))) == given
