"""AliveCor files, made by the tests."""

import json
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from lsemvae.leads import LIMB_LEADS

BLOCKS = dict(zip(LIMB_LEADS, (b"ecg ", b"ecg2", b"ecg3", b"ecg4", b"ecg5", b"ecg6"), strict=True))


DERIVED = ("III", "aVR", "aVL", "aVF")


def block(kind: bytes, payload: bytes, *, signed: bool = False, damage: int = 0) -> bytes:
    content = kind + struct.pack("<I", len(payload)) + payload
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in content)
    return content + struct.pack("<I", (total + damage) % 2**32)


def fmt(encoding: int = 1, rate: int = 300, nv: int = 500, **options: object) -> bytes:
    return block(b"fmt ", struct.pack("<BHHBH", encoding, rate, nv, 2, 0), **options)


def ecg(lead: str, counts: Sequence[int], **options: object) -> bytes:
    return block(BLOCKS[lead], np.asarray(counts, dtype="<i2").tobytes(), **options)


HEAD = b"ALIVE\0\0\0" + struct.pack("<I", 3)


INFO = block(b"info", b"2018-10-10T11:13:11 SECRET-7".ljust(264, b"\0"))


def limb_leads(i_T: np.ndarray, ii_T: np.ndarray) -> dict[str, np.ndarray]:
    """As the recorder computes them, halves towards zero."""
    rest = (ii_T - i_T, -(i_T + ii_T) / 2, i_T - ii_T / 2, ii_T - i_T / 2)
    return dict(zip(LIMB_LEADS, (i_T, ii_T, *(np.fix(row).astype(np.int64) for row in rest)), strict=True))


SIX = limb_leads(np.arange(-20, 20), np.arange(40)[::-1] * 3)


EXAMPLE = {"six.atc": HEAD + INFO + fmt() + b"".join(ecg(lead, row) for lead, row in SIX.items())}


def kardia(samples: Mapping[str, object], *, block: Mapping[str, object] | None = None, **rest: object) -> bytes:
    raw = {"frequency": 300, "mainsFrequency": 50, "amplitudeResolution": 500, "samples": samples} | (block or {})
    filtered = raw | {"samples": {name: [0] * 40 for name in samples}}
    answer = {"id": "SECRET-7", "patientID": "SECRET-8", "heartRate": 89, "recordedAt": "2021-04-16T15:19:09+05:30"}
    return json.dumps(answer | {"data": {"enhanced": filtered, "raw": raw}} | rest).encode()


NAMES = ("leadI", "leadII", "leadIII", "AVR", "AVL", "AVF")


SAMPLES = dict(zip(NAMES, (row.tolist() for row in SIX.values()), strict=True))


KARDIA_EXAMPLE = {"six.json": kardia(SAMPLES)}
