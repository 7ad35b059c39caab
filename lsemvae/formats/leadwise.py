"""Leads, each with its own step, offset and first sample -> `Record`. For dicom.py and clinical.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats.limits import GIVE_STEP, MAX_SAMPLES, MAX_TOTAL_SAMPLES, RATE_RANGE_HZ, STEP_RANGE_UV
from lsemvae.leads import LEADS
from lsemvae.record import Record

MAX_MV = 1e13
"""32-bit counts of the largest step stay below. float32 reaches 3e38, which leaves room for sums of leads."""


@dataclass(frozen=True, eq=False)
class LeadCounts:
    """One lead as stored: `step_uv * count + offset_uv` microvolts; NaN where nothing was recorded."""

    lead: str
    counts_T: np.ndarray
    step_uv: float
    offset_uv: float = 0.0
    start: int = 0
    """Position of the first sample on the time axis that all leads share; it may be negative."""


def to_record(name: str, leads: Sequence[LeadCounts], rate_hz: float, *, flags: tuple[str, ...] = ()) -> Record:
    """The leads on one time axis, in millivolts; NaN before a lead begins and after it ends.

    The record keeps the steps, so that shards can store the exact integers. Raises UnreadableRecording for no lead, a
    lead that is named twice or empty, a rate, step or offset out of range, too many samples, or a sample that is larger
    than any 32-bit count.
    """
    names = [lead.lead for lead in leads]
    if not names:
        raise UnreadableRecording("no_ecg_lead", f"none of its signals is one of {', '.join(LEADS)}")
    if twice := sorted({lead for lead in names if names.count(lead) > 1}):
        raise UnreadableRecording("duplicate_lead", f"lead {', '.join(twice)} occurs twice: give each lead once")
    if not RATE_RANGE_HZ[0] <= rate_hz <= RATE_RANGE_HZ[1]:
        raise UnreadableRecording(
            "rate", f"the rate is {rate_hz:.6g}: rates from {RATE_RANGE_HZ[0]:g} to {RATE_RANGE_HZ[1]:g} Hz can be read"
        )
    for lead in leads:
        if not len(lead.counts_T):
            raise UnreadableRecording("length", f"lead {lead.lead} has no samples: export it again")
        low, high = STEP_RANGE_UV
        if not (low <= abs(lead.step_uv) <= high and abs(lead.offset_uv) < 1e9):
            raise UnreadableRecording(
                "gain",
                f"lead {lead.lead} has a step of {lead.step_uv:g} uV and an offset of {lead.offset_uv:g} uV: the step "
                f"must be {low:g} to {high:g} uV. Check its unit; {GIVE_STEP}",
            )
    first = min(lead.start for lead in leads)
    samples = max(lead.start + len(lead.counts_T) for lead in leads) - first
    if samples > MAX_SAMPLES or samples * len(leads) > MAX_TOTAL_SAMPLES:
        raise UnreadableRecording(
            "too_large",
            f"it has {samples} samples from first to last, {samples * len(leads)} in all leads: {MAX_SAMPLES} and "
            f"{MAX_TOTAL_SAMPLES} are the limits",
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
