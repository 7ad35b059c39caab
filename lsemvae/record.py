"""`Record`: one ECG as recorded, with its leads by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_FROM_I_II, canonical, in_order


@dataclass(frozen=True, eq=False)
class Record:
    """One recording. Leads that are not in `leads` are missing; leads in `derived` were computed from I and II.

    leads          canonical names, in the fixed order I … V6
    signal_mv_LT   float32, in millivolts, unfiltered; NaN where nothing was recorded
    rate_hz        samples a second
    uv_per_lsb_L   the recorder's step in microvolts for each lead, if known: shards then keep the recorder's integers
                   exactly
    flags          doubts of the reader, such as "checksum:V1"; see `quality.FLAGS`
    """

    leads: tuple[str, ...]
    signal_mv_LT: np.ndarray
    rate_hz: float
    record_id: str = ""
    subject_id: str | None = None
    derived: tuple[str, ...] = ()
    uv_per_lsb_L: np.ndarray | None = None
    flags: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        assert self.signal_mv_LT.ndim == 2 and len(self.leads) == len(self.signal_mv_LT)
        assert self.uv_per_lsb_L is None or len(self.uv_per_lsb_L) == len(self.leads)

    @classmethod
    def from_leads(
        cls,
        signal_mv: Mapping[str, Sequence[float] | np.ndarray],
        rate_hz: float,
        *,
        uv_per_lsb: Mapping[str, float] | None = None,
        record_id: str = "",
        subject_id: str | None = None,
        flags: tuple[str, ...] = (),
    ) -> "Record":
        """From a mapping of lead names, in any order and case, to millivolts.

        III, aVR, aVL and aVF are derived if they are absent and both I and II are present. Raises LsemvaeError for an
        unknown or repeated lead, leads of unequal length, an empty lead, or a rate that is not positive and finite.
        """
        leads = in_order(signal_mv)
        if not (np.isfinite(rate_hz) and rate_hz > 0):
            raise LsemvaeError(f"the rate is {rate_hz}: give samples a second, such as 500")
        try:
            rows = {canonical(name): np.asarray(row, dtype=np.float32) for name, row in signal_mv.items()}
        except (TypeError, ValueError) as error:
            raise LsemvaeError(f"leads must be flat lists of millivolts: {str(error)[:100]}") from None
        lengths = {row.shape for row in rows.values()}
        if any(len(shape) != 1 for shape in lengths) or len(lengths) != 1 or lengths == {(0,)}:
            shown = ", ".join(f"{lead} {list(rows[lead].shape)}" for lead in leads)
            raise LsemvaeError(f"leads must be equally long, flat lists of millivolts; got {shown}")
        steps = {canonical(name): step for name, step in (uv_per_lsb or {}).items()}
        record = cls(
            leads=leads,
            signal_mv_LT=np.stack([rows[lead] for lead in leads]),
            rate_hz=float(rate_hz),
            record_id=record_id,
            subject_id=subject_id,
            uv_per_lsb_L=np.array([steps[lead] for lead in leads]) if steps else None,
            flags=flags,
        )
        return record.with_derived_limb_leads()

    def with_derived_limb_leads(self) -> "Record":
        """With III = II - I, aVR = -(I + II)/2, aVL = I - II/2 and aVF = II - I/2 where they are absent."""
        absent = [lead for lead in LIMB_FROM_I_II if lead not in self.leads]
        if not absent or "I" not in self.leads or "II" not in self.leads:
            return self
        rows = dict(zip(self.leads, self.signal_mv_LT, strict=True))
        steps = dict(zip(self.leads, self.uv_per_lsb_L, strict=True)) if self.uv_per_lsb_L is not None else {}
        for lead in absent:
            of_i, of_ii = LIMB_FROM_I_II[lead]
            rows[lead] = np.float32(of_i) * rows["I"] + np.float32(of_ii) * rows["II"]
            if steps:  # exact if I and II have the same step, else to a quarter of the finer step
                steps[lead] = min(steps["I"], steps["II"]) / 2
        leads = in_order(rows)
        return replace(
            self,
            leads=leads,
            signal_mv_LT=np.stack([rows[lead] for lead in leads]),
            uv_per_lsb_L=np.array([steps[lead] for lead in leads]) if steps else None,
            derived=tuple(lead for lead in leads if lead in absent or lead in self.derived),
        )

    def origin(self, lead: str) -> str:
        """`"measured"`, `"derived"` or `"missing"`."""
        lead = canonical(lead)
        if lead not in self.leads:
            return "missing"
        return "derived" if lead in self.derived else "measured"

    def signal_for(self, leads: Sequence[str] = LEADS) -> np.ndarray:
        """Millivolts of the given leads in the given order, float32 [L, T]; a missing lead is all NaN."""
        signal_mv_LT = np.full((len(leads), self.signal_mv_LT.shape[1]), np.nan, dtype=np.float32)
        for row, lead in enumerate(leads):
            if lead in self.leads:
                signal_mv_LT[row] = self.signal_mv_LT[self.leads.index(lead)]
        return signal_mv_LT
