"""Reconstructs missing leads with a pre-trained encoder and its decoder. A reconstruction is not a measurement."""

import asyncio
import logging
from collections.abc import Sequence
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
from lsemvae.tracking import fetched, locate, parse_model
from serve.schema import LeadOut, Origin, ReconstructOut, RefusedOut
from serve.scoring import TORCH
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
        return await asyncio.get_running_loop().run_in_executor(TORCH, self._reconstruct, records, ids)

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


def load_encoder(uri: str, folder: Path, device: str) -> Reconstructor:
    """The encoder that the URI names; a registered one is kept under `folder`, and answers while MLflow is away.

    Raises LsemvaeError when it cannot be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not uri.startswith("models:/"):
        with fetched(uri, folder) as found:
            return Reconstructor(found.folder, device)
    with locked_shelf(folder, "encoder", parse_model(uri)[0]) as shelf:
        kept = shelf.kept()
        try:
            return _current(uri, shelf, kept, device)
        except LsemvaeError as error:
            if kept is None:
                raise
            log.error(f"{uri}: {error}; version {kept.version.number}, kept on disk, answers")
            return _of_disk(kept, device)


def _current(uri: str, shelf: Shelf, kept: Kept | None, device: str) -> Reconstructor:
    """The version that the URI names now: the kept one, or downloaded and then kept."""
    wanted = locate(uri)
    if kept and kept.version == wanted:
        try:
            return _of_disk(kept, device)
        except BundleError as error:
            log.warning(f"{uri}: the bundle kept on disk is damaged and is fetched again: {error}")
    with shelf.downloaded(wanted) as folder:
        reconstructor = Reconstructor(folder, device)
        shelf.keep(folder, wanted, reconstructor.bundle.digest)
    return reconstructor


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
