"""A proxy in front of an object store or MLflow. It injects faults.

These are 503, resets, cut or silent connections, short reads, and a slow store: the proxy takes a file at once, and
answers when the store would have written it, as MLflow's server does. "lost" passes the request on, and resets the
connection in place of an answer. Others concern the client: "killed" passes on half of the request's body and then
kills the next of `victims`, "killed after" kills it in place of an answer, and "held" passes the request on when `heal`
is called.
"""

import http.client
import os
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue


@dataclass
class Fault:
    """A fault of the next `times` requests with this method and `part` in the path, after `spared` such requests."""

    kind: str
    times: int = 10**9
    method: str = ""
    part: str = ""
    spared: int = 0


class Between:
    """A proxy in a thread of this process. It passes requests on and remembers them."""

    def __init__(self, endpoint: str) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.at_s: list[float] = []  # when each of them came
        self.refused_keys: set[str] = set()  # requests of S3 that are signed with them get 403
        self.bytes_per_s = 100_000  # of the fault "slow"
        self.silent = threading.Event()
        self.victims: SimpleQueue[int] = SimpleQueue()
        self._release = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, endpoint.removeprefix("http://")))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # of killed clients
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def uri(self, path: str) -> str:
        return f"s3://{path}?endpoint={self.endpoint}"

    def keys(self) -> set[str]:
        """The keys with which requests of S3 were signed."""
        return {_key(headers) for _, _, headers in self.requests} - {""}

    def heal(self) -> None:
        self.faults.clear()
        self.requests.clear()
        released, self._release = self._release, threading.Event()
        released.set()

    def wait(self) -> None:
        self.silent.set()
        self._release.wait()

    def kill(self) -> None:
        os.kill(self.victims.get(), signal.SIGKILL)

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def meet(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        with self._lock:
            self.requests.append((method, path, headers))
            self.at_s.append(time.monotonic())
            if _key(headers) in self.refused_keys:
                return "403"
            for fault in self.faults:
                if fault.method in ("", method) and fault.part in path and fault.times:
                    if fault.spared:
                        fault.spared -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
        return None


def _key(headers: dict[str, str]) -> str:
    return headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]


def _handler(between: Between, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            kind = between.meet(self.command, self.path, dict(self.headers))
            body = self._body()
            if kind == "503":
                refusal = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"
                return self._answer(503, [], refusal)
            if kind == "403":
                return self._answer(403, [], b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>")
            if kind in ("silence", "held"):
                between.wait()
            if kind in ("reset", "silence"):
                return self._reset()
            if kind == "slow":
                time.sleep(len(body) / between.bytes_per_s)
            upstream = http.client.HTTPConnection(server)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", "transfer-encoding", "content-length"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            if kind == "killed":
                upstream.endheaders(body[: len(body) // 2])
                between.kill()
                upstream.close()
                return self._reset()
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content, headers = answer.read(), answer.getheaders()
            upstream.close()
            if kind == "killed after":
                between.kill()
            if kind in ("lost", "killed after"):
                return self._reset()
            if kind == "slow":
                time.sleep(len(content) / between.bytes_per_s)
            half = content[: len(content) // 2]
            if kind == "less":  # with a length that agrees with it
                return self._answer(answer.status, headers, half)
            if kind in ("cut", "reset in mid-body"):
                self._answer(answer.status, headers, half, length=len(content))
                return self._reset() if kind == "reset in mid-body" else self.wfile.flush()
            return self._answer(answer.status, headers, content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(chunks)

        def _answer(self, status: int, headers: list, content: bytes, length: int | None = None) -> None:
            if self.command == "HEAD":
                length = int(dict(headers).get("Content-Length", 0))
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            self.close_connection = length is not None and self.command != "HEAD"

        def _reset(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
