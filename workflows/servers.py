"""Servers that a command starts beside itself, and ends again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from lsemvae.errors import LsemvaeError


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real MLflow server on SQLite in the folder, for as long as the context lasts."""
    port, log = free_port(5000), folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print("Starting MLflow …", flush=True)
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until_healthy(f"{uri}/health", server, log)
        yield uri
    finally:
        end(server)


def free_port(preferred: int = 0) -> int:
    """The preferred port of this machine if it is free, else any that is."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("port 0 can always be bound")


def wait_until_healthy(url: str, server: subprocess.Popen, log: Path) -> None:
    """Returns when the URL answers 200; raises LsemvaeError when the server ends, fails, or takes minutes."""
    for _ in range(240):
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
    raise LsemvaeError(f"{url} did not come up: see {log}")


def end(server: subprocess.Popen) -> None:
    """Interrupts the server's whole group, and kills it if that does not end it soon."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
