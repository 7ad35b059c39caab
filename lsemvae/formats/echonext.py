"""EchoNext's waveforms: thousands of recordings in one NPY file, of which only the bytes of one are read.

`EchoNext_{split}_waveforms.npy` is float64 [N, 1, 2500, 12]: 10 s at 250 Hz of the leads I to V6, up to 17 GB. The path
of a recording is that of the file, `#`, and its row from 0: `EchoNext_val_waveforms.npy#17`.

The numbers are no millivolts: the authors median-filtered each lead, clipped it and standardised it over the data set.
A `Record` holds millivolts, so one standard deviation is stored as a nominal `NOMINAL_MV` and the record has the flag
"no_millivolts". That value is the unit of the preprocessing's scale "fixed": a model then sees EchoNext's own numbers,
which differ between recordings as voltages do, and no limit in mV refuses them (10 mV would be 67 standard deviations).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats.plain import npy_layout
from lsemvae.leads import LEADS
from lsemvae.record import Record

ReadRange = Callable[[str, int, int], bytes]
"""Path, first byte and number of bytes -> these bytes of the file, or fewer where it ends."""

RATE_HZ = 250.0
SAMPLES = 2500
NOMINAL_MV = 0.15
"""What is stored for one standard deviation of the data set."""
MAX_SD = 60.0
"""Standardised and clipped ECGs stay far below this: a file with larger numbers is not EchoNext's."""

_HEAD_BYTES = 4096
_ROW = re.compile(r"(.+\.npy)#(\d{1,12})")


@dataclass(frozen=True)
class Waveforms:
    """What the header of a file declares: `rows` recordings of `dtype`, from byte `start`."""

    rows: int
    dtype: np.dtype
    start: int

    @property
    def row_bytes(self) -> int:
        return SAMPLES * len(LEADS) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """The size of the whole file."""
        return self.start + self.rows * self.row_bytes


def row_path(file: str, row: int) -> str:
    """The path of one recording in the file."""
    return f"{file}#{row}"


def is_row(path: str) -> bool:
    return _ROW.fullmatch(path) is not None


def waveforms(name: str, head: bytes) -> Waveforms:
    """`head` is the beginning of the file `name`. Nothing is unpickled. Raises UnreadableRecording."""
    try:
        layout = npy_layout(head[:_HEAD_BYTES])
    except UnreadableRecording as error:
        raise UnreadableRecording(error.code, f"{name}: {error}") from None
    expected = f"EchoNext's waveforms are float64 [N, 1, {SAMPLES}, {len(LEADS)}]: download the file again"
    if layout.dtype.kind != "f" or layout.dtype.itemsize not in (4, 8):
        raise UnreadableRecording("format", f"{name}: its numbers are {str(layout.dtype)[:40]}, {expected}")
    if layout.is_fortran or layout.shape[1:] != (1, SAMPLES, len(LEADS)):
        order = " in Fortran's order" if layout.is_fortran else ""
        raise UnreadableRecording("length", f"{name}: its array has shape {str(layout.shape)[:80]}{order}, {expected}")
    return Waveforms(layout.shape[0], layout.dtype, layout.start)


def read_row(path: str, read_range: ReadRange) -> Record:
    """The recording at a path such as `EchoNext_val_waveforms.npy#17`; two short ranges of the file are read.

    Raises UnreadableRecording, FileNotFoundError, and other errors of `read_range`.
    """
    match = _ROW.fullmatch(path)
    assert match is not None
    file, row = match[1], int(match[2])
    try:
        layout = waveforms(file, read_range(file, 0, _HEAD_BYTES))
        if row >= layout.rows:
            raise UnreadableRecording("missing_file", f"{path}: the file has {layout.rows} rows: check the table")
        content = read_range(file, layout.start + row * layout.row_bytes, layout.row_bytes)
    except FileNotFoundError:
        raise UnreadableRecording("missing_file", f"{file!r} does not exist: check the path") from None
    if len(content) < layout.row_bytes:
        raise UnreadableRecording(
            "truncated",
            f"{path}: the file ends {layout.row_bytes - len(content)} bytes too early: copy the whole file again",
        )
    values_TL = np.frombuffer(content, dtype=layout.dtype).reshape(SAMPLES, len(LEADS))
    largest = float(np.fmax.reduce(np.abs(values_TL), axis=None))
    if not (math.isnan(largest) or largest <= MAX_SD):
        raise UnreadableRecording(
            "sample",
            f"{path}: a number is {largest:.3g}, standardised ones are below {MAX_SD:g}: download the file again",
        )
    return Record(
        leads=LEADS,
        signal_mv_LT=np.ascontiguousarray((values_TL.T * NOMINAL_MV).astype(np.float32)),
        rate_hz=RATE_HZ,
        record_id=path.rpartition("/")[2],
        flags=("no_millivolts",),
    )
