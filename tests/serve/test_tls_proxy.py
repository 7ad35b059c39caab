"""infra/haproxy.cfg, run as it is by the HAProxy that Ray Serve brings: TLS, and the limits before the service."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from support.haproxy import QUICK, Proxy, haproxy
from support.serving import TOKEN, as_json, listening

from lsemvae.record import Record
from serve.api import make_api
from serve.service import Service

BEARER = f"Authorization: Bearer {TOKEN}"


@pytest.fixture(scope="module")
def proxy(service: Service, tmp_path_factory) -> Iterator[Proxy]:
    """The file with shorter times and fewer connections, before the application."""
    api = make_api(service)
    reached: list[tuple[str, str]] = []

    async def node(scope: dict, receive: object, send: object) -> None:
        """A node of Ray Serve: its own health check, and the application."""
        if scope["type"] == "http" and scope["path"] == "/-/healthz":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"success"})
            return
        if scope["type"] == "http":
            reached.append((scope["method"], scope["path"]))
        await api(scope, receive, send)

    changes = QUICK | {"sc0_conn_cur gt 64": "sc0_conn_cur gt 8"}
    with listening(node) as url, haproxy(url, tmp_path_factory.mktemp("proxy"), changes) as proxy:
        proxy.reached = reached
        yield proxy


def test_a_request_with_a_token_is_answered_over_tls(proxy: Proxy, record: Record):
    with proxy.client() as client:
        answer = client.post(
            "/v1/score", json={"records": [as_json(record)]}, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        assert answer.status_code == 200 and answer.json()["results"][0]["score"] is not None
        assert answer.headers["Strict-Transport-Security"]
        for path in ("/", "/healthz", "/readyz", "/openapi.json", "/page/page.css"):
            assert client.get(path).status_code == client.head(path).status_code == 200
        assert client.get("/-/routes").status_code == 404
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://localhost:{proxy.port}/healthz")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["POST /v1/score HTTP/1.1", "Content-Length: 100"], 401),
        (["POST /v1/score HTTP/1.1", "Transfer-Encoding: chunked", "Authorization: Basic x"], 401),
        (["OPTIONS /v1/score HTTP/1.1", "Content-Length: 100"], 401),
        (["POST /healthz HTTP/1.1", "Transfer-Encoding: chunked"], 405),
        (["POST /v1/score HTTP/1.1", f"Content-Length: {2**25 + 1}", BEARER], 413),
        (["POST /v1/score HTTP/1.1", f"Content-Length: {2**45}", BEARER], 413),
    ],
)
def test_what_the_headers_decide_does_not_reach_the_service(proxy: Proxy, lines: list[str], status: int):
    proxy.reached.clear()
    assert proxy.send(*lines, "Host: localhost", "", "").split()[1] == str(status).encode()
    assert proxy.reached == []


def test_a_browser_may_ask_without_a_token_for_a_page_of_another_site(proxy: Proxy):
    proxy.reached.clear()
    with proxy.client() as client:
        client.options("/v1/score", headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"})
    assert proxy.reached == [("OPTIONS", "/v1/score")]  # tests/serve/test_security.py has what the service answers


def test_a_connection_that_never_finishes_its_headers_is_ended(proxy: Proxy):
    proxy.reached.clear()
    assert proxy.send("GET /healthz HTTP/1.1", "Host: loc") == b"HTTP/1.1 408 Request Time-out"
    assert proxy.reached == []


def test_a_body_that_stops_arriving_is_ended(proxy: Proxy):
    lines = (
        "POST /v1/score HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Content-Length: 100",
        BEARER,
    )
    assert proxy.send(*lines, "", "", body="{").split()[1] in (b"400", b"408")
    with proxy.client() as client:
        assert client.get("/healthz").status_code == 200


def test_one_address_has_a_limited_number_of_connections(proxy: Proxy):
    with ExitStack() as stack:
        connections: list[socket.socket] = []
        ended = 0
        for _ in range(20):
            try:  # a connection that is ended at once may fail here or at its first read
                connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 60)))
            except ConnectionError:
                ended += 1
        for connection in connections[8:]:
            with suppress(ConnectionError):
                ended += connection.recv(1) == b""
                continue
            ended += 1
        assert ended == 12
    for _ in range(600):  # the proxy counts a closed connection until it has seen its end
        with suppress(httpx.TransportError), proxy.client() as client:
            assert client.get("/healthz").status_code == 200
            return
        time.sleep(0.1)
    pytest.fail("the proxy refuses an address whose connections have all ended")
