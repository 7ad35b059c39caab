"""The truth of simulated hearts, and models that use a known part of it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lsemvae.explain.attribution import Settings
from lsemvae.explain.truth import (
    ATTRIBUTION_EFFECT,
    ATTRIBUTION_TRUTH,
    CELL_WAVES,
    EFFECT_TRUTH,
    Found,
    Hearts,
    draw_hearts,
    look,
    truth_check,
    truth_of,
)
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.simulate import EcgParameters, simulate_ecg, true_waves

CONFIG = PreprocessConfig(rate_hz=250, samples=2000)
FEW = Settings(steps=8, most_steps=8)
CHEST = ("II", "V1", "V2", "V6")


class TallestR(nn.Module):
    """Its logit is the largest sample of V1, the second lead, after a sign."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(sign))

    def logit(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        largest_B = torch.logsumexp(4 * x_BLT[:, 1], dim=1) / 4
        return self.weight * largest_B


@pytest.fixture(scope="module")
def hearts() -> Hearts:
    return draw_hearts(12, CHEST, CONFIG, seed=1)


def test_the_waves_are_where_the_simulator_puts_them():
    """The R peaks and the P waves of a heart without noise, found on the signal itself."""
    parameters = EcgParameters(noise_mv=(0.0,) * 5, heart_rate_bpm=80.0)
    signal_mv_LT, measured = simulate_ecg(parameters, np.random.default_rng(5))
    edges_s = true_waves(parameters, np.random.default_rng(5))
    lead_ii_T = signal_mv_LT[LEADS.index("II")]
    inside = [(on, end) for on, end in edges_s["QRS"] if on > 0.4 and end < 9.3]
    assert len(inside) > 8
    for onset_s, end_s in inside:
        around_T = lead_ii_T[int((onset_s - 0.3) * 500) : int((end_s + 0.3) * 500)]
        peak_s = onset_s - 0.3 + int(around_T.argmax()) / 500
        assert onset_s < peak_s < end_s
        assert 1000 * (end_s - onset_s) == pytest.approx(measured["qrs_end"] - measured["qrs_onset"])
    gaps_s = edges_s["QRS"][:, 0] - edges_s["P"][:, 1]
    assert 1000 * gaps_s == pytest.approx(measured["qrs_onset"] - measured["p_end"])
    assert (edges_s["T"][:, 0] > edges_s["QRS"][:, 1]).all()
    assert len(true_waves(EcgParameters(atrial_fibrillation=True), np.random.default_rng(5))["P"]) == 0


def test_a_pair_differs_in_the_overload_alone():
    same = draw_hearts(2, CHEST, CONFIG, overload=(0.0, 0.0, 0.0))
    assert np.array_equal(same.healthy_BLT, same.overloaded_BLT)
    assert truth_of(same).max() == 0
    assert set(np.unique(same.wave_BT)) == set(range(len(CELL_WAVES) + 1))


@pytest.mark.parametrize(("wave", "overload"), [("P", (1.0, 0, 0)), ("QRS", (0, 1.0, 0)), ("T", (0, 0, 1.0))])
def test_the_truth_is_in_the_wave_that_shows_the_overload(wave, overload):
    truth_LW = truth_of(draw_hearts(24, CHEST, CONFIG, overload=overload))
    assert CELL_WAVES[truth_LW.max(axis=0).argmax()] == wave
    if wave == "P":  # it is in the limb leads
        assert CHEST[truth_LW[:, 0].argmax()] == "II"
    else:
        assert CHEST[truth_LW[:, CELL_WAVES.index(wave)].argmax()] in ("V1", "V2")


def test_of_a_model_that_reads_r_in_v1_that_cell_is_found(hearts: Hearts):
    found = look(TallestR().eval(), hearts, truth_of(hearts), FEW)
    for values_LW in (found.attribution_BLW.mean(axis=0), found.effect_BLW.mean(axis=0)):
        lead, wave = np.unravel_index(values_LW.argmax(), values_LW.shape)
        assert (CHEST[lead], CELL_WAVES[wave]) == ("V1", "QRS")
        assert np.abs(values_LW[[0, 2, 3]]).max() == 0
    rows = found.rows(draws=50).set_index("what")
    assert list(rows.index) == [ATTRIBUTION_TRUTH, ATTRIBUTION_EFFECT, EFFECT_TRUTH]
    evidence = found.evidence(draws=50).set_index("wave")
    assert evidence.loc["QRS", "low"] > 1 > evidence.loc[["P", "ST", "T"], "evidence"].max()
    assert evidence.loc["all", "evidence"] == pytest.approx(evidence.evidence.iloc[:-1].sum())
    assert (rows.records == 12).all()


def test_a_score_of_the_other_sign_gives_the_opposite_correlation(hearts: Hearts):
    """So shuffled labels, which make a model and its opposite equally likely, give 0 on average."""
    truth_LW = truth_of(hearts)
    one, other = (look(TallestR(sign).eval(), hearts, truth_LW, FEW).rows(draws=50) for sign in (1.0, -1.0))
    one, other = one.set_index("what"), other.set_index("what")
    for what in (ATTRIBUTION_TRUTH, EFFECT_TRUTH):
        assert one.loc[what, "correlation"] == pytest.approx(-other.loc[what, "correlation"])
        assert one.loc[what, "low"] == pytest.approx(-other.loc[what, "high"], abs=0.1)
    assert one.loc[ATTRIBUTION_EFFECT, "correlation"] == pytest.approx(other.loc[ATTRIBUTION_EFFECT, "correlation"])


def test_attributions_that_are_the_truth_correlate_and_those_of_other_cells_do_not(hearts: Hearts):
    truth_LW, rng = truth_of(hearts), np.random.default_rng(0)
    noise_BLW = 0.05 * rng.standard_normal((12, *truth_LW.shape))
    effect_BLW, logit_B = truth_LW + noise_BLW, np.zeros(12)
    right = Found(effect_BLW, effect_BLW, truth_LW, logit_B).rows(draws=100).iloc[0]
    wrong = Found(effect_BLW[:, ::-1, ::-1], effect_BLW, truth_LW, logit_B).rows(draws=100).iloc[0]
    assert right.low > 0.9 and right.low <= right.correlation <= right.high
    assert wrong.high < 0.9


def test_a_model_that_ignores_its_input_has_no_correlation():
    steps: list[tuple[int, int]] = []
    found = truth_check(
        TallestR(0.0).eval(), CHEST[:2], CONFIG, FEW, hearts=3, draws=20, progress=lambda *done: steps.append(done)
    )
    assert found.truth[["correlation", "low", "high"]].isna().all(axis=None)
    assert found.evidence[["evidence", "low", "high"]].isna().all(axis=None)
    assert steps == [(3, 3)]
