"""CardioSoft XML files, made by the tests."""

import re
from collections.abc import Mapping, Sequence

from lsemvae.leads import LEADS


def strip(
    counts: Mapping[str, Sequence[int] | str],
    *,
    rate: str = '<SampleRate units="Hz">500</SampleRate>',
    resolution: str = '<Resolution units="uVperLsb">5</Resolution>',
    declared: str | None = None,
    tag: str = "StripData",
) -> str:
    """Written as CardioSoft does: tabs before, a line break after every fourth number."""
    length = len(next(iter(counts.values()), ""))
    declared = f"<ChannelSampleCountTotal>{length}</ChannelSampleCountTotal>" if declared is None else declared
    waves = []
    for lead, row in counts.items():
        text = row if isinstance(row, str) else re.sub(r"((?:[^,]*,){4})", "\\1\r\n\t\t", ",".join(map(str, row)))
        waves.append(f'<WaveformData lead="{lead}">\t\t{text}</WaveformData>')
    return f"<{tag}><NumberOfLeads>{len(counts)}</NumberOfLeads>{rate}{declared}{resolution}{''.join(waves)}</{tag}>"


def document(inside: str, encoding: str = "ISO8859-1") -> bytes:
    medians = strip(dict.fromkeys(LEADS, [999] * 6), tag="MedianSamples", rate="<SampleRate>250</SampleRate>")
    return (
        f'<?xml version="1.0" encoding="{encoding}" ?>\r\n<CardiologyXML><ObservationType>RestECG</ObservationType>'
        "<PatientInfo><PID>SECRET-7</PID><FamilyName>M\u00fcller</FamilyName><PaceMaker></PaceMaker></PatientInfo>"
        f"<RestingECGMeasurements><QTDispersion units='ms'></QTDispersion>{medians}</RestingECGMeasurements>"
        f"{inside}<Export>\r\n</Export></CardiologyXML>"
    ).encode("latin-1")


TWELVE = {lead: [index * 10 + 1, -index, 0, 7, -3] for index, lead in enumerate(LEADS)}


EXAMPLE = {"a_20205_2_0.xml": document(strip(TWELVE))}
