"""What the endpoint tells Prometheus about versions and about the distribution of its scores."""

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from support.bundles import save
from support.session import ROOT

from lsemvae.scoring.drift import SCORE_BINS, ScoreBins
from serve import observed
from serve.observed import Metrics
from serve.registry import Registry
from serve.schema import ScoreOut


class Kept(Metrics):
    """Keeps the values of all counters and gauges by name and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, ...], float] = {}
        for metric in vars(self).values():
            name = getattr(metric, "info", {}).get("name")
            if hasattr(metric, "inc"):
                metric.inc = lambda value=1.0, tags=None, name=name: self._keep(name, tags, value, add=True)
            elif hasattr(metric, "set"):
                metric.set = lambda value, tags=None, name=name: self._keep(name, tags, value, add=False)

    def _keep(self, name: str, tags: dict[str, str], value: float, add: bool) -> None:
        key = (name, *tags.values())
        self.values[key] = value + (self.values.get(key, 0) if add else 0)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        return {key[1:]: round(value, 6) for key, value in self.values.items() if key[0] == name}


BINS = ScoreBins((0.3, 0.6), (0.5, 0.3, 0.2), 300)


def test_scores_are_counted_in_the_bins_of_the_training_cohort(tmp_path: Path):
    save(tmp_path / "ph-6L", **{SCORE_BINS: BINS.as_json()})
    metrics = Kept()
    registry = Registry([str(tmp_path / "ph-6L")], tmp_path / "kept", 0, metrics=metrics)
    named = ("ph-6L", "None")
    assert metrics.of("lsemvae_score_bins") == {(*named, "0"): 0, (*named, "1"): 0, (*named, "2"): 0}
    assert metrics.of("lsemvae_score_bins_expected") == {(*named, "0"): 0.5, (*named, "1"): 0.3, (*named, "2"): 0.2}
    described = registry.served["ph-6L"].described
    for score in (0.1, 0.29, 0.3, 0.99):
        metrics.result(ScoreOut(id="a", model=described, score=score, decision=score >= 0.5))
    assert metrics.of("lsemvae_score_bins") == {(*named, "0"): 2, (*named, "1"): 1, (*named, "2"): 1}
    assert np.isclose(sum(BINS.shares), 1)


@pytest.mark.parametrize("provenance", [{}, {SCORE_BINS: {"edges": [2, 1], "shares": [1], "recordings": 3}}])
def test_an_older_or_a_damaged_distribution_exports_nothing_and_the_log_says_so(
    provenance: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path / "ph-6L", **provenance)
    metrics = Kept()
    registry = Registry([str(tmp_path / "ph-6L")], tmp_path / "kept", 0, metrics=metrics)
    metrics.result(ScoreOut(id="a", model=registry.served["ph-6L"].described, score=0.4, decision=False))
    assert metrics.of("lsemvae_score_bins") == metrics.of("lsemvae_score_bins_expected") == {}
    assert metrics.of("lsemvae_scores") == {("ph-6L", "None", "false"): 1}
    assert "the drift of its scores is not measured" in caplog.text


def test_a_model_that_cannot_be_loaded_is_a_problem_until_it_can(tmp_path: Path):
    metrics = Kept()
    registry = Registry([str(tmp_path / "ph-6L")], tmp_path / "kept", 0, metrics=metrics)
    assert metrics.of("lsemvae_model_problem") == {("ph-6L",): 1}
    save(tmp_path / "ph-6L")
    registry.refresh()
    assert metrics.of("lsemvae_model_problem") == {("ph-6L",): 0}


def test_gauges_are_set_again_and_again(monkeypatch: pytest.MonkeyPatch):
    """Ray drops a gauge that is not: an alert that must hold for ten minutes would never fire."""
    monkeypatch.setattr(observed, "_REPEAT_S", 0.02)
    metrics = Kept()
    metrics.looked("ph-6L", 3, 4, True)
    metrics.values.clear()
    while len(metrics.values) < 3:
        time.sleep(0.01)
    assert metrics.of("lsemvae_model_version") == {("ph-6L",): 3} and metrics.of("lsemvae_alias_version") == {
        ("ph-6L",): 4
    }


def test_the_alert_rules_fire_when_they_should():
    """Prometheus' own tool runs the rules on made-up series; infra/prometheus/alerts_test.yaml says what must fire."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not here")
    rules = ROOT / "infra" / "prometheus"
    subprocess.run([tool, "check", "rules", rules / "alerts.yaml"], check=True, capture_output=True)
    done = subprocess.run([tool, "test", "rules", rules / "alerts_test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
