"""GE MUSE XML, Philips Sierra XML, HL7 aECG and SCP-ECG, parsed by ecgdatakit: `pip install 'lsemvae[formats]'`.

The library (2.0.3, Apache-2.0) is young, so it is kept within bounds. It gets a document only after our own XML checks,
and compressed data only after its unpacked size is known. It reads one file, a copy under a fixed name in a private
folder. Whatever it raises becomes UnreadableRecording, without the parts of the file that it quotes. Only the stored
integers, their step and offset, the lead names and the rate are taken from it: not its scaled samples, its median beats
or its patient data.
"""

import base64
import importlib
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import xml
from lsemvae.formats.counts import naming
from lsemvae.formats.leadwise import LeadCounts, to_record
from lsemvae.formats.limits import GIVE_STEP, MAX_SIGNALS, UV_PER_UNIT
from lsemvae.leads import identify, unknown_lead_flag
from lsemvae.record import Record

if TYPE_CHECKING:
    from ecgdatakit import ECGRecord, Lead

MAX_SCP_BYTES = 2**20
"""Ten seconds of twelve leads take 10,000 to 250,000; Huffman codes unpack to 8 samples a byte."""
MAX_XML_BYTES = 2**23
MAX_XLI_SAMPLES = 2_000_000
"""In all leads together. Philips' compression can reach 1:600, so the size is computed before unpacking."""

# Root element or signature -> name of the format, and module and class of its parser in ecgdatakit.
_FORMATS = {
    "RestingECG": ("GE MUSE XML", "ge_muse_xml", "GEMuseXMLParser"),
    "restingecgdata": ("Philips Sierra XML", "sierra_xml", "SierraXMLParser"),
    "AnnotatedECG": ("HL7 aECG", "hl7_aecg", "HL7aECGParser"),
    "SCP": ("SCP-ECG", "scp_ecg", "SCPECGParser"),
}
_RATE_ROUNDING = 1e-3
"""Intervals are stored with few digits: 1.667 ms means 600 Hz, not 599.88."""


def recognise(head: bytes) -> bool:
    """Whether it has a root element of the three kinds of XML, or SCP-ECG's section 0."""
    return _kind(head) is not None


def _kind(head: bytes) -> str | None:
    # The name in section 0 is what the standard asks for; some devices omit it, others deviate in their pointers.
    if head[16:22] == b"SCPECG" or (head[8:10] == head[22:24] == b"\0\0" and head[28:32] == b"\x07\0\0\0"):
        return "SCP"
    root = xml.root_name(head)
    return root if root in _FORMATS else None


def read(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the file `name` -> Record of its rhythm, never of a median beat. `fetch` is not used.

    It is the first rhythm block of the file (in aECG the first set of sequences of the first series). Other leads than
    the twelve are left out and flagged `unknown_lead:NAME`. Leads that begin at different samples (SCP-ECG) are put on
    one time axis. The calibration pulse that Philips appends is cut off. `checksum` is flagged if one of the checksums
    (MUSE, SCP-ECG) is wrong. `uv_per_lsb` replaces step, offset and unit. MUSE takes 4 ms, aECG 11, Philips 33, SCP-ECG
    3 or, if Huffman-coded, 41. Raises UnreadableRecording.
    """
    kind = _kind(content[:4096])
    if kind is None:
        raise UnreadableRecording("format", f"{name}: it is neither MUSE, Sierra or aECG XML nor SCP-ECG")
    with naming(name):
        limit = MAX_SCP_BYTES if kind == "SCP" else MAX_XML_BYTES
        if len(content) > limit:
            raise UnreadableRecording(
                "too_large", f"it has {len(content)} bytes of {_FORMATS[kind][0]}: {limit} are the limit"
            )
    if kind != "SCP":
        root = xml.parse(name, content, named_dtd=kind == "RestingECG")
    with naming(name):
        if kind == "restingecgdata":
            _check_xli(root)
        parsed = _parse(kind, content)
        # ecgdatakit appends _2 to a lead that occurs twice.
        labels = [re.sub(r"_\d+$", "", found.label) for found in parsed.leads]
        leads = []
        flags = ["checksum"] if parsed.raw_metadata.get("checksum_valid") is False else []
        for position, (found, lead) in enumerate(zip(parsed.leads, identify(labels), strict=True)):
            if lead is None:
                flags.append(unknown_lead_flag(labels[position], position))
                continue
            start = int(found.annotations.get("start_sample", 1)) - 1
            leads.append(LeadCounts(lead, *_scaled(lead, found, uv_per_lsb), start=start))
        if kind == "restingecgdata":
            leads = _without_calibration(leads)
        return to_record(name, leads, _rate_hz(parsed), flags=tuple(flags))


def _parse(kind: str, content: bytes) -> "ECGRecord":
    title, module, parser = _FORMATS[kind]
    parser = getattr(_ecgdatakit(title, module), parser)
    with tempfile.TemporaryDirectory(prefix="lsemvae-ecg-") as folder:
        path = Path(folder, "recording")
        path.write_bytes(content)
        try:
            return parser().parse(path)
        except Exception as error:  # a young parser may raise anything
            reason = type(error).__name__
            if type(error).__module__ == "ecgdatakit.exceptions":
                reason = re.sub(r"""(['"]).*?\1""", "…", str(error).replace(str(path), "it"))[:120]
            mend = "export it again"
            if kind == "SCP":
                mend = "some devices' SCP-ECG deviates from EN 1064, export DICOM, XML or CSV instead"
            raise UnreadableRecording("format", f"it cannot be read as {title} ({reason}): {mend}") from None


def _scaled(lead: str, found: "Lead", uv_per_lsb: float | None) -> tuple[np.ndarray, float, float]:
    """Counts, microvolts a count, and microvolts at the count 0."""
    if uv_per_lsb is not None:
        return found.samples, uv_per_lsb, 0.0
    if found.adc_resolution == 0 or found.resolution_unit.casefold() not in UV_PER_UNIT:
        # Without this check ecgdatakit's default step would be used.
        raise UnreadableRecording("gain", f"lead {lead} has no step in a unit of voltage: export it again; {GIVE_STEP}")
    uv = UV_PER_UNIT[found.resolution_unit.casefold()]
    return found.samples, found.resolution * uv, found.offset * uv


def _rate_hz(parsed: "ECGRecord") -> float:
    """ecgdatakit rounds to whole hertz, which is right only where the stored interval has too few digits."""
    rounded = float(parsed.leads[0].sampling_rate) if parsed.leads else math.nan
    metadata: dict[str, Any] = parsed.raw_metadata
    exact = metadata.get("rhythm_time", {}).get("sampling_rate_exact", rounded)
    if interval_us := metadata.get("rhythm_sample_interval_us"):
        exact = 1e6 / interval_us
    return rounded if abs(exact - rounded) <= _RATE_ROUNDING * exact else exact


def _without_calibration(leads: list[LeadCounts]) -> list[LeadCounts]:
    """Cuts off the end where all leads are equal and hold nothing but zeros and one rectangular pulse.

    Example, a real file of 11 s: 10.528 s of ECG, then 0.172 s of zeros, 0.2 s of 1 mV and 0.1 s of zeros.
    """
    if len(leads) < 2 or len({len(lead.counts_T) for lead in leads}) > 1:
        return leads
    counts_LT = np.stack([lead.counts_T for lead in leads])
    differ = np.flatnonzero((counts_LT != counts_LT[0]).any(axis=0))
    end = int(differ[-1]) + 1 if differ.size else 0
    tail_T = counts_LT[0, end:]
    levels = np.unique(tail_T)
    edges = np.count_nonzero(np.diff(tail_T))
    if not (end > 0 and len(levels) == 2 and levels[0] == tail_T[0] == 0 and edges in (1, 2)):
        return leads
    return [LeadCounts(lead.lead, lead.counts_T[:end], lead.step_uv, lead.offset_uv) for lead in leads]


def _check_xli(root: Element) -> None:
    """Refuses waveforms that would unpack to more than a recording may hold."""
    samples = 0
    for element in root.iter():
        compressed = any(value.strip().upper() == "XLI" for value in element.attrib.values())
        if not (compressed and str(element.tag).rpartition("}")[2].lower() == "parsedwaveforms"):
            continue
        text = "".join([element.text or "", *(child.tail or "" for child in element)])
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            raise UnreadableRecording("format", "its waveforms are no Base64: export it again") from None
        chunks = offset = 0
        while offset < len(data):
            size = int.from_bytes(data[offset : offset + 4], "little")
            samples += _unpacked_bytes(data[offset + 8 : offset + 8 + size], 2 * MAX_XLI_SAMPLES) // 2
            offset, chunks = offset + 8 + size, chunks + 1
            if samples > MAX_XLI_SAMPLES or chunks > MAX_SIGNALS:
                raise UnreadableRecording(
                    "too_large",
                    f"its waveforms unpack to over {MAX_XLI_SAMPLES} samples or {MAX_SIGNALS} leads: give 10 s of ECG",
                )


def _unpacked_bytes(chunk: bytes, limit: int) -> int:
    """The unpacked length of LZW data with 10-bit codes, as ecgdatakit's LzwDecoder reads it; stops at `limit`."""
    bits = np.unpackbits(np.frombuffer(chunk, dtype=np.uint8))
    codes = bits[: len(bits) // 10 * 10].reshape(-1, 10) @ (1 << np.arange(10)[::-1])
    lengths = dict.fromkeys(range(256), 1)
    following, previous, total = 256, 0, 0
    for code in codes.tolist():
        if code == 1023 or total > limit:
            break
        length = lengths.setdefault(code, previous + 1)
        if previous and following <= 1022:
            lengths[following] = previous + 1
            following += 1
        previous = length
        total += length
    return total


@cache
def _ecgdatakit(title: str, module: str) -> Any:
    """The module of one of its parsers, imported when the first such file is read (0.1 s), its warnings silenced."""
    try:
        parsers = importlib.import_module(f"ecgdatakit.parsing.parsers.{module}")
    except ModuleNotFoundError:
        raise UnreadableRecording("missing_package", f"{title} needs pip install 'lsemvae[formats]'") from None
    # The warnings quote lead names and codes of the file. Python attributes them to the caller, this module.
    warnings.filterwarnings("ignore", module=r"ecgdatakit|lsemvae\.formats\.clinical")
    return parsers
