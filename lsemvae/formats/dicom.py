"""DICOM waveforms (PS3.3 C.10.9) of any SOP class: 12-lead, general, ambulatory or hemodynamic.

pydicom parses them within bounds: it reads only the Waveform Sequence, no more elements than a recording has, and its
warnings are silenced because they quote the header. No patient data are read.

A sample is `raw x sensitivity x correction factor + baseline` in the unit of its channel. The leads are identified by
their SCP-ECG or MDC codes, and by text only where there is no such code.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats.counts import naming
from lsemvae.formats.leadwise import LeadCounts, to_record
from lsemvae.formats.limits import GIVE_STEP, MAX_SAMPLES, MAX_SIGNALS, UV_PER_UNIT
from lsemvae.leads import identify, unknown_lead_flag
from lsemvae.record import Record

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_READS = 50_000
"""pydicom needs two or three reads an element; real recordings take 700 to 3,600 in all."""
MAX_CHANNELS_BYTES = 2**18
"""Size of the channel definitions of one group; those of twelve leads take 5,000."""

_META = b"\x02\x00\x00\x00UL\x04\x00"
"""Beginning of a file without preamble: File Meta Information Group Length, the first element of every file."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"

# Both schemes number the leads as SCP-ECG does.
_CODE = re.compile(r"(?:5\.6\.3-9-|2:)(\d{1,3})", re.ASCII)
_SCHEMES = ("SCPECG", "MDC", "")
_LEADS = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF"} | {n: f"V{n - 2}" for n in range(3, 9)}


_FORMATS = {(8, "SB"): "i1", (8, "UB"): "u1", (16, "SS"): "i2", (16, "US"): "u2", (32, "SL"): "i4", (32, "UL"): "u4"}
_COMPANDED = {"MB": "mu-law", "AB": "A-law"}

_ONE_BEAT = re.compile(r"MEDIAN|AVERAGE|REPRESENTATIVE|TEMPLATE|BEAT")


@dataclass(frozen=True, eq=False)
class _Group:
    """One multiplex group: channels sampled together. `leads` maps each lead to its channel.

    `flags` name the channels that are no lead.
    """

    item: "Dataset"
    original: bool
    rhythm: bool
    offset_ms: float
    rate_hz: float
    samples: int
    channels: int
    leads: dict[str, tuple[int, "Dataset"]]
    flags: tuple[str, ...]

    def rank(self) -> tuple[bool, int, bool, int]:
        """Sorts the group to read last: recorded rather than computed, most leads, longest."""
        return self.original, len(self.leads), self.rhythm, self.samples


class _Stream(io.BytesIO):
    """Stops a file with more elements than a recording has: an element of 8 bytes would take 650 in memory."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise _too_many()
        return super().read(size)


def recognise(head: bytes) -> bool:
    """Whether it begins with 128 bytes and `DICM`, or, without those, with the first element of every file."""
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
    """`content` is the DICOM file `name` -> Record of what was recorded, never of a median beat. `fetch` is not used.

    Channels that are none of the twelve leads are left out and flagged `unknown_lead:NAME`. Leads in several groups of
    one rate are put on one time axis by the offsets of the groups, and channels by a skew of a sample or more.
    Where a lead has no sample, and where its sample is the padding value, it is NaN. `uv_per_lsb` replaces sensitivity,
    correction, baseline and unit. Takes 3 to 12 ms. Raises UnreadableRecording.
    """
    with naming(name):
        try:
            groups = [group for item in _waveforms(content) if (group := _group(item))]
            if not groups:
                raise UnreadableRecording(
                    "no_ecg_lead",
                    "none of its groups of waveforms is a recording with ECG leads: export the rhythm",
                )
            best, *others = sorted(groups, key=_Group.rank, reverse=True)
            leads, flags = _leads(best, uv_per_lsb), [*best.flags]
            for group in others:
                alike = (group.original, group.rate_hz) == (best.original, best.rate_hz)
                if alike and group.leads.keys().isdisjoint(lead.lead for lead in leads):
                    leads += _leads(group, uv_per_lsb)
                    flags += group.flags
            return to_record(name, leads, best.rate_hz, flags=tuple(flags))
        except UnreadableRecording:
            raise
        except Exception as error:  # pydicom converts values on access and may raise anything
            if isinstance(error.__context__, UnreadableRecording):  # it turns every error of a stream into OSError
                raise error.__context__ from None
            code, reason = "header", f"it cannot be parsed as DICOM ({type(error).__name__}): export it again"
            if isinstance(error, (OSError, EOFError)):
                code, reason = "truncated", "it ends before its waveforms do, or is damaged: copy the whole file again"
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
        raise UnreadableRecording("no_ecg_lead", "it holds no waveform: give the ECG, not its report or image")
    if isinstance(sequence, pydicom.dataelem.DataElement):
        return list(sequence.value)
    if len(sequence.value) < sequence.length:
        raise UnreadableRecording(
            "truncated",
            f"its waveforms have {len(sequence.value)} of {sequence.length} declared bytes: copy the whole file again",
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
    """None for a beat that was computed from the recording, and for a group without a lead."""
    label = str(item.get("MultiplexGroupLabel") or "").upper()
    original = str(item.get("WaveformOriginality") or "ORIGINAL").strip().upper() == "ORIGINAL"
    rhythm = "RHYTHM" in label
    if _ONE_BEAT.search(label) or not (original or rhythm):
        return None
    definitions = item.get_item("ChannelDefinitionSequence")
    if definitions is None:
        raise UnreadableRecording("header", "a group of its waveforms lacks channel definitions: export it again")
    if getattr(definitions, "length", 0) > MAX_CHANNELS_BYTES:  # a DataElement has been parsed and has no length
        raise _too_many()
    channels = _count(item, "NumberOfWaveformChannels", MAX_SIGNALS)
    defined = list(item.ChannelDefinitionSequence)
    if len(defined) != channels:
        raise UnreadableRecording(
            "header", f"{channels} channels are declared, {len(defined)} defined: export it again"
        )
    named = list(zip(_identified(defined), range(channels), defined, strict=True))
    names = [lead for lead, _, _ in named if lead]
    if twice := sorted({lead for lead in names if names.count(lead) > 1}):
        raise UnreadableRecording("duplicate_lead", f"lead {', '.join(twice)} occurs twice: give each lead once")
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
        flags=tuple(
            unknown_lead_flag(_texts(channel)[0], index)
            for lead, index, channel in named
            if lead is None and _is_voltage(channel)
        ),
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
            raise UnreadableRecording("header", f"lead {lead} begins at sample {start + skew:g}: correct its skew")
        leads.append(LeadCounts(lead, counts_T, step_uv, offset_uv, round(start + skew)))
    return leads


def _raw(group: _Group) -> np.ndarray:
    """The integers as stored, [samples, channels], without a copy."""
    bits, kind = _count(group.item, "WaveformBitsAllocated", 64), str(group.item.get("WaveformSampleInterpretation"))
    if kind in _COMPANDED:
        raise UnreadableRecording("format", f"its samples are in 8-bit {_COMPANDED[kind]}: export them as 16 bits")
    if (bits, kind) not in _FORMATS:
        known = ", ".join(f"{bits} {kind}" for bits, kind in _FORMATS)
        raise UnreadableRecording("format", f"its samples have {bits} bits {kind[:4]!r}: {known} can be read")
    _, is_little_endian = group.item.original_encoding
    dtype = np.dtype(("<" if is_little_endian else ">") + _FORMATS[bits, kind])
    data = group.item.get("WaveformData") or b""
    needed = group.samples * group.channels * dtype.itemsize
    if len(data) < needed:
        raise UnreadableRecording(
            "truncated", f"its waveform has {len(data)} bytes, {needed} are declared: copy the whole file again"
        )
    raw_T = np.frombuffer(data, dtype=dtype, count=group.samples * group.channels)
    return raw_T.reshape(group.samples, group.channels)


def _padding(group: _Group, dtype: np.dtype) -> int | None:
    """The count that means "nothing was recorded": bytes of a sample, or a number where the VR is wrong."""
    value = group.item.get("WaveformPaddingValue")
    if isinstance(value, bytes):
        return int(np.frombuffer(value, dtype=dtype, count=1)[0]) if len(value) >= dtype.itemsize else None
    return None if value is None else int(value)


def _identified(channels: "Sequence[Dataset]") -> list[str | None]:
    """The lead of each channel: by its code, else by the meaning of its source, else by its label."""
    by_meaning, by_label = (identify(texts) for texts in zip(*map(_texts, channels), strict=True))
    found = []
    for channel, meaning, label in zip(channels, by_meaning, by_label, strict=True):
        sources = channel.get("ChannelSourceSequence")
        match = _CODE.fullmatch(str(sources[0].get("CodeValue") or "").strip()) if sources else None
        if match and str(sources[0].get("CodingSchemeDesignator") or "").strip() in _SCHEMES:
            found.append(_LEADS.get(int(match[1])))
        else:
            found.append(meaning or label)
    return found


def _texts(channel: "Dataset") -> tuple[str, str]:
    """Meaning of the source, and label, both without remarks in brackets such as "Lead I (Einthoven)"."""
    sources = channel.get("ChannelSourceSequence")
    texts = (sources[0].get("CodeMeaning") if sources else None, channel.get("ChannelLabel"))
    meaning, label = (re.sub(r"\(.*\)", "", str(text or "")).strip() for text in texts)
    return meaning, label


def _is_voltage(channel: "Dataset") -> bool:
    units = channel.get("ChannelSensitivityUnitsSequence")
    return bool(units) and str(units[0].get("CodeValue") or "").strip().casefold() in UV_PER_UNIT


def _scale(lead: str, channel: "Dataset") -> tuple[float, float]:
    """Microvolts a count, and microvolts at the count 0."""
    sensitivity = _number(channel, "ChannelSensitivity")
    if math.isnan(sensitivity):
        raise UnreadableRecording("gain", f"lead {lead} has no ChannelSensitivity: export it again; {GIVE_STEP}")
    units = channel.get("ChannelSensitivityUnitsSequence")
    unit = str(units[0].get("CodeValue") or "").strip() if units else "absent"
    if unit.casefold() not in UV_PER_UNIT:
        raise UnreadableRecording(
            "unit", f"the unit of lead {lead} is {unit[:20]!r}: V, mV, uV or nV can be read; {GIVE_STEP}"
        )
    uv = UV_PER_UNIT[unit.casefold()]
    correction = _number(channel, "ChannelSensitivityCorrectionFactor", 1.0)
    return sensitivity * correction * uv, _number(channel, "ChannelBaseline", 0.0) * uv


def _number(item: "Dataset", keyword: str, default: float = math.nan) -> float:
    """`default` if the element is absent or empty; NaN if it is not one number."""
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
    return UnreadableRecording("too_large", "it has more elements than any recording: export the ECG alone")


@cache
def _pydicom() -> ModuleType:
    """pydicom, imported when the first file is read (0.2 s), without its warnings and log lines."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom
