"""A recording has the same score in plain torch, in a batch and from the service, also when processes are killed."""

import asyncio
import base64
import gzip
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import servers
import torch
import yaml
from safetensors.torch import load_file
from scipy import signal as sps
from support.bundles import SMALL, records
from support.haproxy import QUICK, Proxy, haproxy
from support.session import ROOT, Cluster, Trained, end_serve, lines_of, text_of, wait_for, workflow
from support.stopped import busiest_thread, stopped

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Scorer, describe
from lsemvae.formats import read
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.record import Record
from lsemvae.scoring.drift import DRIFT, LEAST_SCORES, ScoreBins, stability_index
from lsemvae.tracking import resolve

LEAD_SETS = {"6": LIMB_LEADS, "12": LEADS}
CHEST_LEADS = LEADS[6:]
ALERTS = ROOT / "infra" / "prometheus" / "alerts.yaml"


TOKEN = "the-tests-own-token"
WAITING, ONGOING, REPLICAS = 24, 16, 2
GROWN_MB = 160  # by at most 105 when measured; what is sent at once weighs 215
HUNG_S = 10  # of one batch: then the replica is replaced
GAP_S = {"replica": 30, "controller": 30, "proxy": 120}
"""The longest time without a right answer after a kill, generous for a busy machine. There is one proxy on this
machine: while it starts anew, nobody answers."""


@dataclass(frozen=True)
class Service:
    url: str
    client: httpx.Client
    config: Path
    cluster: Cluster

    def score(self, *records: dict, **rest: object) -> httpx.Response:
        return self.client.post(f"{self.url}/v1/score", json={"records": list(records), **rest})

    def state(self) -> dict:
        """The application as Ray's dashboard sees it."""
        answer = httpx.get(f"{self.cluster.dashboard}/api/serve/applications/", headers=self._bearer, timeout=60)
        return answer.raise_for_status().json()["applications"]["ecg"]

    def replicas(self) -> dict[str, int]:
        """Replicas that answer: id -> process."""
        replicas = self.state()["deployments"]["ecg"]["replicas"]
        return {replica["replica_id"]: replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def actor(self, kind: str) -> int:
        """The process of the one actor of this class that lives."""
        answer = httpx.get(f"{self.cluster.dashboard}/api/v0/actors?detail=1", headers=self._bearer, timeout=60)
        actors = answer.raise_for_status().json()["data"]["result"]["result"]
        (pid,) = [actor["pid"] for actor in actors if actor["class_name"] == kind and actor["state"] == "ALIVE"]
        return pid

    def deploy(self) -> None:
        """`serve deploy` of the configuration as it is now."""
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(self.config)]
        environment = os.environ | {"RAY_DASHBOARD_ADDRESS": self.cluster.dashboard}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    @property
    def logs(self) -> list[Path]:
        """All files that Ray and Serve have written in this session, and what `serve run` has printed."""
        place = Path(self.cluster.environment["RAY_TMPDIR"])
        files = [path for path in place.glob("ray/session_2*/logs/**/*") if path.is_file()]
        return [*files, self.config.with_name("serve.log")]

    def metrics(self) -> str:
        """What Prometheus would read, from every address that Ray tells it."""
        found = httpx.get(f"{self.cluster.dashboard}/api/prometheus/sd", headers=self._bearer, timeout=60).json()
        return "\n".join(
            httpx.get(f"http://{at}/metrics", timeout=60).text for entry in found for at in entry["targets"]
        )

    @property
    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.cluster.environment['RAY_AUTH_TOKEN']}"}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of the other features, scored over several shifts. Untrained, and only for the six chest leads."""
    found = {}
    for features, shifts in (("fused", 4), ("pooled", 2)):
        config = replace(ClassifierConfig(encoder=SMALL, hidden=8), features=features, shifts=shifts)
        torch.manual_seed(shifts)
        model = build(config, CHEST_LEADS).eval()
        preprocess = PreprocessConfig(min_lead_share=1.0)  # a recording without a model named does not come here
        known = preprocess_signals([r.signal_for(CHEST_LEADS) for r in records(8)], [500] * 8, CHEST_LEADS, preprocess)
        x_BLT, mask_BL = torch.from_numpy(known.x_BLT), torch.from_numpy(known.lead_mask_BL)
        model.head.standardise_from(model.embed(x_BLT, mask_BL), model.observed(mask_BL))
        found[features] = tmp_path_factory.mktemp("others") / features
        bundle = Bundle.of(model, preprocess, task="ph", threshold=0.5)
        bundles.save(bundle, model, found[features])
    return found


@pytest.fixture(scope="module")
def service(finetuned, pretrained, others, ray_cluster: Cluster, tmp_path_factory) -> Iterator[Service]:
    """`serve run` of serve/config.yaml with its own port and token, two replicas, and less patience."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = servers.free_port()
    folder = tmp_path_factory.mktemp("serve")
    (application,) = config["applications"]
    application["args"] |= {"encoder": str(pretrained.folder / "bundle"), "bundles": str(folder / "kept")}
    application["args"]["models"] += map(str, others.values())
    # Two replicas on this machine.
    application["args"] |= {"body_timeout_s": 2, "threads": 1, "model_timeout_s": HUNG_S}
    # `serve deploy` sends no code, and in the image PYTHONPATH says where it is.
    # Ray's logs hold the environment that a configuration gives, so the tokens are in a file.
    (folder / "tokens").write_text(f"{TOKEN}\nof-somebody-else-too\n")
    environment = {"LSEMVAE_TOKENS_FILE": str(folder / "tokens"), "PYTHONPATH": str(ROOT)}
    application["runtime_env"] = {"env_vars": environment}
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"], deployment["max_replicas_per_node"]
    deployment |= {"num_replicas": REPLICAS, "max_ongoing_requests": ONGOING, "max_queued_requests": WAITING}
    deployment |= {"health_check_period_s": 1, "health_check_timeout_s": 8}
    deployment["ray_actor_options"] = {"num_cpus": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "config.yaml")]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/readyz", process, log)
        with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            service = Service(url, client, folder / "config.yaml", ray_cluster)
            until(lambda: len(service.replicas()) == REPLICAS, "both replicas run")
            yield service
    finally:
        end_serve(process)


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.2)
    pytest.fail(f"it did not come to pass that {what}")


@contextmanager
def load(service: Service, recordings: dict[str, Record], clients: int = 4) -> Iterator[dict[str, float]]:
    """Send requests from another process while the block runs; the answers are available afterwards."""
    cases = []
    for record in list(recordings.values())[:4]:
        for leads in LEAD_SETS.values():
            stream = io.BytesIO()
            np.save(stream, record.signal_for(leads))
            query = {"leads": ",".join(leads), "rate_hz": 500}
            (result,) = score_npy(service, stream.getvalue(), query).json()["results"]
            cases.append(
                {"query": query, "body": base64.b64encode(stream.getvalue()).decode(), "score": result["score"]}
            )
    assert len({case["score"] for case in cases}) == len(cases)  # a mixed-up answer shows
    command = [sys.executable, str(ROOT / "tests" / "support" / "load.py"), service.url, str(clients)]
    found: dict[str, float] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps({"token": TOKEN, "cases": cases}) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        try:
            yield found
            time.sleep(1)
        finally:
            process.stdin.close()
            last = process.stdout.readline()
    found |= json.loads(last)


def score_npy(service: Service, body: bytes, query: dict) -> httpx.Response:
    headers = {"Content-Type": "application/x-npy"}
    return service.client.post(f"{service.url}/v1/score/npy", params=query, content=body, headers=headers)


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
    assert settings["scale"] == "fixed"
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
        x_LT = (filtered_LT - filtered_LT.mean(axis=1, keepdims=True)) / 0.15
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
        (table,) = output.glob("scores-*.parquet")
        scored[leads] = {row["record_id"]: row for row in pq.read_table(table).to_pylist()}
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
    stream = io.BytesIO()
    np.save(stream, np.stack([record.signal_for(LEAD_SETS[leads]) for record in records]))
    binary = score_npy(service, stream.getvalue(), {"leads": leads, "rate_hz": 500}).json()["results"]
    np.testing.assert_allclose([answer["score"] for answer in binary], plain_B, atol=1e-5)
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
@pytest.mark.parametrize("features", ["fused", "pooled"])
def test_other_features_and_shifts_give_the_librarys_score(features, service: Service, others, recordings):
    given, scorer = list(recordings.values()), Scorer(others[features])
    expected_B = [score.score for score in scorer.score(given)]
    answers = service.score(*(as_json(r, LEADS, seed=b) for b, r in enumerate(given)), model=features).json()
    answered_B = [result["score"] for result in answers["results"]]
    assert [score is None for score in answered_B] == [score is None for score in expected_B]
    answered_B, expected_B = (np.array(scores, dtype=float) for scores in (answered_B, expected_B))
    np.testing.assert_allclose(answered_B, expected_B, atol=1e-5)
    assert np.nanmax(expected_B) - np.nanmin(expected_B) > 0.01  # they agree on something
    scorer.model.config = replace(scorer.model.config, shifts=1)
    once_B = np.array([score.score for score in scorer.score(given)], dtype=float)
    if features == "fused":  # pooled features are the same under every shift
        assert np.nanmax(np.abs(once_B - expected_B)) > 0.01


@pytest.mark.ray
def test_the_service_describes_itself_and_asks_for_a_token(service: Service):
    models = service.client.get(f"{service.url}/v1/models").json()
    assert {m["name"] for m in models if m["version"] is None} == {"fused", "pooled"}  # the others are registered
    models = [m for m in models if m["version"]]
    assert [(m["name"], m["leads"]) for m in models] == [("ph-12L", list(LEADS)), ("ph-6L", list(LIMB_LEADS))]
    assert all(m["preprocess_digest"] == PreprocessConfig().digest for m in models)
    assert all(m["provenance"]["encoder"]["digest"] for m in models)
    ready = httpx.get(f"{service.url}/readyz").json()
    assert ready["ready"] and ready["problems"] == {}
    assert ready["models"] == [*(f"{m['name']}/{m['version']}" for m in models), "fused", "pooled"]
    assert "/v1/score" in httpx.get(f"{service.url}/openapi.json").json()["paths"]
    assert "Content-Security-Policy" in httpx.get(f"{service.url}/").headers
    for token in ("", "Bearer wrong", f"Bearer {TOKEN}x"):
        assert httpx.get(f"{service.url}/v1/models", headers={"Authorization": token}).status_code == 401


@pytest.mark.ray
def test_twelve_leads_from_six(service: Service, recordings, pretrained: Trained):
    record = next(iter(recordings.values()))
    answer = service.client.post(f"{service.url}/v1/reconstruct", json={"records": [as_json(record, LIMB_LEADS)]})
    (result,) = answer.json()["results"]
    assert [lead for lead in LEADS if result["leads"][lead]["origin"] == "reconstructed"] == list(LEADS[6:])
    assert {len(row["values"]) for row in result["leads"].values()} == {5000}
    assert answer.json()["model"] == describe(pretrained.folder / "bundle").digest


@pytest.mark.ray
@pytest.mark.parametrize(
    ("headers", "parts", "status"),
    [
        ({"Content-Length": "100"}, [b'{"records":'], 408),  # and no more comes
        ({"Transfer-Encoding": "chunked"}, [b"100000\r\n" + b" " * 2**20 + b"\r\n"] * 40, 413),
        ({"Content-Length": str(2**40)}, [], 413),
        ({"Content-Length": "2", "Content-Encoding": "gzip"}, [b"{}"], 415),
        ({"Content-Length": "2", "Content-Type": "text/plain"}, [b"{}"], 415),
    ],
    ids=["slow", "endless", "huge", "compressed", "text"],
)
def test_what_a_hostile_client_sends_is_refused_over_the_wire(service: Service, headers, parts, status):
    headers = {"Host": "x", "Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"} | headers
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        lines = ["POST /v1/score HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        try:
            for part in parts:
                connection.sendall(part)
        except ConnectionError:
            pass  # it was refused before all was sent
        assert connection.recv(4096).split(b"\r\n")[0].split()[1] == str(status).encode()
    assert service.client.get(f"{service.url}/healthz").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def proxy(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """infra/haproxy.cfg in front of Ray Serve's own proxy, as users are told to run it."""
    with haproxy(service.url, tmp_path_factory.mktemp("proxy"), QUICK) as proxy:
        yield proxy


def one(leads: str, rest: str = "") -> bytes:
    return f'{{"records": [{{"rate_hz": 500, "leads": {{{leads}}}{rest}}}]}}'.encode()


BOMB = gzip.compress(b" " * 100_000_000)
HOSTILE = {
    "NaN": (one('"I": [0.1, NaN], "II": [0, 0]'), {}, 422),
    "Infinity": (one('"I": [0.1, Infinity], "II": [0, -Infinity]'), {}, 422),
    "1e400": (one('"I": [0.1, 1e400], "II": [0, 0]'), {}, 422),
    "ragged": (one('"I": [0.1, 0.2], "II": [0]'), {}, 422),
    "13 leads": (one(", ".join(f'"{lead}": [1]' for lead in (*LEADS, "V7"))), {}, 422),
    "a lead twice": (one('"I": [0.1], "I": [0.1]'), {}, 422),
    "a lead twice in two cases": (one('"aVL": [0.1], "avl": [0.1]'), {}, 422),
    "an unknown lead": (one('"I": [0.1], "X": [0.1]'), {}, 422),
    "no records": (b'{"records": []}', {}, 422),
    "no leads": (one(""), {}, 422),
    "no samples": (one('"I": []'), {}, 422),
    "strings": (one('"I": ["0.1"]'), {}, 422),
    "a null byte": (one('"I": [0.1\0]'), {}, 422),
    "a null byte in a name": (one('"I\\u0000": [0.1]'), {}, 422),
    "null bytes": (b"\0" * 1000, {}, 422),
    "not UTF-8": (b'{"records": "\xff"}', {}, 422),
    "deep": (b"[" * 100_000, {}, 422),
    "empty": (b"", {}, 422),
    "a bomb": (BOMB, {"Content-Encoding": "gzip"}, 415),
    "a bomb that is not declared": (BOMB, {}, 422),
    "text": (one('"I": [0.1]'), {"Content-Type": "text/plain"}, 415),
    "huge": (b" " * (2**25 + 1), {}, 413),
}


@pytest.mark.ray
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_body_through_both_proxies_is_refused_and_the_service_is_well(proxy: Proxy, service, what: str):
    body, headers, status = HOSTILE[what]
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
    with proxy.client() as client:
        try:
            answer = client.post("/v1/score", content=body, headers=headers)
        except httpx.TransportError:
            assert status == 413  # refused from its headers, and the connection closed while the body was sent
        else:
            assert answer.status_code == status, answer.text
            assert len(answer.text) < 20_000
        assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.ray
def test_slow_clients_through_both_proxies_are_ended_and_others_are_answered(proxy: Proxy, service, recordings):
    """Headers that never end, a body that stops, and one that comes drop by drop: 30 clients at once."""
    record = next(iter(recordings.values()))
    begin = ["POST /v1/score HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    ready = [*begin, f"Authorization: Bearer {TOKEN}", "Content-Length: 1000", "", "{"]
    with ExitStack() as stack, proxy.client() as client:
        headers, stops, drops = ([stack.enter_context(proxy.connect()) for _ in range(10)] for _ in range(3))
        for connections, lines in ((headers, begin), (stops, ready), (drops, ready)):
            for connection in connections:
                connection.sendall("\r\n".join(lines).encode())
        dropping = threading.Event()
        thread = threading.Thread(target=drip, args=(drops, dropping))
        thread.start()
        try:
            asked = {"records": [as_json(record, LIMB_LEADS)]}
            answer = client.post("/v1/score", json=asked, headers={"Authorization": f"Bearer {TOKEN}"})
            assert answer.status_code == 200
            assert {status_of(connection) for connection in headers} == {408}
            # The proxy gives up on a body that stops, the service on one that drips; a closed connection says as much.
            assert {status_of(connection) for connection in stops} <= {400, 408, None}
            assert {status_of(connection) for connection in drops} <= {408, None}
        finally:
            dropping.set()
            thread.join()
        assert client.get("/healthz").json() == {"status": "ok"}


def drip(connections: list[ssl.SSLSocket], stop: threading.Event) -> None:
    """A byte each now and then."""
    while not stop.wait(0.3):
        for connection in connections:
            with suppress(OSError):
                connection.sendall(b" ")


def status_of(connection: ssl.SSLSocket) -> int | None:
    """Of the answer; None where the connection was closed without one."""
    try:
        answer = connection.recv(4096)
    except OSError:
        return None
    return int(answer.split()[1]) if answer else None


@pytest.mark.ray
def test_eleven_leads_are_scored_and_the_answer_says_what_is_missing(proxy: Proxy, service, recordings):
    record = next(iter(recordings.values()))
    with proxy.client() as client:
        asked = {"records": [as_json(record, LEADS[:-1])]}
        (result,) = client.post("/v1/score", json=asked, headers={"Authorization": f"Bearer {TOKEN}"}).json()["results"]
    assert result["leads_used"] == list(LEADS[:-1]) and result["reliability"]["level"] == "limited"
    assert "Missing of the model's 12 leads: V6." in result["reliability"]["reasons"]


@pytest.mark.ray
def test_a_token_counts_and_is_revoked_on_every_replica_without_a_restart(service: Service):
    file, before, token = service.config.with_name("tokens"), service.replicas(), "of-a-new-colleague"

    def status() -> int:
        return httpx.get(f"{service.url}/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code

    def every(expected: int) -> bool:
        return all(status() == expected for _ in range(15))

    assert every(401)
    old = file.read_text()
    for content, expected in ((f"{old}{token}\n", 200), (old, 401)):
        written = time.monotonic()
        file.with_name("new").write_text(content)
        file.with_name("new").replace(file)
        until(partial(every, expected), f"the token is answered {expected}")
        assert time.monotonic() - written < 60
    assert service.replicas() == before
    assert service.client.get(f"{service.url}/v1/models").status_code == 200


@pytest.mark.ray
def test_connections_without_a_token_hold_up_nobody(service: Service, recordings):
    """Through Ray Serve's own proxy: 80 clients announce a body, send a byte of it and wait; a user is answered."""
    host, port = service.url.removeprefix("http://").split(":")
    record = next(iter(recordings.values()))
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(80)]
        for k, connection in enumerate(idle):
            path = ("/healthz", "/v1/score")[k % 2]
            lines = [f"POST {path} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "", "1", "{", ""]
            connection.sendall("\r\n".join(lines).encode())
        # A burst of 80 may fill Serve's own queue for a moment: then a user's client is told 503 and asks again.
        until(lambda: service.score(as_json(record, LIMB_LEADS)).status_code == 200, "a user is answered")
        statuses = [connection.recv(4096).split()[1] for connection in idle]  # at once, not after a time limit
    # 503 where so many arrive at once that Serve's own queue is full: also a refusal, and also at once.
    assert set(statuses[::2]) <= {b"405", b"503"} and set(statuses[1::2]) <= {b"401", b"503"}
    assert {b"405", b"401"} <= set(statuses)


@pytest.mark.ray
def test_one_impossible_rate_among_requests_at_once_fails_alone(service: Service, recordings):
    record = next(iter(recordings.values()))
    good = as_json(record, LIMB_LEADS)

    async def at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            bodies = [{"records": [good | ({"rate_hz": 1e-310} if k == 2 else {})]} for k in range(5)]
            return await asyncio.gather(*(client.post(f"{service.url}/v1/score", json=body) for body in bodies))

    answers = asyncio.run(at_once())
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200, 200]
    assert answers[2].json()["detail"][0]["loc"][-1] == "rate_hz"


# --- load, failures and updates ---------------------------------------------------------------------------------------


@pytest.mark.ray
def test_more_load_than_capacity_is_503_with_retry_after(service: Service, recordings):
    """A burst: requests within capacity get correct answers, the others get 503, and the queue does not grow."""
    stream = io.BytesIO()
    np.save(stream, np.stack([record.signal_for(LIMB_LEADS) for record in list(recordings.values())[:8]]))
    query, body = {"leads": "6", "rate_hz": 500}, stream.getvalue()

    def scores(answer: httpx.Response) -> list[float]:
        return [result["score"] for result in answer.json()["results"]]

    expected = scores(score_npy(service, body, query))

    async def burst(count: int) -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-npy"}
        limits, url = httpx.Limits(max_connections=None), f"{service.url}/v1/score/npy"
        async with httpx.AsyncClient(timeout=120, headers=headers, limits=limits) as client:
            return await asyncio.gather(*(client.post(url, params=query, content=body) for _ in range(count)))

    pids = {"proxy": service.actor("ProxyActor"), **service.replicas()}
    before_mb = {name: memory_mb(pid, start_again=True) for name, pid in pids.items()}
    answers = asyncio.run(burst(4 * (WAITING + REPLICAS * ONGOING)))
    grown_mb = {name: memory_mb(pid) - before_mb[name] for name, pid in pids.items()}
    # Of 215 MB sent at once, the proxy may hold what arrives until it refuses it, a replica what it has taken on.
    assert all(grown < GROWN_MB for grown in grown_mb.values()), grown_mb
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(answer.headers["Retry-After"] == "1" for answer in answers if answer.status_code == 503)
    right = [answer for answer in answers if answer.status_code == 200]
    assert len(right) >= WAITING
    for answer in right:
        np.testing.assert_allclose(scores(answer), expected, atol=1e-5)
    np.testing.assert_allclose(scores(score_npy(service, body, query)), expected, atol=1e-5)


def memory_mb(pid: int, start_again: bool = False) -> float:
    """The most memory that the process has had since the last start of this measurement."""
    if start_again:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.ray
@pytest.mark.parametrize("what", ["replica", "proxy", "controller"])
def test_a_killed_part_costs_few_errors_and_no_wrong_answer(service: Service, recordings, what: str):
    clients = 4
    with load(service, recordings, clients) as found:
        if what == "replica":
            before = service.replicas()
            victim, pid = next(iter(before.items()))
            os.kill(pid, signal.SIGKILL)
            until(lambda: len(service.replicas().keys() - {victim}) == REPLICAS, "another replica runs")
        else:
            kind = {"proxy": "ProxyActor", "controller": "ServeController"}[what]
            pid = service.actor(kind)
            os.kill(pid, signal.SIGKILL)
            until(lambda: well(lambda: service.actor(kind) != pid), f"another {what} runs")
            until(lambda: well(lambda: service.client.get(f"{service.url}/readyz").status_code == 200), "it answers")
            until(lambda: well(lambda: len(service.replicas()) == REPLICAS), "its replicas run")
    assert "wrong" not in found
    assert found["right"] > 10 * clients
    assert found["longest_gap_s"] <= GAP_S[what]
    errors = errors_of(found)
    if what == "proxy":
        assert errors.keys() <= {"ConnectError", "ReadError", "RemoteProtocolError", "500", "503", "404"}
        # A client asks again after 0.05 s at the earliest, and only while nobody is answered.
        assert sum(errors.values()) <= clients * (3 + 20 * found["longest_gap_s"])
    else:
        assert sum(errors.values()) <= (2 * clients if what == "replica" else 0), errors


def errors_of(found: dict[str, float]) -> dict[str, float]:
    """Answers other than scores, by status or exception."""
    return {name: n for name, n in found.items() if name not in ("right", "wrong", "longest_gap_s")}


@contextmanager
def process_stopped(pid: int) -> Iterator[Callable[[], bool]]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: not Path(f"/proc/{pid}").exists()
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.ray
@pytest.mark.parametrize("what", ["its models' thread", "the whole process"])
def test_a_replica_that_hangs_is_replaced_and_requests_go_elsewhere(service: Service, recordings, what: str):
    clients, (victim, pid) = 4, next(iter(service.replicas().items()))
    stream = io.BytesIO()
    np.save(stream, np.stack([record.signal_for(LEADS) for record in recordings.values()]))

    def score_many() -> None:
        for _ in range(12):  # of which each replica gets some
            score_npy(service, stream.getvalue(), {"leads": "12", "rate_hz": 500})

    of_thread = what == "its models' thread"
    stopping = stopped(busiest_thread(pid, score_many)) if of_thread else process_stopped(pid)
    with load(service, recordings, clients) as found, stopping as has_ended:

        def is_replaced() -> bool:
            has_ended()
            return well(lambda: len(service.replicas().keys() - {victim}) == REPLICAS)

        until(is_replaced, "another replica runs")
    assert "wrong" not in found and found["right"] > 10 * clients
    assert found["longest_gap_s"] <= GAP_S["replica"]
    assert sum(errors_of(found).values()) <= 2 * clients, found  # those that waited for the replica


def well(check: Callable[[], bool]) -> bool:
    """Whether the condition holds. A service that is being restarted may not answer, or only in part."""
    try:
        return check()
    except (httpx.HTTPError, ValueError, KeyError):
        return False


@pytest.mark.ray
def test_a_rolling_update_under_load_fails_no_request(service: Service, recordings):
    before = service.replicas()
    config = yaml.safe_load(service.config.read_text())
    config["applications"][0]["args"]["body_timeout_s"] = 3
    service.config.write_text(yaml.safe_dump(config))
    with load(service, recordings) as found:
        service.deploy()
        until(lambda: well(lambda: not service.replicas().keys() & before.keys()), "no replica is an old one")
        until(lambda: service.state()["status"] == "RUNNING", "the update ends")
    assert len(service.replicas()) == REPLICAS
    assert found.keys() == {"right", "longest_gap_s"}
    assert found["right"] > 40


# --- metrics and logs -----------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_shifted_cohort_drifts_and_the_training_cohort_hardly(service: Service, cohort: Path, finetuned):
    """The index from Prometheus' text of this cluster, as the rules compute it from counters and expected shares."""
    bundle = describe(finetuned["12"].folder / "bundle")
    bins = ScoreBins.read(bundle.provenance)
    records = [read(path) for path in sorted(cohort.rglob("*.hea"))]
    version = {m["name"]: str(m["version"]) for m in service.client.get(f"{service.url}/v1/models").json()}["ph-12L"]

    def counts() -> list[float]:
        found = in_bins(service, "ray_lsemvae_score_bins_total", version)
        return [found.get(str(n), 0.0) for n in range(len(bins.shares))]

    def settled() -> list[float]:
        """The counts with the scores of earlier tests: Ray exports metrics every ten seconds."""
        found: list[float] = []
        while found != (found := counts()):
            time.sleep(15)
        return found

    def index_of(gain: float) -> float:
        before, scores = settled(), []
        while len(scores) < LEAST_SCORES:
            for record in records:
                body = io.BytesIO()
                np.save(body, gain * record.signal_for(LEADS))
                query = {"leads": ",".join(LEADS), "rate_hz": 500, "model": "ph-12L"}
                scores += [
                    r["score"] for r in score_npy(service, body.getvalue(), query).json()["results"] if r["score"]
                ]
        given = bins.counts(np.array(scores))
        until(lambda: np.allclose(np.subtract(counts(), before), given, atol=1e-3), f"{given} are counted")
        expected = in_bins(service, "ray_lsemvae_score_bins_expected", version)
        return stability_index(given, [expected[str(n)] for n in range(len(bins.shares))])

    same, shifted = index_of(1), index_of(4)
    # A model of 120 recordings scores those that it was trained on somewhat unlike its out-of-fold scores.
    assert shifted > DRIFT and same < shifted / 4


def in_bins(service: Service, name: str, version: str) -> dict[str, float]:
    """A metric of ph-12L by bin: over the replicas the sum of a counter, the maximum of a gauge."""
    found: dict[str, list[float]] = defaultdict(list)
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", service.metrics(), re.MULTILINE):
        of = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if (of["model"], of["version"]) == ("ph-12L", version):
            found[of["bin"]].append(float(value))
    return {bin: sum(values) if name.endswith("_total") else max(values) for bin, values in found.items()}


@pytest.mark.ray
def test_the_dashboard_asks_for_metrics_that_are_there(service: Service, recordings):
    """Every name and every label of its queries, against what Prometheus would read of this very cluster."""
    record = next(iter(recordings.values()))
    for leads in LEAD_SETS.values():
        service.score(as_json(record, leads))
    service.score(as_json(record, ("I", "II")))
    service.score({"rate_hz": 500, "leads": {"V1": [1, 2]}})
    asked = {"records": [as_json(record, LIMB_LEADS)]}
    explained = service.client.post(f"{service.url}/v1/explain?signal=false", json=asked)
    assert explained.status_code == 200, explained.text
    dashboard = json.loads((ROOT / "infra" / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = set(re.findall(r"\bray_\w+", " ".join(queries)))
    until(
        lambda: all(re.search(rf"^{name}\{{", service.metrics(), re.MULTILINE) for name in names), f"{names} are there"
    )
    exposed: dict[str, list[dict[str, str]]] = defaultdict(list)
    for name, labels in re.findall(r"^(ray_\w+)\{(.*)\} \S+$", service.metrics(), re.MULTILINE):
        exposed[name].append(dict(re.findall(r'(\w+)="(.*?)"', labels)))
    for query in queries:
        grouped = {label.strip() for group in re.findall(r"by \((.*?)\)", query) for label in group.split(",")}
        for name, selector in re.findall(r"\b(ray_\w+)(?:\{(.*?)\})?\[?", query):
            wanted = dict(re.findall(r'(\w+)=~?"(.*?)"', selector)) | dict.fromkeys(grouped, "")
            assert any(
                all(label in labels and value in ("", "$model", labels[label]) for label, value in wanted.items())
                for labels in exposed[name]
            ), (query, exposed[name][:3])
    served = {(labels["model"], labels["version"]) for labels in exposed["ray_lsemvae_scores_total"]}
    # In a whole test run the cluster also holds the counts of earlier services.
    registered = [m for m in service.client.get(f"{service.url}/v1/models").json() if m["version"]]
    assert served >= {(m["name"], str(m["version"])) for m in registered}
    assert "leads" in {labels["reason"] for labels in exposed["ray_lsemvae_refusals_total"]}
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        for name, selector in re.findall(r"\b(ray_\w+)(?:\{(.*?)\})?", rule["expr"]):
            grouped = {
                label.strip() for group in re.findall(r"by \((.*?)\)", rule["expr"]) for label in group.split(",")
            }
            wanted = grouped | set(re.findall(r"(\w+)=~?\"", selector))
            assert any(wanted <= labels.keys() for labels in exposed[name]), (rule, exposed[name][:3])
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert set(re.findall(r"\blsemvae:[\w:]+", " ".join([*queries, *(rule["expr"] for rule in rules)]))) <= recorded


@pytest.mark.ray
def test_logs_are_json_lines_that_name_nobody(service: Service):
    """A scored, a refused and unreadable requests; all files of this session, metrics and error bodies are searched."""
    mark, value, secret = "Patient-0815", 0.7391846, "a-secret-of-somebody"
    rng = np.random.default_rng(815)
    leads = {lead: (value + rng.normal(0, 0.1, 5000)).round(7).tolist() for lead in LIMB_LEADS}
    given = {"id": mark, "rate_hz": 500, "leads": leads}
    marks = [mark, secret, TOKEN, *(str(leads[lead][k]) for lead in ("I", "aVF") for k in (0, 2500, 4999))]
    marks += [str(value)]
    assert service.score(given).json()["results"][0]["id"] == mark
    url, wrong = f"{service.url}/v1", given | {"leads": {"I": [value, value], mark: [value]}}
    refused = [
        service.score(wrong),
        service.score(given | {"rate_hz": f"{value}"}),
        service.score(given | {"unit": mark}),
        service.client.post(f"{url}/score", content=json.dumps(given)[:-9],
                            headers={"Content-Type": "application/json"}),
        service.client.post(f"{url}/reconstruct", json={"records": [wrong]}),
        service.client.post(f"{url}/score/npy", params={"leads": "I", "rate_hz": 500, "model": mark},
                            content=b"\x93NUMPY" + str(value).encode(), headers={"Content-Type": "application/x-npy"}),
        service.client.post(f"{url}/score/file", files={"files": (f"{mark}.csv", f"I,II\n{value},{value}\n".encode())}),
        service.client.get(f"{url}/{mark}", params={"who": mark}),
        httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {secret}"}),
    ]  # fmt: skip
    for answer in refused:
        assert 400 <= answer.status_code < 500, answer.text
        text = (
            answer.text
            if "results" not in answer.text
            else json.dumps([r["refused"] for r in answer.json()["results"]])
        )
        assert not [each for each in marks if each in text and not (each == mark and "results" in answer.text)], text
    names = {replica["log_file_path"].lstrip("/") for replica in service.state()["deployments"]["ecg"]["replicas"]}
    logs = [log for log in service.logs if any(str(log).endswith(name) for name in names)]
    assert len(logs) == REPLICAS

    def answered() -> list[dict]:
        lines = [json.loads(line) for log in logs for line in lines_of(log)]
        return [line for line in lines if line["message"] == "answered"]

    until(lambda: {"/v1/score", "/v1/score/file"} <= {line["endpoint"] for line in answered()}, "requests are logged")
    assert all({"endpoint", "status", "ms"} <= line.keys() for line in answered())
    searched = service.logs
    assert {"serve.log", "raylet.out", "gcs_server.out"} <= {log.name for log in searched}
    assert [log for log in searched if log.match("worker-*.err")] and [log for log in searched if log.match("proxy_*")]
    for log in searched:
        text = text_of(log)
        assert not [each for each in marks if each in text], log
    metrics = service.metrics()
    assert "ray_lsemvae_requests" in metrics and not [each for each in marks if each in metrics]
