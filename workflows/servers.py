"""Start, await and stop servers that a command needs while it runs."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from lsemvae.errors import LsemvaeError

ROOT = Path(__file__).parents[1]

PORTS = range(20_000, 30_000)
"""Below Linux's range for outgoing connections (32,768 and up), above Ray's for its workers (10,002 to 19,999)."""


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """Run an MLflow server on SQLite in the folder while the context lasts -> its URI."""
    with mlflow_starting(folder, port) as (uri, wait):
        wait()
        yield uri


@contextmanager
def mlflow_starting(folder: Path, port: int | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The same -> its URI at once, and a function that returns when it answers: meanwhile other work can go on."""
    port, log = port or free_port(5000), folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print("Starting MLflow …", flush=True)
    uri = f"http://127.0.0.1:{port}"
    with running(command, log, folder, environment) as server:
        yield uri, lambda: wait_until_healthy(f"{uri}/health", server, log)


@contextmanager
def endpoint(config: Mapping[str, Any], path: Path, **environment: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """`serve run` with this configuration, written to the path, while the context lasts.

    -> The endpoint's URL at once, and a function that returns when it answers and raises LsemvaeError when it has
    failed or ended. By default it starts a Ray of its own, unless the user names a cluster.
    """
    path.write_text(yaml.safe_dump(dict(config)))
    log, serve = path.with_suffix(".log"), str(Path(sys.executable).with_name("serve"))
    print(f"$ serve run {path}      (log: {log})", flush=True)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    with running([serve, "run", str(path)], log, ROOT, {"RAY_ADDRESS": "local"} | os.environ | environment) as server:
        yield url, lambda: wait_until_healthy(f"{url}/readyz", server, log)


@contextmanager
def running(
    command: list[str], log: Path, folder: Path, environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server in a session of its own, which a Ctrl-C in the terminal does not reach: it ends with the context."""
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield server
    finally:
        end(server)


def free_port(preferred: int = 0) -> int:
    """The preferred port on 127.0.0.1 if it is free, otherwise any free port.

    It is not one of those that the system gives to outgoing connections: another process could take such a port before
    the server binds it.
    """
    for port in (preferred, *random.sample(PORTS, 100)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port:
                return port
    raise LsemvaeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on 127.0.0.1: end other servers")


def wait_until_healthy(url: str, server: subprocess.Popen, log: Path) -> None:
    """Return when the URL answers 200; raise LsemvaeError if the server ends, fails, or needs more than ten minutes."""
    for _ in range(1200):
        if server.poll() is not None:
            break
        try:
            answer = httpx.get(url, timeout=2)
            if answer.status_code == 200:
                return
            if "failed to deploy" in answer.text:
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise LsemvaeError(f"{url} did not start: see {log}")


def end(server: subprocess.Popen) -> None:
    """Interrupt the server's process group, and kill it if it has not ended after 60 s.

    A `serve run` that is killed leaves Serve behind in a cluster that it has joined.
    """
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=60)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
