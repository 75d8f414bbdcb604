"""An application on a port of this machine, as callers reach it."""

from __future__ import annotations

import threading
import time

import uvicorn


class Site:
    """The application behind its gate on a port of this machine, which can be made to fail."""

    def __init__(self, app) -> None:
        self.app, self.fault = app, None
        config = uvicorn.Config(self.answer, host="127.0.0.1", port=0, log_level="error", interface="asgi3")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    async def answer(self, scope, receive, send):
        if self.fault is None or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        status, headers, body = self.fault
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
