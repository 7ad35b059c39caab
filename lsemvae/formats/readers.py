"""Which readers there are, and which of them recognises a file by its beginning."""

from collections.abc import Callable
from typing import Protocol

from lsemvae.formats import alivecor, cardiosoft, clinical, dicom, plain, wfdb
from lsemvae.record import Record

HEAD_BYTES = 4096
"""A reader recognises a file by as many bytes from its beginning."""

Fetch = Callable[[str], bytes]
"""Plain file name -> its bytes, from one folder; raises FileNotFoundError when it is absent."""


class Reader(Protocol):
    """`content` is what the file `name` holds; `uv_per_lsb` overrides its scale where that is known to be wrong."""

    def __call__(self, name: str, content: bytes, fetch: Fetch, *, uv_per_lsb: float | None = None) -> Record: ...


# In this order: the first that recognises the beginning of the file reads it. The surest signs come first.
READERS: list[tuple[Callable[[bytes], bool], Reader]] = [
    (alivecor.recognise_atc, alivecor.read_atc),
    (plain.recognise_npy, plain.read_npy),
    (dicom.recognise, dicom.read),
    (cardiosoft.recognise, cardiosoft.read),
    (clinical.recognise, clinical.read),
    (alivecor.recognise_kardia, alivecor.read_kardia),
    (wfdb.recognise, wfdb.read),
    (plain.recognise_csv, plain.read_csv),
]


def reader_of(head: bytes) -> Reader | None:
    """The reader of a file that begins with `head`, or None if the file is of no known format."""
    head = head[:HEAD_BYTES]
    return next((reader for recognise, reader in READERS if recognise(head)), None)
