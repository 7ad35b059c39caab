"""Reconstructs missing leads with a pre-trained encoder and its decoder. A reconstruction is not a measurement."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsemvae.bundle import load
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import in_order
from lsemvae.preprocess import preprocess
from lsemvae.record import Record
from lsemvae.tracking import Version, fetched, locate, parse_model
from serve.model_thread import TORCH
from serve.polling import every
from serve.registry import RETRY_S
from serve.schema import LeadOut, Origin, ReconstructOut, RefusedOut
from serve.shelf import Kept, Shelf, locked_shelf

log = logging.getLogger("ray.serve")


class Reconstructor:
    """A pre-trained bundle that reconstructs leads. Raises BundleError for a classifier, which has no decoder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.bundle, model = load(folder, device)
        self._model: Any = model  # `load` promises no decoder
        if not hasattr(model, "reconstruct"):
            raise BundleError(
                f"{folder} is a {self.bundle.architecture}, which has no decoder: name an encoder's bundle"
            )
        self._device = device

    async def reconstruct(self, records: Sequence[Record], ids: Sequence[str]) -> list[ReconstructOut]:
        return await TORCH.run(self._reconstruct, records, ids)

    def _reconstruct(self, records: Sequence[Record], ids: Sequence[str]) -> list[ReconstructOut]:
        config, leads = self.bundle.preprocess, self.bundle.leads
        prepared = preprocess(records, leads, config)
        filtered = preprocess(records, leads, replace(config, scale="none"))
        accepted_B = prepared.accepted_B
        predicted: dict[int, np.ndarray] = {}
        if accepted_B.any():
            with torch.inference_mode():
                predicted_BLT = self._model.reconstruct(
                    torch.from_numpy(prepared.x_BLT[accepted_B]).to(self._device),
                    torch.from_numpy(prepared.lead_mask_BL[accepted_B]).to(self._device),
                )
            accepted = (int(b) for b in np.flatnonzero(accepted_B))
            predicted = dict(zip(accepted, predicted_BLT.float().cpu().numpy(), strict=True))
        outs = []
        for b, (record, id) in enumerate(zip(records, ids, strict=True)):
            if refusal := prepared.refused_B[b]:
                outs.append(ReconstructOut(id=id, refused=RefusedOut(code=refusal.code, reason=str(refusal))))
                continue
            rows = self._rows(record, prepared.x_BLT[b], filtered.x_BLT[b], prepared.lead_mask_BL[b], predicted[b])
            outs.append(
                ReconstructOut(
                    id=id,
                    rate_hz=config.rate_hz,
                    unit="standard deviations" if config.scale == "lead" else "mV",
                    leads={lead: rows[lead] for lead in in_order(rows)},
                )
            )
        return outs

    def _rows(
        self, record: Record, x_LT: np.ndarray, filtered_mv_LT: np.ndarray, mask_L: np.ndarray, predicted_LT: np.ndarray
    ) -> dict[str, LeadOut]:
        """The usable leads as filtered, and the others as the decoder gives them, both in one unit."""
        if self.bundle.preprocess.scale == "lead":  # the amplitude of an absent lead is unknown
            seen_LT, factor = x_LT, 1.0
        else:
            seen_LT, factor = filtered_mv_LT, _factor(x_LT[mask_L], filtered_mv_LT[mask_L])
        rows = {}
        for row, lead in enumerate(self.bundle.leads):
            if mask_L[row]:
                origin: Origin = "derived" if lead in record.derived else "measured"
                rows[lead] = LeadOut(origin=origin, values=_rounded(seen_LT[row]))
        for row, lead in enumerate(self._model.decoder_leads):
            if lead not in rows:
                rows[lead] = LeadOut(origin="reconstructed", values=_rounded(predicted_LT[row] * factor))
        return rows


class Encoder:
    """The encoder that the URI names. It follows an alias every `poll_s` seconds; with 0 only `refresh` looks.

    A registered one is kept under `folder`, and answers while MLflow is away, or while the version that the alias names
    cannot be loaded.
    """

    def __init__(self, uri: str, folder: Path, poll_s: float, device: str = "cpu") -> None:
        self._uri, self._folder, self._device = uri, folder, device
        self._version: Version | None = None  # of the registered one that answers
        self._refused: tuple[Version | None, str, float] = (None, "", 0.0)  # why, and until when it is not tried again
        self.reconstructor: Reconstructor | None = None
        self.problem = ""
        """Why the version that the URI names does not answer."""
        self.refresh()
        every(poll_s, self.refresh, "encoder")

    def refresh(self) -> None:
        """Looks at the URI once: a new version is loaded and then answers. Never raises."""
        try:
            if self._uri.startswith("models:/"):
                self._follow()
            elif self.reconstructor is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with fetched(self._uri, self._folder) as found:
                    self.reconstructor = Reconstructor(found.folder, self._device)
            problem = ""
        except (LsemvaeError, OSError) as error:
            problem = " ".join(str(error).split())
        except Exception as error:  # the thread goes on, and what is loaded answers, whatever this is
            problem = type(error).__name__
        if problem and problem != self.problem:
            answers = f"version {self._version.number}" if self._version else "nothing"
            log.error(f"{self._uri}: {problem}; {answers} answers /v1/reconstruct")
        self.problem = problem

    def _follow(self) -> None:
        """Loads the version that the URI names now. Raises when that fails, at the start after loading the kept one."""
        try:
            wanted = locate(self._uri)
            if wanted == self._version:
                return
            refused, why, until = self._refused
            if wanted == refused and time.monotonic() < until:
                raise BundleError(why)
            try:
                with self._shelf() as shelf:
                    reconstructor = self._load(wanted, shelf)
            except BundleError as error:
                self._refused = (wanted, str(error), time.monotonic() + RETRY_S)
                raise
            self._answer_with(reconstructor, wanted)
        except LsemvaeError:
            if self.reconstructor is None:
                with self._shelf() as shelf:
                    if kept := shelf.kept():
                        self._answer_with(_of_disk(kept, self._device), kept.version)
            raise

    def _shelf(self) -> AbstractContextManager[Shelf]:
        return locked_shelf(self._folder, "encoder", parse_model(self._uri)[0])

    def _load(self, wanted: Version, shelf: Shelf) -> Reconstructor:
        """This version: the kept one, or downloaded and then kept."""
        kept = shelf.kept()
        if kept and kept.version == wanted:
            try:
                return _of_disk(kept, self._device)
            except BundleError as error:
                log.warning(f"{self._uri}: the bundle kept on disk is damaged and is fetched again: {error}")
        with shelf.downloaded(wanted) as folder:
            reconstructor = Reconstructor(folder, self._device)
            shelf.keep(folder, wanted, reconstructor.bundle.digest)
        return reconstructor

    def _answer_with(self, reconstructor: Reconstructor, version: Version) -> None:
        self.reconstructor, self._version = reconstructor, version
        log.info(f"serving encoder {version.name} version {version.number} {reconstructor.bundle.digest}")


def _of_disk(kept: Kept, device: str) -> Reconstructor:
    reconstructor = Reconstructor(kept.folder, device)
    kept.require(reconstructor.bundle.digest)
    return reconstructor


def _factor(x_LT: np.ndarray, filtered_mv_LT: np.ndarray) -> float:
    """Millivolts per unit of the model's input, the same for all leads: the slope of one against the other."""
    x_T, mv_T = x_LT.astype(np.float64).ravel(), (filtered_mv_LT - filtered_mv_LT.mean(axis=1, keepdims=True)).ravel()
    return float(x_T @ mv_T / (x_T @ x_T))


def _rounded(values_T: np.ndarray) -> list[float]:
    return np.round(values_T.astype(np.float64), 4).tolist()
