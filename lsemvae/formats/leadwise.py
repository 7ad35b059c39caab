"""Leads that each have a step, an offset and a first sample of their own -> `Record`. For dicom.py and clinical.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats.limits import MAX_SAMPLES, MAX_TOTAL_SAMPLES, RATE_RANGE_HZ, STEP_RANGE_UV
from lsemvae.leads import LEADS
from lsemvae.record import Record

MAX_MV = 1e13
"""32-bit counts of the largest step stay below; float32 goes on to 3e38, but sums of leads must not reach its end."""


@dataclass(frozen=True, eq=False)
class LeadCounts:
    """One lead as stored: `step_uv * count + offset_uv` microvolts, NaN where nothing was recorded."""

    lead: str
    counts_T: np.ndarray
    step_uv: float
    offset_uv: float = 0.0
    start: int = 0
    """Where the first sample stands on a time axis that all leads share; it may be negative."""


def to_record(name: str, leads: Sequence[LeadCounts], rate_hz: float, *, flags: tuple[str, ...] = ()) -> Record:
    """The leads on one time axis, in millivolts; NaN where one had not begun yet, or had ended.

    Steps are kept, so that shards have the exact integers. Raises UnreadableRecording: no lead, one named twice
    or empty, a rate, step or offset out of range, too many samples, one that no 32-bit count could be.
    """
    names = [lead.lead for lead in leads]
    if not names:
        raise UnreadableRecording("no_ecg_lead", f"none of its signals is one of {', '.join(LEADS)}")
    if twice := sorted({lead for lead in names if names.count(lead) > 1}):
        raise UnreadableRecording("duplicate_lead", f"lead {', '.join(twice)} is there twice: give each lead once")
    if not RATE_RANGE_HZ[0] <= rate_hz <= RATE_RANGE_HZ[1]:
        raise UnreadableRecording(
            "rate", f"the rate is {rate_hz:.6g}: from {RATE_RANGE_HZ[0]:g} to {RATE_RANGE_HZ[1]:g} Hz"
        )
    for lead in leads:
        if not len(lead.counts_T):
            raise UnreadableRecording("length", f"lead {lead.lead} has no samples: export it again")
        low, high = STEP_RANGE_UV
        if not (low <= abs(lead.step_uv) <= high and abs(lead.offset_uv) < 1e9):
            raise UnreadableRecording(
                "gain",
                f"lead {lead.lead} has a step of {lead.step_uv:g} uV and an offset of {lead.offset_uv:g} uV: the step "
                f"must be {low:g} to {high:g} uV; correct it, or give the step (uv_per_lsb)",
            )
    first = min(lead.start for lead in leads)
    samples = max(lead.start + len(lead.counts_T) for lead in leads) - first
    if samples > MAX_SAMPLES or samples * len(leads) > MAX_TOTAL_SAMPLES:
        raise UnreadableRecording(
            "too_large",
            f"{samples} samples from first to last, {samples * len(leads)} in all leads: {MAX_SAMPLES} and "
            f"{MAX_TOTAL_SAMPLES} are allowed",
        )
    signal_mv = {}
    for lead in leads:
        row_T = np.full(samples, np.nan, dtype=np.float32)
        begin = lead.start - first
        with np.errstate(over="ignore"):
            row_T[begin : begin + len(lead.counts_T)] = (lead.counts_T * lead.step_uv + lead.offset_uv) / 1000
        if (np.abs(row_T) > MAX_MV).any():
            raise UnreadableRecording("sample", f"lead {lead.lead} has a sample beyond {MAX_MV:g} mV: export it again")
        signal_mv[lead.lead] = row_T
    return Record.from_leads(
        signal_mv,
        rate_hz,
        uv_per_lsb={lead.lead: abs(lead.step_uv) for lead in leads},
        record_id=PurePath(name).stem,
        flags=flags,
    )
