"""An OpenAI-compatible endpoint on this machine: real HTTP, vectors and answers that tests can foretell."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm4msr.config import KnowledgeConfig, OpenAIConfig
from llm4msr.knowledge.engines.endpoint import Endpoint
from llm4msr.knowledge.prompts import Prompt

WIDTH = 8


def vector_of(text: str) -> list[float]:
    return [byte / 256 for byte in hashlib.sha256(text.encode()).digest()[:WIDTH]]


def answer_of(text: str) -> str:
    return f"They like {text[:20]}."


def count_tokens(text: str) -> int:
    return len(text.split())


@dataclass
class Request:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]
    authorization: str
    time_s: float

    @property
    def texts(self) -> list[str]:
        if "input" in self.body:
            return self.body["input"]
        return [message["content"] for message in self.body["messages"]]


@dataclass
class Reply:
    """What is sent in place of the right answer; status 0 drops the connection, pause_s comes before each byte."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0


def error(status: int, message: str = "no", **headers: str) -> Reply:
    return Reply(status, {"error": {"message": message}}, {k.replace("_", "-"): v for k, v in headers.items()})


@dataclass
class EndpointServer:
    """What the server was asked, and how it is to answer.

    Attributes:
        url: Base URL, with /v1.
        reply: Given a request, what to send in place of the right answer; None for the right one.
        delay_s: Given a request, how long to work on it.
        requests: All requests so far.
        peak: Most requests at work at once.
    """

    url: str = ""
    reply: Callable[[Request], Reply | None] = lambda request: None
    delay_s: Callable[[Request], float] = lambda request: 0.0
    requests: list[Request] = field(default_factory=list)
    peak: int = 0
    _active: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._active += 1
            self.peak = max(self.peak, self._active)
            reply = self.reply(request)
        try:
            time.sleep(self.delay_s(request))
            return reply or Reply(body=self._right(request))
        finally:
            with self._lock:
                self._active -= 1

    def _right(self, request: Request) -> dict[str, Any]:
        num_tokens = sum(count_tokens(text) for text in request.texts)
        if request.path == "/v1/embeddings":
            assert request.body["encoding_format"] == "float"
            data = [{"index": i, "embedding": vector_of(text)} for i, text in enumerate(request.texts)]
            return {"data": data[::-1], "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}
        assert request.path == "/v1/chat/completions"
        text = answer_of(request.texts[-1])
        usage = {"prompt_tokens": num_tokens, "completion_tokens": count_tokens(text)}
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}


@contextlib.contextmanager
def serve() -> Iterator[EndpointServer]:
    state = EndpointServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = state.answer(Request(self.path, body, self.headers["Authorization"] or "", time.monotonic()))
            if not reply.status:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that did not wait
                for start in range(len(content)) if reply.pause_s else ():
                    time.sleep(reply.pause_s)
                    self.wfile.write(content[start : start + 1])
                if not reply.pause_s:
                    self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Stays silent: clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def expected(texts: list[str]) -> np.ndarray:
    return np.array([vector_of(text) for text in texts], dtype=np.float32)


def make_config(server, openai=(), **values) -> KnowledgeConfig:
    endpoint = OpenAIConfig(**{"base_url": server.url, "max_in_flight": 8, **dict(openai)})
    return KnowledgeConfig(engine="openai", model="embedder", openai=endpoint, **values)


def make_prompts(number: int) -> list[Prompt]:
    return [
        Prompt("user", str(i), f"User number {i}.", (f"film {i}", "tea"), "What now?", ("Liked",), (0, 0))
        for i in range(number)
    ]


def texts_of(prompts) -> list[str]:
    return [prompt.text() for prompt in prompts]


def single(text: str) -> Prompt:
    return Prompt("user", "1", "", (), text)


def encode(server, prompts, openai=(), **values):
    return Endpoint(make_config(server, openai, **values)).encode(prompts)
