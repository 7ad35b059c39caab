"""Who may ask, how much, and how long it may take: one ASGI layer around everything, before anything is parsed.

Ray Serve's port has no authentication and no limits of its own, so all of it is here.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsemvae.errors import LsemvaeError
from serve.observed import Metrics

log = logging.getLogger("ray.serve")

MIN_TOKEN = 16
OPEN_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")
OPEN_FOLDER = "/page/"
"""All else, also what does not exist, wants a token."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Of every answer that does not set its own."""


def tokens_from_environment() -> frozenset[str]:
    """`LSEMVAE_TOKENS` (separated by blanks or commas) and the lines of the file `LSEMVAE_TOKENS_FILE`, # comments.

    Raises LsemvaeError when the file cannot be read, or a token is short enough to be guessed.
    """
    tokens = os.environ.get("LSEMVAE_TOKENS", "").replace(",", " ").split()
    if path := os.environ.get("LSEMVAE_TOKENS_FILE"):
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LsemvaeError(f"LSEMVAE_TOKENS_FILE={path}: {type(error).__name__}: give a readable file") from None
        tokens += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if short := [token for token in tokens if len(token) < MIN_TOKEN]:
        raise LsemvaeError(
            f"{len(short)} of {len(tokens)} tokens have fewer than {MIN_TOKEN} characters: make them with "
            "`openssl rand -hex 32`"
        )
    return frozenset(tokens)


class Rejected(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Guard:
    """The layer. `tokens` empty: everybody may ask.

    A body is read whole before the application sees it: at most `max_body` bytes within `body_timeout_s`, and at most
    `max_held` bytes for all requests in progress together.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Iterable[str],
        metrics: Metrics,
        max_body: int,
        max_held: int,
        body_timeout_s: float,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._max_body, self._max_held, self._body_timeout_s = max_body, max_held, body_timeout_s
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, mine = time.perf_counter(), 0, 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        def hold(n_bytes: int) -> None:
            nonlocal mine
            if mine + n_bytes > self._max_body:
                raise Rejected(
                    413, f"the body has more than {self._max_body} bytes: send fewer recordings", Connection="close"
                )
            if self._held + n_bytes > self._max_held:
                raise Rejected(503, "too many requests at once: try again later", Retry_After="1", Connection="close")
            mine += n_bytes
            self._held += n_bytes

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            if "content-length" in headers or "transfer-encoding" in headers:
                receive = await self._read(headers, receive, hold)
            await self._app(scope, receive, send_safely)
        except Rejected as error:
            await _answer(error, send_safely)
        except Exception as error:
            # Where it happened, never what it says: a message may quote the recording.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            log.error(f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}")
            if not status:
                await _answer(Rejected(500, "internal error"), send_safely)
        finally:
            self._held -= mine
            self._observe(scope, status, time.perf_counter() - began)

    def _check(self, path: str, headers: Headers) -> None:
        if self._digests and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode()).digest()
            # Each is compared, and in constant time: how long it takes says nothing of how much was right.
            right = [hmac.compare_digest(digest, known) for known in self._digests]
            if scheme.lower() != "bearer" or not any(right):
                raise Rejected(
                    401, "give a token: Authorization: Bearer …", WWW_Authenticate="Bearer", Connection="close"
                )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Rejected(415, "compressed bodies are not read: send it as it is", Connection="close")

    async def _read(self, headers: Headers, receive: Receive, hold: Callable[[int], None]) -> Receive:
        declared = headers.get("content-length")
        if declared is not None:
            if not declared.isdecimal() or len(declared) > 15:
                raise Rejected(400, "Content-Length is no number", Connection="close")
            hold(int(declared))
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Rejected(400, "the client went away")
                    part = message.get("body", b"")
                    if declared is None:
                        hold(len(part))
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Rejected(
                408, f"the body did not come within {self._body_timeout_s:g} s", Connection="close"
            ) from None
        body: Message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return body

        return replay

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", "none")  # the pattern, not what was asked for
        self._metrics.answered(endpoint, status)
        if endpoint not in OPEN_PATHS:
            self._metrics.took("total", seconds)
            log.info("answered", extra={"endpoint": endpoint, "status": status, "ms": round(1000 * seconds, 1)})


async def _answer(error: Rejected, send: Send) -> None:
    body = json.dumps({"detail": error.detail}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
