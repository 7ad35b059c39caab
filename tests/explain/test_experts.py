"""Gate weights and precisions of the leads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.bundles import CONFIGS, SMALL, save

from lsemvae.bundle import describe
from lsemvae.errors import LsemvaeError
from lsemvae.explain.experts import encoder_for, experts
from lsemvae.leads import LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.parts.fusion import gate_weights, product_of_experts

LEADS = ("I", "II", "V1")


def made(encoder, features="fused"):
    torch.manual_seed(0)
    model = build(ClassifierConfig(encoder=encoder, features=features), LEADS).eval()
    mask_BL = torch.tensor([[True, True, True], [True, False, True]])
    x_BLT = torch.where(mask_BL.unsqueeze(2), torch.randn(2, len(LEADS), encoder.samples), torch.nan)
    return model, x_BLT, mask_BL


def test_the_gate_and_the_precisions_are_those_of_the_fusion():
    model, x_BLT, mask_BL = made(SMALL)
    found = experts(model.encoders, x_BLT, mask_BL)
    with torch.no_grad():
        mu_BLD, logvar_BLD = model.encoders(torch.nan_to_num(x_BLT))
        for b, there in enumerate(([0, 1, 2], [0, 2])):
            one = slice(b, b + 1)
            all_of = torch.ones(1, len(there), dtype=torch.bool)
            shared = product_of_experts(mu_BLD[one, there], logvar_BLD[one, there], all_of)
            logvar_BKD = torch.cat([logvar_BLD[one, there], shared.logvar.unsqueeze(1)], dim=1)
            gate_K = gate_weights(logvar_BKD, torch.ones(1, len(there) + 1, dtype=torch.bool))[0]
            np.testing.assert_allclose(found.gate_BL[b, there], gate_K[:-1], atol=1e-6)
            assert found.gate_BL[b].sum() == pytest.approx(1 - float(gate_K[-1]), abs=1e-6)
            precision_LD = (-logvar_BLD[b, there]).exp()
            expected_L = (precision_LD / precision_LD.sum(dim=0)).mean(dim=1)
            np.testing.assert_allclose(found.precision_BL[b, there], expected_L, atol=1e-6)
    assert found.gate_BL[1, 1] == found.precision_BL[1, 1] == 0


@pytest.mark.parametrize("encoder", [c for c in CONFIGS if hasattr(c, "fuse")], ids=lambda c: c.architecture)
def test_every_encoder_that_fuses_leads_weighs_them(encoder):
    model, x_BLT, mask_BL = made(encoder)
    found = experts(model.encoders, x_BLT, mask_BL)
    np.testing.assert_allclose(found.precision_BL.sum(axis=1), 1, atol=1e-6)
    assert (found.gate_BL.sum(axis=1) <= 1 + 1e-6).all()
    assert found.gate_BL[1, 1] == found.precision_BL[1, 1] == 0


@pytest.mark.parametrize(
    ("encoder", "features"),
    [(SMALL, "means"), (replace(SMALL, fusion="released"), "fused"), (CONFIGS[2], "means")],
    ids=["without log-variances", "groups of leads", "another architecture"],
)
def test_other_models_weigh_no_leads(encoder, features):
    model, x_BLT, mask_BL = made(encoder, features)
    assert experts(model.encoders, x_BLT, mask_BL) is None


def test_a_pre_trained_encoder_weighs_the_leads_of_a_classifier(tmp_path):
    classifier = save(tmp_path / "classifier")
    save(tmp_path / "encoder", SMALL)
    save(tmp_path / "other", CONFIGS[2])
    x_BLT, mask_BL = torch.randn(1, len(LIMB_LEADS), 5000), torch.ones(1, len(LIMB_LEADS), dtype=torch.bool)
    found = experts(encoder_for(tmp_path / "encoder", classifier), x_BLT, mask_BL)
    np.testing.assert_allclose(found.precision_BL.sum(axis=1), 1, atol=1e-6)
    for name, message in (("classifier", "no pre-trained encoder"), ("other", "no pre-trained encoder")):
        with pytest.raises(LsemvaeError, match=message):
            encoder_for(tmp_path / name, describe(tmp_path / "classifier"))
    elsewhere = replace(classifier, preprocess=replace(classifier.preprocess, scale="lead"))
    with pytest.raises(LsemvaeError, match="other preprocessing"):
        encoder_for(tmp_path / "encoder", elsewhere)
