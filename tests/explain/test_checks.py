"""The checks say of models whose truth is known by construction what must be said of them."""

import copy

import numpy as np
import pytest
import torch
from support.bundles import CONFIGS
from torch import Tensor, nn

from lsemvae.explain import intervals
from lsemvae.explain.attribution import Settings
from lsemvae.explain.checks import Checks, Effort, run_checks
from lsemvae.explain.randomised import cascade, layers_of, rank_correlation
from lsemvae.explain.removal import Cells, Removal
from lsemvae.leads import LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig

LEADS_READ, SAMPLES, RATE_HZ = 3, 600, 100
FEW = Settings(steps=8, most_steps=8)
SMALL = Effort(cell_s=0.5, layers=2, randomisations=2, random_orders=2, draws=200)


class OneWave(nn.Module):
    """Its logit is the area of one lead between two samples, through two layers."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(LEADS_READ * SAMPLES, 2, bias=False)
        self.head = nn.Linear(2, 1)
        with torch.no_grad():
            self.encoder.weight.zero_()
            self.encoder.weight.view(2, LEADS_READ, SAMPLES)[0, 1, 200:260] = weight
            self.head.weight.copy_(torch.tensor([[1.0, 0.0]]))
            self.head.bias.fill_(0.25)

    def logit(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        return self.head(self.encoder((x_BLT * lead_mask_BL[..., None]).flatten(1))).squeeze(-1)


def recordings(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise_BLT = torch.randn(count, LEADS_READ, SAMPLES, generator=generator)
    return noise_BLT + 0.5, torch.ones(count, LEADS_READ, dtype=torch.bool)


def area(checks: Checks, kind: str, order: str):
    of = checks.areas
    return of[(of.kind == kind) & (of.order == order)].iloc[0]


def test_true_attributions_beat_a_random_order_and_equal_occlusion():
    """The model is linear, so a cell's attribution is exactly what the logit loses without it."""
    checks = run_checks(OneWave().eval(), *recordings(), RATE_HZ, FEW, effort=SMALL)
    assert checks.records == 12 and checks.truth is None
    deletion, insertion = (area(checks, kind, "attribution") for kind in ("deletion", "insertion"))
    assert deletion.against_high < -0.2 and insertion.against_low > 0.2
    # What speaks for the score is in 2 of 36 cells: it is all gone, or there, after a tenth of the way.
    assert deletion.area < 0.1 and insertion.area > 0.9
    for found in (deletion, insertion):
        assert (found.against_occlusion, found.occlusion_low, found.occlusion_high) == pytest.approx(
            (0, 0, 0), abs=1e-6
        )
    random = area(checks, "deletion", "random")
    assert random.area == pytest.approx(0.5, abs=0.15) and np.isnan(random.against_random)


def test_curves_begin_and_end_at_the_recording_and_the_baseline():
    curves = run_checks(OneWave().eval(), *recordings(4), RATE_HZ, FEW, effort=SMALL).curves
    ends = {"deletion": (1.0, 0.0), "insertion": (0.0, 1.0)}
    for (kind, _), rows in curves.groupby(["kind", "order"]):
        first, last = rows.iloc[0], rows.iloc[-1]
        assert (first.share, last.share) == (0.0, 1.0)
        assert (first.logit, last.logit) == pytest.approx(ends[kind], abs=1e-3)
        assert (rows.low <= rows.logit + 1e-9).all() and (rows.logit <= rows.high + 1e-9).all()


def test_attributions_that_hide_the_truth_do_not_beat_a_random_order(monkeypatch):
    """Attributions of another lead than the one that the model reads: a check that passes them would check nothing."""
    from lsemvae.explain import checks as module

    def of_another_lead(*arguments):
        found = true_attributes(*arguments)
        return found._replace(values_BLT=np.roll(found.values_BLT, 1, axis=1))

    true_attributes = module.attribute
    monkeypatch.setattr(module, "attribute", of_another_lead)
    checks = run_checks(OneWave().eval(), *recordings(), RATE_HZ, FEW, effort=SMALL)
    assert area(checks, "deletion", "attribution").against_high > 0
    assert area(checks, "insertion", "attribution").against_low < 0
    assert area(checks, "deletion", "attribution").occlusion_low > 0.2


def test_random_weights_give_other_attributions_and_leave_the_model_alone():
    model = OneWave().eval()
    before = copy.deepcopy(model.state_dict())
    found = run_checks(model, *recordings(), RATE_HZ, FEW, effort=SMALL).randomisation
    assert list(found.layers) == ["head", "encoder"]
    assert found.iloc[-1].high < 0.3 and found.iloc[-1].absolute_high < 0.5
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_learned_nothing_keep_the_correlation():
    """All weights are equal, so that a permutation changes nothing: the check must then say 1, not something lower."""
    model = OneWave()
    with torch.no_grad():
        model.encoder.weight.fill_(0.01)
        model.head.weight.fill_(1.0)
    found = run_checks(model.eval(), *recordings(4), RATE_HZ, FEW, effort=SMALL).randomisation
    assert found.correlation.to_numpy() == pytest.approx(1.0) and found.absolute.to_numpy() == pytest.approx(1.0)


def test_a_model_that_ignores_its_input_has_no_curves_and_no_correlation():
    checks = run_checks(OneWave(weight=0.0).eval(), *recordings(3), RATE_HZ, FEW, effort=SMALL)
    assert checks.curves[["logit", "low", "high"]].isna().all(axis=None)
    assert checks.areas[["area", "against_random", "against_occlusion"]].isna().all(axis=None)
    assert checks.randomisation[["correlation", "low", "absolute"]].isna().all(axis=None)


def test_absent_leads_and_padding_are_no_cells():
    """Otherwise an order that names them early would look as if it removed nothing."""
    x_BLT, mask_BL = recordings(2)
    mask_BL[0, 1] = False
    x_BLT[0, 1] = 0
    x_BLT[1, :, 350:] = 0
    cells = Cells.of(x_BLT, mask_BL, 100)
    assert cells.there_BLP[0].tolist() == [[True] * 6, [False] * 6, [True] * 6]
    assert cells.there_BLP[1].tolist() == [[True, True, True, True, False, False]] * 3
    assert cells.sums(torch.ones_like(x_BLT))[0, 0].tolist() == [100.0] * 6
    removal = Removal(OneWave().eval(), x_BLT, mask_BL, None, 100)
    for rank_BLP in (removal.order(cells.sums(x_BLT)), removal.random_order(np.random.default_rng(0))):
        for b, there_LP in enumerate(cells.there_BLP):
            assert sorted(rank_BLP[b][there_LP].tolist()) == list(range(int(there_LP.sum())))
    assert (removal.effects()[~cells.there_BLP] == 0).all()


def test_what_is_removed_is_replaced_by_the_baseline_of_the_explanation():
    x_BLT, mask_BL = recordings(3)
    two_RBLT = torch.stack([torch.full_like(x_BLT, 0.2), torch.full_like(x_BLT, 0.4)])
    removal = Removal(OneWave().eval(), x_BLT, mask_BL, two_RBLT.mean(dim=0), 50)
    assert removal.baseline_logit_B == pytest.approx(60 * 0.3 + 0.25, rel=1e-3)
    checks = run_checks(OneWave().eval(), x_BLT, mask_BL, RATE_HZ, FEW, baseline=two_RBLT, effort=SMALL)
    assert area(checks, "deletion", "attribution").against_occlusion == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_checks_and_progress_reaches_its_end():
    steps: list[tuple[int, int]] = []
    first, second = (
        run_checks(
            OneWave(0.1).eval(), *recordings(20), RATE_HZ, FEW, effort=SMALL, seed=3,
            progress=lambda done, of: steps.append((done, of)),
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.curves.equals(second.curves) and first.randomisation.equals(second.randomisation)
    once = steps[: len(steps) // 2]
    assert once == sorted(once) and once[-1][0] == once[-1][1] == once[0][1]


def test_recordings_of_one_subject_do_not_narrow_an_interval():
    values_B = np.random.default_rng(0).standard_normal(30)
    each = intervals.mean(values_B, intervals.resampled(np.arange(30), 2000, 0))
    four_each = intervals.mean(np.repeat(values_B, 4), intervals.resampled(np.repeat(np.arange(30), 4), 2000, 0))
    as_if_apart = intervals.mean(np.repeat(values_B, 4), intervals.resampled(np.arange(120), 2000, 0))
    assert four_each == pytest.approx(each)
    assert as_if_apart.high - as_if_apart.low < 0.6 * (each.high - each.low)
    assert each.high - each.low == pytest.approx(2 * 1.96 * values_B.std() / np.sqrt(30), rel=0.15)


def test_a_single_subject_has_figures_and_no_interval():
    model = OneWave().eval()
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    checks = run_checks(model, *recordings(3), RATE_HZ, FEW, subject_B=["a"] * 3, effort=SMALL)
    for table, value in ((checks.areas, "area"), (checks.curves, "logit"), (checks.randomisation, "correlation")):
        assert table[value].notna().all() and table[["low", "high"]].isna().all(axis=None)


def test_rank_correlation_is_spearmans():
    assert rank_correlation(np.array([1.0, 2, 2, 5]), np.array([10.0, 20, 20, 21])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert np.isnan(rank_correlation(np.array([1.0, 2, 3]), np.zeros(3)))
    several = rank_correlation(np.array([[1.0, 2, 3], [3.0, 2, 1]]), np.array([[1.0, 2, 4], [1.0, 2, 4]]))
    assert several == pytest.approx([1, -1])


ENCODERS = [config for config in CONFIGS if not isinstance(config, ClassifierConfig)]


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config.architecture)
def test_layers_go_from_the_head_to_the_first_and_each_is_randomised(config):
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(encoder=config, hidden=8), LEADS[:2]).eval()
    x_BLT, mask_BL = torch.randn(1, 2, getattr(config, "samples", 5000)), torch.ones(1, 2, dtype=torch.bool)
    layers = layers_of(model, x_BLT, mask_BL, 3)
    assert len(layers) == 3 and layers[0][0].startswith("head.fc2") and layers[-1][-1].startswith("encoders")
    before, names = dict(model.named_parameters()), [name for layer in layers for name in layer]
    *_, random = cascade(model, layers, 0)
    after = dict(random.named_parameters())
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    varied = {name for name in names if len(before[name].unique()) > 1}
    assert changed == varied and len(names) == len(set(names))
    assert all(torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values) for name in names)


@pytest.mark.parametrize(("features", "shifts"), [("pooled", 1), ("means", 2)])
def test_any_recipe_with_an_absent_lead_and_a_short_recording(features, shifts):
    torch.manual_seed(0)
    config = ClassifierConfig(encoder=CONFIGS[0], hidden=0, features=features, shifts=shifts)
    model = Classifier(config, LEADS[:3]).eval()
    x_BLT, mask_BL = torch.randn(3, 3, 5000), torch.ones(3, 3, dtype=torch.bool)
    x_BLT[0, 1], mask_BL[0, 1] = 0, False
    x_BLT[1, :, 2000:] = 0
    effort = Effort(cell_s=2.5, layers=2, randomisations=1, random_orders=1, draws=50)
    checks = run_checks(model, x_BLT, mask_BL, 500, Settings(steps=4, most_steps=4), effort=effort)
    assert checks.curves.notna().all(axis=None) and checks.randomisation.notna().all(axis=None)
