"""DICOM waveforms (PS3.3 C.10.9), whatever the SOP class: 12-lead, general, ambulatory or hemodynamic.

pydicom parses, and is kept within bounds: it reads nothing but the Waveform Sequence, as few elements as a
recording has, and says nothing, because its warnings quote what a header holds. Nobody's name or number is read.

Samples are the file's integers, `raw x sensitivity x correction factor + baseline` in the channel's own unit.
Which leads are there is said by codes of SCP-ECG or MDC, and by text only where there is no such code.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats.counts import naming
from lsemvae.formats.leadwise import LeadCounts, to_record
from lsemvae.formats.limits import MAX_SAMPLES, MAX_SIGNALS, UV_PER_UNIT
from lsemvae.leads import canonical
from lsemvae.record import Record

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_READS = 50_000
"""Each element of a file takes pydicom two or three; real recordings 700 to 3,600 in all."""
MAX_CHANNELS_BYTES = 2**18
"""Of one group's channel definitions; twelve leads have 5,000."""

_META = b"\x02\x00\x00\x00UL\x04\x00"
"""How a file begins that lacks the preamble: File Meta Information Group Length, as every file has it first."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"

# Both number the leads as SCP-ECG does.
_CODE = re.compile(r"(?:5\.6\.3-9-|2:)(\d{1,3})", re.ASCII)
_SCHEMES = ("SCPECG", "MDC", "")
_LEADS = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF"} | {n: f"V{n - 2}" for n in range(3, 9)}


_FORMATS = {(8, "SB"): "i1", (8, "UB"): "u1", (16, "SS"): "i2", (16, "US"): "u2", (32, "SL"): "i4", (32, "UL"): "u4"}
_COMPANDED = {"MB": "mu-law", "AB": "A-law"}

_ONE_BEAT = re.compile(r"MEDIAN|AVERAGE|REPRESENTATIVE|TEMPLATE|BEAT")


@dataclass(frozen=True, eq=False)
class _Group:
    """One multiplex group: channels sampled together. `leads` are its channels that are one."""

    item: "Dataset"
    original: bool
    rhythm: bool
    offset_ms: float
    rate_hz: float
    samples: int
    channels: int
    leads: dict[str, tuple[int, "Dataset"]]

    def rank(self) -> tuple:
        return self.original, len(self.leads), self.rhythm, self.samples


class _Stream(io.BytesIO):
    """Ends where a file has more elements than a recording: every one of 8 bytes would cost 650 in memory."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise _too_many()
        return super().read(size)


def recognise(head: bytes) -> bool:
    """The preamble of 128 bytes and `DICM`, or, where a file lost those, the first element of every file."""
    return head[128:132] == b"DICM" or head.startswith(_META)


_SOP_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([\d.]+)", re.DOTALL)
_STANDARD_STORAGE, _WAVEFORM_STORAGE = b"1.2.840.10008.5.1.4.1.1.", b"1.2.840.10008.5.1.4.1.1.9."
_DICOMDIR = b"1.2.840.10008.1.3.10"


def may_hold_waveform(head: bytes) -> bool:
    """False if the file's SOP class is a DICOMDIR or a standard one without waveforms, such as an image."""
    match = _SOP_CLASS.search(head)
    if match is None:
        return True
    sop_class = match[1]
    return sop_class.startswith(_WAVEFORM_STORAGE) or not (
        sop_class.startswith(_STANDARD_STORAGE) or sop_class == _DICOMDIR
    )


def read(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the DICOM file `name` -> Record of what was recorded, never of a median beat. `fetch` is not used.

    Channels that are none of the twelve leads are left out. Where leads are spread over several groups of one
    rate, they are put on one time axis by the groups' offsets; so are channels with a skew of a sample or more
    (less is ignored): what a lead lacks is NaN, as are samples of the padding value. `uv_per_lsb` replaces
    sensitivity, correction, baseline and unit. 3 to 12 ms. Raises UnreadableRecording.
    """
    with naming(name):
        try:
            groups = [group for item in _waveforms(content) if (group := _group(item))]
            if not groups:
                raise UnreadableRecording(
                    "no_ecg_lead",
                    "none of its groups of waveforms is a recording with ECG leads: give the rhythm",
                )
            best, *others = sorted(groups, key=_Group.rank, reverse=True)
            leads = _leads(best, uv_per_lsb)
            for group in others:
                alike = (group.original, group.rate_hz) == (best.original, best.rate_hz)
                if alike and group.leads.keys().isdisjoint(lead.lead for lead in leads):
                    leads += _leads(group, uv_per_lsb)
            return to_record(name, leads, best.rate_hz)
        except UnreadableRecording:
            raise
        except Exception as error:  # pydicom converts on access, and what it raises is not to be foreseen
            if isinstance(error.__context__, UnreadableRecording):  # it turns whatever a stream raises into OSError
                raise error.__context__ from None
            code, reason = "header", f"it cannot be parsed as DICOM ({type(error).__name__}): export it again"
            if isinstance(error, (OSError, EOFError)):
                code, reason = "truncated", "it ends before its waveforms do, or is damaged: copy it again, whole"
            raise UnreadableRecording(code, reason) from None


def _waveforms(content: bytes) -> "list[Dataset]":
    """The items of the Waveform Sequence."""
    pydicom = _pydicom()
    if _DEFLATED in content:
        raise UnreadableRecording("format", "its data set is deflated: store it as Explicit VR Little Endian")
    if content.startswith(_META):
        content = bytes(128) + b"DICM" + content
    sequence = pydicom.dcmread(_Stream(content), specific_tags=["WaveformSequence"]).get_item("WaveformSequence")
    if sequence is None or not sequence.value:
        raise UnreadableRecording("no_ecg_lead", "it holds no waveform: give an ECG, not its report or its image")
    if isinstance(sequence, pydicom.dataelem.DataElement):
        return list(sequence.value)
    if len(sequence.value) < sequence.length:
        raise UnreadableRecording(
            "truncated",
            f"its waveforms have {len(sequence.value)} bytes, {sequence.length} are declared: copy it again, whole",
        )
    return list(
        pydicom.filereader.read_sequence(
            _Stream(sequence.value),
            sequence.is_implicit_VR,
            sequence.is_little_endian,
            sequence.length,
            pydicom.charset.default_encoding,
        )
    )


def _group(item: "Dataset") -> _Group | None:
    """None for a beat that was computed from the recording, and for what holds no lead."""
    label = str(item.get("MultiplexGroupLabel") or "").upper()
    original = str(item.get("WaveformOriginality") or "ORIGINAL").strip().upper() == "ORIGINAL"
    rhythm = "RHYTHM" in label
    if _ONE_BEAT.search(label) or not (original or rhythm):
        return None
    definitions = item.get_item("ChannelDefinitionSequence")
    if definitions is None:
        raise UnreadableRecording("header", "a group of its waveforms does not define its channels: export it again")
    if not isinstance(definitions, _pydicom().dataelem.DataElement) and definitions.length > MAX_CHANNELS_BYTES:
        raise _too_many()
    channels = _count(item, "NumberOfWaveformChannels", MAX_SIGNALS)
    defined = list(item.ChannelDefinitionSequence)
    if len(defined) != channels:
        raise UnreadableRecording("header", f"{channels} channels declared, {len(defined)} defined: export it again")
    named = [(_lead(channel), index, channel) for index, channel in enumerate(defined)]
    names = [lead for lead, _, _ in named if lead]
    if twice := sorted({lead for lead in names if names.count(lead) > 1}):
        raise UnreadableRecording("duplicate_lead", f"lead {', '.join(twice)} is there twice: give each lead once")
    if not names:
        return None
    return _Group(
        item=item,
        original=original,
        rhythm=rhythm,
        offset_ms=_number(item, "MultiplexGroupTimeOffset", 0.0),
        rate_hz=_number(item, "SamplingFrequency"),
        samples=_count(item, "NumberOfWaveformSamples", MAX_SAMPLES),
        channels=channels,
        leads={lead: (index, channel) for lead, index, channel in named if lead},
    )


def _leads(group: _Group, uv_per_lsb: float | None) -> list[LeadCounts]:
    raw_TC = _raw(group)
    padding = _padding(group, raw_TC.dtype)
    rate_hz = group.rate_hz if math.isfinite(group.rate_hz) else 0.0  # to_record refuses it
    start = group.offset_ms / 1000 * rate_hz
    leads = []
    for lead, (index, channel) in group.leads.items():
        counts_T = raw_TC[:, index].astype(np.float64)
        if padding is not None:
            counts_T[raw_TC[:, index] == padding] = np.nan
        skew = _number(channel, "ChannelSampleSkew", math.nan)
        if math.isnan(skew):
            skew = _number(channel, "ChannelTimeSkew", 0.0) * rate_hz
        step_uv, offset_uv = _scale(lead, channel) if uv_per_lsb is None else (uv_per_lsb, 0.0)
        if not abs(start + skew) < MAX_SAMPLES:
            raise UnreadableRecording("header", f"lead {lead} begins {start + skew:g} samples off: mend its skew")
        leads.append(LeadCounts(lead, counts_T, step_uv, offset_uv, round(start + skew)))
    return leads


def _raw(group: _Group) -> np.ndarray:
    """The integers as stored, [samples, channels]; no copy is made."""
    bits, kind = _count(group.item, "WaveformBitsAllocated", 64), str(group.item.get("WaveformSampleInterpretation"))
    if kind in _COMPANDED:
        raise UnreadableRecording("format", f"its samples are in 8-bit {_COMPANDED[kind]}: export them as 16 bits")
    if (bits, kind) not in _FORMATS:
        known = ", ".join(f"{bits} {kind}" for bits, kind in _FORMATS)
        raise UnreadableRecording("format", f"its samples are {bits} bits {kind[:4]!r}: {known} can be read")
    _, is_little_endian = group.item.original_encoding
    dtype = np.dtype(("<" if is_little_endian else ">") + _FORMATS[bits, kind])
    data = group.item.get("WaveformData") or b""
    needed = group.samples * group.channels * dtype.itemsize
    if len(data) < needed:
        raise UnreadableRecording(
            "truncated", f"its waveform has {len(data)} bytes, {needed} are declared: copy it again, whole"
        )
    raw_T = np.frombuffer(data, dtype=dtype, count=group.samples * group.channels)
    return raw_T.reshape(group.samples, group.channels)


def _padding(group: _Group, dtype: np.dtype) -> int | None:
    """The count that stands for "nothing was recorded": a sample's bytes, or a number where the VR is wrong."""
    value = group.item.get("WaveformPaddingValue")
    if isinstance(value, bytes):
        return int(np.frombuffer(value, dtype=dtype, count=1)[0]) if len(value) >= dtype.itemsize else None
    return None if value is None else int(value)


def _lead(channel: "Dataset") -> str | None:
    sources = channel.get("ChannelSourceSequence")
    meaning = None
    if sources:
        match = _CODE.fullmatch(str(sources[0].get("CodeValue") or "").strip())
        if match and str(sources[0].get("CodingSchemeDesignator") or "").strip() in _SCHEMES:
            return _LEADS.get(int(match[1]))
        meaning = sources[0].get("CodeMeaning")
    for text in (meaning, channel.get("ChannelLabel")):
        try:
            name = re.sub(r"\(.*\)", "", str(text or "")).strip()  # "Lead I (Einthoven)"
            if not name.startswith("-"):  # -aVR is aVR upside down
                return canonical(name)
        except LsemvaeError:
            continue
    return None


def _scale(lead: str, channel: "Dataset") -> tuple[float, float]:
    """Microvolts a count, and of the count 0."""
    sensitivity = _number(channel, "ChannelSensitivity")
    if math.isnan(sensitivity):
        raise UnreadableRecording(
            "gain", f"lead {lead} has no ChannelSensitivity: export it again, or give the step (uv_per_lsb)"
        )
    units = channel.get("ChannelSensitivityUnitsSequence")
    unit = str(units[0].get("CodeValue") or "").strip() if units else "absent"
    if unit.casefold() not in UV_PER_UNIT:
        raise UnreadableRecording(
            "unit", f"the unit of lead {lead} is {unit[:20]!r}: V, mV, uV or nV can be read; or give uv_per_lsb"
        )
    uv = UV_PER_UNIT[unit.casefold()]
    correction = _number(channel, "ChannelSensitivityCorrectionFactor", 1.0)
    return sensitivity * correction * uv, _number(channel, "ChannelBaseline", 0.0) * uv


def _number(item: "Dataset", keyword: str, default: float = math.nan) -> float:
    """`default` where it is absent or empty; NaN where it is not one number."""
    try:
        value = item.get(keyword)
        return default if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _count(item: "Dataset", keyword: str, limit: int) -> int:
    number = _number(item, keyword)
    if not (number >= 1 and number.is_integer()):
        raise UnreadableRecording("header", f"{keyword} is {number:g}, not a count: export it again")
    if number > limit:
        raise UnreadableRecording("too_large", f"{keyword} is {number:.0f}: {limit} are the limit")
    return int(number)


def _too_many() -> UnreadableRecording:
    return UnreadableRecording("too_large", "it has more elements than any recording: give the ECG alone")


@cache
def _pydicom() -> ModuleType:
    """pydicom, imported when the first file is read (0.2 s) and silent: neither warnings nor log lines."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom
