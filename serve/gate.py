"""What every request passes before the application sees it, whichever proxy it came through.

* A request id: the caller's ``X-Request-ID``, or a new one; it is in the answer and in the log.
* A token, where tokens are asked for; ``/healthz``, ``/readyz`` and the page itself are open.
* A bound on the body, read whole before anything else is done with it.
* Bounds on requests in flight, by number and by how long a new one would wait for them: beyond these the caller gets
  503 with ``Retry-After`` at once, so that those who were accepted keep their latency, however many candidates they
  have. Ray Serve's own limits (`serve/config.yaml`) answer 503 without that header.
* One JSON line in the log for every request, without anything that a user typed.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from llm4msr.logs import json_line
from serve.page import PAGES
from serve.tokens import Tokens

access_log = logging.getLogger("llm4msr.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = frozenset({*PAGES, "/healthz", "/readyz"})
RETRY_AFTER_S = 1
SMOOTHING = 0.1  # weight of the newest request in the running mean of what one costs
ALWAYS_IN_FLIGHT = 8  # so many are accepted whatever they cost: a moment's stall must not turn callers away
FACTS = "facts"  # key of a request's state, where the application says what it found

Scope, Message = dict[str, Any], dict[str, Any]
Observe = Callable[[dict[str, Any]], None]


def describe_tokens(api: FastAPI) -> None:
    """Says in the application's OpenAPI which paths need a token."""
    description = api.openapi()  # made once, and kept by the application
    description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        if path not in OPEN_PATHS:
            for operation in operations.values():
                operation["security"] = [{"token": []}]


class Gate:
    """ASGI middleware.

    Args:
        app: The application.
        tokens: Who may call; None lets everybody in.
        max_body_bytes: Larger bodies are refused (413).
        max_in_flight: Requests that are answered at a time; more are refused (503).
        observe: Told of every answer: what is logged.
        max_wait_ms: Refused is also who would wait longer than this for those in flight, by what rankings took lately.
    """

    def __init__(
        self,
        app: Any,
        tokens: Tokens | None,
        max_body_bytes: int,
        max_in_flight: int,
        observe: Observe,
        max_wait_ms: float = 500.0,
    ) -> None:
        self.app = app
        self.tokens = tokens
        self.max_body_bytes = max_body_bytes
        self.max_in_flight = max_in_flight
        self.observe = observe
        self.max_wait_ms = max_wait_ms
        self.in_flight = 0
        self.mean_cost_ms = 0.0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})[FACTS] = facts
        status = 500  # what a connection that breaks before an answer is logged as

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._pass(scope, receive, send_named, headers)
        finally:
            record = {
                "time": round(time.time(), 3),
                "request_id": request_id,
                "method": scope["method"],
                # Of paths that there are; others are the caller's own text.
                "path": scope["path"] if status not in (404, 405) else None,
                "status": status,
                "ms": round((time.perf_counter() - started) * 1000, 3),
                **facts,
            }
            self.observe(record)
            access_log.info("%s", json_line(record), extra={"fields": record})

    async def _pass(self, scope: Scope, receive: Any, send: Any, headers: dict[str, str]) -> None:
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self.tokens is not None and not self.tokens.accepts(headers.get("authorization")):
            await _refuse(send, 401, "send a valid token: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
            return
        too_long = self.in_flight >= ALWAYS_IN_FLIGHT and self.in_flight * self.mean_cost_ms > self.max_wait_ms
        if self.in_flight >= self.max_in_flight or too_long:
            retry = {"retry-after": str(RETRY_AFTER_S)}
            await _refuse(send, 503, f"{self.in_flight} requests are being answered here: try again shortly", retry)
            return
        self.in_flight += 1
        try:
            body = await self._read(receive, headers.get("content-length", ""))
            if body is None:
                await _refuse(send, 413, f"the body is larger than {self.max_body_bytes} bytes: split the request")
                return
            await self.app(scope, _once(body, receive), send)
            if rankings := scope["state"][FACTS].get("rankings"):
                cost_ms = sum(ranking["timings_ms"]["total"] for ranking in rankings)
                self.mean_cost_ms += SMOOTHING * (cost_ms - self.mean_cost_ms)
        finally:
            self.in_flight -= 1

    async def _read(self, receive: Any, announced: str) -> bytes | None:
        """Returns the body, or None if it is too large: what is beyond the limit is not read."""
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the caller is gone
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


def _once(body: bytes, receive: Any) -> Any:
    """Returns a `receive` that gives the body that was read already, and then whatever else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Any, status: int, message: str, headers: dict[str, str] | None = None) -> None:
    content = json.dumps({"detail": [{"type": "refused", "loc": [], "msg": message}]}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(name.encode(), value.encode()) for name, value in fields.items()]})
    await send({"type": "http.response.body", "body": content})
