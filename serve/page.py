"""The page for people at ``/``: its files, served as they are, without a build step or anything from elsewhere.

The policy of its content lets it run its own script alone and talk to this server alone. It needs no token to be
loaded; it asks for one when the API does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response

# By path: the file below static/ and its type. `serve.gate` lets these paths through without a token.
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/{name}": (name, "text/javascript; charset=utf-8")
        for name in ("page.js", "server.js", "elements.js", "state.js", "ranking.js", "explained.js")
    },
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a few small files: a new server never meets an old script
}


def add_page(api: FastAPI) -> None:
    """Adds the page's files to an application; they are read once."""
    for path, (name, media_type) in PAGES.items():
        content = files("serve").joinpath("static", name).read_bytes()
        api.add_api_route(path, _answer(content, media_type), methods=["GET", "HEAD"], include_in_schema=False)


def _answer(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return page
