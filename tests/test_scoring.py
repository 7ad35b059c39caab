"""One score for one recording: in plain torch, in a batch, and over HTTP; and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, Trained, end_group, wait_for, workflow
from safetensors.torch import load_file
from scipy import signal as sps

from lsemvae.formats import read
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record
from lsemvae.shards import ShardedDataset
from lsemvae.tracking import resolve
from serve.app import to_record
from serve.schema import RecordIn, ScoreRequest

LEAD_SETS = {"6": LIMB_LEADS, "12": LEADS}


@dataclass(frozen=True)
class Service:
    url: str
    client: httpx.Client

    def score(self, *records: dict, **rest: object) -> httpx.Response:
        return self.client.post(f"{self.url}/v1/score", json={"records": list(records), **rest})


@pytest.fixture(scope="module")
def service(finetuned: dict[str, Trained], ray_cluster, tmp_path_factory) -> Iterator[Service]:
    """`serve run` of serve/config.yaml, with only the port changed."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = demo.free_port()
    folder = tmp_path_factory.mktemp("serve")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "config.yaml")]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stdout=stream, stderr=stream, start_new_session=True
        )
    wait_for(f"http://127.0.0.1:{port}/healthz", process, log)
    with httpx.Client(timeout=60) as client:
        yield Service(f"http://127.0.0.1:{port}", client)
    end_group(process)
    subprocess.run([str(Path(sys.executable).with_name("serve")), "shutdown", "-y"], cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def recordings(cohort: Path) -> dict[str, Record]:
    """Some recordings as the files have them, by record id."""
    paths = sorted(cohort.rglob("*.hea"))[:12]
    return {path.stem: read(path) for path in paths}


def as_json(record: Record, leads: tuple[str, ...], seed: int | None = None, unit: str = "mV") -> dict:
    """A request's record: leads in a random order and case if a seed is given, NaN as null."""
    rng = np.random.default_rng(seed)
    order = list(rng.permutation(leads)) if seed is not None else list(leads)
    factor = 1000 if unit == "uV" else 1
    return {
        "id": record.record_id,
        "rate_hz": record.rate_hz,
        "unit": unit,
        "leads": {
            (lead.upper() if seed is not None and rng.random() < 0.5 else str(lead)): [
                None if np.isnan(value) else float(value) * factor for value in record.signal_for([lead])[0]
            ]
            for lead in order
        },
    }


def plain_scores(records: list[Record], folder: Path) -> np.ndarray:
    """The score computed again here: scipy's filters, einsum and matmul over the bundle's tensors, nothing of ours."""
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    leads, settings = config["leads"], config["preprocess"]
    assert settings["scale"] == "record"
    scores = []
    for record in records:
        rows_mv = []
        for lead in leads:
            row_mv = record.signal_mv_LT[record.leads.index(lead)].astype(float)
            gap = np.isnan(row_mv)
            row_mv[gap] = np.interp(np.flatnonzero(gap), np.flatnonzero(~gap), row_mv[~gap]) if not gap.all() else 0
            sos = sps.butter(settings["highpass_order"], settings["highpass_hz"], "highpass", fs=500, output="sos")
            rows_mv.append(sps.filtfilt(np.ones(10), [10], sps.sosfiltfilt(sos, row_mv)))
        filtered_LT = np.stack(rows_mv)
        std_L = filtered_LT.std(axis=1, ddof=1)
        usable_L = (std_L >= settings["min_std_mv"]) & (
            np.isnan(record.signal_for(leads)).mean(axis=1) <= settings["max_nan_share"]
        )
        x_LT = (filtered_LT - filtered_LT.mean(axis=1, keepdims=True)) / np.sqrt((std_L[usable_L] ** 2).mean())
        x_LT[~usable_L] = 0
        h = torch.from_numpy(x_LT).float()[None]
        for part in ("conv1", "conv2", "conv3"):
            weight, bias = state[f"encoders.{part}.weight"], state[f"encoders.{part}.bias"]
            h = torch.cat(
                [
                    torch.nn.functional.conv1d(
                        h.reshape(len(leads), -1, h.shape[-1])[k : k + 1], weight[k], bias[k], stride=2, padding=1
                    )
                    for k in range(len(leads))
                ]
            ).relu()
        flat_LF = h.flatten(1)
        mu_LD = torch.einsum("lf,lfd->ld", flat_LF, state["encoders.fc_mu.weight"]) + state["encoders.fc_mu.bias"]
        mean_LD = state["head.mean_F"].reshape(mu_LD.shape)
        standard_LD = (mu_LD - mean_LD) / state["head.scale_F"].reshape(mu_LD.shape)
        standard_F = (standard_LD * torch.from_numpy(usable_L)[:, None]).flatten()
        hidden = (state["head.fc1.weight"] @ standard_F + state["head.fc1.bias"]).relu()
        scores.append(torch.sigmoid(state["head.fc2.weight"] @ hidden + state["head.fc2.bias"]).item())
    return np.array(scores)


@pytest.fixture(scope="module")
def batch_scores(finetuned, shards, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """workflows/score.py for both models: rows by record id."""
    scored = {}
    for leads in LEAD_SETS:
        output = tmp_path_factory.mktemp(f"scores{leads}") / "out"
        workflow("score", "--model", f"models:/ph-{leads}L@champion", "--data", shards, "--output", output)
        rows = [row for part in output.glob("scores-*.parquet") for row in pq.read_table(part).to_pylist()]
        scored[leads] = {row["record_id"]: row for row in rows}
        assert len(scored[leads]) == len(rows)  # each recording once
        assert sorted(path.name for path in output.iterdir() if path.suffix == ".json") == ["job.json", "scores.json"]
    return scored


@pytest.mark.ray
@pytest.mark.parametrize("leads", ["6", "12"])
def test_batch_online_and_plain_torch_agree(leads, service, recordings, batch_scores, finetuned):
    records = list(recordings.values())
    plain_B = plain_scores(records, finetuned[leads].folder / "bundle")
    online = service.score(*(as_json(r, LEAD_SETS[leads], seed=b) for b, r in enumerate(records))).json()["results"]
    batch_B = [batch_scores[leads][record.record_id]["score"] for record in records]
    assert [answer["id"] for answer in online] == list(recordings)
    online_B = [answer["score"] for answer in online]
    np.testing.assert_allclose(batch_B, plain_B, atol=1e-5)
    np.testing.assert_allclose(online_B, plain_B, atol=1e-5)
    assert np.ptp(plain_B) > 0.05  # they agree on something
    name, version = resolve(f"models:/ph-{leads}L@champion")
    for answer, record in zip(online, records, strict=True):
        row = batch_scores[leads][record.record_id]
        assert (answer["model"]["name"], answer["model"]["version"]) == (name, version)
        assert answer["model"]["digest"] == row["digest"]
        assert answer["decision"] == row["decision"] == (row["score"] >= answer["model"]["threshold"])
        assert answer["leads_used"] == row["leads_used"].split(",")
        stored = row["flags"].split(",") if row["flags"] else []  # of all twelve leads
        assert answer["flags"] == [flag for flag in stored if flag.split(":")[-1] not in LEADS[len(LEAD_SETS[leads]) :]]


@pytest.mark.ray
def test_every_row_of_a_cohort_is_scored_and_the_same_command_does_nothing(shards, batch_scores, finetuned, tmp_path):
    data = ShardedDataset.open(str(shards))
    stored = data.read(["record_id", "subject_id"]).to_pylist()
    assert set(batch_scores["6"]) == {row["record_id"] for row in stored}
    for row in stored:
        assert batch_scores["6"][row["record_id"]]["subject_id"] == row["subject_id"]
    arguments = ("--model", "models:/ph-6L@champion", "--data", shards, "--output", tmp_path / "out")
    workflow("score", *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "is complete: nothing to do" in workflow("score", *arguments).stdout
    missing = sorted((tmp_path / "out").glob("*.parquet"))[0]
    missing.unlink()
    (tmp_path / "out" / "scores.json").unlink()
    workflow("score", *arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before  # the same bytes
    other = workflow(
        "score", "--model", "models:/ph-12L@champion", "--data", shards, "--output", tmp_path / "out", check=False
    )
    assert other.returncode == 2 and "choose another --output" in other.stderr


@pytest.mark.ray
def test_microvolts_derived_leads_and_the_choice_of_model(service, recordings):
    record = next(iter(recordings.values()))
    (twelve,) = service.score(as_json(record, LEADS)).json()["results"]
    (six,) = service.score(as_json(record, LIMB_LEADS)).json()["results"]
    assert (twelve["model"]["name"], six["model"]["name"]) == ("ph-12L", "ph-6L")
    (chosen,) = service.score(as_json(record, LEADS), model="ph-6L").json()["results"]
    assert chosen["score"] == pytest.approx(six["score"], abs=1e-6)
    (microvolts,) = service.score(as_json(record, LEADS, unit="uV")).json()["results"]
    assert microvolts["score"] == pytest.approx(twelve["score"], abs=1e-4)
    (two,) = service.score(as_json(record, ("II", "I"))).json()["results"]
    assert two["leads_derived"] == ["III", "aVR", "aVL", "aVF"]
    assert two["score"] == pytest.approx(six["score"], abs=0.02)  # the file's leads are rounded to 5 uV each


@pytest.mark.ray
def test_a_refused_recording_is_422_with_the_reason(service, recordings):
    record = next(iter(recordings.values()))
    good = as_json(record, LIMB_LEADS)
    too_large = good | {"leads": {lead: [1000 * v for v in row] for lead, row in good["leads"].items()}}
    flat = good | {"leads": {lead: [0.0] * 5000 for lead in LIMB_LEADS}}
    short = good | {"leads": {lead: row[:500] for lead, row in good["leads"].items()}}
    chest = good | {"leads": {"V1": good["leads"]["II"]}}
    ragged = good | {"leads": good["leads"] | {"I": good["leads"]["I"][:-1]}}
    unknown = good | {"leads": good["leads"] | {"V7": good["leads"]["I"]}}
    twice = good | {"leads": good["leads"] | {"avf": good["leads"]["I"]}}
    for bad, code, says in (
        (too_large, "amplitude", "microvolts"), (flat, "leads", "0 of 6"), (short, "too_short", "1.00 s"),
        (chest, "leads", "models want"), (ragged, "record", "equally long"), (unknown, "record", "unknown lead 'V7'"),
        (twice, "record", "given twice"),
    ):  # fmt: skip
        answer = service.score(bad)
        assert answer.status_code == 422, answer.text
        (result,) = answer.json()["results"]
        assert result["score"] is None and result["refused"]["code"] == code
        assert says in result["refused"]["reason"]
    mixed = service.score(good, flat)
    assert mixed.status_code == 200  # the good one is not lost
    assert [result["refused"] is None for result in mixed.json()["results"]] == [True, False]
    assert service.score(good, model="nobody").status_code == 422


@pytest.mark.ray
@pytest.mark.parametrize(
    "body",
    [
        "", "{", "[]", "null", '{"records": []}', '{"records": [{}]}',
        '{"records": [{"rate_hz": 500, "leads": {}}]}', '{"records": [{"rate_hz": 500, "leads": {"I": []}}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": ["a"]}}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": [NaN]}}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": [Infinity]}}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": [1e400]}}]}',
        '{"records": [{"rate_hz": 0, "leads": {"I": [1]}}]}', '{"records": [{"rate_hz": 1e400, "leads": {"I": [1]}}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "unit": "V"}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I": [1]}, "extra": 1}]}',
        '{"records": [{"rate_hz": 500, "leads": {"I\\u0000": [1]}}]}',
    ],
)  # fmt: skip
def test_malformed_requests_are_4xx_and_the_service_stays_well(service: Service, body: str):
    answer = service.client.post(f"{service.url}/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert service.client.get(f"{service.url}/healthz").json() == {"status": "ok"}


@pytest.mark.ray
def test_the_service_describes_itself(service: Service):
    models = service.client.get(f"{service.url}/v1/models").json()
    assert [(m["name"], m["leads"]) for m in models] == [("ph-12L", list(LEADS)), ("ph-6L", list(LIMB_LEADS))]
    assert all(m["preprocess_digest"] == PreprocessConfig().digest for m in models)
    openapi = service.client.get(f"{service.url}/openapi.json").json()
    assert "/v1/score" in openapi["paths"]
    assert "not a medical device" in openapi["info"]["description"]


def test_a_request_becomes_a_record():
    request = ScoreRequest.model_validate_json(
        '{"records": [{"rate_hz": 250, "unit": "uV", "leads": {"avl": [1000, null], "V1": [-500.5, 0]}}]}'
    )
    record = to_record(request.records[0])
    assert record.leads == ("aVL", "V1")
    np.testing.assert_array_equal(record.signal_mv_LT, np.array([[1, np.nan], [-0.5005, 0]], dtype=np.float32))
    assert isinstance(request.records[0], RecordIn)
