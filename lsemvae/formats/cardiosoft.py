"""GE CardioSoft and CASE: "CardiologyXML" of a resting ECG, as in UK Biobank's field 20205.

The schema is known from exports. `StripData` holds the rhythm strip of all twelve leads, each rounded to the recorder's
step. `RestingECGMeasurements/MedianSamples` holds one averaged beat under the same element names, so this reader never
leaves `StripData`. It does not read who was recorded; UK Biobank says so in the file name,
`{eid}_20205_{instance}_{array}.xml`.
"""

import re
from collections.abc import Callable
from xml.etree.ElementTree import Element

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import xml
from lsemvae.formats.counts import naming, to_record
from lsemvae.formats.limits import GIVE_STEP
from lsemvae.leads import identify, unknown_lead_flag
from lsemvae.record import Record

_INTEGERS = re.compile(r"(?:\s*+-?\d{1,9}+,)*+\s*+-?\d{1,9}+", re.ASCII)


def recognise(head: bytes) -> bool:
    """Whether the root element is CardiologyXML."""
    return xml.root_name(head) == "CardiologyXML"


def read(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the document in the file `name` -> Record of its rhythm strip. `fetch` is not used.

    Leads other than the twelve are left out and flagged `unknown_lead:NAME`. A lead with another number of samples than
    the file declares is refused, because a lost sample shifts all that follow. `uv_per_lsb` replaces the resolution of
    the file. Takes 4 ms for twelve leads of 5,000 samples. Raises UnreadableRecording.
    """
    root = xml.parse(name, content)
    with naming(name):
        strip = _strip(root)
        declared = _optional_number(strip, "ChannelSampleCountTotal")
        waveforms = strip.findall("WaveformData")
        names = [waveform.get("lead", "") for waveform in waveforms]
        counts: dict[str, np.ndarray] = {}
        flags: list[str] = []
        for position, (waveform, lead) in enumerate(zip(waveforms, identify(names), strict=True)):
            if lead is None:
                flags.append(unknown_lead_flag(names[position], position))
                continue
            if lead in counts:
                raise UnreadableRecording("duplicate_lead", f"lead {lead} occurs twice: give each lead once")
            counts[lead] = _samples(lead, waveform)
            if declared is not None and len(counts[lead]) != declared:
                raise UnreadableRecording(
                    "length",
                    f"lead {lead} has {len(counts[lead])} of {declared:.9g} declared samples "
                    "(ChannelSampleCountTotal): export the whole file again",
                )
        return to_record(name, counts, _rate_hz(strip), uv_per_lsb or _resolution_uv(strip), flags=tuple(flags))


def _strip(root: Element) -> Element:
    strips = root.findall("StripData")
    kind = (root.findtext("ObservationType") or "").strip()[:40]
    if not strips:
        raise UnreadableRecording(
            "no_signal",
            f"no StripData, so no rhythm strip (its ObservationType is {kind!r}): a full-disclosure or "
            "measurements-only export; export the resting ECG itself (UK Biobank: field 20205)",
        )
    if len(strips) > 1 or not strips[0].findall("WaveformData"):
        raise UnreadableRecording(
            "no_signal",
            f"no single strip of WaveformData in {len(strips)} StripData (its ObservationType is {kind!r}), as in an "
            "exercise test (UK Biobank: field 6025); give the resting ECG (field 20205)",
        )
    return strips[0]


def _samples(lead: str, waveform: Element) -> np.ndarray:
    text = (waveform.text or "").strip().removesuffix(",")
    if not text:
        return np.empty(0, dtype=np.int64)
    # np.fromstring is fast, but would read a lone "-" as 0.
    if len(waveform) or not _INTEGERS.fullmatch(text):
        raise UnreadableRecording(
            "sample", f"the samples of lead {lead} are not integers separated by commas: export it again"
        )
    return np.fromstring(text, sep=",", dtype=np.int64)


def _rate_hz(strip: Element) -> float:
    element = strip.find("SampleRate")
    unit = element.get("units", "Hz") if element is not None else "Hz"
    if unit.strip().casefold() != "hz":
        raise UnreadableRecording("unit", f"its SampleRate is in {unit[:20]!r}: Hz can be read")
    return _number(strip, "SampleRate")


def _resolution_uv(strip: Element) -> float:
    step = _number(strip, "Resolution")
    element = strip.find("Resolution")
    unit = element.get("units", "") if element is not None else ""
    if unit.strip().casefold() != "uvperlsb":
        raise UnreadableRecording("unit", f"its Resolution is in {unit[:20]!r}: only uVperLsb can be read; {GIVE_STEP}")
    if step < 0:
        raise UnreadableRecording("gain", f"its Resolution is {step:g}: export it again; {GIVE_STEP}")
    return step


def _optional_number(strip: Element, tag: str) -> float | None:
    """The number in the element; None where it is absent or empty."""
    return _number(strip, tag) if (strip.findtext(tag) or "").strip() else None


def _number(strip: Element, tag: str) -> float:
    text = (strip.findtext(tag) or "").strip()
    try:
        return float(text)
    except ValueError:
        raise UnreadableRecording(
            "header", f"StripData's {tag} is {text[:40]!r}, not a number: export it again"
        ) from None
