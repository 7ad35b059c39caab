"""The baselines of `serve`: the shortest code that people write to serve a model. They use the same `Scorer`.

This is a file of its own because `mlflow models serve` runs it as the model's code, and uvicorn as an application.
"""

import io
import json
import os
from pathlib import Path

import mlflow
import numpy as np
from fastapi import FastAPI, Request
from mlflow.pyfunc import PythonModel, PythonModelContext

from lsemvae.bundle import Scorer
from lsemvae.record import Record


def app() -> FastAPI:
    """A minimal server for `uvicorn --factory`: one process, one recording at a time. BUNDLE names the model."""
    scorer = Scorer(Path(os.environ["BUNDLE"]))
    api = FastAPI()

    def answer(signal_mv: dict[str, np.ndarray], rate_hz: float) -> dict[str, float]:
        (scored,) = scorer.score([Record.from_leads(signal_mv, rate_hz)])
        return {"score": scored.score, "decision": scored.decision}

    @api.post("/npy")
    async def npy(request: Request, leads: str, rate_hz: float, uv_per_lsb: float) -> dict[str, float]:
        counts_LT = np.lib.format.read_array(io.BytesIO(await request.body()))
        signal_mv_LT = counts_LT * np.float32(uv_per_lsb / 1000)
        return answer(dict(zip(leads.split(","), signal_mv_LT, strict=True)), rate_hz)

    @api.post("/json")
    async def as_json(request: Request) -> dict[str, float]:
        (record,) = json.loads(await request.body())["records"]
        return answer(record["leads"], record["rate_hz"])

    return api


class Model(PythonModel):
    """The bundle as an MLflow model: mV_BLT with the bundle's leads at 500 Hz -> score_B."""

    def load_context(self, context: PythonModelContext) -> None:
        self._scorer = Scorer(Path(context.artifacts["bundle"]))

    def predict(self, context: PythonModelContext, model_input: np.ndarray) -> np.ndarray:
        answers = self._scorer.score_signals(list(model_input), [500.0] * len(model_input))
        return np.array([answer.score for answer in answers])


mlflow.models.set_model(Model())
