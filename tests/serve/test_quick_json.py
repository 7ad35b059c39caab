"""The quick reader of JSON bodies against pydantic: the same recordings, and what is wrong is left to pydantic."""

import json
import subprocess
import sys

import numpy as np
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.bundles import records
from support.serving import as_json, ask, only, score
from support.session import ROOT

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.record import Record
from serve import bodies, quick_json
from serve.bodies import Parsed
from serve.schema import MAX_RECORDS, ExplainRequest, ScoreRequest

pytestmark = pytest.mark.skipif(not quick_json.AVAILABLE, reason="simdjson is not installed")


def as_slow(body: bytes, kind: type[ScoreRequest] = ScoreRequest) -> Parsed | None:
    """What pydantic reads; None where it refuses the body."""
    try:
        return bodies._parse(body, kind)
    except RequestValidationError:
        return None


def same(quick: Parsed, slow: Parsed | None) -> None:
    assert slow is not None, "the quick reader accepts what pydantic refuses"
    assert quick[0] == slow[0]
    for one, other in zip(quick[1], slow[1], strict=True):
        assert type(one) is type(other)
        if isinstance(one, LsemvaeError):
            assert str(one) == str(other)
            continue
        assert isinstance(one, Record) and isinstance(other, Record)
        assert (one.leads, one.derived, one.rate_hz) == (other.leads, other.derived, other.rate_hz)
        assert one.signal_mv_LT.dtype == np.float32
        np.testing.assert_array_equal(one.signal_mv_LT, other.signal_mv_LT)  # the same bits, NaN in the same places


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(10**25), 10**25).map(str),
    st.from_regex(r"-?[0-9]{1,25}(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["0", "-0", "-0.0", "1e-400", "4.9e-324", "1.7976931348623157e308", "9007199254740993", "1E5"]),
)
VALUES = NUMBERS | st.just("null")
ODD = st.sampled_from(
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "01",
        "1.",
        ".5",
        "+1",
        "0x1",
        "true",
        '"1.5"',
        '"a"',
        "[1]",
        "[]",
        "{}",
        "",
    ]
)
LISTS = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=6),
    st.lists(VALUES, min_size=1, max_size=6),
    st.lists(VALUES | ODD, max_size=4),
)
NAMES = st.sampled_from([*LEADS, "avl", "DI", "V7", "I\\u0000", "\\u0049", ""])
BLANK = st.sampled_from(["", "", " ", "\n\t"])
TEXTS = st.sampled_from(
    ['"a"', '""', '"[1, 2]"', '"\\"leads\\": ["', '"\\ud800"', '"ж"', '"a:b,c"', "1", "null", "[1]", '{"a": 1}']
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A body as JSON text: mostly valid, with any number, and now and then with what is not allowed."""

    def members(pairs: list[tuple[str, str]]) -> str:
        blank = draw(BLANK)
        return "{" + f",{blank}".join(f'"{name}"{blank}:{blank}{value}' for name, value in pairs) + "}"

    def record() -> str:
        names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=draw(st.booleans())))
        same_length = draw(st.booleans())
        row = draw(LISTS)
        rows = [(name, "[" + f"{draw(BLANK)},".join(row if same_length else draw(LISTS)) + "]") for name in names]
        pairs = [("leads", members(rows)), ("rate_hz", draw(st.sampled_from(["500", "360.5", '"500"', "0", "1e400"])))]
        pairs += draw(st.lists(st.tuples(st.sampled_from(["id", "id", "unit", "extra", "rate_hz"]), TEXTS), max_size=2))
        pairs += draw(st.sampled_from([[], [], [("unit", '"uV"')], [("unit", '"mV"')]]))
        return members(draw(st.permutations(pairs)))

    records = "[" + ",".join(record() for _ in range(draw(st.integers(1, 3)))) + "]"
    pairs = [("records", records), *draw(st.sampled_from([[], [], [("model", '"m"')], [("model", "null")]]))]
    before, after = draw(
        st.sampled_from([("", "")] * 6 + [("\ufeff", ""), (" ", "\n"), ("", "x"), ("", "\0"), ("\0", "")])
    )
    return (before + members(draw(st.permutations(pairs))) + after).encode()


@settings(max_examples=150, deadline=None)
@given(texts())
@example(b'{"records": [{"rate_hz": 500, "leads": {"I": [[1], [2]]}}]}')
@example(b'{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "extra": {"x": 1}}]}')
@example(b'{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "id": {}}], "model": [2]}')
@example(b'{"records": [{"rate_hz": {"a": 1}, "leads": {"I": [1]}}]}')
@example(b'{"records": [{"rate_hz": 500, "leads": {"I": [1, 2], "\\u0049": [3, 4]}}]}')
@example(b'{"records": [{"rate_hz": 500, "leads": {"I": [1, 2], "I\\u0000": [3, 4]}}]}')
@example(b'\xef\xbb\xbf{"records": [{"rate_hz": 500, "leads": {"I": [1]}}]}')
def test_a_body_is_read_as_pydantic_reads_it_or_is_left_to_pydantic(body: bytes):
    quick = bodies._parse_quickly(body, ScoreRequest)
    if quick is not None:
        same(quick, as_slow(body))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_byte_is_never_accepted_by_one_reader_alone(data: st.DataObject):
    """A valid body with one byte changed, removed or added: what the quick reader accepts, pydantic reads alike."""
    body = bytearray(
        b'{"records": [{"rate_hz": 500, "unit": "uV", "id": "x", "leads": {"I": [1, -2.5e3], "II": [0, null]}}]}'
    )
    at = data.draw(st.integers(0, len(body) - 1))
    byte = data.draw(st.sampled_from(b'0123456789-+.eE,:[]{}"\\ntu \0\xff'))
    match data.draw(st.sampled_from(["change", "remove", "add"])):
        case "change":
            body[at] = byte
        case "remove":
            del body[at]
        case "add":
            body.insert(at, byte)
    quick = bodies._parse_quickly(bytes(body), ScoreRequest)
    if quick is not None:
        same(quick, as_slow(bytes(body)))


def test_ordinary_bodies_take_the_quick_way():
    """Decimal numbers, whole numbers, null, microvolts, several recordings, blanks, and a model."""
    one, other = records(2, seed=3)
    given = [as_json(one, id="a-1"), as_json(other, ("I", "II"), unit="uV")]
    given[0]["leads"]["V2"] = [None if k % 3 == 0 else round(k / 7, 3) for k in range(5000)]
    given[1]["leads"]["I"] = list(range(-2500, 2500))
    for text in (json.dumps({"records": given, "model": "m"}), json.dumps({"records": given}, indent=1)):
        quick = bodies._parse_quickly(text.encode(), ScoreRequest)
        assert quick is not None
        same(quick, as_slow(text.encode()))
    assert bodies._parse_quickly(text.encode(), ExplainRequest) is None  # two recordings


def test_too_many_recordings_or_leads_are_left_to_pydantic():
    record = {"rate_hz": 500, "leads": {"I": [1]}}
    leads = {f"V{k}": [1] for k in range(13)}
    for several in ([record] * (MAX_RECORDS + 1), [record | {"leads": leads}], []):
        assert bodies._parse_quickly(json.dumps({"records": several}).encode(), ScoreRequest) is None


def test_both_readers_give_the_same_answer(api, monkeypatch: pytest.MonkeyPatch):
    record = records(1, seed=4)[0]
    quick = score(api, as_json(record))
    monkeypatch.setattr(quick_json, "AVAILABLE", False)
    assert only(score(api, as_json(record))) == only(quick)


def test_a_body_that_is_read_twice_is_refused_in_the_same_words(api, monkeypatch: pytest.MonkeyPatch):
    """And where a request has no room for the second reading, it is refused as too large."""
    body = b'{"records": [{"rate_hz": 500, "leads": {"I": [1, NaN]}}]}'

    def asked() -> tuple[int, str]:
        answer = ask(api, "POST", "/v1/score", content=body, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.text

    twice = asked()
    monkeypatch.setattr(quick_json, "AVAILABLE", False)
    assert asked() == twice and twice[0] == 422


@pytest.mark.parametrize("values", ["0,", "0.1234567890123456,"])
def test_quick_reading_takes_no_more_memory_than_is_charged_for_it(values: str):
    """In a process of its own, since the peak of a process never falls: as many samples as one request may have."""
    script = f"""
import re
from serve import bodies, quick_json
from serve.inputs import json_samples
from serve.schema import ScoreRequest
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
body = ('{{"records": [{{"rate_hz": 500, "leads": {{"I": [' + "{values}" * 3_900_000 + "0]}}}}]}}").encode()
bodies._parse_quickly(b'{{"records": [{{"rate_hz": 500, "leads": {{"I": [1]}}}}]}}', ScoreRequest)
before = peak()
assert bodies._parse_quickly(body, ScoreRequest) is not None
print(quick_json.BYTES_PER_SAMPLE * json_samples(body), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    charged, taken = map(int, done.stdout.split())
    assert 0.3 * charged < taken < 1.1 * charged
