"""WFDB records: a text header (.hea) and the signal files it names. https://physionet.org/physiotools/wag/header-5.htm

The header is parsed and checked here because it is untrusted input: every count is bounded before anything is
allocated, and signal files must lie beside the header. numpy decodes format 16, which MIMIC-IV-ECG, PTB-XL, LUDB and
the PhysioNet challenges use (0.5 ms a record; wfdb.rdrecord takes 1.7). The `wfdb` library decodes the other formats.
It gets a copy of the data under a fixed name in a private folder, never a string from the input.
"""

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePath

import numpy as np

from lsemvae.errors import UnreadableRecording
from lsemvae.formats.limits import (
    GIVE_STEP,
    MAX_SAMPLES,
    MAX_SIGNALS,
    MAX_TOTAL_SAMPLES,
    RATE_RANGE_HZ,
    STEP_RANGE_UV,
    UV_PER_UNIT,
)
from lsemvae.leads import LEADS, identify, unknown_lead_flag
from lsemvae.record import Record

MAX_HEADER_BYTES = 2**18

# Format -> (bytes, samples in these bytes, count that means "nothing was recorded"). The compressed formats (508, 516,
# 524) are left out, because the size of their files does not bound the size of the unpacked samples.
_FORMATS: dict[int, tuple[int, int, int | None]] = {
    8: (1, 1, None),
    16: (2, 1, -(2**15)),
    24: (3, 1, -(2**23)),
    32: (4, 1, -(2**31)),
    61: (2, 1, -(2**15)),
    80: (1, 1, -(2**7)),
    160: (2, 1, -(2**15)),
    212: (3, 2, -(2**11)),
    310: (4, 3, -(2**9)),
    311: (4, 3, -(2**9)),
}

_PLAIN = {16: "<i2", 61: ">i2"}  # numpy reads these directly; wfdb 4.3.1 fails at 61

# The time and date that may follow the number of samples are matched but not kept: they can identify a patient.
_RECORD_LINE = re.compile(r"([^\s/]+)(/\d+)?\s+(-?\d{1,18})(?:\s+(\S+))?(?:\s+(\S+))?(?:\s.*)?", re.ASCII)
_RATE = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?)(?:/.*)?", re.ASCII)
_LAYOUT = re.compile(r"(\d{1,9})(?:x(\d{1,9}))?(?::(\d{1,9}))?(?:\+(\d{1,9}))?", re.ASCII)
_GAIN = re.compile(r"([^(/]*)(?:\(([^)]*)\))?(?:/(.*))?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_SUBJECT = re.compile(r"#\s*<subject_id>:\s*(\S{1,64})\s*")  # MIMIC-IV-ECG's last line


@dataclass(frozen=True, eq=False)
class _Signal:
    """One signal line: where the samples are and what they mean. `gain` and `unit` are kept as written."""

    file: str
    format: int
    per_frame: int
    skew: int
    offset: int
    gain: str
    unit: str
    baseline: int
    initial: int
    checksum: int | None
    name: str
    lead: str

    @property
    def is_lead(self) -> bool:
        return self.lead != ""


@dataclass(frozen=True)
class _Header:
    rate_hz: float
    frames: int
    signals: tuple[_Signal, ...]
    subject_id: str | None


def recognise(head: bytes) -> bool:
    """Whether the first line that is no comment is a record line: a name, then the number of signals."""
    for line in head.decode("utf-8-sig", "replace").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            line = line.strip().expandtabs()
            return line.isprintable() and _RECORD_LINE.fullmatch(line) is not None
    return False


def read(name: str, content: bytes, fetch: Callable[[str], bytes], *, uv_per_lsb: float | None = None) -> Record:
    """`content` is the header in the file `name`, `fetch` gives the signal files -> Record.

    Signals that are no lead are left out; those in a unit of voltage are flagged `unknown_lead:NAME`. A lead is
    flagged `checksum:LEAD` if its samples do not add up to the header's checksum; where all leads fail, the record is
    refused. The record keeps `uv_per_lsb_L`, so that its millivolts can be turned back into the exact integers. The
    argument `uv_per_lsb` replaces gain, baseline and unit of the header. Raises UnreadableRecording.
    """
    try:
        header = _parse(content)
        leads = [signal for signal in header.signals if signal.is_lead]
        scales = {signal: _scale(signal, uv_per_lsb) for signal in leads}
        counts: dict[_Signal, np.ndarray] = {}
        for file in dict.fromkeys(signal.file for signal in leads):
            in_file = [signal for signal in header.signals if signal.file == file]
            counts.update(zip(in_file, _decode(in_file, header.frames, _signal_file(file, fetch)), strict=True))
        corrupt = [signal for signal in leads if _is_corrupt(counts[signal], signal)]
        _require_any_intact(leads, corrupt)
        return Record.from_leads(
            {signal.lead: _millivolts(counts[signal], signal, *scales[signal]) for signal in leads},
            header.rate_hz * leads[0].per_frame,
            uv_per_lsb={signal.lead: abs(1000 / scales[signal][0]) for signal in leads},
            record_id=PurePath(name).stem,
            subject_id=header.subject_id,
            flags=(
                *(f"checksum:{signal.lead}" for signal in sorted(corrupt, key=lambda s: LEADS.index(s.lead))),
                *_unknown_leads(header.signals),
            ),
        )
    except UnreadableRecording as error:
        raise UnreadableRecording(error.code, f"{name}: {error}") from None


def _signal_file(file: str, fetch: Callable[[str], bytes]) -> bytes:
    """The signal file, or the one file whose name differs from it in upper and lower case alone (`X.DAT` for `X.dat`).

    Variants are asked for by name, because what serves the files (a store, an upload) need not be able to list them.
    """
    try:
        return fetch(file)
    except (FileNotFoundError, IsADirectoryError):
        pass
    stem, dot, suffix = file.rpartition(".")
    found: dict[str, bytes] = {}
    cases = product((stem, stem.upper(), stem.lower()), (suffix, suffix.upper(), suffix.lower()))
    for variant in {s + dot + e: None for s, e in cases if s + dot + e != file}:
        try:
            found[variant] = fetch(variant)
        except (FileNotFoundError, IsADirectoryError):
            continue
    if len(found) > 1:
        raise UnreadableRecording(
            "missing_file", f"its signal file {file!r} may be any of {', '.join(map(repr, found))}: keep one of them"
        )
    if not found:
        raise UnreadableRecording("missing_file", f"its signal file {file!r} does not exist: put it beside the header")
    return next(iter(found.values()))


def _require_any_intact(leads: Sequence[_Signal], corrupt: Sequence[_Signal]) -> None:
    """Refuses samples of which no lead has its checksum: they are another file's, or noise.

    A single lead is only flagged, and so are headers whose writer put 0 for every checksum.
    """
    if len(corrupt) == len(leads) > 1 and any(signal.checksum for signal in leads):
        raise UnreadableRecording(
            "checksum",
            f"the samples of all {len(leads)} leads contradict the header's checksums: copy header and signal file "
            "again, or write the checksums anew if the samples were changed on purpose",
        )


def _unknown_leads(signals: Sequence[_Signal]) -> list[str]:
    return [
        unknown_lead_flag(signal.name, position)
        for position, signal in enumerate(signals)
        if not signal.is_lead and signal.unit.casefold() in UV_PER_UNIT  # a pressure is no lead
    ]


def _parse(content: bytes) -> _Header:
    if len(content) > MAX_HEADER_BYTES:
        raise UnreadableRecording("too_large", f"the header has {len(content)} bytes: {MAX_HEADER_BYTES} are the limit")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    comments = [line for line in lines if line.startswith("#")]
    lines = [line for line in lines if not line.startswith("#")]
    record_line = _RECORD_LINE.fullmatch(lines[0]) if lines else None
    if record_line is None:
        raise UnreadableRecording("header", "no record line such as '100 12 500 5000': give a WFDB header")
    _, segments, declared, rate, length = record_line.groups()
    if segments:
        raise UnreadableRecording(
            "multi_segment", f"the record has several segments ({segments[:20]}): read its segments one by one"
        )
    n_signals, frames = int(declared), _integer(length, "number of samples", low=1)
    if not 1 <= n_signals <= MAX_SIGNALS:
        code = "too_large" if n_signals > MAX_SIGNALS else "header"
        raise UnreadableRecording(code, f"it declares {n_signals} signals: 1 to {MAX_SIGNALS} can be read")
    if len(lines) < 1 + n_signals:
        raise UnreadableRecording(
            "header", f"it declares {n_signals} signals and describes {len(lines) - 1}: mend the header"
        )
    fields_S = [line.split(maxsplit=8) for line in lines[1 : 1 + n_signals]]
    leads = identify([fields[8] if len(fields) > 8 else "" for fields in fields_S])
    signals = tuple(
        _signal(position, fields, lead or "")
        for position, (fields, lead) in enumerate(zip(fields_S, leads, strict=True), 1)
    )
    total = frames * sum(signal.per_frame for signal in signals)
    if frames > MAX_SAMPLES or total > MAX_TOTAL_SAMPLES:
        raise UnreadableRecording(
            "too_large",
            f"{frames} samples a signal, {total} in all: {MAX_SAMPLES} and {MAX_TOTAL_SAMPLES} are allowed",
        )
    if (skew := max(signal.skew for signal in signals)) >= frames:
        raise UnreadableRecording("header", f"a skew of {skew} samples in a record of {frames}: mend the header")
    _check_leads(signals)
    subjects = [match[1] for comment in comments if (match := _SUBJECT.fullmatch(comment))]
    return _Header(_rate(rate), frames, signals, subjects[-1] if subjects else None)


def _signal(position: int, fields: list[str], lead: str) -> _Signal:
    """FILE FORMATxPER_FRAME:SKEW+OFFSET GAIN(BASELINE)/UNIT RESOLUTION ZERO INITIAL CHECKSUM BLOCK NAME"""
    layout = _LAYOUT.fullmatch(fields[1]) if len(fields) > 1 else None
    if layout is None:
        raise UnreadableRecording(
            "format", f"the line of signal {position} has no format such as '16': mend the header"
        )
    number, per_frame, skew, offset = (int(field or 0) for field in layout.groups())
    if number not in _FORMATS:
        known = ", ".join(map(str, _FORMATS))
        raise UnreadableRecording("format", f"signal format {number}: {known} can be read; convert it to 16")
    scale = fields[2] if len(fields) > 2 else ""
    parts = _GAIN.fullmatch(scale)
    gain, baseline, unit = parts.groups() if parts else (scale, None, None)
    zero = _integer(fields[4], "ADC zero") if len(fields) > 4 else 0
    return _Signal(
        file=fields[0],
        format=number,
        per_frame=max(per_frame, 1),
        skew=skew,
        offset=offset,
        gain=gain,
        unit=unit or "mV",  # the specification's default
        baseline=zero if baseline is None else _integer(baseline, "baseline"),
        initial=_integer(fields[5], "initial value") if len(fields) > 5 else 0,
        checksum=_integer(fields[6], "checksum") if len(fields) > 6 else None,
        name=fields[8] if len(fields) > 8 else "",
        lead=lead,
    )


def _shown(text: str | None) -> str:
    """A value as messages quote it. In a file that is no header it may be anything, also who the patient is."""
    if text is None:
        return "absent"
    return repr(text[:40]) if re.match(r"[+-]?\.?\d", text) else "no number"


def _integer(text: str | None, what: str, low: int = -(2**31)) -> int:
    """An integer of 32 bits; only a number of samples may be larger, since it has a limit and a message of its own."""
    if text is None or not _INTEGER.fullmatch(text) or int(text) < low or (low < 0 and int(text) >= 2**31):
        raise UnreadableRecording("header", f"the {what} is {_shown(text)}: mend the header")
    return int(text)


def _rate(text: str | None) -> float:
    match = _RATE.fullmatch(text or "")
    rate_hz = float(match[1]) if match else math.nan
    low, high = RATE_RANGE_HZ
    if not low <= rate_hz <= high:
        raise UnreadableRecording("rate", f"the rate is {_shown(text)}: give {low:g} to {high:g} Hz")
    return rate_hz


def _check_leads(signals: Sequence[_Signal]) -> None:
    leads = [signal.lead for signal in signals if signal.is_lead]
    if not leads:
        raise UnreadableRecording("no_ecg_lead", f"none of its {len(signals)} signals is named {', '.join(LEADS)}")
    if twice := sorted({lead for lead in leads if leads.count(lead) > 1}):
        raise UnreadableRecording("duplicate_lead", f"lead {', '.join(twice)} occurs twice: give each lead once")
    if len({signal.per_frame for signal in signals if signal.is_lead}) > 1:
        raise UnreadableRecording("format", "its leads differ in rate: bring them to one rate first")


def _scale(signal: _Signal, uv_per_lsb: float | None) -> tuple[float, int]:
    """Counts a millivolt, and the count at 0 mV: from the header, unless `uv_per_lsb` is given."""
    if uv_per_lsb is not None:
        return 1000 / uv_per_lsb, 0
    uv_per_unit = UV_PER_UNIT.get(signal.unit.casefold())
    if uv_per_unit is None:
        raise UnreadableRecording("unit", f"lead {signal.lead} is in {signal.unit[:20]!r}: V, mV, uV or nV can be read")
    try:
        gain = float(signal.gain or "0")
    except ValueError:
        gain = math.nan
    low, high = STEP_RANGE_UV
    # In WFDB a gain of 0, or none at all, means "uncalibrated": the amplitudes are not millivolts.
    if not (math.isfinite(gain) and gain and low <= abs(uv_per_unit / gain) <= high):
        raise UnreadableRecording(
            "gain",
            f"the gain of lead {signal.lead} is {signal.gain[:20]!r} per {signal.unit[:20]}: "
            f"it must give {low:g} to {high:g} uV a count. Check its unit (1000 per mV is 1 per uV); "
            f"{GIVE_STEP}",
        )
    return gain * (1000 / uv_per_unit), signal.baseline


def _decode(signals: Sequence[_Signal], frames: int, data: bytes) -> list[np.ndarray]:
    """The counts of every signal in one file, each [frames x per_frame]."""
    first = signals[0]
    if {(signal.format, signal.offset) for signal in signals} != {(first.format, first.offset)}:
        raise UnreadableRecording("header", f"{first.file!r} has two formats or offsets: mend the header")
    samples = frames * sum(signal.per_frame for signal in signals)
    n_bytes, n_samples, _ = _FORMATS[first.format]
    needed = first.offset + math.ceil(samples * n_bytes / n_samples)
    needed += first.format == 310 and samples % 3 == 2  # of three samples, the second ends in the fourth byte
    if len(data) < needed:
        raise UnreadableRecording(
            "truncated", f"{first.file!r} has {len(data)} bytes of the {needed} declared: copy the whole file again"
        )
    if first.format in _PLAIN and all(signal.per_frame == 1 and signal.skew == 0 for signal in signals):
        counts_TS = np.frombuffer(data, dtype=_PLAIN[first.format], count=samples, offset=first.offset).reshape(
            frames, len(signals)
        )
        return list(np.ascontiguousarray(counts_TS.T))
    return _decode_by_wfdb(signals, frames, data)


def _decode_by_wfdb(signals: Sequence[_Signal], frames: int, data: bytes) -> list[np.ndarray]:
    try:
        import wfdb  # takes 0.4 s, and most recordings do not need it
    except ModuleNotFoundError:
        raise UnreadableRecording(
            "missing_package",
            f"{signals[0].file!r} has format {signals[0].format}, which needs pip install 'lsemvae[formats]'",
        ) from None

    lines = [f"r {len(signals)} 1 {frames}"]
    for signal in signals:
        layout = f"{signal.format}x{signal.per_frame}:{signal.skew}+{signal.offset}"
        lines.append(f"r.dat {layout} 1(0)/mV 0 0 {signal.initial} 0 0 s")
    with tempfile.TemporaryDirectory(prefix="lsemvae-wfdb-") as folder:
        Path(folder, "r.hea").write_text("\n".join(lines) + "\n", encoding="ascii")
        Path(folder, "r.dat").write_bytes(data)
        try:
            return wfdb.rdrecord(str(Path(folder, "r")), physical=False, smooth_frames=False).e_d_signal
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise UnreadableRecording(
                "format", f"{signals[0].file!r} cannot be decoded as format {signals[0].format} ({error})"
            ) from None


def _millivolts(counts_T: np.ndarray, signal: _Signal, counts_per_mv: float, baseline: int) -> np.ndarray:
    # The difference of two integers below 2^32 is exact in float64, so only the quotient is rounded, once, to float32.
    above_T = np.subtract(counts_T, baseline, dtype=np.float64)
    signal_mv_T = np.divide(above_T, counts_per_mv, out=np.empty(above_T.shape, np.float32), casting="same_kind")
    missing = _FORMATS[signal.format][2]
    if missing is not None and (absent_T := counts_T == missing).any():
        signal_mv_T[absent_T] = np.nan
    return signal_mv_T


def _is_corrupt(counts_T: np.ndarray, signal: _Signal) -> bool:
    """Whether the counts do not add up, in 16 bits signed or not, to the header's checksum."""
    if signal.checksum is None or signal.skew:  # a skewed signal has been shifted, so its end is not its own
        return False
    return (int(counts_T.sum(dtype=np.int64)) - signal.checksum) % 2**16 != 0
