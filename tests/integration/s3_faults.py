"""A proxy before an S3 server: real HTTP, and what goes wrong between a store and its callers.

A `Fault` is given to the requests that it names, so many times or for ever; all other requests pass. It is done to real
bytes on real sockets: connections are reset, bodies are cut, answers come late or not at all.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import pytest
import s3fs
from botocore.retries.standard import ExponentialBackoff

from llm4msr import remote

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}
BLOCK = 1 << 16


@dataclass(frozen=True)
class Request:
    """One request as it arrived. query: its names, such as uploadId, partNumber, list-type, delete."""

    method: str
    path: str
    query: frozenset[str]

    @property
    def verb(self) -> str:
        """What S3 calls it, as far as tests tell requests apart."""
        if self.method == "POST":
            return "DeleteObjects" if "delete" in self.query else "Complete" if "uploadId" in self.query else "Create"
        if self.method == "PUT":
            return "UploadPart" if "partNumber" in self.query else "PutObject"
        if self.method == "GET":
            return "ListObjects" if "list-type" in self.query else "GetObject"
        return {"HEAD": "HeadObject", "DELETE": "Abort" if "uploadId" in self.query else "DeleteObject"}[self.method]


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        kind: "error" answers with `status` and `code`; "reset" reads half of the body and resets the connection; "lost"
            lets the store do it and resets the connection in place of the answer; "cut" sends half of the answer's
            body; "late" waits `seconds` before all; "stale" takes the newest keys out of listings: those in `hidden`.
        verbs: The requests it is for, all where empty; see `Request.verb`.
        times: How often; None for ever.
        path: Pattern of the paths that it is for.
    """

    kind: str
    verbs: tuple[str, ...] = ()
    times: int | None = 1
    path: str = ""
    status: int = 503
    code: str = "SlowDown"
    message: str = "Please reduce your request rate."
    seconds: float = 0.0
    hidden: str = ""

    def takes(self, request: Request) -> bool:
        """Tells whether it is for this request."""
        named = not self.verbs or request.verb in self.verbs
        return self.times != 0 and named and bool(re.search(self.path, request.path))


def slow_down(times: int | None = 2, *verbs: str, path: str = "") -> Fault:
    return Fault("error", verbs, times, path)


def refusal(code: str, status: int, message: str, *verbs: str) -> Fault:
    return Fault("error", verbs, None, "", status, code, message)


EXPIRED = refusal("ExpiredToken", 400, "The provided token has expired.")
UNKNOWN_KEY = refusal("InvalidAccessKeyId", 403, "The AWS Access Key Id you provided does not exist in our records.")
DENIED = refusal("AccessDenied", 403, "Access Denied")


@dataclass
class FaultyStore:
    """The proxy, what it was asked, and what it does to requests: the first fault that takes one is given to it."""

    target: str
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    given: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: Request) -> Fault | None:
        """Notes a request; returns what happens to it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.takes(request):
                    fault.times = None if fault.times is None else fault.times - 1
                    self.given.append(request)
                    return fault
        return None

    def verbs(self) -> list[str]:
        """What was asked so far."""
        return [request.verb for request in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    store: FaultyStore

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def handle_any(self) -> None:
        """Passes the request on, or gives it its fault."""
        url = urlsplit(self.path)
        request = Request(self.command, url.path, frozenset(parse_qs(url.query, keep_blank_values=True)))
        fault = self.store.take(request)
        kind = fault.kind if fault else ""
        if kind == "reset":
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length // 2)
            self.reset()
            return
        body = self.body()
        if kind == "late":
            time.sleep(fault.seconds)
        if kind == "error":
            self.refuse(fault)
            return
        status, headers, answer = self.passed_on(body)
        if kind == "lost":
            self.reset()
            return
        if kind == "stale" and request.verb == "ListObjects":
            answer = without(answer, fault.hidden)
        with contextlib.suppress(OSError):  # a caller that has waited long enough
            self.answer(status, headers, answer, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.store.target).netloc, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.getheaders(), answer

    def refuse(self, fault: Fault) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message><RequestId>1</RequestId></Error>"
        answer = b"" if self.command == "HEAD" else f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        with contextlib.suppress(OSError):
            self.answer(fault.status, [("Content-Type", "application/xml")], answer)

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.reset()

    def reset(self) -> None:
        """Ends the connection with RST, as a machine that dies, or a firewall, does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.rfile.close()
            self.connection.close()


def without(listing: bytes, hidden: str) -> bytes:
    """Takes the keys that match a pattern out of a listing."""
    for tag in ("Contents", "CommonPrefixes"):
        for entry in re.findall(rf"<{tag}>.*?</{tag}>".encode(), listing, re.DOTALL):
            if re.search(hidden.encode(), re.search(rb"<(?:Key|Prefix)>(.*?)</", entry)[1]):
                listing = listing.replace(entry, b"")
    num_left = len(re.findall(b"<Contents>|<CommonPrefixes>", listing))
    return re.sub(rb"<KeyCount>\d+</KeyCount>", b"<KeyCount>%d</KeyCount>" % num_left, listing)


class Server(http.server.ThreadingHTTPServer):
    """Threads that no test waits for."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what this is for."""


@contextlib.contextmanager
def faulty(target: str) -> Iterator[FaultyStore]:
    """Runs the proxy before the server at `target`."""
    store = FaultyStore(target)
    server = Server(("127.0.0.1", 0), type("Handling", (Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def faulty_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Runs the proxy before this process's server, and sends all that this process asks through it.

    The numbers of tries are those of the clients; the waits between them alone are shortened.
    """
    with faulty(os.environ["AWS_ENDPOINT_URL"]) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
        fresh()
        yield store
    monkeypatch.undo()
    fresh()


def fresh() -> None:
    """Makes the next verb of storage read the settings anew."""
    s3fs.S3FileSystem.clear_instance_cache()
    remote._retries.cache_clear()
