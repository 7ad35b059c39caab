"""Routes that describe the service: model cards, health and readiness."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from lsemvae.bundle import MODEL_CARD
from lsemvae.tracking import shown
from serve.openapi import PROBLEMS, TOKEN_IN_OPENAPI
from serve.registry import Served
from serve.schema import Health, ModelCard, ModelOut, Readiness
from serve.scoring import min_leads
from serve.service import TheService

INTENDED_USE = (
    "Research on ECG models, by people who can judge them. Not a medical device: not evaluated for clinical use, and "
    "its scores must not guide anybody's care."
)
LIMITS = [
    "The label is defined by the training data and its patients. On other patients the score, the probability and the "
    "threshold may mean something else: validate there first.",
    "A probability holds where the disease is as frequent as in the training cohort. Without calibration there is "
    "none, and a score of 0.7 is not a risk of 70 %.",
    "Reliability describes the recording, and says so where it is unlike most training recordings, if the model has a "
    "measure of doubt that is shown to help. None of these numbers measures the model's uncertainty.",
    "With missing or derived leads the scores have another distribution, so that the threshold finds another share of "
    "positives. Reliability names these leads; `min_leads` is the least that this model accepts.",
]

router = APIRouter()


@router.get("/v1/models", dependencies=[TOKEN_IN_OPENAPI], responses=PROBLEMS)
async def models(service: TheService) -> list[ModelCard]:
    """The model cards of the served models."""
    return [_card(served) for served in service.registry.served.values()]


@router.get("/healthz")
async def healthz() -> Health:
    """Answers while the process is alive."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "No model is loaded."}})
async def readyz(service: TheService) -> Any:
    """Whether recordings can be scored, which models answer, and why a promoted version or the encoder does not."""
    registry = service.registry
    models = [f"{m.name}/{m.version}" if m.version else m.name for m in _described(registry.served)]
    # An address may hold a password, and this path needs no token.
    encoder = {"encoder": service.encoder.problem} if service.encoder and service.encoder.problem else {}
    problems = {name: shown(text) for name, text in (encoder | registry.problems).items()}
    state = Readiness(ready=registry.ready, models=models, problems=problems)
    return state if state.ready else JSONResponse(state.model_dump(), 503)


def _described(served: Mapping[str, Served]) -> list[ModelOut]:
    return [model.described for model in served.values()]


def _card(served: Served) -> ModelCard:
    bundle = served.scorer.bundle
    provenance = dict(bundle.provenance)
    card = provenance.pop(MODEL_CARD, None)
    return ModelCard(
        **served.described.model_dump(),
        min_leads=min_leads(bundle),
        architecture=bundle.architecture,
        preprocess=asdict(bundle.preprocess),
        calibration=asdict(bundle.calibration) if bundle.calibration else None,
        doubt=_finite(asdict(bundle.doubt)) if bundle.doubt else None,
        provenance=_finite(provenance),
        card=card if isinstance(card, str) else None,
        intended_use=INTENDED_USE,
        limits=LIMITS,
    )


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
