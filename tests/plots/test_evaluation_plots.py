"""Pictures of a comparison: they are pictures, what they draw is right, and grey copies can be read."""

import io

import matplotlib.image
import numpy as np
import pytest

from lsemvae.plots import evaluation as plots
from lsemvae.plots.evaluation import Diagram, Spread

RNG = np.random.default_rng(0)
Y_B = RNG.random(80) < 0.4
SCORE_B = 1 / (1 + np.exp(-(RNG.normal(size=80) + Y_B)))
SPREAD = Spread(0.8, 0.7, 0.9)
UNKNOWN = Spread(0.8, np.nan, np.nan)

PICTURES = {
    "roc": lambda: plots.roc(Y_B, {"a": SCORE_B, "constant": np.full(80, 0.4)}),
    "precision and recall": lambda: plots.precision_recall(Y_B, {"a": SCORE_B, "constant": np.full(80, 0.4)}),
    "reliability": lambda: plots.reliability({"score": Diagram(np.array([0.5]), np.array([0.4]), SCORE_B)}),
    "decision curve": lambda: plots.decision_curve(Y_B, {"a": SCORE_B}),
    "forest": lambda: plots.forest([("all", None, ""), ("women", SPREAD, "x"), ("men", UNKNOWN, "")], "AUROC", 0.5),
    "forest of nothing": lambda: plots.forest([("women", None, "fewer than 20 recordings")], "AUROC", np.nan),
    "confusion": lambda: plots.confusion(Y_B, np.ones(80, dtype=bool), "ph"),
    "latent map": lambda: plots.latent_map(RNG.normal(size=(80, 5)), Y_B, "ph"),
    "latent map of one constant": lambda: plots.latent_map(np.ones((80, 1)), Y_B, "ph"),
    "label efficiency": lambda: plots.label_efficiency({"a": {100.0: SPREAD, 10.0: UNKNOWN}, "b": {10.0: SPREAD}}),
    "dots": lambda: plots.dots({"a": {"12L": SPREAD, "6L": UNKNOWN}, "b": {"6L": SPREAD}}, "AUROC", 0.5),
}


@pytest.mark.parametrize("name", PICTURES)
def test_each_is_a_picture_with_nothing_cut_at_its_edge(name: str):
    with np.errstate(all="raise"):
        png = PICTURES[name]()
    assert png.startswith(b"\x89PNG")
    picture = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert min(picture.shape[:2]) > 100
    dark = picture.min(axis=2) < 0.5
    assert dark.any()
    for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1]):  # a text or line that goes beyond would be here
        assert not edge.any()


def test_neighbouring_lines_differ_without_colour():
    styles = [plots._style(number, 100) for number in range(plots.MAX_LINES)]
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles}) == plots.MAX_LINES
    assert len({str(style["linestyle"]) for style in styles}) == plots.MAX_LINES
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(matplotlib.colors.to_rgb, plots.COLORS)]
    assert abs(grey[0] - grey[1]) > 0.2 and max(grey) < 0.75  # the first two differ, and none fades on white


def test_net_benefit_by_hand():
    # Vickers and Elkin 2006: TP / n - FP / n * p / (1 - p). Ten recordings; at 0.2, 2 true and 3 false positives.
    y_B = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    probability_B = np.array([0.9, 0.3, 0.1, 0.5, 0.2, 0.8, 0.1, 0.1, 0.0, 0.1])
    benefit_K = plots.net_benefit(y_B, probability_B, np.array([0.2, 0.5]))
    assert benefit_K == pytest.approx([0.2 - 0.3 * 0.25, 0.1 - 0.2])
    # Treating everybody gives the share of positives at a threshold of 0, and nothing where the odds are the share's.
    everybody = plots.net_benefit(y_B, np.ones(10), np.array([0.0, 0.3]))
    assert everybody == pytest.approx([0.3, 0.0], abs=1e-12)


def test_the_same_scores_give_the_same_picture():
    assert PICTURES["roc"]() == PICTURES["roc"]()
