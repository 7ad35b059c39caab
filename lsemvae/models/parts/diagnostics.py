"""Diagnostics of a pass over held-out records: active units, KL per unit, and reconstruction of each lead.

`Diagnostics` holds nothing but sums, so it is filled batch by batch and added up across workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lsemvae.leads import LIMB_FROM_I_II
from lsemvae.models.parts.objectives import kl_to_prior

# Burda et al. 2016: a unit is active if the variance of its posterior mean over the data exceeds this.
ACTIVE_VARIANCE = 0.01


@dataclass
class Diagnostics:
    """Sums over a validation pass, in float64. D latent units, L the decoder's leads.

    records []            records seen
    mu_D, mu_square_D     of the posterior means
    kl_D                  KL to the prior in nats
    r_L, r_count_L        Pearson's r of target and reconstruction within a record, where the target varies
    error_L, points_L     squared error, and the time points it is over
    """

    records: Tensor
    mu_D: Tensor
    mu_square_D: Tensor
    kl_D: Tensor
    r_L: Tensor
    r_count_L: Tensor
    error_L: Tensor
    points_L: Tensor

    @classmethod
    def empty(cls, latent: int, leads: int, device: torch.device | str = "cpu") -> Self:
        """All sums at zero."""
        shapes = {"records": (), **{f.name: (latent,) for f in fields(cls) if f.name.endswith("_D")}}
        return cls(
            **{
                f.name: torch.zeros(shapes.get(f.name, (leads,)), dtype=torch.float64, device=device)
                for f in fields(cls)
            }
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums themselves, always in one order: all-reduce each in place to add up the workers."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @torch.no_grad()
    def update(
        self,
        mu_BD: Tensor,
        logvar_BD: Tensor,
        prediction_BLT: Tensor,
        target_BLT: Tensor,
        target_mask_BL: Tensor,
    ) -> None:
        """Add a batch: its posterior, and its reconstruction compared with the observed target leads."""
        mu_BD = mu_BD.double()
        self.records += len(mu_BD)
        self.mu_D += mu_BD.sum(dim=0)
        self.mu_square_D += mu_BD.square().sum(dim=0)
        self.kl_D += kl_to_prior(mu_BD, logvar_BD.double()).sum(dim=0)

        mask_BL1 = target_mask_BL.unsqueeze(-1)
        target_BLT = torch.where(mask_BL1, target_BLT, 0).float()
        prediction_BLT = torch.where(mask_BL1, prediction_BLT, 0).float()
        self.error_L += (prediction_BLT - target_BLT).square().sum(dim=-1).double().sum(dim=0)
        self.points_L += target_mask_BL.sum(dim=0) * target_BLT.shape[-1]
        r_BL, varies_BL = pearson_r(prediction_BLT, target_BLT)
        self.r_L += r_BL.double().sum(dim=0)
        self.r_count_L += varies_BL.sum(dim=0)

    def active_units(self) -> int:
        """Units whose posterior mean varies over the records by more than 0.01 (Burda et al. 2016)."""
        mean_D = self.mu_D / self.records
        return int((self.mu_square_D / self.records - mean_D.square() > ACTIVE_VARIANCE).sum())

    def collapsed(self, least_share: float = 0.05) -> str | None:
        """One sentence if fewer than this share of the units (and at least one) is active, else None."""
        active, latent = self.active_units(), len(self.mu_D)
        if active >= max(1.0, least_share * latent):
            return None
        return (
            f"the posterior has collapsed: {active} of {latent} latent units are active "
            f"and the KL is {float(self.kl_D.sum() / self.records):.3g} nats a record; "
            "raise reconstruction_weight or lower beta"
        )

    def summary(self, leads: Sequence[str]) -> dict[str, float]:
        """Metrics by name for the decoder's `leads`: `active_units`, `kl_per_unit_max`, `r/V1`, `rmse/V1` …

        A lead that was never a target has no metric. RMSE is in the unit of the model's input.
        """
        assert len(leads) == len(self.r_L)
        kl_D = self.kl_D / self.records
        values = {
            "active_units": float(self.active_units()),
            "active_share": self.active_units() / len(self.mu_D),
            "kl_per_unit_mean": float(kl_D.mean()),
            "kl_per_unit_max": float(kl_D.max()),
        }
        for row, lead in enumerate(leads):
            if self.r_count_L[row] > 0:
                values[f"r/{lead}"] = float(self.r_L[row] / self.r_count_L[row])
            if self.points_L[row] > 0:
                values[f"rmse/{lead}"] = float((self.error_L[row] / self.points_L[row]).sqrt())
        return values


class Evaluated(NamedTuple):
    """What a variational model gives for a batch of held-out records.

    `terms` are means over the batch, `prediction_BLT` is decoded from the posterior mean.
    """

    terms: Mapping[str, Tensor]
    mu_BD: Tensor
    logvar_BD: Tensor
    prediction_BLT: Tensor
    target_BLT: Tensor
    target_mask_BL: Tensor


class ReconstructionPass:
    """A validation pass of a model with a latent and a decoder; see `lsemvae.models.contract.Validation`."""

    def __init__(
        self,
        evaluate: Callable[[Mapping[str, Tensor]], Evaluated],
        terms: Sequence[str],
        latent: int,
        leads: Sequence[str],
        device: torch.device,
    ) -> None:
        self._evaluate, self._leads = evaluate, leads
        # All from the start: a worker whose records were all refused must reduce as many sums as the others.
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in terms}
        self._diagnostics = Diagnostics.empty(latent, len(leads), device)

    @torch.no_grad()
    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Add a batch."""
        found = self._evaluate(batch)
        size = len(found.mu_BD)
        for name, total in self._sums.items():
            total += found.terms[name].double() * size
        self._diagnostics.update(
            found.mu_BD, found.logvar_BD, found.prediction_BLT, found.target_BLT, found.target_mask_BL
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, always in the same order."""
        return (*self._sums.values(), *self._diagnostics.tensors())

    def metrics(self) -> dict[str, float]:
        """Means of the terms, the diagnostics, the mean of the leads' Pearson r, and whether the latent is used."""
        values = {name: float(total / self._diagnostics.records) for name, total in self._sums.items()}
        values |= self._diagnostics.summary(self._leads)
        by_lead = [value for name, value in values.items() if name.startswith("r/")]
        values["pearson_r"] = sum(by_lead) / max(len(by_lead), 1)
        values["collapsed"] = float(self._diagnostics.collapsed() is not None)
        return values


def pearson_r(prediction_BLT: Tensor, target_BLT: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson's r over time, [B, L], and where the target varies at all, [B, L] bool; r is 0 elsewhere.

    A constant reconstruction has r = 0: it holds no information about its target.
    """
    prediction_BLT = prediction_BLT - prediction_BLT.mean(dim=-1, keepdim=True)
    target_BLT = target_BLT - target_BLT.mean(dim=-1, keepdim=True)
    norm_BL = prediction_BLT.norm(dim=-1) * target_BLT.norm(dim=-1)
    r_BL = (prediction_BLT * target_BLT).sum(dim=-1) / norm_BL.clamp(min=torch.finfo(norm_BL.dtype).tiny)
    return r_BL, target_BLT.norm(dim=-1) > 0


def einthoven_rmse(x_BLT: Tensor, leads: Sequence[str]) -> Mapping[str, float]:
    """How far limb leads are from Einthoven's relations to I and II: RMSE by lead, in the unit of `x_BLT`.

    `x_BLT` must be on one scale for all leads (millivolts): leads that were standardised one by one do not
    keep the relations. Leads without a relation are ignored; without both I and II the answer is empty.
    """
    leads = list(leads)
    if "I" not in leads or "II" not in leads:
        return {}
    i_BT, ii_BT = x_BLT[:, leads.index("I")].double(), x_BLT[:, leads.index("II")].double()
    residual = {
        lead: x_BLT[:, leads.index(lead)].double() - (of_i * i_BT + of_ii * ii_BT)
        for lead, (of_i, of_ii) in LIMB_FROM_I_II.items()
        if lead in leads
    }
    return {lead: float(values_BT.square().mean().sqrt()) for lead, values_BT in residual.items()}
