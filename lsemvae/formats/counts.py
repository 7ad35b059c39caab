"""Leads that share one step and one length and have no offset -> `Record`, for simple formats."""

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
    """One-dimensional numbers of each lead, times `uv_per_lsb` microvolts -> Record named after the file.

    Lead names may be in any case; `Record.from_leads` derives the limb leads that are absent. NaN means nothing was
    recorded. With `step_known` the numbers are integers and the record keeps the step, so that the integers can be
    restored. Raises UnreadableRecording for what `leadwise.to_record` refuses, an unknown lead, or leads of unequal
    length.
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
