"""A real HTTP server of a few files in memory, which misbehaves as told."""

from __future__ import annotations

import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class FileServer:
    """Serves `files` by path; each request takes the first of `faults`, if there is one.

    Attributes:
        url: Where it listens.
        files: Path, with its slash, to content.
        faults: A number: the connection is cut after so many bytes of the body. A tuple (status, headers): the answer.
            A function: called, then the request is answered. None: nothing is wrong.
        ranges: Whether it sends parts of files.
        version: Header that tells versions apart: ETag, Last-Modified, or none.
        requests: (path, Range header) of each request so far.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[int | tuple[int, dict[str, str]] | Callable[[], None] | None] = field(default_factory=list)
    ranges: bool = True
    version: str = "ETag"
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path, wanted = handler.path, handler.headers.get("Range")
        self.requests.append((path, wanted))
        fault = self.faults.pop(0) if self.faults else None
        if callable(fault):
            fault()
        if "gzip" in handler.headers.get("Accept-Encoding", ""):
            fault = (406, {})  # a server may pack what it sends, and then its ranges are those of the packed bytes
        if isinstance(fault, tuple) or path not in self.files:
            status, headers = fault if isinstance(fault, tuple) else (404, {})
            handler.send_response(status)
            for name, value in ({"Content-Length": "0"} | headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            return
        body, digest = self.files[path], hashlib.md5(self.files[path]).hexdigest()
        version = {"ETag": f'"{digest}"', "Last-Modified": f"Mon, {int(digest[:4], 16)}"}.get(self.version)
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        part = self.ranges and wanted and handler.headers.get("If-Range") == version
        if part and first >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            body = b""
        elif part:
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            body = body[first:]
        else:
            handler.send_response(200)
        if version:
            handler.send_header(self.version, version)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if fault is None or callable(fault) else body[:fault])
        handler.close_connection = True


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Runs a server until the block ends, with `tls` one for https."""
    files = FileServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.url = f"http://127.0.0.1:{server.server_port}"
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        files.url = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
