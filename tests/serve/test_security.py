"""Tokens, limits on size and time, and that logs, metrics and errors hold nothing of a recording."""

import asyncio
import gzip
import hashlib
import hmac
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from support.serving import TOKEN, Client, answering, as_json, ask, npy, only, score, score_files

from lsemvae.errors import LsemvaeError
from lsemvae.record import Record
from serve.api import make_api
from serve.app import Config, make_service
from serve.observed import Metrics
from serve.security import OPEN_PATHS, Guard, Tokens
from serve.service import Service

OTHER = "another-token-of-somebody-else"
LIMIT = 800_000
HELD = 1_500_000


class Observed(Metrics):
    """Keeps the tags of all that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[dict[str, str]] = []
        for metric in vars(self).values():
            if hasattr(metric, "inc"):
                metric.inc = lambda value=1.0, tags=None: self.tags.append(tags)
            elif hasattr(metric, "observe"):
                metric.observe = lambda value, tags=None: self.tags.append(tags)


@pytest.fixture(scope="module")
def guarded(service: Service) -> Service:
    tokens = Tokens({TOKEN, OTHER})
    return replace(service, tokens=tokens, metrics=Observed(), max_body=LIMIT, max_held=HELD, body_timeout_s=0.5)


@pytest.fixture(scope="module")
def api(guarded: Service) -> object:
    return make_api(guarded)


@pytest.fixture(autouse=True)
def well_afterwards(api) -> Iterator[None]:
    """After each test the service still answers, and holds no memory of earlier requests."""
    yield
    assert ask(api, "GET", "/healthz", token=None).json() == {"status": "ok"}
    guard = api.middleware_stack
    while not isinstance(guard, Guard):
        guard = guard.app
    assert guard.held == 0


# --- tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
        f"Bearer {TOKEN} {TOKEN}", f"Bearer {TOKEN.upper()}", "Bearer \xff",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/score", "/v1/explain", "/v1/explain/file", "/v1/cohorts/x", "/nowhere", "/v1", "/docs"]
)
def test_a_wrong_or_missing_token_is_401(api, header: str | None, path: str):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = ask(api, "GET", path, token=None, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in answer.text


@pytest.mark.parametrize("token", [TOKEN, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_any_of_the_tokens_is_right(api, token: str, scheme: str):
    headers = {"Authorization": f"{scheme} {token}"}
    assert ask(api, "GET", "/v1/models", token=None, headers=headers).status_code == 200


def test_every_token_is_compared_and_in_constant_time(api, monkeypatch: pytest.MonkeyPatch):
    compared = []
    original = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or original(a, b))
    for token in (TOKEN, OTHER, "x"):
        compared.clear()
        ask(api, "GET", "/v1/models", token=token)
        assert compared == [(32, 32)] * 2  # digests: not even the length of a token shows


@pytest.mark.parametrize("path", [*OPEN_PATHS, "/page/page.css"])
def test_health_page_and_schema_need_no_token(api, path: str):
    assert ask(api, "GET", path, token=None).status_code == 200


@pytest.mark.parametrize(
    "path", ["//v1/models", "/%761/models", "/healthz/../v1/models", "/page/../v1/models", "/v1/models/", "/V1/models"]
)
def test_no_spelling_of_a_path_goes_round_the_token(api, path: str):
    async def once() -> int:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport) as client:
            request = client.build_request("GET", "http://service/")
            request.url = request.url.copy_with(raw_path=path.encode())
            return (await client.send(request)).status_code

    assert asyncio.run(once()) in (401, 404)


def accepted(tokens: Tokens) -> set[str]:
    return {name for name in (TOKEN, OTHER, "short") if hashlib.sha256(name.encode()).digest() in tokens.digests}


def test_tokens_come_from_the_environment_and_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "tokens"
    file.write_text(f"# of the ward\n\n  {OTHER}  \n")
    for name in ("LSEMVAE_TOKENS", "LSEMVAE_TOKENS_FILE"):
        monkeypatch.delenv(name, raising=False)
    none = Tokens.from_environment()
    assert (none.digests, none.required) == ((), False)
    monkeypatch.setenv("LSEMVAE_TOKENS_FILE", str(file))
    assert accepted(Tokens.from_environment()) == {OTHER}
    monkeypatch.setenv("LSEMVAE_TOKENS", f" {TOKEN},{TOKEN} ")
    both = Tokens.from_environment()
    assert accepted(both) == {OTHER, TOKEN} and len(both.digests) == 2 and both.required
    monkeypatch.setenv("LSEMVAE_TOKENS", "short")
    with pytest.raises(LsemvaeError, match="1 of 2 tokens have fewer than 16 characters") as caught:
        Tokens.from_environment()
    assert "short" not in str(caught.value)
    monkeypatch.setenv("LSEMVAE_TOKENS_FILE", str(tmp_path / "absent"))
    with pytest.raises(LsemvaeError, match="FileNotFoundError"):
        Tokens.from_environment()


def test_a_changed_file_of_tokens_counts_and_never_opens_the_service(guarded: Service, tmp_path: Path, caplog):
    file = tmp_path / "tokens"
    file.write_text(f"{OTHER}\n")
    tokens = Tokens({TOKEN}, file)
    api = make_api(replace(guarded, tokens=tokens))

    def statuses() -> list[int]:
        return [ask(api, "GET", "/v1/models", token=token).status_code for token in (TOKEN, OTHER, "x" * 16, None)]

    assert statuses() == [200, 200, 401, 401]
    for content, expected in (
        (f"# {OTHER}\n{'x' * 16}\n".encode(), [200, 401, 200, 401]),  # one revoked, one added
        (f"{OTHER}\nshort\n".encode(), [200, 200, 401, 401]),  # what cannot be a token is left out
        (b"", [200, 401, 401, 401]),
        (b"\xff\xfe", [200, 401, 401, 401]),  # unreadable: as it was
        (OTHER.encode(), [200, 200, 401, 401]),
        (b"\xff\xfe", [200, 200, 401, 401]),
        (None, [200, 401, 401, 401]),
    ):
        file.unlink() if content is None else file.write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        tokens.refresh()
        assert statuses() == expected, content
    file.write_text("")
    alone = Tokens((), file)
    assert not alone.required
    for content in (OTHER, ""):
        file.write_text(content)
        alone.refresh()
        assert alone.required  # a file that is emptied later revokes all: it does not admit everybody
    assert "1 of 3 tokens have fewer than 16" in caplog.text and "UnicodeDecodeError" in caplog.text
    assert not [text for text in (OTHER, TOKEN, "short") if text in caplog.text.replace("fewer", "")]


def test_without_tokens_it_starts_only_when_told_so(monkeypatch, models: Path, tmp_path: Path):
    monkeypatch.delenv("LSEMVAE_TOKENS", raising=False)
    monkeypatch.delenv("LSEMVAE_TOKENS_FILE", raising=False)
    config = Config(models=[str(models / "ph-6L")], bundles=tmp_path / "kept")
    with pytest.raises(LsemvaeError, match="no token is set"):
        make_service(config)
    open_to_all = make_api(make_service(config.model_copy(update={"allow_anonymous": True})))
    assert ask(open_to_all, "GET", "/v1/models", token=None).status_code == 200
    monkeypatch.setenv("LSEMVAE_TOKENS", TOKEN)
    assert ask(make_api(make_service(config)), "GET", "/v1/models", token=None).status_code == 401


def test_an_encoder_that_cannot_be_loaded_does_not_stop_scoring(monkeypatch, models: Path, record, tmp_path):
    monkeypatch.setenv("LSEMVAE_TOKENS", TOKEN)
    config = Config(models=[str(models / "ph-6L")], encoder=str(models / "ph-12L"), bundles=tmp_path / "kept")
    api = make_api(make_service(config))
    assert score(api, as_json(record)).status_code == 200
    answer = ask(api, "POST", "/v1/reconstruct", json={"records": [as_json(record)]})
    assert answer.status_code == 409 and "no decoder" in answer.json()["detail"]


def test_a_misspelt_setting_is_refused():
    with pytest.raises(ValidationError, match="allow_anonymus"):
        Config(models=["x"], allow_anonymus=True)


# --- limits ---------------------------------------------------------------------------------------------------


async def _chunks(*parts: bytes, seen: list[int] | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        if seen is not None:
            seen.append(len(part))
        yield part


JSON = {"Content-Type": "application/json"}


def test_a_body_over_the_limit_is_413_before_it_is_read_whole(api):
    seen: list[int] = []
    answer = ask(api, "POST", "/v1/score", content=_chunks(*[b" " * 100_000] * 50, seen=seen), headers=JSON)
    assert answer.status_code == 413
    assert sum(seen) <= LIMIT + 200_000  # and one part on its way
    seen.clear()
    declared = ask(
        api, "POST", "/v1/score", content=_chunks(b" " * 10, seen=seen), headers=JSON | {"Content-Length": "9" * 12}
    )
    assert declared.status_code == 413
    assert not seen
    assert ask(api, "POST", "/v1/score", content=b" " * LIMIT, headers=JSON).status_code == 422  # read, and no JSON


def test_a_body_without_a_right_token_is_not_read(api):
    seen: list[int] = []
    answer = ask(api, "POST", "/v1/score", token="x", content=_chunks(b"{}", seen=seen), headers=JSON)
    assert answer.status_code == 401 and not seen


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 40, "abc", "٣"])
def test_a_content_length_that_is_no_number_is_400(api, length: str):
    headers = JSON | {"Content-Length": length.encode()}
    assert ask(api, "POST", "/v1/score", content=_chunks(b"{}"), headers=headers).status_code == 400


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip", "GZIP"])
def test_a_compressed_body_is_415(api, encoding: str):
    bomb = gzip.compress(b" " * 10_000_000)
    answer = ask(api, "POST", "/v1/score", content=bomb, headers=JSON | {"Content-Encoding": encoding})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "path",
    [
        "/v1/score", "/v1/score/npy?leads=12&rate_hz=500", "/v1/score/file", "/v1/reconstruct", "/v1/explain",
        "/v1/explain/file",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/jsonx", "application/x-www-form-urlencoded"])
def test_another_content_type_is_415(api, path: str, kind: str | None):
    headers = {} if kind is None else {"Content-Type": kind}
    assert ask(api, "POST", path, content=b"{}", headers=headers).status_code == 415


def test_a_slow_client_is_408_and_one_that_leaves_is_forgotten(api):
    async def main() -> None:
        slow = Client(api, {"transfer-encoding": "chunked"})
        await slow.part(b'{"records":')
        gone = Client(api, {"content-length": "1000"})
        await gone.part(b"{")
        await gone.hang_up()
        await asyncio.gather(slow.task, gone.task)
        assert slow.status == 408
        assert slow.headers[b"connection"] == b"close"

    asyncio.run(main())


def test_more_bodies_than_memory_are_503_with_retry_after(api, record: Record):
    short = replace(record, signal_mv_LT=record.signal_mv_LT[:, :1500])
    body = json.dumps({"records": [as_json(short, ("I", "II"))]}).encode()

    async def main() -> None:
        first = Client(api, {"content-length": str(LIMIT)})  # what is declared counts at once
        await first.part(b" " * (LIMIT - len(body)))
        refused = Client(api, {"content-length": str(HELD - LIMIT + 1)})
        await refused.task
        assert refused.status == 503
        assert refused.headers[b"retry-after"] == b"1"
        chunked = Client(api, {"transfer-encoding": "chunked"})
        await chunked.part(b" " * (HELD - LIMIT))
        assert chunked.status is None
        await chunked.part(b" ")
        await chunked.task
        assert chunked.status == 503
        await first.part(body, more=False)
        await first.task
        assert first.status == 200
        again = Client(api, {"content-length": str(len(body))})
        await again.part(body, more=False)
        await again.task
        assert again.status == 200

    asyncio.run(main())


def test_what_a_body_becomes_counts_against_the_memory(guarded: Service, record: Record):
    """JSON of 200 kB takes 1 MB once parsed: while one is scored, a second one gets 503. 1.5 MB never fit."""
    body = json.dumps({"records": [as_json(record, ("I", "II"))]}).encode()  # 10,000 samples: 800 kB once parsed
    scoring, told = threading.Event(), threading.Event()
    served = guarded.registry.served["ph-12L"]

    def score(records: list[Record]) -> list:
        scoring.set()
        told.wait(20)
        return served.scorer.score(records)

    scorer = SimpleNamespace(score=score, bundle=served.scorer.bundle, why_doubtful=served.scorer.why_doubtful)
    slow = SimpleNamespace(scorer=scorer, described=served.described)
    registry = SimpleNamespace(served={"ph-12L": slow}, ready=True, problems={})
    api = make_api(replace(guarded, registry=registry, max_held=1_200_000))

    async def ask_with(body: bytes) -> Client:
        client = Client(api, {"content-length": str(len(body))})
        await client.part(body, more=False)
        return client

    async def main() -> None:
        first = await ask_with(body)
        while not scoring.is_set():
            await asyncio.sleep(0.001)
        second = await ask_with(body)
        await second.task
        assert (second.status, second.headers[b"retry-after"]) == (503, b"1")
        told.set()
        await first.task
        assert first.status == 200
        never = await ask_with(b"[" + b"0," * 20_000 + b"0]")
        await never.task
        assert never.status == 413 and b"MB of memory, the service allows" in never.sent[1]["body"]
        again = await ask_with(body)
        await again.task
        assert again.status == 200

    asyncio.run(main())


# --- open paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*OPEN_PATHS, "/page/page.css", "/page/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "GET", "HEAD"])
def test_an_open_path_takes_no_body_and_reads_none(api, path: str, method: str):
    seen: list[int] = []
    for headers in ({}, {"Content-Length": "5"}):
        answer = ask(api, method, path, token=None, content=_chunks(b"12345", seen=seen), headers=headers)
        if method in ("GET", "HEAD"):
            assert answer.status_code == 413
        else:
            assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert answer.headers["Connection"] == "close"
    assert not seen


@pytest.mark.parametrize("path", [*OPEN_PATHS, "/page/page.css"])
def test_head_is_get_without_the_body(api, path: str):
    whole, head = (ask(api, method, path, token=None) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == whole.headers
    assert ask(api, "GET", path, token=None, headers={"Content-Length": "0"}).status_code == 200


def test_connections_without_a_token_hold_up_nobody(guarded: Service, record: Record):
    """Real sockets: 80 clients announce a body, send one byte of it and wait. All are answered, and so is a user."""
    with answering(guarded) as url:
        host, port = url.removeprefix("http://").split(":")
        with ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(80)]
            for k, connection in enumerate(idle):
                path, length = (("/healthz", "Transfer-Encoding: chunked"), ("/v1/score", f"Content-Length: {LIMIT}"))[
                    k % 2
                ]
                lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", length, "", "1"]
                connection.sendall("\r\n".join(lines).encode())
            body = {"records": [as_json(record, ("I", "II"))]}
            answer = httpx.post(f"{url}/v1/score", json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
            assert answer.status_code == 200
            statuses = [connection.recv(4096).split()[1] for connection in idle]
            assert statuses == [b"405", b"401"] * 40
            for connection in idle:  # and closed: nothing more is read from it
                while connection.recv(4096):
                    pass


# --- headers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/v1/models", 200), ("/v1/nothing", 404), ("/openapi.json", 200)]
)
def test_every_answer_carries_security_headers(api, path: str, status: int):
    answer = ask(api, "GET", path, headers={"Origin": "https://elsewhere.example"})
    assert answer.status_code == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_refusals_carry_them_too_and_the_page_has_its_own(api):
    assert ask(api, "GET", "/v1/models", token=None).headers["X-Content-Type-Options"] == "nosniff"
    page = ask(api, "GET", "/", token=None)
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers.get_list("Content-Security-Policy") == [page.headers["Content-Security-Policy"]]


def test_other_sites_may_ask_only_when_they_are_configured(guarded: Service):
    api = make_api(replace(guarded, cors_origins=["https://ward.example"]))
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://ward.example", True), ("https://elsewhere.example", False)):
        preflight = ask(api, "OPTIONS", "/v1/score", token=None, headers=asking | {"Origin": origin})
        assert (preflight.headers.get("Access-Control-Allow-Origin") == origin) == allowed
        answer = ask(api, "GET", "/v1/models", headers={"Origin": origin})
        assert (answer.headers.get("Access-Control-Allow-Origin") == origin) == allowed
        assert ask(api, "GET", "/v1/models", token=None, headers={"Origin": origin}).status_code == 401


# --- logs, metrics and errors --------------------------------------------------------------------------------------


def test_no_identifier_signal_or_secret_is_logged_counted_or_quoted(guarded, api, record, caplog):
    name, value, secret = "Patient-4711", 0.123456789, "a-secret-of-somebody"
    answers = []
    with caplog.at_level(logging.DEBUG):
        good = as_json(record, ("I", "II"), id=name)
        good["leads"]["I"][5] = value
        assert only(score(api, good))["id"] == name  # to the one who asked
        explained = ask(api, "POST", "/v1/explain?signal=false", json={"records": [good]})
        assert only(explained)["id"] == name and explained.status_code == 200
        bad = json.dumps({"records": [good | {"rate_hz": f"{value}"} | {name: {"x": value}}]})
        answers.append(ask(api, "POST", "/v1/score", content=bad.encode(), headers=JSON))
        answers.append(ask(api, "POST", "/v1/score", content=bad[:-9].encode(), headers=JSON))
        answers.append(ask(api, "GET", f"/v1/{name}"))
        answers.append(ask(api, "GET", f"/v1/models?who={name}", token=secret))
        only(score_files(api, {f"{name}.hea": b"%d not a header" % 7}))
        score(api, good | {"leads": {"V1": [value]}})
        array = npy(np.full((3, 9), value, dtype=np.float32))
        kind = {"Content-Type": "application/x-npy"}
        answers.append(
            ask(api, "POST", f"/v1/score/npy?leads=I,II&rate_hz=500&model={name}", content=array, headers=kind)
        )
    entries = [entry for entry in caplog.records if entry.name == "ray.serve"]
    assert [entry.getMessage() for entry in entries] == ["answered"] * 9
    kept = "\n".join(str(vars(entry)) for entry in entries)
    for text in (kept, str(guarded.metrics.tags)):
        assert not [mark for mark in (name, "0.1234", secret, TOKEN) if mark in text]
    for answer in answers:
        assert answer.status_code >= 400
        assert "0.1234" not in answer.text and secret not in answer.text
    assert {"endpoint", "status"} in [tags.keys() for tags in guarded.metrics.tags]
    assert {tags["endpoint"] for tags in guarded.metrics.tags if "endpoint" in tags} <= {
        "/v1/score", "/v1/score/npy", "/v1/score/file", "/v1/explain", "/v1/explain/file", "/v1/reconstruct",
        "/v1/models", "/healthz", "/readyz", "none", "/", "/page/page.css",
    }  # fmt: skip


def test_an_internal_error_says_nothing_and_is_logged_without_its_message(guarded, record, caplog):
    served = guarded.registry.served["ph-12L"]

    def fails(records: list[Record]) -> None:
        raise RuntimeError(f"cannot score {records[0].signal_mv_LT[0, 0]} of Patient-4711")

    broken = SimpleNamespace(
        scorer=SimpleNamespace(score=fails, bundle=served.scorer.bundle), described=served.described
    )
    api = make_api(replace(guarded, registry=SimpleNamespace(served={"ph-12L": broken}, ready=True, problems={})))
    with caplog.at_level(logging.INFO, "ray.serve"):
        answer = score(api, as_json(record, ("I", "II")))
    assert (answer.status_code, answer.json()) == (500, {"detail": "internal error"})
    assert "RuntimeError at test_security.py" in caplog.text
    assert "cannot score" not in caplog.text and "Patient" not in caplog.text
