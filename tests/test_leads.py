"""Leads have names, in any case and order; a position means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsemvae.errors import LsemvaeError
from lsemvae.leads import (
    CHEST_LEADS,
    LEADS,
    LIMB_FROM_I_II,
    LIMB_LEADS,
    canonical,
    in_order,
    lead_set_name,
    parse_leads,
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
