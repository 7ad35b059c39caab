"""Leads that all have one step, one length and no offset -> `Record`: for formats that are this simple."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import leadwise
from lsemvae.leads import canonical
from lsemvae.record import Record


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the file's name before the message of an UnreadableRecording raised inside."""
    try:
        yield
    except UnreadableRecording as error:
        raise UnreadableRecording(error.code, f"{name}: {error}") from None


def to_record(
    name: str,
    counts: Mapping[str, np.ndarray],
    rate_hz: float,
    uv_per_lsb: float,
    *,
    step_known: bool = True,
    flags: tuple[str, ...] = (),
) -> Record:
    """Numbers of each lead, one-dimensional, times `uv_per_lsb` microvolts -> Record named after the file.

    Leads are named in any case; derived are those that `Record.from_leads` derives. NaN means that nothing was
    recorded. With `step_known` the numbers are integers, and the record keeps the step, so that they can be had
    back. Raises UnreadableRecording: what `leadwise.to_record` refuses, an unknown lead, leads of unequal length.
    """
    try:
        leads = [leadwise.LeadCounts(canonical(lead), row_T, uv_per_lsb) for lead, row_T in counts.items()]
    except LsemvaeError as error:
        raise UnreadableRecording("no_ecg_lead", str(error)) from None
    if len({len(lead.counts_T) for lead in leads}) > 1:
        shown = ", ".join(f"{lead.lead} {len(lead.counts_T)}" for lead in leads)
        raise UnreadableRecording("length", f"its leads must be equally long; they have {shown} samples")
    record = leadwise.to_record(name, leads, rate_hz, flags=flags)
    return record if step_known else replace(record, uv_per_lsb_L=None)
