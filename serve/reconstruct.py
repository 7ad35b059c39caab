"""Twelve leads from fewer, through a pre-trained encoder and its decoder. A reconstruction is not a measurement."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lsemvae.bundle import load
from lsemvae.errors import BundleError
from lsemvae.leads import in_order
from lsemvae.preprocess import preprocess
from lsemvae.record import Record
from serve.schema import LeadOut, ReconstructOut, RefusedOut
from serve.scoring import TORCH


class Reconstructor:
    """A pre-trained bundle that writes leads. Raises BundleError when it is a classifier, which has no decoder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.bundle, self._model = load(folder, device)
        if not hasattr(self._model, "reconstruct"):
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
            predicted = dict(zip(np.flatnonzero(accepted_B), predicted_BLT.float().cpu().numpy(), strict=True))
        outs = []
        for b, (record, id) in enumerate(zip(records, ids, strict=True)):
            if refusal := prepared.refused_B[b]:
                outs.append(ReconstructOut(id=id, refused=RefusedOut(code=refusal.code, reason=str(refusal))))
                continue
            mask_L = prepared.lead_mask_BL[b]
            if config.scale == "lead":  # an absent lead has no size that could be known
                seen_LT, factor = prepared.x_BLT[b], 1.0
            else:
                seen_LT = filtered.x_BLT[b]
                factor = _factor(prepared.x_BLT[b][mask_L], seen_LT[mask_L])
            rows = {
                lead: LeadOut(origin="derived" if lead in record.derived else "measured", values=_rounded(seen_LT[row]))
                for row, lead in enumerate(leads)
                if mask_L[row]
            }
            for row, lead in enumerate(self._model.decoder_leads):
                if lead not in rows:
                    rows[lead] = LeadOut(origin="reconstructed", values=_rounded(predicted[b][row] * factor))
            outs.append(
                ReconstructOut(
                    id=id,
                    rate_hz=config.rate_hz,
                    unit="standard deviations" if config.scale == "lead" else "mV",
                    leads={lead: rows[lead] for lead in in_order(rows)},
                )
            )
        return outs


def _factor(x_LT: np.ndarray, filtered_mv_LT: np.ndarray) -> float:
    """Millivolts for one unit of the model's input, the same for all leads: the slope between the two."""
    x_T, mv_T = x_LT.astype(np.float64).ravel(), (filtered_mv_LT - filtered_mv_LT.mean(axis=1, keepdims=True)).ravel()
    return float(x_T @ mv_T / (x_T @ x_T))


def _rounded(values_T: np.ndarray) -> list[float]:
    return np.round(values_T.astype(np.float64), 4).tolist()
