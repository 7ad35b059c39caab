"""Occlusion of leads and waves, against the same change made by hand."""

import numpy as np
import torch
from torch import nn

from lsemvae.explain.occlusion import without_leads, without_waves
from lsemvae.explain.waves import WAVES

P, QRS, T, REST = (WAVES.index(wave) for wave in ("P", "QRS", "T", "rest"))


class Weighted(nn.Module):
    """A linear logit; an absent lead counts nothing."""

    def __init__(self, leads, samples):
        super().__init__()
        self.weight_LT = torch.randn(leads, samples, generator=torch.Generator().manual_seed(0))

    def logit(self, x_BLT, lead_mask_BL):
        assert lead_mask_BL.any(dim=1).all(), "no model scores a recording without any lead"
        return (torch.where(lead_mask_BL.unsqueeze(2), x_BLT, 0.0) * self.weight_LT).sum(dim=(1, 2))


def test_a_lead_counts_what_the_score_loses_without_it():
    model = Weighted(3, 20)
    x_BLT = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    mask_BL = torch.tensor([[True, True, True], [True, False, True]])
    x_BLT[1, 1] = torch.nan
    drop_BL = without_leads(model, x_BLT, mask_BL)
    np.testing.assert_allclose(drop_BL, (x_BLT * model.weight_LT).sum(2), atol=1e-5)
    assert np.isnan(drop_BL).tolist() == (~mask_BL).tolist()


def test_the_only_lead_counts_against_almost_no_signal():
    model = Weighted(2, 20)
    x_BLT = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(1))
    kept_BLT, mask_BL = x_BLT.clone(), torch.tensor([[False, True], [True, True]])
    drop_BL = without_leads(model, x_BLT, mask_BL)
    np.testing.assert_allclose(drop_BL[0, 1], (x_BLT[0, 1] * model.weight_LT[1]).sum(), rtol=1e-3)
    assert np.isnan(drop_BL[0, 0])
    assert torch.equal(x_BLT, kept_BLT)


def test_a_wave_becomes_a_straight_line_at_all_its_places():
    model = Weighted(2, 20)
    x_BLT = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(1))
    wave_BT = np.full((2, 20), REST)
    wave_BT[0, [0, 1]], wave_BT[0, 4:7], wave_BT[0, 12:14], wave_BT[0, 7:9] = QRS, QRS, QRS, T
    mask_BL = torch.tensor([[True, True], [True, False]])
    drop_BLW = without_waves(model, x_BLT, mask_BL, wave_BT)

    line_T = x_BLT[0, 1].clone()
    line_T[:2] = line_T[2]  # before the first sample there is nothing: the nearest one
    for n in range(3):
        line_T[4 + n] = line_T[3] + (n + 1) / 4 * (line_T[7] - line_T[3])
    for n in range(2):
        line_T[12 + n] = line_T[11] + (n + 1) / 3 * (line_T[14] - line_T[11])
    expected = ((x_BLT[0, 1] - line_T) * model.weight_LT[1]).sum()
    np.testing.assert_allclose(drop_BLW[0, 1, QRS], expected, atol=1e-5)
    assert np.isfinite(drop_BLW[0]).tolist() == [[wave in (QRS, T) for wave in range(len(WAVES))]] * 2
    assert np.isnan(drop_BLW[1]).all()  # this record has no wave


def test_a_record_that_is_nothing_but_one_wave_becomes_flat():
    model = Weighted(1, 20)
    x_BLT, mask_BL = torch.ones(1, 1, 20), torch.ones(1, 1, dtype=torch.bool)
    drop_BLW = without_waves(model, x_BLT, mask_BL, np.full((1, 20), P))
    np.testing.assert_allclose(drop_BLW[0, 0, P], model.weight_LT.sum(), atol=1e-5)
