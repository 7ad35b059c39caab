"""WFDB records, made by the tests."""

from collections.abc import Mapping, Sequence

import numpy as np

from lsemvae.leads import LEADS


def header(
    signals: Sequence[str],
    *,
    samples: object = 20,
    n_signals: object = None,
    rate: object = 500,
    file: str = "r.dat",
    layout: str = "16",
    gain: str = "200.0(0)/mV",
    checksums: Sequence[int] | None = None,
    record: str = "r",
    comments: Sequence[str] = (),
) -> bytes:
    """A header with one line a signal; the checksum of zeros is zero."""
    lines = [f"{record} {len(signals) if n_signals is None else n_signals} {rate} {samples}"]
    for index, name in enumerate(signals):
        checksum = checksums[index] if checksums else 0
        lines.append(f"{file} {layout} {gain} 16 0 0 {checksum} 0 {name}")
    return "\n".join([*lines, *comments, ""]).encode()


def record_files(raw: Mapping[str, np.ndarray], **options: object) -> dict[str, bytes]:
    """Format 16, checksums as they should be."""
    counts_LT = np.stack(list(raw.values())).astype("<i2")
    checksums = [int(row.sum(dtype=np.int64)) % 65536 for row in counts_LT]
    options = {"samples": counts_LT.shape[1], "checksums": checksums} | options
    return {"r.hea": header(list(raw), **options), "r.dat": counts_LT.T.tobytes()}


VALID = record_files({lead: np.arange(20) * 7 for lead in LEADS}, comments=["# <subject_id>: 1"])
