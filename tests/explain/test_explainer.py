"""Explanations of recordings with a bundle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.bundles import SMALL, records, save

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Settings
from lsemvae.explain.explainer import Explainer
from lsemvae.explain.reference import Reference
from lsemvae.explain.waves import WAVES
from lsemvae.leads import LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record

CONFIG = ClassifierConfig(encoder=SMALL, hidden=8, shifts=2)
REST = WAVES.index("rest")
QUICK = Settings(steps=4, bound=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explainer") / "bundle"
    save(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def given():
    """A complete recording, a short one, one without lead II, one that is too short, and one of noise."""
    first, second, third = records(3)
    leads = dict(zip(first.leads, first.signal_mv_LT, strict=True))
    noise = {lead: np.random.default_rng(n).normal(0, 0.1, 5000) for n, lead in enumerate(leads)}
    cut = {lead: signal_mv[:3000] for lead, signal_mv in zip(second.leads, second.signal_mv_LT, strict=True)}
    few = {lead: signal_mv for lead, signal_mv in zip(third.leads, third.signal_mv_LT, strict=True) if lead != "II"}
    tiny = {lead: signal_mv[:300] for lead, signal_mv in leads.items()}
    return [first, *(Record.from_leads(one, 500) for one in (cut, few, tiny, noise))]


def with_window(folder, which):
    torch.manual_seed(1)
    model = build(replace(CONFIG, encoder=replace(SMALL, samples=2000)), LIMB_LEADS)
    preprocess = PreprocessConfig(window=which, samples=2000)
    bundles.save(Bundle.of(model, preprocess, task="ph", threshold=0.5), model, folder)
    return folder


def test_the_score_that_is_explained_is_the_score_that_is_served(folder, given):
    scores = Scorer(folder).score(given)
    for score, one in zip(scores, Explainer(folder, QUICK).explain(given), strict=True):
        assert (one.score.score, str(one.score.refused)) == (score.score, str(score.refused))
        for window in one.windows:
            assert 1 / (1 + np.exp(-window.logit)) == pytest.approx(score.score, abs=1e-6)
            missing = window.values_LT.sum() - (window.logit - window.baseline_logit)
            assert window.delta == pytest.approx(missing, abs=1e-5)
            assert abs(window.delta) <= QUICK.limit(
                window.logit - window.baseline_logit, np.abs(window.values_LT).sum()
            )


def test_absent_leads_padding_and_refused_recordings(folder, given):
    _, cut, few, tiny, _ = Explainer(folder, QUICK).explain(given)
    assert not cut.windows[0].values_LT[:, 3000:].any()
    row = LIMB_LEADS.index("II")
    (window,) = few.windows
    assert not window.lead_mask_L[row]
    assert not window.values_LT[row].any()
    assert np.isnan(window.lead_drop_L[row])
    assert np.isnan(window.wave_drop_LW[row]).all()
    assert np.isfinite(np.delete(window.lead_drop_L, row)).all()
    assert few.shares.absolute_LW[row].sum() == 0
    assert tiny.score.refused.code == "too_short"
    assert (tiny.windows, tiny.shares, tiny.notes) == ((), None, ())


@pytest.mark.parametrize("baseline", ["zero", "mean-beat", "expected"])
def test_a_recording_alone_is_explained_as_among_others(folder, given, baseline):
    settings = replace(QUICK, baseline=baseline, references=2)
    reference = Reference.of(records(3, seed=5), LIMB_LEADS, PreprocessConfig())
    explainer = Explainer(folder, settings, reference=reference)
    together = explainer.explain(given)
    for record, expected in zip(given, together, strict=True):
        (alone,) = explainer.explain([record])
        assert alone.notes == expected.notes
        for one, other in zip(alone.windows, expected.windows, strict=True):
            for name in ("values_LT", "lead_drop_L", "wave_drop_LW"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-6)
            assert (one.logit, one.baseline_logit) == pytest.approx((other.logit, other.baseline_logit), abs=1e-6)


def test_a_recording_without_beats_is_explained_by_lead_only(folder, given):
    (found,) = Explainer(folder, QUICK).explain(given[-1:])
    assert found.notes == ("Explained by lead only: no beat was found.",)
    for cells_LW in found.shares:
        assert np.isnan(np.delete(cells_LW, REST, axis=1)).all()
    by_lead_L = np.abs(found.windows[0].values_LT).sum(axis=1)
    np.testing.assert_allclose(found.shares.absolute_LW[:, REST], by_lead_L / by_lead_L.sum(), rtol=1e-5)
    assert np.isnan(found.windows[0].wave_drop_LW).all()
    assert np.isfinite(found.windows[0].lead_drop_L).all()

    reference = Reference.of(records(1), LIMB_LEADS, PreprocessConfig())
    (compared,) = Explainer(folder, replace(QUICK, baseline="mean-beat"), reference=reference).explain(given[-1:])
    assert any("Compared with no signal" in note for note in compared.notes)
    np.testing.assert_array_equal(compared.windows[0].values_LT, found.windows[0].values_LT)


def test_all_windows_of_a_long_recording_are_explained(tmp_path, given):
    every = Explainer(with_window(tmp_path / "all", "all"), QUICK)
    long, short = every.explain([given[0], given[1]])
    assert [len(one.windows) for one in (long, short)] == [2, 1]
    scores = [1 / (1 + np.exp(-window.logit)) for window in long.windows]
    assert np.mean(scores) == pytest.approx(long.score.score, abs=1e-6)
    total = sum(np.abs(window.values_LT).sum(axis=1) for window in long.windows)
    np.testing.assert_allclose(np.nansum(long.shares.absolute_LW, axis=1), total / total.sum(), rtol=1e-4)
    (first,) = Explainer(with_window(tmp_path / "first", "first"), QUICK).explain(given[:1])
    assert len(first.windows) == 1


def test_what_misses_the_bound_says_so(folder, given):
    (found,) = Explainer(folder, Settings(steps=1, bound=1e-5, most_steps=1)).explain(given[:1])
    assert any("do not add up" in note and "after 1 steps" in note for note in found.notes)


def test_an_encoder_beside_the_classifier_gives_the_weights_of_the_leads(folder, given, tmp_path):
    save(tmp_path / "encoder", SMALL)
    (without,) = Explainer(folder, QUICK).explain(given[:1])
    (found,) = Explainer(folder, QUICK, encoder=tmp_path / "encoder").explain(given[:1])
    assert without.windows[0].gate_L is without.windows[0].precision_L is None
    assert found.windows[0].precision_L.sum() == pytest.approx(1, abs=1e-5)
    assert 0 < found.windows[0].gate_L.sum() < 1


@pytest.mark.parametrize("baseline", ["mean-beat", "expected"])
def test_a_baseline_needs_a_reference_of_the_models_input(folder, baseline):
    with pytest.raises(LsemvaeError, match="needs reference recordings"):
        Explainer(folder, Settings(baseline))
    other = Reference.of(records(1), ("I", "II"), PreprocessConfig())
    with pytest.raises(LsemvaeError, match="prepare it with the model's leads"):
        Explainer(folder, Settings(baseline), reference=other)
