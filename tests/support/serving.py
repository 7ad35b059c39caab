"""Requests to the endpoint's application in this process, their bodies, and a real server for the application."""

import asyncio
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import numpy as np
import uvicorn

from lsemvae.leads import LEADS
from lsemvae.record import Record
from serve.api import make_api
from serve.service import Service

TOKEN = "the-tests-own-token"


DERIVABLE = {"III", "aVR", "aVL", "aVF"}


def ask(api: object, method: str, path: str, *, token: str | None = TOKEN, **rest: object) -> httpx.Response:
    """One request to the application, as its server would hand it on."""

    async def once() -> httpx.Response:
        headers = rest.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, headers=headers, **rest)

    return asyncio.run(once())


def as_json(record: Record, leads: tuple[str, ...] = LEADS, **rest: object) -> dict:
    rows = zip(leads, record.signal_for(leads), strict=True)
    named = {lead: [None if value != value else float(value) for value in row] for lead, row in rows}
    return {"id": record.record_id, "rate_hz": record.rate_hz, "leads": named} | rest


def score(api: object, *given: dict, **rest: object) -> httpx.Response:
    return ask(api, "POST", "/v1/score", json={"records": list(given), **rest})


def only(answer: httpx.Response) -> dict:
    (result,) = answer.json()["results"]
    return result


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def score_npy(api: object, array: np.ndarray | bytes, **query: object) -> httpx.Response:
    body = array if isinstance(array, bytes) else npy(array)
    query = {"leads": "12", "rate_hz": 500} | query
    return ask(api, "POST", "/v1/score/npy", params=query, content=body, headers={"Content-Type": "application/x-npy"})


def score_files(api: object, files: dict[str, bytes], **query: object) -> httpx.Response:
    return ask(api, "POST", "/v1/score/file", params=query, files=[("files", (name, files[name])) for name in files])


class Client:
    """A connection that sends a body part by part, when it is told to."""

    def __init__(self, api: object, headers: dict[str, str] | None = None, path: str = "/v1/score") -> None:
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "http_version": "1.1",
            "scheme": "http", "server": ("service", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        self._parts: asyncio.Queue = asyncio.Queue()
        self.sent: list[dict] = []
        self.task = asyncio.create_task(api(scope, self._parts.get, self._send))

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    async def part(self, body: bytes, more: bool = True) -> None:
        await self._parts.put({"type": "http.request", "body": body, "more_body": more})
        await asyncio.sleep(0.01)

    async def hang_up(self) -> None:
        await self._parts.put({"type": "http.disconnect"})
        await asyncio.sleep(0.01)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def answering(service: Service) -> AbstractContextManager[str]:
    """The service's application on a port of its own -> its URL."""
    return listening(make_api(service))


@contextmanager
def listening(application: Callable) -> Iterator[str]:
    """An application behind uvicorn, which Ray Serve's own proxy uses too -> its URL."""
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0), backlog=256) as sockets:
        thread = threading.Thread(target=server.run, args=([sockets],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{sockets.getsockname()[1]}"
        server.should_exit = True
        thread.join()
