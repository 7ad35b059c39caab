"""What the endpoint answers, asked in-process: every form of a recording, every subset of leads, every bad body."""

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import schemathesis
import wfdb
from fastapi.exceptions import RequestValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.bundles import records
from support.bundles import save as save_classifier
from support.serving import DERIVABLE, TOKEN, as_json, ask, npy, only, score, score_files, score_npy
from support.session import ROOT

from lsemvae import bundle as bundles
from lsemvae.bundle import Doubt, Scorer
from lsemvae.errors import LsemvaeError
from lsemvae.formats import read
from lsemvae.leads import CHEST_LEADS, LEADS, LIMB_LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record
from lsemvae.scoring.inputs import Read
from lsemvae.scoring.scores import ScoreRows
from serve import scoring
from serve.api import make_api
from serve.inputs import TooLarge, from_files, from_json, json_memory, to_record
from serve.observed import Metrics
from serve.reconstruct import Encoder, Reconstructor
from serve.registry import Registry
from serve.schema import MAX_RECORDS, MAX_SAMPLES, RecordIn, RecordOut, ScoreRequest
from serve.scoring import Batcher, min_leads
from serve.service import Service

# --- answers -----------------------------------------------------------------------------------------


def test_an_answer_says_score_decision_model_and_what_is_doubtful(api, models: Path, record: Record):
    (expected,) = Scorer(models / "ph-12L").score([record])
    result = only(score(api, as_json(record, id="patient-77")))
    assert result["id"] == "patient-77"
    assert result["score"] == pytest.approx(expected.score, abs=1e-6)
    assert result["decision"] is expected.decision
    assert result["probability"] == expected.probability
    assert result["leads_used"] == list(LEADS)
    assert (result["leads_derived"], result["flags"], result["refused"]) == ([], [], None)
    assert result["reliability"] == {"level": "good", "reasons": []}
    described = bundles.describe(models / "ph-12L")
    assert result["model"] == {
        "name": "ph-12L", "version": None, "digest": described.digest, "task": "ph", "threshold": 0.5,
        "preprocess_digest": described.preprocess.digest, "leads": list(LEADS),
    }  # fmt: skip


def test_a_calibrated_model_answers_with_a_probability_too(models: Path, record: Record, tmp_path: Path):
    from lsemvae.bundle import Calibration, load

    bundle, model = load(models / "ph-6L")
    calibration = Calibration(slope=2.0, intercept=-1.0)
    bundles.save(replace(bundle, calibration=calibration), model, tmp_path / "calibrated")
    api = make_api(Service(Registry([str(tmp_path / "calibrated")], tmp_path / "kept", 0), Metrics()))
    result = only(score(api, as_json(record, LIMB_LEADS)))
    assert result["probability"] == pytest.approx(float(calibration.probability(result["score"])))
    assert abs(result["probability"] - result["score"]) > 0.01
    (card,) = ask(api, "GET", "/v1/models").json()
    assert card["calibration"] == {"slope": 2.0, "intercept": -1.0}


@pytest.mark.parametrize(("limit", "doubtful"), [(0.0, True), (1e6, False)])
def test_a_model_with_a_measure_of_doubt_says_which_recordings_are_unusual(
    limit: float, doubtful: bool, models: Path, record: Record, tmp_path: Path
):
    """In the same words in a cohort's rows."""
    bundle, model = bundles.load(models / "ph-12L")
    doubt = Doubt("distance", limit, {"gain": 0.02})
    bundles.save(replace(bundle, doubt=doubt), model, tmp_path / "doubting")
    api = make_api(Service(Registry([str(tmp_path / "doubting")], tmp_path / "kept", 0), Metrics()))
    result = only(score(api, as_json(record)))
    reason = "Unlike the recordings that the model was trained on: of those, 10 % were as unusual."
    reasons = [reason] if doubtful else []
    assert result["reliability"] == {"level": "limited" if doubtful else "good", "reasons": reasons}
    (card,) = ask(api, "GET", "/v1/models").json()
    assert card["doubt"] == {"kind": "distance", "limit": limit, "measured": {"gain": 0.02}}
    given = Read("s", "r", (), record.signal_for(LEADS), 500.0, LEADS)
    (row,) = ScoreRows(tmp_path / "doubting", "cpu")([given])
    assert row["reliability"] == result["reliability"]["level"] and row["reliability_reasons"] == " ".join(reasons)
    assert row["score"] == pytest.approx(result["score"], abs=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda api, r: score(api, as_json(r)),
        lambda api, r: score(api, as_json(r, tuple(reversed(LEADS)))),
        lambda api, r: score(api, {"rate_hz": 500, "unit": "uV", "leads": {
            lead.upper(): (1000.0 * r.signal_for([lead])[0].astype(float)).tolist() for lead in LEADS}}),
        lambda api, r: score_npy(api, r.signal_mv_LT),
        lambda api, r: score_npy(api, r.signal_mv_LT[None, ::-1], leads=",".join(reversed(LEADS))),
        lambda api, r: score_npy(api, r.signal_mv_LT * np.float32(1000), unit="uV"),
        lambda api, r: score_npy(api, np.rint(r.signal_mv_LT * 5000).astype(np.int16), uv_per_lsb=0.2),
        lambda api, r: score_files(api, {"r.npy": npy(r.signal_mv_LT), "r.json": json.dumps(
            {"rate_hz": 500, "unit": "mV", "leads": LEADS}).encode()}),
    ],
    ids=["json", "reversed", "uV and capitals", "npy", "npy reversed", "npy uV", "npy int16", "npy file"],
)  # fmt: skip
def test_every_form_of_a_recording_has_the_same_score(api, models: Path, form):
    record = records(1, seed=9)[0]
    rounded = replace(record, signal_mv_LT=(np.rint(record.signal_mv_LT * 5000) / 5000).astype(np.float32))
    (expected,) = Scorer(models / "ph-12L").score([rounded])
    assert only(form(api, rounded))["score"] == pytest.approx(expected.score, abs=1e-5)


def test_many_records_are_answered_in_order(api, models: Path):
    given = records(5, seed=3)
    expected = [answer.score for answer in Scorer(models / "ph-12L").score(given)]
    assert len(set(expected)) == 5
    online = [result["score"] for result in score(api, *map(as_json, given)).json()["results"]]
    np.testing.assert_allclose(online, expected, atol=1e-6)
    stack = score_npy(api, np.stack([r.signal_mv_LT for r in given])).json()["results"]
    np.testing.assert_allclose([result["score"] for result in stack], expected, atol=1e-5)


# --- leads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leads", "model", "used", "derived"),
    [
        (LEADS, "ph-12L", 12, 0),
        (LIMB_LEADS, "ph-6L", 6, 0),
        (("I", "II"), "ph-6L", 6, 4),
        (("I", "II", *CHEST_LEADS), "ph-12L", 12, 4),
        (("I", "II", "V1"), "ph-12L", 7, 4),
        (("I", "III", "aVF"), "ph-6L", 3, 0),
        (CHEST_LEADS, "ph-12L", 6, 0),
        (("III", "aVR", "V1", "V2"), None, 0, 0),
        (("V1",), None, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_model_that_shares_most_leads_and_accepts_answers(api, record, leads, model, used, derived):
    answer = score(api, as_json(record, leads))
    result = only(answer)
    if model is None:
        assert answer.status_code == 422
        assert result["refused"]["code"] == "leads"
        assert (
            f"the recording has {', '.join(leads)}; models want ph-12L: at least 6 of I" in result["refused"]["reason"]
        )
        return
    assert result["model"]["name"] == model
    assert (len(result["leads_used"]), len(result["leads_derived"])) == (used, derived)
    absent = len(result["model"]["leads"]) - used
    reasons = result["reliability"]["reasons"]
    assert any(reason.startswith("Missing of the model's") for reason in reasons) == (absent > 0)
    assert any(reason.startswith("Computed from I and II") for reason in reasons) == (derived > 0)
    assert result["reliability"]["level"] == ("limited" if absent or derived else "good")


def test_every_useful_subset_has_a_finite_score_and_no_other_has_one(service: Service, api, record: Record):
    """A random third of the 4,095 subsets in few requests: scored when a model accepts it, else refused."""
    rng = np.random.default_rng(0)
    subsets = [leads for count in range(1, 13) for leads in combinations(LEADS, count)]
    chosen = [subsets[k] for k in rng.choice(len(subsets), 180, replace=False)]
    short = replace(record, signal_mv_LT=record.signal_mv_LT[:, :1500])
    results = []
    for start in range(0, len(chosen), 60):
        body = {"records": [as_json(short, leads) for leads in chosen[start : start + 60]]}
        results += ask(api, "POST", "/v1/score", json=body).json()["results"]
    leads_of = {name: set(served.scorer.bundle.leads) for name, served in service.registry.served.items()}
    least = {name: min_leads(served.scorer.bundle) for name, served in service.registry.served.items()}
    assert least == {"ph-12L": 6, "ph-6L": 3}
    n_scored = 0
    for leads, result in zip(chosen, results, strict=True):
        has = set(leads) | (DERIVABLE if {"I", "II"} <= set(leads) else set())
        shared = {name: len(has & wanted) for name, wanted in leads_of.items()}
        able = [name for name in shared if shared[name] >= least[name]]
        if not able:
            assert result["refused"]["code"] == "leads", leads
            continue
        n_scored += 1
        assert result["model"]["name"] == max(able, key=lambda name: (shared[name], name == "ph-6L")), leads
        assert np.isfinite(result["score"]) and 0 < result["score"] < 1
        assert set(result["leads_used"]) == has & leads_of[result["model"]["name"]]
    assert 20 < n_scored < 175


@pytest.mark.parametrize("hidden", [("V1", "V3"), ("aVR",), CHEST_LEADS], ids="-".join)
@pytest.mark.parametrize("how", ["null", "flat"])
def test_a_masked_lead_is_an_omitted_one(api, record, hidden: tuple[str, ...], how: str):
    kept = tuple(lead for lead in LEADS if lead not in hidden)
    omitted = only(score(api, as_json(record, kept)))
    given = as_json(record)
    given["leads"] |= {lead: [None if how == "null" else 0.25] * 5000 for lead in hidden}
    masked = only(score(api, given))
    if "aVR" in hidden:  # absent, it is computed from I and II
        assert omitted["leads_derived"] == ["aVR"] and "aVR" not in masked["leads_used"]
        return
    assert masked["model"]["name"] == omitted["model"]["name"]
    assert masked["leads_used"] == omitted["leads_used"]
    assert masked["score"] == pytest.approx(omitted["score"], abs=1e-6)


def test_a_named_model_answers_or_refuses(api, record: Record):
    result = only(score(api, as_json(record), model="ph-6L"))
    assert (result["model"]["name"], result["leads_used"]) == ("ph-6L", list(LIMB_LEADS))
    refused = only(score(api, as_json(record, CHEST_LEADS), model="ph-6L"))
    assert refused["refused"]["code"] == "leads" and refused["model"]["name"] == "ph-6L"
    unknown = only(score(api, as_json(record), model="ph-7L"))
    assert unknown["refused"]["code"] == "model" and "ph-12L, ph-6L are" in unknown["refused"]["reason"]


# --- doubtful signals -----------------------------------------------------------------------------------------


def spoilt(record: Record, **rows: object) -> dict:
    given = as_json(record)
    given["leads"] |= {lead: list(row) for lead, row in rows.items()}
    return given


def row(record: Record, lead: str) -> np.ndarray:
    return record.signal_for([lead])[0].astype(float)


@pytest.mark.parametrize(
    ("fault", "flag", "refused"),
    [
        (lambda r: spoilt(r, V2=[0.3] * 5000), "flat:V2", None),
        (lambda r: spoilt(r, V2=[None if k % 3 == 0 else 0.1 for k in range(5000)]), "nan:V2", None),
        (lambda r: spoilt(r, V2=np.clip(40 * row(r, "V2"), -3, 3)), "rail:V2", None),
        (lambda r: spoilt(r, V2=40 * row(r, "V2") + 12), "out_of_range:V2", None),
        (lambda r: spoilt(r, aVL=row(r, "aVF"), aVF=row(r, "aVL")), "swapped:aVL-aVF", None),
        (lambda r: spoilt(r, I=-row(r, "I"), II=row(r, "III"), III=row(r, "II"), aVR=row(r, "aVL"),
                          aVL=row(r, "aVR")), "swapped:arms", None),
        (lambda r: as_json(r) | {"leads": {lead: (1000 * row(r, lead)).tolist() for lead in LEADS}},
         "out_of_range:II", "amplitude"),
        (lambda r: as_json(r) | {"leads": {lead: row(r, lead)[::2].tolist() for lead in LEADS}}, "length", None),
        (lambda r: as_json(r) | {"leads": {lead: 2 * row(r, lead)[::2].tolist() for lead in LEADS}}, "time_scale",
         None),
        (lambda r: as_json(r, rate_hz=250), "time_scale", None),
        (lambda r: as_json(r) | {"leads": {lead: [0.1] * 5000 for lead in LEADS}}, "flat:I", "leads"),
        (lambda r: as_json(r) | {"leads": {lead: row(r, lead)[:600].tolist() for lead in LEADS}}, "length",
         "too_short"),
    ],
    ids=["flat", "null", "saturated", "offset", "aVL and aVF swapped", "arms swapped", "microvolts", "250 Hz as 500",
         "5,000 samples of 250 Hz as 500", "500 Hz as 250", "all flat", "short"],
)  # fmt: skip
def test_a_doubtful_signal_is_flagged_or_refused_never_silently_scored(api, record, fault, flag: str, refused):
    answer = score(api, fault(record))
    result = only(answer)
    assert flag in result["flags"]
    assert result["reliability"]["level"] == "limited" and result["reliability"]["reasons"]
    if refused:
        assert (answer.status_code, result["refused"]["code"], result["score"]) == (422, refused, None)
    else:
        assert answer.status_code == 200 and np.isfinite(result["score"])


def test_what_is_wrong_with_a_lead_the_model_does_not_use_does_not_count(api, record: Record):
    result = only(score(api, spoilt(record, V2=[0.3] * 5000), model="ph-6L"))
    assert "flat:V2" in result["flags"]
    assert result["reliability"]["level"] == "good"


# --- bad bodies -----------------------------------------------------------------------------------------------


BAD_JSON = {
    "empty": "", "half": "{", "list": "[]", "null": "null",
    "no records": '{"records": []}', "blank": '{"records": [{}]}',
    "no leads": '{"records": [{"rate_hz": 500, "leads": {}}]}',
    "empty lead": '{"records": [{"rate_hz": 500, "leads": {"I": []}}]}',
    "text": '{"records": [{"rate_hz": 500, "leads": {"I": ["a"]}}]}',
    "nested": '{"records": [{"rate_hz": 500, "leads": {"I": [[1]]}}]}',
    "NaN": '{"records": [{"rate_hz": 500, "leads": {"I": [NaN]}}]}',
    "Infinity": '{"records": [{"rate_hz": 500, "leads": {"I": [-Infinity]}}]}',
    "1e400": '{"records": [{"rate_hz": 500, "leads": {"I": [1e400]}}]}',
    "long number": '{"records": [{"rate_hz": 500, "leads": {"I": [' + "9" * 5000 + "]}}]}",
    "rate 0": '{"records": [{"rate_hz": 0, "leads": {"I": [1]}}]}',
    "rate 1e400": '{"records": [{"rate_hz": 1e400, "leads": {"I": [1]}}]}',
    "unit": '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "unit": "V"}]}',
    "extra": '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "extra": 1}]}',
    "NUL in a name": '{"records": [{"rate_hz": 500, "leads": {"I\\u0000": [1]}}]}',
    "NUL byte": '{"records": [{"rate_hz": 500, \0"leads": {"I": [1]}}]}',
    "13 leads": json.dumps({"records": [{"rate_hz": 500, "leads": {f"V{k}": [1] for k in range(13)}}]}),
    "a lead twice": '{"records": [{"rate_hz": 500, "leads": {"I": [1, 2], "I": [3, 4]}}]}',
    "a lead twice, escaped": '{"records": [{"rate_hz": 500, "leads": {"I": [1, 2], "\\u0049": [3, 4]}}]}',
    "the rate twice": '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "rate_hz": 250}]}',
    "65 records": json.dumps({"records": [{"rate_hz": 500, "leads": {"I": [1]}}] * (MAX_RECORDS + 1)}),
    "deep": '{"records": ' + "[" * 5000 + "]" * 5000 + "}",
    "lone surrogate": '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "id": "\\ud800"}]}',
    "rate 1e-310": '{"records": [{"rate_hz": 1e-310, "leads": {"I": [1]}}]}',
    "rate 1e300": '{"records": [{"rate_hz": 1e300, "leads": {"I": [1]}}]}',
    "a hundred thousand texts": json.dumps({"records": [{"rate_hz": 500, "leads": {"I": ["a"] * 100_000}}]}),
}  # fmt: skip


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("path", ["/v1/score", "/v1/reconstruct"])
def test_a_malformed_body_is_422_and_says_where(api, body: str, path: str):
    answer = ask(api, "POST", path, content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.text) < 20_000
    if "detail" in answer.json():
        assert all(entry.keys() == {"loc", "msg", "type"} for entry in answer.json()["detail"])
    else:  # readable, and no recording that can be used
        assert all(result["refused"] for result in answer.json()["results"])


def test_not_utf8_is_422(api):
    answer = ask(
        api, "POST", "/v1/score", content=b'{"records": "\xff\xfe"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422


@pytest.mark.parametrize("id", [':"', '\\":', '"records":', "{\n", "\u2028", "ж" * 200, ""])
def test_any_text_is_an_id(api, record: Record, id: str):
    """Names are counted to find those given twice: what looks like one inside a text does not count."""
    assert only(score(api, as_json(record, ("I", "II"), id=id)))["id"] == id


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda given: given["leads"].update(I=given["leads"]["I"][:-1]), "record", "equally long"),
        (lambda given: given["leads"].update(V7=given["leads"]["I"]), "record", "unknown lead 'V7'"),
        (lambda given: given["leads"].update(avf=given["leads"]["I"]), "record", "given twice"),
        (lambda given: given["leads"]["I"].__setitem__(7, 1e300), "amplitude", "inf mV: check the unit"),
        (lambda given: given["leads"]["I"].__setitem__(7, -1e9), "amplitude", "1e+09 mV"),
        (lambda given: given.update(rate_hz=20), "rate", "20 Hz"),
        (lambda given: given.update(rate_hz=1e9), "rate", "1e+09 Hz"),
    ],
)
def test_an_unusable_record_is_refused_and_the_others_are_scored(api, record: Record, change, code: str, says: str):
    bad, good = as_json(record, LIMB_LEADS), as_json(record, LIMB_LEADS)
    change(bad)
    answer = score(api, bad)
    assert answer.status_code == 422
    assert only(answer)["refused"]["code"] == code and says in only(answer)["refused"]["reason"]
    mixed = score(api, good, bad)
    assert mixed.status_code == 200
    assert [result["refused"] is None for result in mixed.json()["results"]] == [True, False]


@pytest.mark.parametrize(
    ("body", "query", "says"),
    [
        (b"", {}, "no NPY file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'", {}, "no NPY file"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, {}, "no NPY file"),
        (npy(np.zeros((12, 5000), dtype=np.float64)), {}, "the array is float64"),
        (npy(np.zeros((12, 5000), dtype=">f4")), {}, "the array is >f4"),
        (npy(np.asfortranarray(np.zeros((12, 5000), dtype=np.float32))), {}, "Fortran order"),
        (npy(np.zeros(5000, dtype=np.float32)), {}, "1 axes"),
        (npy(np.zeros((12, 0), dtype=np.float32)), {}, "shape (1, 12, 0)"),
        (npy(np.zeros((13, 500), dtype=np.float32)), {}, "shape (1, 13, 500)"),
        (npy(np.zeros((11, 500), dtype=np.float32)), {}, "11 rows a recording, 12 leads are named"),
        (npy(np.zeros((65, 12, 5), dtype=np.float32)), {}, "shape (65, 12, 5)"),
        (npy(np.zeros((12, 5000), dtype=np.float32))[:-1], {}, "are declared"),
        (npy(np.zeros((12, 5000), dtype=np.float32)) + b"0", {}, "are declared"),
        (npy(np.zeros((12, 5000), dtype=np.float32)), {"uv_per_lsb": 5}, "no uv_per_lsb"),
        (npy(np.zeros((12, 5000), dtype=np.int16)), {}, "give uv_per_lsb"),
        (npy(np.zeros((12, 5000), dtype=np.int16)), {"uv_per_lsb": 5, "unit": "mV"}, "no unit"),
        (npy(np.zeros((2, 500), dtype=np.float32)), {"leads": "I,i"}, "named twice"),
        (npy(np.zeros((2, 500), dtype=np.float32)), {"leads": "I,V9"}, "unknown lead 'V9'"),
    ],
)
def test_a_malformed_array_is_422_in_one_line(api, body: bytes, query: dict, says: str):
    answer = score_npy(api, body, **query)
    assert answer.status_code == 422
    assert says in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_a_pickle_is_never_opened(api, tmp_path: Path):
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    stream = io.BytesIO()
    np.save(stream, np.array([[Trap()]], dtype=object), allow_pickle=True)
    assert score_npy(api, stream.getvalue()).status_code == 422
    side = json.dumps({"rate_hz": 500, "unit": "mV", "leads": ["I"]}).encode()
    assert score_files(api, {"a.npy": stream.getvalue(), "a.json": side}).status_code == 422
    assert not trap.exists()


def test_an_array_that_claims_much_allocates_nothing(api):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (64, 12, 120000), }"
    body = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    assert "0 bytes of samples, 368640000 are declared" in score_npy(api, body).json()["detail"]


def test_an_infinite_sample_is_refused_and_nan_is_missing(api, record: Record):
    for value, code in ((np.inf, "amplitude"), (-np.inf, "amplitude"), (np.nan, None)):
        array = record.signal_mv_LT.copy()
        array[7, 99] = value
        refused = only(score_npy(api, array))["refused"]
        assert (refused and refused["code"]) == code


def test_samples_that_were_not_recorded_are_missing_in_16_bits_too(api, record: Record):
    counts = np.rint(record.signal_mv_LT * 200).astype(np.int16)
    counts[7] = -32768
    result = only(score_npy(api, counts, uv_per_lsb=5))
    assert "nan:V2" in result["flags"] and "V2" not in result["leads_used"]


# --- files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wfdb_files(record: Record, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("wfdb")
    wfdb.wrsamp(
        "ecg_1", fs=500, units=["mV"] * 12, sig_name=list(LEADS), p_signal=record.signal_mv_LT.T.astype(float),
        fmt=["16"] * 12, write_dir=str(folder),
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_wfdb_pair_is_one_recording_in_whatever_order_it_comes(api, record, wfdb_files):
    expected = only(score(api, as_json(record)))["score"]
    for names in (["ecg_1.dat", "ecg_1.hea"], ["ecg_1.hea", "ecg_1.dat"]):
        result = only(score_files(api, {name: wfdb_files[name] for name in names}))
        assert result["id"] == "ecg_1.hea"
        assert result["score"] == pytest.approx(expected, abs=1e-4)  # rounded to 16 bits
        assert result["record"] is None


def test_the_signal_comes_back_for_drawing_when_asked_for(api, record: Record, wfdb_files):
    result = only(score_files(api, wfdb_files, signal="true"))["record"]
    assert (result["rate_hz"], result["derived"], result["missing"]) == (500, [], [])
    assert list(result["leads"]) == list(LEADS)
    np.testing.assert_allclose(result["leads"]["V3"], record.signal_for(["V3"])[0], atol=0.0011)
    csv = "# rate_hz: 500\n# unit: mV\nI,II\n" + "\n".join(
        f"{i:.4f},{'' if k == 3 else f'{ii:.4f}'}" for k, (i, ii) in enumerate(record.signal_for(["I", "II"]).T)
    )
    result = only(score_files(api, {"holter.txt": csv.encode()}, signal="true"))["record"]
    assert result["leads"]["II"][:4][3] is None
    assert result["derived"] == ["III", "aVR", "aVL", "aVF"]
    assert result["missing"] == list(CHEST_LEADS)


def test_several_recordings_of_several_formats_in_one_form(api, record: Record, wfdb_files):
    csv = "I;II\n" + "\n".join(f"{i:.4f};{ii:.4f}" for i, ii in record.signal_for(["I", "II"]).T)
    side = b'{"rate_hz": 500, "unit": "mV"}'
    files = {"b.csv": csv.encode(), **wfdb_files, "b.json": side, "notes.pdf": b"%PDF-1.7"}
    results = {result["id"]: result for result in score_files(api, files).json()["results"]}
    assert list(results) == ["b.csv", "ecg_1.hea", "notes.pdf"]
    assert (results["b.csv"]["model"]["name"], results["ecg_1.hea"]["model"]["name"]) == ("ph-6L", "ph-12L")
    assert results["notes.pdf"]["refused"]["code"] == "format"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (lambda w: {"ecg_1.hea": w["ecg_1.hea"]}, "ecg_1.dat"),
        (lambda w: {"ecg_1.dat": w["ecg_1.dat"]}, "no known format"),
        (lambda w: {"ecg_1.hea": w["ecg_1.hea"], "ecg_1.dat": w["ecg_1.dat"][:-1000]}, "ecg_1"),
        (lambda w: {"ecg_1.hea": w["ecg_1.hea"].replace(b"ecg_1.dat", b"../etc/passwd")}, "file name"),
        (lambda w: {"ecg_1.hea": w["ecg_1.hea"].replace(b"ecg_1.dat", b"/etc/passwd")}, "file name"),
        (lambda w: {"empty": b""}, "no known format"),
        (lambda w: {"a.csv": b"I,II\n1,2\n"}, "neither rate nor unit is declared"),
        (lambda w: {"x.xml": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><CardiologyXML>&b;</CardiologyXML>'},
         "x.xml"),
    ],
    ids=["header alone", "signals alone", "cut", "up", "absolute", "empty", "undeclared", "entity"],
)  # fmt: skip
def test_an_unreadable_upload_is_422_with_the_reason(api, wfdb_files, files, says: str):
    answer = score_files(api, files(wfdb_files))
    assert answer.status_code == 422
    assert says in " ".join(result["refused"]["reason"] for result in answer.json()["results"])
    assert "root:" not in answer.text


def test_a_form_without_usable_files_is_422(api):
    for parts, says in (
        ([("files", ("a.csv", b"1")), ("more", ("a.csv", b"2"))], "same name"),
        ([("files", ("", b"1"))], "cannot be read"),
        ([("files", (f"{k}", b"1")) for k in range(2 * MAX_RECORDS + 1)], "at most 128 files"),
        ([("files", (f"{k}", b"1")) for k in range(MAX_RECORDS + 1)], "65 recordings: 64"),
    ):
        answer = ask(api, "POST", "/v1/score/file", files=parts)
        assert answer.status_code == 422 and says in answer.json()["detail"], answer.text
    broken = ask(
        api, "POST", "/v1/score/file", content=b"--x\r\n", headers={"Content-Type": "multipart/form-data; boundary=y"}
    )
    assert broken.status_code == 422


def test_the_endpoint_takes_what_a_cohort_takes(api, models: Path, record: Record):
    """Five minutes at 500 Hz, and an impossible sample outside the window that the model sees."""
    signal_mv_LT = np.tile(record.signal_mv_LT, (1, 30))
    signal_mv_LT[7, 100_000] = 3e6
    (expected,) = Scorer(models / "ph-12L").score([replace(record, signal_mv_LT=signal_mv_LT)])
    result = only(score_npy(api, signal_mv_LT))
    assert result["score"] == pytest.approx(expected.score, abs=1e-6)
    side = json.dumps({"rate_hz": 500, "unit": "mV", "leads": LEADS}).encode()
    result = only(score_files(api, {"long.npy": npy(signal_mv_LT), "long.json": side}, signal="true"))
    assert result["score"] == pytest.approx(expected.score, abs=1e-6)
    assert len(result["record"]["leads"]["V6"]) == 150_000
    signal_mv_LT[7, 100] = 3e6  # and inside: both refuse it, with one reason
    (expected,) = Scorer(models / "ph-12L").score([replace(record, signal_mv_LT=signal_mv_LT)])
    refused = only(score_npy(api, signal_mv_LT))["refused"]
    assert refused == {"code": "amplitude", "reason": str(expected.refused)}


def test_a_request_with_too_many_samples_is_413(api):
    many = MAX_SAMPLES + MAX_RECORDS * 250
    text = '{"records": [{"rate_hz": 500, "leads": {"I": [' + "0," * many + "0]}}]}"
    counts = npy(np.zeros((1, MAX_SAMPLES + 1), dtype=np.int16))
    side = json.dumps({"rate_hz": 500, "uv_per_lsb": 5, "leads": ["I"]}).encode()
    for answer in (
        ask(api, "POST", "/v1/score", content=text.encode(), headers={"Content-Type": "application/json"}),
        ask(api, "POST", "/v1/reconstruct", content=text.encode(), headers={"Content-Type": "application/json"}),
        score_npy(api, counts, leads="I", uv_per_lsb=5),
        score_files(api, {"a.npy": counts, "a.json": side}),
    ):
        assert answer.status_code == 413
        assert f"more than {MAX_SAMPLES} samples" in answer.json()["detail"]


def test_many_mistakes_are_few_errors():
    """Each would be hundreds of bytes: a body of 32 MB made gigabytes of them."""
    for body in (
        '{"records": [{"rate_hz": 500, "leads": {"I": [' + '"a",' * 1_000_000 + '"a"]}}]}',
        '{"records": [{"rate_hz": 500, "leads": {' + ",".join(f'"x{k}": [1]' for k in range(10_000)) + "}}]}",
    ):
        json_memory(body.encode())
        with pytest.raises(RequestValidationError) as caught:
            from_json(body.encode(), ScoreRequest)
        assert len(caught.value.errors()) <= 20
    with pytest.raises(TooLarge):
        json_memory(("{" + ",".join(f'"x{k}": 1' for k in range(20_000)) + "}").encode())


def test_parsing_takes_no_more_memory_than_is_charged_for_it():
    """In a process of its own, since the peak of a process never falls: as many samples as one request may have."""
    script = """
import re
from serve.inputs import from_json, json_memory
from serve.schema import ScoreRequest
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
body = ('{"records": [{"rate_hz": 500, "leads": {"I": [' + "0.125," * 3_900_000 + "0]}}]}").encode()
before = peak()
from_json(body, ScoreRequest)
print(json_memory(body), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    charged, taken = map(int, done.stdout.split())
    assert 0.3 * charged < taken < 1.1 * charged


def test_an_answer_with_the_recording_is_made_beside_the_event_loop(api, record: Record, monkeypatch):
    """While it is made, others are answered."""
    drawing, answered = threading.Event(), threading.Event()
    seen: list[bool] = []

    def drawn(given: Record) -> RecordOut:
        drawing.set()
        seen.append(answered.wait(20))
        return scoring.drawn_again(given)

    monkeypatch.setattr(scoring, "drawn_again", scoring.drawn, raising=False)
    monkeypatch.setattr(scoring, "drawn", drawn)
    files = [("files", ("a.csv", csv_of(record)))]

    async def main() -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            asked = asyncio.create_task(client.post("/v1/score/file", params={"signal": "true"}, files=files))
            while not drawing.is_set():
                await asyncio.sleep(0.001)
            assert (await client.get("/healthz")).status_code == 200
            answered.set()
            return await asked

    answer = asyncio.run(main())
    assert seen == [True]
    assert only(answer)["record"]["rate_hz"] == 500


def csv_of(record: Record) -> bytes:
    rows = "\n".join(f"{i:.4f},{ii:.4f}" for i, ii in record.signal_for(["I", "II"]).T)
    return f"# rate_hz: 500\n# unit: mV\nI,II\n{rows}\n".encode()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=12), st.binary(max_size=300), min_size=1, max_size=4))
def test_any_upload_gives_recordings_or_reasons(files: dict[str, bytes]):
    for name, result in from_files(files):
        assert name in files and isinstance(result, LsemvaeError | Record)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("pattern", "model", "used"),
    [
        ("formats/cardiosoft/*.xml", "ph-12L", 12),
        ("formats/dicom/*.dcm", "ph-12L", 12),
        ("formats/alivecor/6_lead.atc", "ph-6L", 6),
        ("ptbxl500/**/00001_hr.*", "ph-12L", 12),
    ],
)
def test_real_files_are_scored_as_they_are_by_the_library(api, models, shared_data: Path, pattern, model, used):
    files = sorted(shared_data.glob(pattern))
    result = only(score_files(api, {path.name: path.read_bytes() for path in files}, signal="true"))
    record = read(next((path for path in files if path.suffix == ".hea"), files[0]))
    assert result["record"]["rate_hz"] == record.rate_hz
    assert (result["model"]["name"], len(result["leads_used"])) == (model, used)
    (expected,) = Scorer(models / model).score([record])
    assert result["score"] == pytest.approx(expected.score, abs=1e-5)


# --- reconstruction -------------------------------------------------------------------------------------------


def test_absent_leads_are_reconstructed_and_marked(api, models: Path, record: Record):
    answer = ask(api, "POST", "/v1/reconstruct", json={"records": [as_json(record, ("I", "II"), id="x")]})
    body = answer.json()
    assert "not a measurement" in body["note"] and "not a medical device" in body["note"]
    assert body["model"] == bundles.describe(models / "encoder").digest
    result = only(answer)
    assert (result["id"], result["rate_hz"], result["unit"]) == ("x", 500, "mV")
    origins = {lead: row["origin"] for lead, row in result["leads"].items()}
    assert list(origins) == list(LEADS)
    assert {lead for lead in origins if origins[lead] == "measured"} == {"I", "II"}
    assert {lead for lead in origins if origins[lead] == "derived"} == DERIVABLE
    assert {lead for lead in origins if origins[lead] == "reconstructed"} == set(CHEST_LEADS)
    # In millivolts: measured leads are the filtered recording, reconstructed ones the decoder's times the same factor.
    six = Record.from_leads({lead: row(record, lead) for lead in ("I", "II")}, 500)
    filtered = preprocess([six], LEADS, PreprocessConfig(scale="none"))
    np.testing.assert_allclose(result["leads"]["II"]["values"], filtered.x_BLT[0, 1], atol=1e-4)
    prepared = preprocess([six], LEADS, PreprocessConfig())
    import torch

    _, model = bundles.load(models / "encoder")
    with torch.no_grad():
        x_BLT = model.reconstruct(torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL))
    limb_mv_LT = filtered.x_BLT[0, :6] - filtered.x_BLT[0, :6].mean(axis=1, keepdims=True)
    rms_mv = np.sqrt((limb_mv_LT.astype(float) ** 2).sum(axis=1) / 4999)  # of each lead
    factor = np.sqrt((rms_mv**2).mean())
    np.testing.assert_allclose(result["leads"]["V3"]["values"], factor * x_BLT[0, 8].numpy(), atol=2e-4)


def test_leads_scaled_alone_have_no_size_to_give_back(models: Path, record: Record, service: Service):
    api = make_api(replace(service, encoder=Encoder(str(models / "scaled-alone"), models / "kept", 0)))
    result = only(ask(api, "POST", "/v1/reconstruct", json={"records": [as_json(record, LIMB_LEADS)]}))
    assert result["unit"] == "standard deviations"
    assert np.std(result["leads"]["I"]["values"], ddof=1) == pytest.approx(1, abs=0.01)


def test_what_cannot_be_reconstructed_is_refused(api, record: Record):
    mixed = ask(
        api, "POST", "/v1/reconstruct",
        json={"records": [as_json(record, ("V1",)), as_json(record, LIMB_LEADS), {"rate_hz": 500, "leads": {"V9": [1]}}
        ]},
    )  # fmt: skip
    assert mixed.status_code == 200
    codes = [result["refused"] and result["refused"]["code"] for result in mixed.json()["results"]]
    assert codes == ["leads", None, "record"]


def test_without_an_encoder_the_answer_says_what_to_do(service: Service, record: Record):
    body = {"records": [as_json(record, LIMB_LEADS)]}
    none = make_api(replace(service, encoder=None))
    answer = ask(none, "POST", "/v1/reconstruct", json=body)
    assert answer.status_code == 404 and "`encoder` in serve/config.yaml" in answer.json()["detail"]
    broken = make_api(replace(service, encoder=SimpleNamespace(reconstructor=None, problem="its SHA-256 differs")))
    answer = ask(broken, "POST", "/v1/reconstruct", json=body)
    assert answer.status_code == 409 and answer.json()["detail"] == "its SHA-256 differs"


def test_a_classifier_is_no_encoder(models: Path):
    with pytest.raises(LsemvaeError, match="has no decoder"):
        Reconstructor(models / "ph-6L")


# --- model cards, health and the schema --------------------------------------------------------------------------


def test_model_cards(api, models: Path):
    cards = ask(api, "GET", "/v1/models").json()
    assert [card["name"] for card in cards] == ["ph-12L", "ph-6L"]
    card = cards[1]
    assert (card["task"], card["leads"], card["threshold"], card["min_leads"]) == ("ph", list(LIMB_LEADS), 0.5, 3)
    assert card["provenance"] == {"data": "made up"}
    assert card["preprocess"]["rate_hz"] == 500
    assert "not a medical device" in card["intended_use"].lower() and card["limits"]
    assert card["card"] is None


def test_a_bundle_s_own_card_is_given_as_it_is_and_once(tmp_path: Path):
    text = "# Model card: ph\n\n| women | 0.8 |\n<script>alert(1)</script> ä\n"
    save_classifier(tmp_path / "with-card", model_card=text)
    save_classifier(tmp_path / "wrong-card", model_card=["no text"])
    registry = Registry([str(tmp_path / "with-card"), str(tmp_path / "wrong-card")], tmp_path / "kept", 0)
    answer = ask(make_api(Service(registry, Metrics())), "GET", "/v1/models", token=None)
    cards = {card["name"]: card for card in answer.json()}
    assert cards["with-card"]["card"] == text and cards["with-card"]["provenance"] == {"data": "made up"}
    assert cards["wrong-card"]["card"] is None
    assert registry.served["with-card"].scorer.bundle.provenance["model_card"] == text  # the bundle stays as it is


def test_a_service_without_models_lives_but_is_not_ready(tmp_path: Path, record: Record):
    api = make_api(Service(Registry([str(tmp_path / "absent")], tmp_path / "kept", 0), Metrics()))
    assert ask(api, "GET", "/healthz").json() == {"status": "ok"}
    ready = ask(api, "GET", "/readyz")
    assert ready.status_code == 503
    assert ready.json()["ready"] is False and "does not exist" in ready.json()["problems"]["absent"]
    answer = score(api, as_json(record))
    assert answer.status_code == 503 and answer.headers["Retry-After"] and "/readyz" in answer.json()["detail"]
    assert ask(api, "GET", "/v1/models").json() == []


def test_ready_with_what_is_served_and_what_is_not(models: Path, tmp_path: Path, api):
    assert ask(api, "GET", "/readyz").json() == {"ready": True, "models": ["ph-12L", "ph-6L"], "problems": {}}
    partly = Registry([str(models / "ph-6L"), str(models / "absent")], tmp_path / "kept", 0)
    answer = ask(make_api(Service(partly, Metrics())), "GET", "/readyz")
    assert answer.status_code == 200
    assert (answer.json()["models"], list(answer.json()["problems"])) == (["ph-6L"], ["absent"])


def test_readiness_shows_no_password(service: Service):
    problem = "fetching models:/ph@champion failed at https://someone:secret@mlflow.example/x: gone"
    registry = SimpleNamespace(served={}, ready=False, problems={"ph": problem})
    text = ask(make_api(replace(service, registry=registry)), "GET", "/readyz").text
    assert "secret" not in text and "someone" not in text and "https://mlflow.example/x: gone" in text


def test_the_examples_of_the_openapi_work(api):
    schema = ask(api, "GET", "/openapi.json", token=None).json()
    assert "not a medical device" in schema["info"]["description"]
    tried = 0
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert path in ("/healthz", "/readyz") or operation["security"] == [{"HTTPBearer": []}]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if "example" in content and not path.startswith("/v1/cohorts"):
                    answer = ask(api, method.upper(), path, json=content["example"], headers={"Content-Type": kind})
                    assert answer.status_code == 200, answer.text
                    tried += 1
    assert tried == 3


GENERATED = [
    "/v1/score", "/v1/score/npy", "/v1/score/file", "/v1/explain", "/v1/explain/file", "/v1/reconstruct", "/v1/models",
    "/healthz", "/readyz",
]  # fmt: skip


@schemathesis.serializer("application/x-npy")
def _as_it_is(context: object, value: bytes) -> bytes:
    return value


@pytest.fixture(scope="module")
def openapi(api) -> schemathesis.BaseSchema:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    documented = {operation.ok().path for operation in schema.get_all_operations()}
    assert {path for path in documented if not path.startswith("/v1/cohorts")} == set(GENERATED)
    return schema


@pytest.mark.parametrize("path", GENERATED)
def test_generated_requests_get_what_the_openapi_promises(openapi: schemathesis.BaseSchema, path: str):
    load_all_checks()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def ask_for(data: st.DataObject) -> None:
        (operation,) = openapi[path].values()
        case = data.draw(operation.as_strategy())
        # By default it gives up after 10 s, and on a busy machine the process that explains needs as long to start.
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, checks=checks, timeout=600)

    ask_for()


def test_a_request_becomes_a_record():
    request = ScoreRequest.model_validate_json(
        '{"records": [{"rate_hz": 250, "unit": "uV", "leads": {"avl": [1000, null], "V1": [-500.5, 0]}}]}'
    )
    record = to_record(request.records[0])
    assert record.leads == ("aVL", "V1")
    np.testing.assert_array_equal(record.signal_mv_LT, np.array([[1, np.nan], [-0.5005, 0]], dtype=np.float32))
    assert isinstance(request.records[0], RecordIn)


# --- batching -------------------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_what_arrives_during_a_batch_is_the_next_one(gate: threading.Event):
    batches: list[list[int]] = []

    def run(jobs: list[int]) -> list[int]:
        batches.append(jobs)
        gate.wait()
        return [2 * job for job in jobs]

    async def main() -> list[int]:
        batcher = Batcher(run, max_size=4)
        asked = [asyncio.create_task(batcher(0))]
        while not batches:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(batcher(job)) for job in range(1, 7)]
        await asyncio.sleep(0)
        asked[2].cancel()  # its client went away
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(main())
    assert batches == [[0], [1, 3, 4], [5, 6]] or batches == [[0], [1, 3, 4, 5], [6]]
    assert [a for a in answers if isinstance(a, int)] == [0, 2, 6, 8, 10, 12]
    assert isinstance(answers[2], asyncio.CancelledError)


def test_those_who_ask_again_and_again_are_answered_together():
    batches: list[int] = []

    def run(jobs: list[int]) -> list[int]:
        batches.append(len(jobs))
        time.sleep(0.05)  # half of this is waited for them
        return jobs

    async def client(batcher: Batcher, times: int) -> None:
        for time_ in range(times):
            await batcher(time_)
            await asyncio.sleep(0)  # its next request is on its way

    async def main() -> None:
        batcher = Batcher(run, max_size=8)
        first = asyncio.create_task(client(batcher, 5))
        while not batches:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *(client(batcher, 4) for _ in range(5)))
        batches.append(0)
        await client(batcher, 2)  # who is alone is answered alone

    asyncio.run(main())
    assert batches == [1, 6, 6, 6, 6, 0, 1, 1]  # and not 1, 5, 1, 5 …


def test_an_exception_in_a_batch_is_answered_to_the_job_that_caused_it():
    batches: list[list[int]] = []

    def run(jobs: list[int]) -> list[int]:
        batches.append(jobs)
        if 1 in jobs:
            raise RuntimeError("no")
        return jobs

    async def main() -> list:
        batcher = Batcher(run, max_size=2)
        return await asyncio.gather(*(batcher(job) for job in range(5)), return_exceptions=True)

    answers = asyncio.run(main())
    assert type(answers[1]) is RuntimeError
    assert [answer for answer in answers if isinstance(answer, int)] == [0, 2, 3, 4]
    assert batches == [[0, 1], [0], [1], [2, 3], [4]]


def test_one_record_that_breaks_the_model_fails_no_other_request(service: Service, record: Record):
    """Five requests at once, through the whole application; the model itself raises on one of them."""
    served = service.registry.served["ph-12L"]

    class Brittle:
        bundle, why_doubtful = served.scorer.bundle, served.scorer.why_doubtful

        @staticmethod
        def score(records: list[Record]) -> list:
            if any(record.signal_mv_LT.shape[1] == 4000 for record in records):
                raise FloatingPointError("something that nobody thought of")
            return served.scorer.score(records)

    broken = SimpleNamespace(scorer=Brittle(), described=served.described)
    api = make_api(replace(service, registry=SimpleNamespace(served={"ph-12L": broken}, ready=True, problems={})))
    short = replace(record, signal_mv_LT=record.signal_mv_LT[:, :4000])
    expected = served.scorer.score([record])[0].score

    async def main() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            bodies = [{"records": [as_json(given)]} for given in (record, record, short, record, record)]
            return await asyncio.gather(*(client.post("/v1/score", json=body) for body in bodies))

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200, 200]
    for answer in answers[:2] + answers[3:]:
        assert only(answer)["score"] == pytest.approx(expected, abs=1e-6)
