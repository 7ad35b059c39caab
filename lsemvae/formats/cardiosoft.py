"""GE CardioSoft and CASE: "CardiologyXML" of a resting ECG, as in UK Biobank's field 20205.

The schema is known from exports: `StripData` holds the rhythm strip of all twelve leads, each rounded to the
recorder's step; `RestingECGMeasurements/MedianSamples` holds one averaged beat under the same element names, so
nothing outside of `StripData` is looked at. Who was recorded is not read: UK Biobank says it in the file's name,
`{eid}_20205_{instance}_{array}.xml`.
"""

import re
from collections.abc import Callable
from xml.etree.ElementTree import Element

import numpy as np

from lsemvae.errors import LsemvaeError, UnreadableRecording
from lsemvae.formats import xml
from lsemvae.formats.counts import naming, to_record
from lsemvae.leads import canonical
from lsemvae.record import Record

_INTEGERS = re.compile(r"(?:\s*+-?\d{1,9}+,)*+\s*+-?\d{1,9}+", re.ASCII)


def recognise(head: bytes) -> bool:
    """Its root element is CardiologyXML."""
    return xml.root_name(head) == "CardiologyXML"


def read(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content`, the document in the file `name` -> Record of its rhythm strip. `fetch` is not used.

    Elements that are no lead of the twelve are left out. A lead whose samples are not as many as the file
    declares is refused: where one is lost, all that follow are shifted. `uv_per_lsb` replaces the file's
    resolution. 4 ms for twelve leads of 5,000 samples. Raises UnreadableRecording.
    """
    root = xml.parse(name, content)
    with naming(name):
        strip = _strip(root)
        declared = _number(strip, "ChannelSampleCountTotal", required=False)
        counts: dict[str, np.ndarray] = {}
        for waveform in strip.findall("WaveformData"):
            try:
                lead = canonical(waveform.get("lead", ""))
            except LsemvaeError:
                continue  # an additional electrode
            if lead in counts:
                raise UnreadableRecording("duplicate_lead", f"lead {lead} is there twice: give each lead once")
            counts[lead] = _samples(lead, waveform)
            if declared is not None and len(counts[lead]) != declared:
                raise UnreadableRecording(
                    "length",
                    f"lead {lead} has {len(counts[lead])} samples, {declared:.9g} are declared "
                    "(ChannelSampleCountTotal): export it again, whole",
                )
        return to_record(name, counts, _rate_hz(strip), uv_per_lsb or _resolution_uv(strip))


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
    # numpy's own reading is fast, and takes a lone "-" for 0.
    if len(waveform) or not _INTEGERS.fullmatch(text):
        raise UnreadableRecording(
            "sample", f"the samples of lead {lead} are not all integers with commas between: export it again"
        )
    return np.fromstring(text, sep=",", dtype=np.int64)


def _rate_hz(strip: Element) -> float:
    unit = strip.find("SampleRate").get("units", "Hz") if strip.find("SampleRate") is not None else "Hz"
    if unit.strip().casefold() != "hz":
        raise UnreadableRecording("unit", f"its SampleRate is in {unit[:20]!r}: Hz can be read")
    return _number(strip, "SampleRate")


def _resolution_uv(strip: Element) -> float:
    step = _number(strip, "Resolution")
    unit = strip.find("Resolution").get("units", "")
    if unit.strip().casefold() != "uvperlsb":
        raise UnreadableRecording(
            "unit", f"its Resolution is in {unit[:20]!r}: uVperLsb can be read; or give the step (uv_per_lsb)"
        )
    if step < 0:
        raise UnreadableRecording("gain", f"its Resolution is {step:g}: export it again, or give the step (uv_per_lsb)")
    return step


def _number(strip: Element, tag: str, required: bool = True) -> float | None:
    """The number in the element; None where it is absent or empty and not required."""
    text = (strip.findtext(tag) or "").strip()
    if not text and not required:
        return None
    try:
        return float(text)
    except ValueError:
        raise UnreadableRecording(
            "header", f"StripData's {tag} is {text[:40]!r}, not a number: export it again"
        ) from None
