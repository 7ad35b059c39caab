"""MUSE, Philips, aECG and SCP-ECG files, made by the tests."""

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from lsemvae.leads import LEADS

STORED = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


AECG_ORDER = (*STORED, "III", "aVR", "aVL", "aVF")


SCP_CODES = dict(zip(AECG_ORDER, (*range(1, 9), *range(61, 65)), strict=True))


Raw = Mapping[str, np.ndarray]


def encoded(counts_T: np.ndarray) -> str:
    return base64.b64encode(np.asarray(counts_T).astype("<i2").tobytes()).decode()


def muse(raw: Raw, *, median: Raw | None = None, rate: str = "500", crc: int | None = None, **elements: str) -> bytes:
    """The median block first, as MUSE has it."""
    elements = {"LeadAmplitudeUnitsPerBit": "4.88", "LeadAmplitudeUnits": "MICROVOLTS"} | elements

    def waveform(kind: str, raw: Raw) -> str:
        leads = ""
        for lead, counts_T in raw.items():
            payload = np.asarray(counts_T).astype("<i2").tobytes()
            fields = {"LeadByteCountTotal": len(payload), "LeadSampleCountTotal": len(counts_T), **elements}
            fields |= {"LeadID": lead.removeprefix("twice "), "LeadSampleSize": 2, "WaveFormData": encoded(counts_T)}
            fields["LeadDataCRC32"] = binascii.crc32(payload) if crc is None else crc
            leads += "<LeadData>" + "".join(f"<{tag}>{value}</{tag}>" for tag, value in fields.items()) + "</LeadData>"
        return (
            f"<Waveform><WaveformType>{kind}</WaveformType><SampleBase>{rate}</SampleBase>"
            f"<SampleExponent>0</SampleExponent>{leads}</Waveform>"
        )

    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">\n<RestingECG>'
        "<PatientDemographics><PatientID>SECRET-77</PatientID><PatientLastName>D\xf6e</PatientLastName>"
        f"</PatientDemographics>{waveform('Median', median or {})}{waveform('Rhythm', raw)}</RestingECG>"
    ).encode("latin-1")


def pulse(raw: Raw, counts: int = 200) -> dict[str, np.ndarray]:
    """With what Philips appends: the same zeros and rectangular pulse in every lead."""
    tail_T = np.repeat([0, counts, 0], [5, 10, 5])
    return {lead: np.concatenate([counts_T, tail_T]) for lead, counts_T in raw.items()}


def xli(counts_T: np.ndarray) -> bytes:
    """One lead: differences of differences, high bytes before low bytes, LZW of nothing but single characters."""
    values = np.append(np.asarray(counts_T, dtype=np.int64), 0)
    corrections = 2 * values[1:-1] - values[:-2] - values[2:]
    words = np.concatenate([values[:2], corrections[1:] + 64, [64]])[: len(values) - 1].astype(">i2").view(np.uint8)
    return lzw([*words[::2].tolist(), *words[1::2].tolist()], int(corrections[0]))


def lzw(codes: Sequence[int], start: int = 0) -> bytes:
    bits = "".join(f"{code:010b}" for code in [*codes, 1023])
    body = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    return struct.pack("<IHh", len(body), 0, start) + body


def residuals(raw: Raw) -> dict[str, np.ndarray]:
    """XLI keeps of III, aVR, aVL and aVF only what I and II do not say."""
    i, ii, iii = raw["I"], raw["II"], raw["III"]
    return dict(raw) | {
        "III": ii - i - iii,
        "aVR": -raw["aVR"] - (i + ii) // 2,
        "aVL": (i - iii) // 2 - raw["aVL"],
        "aVF": (ii + iii) // 2 - raw["aVF"],
    }


def sierra(raw: Raw, *, how: str = "Plain", resolution: str | None = "5", data: str | None = None) -> bytes:
    """Twelve leads, named by their order: `Plain`, `Base64` or `XLI`."""
    samples = len(next(iter(raw.values())))
    if data is None:
        data = {
            "Plain": lambda: " ".join(str(count) for row in raw.values() for count in row),
            "Base64": lambda: encoded(np.concatenate(list(raw.values()))),
            "XLI": lambda: base64.b64encode(b"".join(map(xli, residuals(raw).values()))).decode(),
        }[how]()
    encoding = "Plain" if how == "Plain" else "Base64"
    compression = 'compressflag="True" compressmethod="XLI"' if how == "XLI" else 'compressflag="False"'
    resolution = f"<signalresolution>{resolution}</signalresolution>" if resolution else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><restingecgdata xmlns="http://www3.medical.philips.com">'
        "<documentinfo><documenttype>SierraECG</documenttype><documentversion>1.03</documentversion></documentinfo>"
        f"<dataacquisition><signalcharacteristics><samplingrate>500</samplingrate>{resolution}"
        f"<acquisitiontype>STD-12</acquisitiontype><numberchannelsallocated>{len(raw)}</numberchannelsallocated>"
        "</signalcharacteristics></dataacquisition>"
        "<patient><generalpatientdata><patientid>SECRET-77</patientid></generalpatientdata></patient>"
        f'<waveforms><parsedwaveforms {compression} dataencoding="{encoding}" durationperchannel="{samples * 2}">'
        f"{data}</parsedwaveforms></waveforms></restingecgdata>"
    ).encode()


def aecg(
    raw: Raw, *, increment: str = "0.002", unit: str = "s", scale: str = 'value="5" unit="uV"', origin: str = "0"
) -> bytes:
    sequences = "".join(
        f'<component><sequence><code code="MDC_ECG_LEAD_{lead.upper()}"/><value xsi:type="SLIST_PQ">'
        f'<origin value="{origin}" unit="uV"/><scale {scale}/><digits>{" ".join(map(str, counts_T))}</digits>'
        "</value></sequence></component>"
        for lead, counts_T in raw.items()
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><AnnotatedECG xmlns="urn:hl7-org:v3" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><id root="SECRET-77"/><component><series>'
        '<code code="RHYTHM"/><component><sequenceSet><component><sequence><code code="TIME_ABSOLUTE"/>'
        f'<value xsi:type="GLIST_TS"><head value="20200101"/><increment value="{increment}" unit="{unit}"/></value>'
        f"</sequence></component>{sequences}</sequenceSet></component></series></component></AnnotatedECG>"
    ).encode()


def scp(
    raw: Raw,
    *,
    nv: int = 5000,
    interval_us: int = 2000,
    difference: int = 0,
    huffman: bool = False,
    starts: Mapping[str, int] | None = None,
    codes: Sequence[int] | None = None,
) -> bytes:
    """Sections 0, 3 and 6, and 2 where it is Huffman-coded by the default table."""
    starts = starts or {}
    codes = codes or [SCP_CODES[lead] for lead in raw]
    rows = []
    for counts_T in raw.values():
        values = np.asarray(counts_T, dtype=np.int64)
        stored = np.concatenate([values[:difference], np.diff(values, difference)])
        rows.append(huffman_bytes(stored) if huffman else stored.astype("<i2").tobytes())
    bodies = {2: struct.pack("<H", 19999)} if huffman else {}
    bodies[3] = bytes([len(raw), 4])
    for (lead, counts_T), code in zip(raw.items(), codes, strict=True):
        start = starts.get(lead, 1)
        bodies[3] += struct.pack("<IIB", start, start + len(counts_T) - 1, code)
    bodies[6] = struct.pack("<HHBB", nv, interval_us, difference, 0)
    bodies[6] += struct.pack(f"<{len(rows)}H", *map(len, rows)) + b"".join(rows)
    return scp_record(bodies)


def huffman_bytes(values: np.ndarray) -> bytes:
    def bits(value: int) -> str:
        if abs(value) <= 8:
            return "1" * abs(value) + "0" + ("" if value == 0 else "01"[value < 0])
        if -128 <= value < 128:
            return f"1111111110{value & 0xFF:08b}"
        return f"1111111111{value & 0xFFFF:016b}"

    text = "".join(bits(int(value)) for value in values)
    return int("1" + text.ljust(-(-len(text) // 16) * 16, "0"), 2).to_bytes(len(text) // 8 + 4, "big").lstrip(b"\0")[1:]


def scp_record(bodies: Mapping[int, bytes]) -> bytes:
    def section(number: int, body: bytes) -> bytes:
        body += bytes(len(body) % 2)
        rest = struct.pack("<HIBB6s", number, 16 + len(body), 20, 20, b"SCPECG" if number == 0 else bytes(6)) + body
        return struct.pack("<H", binascii.crc_hqx(rest, 0xFFFF)) + rest

    sections = {number: section(number, body) for number, body in bodies.items()}
    size = 16 + 10 * (1 + len(sections))
    pointers, position = struct.pack("<HII", 0, size, 7), 7 + size
    for number, content in sections.items():
        pointers += struct.pack("<HII", number, len(content), position)
        position += len(content)
    rest = section(0, pointers) + b"".join(sections.values())
    rest = struct.pack("<I", 6 + len(rest)) + rest
    return struct.pack("<H", binascii.crc_hqx(rest, 0xFFFF)) + rest


def random_raw(leads: Sequence[str] = LEADS, samples: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {lead: rng.integers(-1500, 1500, samples) for lead in leads}


BUILDERS = {"muse": muse, "sierra": sierra, "aecg": aecg, "scp": scp}


STEPS_UV = {"muse": 4.88, "sierra": 5.0, "aecg": 5.0, "scp": 5.0}
