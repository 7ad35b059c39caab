"""`soak`: mixed load on the real endpoint for minutes or hours, while everything around it fails at random.

A Ray cluster, Ray Serve with HAProxy and two replicas, an MLflow server with two registered models of three good
versions and a damaged one each, and an object store with a cohort. Clients ask for scores, explanations and cohorts,
send bad input, or send slowly. Meanwhile replicas, proxies and the controller are killed, versions are promoted and
rolled back, MLflow and the store fail (`soak.events`). Every score is compared with that of its version in plain torch.

It ends with status 1 when an answer was wrong, when an error has no explanation, when something did not recover, or
when a process of the service grows faster than `soak.report.LIMITS`.
"""

import argparse
import asyncio
import importlib.util
import logging
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from servers import ROOT, endpoint, free_port, running, wait_until_healthy

from benchmarks.faults import Between
from benchmarks.measure import Row
from benchmarks.model import SIZES
from benchmarks.serve import FASTEST, UV_PER_LSB, recordings
from benchmarks.soak.cases import MODELS, TOLERANCE, Known, know
from benchmarks.soak.clients import BODY_TIMEOUT_S, BUCKET, Clients
from benchmarks.soak.events import Course, Event, Rig, Tracking, until
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.processes import Reading, adopt_orphans, end_all, read_all
from benchmarks.soak.report import Report
from lsemvae.bundle import WEIGHTS, Bundle, save
from lsemvae.errors import LsemvaeError
from lsemvae.formats.plain import as_csv
from lsemvae.leads import LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.progress import Bar
from lsemvae.simulate import RATE_HZ
from lsemvae.storage import Storage
from lsemvae.tracking import CHAMPION, Run

VERSIONS = (1, 2, 3)
RECORDINGS, COPIES = 6, 4
"""Different recordings, and how often each of them is in the cohort."""
REPLICAS = 2
POLL_S = 2.0
RAY_ATTEMPTS = 4
KEEP_S = 60.0
CALM_S = 10.0
"""At the end the load goes on this long without any event: nothing may fail then."""
STORE = {"AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soak-soak", "AWS_DEFAULT_REGION": "us-east-1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--minutes", type=float, default=60, help="how long the load lasts")
    parser.add_argument("--seed", type=int, default=0, help="of the order of events and requests")
    parser.add_argument("--size", default="smoke", choices=SIZES, help="size of the models")
    parser.add_argument("--clients", type=int, default=3, help="clients that ask for scores")
    parser.add_argument("--pause-s", type=float, default=0.5, help="mean pause of a client between two requests")
    parser.add_argument("--event-pause-s", type=float, default=30, help="mean pause between two events")
    parser.add_argument("--plot", type=Path, help="also write a picture of the run to this file (.png or .svg)")
    parser.add_argument("--log", type=Path, help="also keep the logs of all servers in this folder")


def bench_soak(args: argparse.Namespace) -> list[Row]:
    """Run it, print the tables, write the files. Raises SystemExit with status 1 where something was wrong."""
    if importlib.util.find_spec("moto") is None:
        raise LsemvaeError("the soak's object store is moto: pip install -e '.[dev]'")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lsemvae.progress").setLevel(logging.INFO)
    adopt_orphans()
    counts_NLT = recordings(LEADS)[:RECORDINGS]
    ledger, readings = Ledger(), list[Reading]()
    try:
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            if args.log:
                stack.callback(keep_logs, folder, args.log)
            rig = start(folder, counts_NLT, args.size, stack)
            ledger, readings = soak(rig, counts_NLT, args)
    finally:
        end_all()
    report = Report(ledger, readings, settings(args))
    report.show()
    if args.json:
        report.write(args.json)
    if args.plot:
        report.draw(args.plot)
    if report.faults:
        raise SystemExit(1)
    return []


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return vars(args) | {"replicas": REPLICAS, "poll_s": POLL_S}


# --- the service ------------------------------------------------------------------------------------------------------


def start(folder: Path, counts_NLT: np.ndarray, size: str, stack: ExitStack) -> Rig:
    """Start MLflow, the store, Ray and the endpoint; all of them end with the stack."""
    token = secrets.token_hex(32)
    os.environ |= STORE | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    os.environ |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    for name, level in (("mlflow", logging.WARNING), ("urllib3", logging.ERROR)):  # MLflow is away on purpose
        logging.getLogger(name).setLevel(level)
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    tracking = Tracking(folder, free_port())
    stack.callback(tracking.close)
    tracking.start()
    os.environ["MLFLOW_TRACKING_URI"] = tracking.uri
    store = stack.enter_context(store_server(folder))
    os.environ["AWS_ENDPOINT_URL"] = store
    between_mlflow, between_store = Between(tracking.uri), Between(store)
    for between in (between_mlflow, between_store):
        stack.callback(between.close)
    known, damaged = {}, {}
    for name, leads in MODELS.items():
        known[name], damaged[name] = register(folder, name, leads, size, counts_NLT)
    require_different(known)
    fill_store(counts_NLT)
    environment = STORE | FASTEST | {
        "LSEMVAE_TOKENS": token,
        "LSEMVAE_COHORT_PREFIXES": BUCKET,
        "MLFLOW_TRACKING_URI": between_mlflow.endpoint,
        "AWS_ENDPOINT_URL": between_store.endpoint,
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_worker_niceness": "0",
    }  # fmt: skip
    cluster, dashboard, bearer = started_ray(folder, environment, stack)
    config = configuration(folder)
    url, wait = stack.enter_context(endpoint(config, folder / "serve.yaml", **cluster))
    wait()
    stack.callback(end_all)  # Serve and Ray would take a minute to end one after the other
    rig = Rig(
        url, dashboard, bearer, token, REPLICAS, tracking, between_mlflow, between_store, known, damaged,
        champions=dict.fromkeys(MODELS, 1), cohort=RECORDINGS * COPIES,
    )  # fmt: skip
    began = Event("start", "", 0)
    until(rig.whole, began, "started")
    if began.failed:
        raise LsemvaeError(f"the endpoint has {rig.running()} of {REPLICAS} replicas: --log FOLDER keeps its logs")
    return rig


def configuration(folder: Path) -> dict:
    """serve/config.yaml with two small replicas, and little patience."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    application["args"] |= {
        "models": [f"models:/{name}@{CHAMPION}" for name in MODELS],
        "bundles": str(folder / "kept"),
        "poll_s": POLL_S,
        "body_timeout_s": BODY_TIMEOUT_S,
        "threads": 1,
    }
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"], deployment["max_replicas_per_node"]
    deployment["num_replicas"] = REPLICAS
    deployment["ray_actor_options"]["num_cpus"] = 0.25
    return config


@contextmanager
def store_server(folder: Path) -> Iterator[str]:
    """moto, a mock of S3 in a process of its own -> its URL."""
    port, log = free_port(), folder / "store.log"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with running(command, log, folder, os.environ) as process:
        wait_until_healthy(f"http://127.0.0.1:{port}/moto-api/", process, log)
        yield f"http://127.0.0.1:{port}"


def started_ray(
    folder: Path, environment: dict[str, str], stack: ExitStack
) -> tuple[dict[str, str], str, dict[str, str]]:
    """What `ray_cluster` gives. Ray's own limit for its start, 30 s, is too short for a machine that is very busy."""
    for _ in range(RAY_ATTEMPTS - 1):
        try:
            return stack.enter_context(ray_cluster(folder, environment))
        except LsemvaeError as error:
            print(f"Starting Ray again: {str(error)[-200:]}", flush=True)
    return stack.enter_context(ray_cluster(folder, environment))


@contextmanager
def ray_cluster(folder: Path, environment: dict[str, str]) -> Iterator[tuple[dict[str, str], str, dict[str, str]]]:
    """`ray start --head` -> the environment of its clients, its dashboard's URL, and the header that it wants."""
    port, dashboard_port = free_port(), free_port()
    dashboard, token = f"http://127.0.0.1:{dashboard_port}", secrets.token_hex(32)
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a short path, because the names of Ray's sockets hold it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shared = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(place), "PATH": path}
    shared |= {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={port}", f"--dashboard-port={dashboard_port}", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={256 * 2**20}"]
    metric_ports = {name: str(free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    unset = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS",)}
    try:
        with running(command, folder / "ray.log", folder, unset | shared | metric_ports) as process:
            wait_for_ray(process, folder / "ray.log")
            addresses = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_API_SERVER_ADDRESS": dashboard}
            yield (
                shared | addresses | {"RAY_DASHBOARD_ADDRESS": dashboard},
                dashboard,
                {"Authorization": f"Bearer {token}"},
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def wait_for_ray(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the node is whole: its dashboard answers earlier."""
    while process.poll() is None:
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.2)
    raise LsemvaeError(f"Ray did not start: {log.read_text()[-2000:]}")


# --- models and recordings --------------------------------------------------------------------------------------------


def register(
    folder: Path, name: str, leads: tuple[str, ...], size: str, counts_NLT: np.ndarray
) -> tuple[dict[int, Known], int]:
    """Good versions of one model, the first of them the champion, and a damaged one -> what is known of the good ones,
    and the number of the damaged one."""
    known = {}
    for number in VERSIONS:
        place = folder / f"{name}-{number}"
        make(place, leads, size, seed=number)
        known[number] = know(place, counts_NLT)
        registered = publish(name, place, known[number].digest, CHAMPION if number == 1 else None)
        assert registered == number  # MLflow counts from 1
    damaged = folder / f"{name}-damaged"
    make(damaged, leads, size, seed=99)
    digest = know(damaged, counts_NLT[:1]).digest
    weights = bytearray((damaged / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(weights)
    return known, publish(name, damaged, digest, None)


def make(place: Path, leads: tuple[str, ...], size: str, seed: int) -> None:
    """A model that was never trained: each seed gives other scores."""
    torch.manual_seed(seed)
    config = ClassifierConfig(encoder=SIZES[size])
    model = Classifier(config, leads).eval()
    preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
    with torch.no_grad():
        model.head.fc2.weight *= 50  # so that the scores of recordings and versions are far from each other
    save(Bundle.of(model, preprocessing, task="ph", threshold=0.5), model, place)


def publish(name: str, place: Path, digest: str, alias: str | None) -> int:
    run = Run.start("soak", name, {})
    run.bundle(place)
    number = run.register(name, {"digest": digest}, alias)
    run.end()
    return number


def require_different(known: dict[str, dict[int, Known]]) -> None:
    """Raises LsemvaeError where two scores are so close that a mixed-up answer would not show."""
    scores = np.sort(np.concatenate([k.scores_N for versions in known.values() for k in versions.values()]))
    if (closest := np.diff(scores).min()) < 3 * TOLERANCE:
        raise LsemvaeError(f"two of the soak's expected scores differ by {closest:.1e}: take another --size")


def fill_store(counts_NLT: np.ndarray) -> None:
    """The cohort, as CSV files: several copies of each recording."""
    httpx.put(f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET.removeprefix('s3://')}").raise_for_status()
    storage = Storage.open(f"{BUCKET}/cohort")
    for number, counts_LT in enumerate(counts_NLT):
        text = as_csv(counts_LT * (UV_PER_LSB / 1000), RATE_HZ, LEADS, decimals=3)
        for copy in range(COPIES):
            storage.write_bytes(f"r{number}-{copy}.csv", text.encode())


# --- the run ----------------------------------------------------------------------------------------------------------


def soak(rig: Rig, counts_NLT: np.ndarray, args: argparse.Namespace) -> tuple[Ledger, list[Reading]]:
    """Load and events for so many minutes, then a calm -> what came back, and the processes over time."""
    seconds, ledger, readings = 60 * args.minutes, Ledger(), list[Reading]()
    over, sampled = threading.Event(), threading.Event()
    clients = Clients(rig, ledger, counts_NLT, args.pause_s)

    with Bar(round(seconds), "soak", "s") as bar, ThreadPoolExecutor(3, "soak") as others:
        course = Course(rig, ledger, random.Random(args.seed), args.event_pause_s, over, bar.write)
        weather = replace(course, rng=random.Random(args.seed + 1))
        events = [others.submit(course.strike), others.submit(weather.change_weather)]
        sampling = others.submit(sample, ledger, readings, seconds, sampled)

        async def run() -> None:
            asking = asyncio.create_task(clients.run(args.clients, args.seed, 4 * args.event_pause_s))
            try:
                keep = partial(Report(ledger, readings, settings(args)).write, args.json) if args.json else None
                await watch(asking, [*events, sampling], ledger, seconds, bar, keep)
                over.set()
                await asyncio.to_thread(lambda: [event.result() for event in events])
                with ledger.event("calm"):
                    await asyncio.sleep(CALM_S)
                await asyncio.to_thread(require_champions, rig, ledger)
            finally:
                over.set()
                clients.stop.set()
                await asking
                sampled.set()

        asyncio.run(run())
        sampling.result()
    return ledger, readings


async def watch(
    asking: "asyncio.Task[None]",
    others: list["Future[None]"],
    ledger: Ledger,
    seconds: float,
    bar: Bar,
    keep: Callable[[], None] | None,
) -> None:
    """Until the time is over; what raises in a client or in a thread, raises here.

    Wrong answers are told at once, and `keep` writes the figures every minute: a run that is killed leaves both.
    """
    told, kept_s = 0, 0.0
    while ledger.now_s() < seconds:
        await asyncio.sleep(1)
        bar.update(min(round(ledger.now_s()), round(seconds)) - bar.done)
        bar.set_description(f"soak, {len(ledger.asked)} answers")
        for line in ledger.wrong[told:]:
            bar.write(f"wrong: {line}")
        told = len(ledger.wrong)
        if keep and ledger.now_s() - kept_s > KEEP_S:
            await asyncio.to_thread(keep)
            kept_s = ledger.now_s()
        for task in (asking, *others):
            if task.done():
                task.result()
                raise LsemvaeError("a part of the soak ended before its time")


def sample(ledger: Ledger, readings: list[Reading], seconds: float, stop: threading.Event) -> None:
    """Read all processes some hundred times in all, at most every 2 s."""
    while not stop.wait(max(2.0, seconds / 360)):
        readings += read_all(ledger.now_s())


def require_champions(rig: Rig, ledger: Ledger) -> None:
    """In the end every replica answers with the promoted versions, and has no problem."""
    wanted = sorted(f"{name}/{number}" for name, number in rig.champions.items())
    with ledger.event("end", f"{', '.join(wanted)} must answer") as event:
        until(lambda: rig.says(lambda state: sorted(state["models"]) == wanted and not state["problems"]), event, "so")


def keep_logs(folder: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, place / log.name)
