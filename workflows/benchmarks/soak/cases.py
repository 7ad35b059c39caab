"""What the clients of the soak send, and what must come back.

Each version of a model scores each recording once beforehand, in plain torch and alone. An answer names its version, so
every score can be compared with the one that this version must give, whatever was promoted in the meantime.
"""

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.serve import UV_PER_LSB
from lsemvae.bundle import load
from lsemvae.formats.plain import as_csv
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import preprocess_signals
from lsemvae.simulate import RATE_HZ

TOLERANCE = 1e-5
MODELS = {"soak-12L": LEADS, "soak-6L": LIMB_LEADS}
JSON, NPY = {"Content-Type": "application/json"}, {"Content-Type": "application/x-npy"}
ONE = json.dumps({"records": [{"rate_hz": RATE_HZ, "leads": {"I": [0.0, 0.1]}}]}).encode()


@dataclass(frozen=True)
class Known:
    """One registered version: its bundle's digest, its threshold, and the score of each recording."""

    digest: str
    threshold: float
    scores_N: np.ndarray


@dataclass(frozen=True)
class Case:
    """One request. `sends` are arguments of `httpx.request`.

    model       the model that must answer; empty where the request must be refused
    recordings  the numbers of the recordings that it sends
    statuses    what must come back, 200 for a score
    """

    kind: str
    path: str
    sends: Mapping[str, Any]
    model: str = ""
    recordings: tuple[int, ...] = ()
    statuses: frozenset[int] = field(default_factory=lambda: frozenset({200}))


def millivolts(counts: np.ndarray) -> np.ndarray:
    """Recorder's counts as float32 millivolts, which every form of a request gives exactly."""
    return counts * np.float32(UV_PER_LSB / 1000)


@torch.inference_mode()
def know(folder: Path, counts_NLT: np.ndarray) -> Known:
    """Score the recordings of twelve leads with a bundle: one at a time, with one call of the model."""
    bundle, model = load(folder)
    rows = [LEADS.index(lead) for lead in bundle.leads]
    scores = []
    for counts_LT in counts_NLT:
        prepared = preprocess_signals([millivolts(counts_LT[rows])], [RATE_HZ], bundle.leads, bundle.preprocess)
        x_BLT, mask_BL = torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)
        scores.append(model.predict(x_BLT, mask_BL).item())
    assert bundle.threshold is not None  # the soak has set it
    return Known(bundle.digest, bundle.threshold, np.array(scores))


def fault_of(answer: httpx.Response, case: Case, known: Mapping[str, Mapping[int, Known]]) -> str | None:
    """What is wrong with an answer of status 200; None where every recording has the score of the version it names."""
    if not case.model:
        return "a score for what must be refused"
    try:
        results = answer.json()["results"]
        if len(results) != len(case.recordings):
            return f"{len(results)} results for {len(case.recordings)} recordings"
        for number, result in zip(case.recordings, results, strict=True):
            if fault := fault_of_row(result["model"], result, case.model, number, known):
                return fault
    except (ValueError, KeyError, TypeError) as error:
        return f"an answer that cannot be read: {type(error).__name__}"
    return None


def fault_of_row(
    named: Mapping[str, Any],
    row: Mapping[str, Any],
    model: str,
    number: int,
    known: Mapping[str, Mapping[int, Known]],
) -> str | None:
    """The same of one recording: `named` has the name, version and digest of the model that answers."""
    if named["name"] != model:
        return f"{named['name']} answers in place of {model}"
    version = known[model].get(named["version"])
    if version is None:
        return f"version {named['version']} of {model} answers, which never may"
    if named["digest"] != version.digest:
        return f"version {named['version']} of {model} with another digest"
    score, expected = row["score"], version.scores_N[number]
    if score is None or not abs(score - expected) <= TOLERANCE:
        return f"score {score} for {expected} (recording {number}, {model} version {named['version']})"
    if row["decision"] != (score >= version.threshold):
        return f"decision {row['decision']} for score {score} and threshold {version.threshold}"
    return None


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def named_rows(counts_LT: np.ndarray, leads: Sequence[str]) -> dict[str, list[float]]:
    """Leads by name, in millivolts; three decimals hold the recorder's counts exactly."""
    return {lead: np.round(counts_LT[LEADS.index(lead)] * UV_PER_LSB / 1000, 3).tolist() for lead in leads}


def good(counts_NLT: np.ndarray) -> list[Case]:
    """Requests that must be scored: each recording in each form, with six and with twelve leads, alone or together."""
    cases = []
    for model, leads in MODELS.items():
        rows, size = [LEADS.index(lead) for lead in leads], f"{len(leads)} leads"
        query = {"leads": ",".join(leads), "rate_hz": RATE_HZ}
        for number, counts_LT in enumerate(counts_NLT):
            record = {"rate_hz": RATE_HZ, "leads": named_rows(counts_LT, leads)}
            body = json.dumps({"records": [record]}).encode()
            cases.append(Case(f"JSON, {size}", "/v1/score", {"content": body, "headers": JSON}, model, (number,)))
            sends = {"params": query | {"uv_per_lsb": UV_PER_LSB}, "content": npy(counts_LT[rows]), "headers": NPY}
            cases.append(Case(f"NPY int16, {size}", "/v1/score/npy", sends, model, (number,)))
            sends = {"params": query, "content": npy(millivolts(counts_LT[rows])), "headers": NPY}
            cases.append(Case(f"NPY float32, {size}", "/v1/score/npy", sends, model, (number,)))
            text = as_csv(counts_LT[rows] * (UV_PER_LSB / 1000), RATE_HZ, leads, decimals=3)
            sends = {"files": [("files", ("recording.csv", text.encode()))]}
            cases.append(Case(f"file, {size}", "/v1/score/file", sends, model, (number,)))
        several = tuple(range(len(counts_NLT)))
        sends = {"params": query | {"uv_per_lsb": UV_PER_LSB}, "content": npy(counts_NLT[:, rows]), "headers": NPY}
        cases.append(Case(f"NPY, {len(several)} at once, {size}", "/v1/score/npy", sends, model, several))
    return cases


def explained(counts_NLT: np.ndarray) -> list[Case]:
    """Requests for explanations. 503 and 504 are answers too: of a queue that is full, or a model that was replaced."""
    statuses = frozenset({200, 503, 504})
    cases = []
    for model, leads in MODELS.items():
        for number, counts_LT in enumerate(counts_NLT):
            body = json.dumps({"records": [{"rate_hz": RATE_HZ, "leads": named_rows(counts_LT, leads)}]}).encode()
            sends = {"content": body, "headers": JSON, "params": {"signal": "false"}}
            cases.append(Case("explanation", "/v1/explain", sends, model, (number,), statuses))
    return cases


def bad(counts_NLT: np.ndarray) -> list[Case]:
    """Requests that must be refused, each with the statuses that may come back."""
    rows = named_rows(counts_NLT[0], LIMB_LEADS)

    def as_json(**changed: Any) -> bytes:
        return json.dumps({"records": [{"rate_hz": RATE_HZ, "leads": rows} | changed]}).encode()

    flat = dict.fromkeys(LIMB_LEADS, [0.0] * 5000)
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "ha">{entities}]><CardiologyXML>&e9;</CardiologyXML>'
    deep = b'{"records":' + b"[" * 100_000
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    query = {"leads": "6", "rate_hz": RATE_HZ}
    bodies: dict[str, tuple[bytes, int]] = {
        "NaN in JSON": (as_json().replace(b"0.0", b"NaN", 1), 422),
        "1e400 in JSON": (as_json().replace(b"0.0", b"1e400", 1), 422),
        "JSON that is cut": (as_json()[:-500], 422),
        "JSON 100,000 deep": (deep, 422),
        "null bytes": (b"\0" * 10_000, 422),
        "a lead twice": (as_json().replace(b'"II":', b'"I":', 1), 422),
        "an unknown lead": (as_json(leads=rows | {"V9": rows["I"]}), 422),
        "ragged leads": (as_json(leads=rows | {"I": rows["I"][:100]}), 422),
        "no lead": (as_json(leads={}), 422),
        "texts for samples": (as_json(leads=rows | {"I": ["a"] * 5000}), 422),
        "a rate of 0": (as_json(rate_hz=0), 422),
        "flat leads": (as_json(leads=flat), 422),
    }
    cases = [
        Case(f"bad: {kind}", "/v1/score", {"content": body, "headers": JSON}, statuses=frozenset({status}))
        for kind, (body, status) in bodies.items()
    ]
    zipped = {"content": gzip.compress(b"[" * 10_000_000), "headers": JSON | {"Content-Encoding": "gzip"}}
    cases.append(Case("bad: a gzip bomb", "/v1/score", zipped, statuses=frozenset({415})))
    text = {"content": as_json(), "headers": {"Content-Type": "text/plain"}}
    cases.append(Case("bad: another content type", "/v1/score", text, statuses=frozenset({415})))
    for kind, content in (("a pickle", pickled.getvalue()), ("an array that is cut", npy(counts_NLT[0])[:5000])):
        sends = {"params": query, "content": content, "headers": NPY}
        cases.append(Case(f"bad: {kind}", "/v1/score/npy", sends, statuses=frozenset({422})))
    for name, file in (("bomb.xml", bomb.encode()), ("noise.dcm", bytes(range(256)) * 40)):
        sends = {"files": [("files", (name, file))]}
        cases.append(Case(f"bad: {name}", "/v1/score/file", sends, statuses=frozenset({422})))
    for kind, token in (("a wrong token", "Bearer " + "x" * 32), ("no token", "")):
        sends = {"content": as_json(), "headers": JSON | {"Authorization": token}}
        cases.append(Case(f"bad: {kind}", "/v1/score", sends, statuses=frozenset({401})))
    return cases
