"""Tokens, limits and security headers: one ASGI layer around the application, which acts before anything is parsed.

Ray Serve's port has no authentication and no limits on bodies of its own, so both are here. infra/haproxy.cfg adds
what only a proxy in front can do: TLS, and limits on connections that never finish their headers.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsemvae.errors import LsemvaeError
from lsemvae.memory import is_out_of_memory
from serve.observed import Metrics
from serve.polling import every

log = logging.getLogger("ray.serve")

MIN_TOKEN = 16
TOKENS_POLL_S = 10.0
OPEN_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")
OPEN_FOLDER = "/page/"
"""These need no token, and take GET and HEAD without a body. Every other path needs a token, also one that does not
exist."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Added to every answer that does not set its own."""


class Tokens:
    """The accepted tokens: those given, and those of a file, which `follow` reads again while the service runs.

    The file has one token a line; lines that begin with # are comments. A token that was added to it or removed from it
    counts at the next look. If the file is gone, none of its tokens counts; if it cannot be read, all of them still do.
    Raises LsemvaeError when the file cannot be read at the start, or when a token is short enough to be guessed.
    """

    digests: tuple[bytes, ...] = ()
    """SHA-256 of each accepted token."""
    required = False
    """Whether a token is needed: there is one, or there was one before."""

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._given, self._file = frozenset(given), file
        self._problem = self._look()
        if self._problem:
            raise LsemvaeError(self._problem)

    @classmethod
    def from_environment(cls) -> "Tokens":
        """Those in `LSEMVAE_TOKENS`, separated by blanks or commas, and in the file `LSEMVAE_TOKENS_FILE`."""
        path = os.environ.get("LSEMVAE_TOKENS_FILE")
        return cls(os.environ.get("LSEMVAE_TOKENS", "").replace(",", " ").split(), Path(path) if path else None)

    def follow(self, poll_s: float = TOKENS_POLL_S) -> None:
        """Reads the file again at least every `poll_s` seconds, if there is a file."""
        if self._file:
            every(poll_s, self.refresh, "tokens")

    def refresh(self) -> None:
        """Reads the file again. A token in it that is too short is left out, and the log says so."""
        before, problem = self.digests, self._look()
        if problem and problem != self._problem:
            log.error(problem)
        self._problem = problem
        if self.digests != before:
            log.info(f"{len(self.digests)} tokens are accepted")

    def _look(self) -> str:
        """Takes the tokens as they are now -> what is wrong with them."""
        lines, problems = [], []
        if self._file:
            try:
                lines = [line.strip() for line in self._file.read_text().splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"LSEMVAE_TOKENS_FILE={self._file}: {type(error).__name__}: give a readable file")
                if not isinstance(error, FileNotFoundError):
                    return problems[0]
        found = self._given | {line for line in lines if line and not line.startswith("#")}
        if short := [token for token in found if len(token) < MIN_TOKEN]:
            problems.append(
                f"{len(short)} of {len(found)} tokens have fewer than {MIN_TOKEN} characters: make them with "
                "`openssl rand -hex 32`"
            )
        self.digests = tuple(hashlib.sha256(token.encode()).digest() for token in sorted(found.difference(short)))
        self.required = self.required or bool(self.digests)
        return "; ".join(problems)


class Rejected(Exception):
    """Ends a request with this status and detail."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def charge(scope: Scope, n_bytes: int) -> None:
    """Counts memory that a request needs beyond its body against the replica's limit, until it is answered.

    A body of JSON takes ten times its size once it is parsed. Raises Rejected with status 503 where there is no room
    for it now, and 413 where there never is.
    """
    if hold := scope.get(_HOLD):  # absent without the guard
        hold(n_bytes)


_HOLD = "lsemvae.hold"


class _Held:
    """The memory that one request holds, as a part of what all requests of the replica hold."""

    def __init__(self, guard: "Guard") -> None:
        self._guard, self._mine, self._body = guard, 0, 0

    def body(self, n_bytes: int) -> None:
        """Another part of the body, or its declared length."""
        self._body += n_bytes
        if self._body > self._guard.max_body:
            raise Rejected(
                413, f"the body has more than {self._guard.max_body} bytes: send fewer recordings", Connection="close"
            )
        self.more(n_bytes)

    def more(self, n_bytes: int) -> None:
        if self._mine + n_bytes > self._guard.max_held:
            raise Rejected(
                413,
                f"the request needs {(self._mine + n_bytes) / 2**20:.0f} MB of memory, the service allows "
                f"{self._guard.max_held / 2**20:.0f} MB: send fewer recordings",
                Connection="close",
            )
        if self._guard.held + n_bytes > self._guard.max_held:
            raise Rejected(503, "too many requests at once: try again later", Retry_After="1", Connection="close")
        self._mine += n_bytes
        self._guard.held += n_bytes

    def release(self) -> None:
        self._guard.held -= self._mine
        self._mine = 0


class Guard:
    """The layer. Where no token is required, everybody may ask.

    A request without a valid token is answered from its headers alone: its body is neither read nor held. A body with
    one is read whole before the application sees it, within `body_timeout_s`. `max_body` limits one body in bytes,
    `max_held` the memory of all requests in progress together (see `charge`).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens,
        metrics: Metrics,
        max_body: int,
        max_held: int,
        body_timeout_s: float,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._tokens = tokens
        self._body_timeout_s = body_timeout_s
        self.max_body, self.max_held = max_body, max_held
        self.held = 0
        """Bytes held by all requests in progress."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, answer, held = time.perf_counter(), _Answer(send, scope["method"]), _Held(self)
        scope = {**scope, _HOLD: held.more}
        try:
            headers = Headers(scope=scope)
            if _is_open(scope["path"]):
                _require_no_body(scope["method"], headers)
                scope["method"] = "GET"  # HEAD is GET without the body, which `_Answer` leaves out
            else:
                self._require_token(headers)
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise Rejected(415, "compressed bodies are not read: send the body uncompressed", Connection="close")
            if "content-length" in headers or "transfer-encoding" in headers:
                receive = await self._read(headers, receive, held)
            await self._app(scope, receive, answer.send)
        except Rejected as error:
            await answer.reject(error)
        except Exception as error:
            # Where it happened, not its message, which may quote the recording.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            log.error(f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}")
            if is_out_of_memory(error):
                await answer.reject(
                    Rejected(503, "not enough memory: send fewer recordings, or later", Retry_After="1")
                )
            else:
                await answer.reject(Rejected(500, "internal error"))
        finally:
            held.release()
            self._observe(scope, answer.status, time.perf_counter() - began)

    def _require_token(self, headers: Headers) -> None:
        if not self._tokens.required:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        # Every token is compared, each in constant time: the time it takes does not show how much was right.
        right = [hmac.compare_digest(digest, known) for known in self._tokens.digests]
        if scheme.lower() != "bearer" or not any(right):
            raise Rejected(401, "give a token: Authorization: Bearer …", WWW_Authenticate="Bearer", Connection="close")

    async def _read(self, headers: Headers, receive: Receive, held: _Held) -> Receive:
        """Reads the whole body -> a `receive` that gives it at once."""
        declared = headers.get("content-length")
        if declared is not None:
            if not declared.isdecimal() or len(declared) > 15:
                raise Rejected(400, "Content-Length is no number", Connection="close")
            held.body(int(declared))
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
                        held.body(len(part))
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
        endpoint = getattr(scope.get("route"), "path", "none")  # the pattern: the path may hold an identifier
        self._metrics.answered(endpoint, status)
        if endpoint not in OPEN_PATHS:
            self._metrics.took("total", seconds)
            log.info("answered", extra={"endpoint": endpoint, "status": status, "ms": round(1000 * seconds, 1)})


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _require_no_body(method: str, headers: Headers) -> None:
    """Anybody may send these requests, so that a body would let anybody occupy the service while it comes."""
    if method not in ("GET", "HEAD"):
        raise Rejected(405, "only GET and HEAD are allowed here", Allow="GET, HEAD", Connection="close")
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise Rejected(413, "this request takes no body", Connection="close")


class _Answer:
    """Sends the application's answer with the security headers, or a refusal; remembers the status."""

    def __init__(self, send: Send, method: str) -> None:
        self._send, self._is_head = send, method == "HEAD"
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        elif self._is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def reject(self, error: Rejected) -> None:
        if self.status:  # an answer is on its way already
            return
        body = json.dumps({"detail": error.detail}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})
