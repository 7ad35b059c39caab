"""`Record`: leads by name, derived where absent, missing where neither."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.errors import LsemvaeError
from lsemvae.leads import CHEST_LEADS, LEADS, LIMB_LEADS
from lsemvae.record import Record


def signals(leads: tuple[str, ...], samples: int = 50, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {lead: rng.normal(size=samples).astype(np.float32) for lead in leads}


@settings(deadline=None)
@given(st.permutations(LEADS), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_order_and_case_of_the_input_change_nothing(order: list[str], count: int, seed: int) -> None:
    chosen = tuple(order[:count])
    rows = signals(chosen, seed=seed)
    record = Record.from_leads({lead.upper(): rows[lead] for lead in chosen}, 500)
    expected = Record.from_leads({lead: rows[lead] for lead in LEADS if lead in chosen}, 500)
    assert record.leads == expected.leads
    assert record.derived == expected.derived
    np.testing.assert_array_equal(record.signal_mv_LT, expected.signal_mv_LT)
    for lead in chosen:
        np.testing.assert_array_equal(record.signal_for([lead])[0], rows[lead])
        assert record.origin(lead) == "measured"


@pytest.mark.parametrize("absent", [(), ("III",), ("aVL", "aVF"), ("III", "aVR", "aVL", "aVF")])
def test_absent_limb_leads_are_derived_and_others_kept(absent: tuple[str, ...]) -> None:
    given_leads = tuple(lead for lead in LIMB_LEADS if lead not in absent)
    rows = signals(given_leads)
    record = Record.from_leads(rows, 500, uv_per_lsb=dict.fromkeys(given_leads, 5.0))
    assert record.leads == LIMB_LEADS
    assert record.derived == absent
    i, ii = rows["I"], rows["II"]
    truth = {"III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}
    for lead in absent:
        np.testing.assert_allclose(record.signal_for([lead])[0], truth[lead], atol=1e-6)
        assert record.origin(lead) == "derived"
    for lead in given_leads:  # measured leads stay as measured, though they contradict the others here
        np.testing.assert_array_equal(record.signal_for([lead])[0], rows[lead])
    steps = dict(zip(record.leads, record.uv_per_lsb_L, strict=True))
    assert steps == {lead: 2.5 if lead in absent else 5.0 for lead in LIMB_LEADS}


def test_derived_leads_are_integers_in_their_own_step() -> None:
    """So that shards keep them exactly."""
    rng = np.random.default_rng(1)
    counts = {lead: rng.integers(-3000, 3000, 200) for lead in ("I", "II")}
    record = Record.from_leads(
        {lead: row * 0.005 for lead, row in counts.items()}, 500, uv_per_lsb={"I": 5.0, "II": 5.0}
    )
    in_steps_LT = record.signal_mv_LT.astype(float) * 1000 / record.uv_per_lsb_L[:, None]
    assert np.abs(in_steps_LT - np.rint(in_steps_LT)).max() < 0.01


@pytest.mark.parametrize("leads", [("I",), ("II", "V1"), CHEST_LEADS, ("III", "aVF")])
def test_nothing_is_derived_without_both_i_and_ii(leads: tuple[str, ...]) -> None:
    record = Record.from_leads(signals(leads), 500)
    assert record.leads == leads
    assert record.derived == ()


def test_missing_leads_are_nan() -> None:
    record = Record.from_leads(signals(("V1", "II")), 500)
    signal_mv_LT = record.signal_for(LEADS)
    assert signal_mv_LT.shape == (12, 50)
    assert np.isnan(signal_mv_LT).all(axis=1).sum() == 10
    np.testing.assert_array_equal(record.signal_for(("V1", "II")), record.signal_for(("II", "V1"))[::-1])
    assert record.origin("avr") == "missing"
    with pytest.raises(LsemvaeError):
        record.origin("V9")


def test_nan_spreads_only_to_leads_derived_from_it() -> None:
    rows = signals(("I", "II", "V1"))
    rows["I"][3] = np.nan
    missing_LT = np.isnan(Record.from_leads(rows, 500).signal_mv_LT)
    assert missing_LT[:, 3].tolist() == [True, False, True, True, True, True, False]
    assert missing_LT.sum() == 5


@pytest.mark.parametrize(
    ("leads", "rate_hz", "part"),
    [
        ({"I": [1.0], "i": [2.0]}, 500, "twice"),
        ({"V7": [1.0]}, 500, "unknown lead"),
        ({}, 500, "no lead"),
        ({"I": []}, 500, "equally long"),
        ({"I": [1.0, 2.0], "II": [1.0]}, 500, "equally long"),
        ({"I": [[1.0], [2.0]]}, 500, "flat lists"),
        ({"I": [[1.0], [2.0, 3.0]]}, 500, "flat lists"),
        ({"I": ["a"]}, 500, "flat lists"),
        ({"I": [None, 1.0]}, 0, "rate"),
        ({"I": [{}]}, 500, "flat lists"),
        ({"I": 3.0}, 500, "flat lists"),
        ({"I": [1.0]}, 0, "rate"),
        ({"I": [1.0]}, -500, "rate"),
        ({"I": [1.0]}, float("nan"), "rate"),
        ({"I": [1.0]}, float("inf"), "rate"),
    ],
)
def test_mistakes_are_named(leads: dict[str, object], rate_hz: float, part: str) -> None:
    with pytest.raises(LsemvaeError, match=part):
        Record.from_leads(leads, rate_hz)
