"""Leads have names, in any case and order; a position means nothing."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.errors import LsemvaeError
from lsemvae.leads import (
    CHEST_LEADS,
    LEADS,
    LIMB_FROM_I_II,
    LIMB_LEADS,
    canonical,
    identify,
    in_order,
    lead_set_name,
    parse_leads,
    unknown_lead_flag,
)


@pytest.mark.parametrize(
    ("written", "lead"),
    [
        ("AVL", "aVL"),
        (" avl ", "aVL"),
        ("Lead aVL", "aVL"),
        ("lead_II", "II"),
        ("Lead-I", "I"),
        ("i", "I"),
        ("v1", "V1"),
    ],
)
def test_canonical(written: str, lead: str) -> None:
    assert canonical(written) == lead


@pytest.mark.parametrize("name", ["", "MLII", "V7", "0", "aV", "lead", "IV", "-aVR", "-I", "\x00", "V1" * 10_000])
def test_unknown_lead_is_refused_in_one_short_line(name: str) -> None:
    with pytest.raises(LsemvaeError) as caught:
        canonical(name)
    message = str(caught.value)
    assert "I, II, III, aVR, aVL, aVF, V1" in message
    assert "\n" not in message
    assert len(message) < 200


ROMAN = ("I", "II", "III")
SYNONYMS = [
    *((f"D{lead}", lead) for lead in ROMAN),
    *((f"D{number}", lead) for number, lead in enumerate(ROMAN, 1)),
    *((f"{lead} (Einthoven)", lead) for lead in ROMAN),
    *((f"{lead} (Goldberger)", lead) for lead in ("aVR", "aVL", "aVF")),
    *((f"C{number}", f"V{number}") for number in range(1, 7)),
    *((f"V{number} (Wilson)", f"V{number}") for number in range(1, 7)),
    *((chr(0x2160 + number), lead) for number, lead in enumerate(ROMAN)),  # the one sign for a Roman numeral
    *((lead, lead) for lead in LEADS),
]


@settings(deadline=None)
@given(
    st.sampled_from(SYNONYMS),
    st.sampled_from(["", "Lead ", "lead_", "LEAD-", "ECG ", "EKG_", "ECG Lead ", "MDC_ECG_LEAD_"]),
    st.sampled_from([str, str.upper, str.lower]),
    st.sampled_from(["", " ", "  "]),
)
def test_a_synonym_is_one_lead(synonym: tuple[str, str], prefix: str, case: Callable, space: str) -> None:
    """Whatever is written around it and in whatever case, a synonym stands for its own lead and for no other."""
    name, lead = synonym
    assert canonical(f"{space}{case(prefix + name)}{space}") == lead


@settings(deadline=None)
@given(st.text(alphabet="IiVvDdCcaRrLlFf123456 ()_-", max_size=8))
def test_no_name_is_two_leads(name: str) -> None:
    """A name is a lead by one way of reading it: alone, among others, and with its spelling changed."""
    found = {lead for other in ("V1", "aVF") if (lead := identify([name, other])[0])}
    assert len(found) <= 1
    if found:
        assert {canonical(name), canonical(name.lower()), canonical(f"Lead {name.strip()}")} == found


@pytest.mark.parametrize(
    "name", ["I (inverted)", "-C1", "D4", "DaVR", "C7", "V1 (right)", "ECG", "ECG 1", "MDC_ECG_LEAD_"]
)
def test_what_resembles_a_synonym_is_unknown(name: str) -> None:
    with pytest.raises(LsemvaeError):
        canonical(name)


def test_names_of_an_eeg_are_no_leads() -> None:
    assert identify(["C3", "C4", "Cz", "D1"]) == [None] * 4
    assert identify(["C1", "D1", "resp", "aVF"]) == ["V1", "I", None, "aVF"]


@settings(deadline=None)
@given(st.text(max_size=80), st.integers(0, 63))
def test_a_flag_repeats_no_free_text(name: str, position: int) -> None:
    flag = unknown_lead_flag(name, position)
    assert len(flag) < 30 and flag.isprintable()
    assert flag == f"unknown_lead:signal {position + 1}" or " ".join(name.split()) in flag


@pytest.mark.parametrize("name", ["SMITH", "Anna", "12345", "S1234", "I SMITH", "V1\nx", "X" * 17])
def test_a_flag_names_nobody(name: str) -> None:
    assert unknown_lead_flag(name, 3) == "unknown_lead:signal 4"


@pytest.mark.parametrize("name", ["V7", "v3r", "MLII", "-aVR", "ECG 1", "CH2", "X", "RESP"])
def test_a_flag_names_what_the_signal_is(name: str) -> None:
    assert unknown_lead_flag(name, 0) == f"unknown_lead:{name}"


@settings(deadline=None)
@given(st.permutations(LEADS).flatmap(lambda order: st.tuples(st.just(order), st.integers(1, 12))))
def test_in_order_depends_on_names_alone(drawn: tuple[list[str], int]) -> None:
    order, count = drawn
    chosen = order[:count]
    assert in_order(name.upper() for name in chosen) == tuple(lead for lead in LEADS if lead in chosen)


def test_a_lead_twice_and_no_lead_are_refused() -> None:
    with pytest.raises(LsemvaeError, match="lead aVL is given twice"):
        in_order(["I", "aVL", "AVL"])
    with pytest.raises(LsemvaeError, match="no lead is given"):
        in_order([])


@pytest.mark.parametrize(
    ("text", "leads"),
    [("12", LEADS), ("6L", LIMB_LEADS), ("V1, ii,I", ("I", "II", "V1")), (",".join(reversed(LEADS)), LEADS)],
)
def test_parse_leads(text: str, leads: tuple[str, ...]) -> None:
    assert parse_leads(text) == leads


@pytest.mark.parametrize("text", ["", " , ", "13", "I,I", "I;II"])
def test_parse_leads_refuses(text: str) -> None:
    with pytest.raises(LsemvaeError):
        parse_leads(text)


def test_lead_set_names() -> None:
    assert LIMB_LEADS + CHEST_LEADS == LEADS
    assert [lead_set_name(leads) for leads in (LEADS, LIMB_LEADS, ("I", "V1"))] == ["12L", "6L", "I-V1"]


def test_relations_are_those_of_einthoven_and_goldberger() -> None:
    """Potentials of the electrodes RA, LA and LL -> the limb leads by their definitions."""
    ra, la, ll = 0.3, -0.2, 1.1
    i, ii = la - ra, ll - ra
    defined = {
        "III": ll - la,
        "aVR": ra - (la + ll) / 2,
        "aVL": la - (ra + ll) / 2,
        "aVF": ll - (ra + la) / 2,
    }
    computed = {lead: of_i * i + of_ii * ii for lead, (of_i, of_ii) in LIMB_FROM_I_II.items()}
    assert computed == pytest.approx(defined)
