"""A model that takes any leads, with every one of their 4,095 subsets."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from support.serving import ask, npy

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Scorer
from lsemvae.leads import LEADS, LIMB_FROM_I_II
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg
from serve.api import make_api
from serve.observed import Metrics
from serve.registry import Registry
from serve.service import Service

SUBSETS = [leads for count in range(1, 13) for leads in combinations(LEADS, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused features: their number does not depend on the leads. 3 s at 100 Hz, so that all subsets take seconds."""
    torch.manual_seed(7)
    preprocess = PreprocessConfig(rate_hz=100, samples=304, min_lead_share=0.0)
    config = ClassifierConfig(
        encoder=LSEMVAEConfig(samples=304, latent=4, channels=(2, 3, 4)), hidden=8, features="fused"
    )
    model = build(config, LEADS)
    folder = tmp_path_factory.mktemp("any") / "any"
    bundles.save(Bundle.of(model, preprocess, task="ph", threshold=0.5), model, folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder)


@pytest.fixture(scope="module")
def lead_mv() -> dict[str, np.ndarray]:
    """A recording by lead whose limb leads agree exactly, as derived ones do."""
    signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=0.7), np.random.default_rng(7))
    rows = dict(zip(LEADS, signal_mv_LT[:, :1520:5].astype(np.float32), strict=True))
    for lead, (of_i, of_ii) in LIMB_FROM_I_II.items():
        rows[lead] = np.float32(of_i) * rows["I"] + np.float32(of_ii) * rows["II"]
    return rows


def scores(scorer: Scorer, records: Iterator[Record]) -> np.ndarray:
    answers = scorer.score(list(records))
    assert not [answer.refused for answer in answers if answer.refused]
    return np.array([answer.score for answer in answers])


def closure(leads: tuple[str, ...]) -> set[str]:
    """With the leads that are computed from I and II."""
    return {*leads, *(LIMB_FROM_I_II if {"I", "II"} <= set(leads) else ())}


def test_every_subset_has_a_finite_score_in_any_order_and_masked_is_omitted(scorer: Scorer, lead_mv):
    assert len(SUBSETS) == 4095
    rng = np.random.default_rng(0)
    omitted_S = scores(scorer, (Record.from_leads({k: lead_mv[k] for k in leads}, 100) for leads in SUBSETS))
    shuffled_S = scores(
        scorer, (Record.from_leads({str(k): lead_mv[k] for k in rng.permutation(leads)}, 100) for leads in SUBSETS)
    )
    missing = np.full_like(lead_mv["I"], np.nan)
    whole = Record.from_leads(lead_mv, 100)
    masked_S = scores(
        scorer,
        (replace(whole, signal_mv_LT=np.stack([lead_mv[k] if k in closure(leads) else missing for k in LEADS]))
         for leads in SUBSETS),
    )  # fmt: skip
    assert np.isfinite(omitted_S).all() and ((omitted_S > 0) & (omitted_S < 1)).all()
    np.testing.assert_array_equal(shuffled_S, omitted_S)
    np.testing.assert_allclose(masked_S, omitted_S, atol=1e-6)
    # Each lead counts: hardly any two sets share a score, except sets that I and II complete to the same one.
    distinct = len({frozenset(closure(leads)) for leads in SUBSETS})
    assert len(np.unique(omitted_S.round(7))) > 0.9 * distinct


def test_each_lead_alone_is_answered_by_the_endpoint_and_none_is_refused(folder: Path, scorer: Scorer, lead_mv):
    registry = Registry([str(folder)], folder.parent / "kept", 0)
    api = make_api(Service(registry, Metrics()))
    kind = {"Content-Type": "application/x-npy"}
    for lead, row_mv in lead_mv.items():
        query, body = {"leads": lead, "rate_hz": 100}, npy(row_mv[None])
        answer = ask(api, "POST", "/v1/score/npy", params=query, content=body, headers=kind)
        (result,) = answer.json()["results"]
        (expected,) = scorer.score([Record.from_leads({lead: row_mv}, 100)])
        assert answer.status_code == 200 and result["leads_used"] == [lead]
        assert result["score"] == pytest.approx(expected.score, abs=1e-6)
        assert result["reliability"]["level"] == "limited"
    for nothing in (np.full((1, 304), np.nan, dtype=np.float32), np.full((12, 304), 0.25, dtype=np.float32)):
        query = {"leads": ",".join(LEADS[: len(nothing)]), "rate_hz": 100}
        answer = ask(api, "POST", "/v1/score/npy", params=query, content=npy(nothing), headers=kind)
        (result,) = answer.json()["results"]
        assert (answer.status_code, result["refused"]["code"], result["score"]) == (422, "leads", None)
