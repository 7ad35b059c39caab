"""Deletion and insertion: how the logit changes while a recording is taken away piece by piece, or put back.

A cell is one lead in one piece of time. An order removes the cells that should matter most first (Samek et al. 2017,
IEEE Trans Neural Netw Learn Syst 28:2660). If attributions are true, the logit then reaches that of the baseline sooner
than in a random order. What is removed is replaced by the baseline of the explanation, so every order begins and ends
with the same two logits, and their difference is what the attributions divide among the samples.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsemvae.explain.attribution import START, logits
from lsemvae.models.parts.shifts import recorded_samples

Kind = Literal["deletion", "insertion"]
KINDS: tuple[Kind, ...] = ("deletion", "insertion")
SHARES = np.array([0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
PASS = 64  # occluded recordings made at once: more would only cost memory


class Cells(NamedTuple):
    """The pieces of time, and which cells of each recording hold something of it: present leads, no padding."""

    piece_T: Tensor
    there_BLP: Tensor

    @classmethod
    def of(cls, x_BLT: Tensor, lead_mask_BL: Tensor, samples: int) -> "Cells":
        """Cells of so many samples. The last piece may be shorter."""
        piece_T = torch.arange(x_BLT.shape[-1], device=x_BLT.device) // samples
        starts_P = torch.arange(int(piece_T[-1]) + 1, device=x_BLT.device) * samples
        inside_BP = starts_P < recorded_samples(torch.where(lead_mask_BL[..., None], x_BLT, 0.0))[:, None]
        return cls(piece_T, lead_mask_BL[..., None] & inside_BP[:, None])

    def sums(self, values_BLT: Tensor) -> Tensor:
        """values_BLP, the sum of the samples of each cell."""
        sums_BLP = values_BLT.new_zeros(self.there_BLP.shape)
        return sums_BLP.index_add_(2, self.piece_T, values_BLT)


class Removal:
    """Removes cells of some recordings. `baseline_BLT` replaces them, but for a share of `START`; None is zeros."""

    def __init__(
        self, model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, baseline_BLT: Tensor | None, samples: int
    ) -> None:
        self._model, self._x_BLT, self._mask_BL = model, x_BLT, lead_mask_BL
        self.cells = Cells.of(x_BLT, lead_mask_BL, samples)
        inside_BLT = self.cells.there_BLP[..., self.cells.piece_T]
        baseline_BLT = torch.zeros_like(x_BLT) if baseline_BLT is None else baseline_BLT
        self._gone_BLT = torch.where(inside_BLT, baseline_BLT + START * (x_BLT - baseline_BLT), x_BLT)
        self.logit_B = logits(self._model, x_BLT, lead_mask_BL)
        self.baseline_logit_B = logits(self._model, self._gone_BLT, lead_mask_BL)
        self.direction_B = np.sign(self.logit_B - self.baseline_logit_B)
        """The sign of the change from the baseline: what speaks for the score is removed first."""

    def order(self, values_BLP: Tensor) -> Tensor:
        """rank_BLP: 0 for the cell with the largest value, in the direction of the score. Cells not there come last."""
        towards_B = torch.from_numpy(self.direction_B).to(values_BLP)
        return self._ranks(values_BLP * towards_B[:, None, None])

    def random_order(self, rng: np.random.Generator) -> Tensor:
        """The same in random order."""
        return self._ranks(torch.from_numpy(rng.random(self.cells.there_BLP.shape)).to(self._x_BLT))

    def _ranks(self, values_BLP: Tensor) -> Tensor:
        there_BN = self.cells.there_BLP.flatten(1)
        sorted_BN = (
            values_BLP.flatten(1).masked_fill(~there_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
        )
        return sorted_BN.argsort(dim=1).view(values_BLP.shape)

    def effects(self, progress: Callable[[int], object] = lambda _: None) -> Tensor:
        """Occlusion, effect_BLP: the logit less that without the cell, one pass for each cell; 0 where none is there.

        `progress` is told how many recordings are done.
        """
        effect_BLP = self._x_BLT.new_zeros(self.cells.there_BLP.shape)
        for b in range(len(self._x_BLT)):
            places_N2 = self.cells.there_BLP[b].nonzero()
            for part_N2 in places_N2.split(PASS):
                x_NLT = self._x_BLT[b].expand(len(part_N2), -1, -1).clone()
                for n, (lead, piece) in enumerate(part_N2.tolist()):
                    gone_T = self.cells.piece_T == piece
                    x_NLT[n, lead, gone_T] = self._gone_BLT[b, lead, gone_T]
                logit_N = logits(self._model, x_NLT, self._mask_BL[b].expand(len(part_N2), -1))
                drop_N = torch.from_numpy(self.logit_B[b] - logit_N).to(effect_BLP)
                effect_BLP[b, part_N2[:, 0], part_N2[:, 1]] = drop_N
            progress(1)
        return effect_BLP

    def left(self, rank_BLP: Tensor, kind: Kind) -> np.ndarray:
        """left_BS: the logit's distance from the baseline's, positive on the recording's side, at each of `SHARES`.

        deletion: without that share of the cells, the first in the order. insertion: with that share alone.
        """
        count_B = self.cells.there_BLP.sum(dim=(1, 2))
        logit_SB = []
        for share in SHARES.tolist():
            first_BLP = rank_BLP < (share * count_B).round()[:, None, None]
            gone_BLP = first_BLP if kind == "deletion" else ~first_BLP
            x_BLT = torch.where(gone_BLP[..., self.cells.piece_T], self._gone_BLT, self._x_BLT)
            logit_SB.append(logits(self._model, x_BLT, self._mask_BL))
        return ((np.stack(logit_SB) - self.baseline_logit_B) * self.direction_B).T
