"""`serve`: the endpoint against the bare model in a loop, a minimal FastAPI server and `mlflow models serve`.

All score the same recordings with the same bundle, and share the machine with the process that generates the load. The
name of a row has the baseline and the number of clients (`c32`, closed loop) or requests a second (`r40`, open loop).
Unless it says `json`, requests are binary, except to MLflow, which accepts only JSON.
"""

import argparse
import io
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import urlencode

import mlflow
import numpy as np
import torch
import yaml
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from servers import free_port, running, wait_until_healthy

from benchmarks.load import Generator, Run, generator
from benchmarks.measure import Row, less_is_better, more_is_better
from benchmarks.model import SIZES
from lsemvae.bundle import Bundle, load, save
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

WORKFLOWS = Path(__file__).parents[1]
ROOT = WORKFLOWS.parent
LEAD_SETS = {"6": LIMB_LEADS, "12": LEADS}
UV_PER_LSB = 5
DIFFERENT = 32  # simulated recordings
FASTEST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # as serve/config.yaml recommends
OPEN_CLIENTS = 64
WARM_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--size", default="full", choices=SIZES, help="size of the model")
    parser.add_argument("--leads", default="12", choices=LEAD_SETS, help="leads of the model and the recordings")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients in the closed loop"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=[0.25, 0.5, 0.75],
        help="rates of the open loop, as shares of the bare model's rate",
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement")


@dataclass(frozen=True)
class Server:
    """A server under test. `requests` by form: files with complete HTTP requests, one recording each."""

    name: str
    port: int
    process: subprocess.Popen
    requests: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Measured:
    """Records a second, latencies in milliseconds, and CPU milliseconds a record."""

    per_s: float
    p50_ms: float = np.nan
    p95_ms: float = np.nan
    p99_ms: float = np.nan
    server_ms: float = np.nan
    load_ms: float = 0.0


def bench_serve(args: argparse.Namespace) -> list[Row]:
    """Measure each server in turn, several times, under the same load."""
    leads, config = LEAD_SETS[args.leads], ClassifierConfig(encoder=SIZES[args.size])
    torch.manual_seed(0)
    model = Classifier(config, leads).eval()
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
        save(Bundle.of(model, preprocessing, task="ph", threshold=0.5), model, folder / "bundle")
        del model
        counts_NLT = recordings(leads)
        bare = Bare(folder / "bundle", counts_NLT)
        table: dict[tuple[str, str, str], list[Measured]] = defaultdict(list)
        for clients in args.clients:
            table["bare, alone", "", f"c{clients}"].append(bare.measure(clients, args.seconds))
        bodies = make_bodies(leads, counts_NLT)
        servers = [running.enter_context(start(folder, leads, bodies)) for start in (endpoint, plain, mlflow_models)]
        ask = running.enter_context(generator())
        for _ in range(args.rounds or 2):
            for clients in args.clients:
                table["bare", "", f"c{clients}"].append(bare.measure(clients, args.seconds))
                for server in servers:
                    for form, requests in server.requests.items():
                        run = Run(server.port, requests, clients, args.seconds, WARM_S)
                        table[server.name, form, f"c{clients}"].append(under_load(server, run, ask))
            best = max(measured[0].per_s for (name, _, _), measured in table.items() if name == "bare")
            for rate in [float(f"{share * best:.2g}") for share in args.shares]:
                for server in servers[:2]:
                    run = Run(server.port, server.requests["npy"], OPEN_CLIENTS, args.seconds, WARM_S, rate)
                    table[server.name, "npy", f"r{rate:g}"].append(under_load(server, run, ask))
    medians = {
        key: Measured(*map(statistics.median, zip(*map(astuple, measured), strict=True)))
        for key, measured in table.items()
    }
    show(medians)
    return rows_of(medians)


def rows_of(medians: Mapping[tuple[str, str, str], Measured]) -> list[Row]:
    """Rows of ours against each baseline under the same load."""
    rows = []
    for (name, form, pressure), baseline in medians.items():
        if name not in ("bare", "fastapi", "mlflow"):
            continue
        for our_form in ("npy", "json"):
            ours = medians.get(("serve", our_form, pressure))
            if ours is None or (name == "fastapi" and form != our_form):
                continue
            case = f"{name} {pressure}{' json' if our_form == 'json' else ''}"
            rows.append(more_is_better(case, ours.per_s, baseline.per_s, "records/s"))
            if name != "bare":
                for quantile in ("p50", "p95", "p99"):
                    pair = (getattr(measured, f"{quantile}_ms") for measured in (ours, baseline))
                    rows.append(less_is_better(f"{case} {quantile}", *pair, "ms"))
    return rows


def show(medians: Mapping[tuple[str, str, str], Measured]) -> None:
    """Print the measurements, one line each."""
    head = ("records/s", "p50 ms", "p95 ms", "p99 ms", "CPU ms a record", "of the load")
    print(f"{'':<24}" + "".join(f"{title:>{max(9, len(title) + 2)}}" for title in head))
    for (name, form, pressure), measured in medians.items():
        values = ("" if np.isnan(value) else f"{value:.1f}" for value in astuple(measured))
        print(
            f"{name:<11} {form:<5}{pressure:<7}"
            + "".join(f"{value:>{max(9, len(title) + 2)}}" for title, value in zip(head, values, strict=True))
        )


class Bare:
    """The baseline of the rate: a loop in this process from int16 to scores, with the same preprocessing."""

    def __init__(self, folder: Path, counts_NLT: np.ndarray) -> None:
        self._bundle, self._model = load(folder)
        self._counts_NLT = counts_NLT

    @torch.inference_mode()
    def score(self, counts_BLT: np.ndarray) -> np.ndarray:
        """counts_BLT -> score_B."""
        signals_mv = list(counts_BLT * np.float32(UV_PER_LSB / 1000))
        prepared = preprocess_signals(
            signals_mv, [RATE_HZ] * len(signals_mv), self._bundle.leads, self._bundle.preprocess
        )
        return self._model.predict(torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)).numpy()

    def measure(self, batch: int, seconds: float) -> Measured:
        counts_BLT = np.resize(self._counts_NLT, (batch, *self._counts_NLT.shape[1:]))
        self.score(counts_BLT)
        self.score(counts_BLT)
        began, cpu_s = time.perf_counter(), time.process_time()
        done, took_s = 0, 0.0
        while took_s < seconds:
            self.score(counts_BLT)
            done, took_s = done + 1, time.perf_counter() - began
        cpu_s = time.process_time() - cpu_s
        return Measured(done * batch / took_s, server_ms=1000 * cpu_s / (done * batch))


def under_load(server: Server, run: Run, ask: Generator) -> Measured:
    """Measure a server under a load; raises LsemvaeError if a closed loop gets an answer without a score."""
    before_s = tree_s(server.process.pid)
    found = ask(run)
    cpu_s = tree_s(server.process.pid) - before_s
    if found.failed and not run.rate:
        raise LsemvaeError(f"{server.name} with {run.clients} clients: {found.failed} in place of answers")
    if found.failed:
        print(f"{server.name} at {run.rate:g} requests/s: {found.failed} in place of answers")
    answers = max(found.answers, 1)
    return Measured(
        found.per_s, found.p50_ms, found.p95_ms, found.p99_ms, 1000 * cpu_s / answers, 1000 * found.cpu_s / answers
    )


def tree_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    total_s = 0.0
    with suppress(OSError):  # it has ended in the meantime
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total_s += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_s += sum(tree_s(int(child)) for child in (task / "children").read_text().split())
    return total_s


def recordings(leads: Sequence[str]) -> np.ndarray:
    """[N, L, T] int16 counts."""
    rng = np.random.default_rng(0)
    rows = [LEADS.index(lead) for lead in leads]
    simulated = [simulate_ecg(EcgParameters(severity=n % 5 / 4), rng)[0][rows] for n in range(DIFFERENT)]
    return np.rint(np.stack(simulated) * 1000 / UV_PER_LSB).astype(np.int16)


def make_bodies(leads: Sequence[str], counts_NLT: np.ndarray) -> dict[str, list[bytes]]:
    """Request bodies by form. JSON has millivolts, rounded to the recorder's resolution."""
    bodies: dict[str, list[bytes]] = {"npy": [], "json": [], "mlflow": []}
    for counts_LT in counts_NLT:
        stream = io.BytesIO()
        np.save(stream, counts_LT)
        bodies["npy"].append(stream.getvalue())
        signal_mv = np.round(counts_LT * UV_PER_LSB / 1000, 3).tolist()
        record = {"rate_hz": RATE_HZ, "leads": dict(zip(leads, signal_mv, strict=True))}
        bodies["json"].append(json.dumps({"records": [record]}).encode())
        bodies["mlflow"].append(json.dumps({"inputs": [signal_mv]}).encode())
    return bodies


def write_requests(folder: Path, path: str, kind: str, bodies: Sequence[bytes], token: str = "") -> list[str]:
    """Write complete requests as files into a new folder -> their names."""
    folder.mkdir(parents=True)
    names = []
    for number, body in enumerate(bodies):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        head += f"Authorization: Bearer {token}\r\n" if token else ""
        (folder / str(number)).write_bytes(f"{head}\r\n".encode() + body)
        names.append(str(folder / str(number)))
    return names


NPY, JSON = "application/x-npy", "application/json"


@contextmanager
def endpoint(folder: Path, leads: Sequence[str], bodies: Mapping[str, Sequence[bytes]]) -> Iterator[Server]:
    """Run `serve run serve/config.yaml` with the bundle as its model."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"] |= {"models": [str(folder / "bundle")], "bundles": str(folder / "kept")}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    token = secrets.token_hex(32)
    environment = FASTEST | {"LSEMVAE_TOKENS": token, "RAY_ADDRESS": "local"}
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
    query = urlencode({"leads": ",".join(leads), "rate_hz": RATE_HZ, "uv_per_lsb": UV_PER_LSB})
    requests = {
        "npy": write_requests(folder / "ours" / "npy", f"/v1/score/npy?{query}", NPY, bodies["npy"], token),
        "json": write_requests(folder / "ours" / "json", "/v1/score", JSON, bodies["json"], token),
    }
    with started(command, environment, f"http://127.0.0.1:{port}/readyz", folder / "serve.log") as process:
        yield Server("serve", port, process, requests)


@contextmanager
def plain(folder: Path, leads: Sequence[str], bodies: Mapping[str, Sequence[bytes]]) -> Iterator[Server]:
    """Run the minimal FastAPI server with uvicorn, in one process."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.baselines:app", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "warning"]
    environment = {"BUNDLE": str(folder / "bundle"), "PYTHONPATH": str(WORKFLOWS)}
    query = urlencode({"leads": ",".join(leads), "rate_hz": RATE_HZ, "uv_per_lsb": UV_PER_LSB})
    requests = {
        "npy": write_requests(folder / "fastapi" / "npy", f"/npy?{query}", NPY, bodies["npy"]),
        "json": write_requests(folder / "fastapi" / "json", "/json", JSON, bodies["json"]),
    }
    with started(command, environment, f"http://127.0.0.1:{port}/openapi.json", folder / "fastapi.log") as process:
        yield Server("fastapi", port, process, requests)


@contextmanager
def mlflow_models(folder: Path, leads: Sequence[str], bodies: Mapping[str, Sequence[bytes]]) -> Iterator[Server]:
    """Run `mlflow models serve` with a model that consists of code and a bundle."""
    port, samples = free_port(), RATE_HZ * 10
    mlflow.pyfunc.save_model(
        folder / "mlflow-model",
        python_model=str(Path(__file__).with_name("baselines.py")),
        artifacts={"bundle": str(folder / "bundle")},
        signature=ModelSignature(Schema([TensorSpec(np.dtype(np.float32), (-1, len(leads), samples))])),
        pip_requirements=["lsemvae"],
    )
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", str(folder / "mlflow-model"), "--port", str(port)]
    requests = {"json": write_requests(folder / "mlflow" / "json", "/invocations", JSON, bodies["mlflow"])}
    with started(command, {}, f"http://127.0.0.1:{port}/health", folder / "mlflow.log") as process:
        yield Server("mlflow", port, process, requests)


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> Iterator[subprocess.Popen]:
    """Start a server, wait until it answers, and end it with the context."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `mlflow` finds uvicorn through PATH
    with running([*command], log, ROOT, os.environ | {"PATH": path} | environment) as process:
        try:
            wait_until_healthy(url, process, log)
        except LsemvaeError as error:
            raise LsemvaeError(f"{error}: {log.read_text()[-2000:]}") from None
        yield process
