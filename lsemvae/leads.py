"""The twelve leads, by name. Nothing in this project identifies a lead by its position."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from lsemvae.errors import LsemvaeError

LIMB_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF")
CHEST_LEADS = ("V1", "V2", "V3", "V4", "V5", "V6")
LEADS = LIMB_LEADS + CHEST_LEADS

LIMB_FROM_I_II: Mapping[str, tuple[float, float]] = {
    "III": (-1.0, 1.0),
    "aVR": (-0.5, -0.5),
    "aVL": (1.0, -0.5),
    "aVF": (-0.5, 1.0),
}
"""Einthoven's and Goldberger's relations: each lead -> its weights of I and II, so III = -1 * I + 1 * II."""

_BY_FOLDED_NAME = {lead.casefold(): lead for lead in LEADS}
# Names of the same leads elsewhere: DI, DII and DIII in Romance languages.
_BY_FOLDED_NAME |= {f"d{lead.casefold()}": lead for lead in ("I", "II", "III")}
# IEC 60601 calls the chest leads C1 … C6, and D1 … D3 is another spelling of DI … DIII. But C3, C4 and D1 are also
# electrodes of an EEG: within a recording these names count only beside a lead of another name (see `identify`).
_AMBIGUOUS = {f"c{number}": f"V{number}" for number in range(1, 7)} | {"d1": "I", "d2": "II", "d3": "III"}

# What may stand before the name ("Lead aVL", "ECG I", "MDC_ECG_LEAD_V1") and after it ("I (Einthoven)"). Nothing else
# is removed: "-aVR" and "I (inverted)" are upside down and must stay unknown.
_PREFIX = re.compile(r"(?:mdc[ _-]*)?(?:(?:ecg|ekg)[ _-]*)?(?:lead[ _-]*)?")
_SUFFIX = re.compile(r"[ _]*\((?:einthoven|goldberger|wilson)\)")

# Names that `unknown_lead` repeats. They say what a signal is; any other text of a file might say whose it is.
_KNOWN_OTHERS = re.compile(
    r"-?(?:i{1,3}|av[rlf]|v[1-6])|v[1-9]r|v[7-9]|c[7-9]|c[1-9]r|[xyz]|vx|vy|vz|ml(?:i{1,3})|mv[1-6]|mcl[1-6]|c[mcsb]5"
    r"|es|as|ai|ra|la|ll|rl|(?:ecg|ekg|ch|lead|channel|signal)[ _-]?\d{0,2}|nehb ?[daj]|resp|abp|art|cvp|pap|pleth|ppg"
    r"|spo2|eeg|emg|eog|icg|pcg|trigger|marker"
)


@lru_cache(maxsize=256)
def canonical(name: str) -> str:
    """`"AVL"`, `"Lead aVL"`, `"DI"`, `"ECG I"`, `"I (Einthoven)"` or `"C1"` -> `"aVL"`, `"I"` or `"V1"`.

    An unknown name raises LsemvaeError.
    """
    bare = _bare(name)
    if lead := _BY_FOLDED_NAME.get(bare) or _AMBIGUOUS.get(bare):
        return lead
    raise LsemvaeError(f"unknown lead {name[:40]!r}: the leads are {', '.join(LEADS)}")


def identify(names: Sequence[str]) -> list[str | None]:
    """The lead that each signal name of one recording stands for; None for a name that is no lead.

    C1 … C6 and D1 … D3 are leads only where another name is one without doubt: C3 alone may belong to an EEG.
    """
    bare_names = [_bare(name) for name in names]
    is_ecg = any(bare in _BY_FOLDED_NAME for bare in bare_names)
    return [_BY_FOLDED_NAME.get(bare) or (_AMBIGUOUS.get(bare) if is_ecg else None) for bare in bare_names]


def unknown_lead_flag(name: str, position: int) -> str:
    """The flag for a signal that is none of the twelve leads: `"unknown_lead:V7"`, or by its position from 0.

    A name is only repeated if it is one of a fixed list, so that no flag can hold a patient's name or number.
    """
    bare = " ".join(name.split())
    known = len(bare) <= 16 and _KNOWN_OTHERS.fullmatch(bare.casefold())
    return f"unknown_lead:{bare}" if known else f"unknown_lead:signal {position + 1}"


def _bare(name: str) -> str:
    """The name folded, without what may stand around it. NFKC turns full-width letters and the one sign Ⅱ into II."""
    if len(name) > 64:
        return ""
    folded = unicodedata.normalize("NFKC", name).strip().casefold()
    prefix = _PREFIX.match(folded)
    return _SUFFIX.sub("", folded[prefix.end() if prefix else 0 :])


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical names in the fixed order I … V6; a lead named twice, or no lead, raises LsemvaeError."""
    canonical_names = [canonical(name) for name in names]
    twice = sorted({name for name in canonical_names if canonical_names.count(name) > 1})
    if twice:
        raise LsemvaeError(f"lead {', '.join(twice)} is given twice: give each lead once")
    if not canonical_names:
        raise LsemvaeError(f"no lead is given: name at least one of {', '.join(LEADS)}")
    return tuple(lead for lead in LEADS if lead in canonical_names)


def parse_leads(text: str) -> tuple[str, ...]:
    """`"12"`, `"6"` (the limb leads) or names such as `"I,II,V1"` -> canonical names in the fixed order."""
    sets = {"12": LEADS, "12l": LEADS, "6": LIMB_LEADS, "6l": LIMB_LEADS}
    return sets.get(text.strip().casefold()) or in_order(part for part in text.split(",") if part.strip())


def lead_set_name(leads: Iterable[str]) -> str:
    """`"12L"`, `"6L"`, or the names joined by `-`: the name of a lead set in tables and model names."""
    leads = tuple(leads)
    return {LEADS: "12L", LIMB_LEADS: "6L"}.get(leads) or "-".join(leads)
