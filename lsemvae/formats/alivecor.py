"""AliveCor KardiaMobile: `.atc` files of one or six leads, and the JSON that the Kardia API answers with.

The six-lead recorder measures I and II; the other limb leads it stores are arithmetic on these two. They are kept
as stored, and called derived where they are that arithmetic to one count. Where they are not, something is
damaged: then they pass as measured, so that the contradiction is flagged.

Layout of `.atc`, little-endian, seen on files: `ALIVE` and three zeros, a version, then blocks of a 4-character
name, a length, as many bytes, and the sum of all bytes before it in the block, which some apps take as signed.
The block `info` holds identifiers and is not looked at.
JSON: "Single ECG" of https://developers.kardia.com
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import strict_json
from lsemvae.formats.counts import naming, to_record
from lsemvae.leads import LIMB_LEADS, canonical
from lsemvae.record import Record

_MAGIC = b"ALIVE\0\0\0"
_MAX_BLOCKS = 1000
_BLOCK_LEADS = dict(zip((b"ecg ", b"ecg2", b"ecg3", b"ecg4", b"ecg5", b"ecg6"), LIMB_LEADS, strict=True))
_FORMAT = struct.Struct("<BHHBH")  # encoding, Hz, nV a count, flags, reserved
_INT16 = 1

# One of these is in the first 4 KiB, whichever way its fields are ordered.
_KARDIA_NAMES = (b'"recordedAt"', b'"algorithmDetermination"', b'"amplitudeResolution"', b'"leadI"', b'"data12L"')


def recognise_atc(head: bytes) -> bool:
    return head.startswith(_MAGIC)


def read_atc(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the `.atc` file `name` -> Record. `fetch` is not used.

    A lead's block whose checksum is neither the unsigned nor the signed sum is flagged `checksum:LEAD`; that of
    `fmt `, which says rate and step, is refused. `uv_per_lsb` replaces the file's resolution.
    Raises UnreadableRecording.
    """
    with naming(name):
        layout, counts, corrupt = None, {}, []
        for kind, payload, is_intact in _blocks(content):
            if kind == b"fmt ":
                if layout is not None or len(payload) != _FORMAT.size:
                    raise UnreadableRecording("header", "its fmt block is there twice or of another size: export again")
                if not is_intact():
                    raise UnreadableRecording(
                        "checksum", "its fmt block, rate and resolution, is damaged: export the recording again"
                    )
                layout = _FORMAT.unpack(payload)
            elif lead := _BLOCK_LEADS.get(kind):
                if lead in counts:
                    raise UnreadableRecording("duplicate_lead", f"lead {lead} is there twice: export it again")
                if len(payload) % 2:
                    raise UnreadableRecording("truncated", f"lead {lead} ends within a sample: export it again")
                counts[lead] = np.frombuffer(payload, dtype="<i2")
                if not is_intact():
                    corrupt.append(lead)
        if layout is None:
            raise UnreadableRecording("header", "no fmt block says its rate and resolution: export it again")
        encoding, rate_hz, nv_per_lsb, _, _ = layout
        if encoding != _INT16:
            raise UnreadableRecording("format", f"its samples are of encoding {encoding}: 1 (16 bits) can be read")
        flags = tuple(f"checksum:{lead}" for lead in LIMB_LEADS if lead in corrupt)
        return _with_derived_marked(to_record(name, counts, rate_hz, uv_per_lsb or nv_per_lsb / 1000, flags=flags))


def _blocks(content: bytes) -> Iterator[tuple[bytes, memoryview, Callable[[], bool]]]:
    """Name, payload, and whether the checksum is right, which is only computed when it is asked for."""
    view, start = memoryview(content), 12
    for _ in range(_MAX_BLOCKS):
        if start == len(content):
            return
        if len(content) < start + 12:
            raise UnreadableRecording("truncated", "it ends within a block: export it again, whole")
        kind, length = struct.unpack_from("<4sI", view, start)
        end = start + 8 + length
        if len(content) < end + 4:
            raise UnreadableRecording(
                "truncated",
                f"a block of {length} bytes is declared, {max(len(content) - start - 12, 0)} are there: "
                "export it again, whole",
            )
        block, checksum = view[start:end], struct.unpack_from("<I", view, end)[0]

        def is_intact(block: memoryview = block, checksum: int = checksum) -> bool:
            sums = (int(np.frombuffer(block, dtype=kind).sum(dtype=np.int64)) for kind in (np.uint8, np.int8))
            return any(total % 2**32 == checksum for total in sums)

        yield kind, block[8:], is_intact
        start = end + 4
    if start != len(content):
        raise UnreadableRecording("too_large", f"more than {_MAX_BLOCKS} blocks: export it again")


def recognise_kardia(head: bytes) -> bool:
    """An object with one of the names that a recording of the Kardia API has."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(name in head for name in _KARDIA_NAMES)


def read_kardia(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the JSON of one recording in the file `name` -> Record. `fetch` is not used.

    `data.raw` is what was recorded; `data.enhanced` has passed AliveCor's filters, and no reader here filters. It
    is only read where there is no raw signal, and the record is flagged `enhanced`. `uv_per_lsb` replaces
    `amplitudeResolution`, which is in nV a count. Raises UnreadableRecording.
    """
    answer = strict_json.parse(name, content)
    with naming(name):
        if "data12L" in answer:
            raise UnreadableRecording("format", "a Kardia 12L recording, whose scale is not published")
        data = answer.get("data")
        kind = next((kind for kind in ("raw", "enhanced") if isinstance(data, dict) and data.get(kind)), None)
        if kind is None:
            raise UnreadableRecording("no_signal", "no data.raw in it: ask the Kardia API for the recording itself")
        block = data[kind]
        samples = block.get("samples") if isinstance(block, dict) else None
        if not isinstance(samples, dict):
            raise UnreadableRecording("no_signal", f"no samples in data.{kind}: ask the Kardia API for the recording")
        counts = {}
        for label, values in samples.items():
            try:
                lead = canonical(label)
            except LsemvaeError as error:
                raise UnreadableRecording("no_ecg_lead", f"data.{kind}: {error}") from None
            if lead in counts:
                raise UnreadableRecording("duplicate_lead", f"lead {lead} is there twice: give each lead once")
            counts[lead] = _integers(lead, values)
        step_uv = uv_per_lsb or _number(block, kind, "amplitudeResolution") / 1000
        flags = ("enhanced",) if kind == "enhanced" else ()
        record = to_record(name, counts, _number(block, kind, "frequency"), step_uv, flags=flags)
        return _with_derived_marked(record)


def _integers(lead: str, values: object) -> np.ndarray:
    if isinstance(values, list) and set(map(type, values)) <= {int}:
        try:
            return np.array(values, dtype=np.int32)
        except OverflowError:
            pass
    raise UnreadableRecording("sample", f"the samples of lead {lead} are no list of 32-bit integers: ask for it again")


def _number(block: dict[str, Any], kind: str, key: str) -> float:
    value = block.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
        return float(value)
    shown = repr(value)[:40] if not isinstance(value, int) else "too large, or not positive"
    raise UnreadableRecording("header", f"data.{kind}.{key} is {shown}: give the number that the recorder has")


def _with_derived_marked(record: Record) -> Record:
    if not {"I", "II"} <= set(record.leads):
        return record
    rows = dict(zip(record.leads, record.signal_mv_LT, strict=True))
    computed = Record.from_leads({lead: rows[lead] for lead in ("I", "II")}, record.rate_hz)
    tolerance_mv = 1.001 * record.uv_per_lsb_L[record.leads.index("I")] / 1000
    exact_L = np.abs(record.signal_for(computed.derived) - computed.signal_for(computed.derived)) <= tolerance_mv
    return replace(
        record, derived=tuple(lead for lead, exact in zip(computed.derived, exact_L.all(axis=1), strict=True) if exact)
    )
