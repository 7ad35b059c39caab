"""The service's Prometheus metrics, exported by Ray. They hold no identifier and no signal."""

import threading
import time
from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

from lsemvae.scoring.drift import ScoreBins
from serve.schema import ModelOut, ScoreOut

STAGES = ("parse", "model", "total")
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
_SHARES = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]  # Ray's buckets must be above 0
_COUNTS = [1, 2, 4, 8, 16, 32, 64]
_REPEAT_S = 5.0
"""Ray exports the value of a gauge only for some seconds after it was set."""
_VISIBLE = 1e-9
"""Ray's counters take no 0. Prometheus misses the first count of a series that did not exist before."""


class Metrics:
    """Ray prefixes these names with `ray_`; Prometheus appends `_total`, or `_bucket`, `_sum` and `_count`."""

    def __init__(self) -> None:
        self._requests = Counter("lsemvae_requests", "Answers, by HTTP status.", ("endpoint", "status"))
        self._scores = Counter("lsemvae_scores", "Scored recordings.", ("model", "version", "decision"))
        self._refusals = Counter("lsemvae_refusals", "Recordings without a score.", ("reason",))
        self._limited = Counter("lsemvae_limited", "Scored recordings of limited reliability.", ("model", "version"))
        self._score = Histogram("lsemvae_score", "Scores: a shift is drift.", _SHARES, ("model", "version"))
        self._bins: dict[tuple[str, str], ScoreBins] = {}
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[Gauge, float, Mapping[str, str]]] = {}
        self._repeating: threading.Thread | None = None
        named = ("model", "version", "bin")
        self._score_bins = Counter("lsemvae_score_bins", "Scores in each bin of the training cohort's scores.", named)
        self._expected = Gauge("lsemvae_score_bins_expected", "Share of the training cohort in each bin.", named)
        self._version = Gauge("lsemvae_model_version", "The version that answers in this replica.", ("model",))
        self._wanted = Gauge("lsemvae_alias_version", "The version that the model's alias names.", ("model",))
        self._problem = Gauge("lsemvae_model_problem", "1 while the named version does not answer.", ("model",))
        self._seconds = Histogram("lsemvae_stage_seconds", "Time by stage of a request.", _SECONDS, ("stage",))
        self._explanations = Counter("lsemvae_explanations", "Asked explanations.", ("outcome",))
        self._explanation_s = Histogram(
            "lsemvae_explanation_seconds", "Time of an explanation, waiting included.", _SECONDS, ("outcome",)
        )
        self._explaining = Gauge("lsemvae_explaining", "Explanations in progress, and those that wait.")
        self._batch = Histogram("lsemvae_batch_records", "Recordings scored together.", _COUNTS, ("model",))

    def answered(self, endpoint: str, status: int) -> None:
        self._requests.inc(tags={"endpoint": endpoint, "status": str(status)})

    def took(self, stage: str, seconds: float) -> None:
        assert stage in STAGES
        self._seconds.observe(seconds, tags={"stage": stage})

    def batch(self, model: ModelOut, records: int) -> None:
        self._batch.observe(records, tags={"model": model.name})

    def explained(self, outcome: str, seconds: float) -> None:
        self._explanations.inc(tags={"outcome": outcome})
        self._explanation_s.observe(seconds, tags={"outcome": outcome})

    def explaining(self, there: int) -> None:
        self._set(self._explaining, there, {})

    def loaded(self, model: ModelOut, bins: ScoreBins | None) -> None:
        """A version answers from now on. Its scores are counted in these bins, and not at all without bins."""
        if bins is None:
            return
        named = {"model": model.name, "version": str(model.version)}
        self._bins[model.name, str(model.version)] = bins
        for number, share in enumerate(bins.shares):
            self._score_bins.inc(_VISIBLE, tags=named | {"bin": str(number)})
            self._set(self._expected, share, named | {"bin": str(number)})

    def looked(self, name: str, served: int | None, wanted: int | None, problem: bool) -> None:
        """The version of a model that answers, the version that its alias names, and whether there is a problem."""
        for gauge, version in ((self._version, served), (self._wanted, wanted)):
            if version is not None:
                self._set(gauge, version, {"model": name})
        self._set(self._problem, int(problem), {"model": name})

    def _set(self, gauge: Gauge, value: float, tags: Mapping[str, str]) -> None:
        gauge.set(value, tags=dict(tags))
        self._gauges[gauge.info["name"], tuple(tags.values())] = gauge, value, tags
        if self._repeating is None:
            self._repeating = threading.Thread(target=self._repeat, daemon=True, name="gauges")
            self._repeating.start()

    def _repeat(self) -> None:
        while True:
            time.sleep(_REPEAT_S)
            for gauge, value, tags in list(self._gauges.values()):
                gauge.set(value, tags=dict(tags))

    def result(self, out: ScoreOut) -> None:
        if out.refused or out.model is None:
            self._refusals.inc(tags={"reason": out.refused.code if out.refused else "none"})
            return
        named = {"model": out.model.name, "version": str(out.model.version)}
        self._scores.inc(tags=named | {"decision": str(out.decision).lower()})
        self._score.observe(out.score, tags=named)
        if out.score is not None and (bins := self._bins.get((out.model.name, str(out.model.version)))):
            self._score_bins.inc(tags=named | {"bin": str(int(bins.bin_of(out.score)))})
        if out.reliability and out.reliability.level == "limited":
            self._limited.inc(tags=named)
