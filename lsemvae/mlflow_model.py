"""A bundle as an MLflow model. A copy of this file lies beside the bundle in each registered version.

`mlflow.pyfunc.load_model` runs that copy. lsemvae itself never does: the endpoint and the commands read the bundle.

Input: one row for each recording. Its columns are the bundle's leads by name, each an array of samples in millivolts,
NaN where nothing was recorded, and `rate_hz`. A lead that was not recorded is null (MLflow refuses NaN in place of an
array), or its column is absent. Output: one row for each recording, in order. `refused` is a code and `reason` a
sentence, both empty where nothing was refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from lsemvae.bundle import CHUNK, Scorer, describe, load
from lsemvae.errors import LsemvaeError, Refused
from lsemvae.preprocess import preprocess_signals
from lsemvae.record import Record

Params = dict[str, Any] | None


class Scores(PythonModel):
    """A classifier: `score`, `probability` (NaN without a calibration) and the `threshold` of a positive score."""

    def load_context(self, context: PythonModelContext) -> None:
        self._scorer = Scorer(Path(__file__).parent)
        self._scorer.check_example()

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Params = None) -> pd.DataFrame:
        reads = _read(model_input)
        answers = iter(self._scorer.score([read for read in reads if isinstance(read, Record)]))
        rows = []
        for read in reads:
            row: dict[str, Any] = {"score": None, "probability": None, "threshold": self._scorer.threshold}
            if isinstance(read, Record):
                answer = next(answers)
                row |= {"score": answer.score, "probability": answer.probability}
            rows.append(row | _refusal(answer.refused if isinstance(read, Record) else read))
        # float, since a column of None alone is no number to Spark, which then takes another column for the score.
        return pd.DataFrame(rows).astype({"score": float, "probability": float})


class Embeddings(PythonModel):
    """A pre-trained encoder: `embedding`, null for a refused recording."""

    def load_context(self, context: PythonModelContext) -> None:
        self._bundle, model = load(Path(__file__).parent)
        self._model: Any = model

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Params = None) -> pd.DataFrame:
        reads = _read(model_input)
        embedded = self._embed([read for read in reads if isinstance(read, Record)])
        found = [next(embedded) if isinstance(read, Record) else read for read in reads]
        return pd.DataFrame(
            {"embedding": of, **_refusal(None)} if isinstance(of, np.ndarray) else {"embedding": None, **_refusal(of)}
            for of in found
        )

    def _embed(self, records: Sequence[Record]) -> Iterator[np.ndarray | Refused]:
        leads = self._bundle.leads
        for start in range(0, len(records), CHUNK):
            part = records[start : start + CHUNK]
            signals_mv, rates_hz = [record.signal_for(leads) for record in part], [record.rate_hz for record in part]
            prepared = preprocess_signals(signals_mv, rates_hz, leads, self._bundle.preprocess)
            with torch.inference_mode():
                x_BLT, mask_BL = torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)
                h_BF = self._model.embed(x_BLT, mask_BL).double().numpy()
            yield from (refused or h_F for refused, h_F in zip(prepared.refused_B, h_BF, strict=True))


def _read(rows: pd.DataFrame) -> list[Record | LsemvaeError]:
    """Each row as a recording, or why it is none."""
    return [_record(row) for row in rows.to_dict("records")]


def _record(row: dict[str, Any]) -> Record | LsemvaeError:
    rate_hz = row.pop("rate_hz")
    try:
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is refused as such
            signal_mv = {
                lead: np.asarray(samples, dtype=np.float64).astype(np.float32)
                for lead, samples in row.items()
                if isinstance(samples, list | np.ndarray)
            }
        return Record.from_leads(signal_mv, rate_hz)
    except LsemvaeError as error:
        return error


def _refusal(error: LsemvaeError | None) -> dict[str, str]:
    """Empty texts instead of nulls, of which Spark would make the text "None"."""
    if error is None:
        return {"refused": "", "reason": ""}
    return {"refused": getattr(error, "code", "record"), "reason": str(error)}


set_model(Scores() if describe(Path(__file__).parent).task else Embeddings())
