"""Explanations as the endpoint answers with them, and the outcome where there is none."""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.explain.explainer import Explainer, Explanation, Window
from lsemvae.explain.waves import WAVES, Delineation
from lsemvae.preprocess import cleanest, preprocess_signals, windows
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from serve.answers import answered
from serve.schema import (
    CellOut,
    ExplainedLeadOut,
    ExplainOut,
    ExplainResponse,
    ExplanationOut,
    LeadShareOut,
    ModelOut,
    ShareOut,
    WindowOut,
)


class Answers:
    """Answers the questions of `explaining.py`, and keeps the models that were asked for."""

    def __init__(self) -> None:
        self._explainers: dict[str, Explainer] = {}

    def __call__(self, question: Mapping[str, Any], samples: bytes) -> tuple[dict[str, Any], bytes]:
        """The outcome, and of a `done` or `refused` one the body that answers the request."""
        try:
            return self._explained(question, samples)
        except (BundleError, OSError):
            return {"outcome": "replaced"}, b""
        except LsemvaeError as error:
            return {"outcome": "no_gradient", "detail": str(error)}, b""
        except Exception as error:
            # Where it happened, not its message, which may quote the recording.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            return {"outcome": "failed", "detail": f"{type(error).__name__} at {place}"}, b""

    def _explained(self, question: Mapping[str, Any], samples: bytes) -> tuple[dict[str, Any], bytes]:
        for digest in self._explainers.keys() - set(question["served"]):
            del self._explainers[digest]
        record = _record(question["record"], samples)
        for candidate in question["candidates"]:
            described = ModelOut.model_validate(candidate["described"])
            explainer = self._explainer(Path(candidate["folder"]), described.digest)
            (found,) = explainer.explain([record])
            if not (found.score.refused and found.score.refused.code == "leads"):
                break  # the next model may need fewer leads
        answer = answered(question["id"], record, described, explainer.scorer, found.score, quality_flags(record))
        explanation = None
        if not answer.refused:
            explanation = as_explanation(explainer, found, record, with_signal=question["with_signal"])
        result = ExplainOut(**answer.model_dump(), explanation=explanation)
        outcome = "refused" if answer.refused else "done"
        return {"outcome": outcome}, ExplainResponse(results=[result]).model_dump_json().encode()

    def _explainer(self, folder: Path, digest: str) -> Explainer:
        """The explainer of exactly this digest. Raises BundleError where the folder no longer holds it."""
        if digest not in self._explainers:
            explainer = Explainer(folder)
            if explainer.scorer.bundle.digest != digest:
                raise BundleError(f"{folder} does not hold {digest}")
            self._explainers[digest] = explainer
        return self._explainers[digest]


def _record(given: Mapping[str, Any], samples: bytes) -> Record:
    return Record(
        tuple(given["leads"]),
        np.frombuffer(samples, np.float32).reshape(given["shape"]),
        given["rate_hz"],
        derived=tuple(given["derived"]),
        flags=tuple(given["flags"]),
    )


def as_explanation(
    explainer: Explainer, explanation: Explanation, record: Record, *, with_signal: bool
) -> ExplanationOut:
    """The explanation of a recording that is scored, for an answer."""
    signal_mv_LT, rate_hz = record.signal_for(explanation.leads), record.rate_hz
    assert explanation.windows and explanation.shares is not None
    leads = [explanation.leads[row] for row in _used(explanation)]
    views = _views(explainer, signal_mv_LT, rate_hz)
    has_beat = explanation.beats > 0
    return ExplanationOut(
        baseline=explainer.settings.baseline,
        leads=_by_lead(explanation),
        waves=_by_wave(explanation) if has_beat else None,
        cells=_cells(explanation) if has_beat else None,
        notes=list(explanation.notes),
        windows=[
            _window(window, view, explanation.leads, leads if with_signal else None)
            for window, view in zip(explanation.windows, views, strict=True)
        ],
    )


# --- shares -----------------------------------------------------------------------------------------------------


def _used(explanation: Explanation) -> list[int]:
    """Rows of the leads that some window has."""
    return [int(row) for row in np.flatnonzero(explanation.there_L)]


def _by_lead(explanation: Explanation) -> dict[str, LeadShareOut]:
    assert explanation.shares is not None
    signed_L, absolute_L = (shares_LW.sum(axis=1) for shares_LW in explanation.shares)
    drop_L, gate_L, precision_L = explanation.lead_drop_L, explanation.gate_L, explanation.precision_L
    return {
        explanation.leads[row]: LeadShareOut(
            signed=_rounded(signed_L[row]),
            absolute=_rounded(absolute_L[row]),
            drop=_or_none(drop_L[row]),
            gate=None if gate_L is None else _or_none(gate_L[row]),
            precision=None if precision_L is None else _or_none(precision_L[row]),
        )
        for row in _used(explanation)
    }


def _by_wave(explanation: Explanation) -> dict[str, ShareOut]:
    assert explanation.shares is not None
    signed_W, absolute_W = (shares_LW.sum(axis=0) for shares_LW in explanation.shares)
    return {
        wave: ShareOut(signed=_rounded(signed_W[w]), absolute=_rounded(absolute_W[w])) for w, wave in enumerate(WAVES)
    }


def _cells(explanation: Explanation) -> dict[str, dict[str, CellOut]]:
    assert explanation.shares is not None
    signed_LW, absolute_LW = explanation.shares
    drop_LW = explanation.wave_drop_LW
    return {
        explanation.leads[row]: {
            wave: CellOut(
                signed=_rounded(signed_LW[row, w]),
                absolute=_rounded(absolute_LW[row, w]),
                drop=_or_none(drop_LW[row, w]),
            )
            for w, wave in enumerate(WAVES)
        }
        for row in _used(explanation)
    }


def _rounded(value: float) -> float:
    return round(float(value), 5)


def _or_none(value: float) -> float | None:
    return _rounded(value) if np.isfinite(value) else None


# --- windows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """One window in mV, filtered as for the model; `samples` without the zeros that pad a short recording."""

    start_s: float
    samples: int
    mv_LT: np.ndarray


def _views(explainer: Explainer, signal_mv_LT: np.ndarray, rate_hz: float) -> list[_View]:
    """The windows that the score takes, without those that preprocessing refuses."""
    bundle = explainer.scorer.bundle
    config = bundle.preprocess
    parts, first = [signal_mv_LT], 0
    if config.window != "first":
        parts = windows(signal_mv_LT, rate_hz, config)
    length = parts[0].shape[1]
    if config.window == "cleanest":
        first = cleanest(signal_mv_LT, rate_hz, config)
        parts = parts[first : first + 1]
    prepared = preprocess_signals(parts, [rate_hz] * len(parts), bundle.leads, replace(config, scale="none"))
    return [
        _View(
            start_s=(first + i) * length / rate_hz,
            samples=min(config.samples, round(part.shape[1] / rate_hz * config.rate_hz)),
            mv_LT=mv_LT,
        )
        for i, (part, mv_LT, refused) in enumerate(zip(parts, prepared.x_BLT, prepared.refused_B, strict=True))
        if refused is None
    ]


def _window(window: Window, view: _View, names: tuple[str, ...], drawn: list[str] | None) -> WindowOut:
    """`drawn` are the leads whose samples are given; None gives none."""
    rate_hz, largest = window.waves.rate_hz, np.abs(window.values_LT).max()
    decimals = 4 - int(np.ceil(np.log10(largest))) if largest > 0 else 0
    return WindowOut(
        start_s=view.start_s,
        rate_hz=rate_hz,
        samples=view.samples,
        logit=window.logit,
        baseline_logit=window.baseline_logit,
        delta=window.delta,
        steps=window.steps,
        beats=window.waves.beats,
        waves=_edges_s(window.waves),
        failures={wave: int(count) for wave, count in window.waves.failures.items()},
        no_beat=window.waves.reason,
        leads=None
        if drawn is None
        else {
            lead: ExplainedLeadOut(
                x_mv=np.round(view.mv_LT[row, : view.samples].astype(np.float64), 3).tolist(),
                attribution=np.round(window.values_LT[row, : view.samples].astype(np.float64), decimals).tolist(),
            )
            for lead in drawn
            for row in [names.index(lead)]
        },
    )


def _edges_s(waves: Delineation) -> dict[str, list[list[float | None]]]:
    return {
        wave: [[_or_none(edge / waves.rate_hz) for edge in beat] for beat in edges_N3]
        for wave, edges_N3 in waves.edges.items()
    }
