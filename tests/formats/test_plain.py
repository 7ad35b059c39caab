"""CSV and NPY: what is declared is what is read, and nothing is guessed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.apart import in_memory
from support.plain_files import ARRAY_LT, DECLARED, HUGE, SIDE, npy, npy_header

from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import plain, read, read_record
from lsemvae.leads import LEADS
from lsemvae.record import Record


def read_files(files: Mapping[str, bytes], **options: object) -> Record:
    return read_record(next(iter(files)), in_memory(files), **options)


def read_csv(text: str, **beside: object) -> Record:
    return read_files({"a.csv": text.encode()} | ({"a.json": json.dumps(beside).encode()} if beside else {}))


def refusal(files: Mapping[str, bytes]) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        read_files(files)
    assert str(caught.value).startswith(next(iter(files)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return caught.value


# --- CSV ----------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring() -> None:
    """What the documentation shows can be read as it stands there."""
    text = re.search(r"\n    # rate.*?(?=\n\n)", plain.__doc__, re.DOTALL)[0]
    record = read_csv("\n".join(line.strip() for line in text.splitlines()))
    assert (record.rate_hz, record.record_id, record.subject_id) == (500.0, "a", None)
    np.testing.assert_allclose(record.signal_for(["I", "II", "V1"])[:, 0], [0.005, 0.010, -0.020], rtol=1e-6)
    beside = json.loads(re.search(r"`(\{[^}]*mV\"\})`", plain.__doc__)[1])
    assert read_csv("I,II\n1,2\n", **beside).rate_hz == 500.0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(LEADS), min_size=1, max_size=12, unique=True),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([("mV", 1.0), ("uV", 1e-3), ("\u00b5V", 1e-3), ("V", 1e3), ("nv", 1e-6)]),
    st.booleans(),
)
def test_round_trip(
    leads: list[str], samples: int, seed: int, mark: str, newline: str, unit: tuple[str, float], quoted: bool
) -> None:
    rng = np.random.default_rng(seed)
    values_LT = rng.normal(size=(len(leads), samples))
    values_LT[rng.random(values_LT.shape) < 0.1] = np.nan
    names = [f'"{lead}"' if quoted else lead.upper() for lead in leads]
    rows = [mark.join("" if np.isnan(value) else repr(float(value)) for value in row) for row in values_LT.T]
    rows[-1] = rows[-1] or "nan"  # an empty last line of a single lead is no sample
    lines = ["# made by hand", f"# rate_hz = 360.5{mark}", f"# Unit: {unit[0]}", mark.join(names), *rows, ""]
    record = read_csv(newline.join(lines))
    assert record.rate_hz == 360.5
    expected = (values_LT * unit[1]).astype(np.float32)
    np.testing.assert_allclose(record.signal_for(leads), expected, rtol=1e-6)
    assert set(record.leads) - set(record.derived) == set(leads)


def test_whole_numbers_keep_their_step() -> None:
    record = read_csv("# rate_hz: 500\n# uv_per_lsb: 4.88\nI,V1\n-7,100\n,3\n")
    assert record.uv_per_lsb_L.tolist() == [4.88, 4.88]
    np.testing.assert_allclose(record.signal_mv_LT, np.array([[-7, np.nan], [100, 3]]) * 0.00488, rtol=1e-6)
    np.testing.assert_array_equal(unpack(pack(record)).signal_mv_LT, record.signal_mv_LT)
    assert read_csv("# rate_hz: 500\n# unit: uV\nI\n1\n").uv_per_lsb_L.tolist() == [1.0]
    assert read_csv("# rate_hz: 500\n# unit: uV\nI\n1.5\n").uv_per_lsb_L is None


def test_declared_in_a_side_file() -> None:
    record = read_csv("I,II\n1,2\n", rate_hz=250, unit="mV")
    assert (record.rate_hz, record.derived) == (250.0, ("III", "aVR", "aVL", "aVF"))
    # Comments that declare are not completed from elsewhere.
    files = {"a.csv": b"# rate_hz: 500\nI\n1\n", "a.json": b'{"rate_hz": 250, "unit": "mV"}'}
    assert refusal(files).code == "undeclared"


def test_known_step_replaces_the_unit() -> None:
    record = read_files({"a.csv": b"# rate_hz: 500\nI\n250\n"}, uv_per_lsb=2.0)
    assert record.signal_mv_LT.tolist() == [[0.5]]


def test_encodings() -> None:
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        content = "# rate_hz: 500\n# unit: \u00b5V\nI\n5\n".encode(encoding)
        assert read_files({"a.csv": content}).signal_mv_LT.tolist() == [[np.float32(0.005)]]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("I,II\n1,2\n", "undeclared"),
        ("# rate_hz: 500\nI\n1\n", "undeclared"),
        ("# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: 500\n# unit: mmHg\nI\n1\n", "undeclared"),
        ("# rate_hz: 500\n# unit: mV\n# uv_per_lsb: 5\nI\n1\n", "undeclared"),
        ("# rate_hz: 500\n# rate_hz: 250\n# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: fast\n# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: nan\n# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: 1e400\n# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: -500\n# unit: mV\nI\n1\n", "undeclared"),
        ("# rate_hz: 1e6\n# unit: mV\nI\n1\n", "rate"),
        ("# rate_hz: 500\n# uv_per_lsb: 1e-9\nI\n1\n", "gain"),
        (DECLARED + "time,I\n0,1\n", "no_ecg_lead"),
        (DECLARED + ",I\n0,1\n", "no_ecg_lead"),
        (DECLARED + "I,V7\n0,1\n", "no_ecg_lead"),
        (DECLARED + "I,i\n0,1\n", "duplicate_lead"),
        (DECLARED + "I,II\n", "length"),
        (DECLARED + "I,II", "length"),
        (DECLARED + "I,II\n1\n", "length"),
        (DECLARED + "I,II\n1,2,3\n", "length"),
        (DECLARED + "I,II\n1,2\n3\n", "sample"),
        (DECLARED + "I,II\n1,2\n\n3,4\n", "sample"),
        (DECLARED + "I,II\n1,x\n", "sample"),
        (DECLARED + "I,II\n1,2\n# unit: uV\n", "sample"),
        (DECLARED + "I;II\n1,5;2,5\n", "sample"),
        (DECLARED + "I\ninf\n", "sample"),
        (DECLARED + "I\n1e300\n", "sample"),
        (DECLARED + "1,2\n3,4\n", "format"),
        (DECLARED, "format"),
        ("record_id,ph\na,1\n", "format"),
        (DECLARED + "I," * 5000 + "\n1\n", "header"),
        ("#" * 5000 + "\nI\n1\n", "format"),
    ],
)
def test_malformed_csv(text: str, code: str) -> None:
    error = refusal({"a.csv": text.encode()}) if code != "format" else None
    if code == "format":
        with pytest.raises(UnreadableRecording) as caught:
            read_csv(text)
        error = caught.value
    assert error.code == code
    if code == "undeclared" and "twice" not in str(error):
        assert "# rate_hz: 500" in str(error) and "'a.json'" in str(error)  # what to write, and where


def test_a_csv_of_ten_seconds_of_twelve_leads(tmp_path: Path) -> None:
    values_TL = np.random.default_rng(0).integers(-2000, 2000, (5000, 12))
    rows = "\n".join(",".join(map(str, row)) for row in values_TL)
    (tmp_path / "a.csv").write_text(f"# rate_hz: 500\n# uv_per_lsb: 5\n{','.join(LEADS)}\n{rows}\n")
    np.testing.assert_allclose(read(tmp_path / "a.csv").signal_mv_LT, values_TL.T * 0.005, rtol=1e-6)


# --- NPY ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["i1", "<i2", ">i2", "u2", "<i4", "i8", "<f2", "<f4", ">f8"]),
    st.integers(1, 12),
    st.integers(13, 40),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
def test_npy_round_trip(dtype: str, n_leads: int, samples: int, seed: int, fortran: bool, columns: bool) -> None:
    rng = np.random.default_rng(seed)
    values_LT = (rng.random((n_leads, samples)) * 100).astype(dtype)
    values_LT[rng.random(values_LT.shape) < 0.1] = 0 if np.issubdtype(dtype, np.integer) else np.nan
    stored = np.array(values_LT.T if columns else values_LT, order="F" if fortran else "C")
    leads = rng.permutation(LEADS)[:n_leads].tolist()
    side = {"rate_hz": 400, "uv_per_lsb": 2.5, "leads": leads, "device": "unknown names do not matter"}
    record = read_files({"a.npy": npy(stored), "a.json": json.dumps(side).encode()})
    assert record.rate_hz == 400
    expected = (values_LT.astype(np.float64) * 0.0025).astype(np.float32)
    np.testing.assert_allclose(record.signal_for(leads), expected, rtol=1e-6)
    assert (record.uv_per_lsb_L is not None) == (np.issubdtype(dtype, np.integer) or not np.any(values_LT % 1))


def test_one_lead_may_be_flat() -> None:
    side = json.dumps({"rate_hz": 300, "unit": "mV", "leads": ["II"]}).encode()
    assert read_files({"a.npy": npy(np.zeros(9)), "a.json": side}).signal_mv_LT.shape == (1, 9)


def test_npy_equals_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY_LT)
    (tmp_path / "a.json").write_text(json.dumps(SIDE))
    np.testing.assert_array_equal(read(tmp_path / "a.npy").signal_for(SIDE["leads"]), np.load(tmp_path / "a.npy"))


class Malicious:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("was unpickled",)


@pytest.mark.parametrize(
    ("content", "side", "code"),
    [
        (npy(ARRAY_LT), None, "undeclared"),
        (npy(ARRAY_LT), b"", "json"),
        (npy(ARRAY_LT), b"[1]", "json"),
        (npy(ARRAY_LT), b'{"rate_hz": NaN}', "json"),
        (npy(ARRAY_LT), b'{"rate_hz": 500, "rate_hz": 250}', "json"),
        (npy(ARRAY_LT), SIDE | {"rate_hz": True}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"rate_hz": None}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"rate_hz": [500]}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"rate_hz": 10**400}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"rate_hz": 10**9}, "rate"),
        (npy(ARRAY_LT), SIDE | {"unit": 5}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"unit": None, "uv_per_lsb": 0}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"leads": "I,II,V1"}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"leads": [1, 2, 3]}, "undeclared"),
        (npy(ARRAY_LT), SIDE | {"leads": ["I", "II", "V9"]}, "no_ecg_lead"),
        (npy(ARRAY_LT), SIDE | {"leads": ["I", "II", "ii"]}, "duplicate_lead"),
        (npy(ARRAY_LT), SIDE | {"leads": ["I", "II"]}, "length"),
        (npy(ARRAY_LT), SIDE | {"leads": []}, "length"),
        (npy(ARRAY_LT)[:-1], SIDE, "truncated"),
        (npy(ARRAY_LT) + b"\0", SIDE, "truncated"),
        (npy(ARRAY_LT)[:20], SIDE, "header"),
        (npy(np.zeros((0, 3))), SIDE, "length"),
        (npy(np.zeros((2, 3, 4))), SIDE, "length"),
        (npy(np.float64(3)), SIDE, "length"),
        (npy(ARRAY_LT + np.inf), SIDE, "sample"),
        (npy(ARRAY_LT.astype(np.complex64)), SIDE, "format"),
        (npy(ARRAY_LT.astype(bool)), SIDE, "format"),
        (npy(ARRAY_LT.astype(np.longdouble)), SIDE, "format"),
        (npy(ARRAY_LT.astype("U4")), SIDE, "format"),
        (npy(np.zeros(3, dtype=[("I", "f4"), ("II", "f4")])), SIDE, "format"),
        (npy(np.array([[Malicious()]] * 3, dtype=object), allow_pickle=True), SIDE, "format"),
        (npy_header(HUGE), SIDE, "too_large"),
        (npy_header(HUGE.replace("1000000000000", "1000")), SIDE, "truncated"),
        (npy_header(HUGE.replace("1000000000000", "-5")), SIDE, "length"),
        (npy_header("__import__('os').getcwd()"), SIDE, "header"),
        (npy_header("(" * 200), SIDE, "header"),
        (npy_header("'" + "x" * 20_000 + "'"), SIDE, "header"),
        (npy_header(HUGE, version=b"\x03\x00"), SIDE, "header"),
        (b"\x93NUMPY", SIDE, "header"),
    ],
)
def test_malformed_npy(content: bytes, side: object, code: str) -> None:
    files = {"a.npy": content}
    if side is not None:
        files["a.json"] = side if isinstance(side, bytes) else json.dumps(side).encode()
    error = refusal(files)
    assert error.code == code
    if code == "undeclared":
        assert '"leads": ["I", "II"]' in str(error)


# --- tables that other programs write ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        "I, II, V1\n1, 2, 3\n4, 5, 6\n",
        " I ; II ; V1 \n1 ; 2 ; 3\n4 ; 5 ; 6\n",
        "I II V1\n1 2 3\n4 5 6\n",
        "  I   II  V1\n  1    2   3\n  4    5   6\n",
        "I\tII\tV1\n1\t2\t3\n4\t5\t6\n",
        '" I" , "II " , "V1"\n1,2,3\n4,5,6\n',
        "ECG I,DII,C1\n1,2,3\n4,5,6\n",
    ],
)
def test_separators_blanks_and_other_names(rows: str) -> None:
    record = read_csv(DECLARED + rows)
    assert record.signal_for(["I", "II", "V1"]).tolist() == [[1, 4], [2, 5], [3, 6]]


def test_a_single_column_may_have_a_blank_in_its_name() -> None:
    assert read_csv(DECLARED + "Lead I\n1\n2\n").signal_for(["I"]).tolist() == [[1, 2]]


def test_decimal_commas_are_named() -> None:
    assert "decimal commas: write decimal points" in str(refusal({"a.csv": f"{DECLARED}I;II\n1,5;2,5\n".encode()}))


@pytest.mark.parametrize("header", ["record_id,score,I", "C3,C4,Cz", "model,D1,D2", "fold;auroc;V1"])
def test_a_table_of_results_is_no_recording(header: str) -> None:
    assert not plain.recognise_csv(f"{header}\n1,2,3\n".encode())


def test_what_is_written_as_csv_is_read_again():
    signal_mv_LT = np.random.default_rng(0).normal(size=(2, 50)).round(4)
    signal_mv_LT[1, 7] = np.nan
    content = plain.as_csv(signal_mv_LT, 250.5, ("V1", "II"), decimals=4).encode()
    record = plain.read_csv("r.csv", content, {}.__getitem__)
    assert record.rate_hz == 250.5
    np.testing.assert_allclose(record.signal_for(("V1", "II")), signal_mv_LT, atol=1e-6)
