"""The twelve leads, by name. Nothing in this project knows a lead by its position."""

from collections.abc import Iterable, Mapping

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


def canonical(name: str) -> str:
    """`"AVL"`, `" avl "` or `"Lead aVL"` -> `"aVL"`; an unknown name raises LsemvaeError."""
    folded = name.strip().casefold()
    if folded.startswith("lead"):
        folded = folded.removeprefix("lead").lstrip(" _-")  # else the minus of an inverted lead would be lost
    try:
        return _BY_FOLDED_NAME[folded]
    except KeyError:
        raise LsemvaeError(f"unknown lead {name[:40]!r}: the leads are {', '.join(LEADS)}") from None


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
    """`"12"`, `"6"` (the limb leads) or names such as `"I,II,V1"` -> canonical names in fixed order."""
    sets = {"12": LEADS, "12l": LEADS, "6": LIMB_LEADS, "6l": LIMB_LEADS}
    return sets.get(text.strip().casefold()) or in_order(part for part in text.split(",") if part.strip())


def lead_set_name(leads: Iterable[str]) -> str:
    """`"12L"`, `"6L"`, or the names joined by `-`: how a lead set is written in tables and model names."""
    leads = tuple(leads)
    return {LEADS: "12L", LIMB_LEADS: "6L"}.get(leads) or "-".join(leads)
