"""How tests run commands and servers: where things are, waiting for a server, ending it with all that it started."""

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


SHARED_DATA = ROOT.parent / "shared" / "data"


# Ray reads these once, when a test first imports it, which may be long before one asks for the cluster.
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def wait_for(url: str, process: subprocess.Popen, log: Path, attempts: int = 600, headers: dict | None = None) -> None:
    for _ in range(attempts):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"{url} did not come up:\n{log.read_text()[-3000:]}")


def end_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
    process.wait()


def end_serve(process: subprocess.Popen) -> None:
    """Ends `serve run` and Serve itself: its proxies would keep their port, and the next one get none."""
    end_group(process)
    subprocess.run(
        [str(Path(sys.executable).with_name("serve")), "shutdown", "-y"], cwd=ROOT, capture_output=True, check=True
    )


@dataclass(frozen=True)
class Cluster:
    """A running head node and what its clients need in their environment (it is set for the session)."""

    dashboard: str
    environment: dict[str, str]


def workflow(name: str, *arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python workflows/NAME.py …` as a user would; with `check` a failure shows what it printed."""
    command = [sys.executable, str(ROOT / "workflows" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"{name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done


@dataclass(frozen=True)
class Trained:
    """A station's result: where its files are, and what the command printed."""

    folder: Path
    printed: str
