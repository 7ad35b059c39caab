"""AliveCor KardiaMobile: `.atc` files of one or six leads, and the JSON answers of the Kardia API.

The six-lead recorder measures I and II and computes the other limb leads from them. The stored values are kept. A lead
is marked as derived if it agrees with the computation to one count. If it does not, the file is damaged; the lead then
counts as measured, so that `quality` flags the contradiction.

Layout of `.atc`, little-endian, as seen in files: `ALIVE` and three zeros, a version, then blocks. A block has a
4-character name, a length, as many bytes, and the sum of all bytes before it in the block; some apps add the bytes as
signed numbers. The block `info` holds identifiers and is not read.
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

# One of these is in the first 4 KiB, in whichever order its fields are.
_KARDIA_NAMES = (b'"recordedAt"', b'"algorithmDetermination"', b'"amplitudeResolution"', b'"leadI"', b'"data12L"')


def recognise_atc(head: bytes) -> bool:
    return head.startswith(_MAGIC)


def read_atc(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the `.atc` file `name` -> Record. `fetch` is not used.

    A lead is flagged `checksum:LEAD` if its checksum is neither the unsigned nor the signed sum. A file is refused if
    the checksum of `fmt `, which holds rate and step, is wrong, or those of several leads and no lead's is right.
    `uv_per_lsb` replaces the resolution of the file. Raises UnreadableRecording.
    """
    with naming(name):
        layout: tuple[int, int, int, int, int] | None = None
        counts: dict[str, np.ndarray] = {}
        corrupt: list[str] = []
        for kind, payload, is_intact in _blocks(content):
            if kind == b"fmt ":
                if layout is not None or len(payload) != _FORMAT.size:
                    raise UnreadableRecording("header", "its fmt block is repeated or of a wrong size: export it again")
                if not is_intact():
                    raise UnreadableRecording(
                        "checksum", "its fmt block (rate and resolution) is damaged: export the recording again"
                    )
                layout = _FORMAT.unpack(payload)
            elif lead := _BLOCK_LEADS.get(kind):
                if lead in counts:
                    raise UnreadableRecording("duplicate_lead", f"lead {lead} occurs twice: export it again")
                if len(payload) % 2:
                    raise UnreadableRecording("truncated", f"lead {lead} ends within a sample: export it again")
                counts[lead] = np.frombuffer(payload, dtype="<i2")
                if not is_intact():
                    corrupt.append(lead)
        if layout is None:
            raise UnreadableRecording("header", "it has no fmt block with rate and resolution: export it again")
        encoding, rate_hz, nv_per_lsb, _, _ = layout
        if encoding != _INT16:
            raise UnreadableRecording("format", f"its samples have encoding {encoding}: only 1 (16 bits) can be read")
        if len(corrupt) == len(counts) > 1:
            raise UnreadableRecording("checksum", "the checksums of all its leads are wrong: export it again")
        flags = tuple(f"checksum:{lead}" for lead in LIMB_LEADS if lead in corrupt)
        return _with_derived_marked(to_record(name, counts, rate_hz, uv_per_lsb or nv_per_lsb / 1000, flags=flags))


def _blocks(content: bytes) -> Iterator[tuple[bytes, memoryview, Callable[[], bool]]]:
    """Name, payload, and a function that computes whether the checksum is right."""
    view, start = memoryview(content), 12
    for _ in range(_MAX_BLOCKS):
        if start == len(content):
            return
        if len(content) < start + 12:
            raise UnreadableRecording("truncated", "it ends within a block: export the whole file again")
        kind, length = struct.unpack_from("<4sI", view, start)
        end = start + 8 + length
        if len(content) < end + 4:
            raise UnreadableRecording(
                "truncated",
                f"it has {max(len(content) - start - 12, 0)} of the {length} bytes of a block: "
                "export the whole file again",
            )
        block, checksum = view[start:end], struct.unpack_from("<I", view, end)[0]

        def is_intact(block: memoryview = block, checksum: int = checksum) -> bool:
            sums = (int(np.frombuffer(block, dtype=kind).sum(dtype=np.int64)) for kind in (np.uint8, np.int8))
            return any(total % 2**32 == checksum for total in sums)

        yield kind, block[8:], is_intact
        start = end + 4
    if start != len(content):
        raise UnreadableRecording("too_large", f"it has more than {_MAX_BLOCKS} blocks: export it again")


def recognise_kardia(head: bytes) -> bool:
    """Whether it is an object with one of the names in a recording of the Kardia API."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(name in head for name in _KARDIA_NAMES)


def read_kardia(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the JSON of one recording in the file `name` -> Record. `fetch` is not used.

    `data.raw` is the signal as recorded, `data.enhanced` the signal after AliveCor's filters. The latter is only read
    where there is no raw signal, and the record is then flagged `enhanced`. `uv_per_lsb` replaces
    `amplitudeResolution`, which is in nV a count. Raises UnreadableRecording.
    """
    answer = strict_json.parse(name, content)
    with naming(name):
        if "data12L" in answer:
            raise UnreadableRecording("format", "it is a Kardia 12L recording, whose scale is not published")
        data = answer.get("data")
        kind = next((kind for kind in ("raw", "enhanced") if isinstance(data, dict) and data.get(kind)), None)
        if kind is None or not isinstance(data, dict):
            raise UnreadableRecording("no_signal", "it has no data.raw: request the recording from the Kardia API")
        block = data[kind]
        samples = block.get("samples") if isinstance(block, dict) else None
        if not isinstance(samples, dict):
            raise UnreadableRecording("no_signal", f"data.{kind} has no samples: request the recording again")
        counts = {}
        for label, values in samples.items():
            try:
                lead = canonical(label)
            except LsemvaeError as error:
                raise UnreadableRecording("no_ecg_lead", f"data.{kind}: {error}") from None
            if lead in counts:
                raise UnreadableRecording("duplicate_lead", f"lead {lead} occurs twice: give each lead once")
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
    raise UnreadableRecording("sample", f"the samples of lead {lead} are no list of 32-bit integers: request it again")


def _number(block: dict[str, Any], kind: str, key: str) -> float:
    value = block.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
        return float(value)
    shown = repr(value)[:40] if not isinstance(value, int) else "too large, or not positive"
    raise UnreadableRecording("header", f"data.{kind}.{key} is {shown}: give the number that the recorder uses")


def _with_derived_marked(record: Record) -> Record:
    if not {"I", "II"} <= set(record.leads) or record.uv_per_lsb_L is None:
        return record
    rows = dict(zip(record.leads, record.signal_mv_LT, strict=True))
    computed = Record.from_leads({lead: rows[lead] for lead in ("I", "II")}, record.rate_hz)
    tolerance_mv = 1.001 * record.uv_per_lsb_L[record.leads.index("I")] / 1000
    exact_L = np.abs(record.signal_for(computed.derived) - computed.signal_for(computed.derived)) <= tolerance_mv
    return replace(
        record, derived=tuple(lead for lead, exact in zip(computed.derived, exact_L.all(axis=1), strict=True) if exact)
    )
