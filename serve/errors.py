"""What callers are told of requests that cannot be answered: what is wrong and what would be valid, never a trace."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from llm4msr.request import RequestError
from serve.explain_schemas import CompareBody
from serve.schemas import BatchBody, LikedBody, RankBody

logger = logging.getLogger("llm4msr.serve")
MAX_ECHOED_CHARACTERS = 200
BODIES = {"rank:batch": BatchBody, "compare": CompareBody}
MAX_ERRORS = 20


def add_handlers(api: FastAPI) -> None:
    """Makes the application answer every error in one shape."""

    @api.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        explained = [_explain(found, request.url.path) for found in errors[:MAX_ERRORS]]
        if len(errors) > MAX_ERRORS:
            more = {"type": "more", "loc": ["body"], "msg": f"and {len(errors) - MAX_ERRORS} more errors"}
            explained.append(more)
        return _json(422, {"detail": explained})

    @api.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        place = [int(part) if part.isdigit() else part for part in error.field.split(".")]
        return _json(422, {"detail": [{"type": "request_error", "loc": ["body", *place], "msg": str(error)}]})

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _json(500, {"detail": "internal error: the server's log has the cause"})


def _explain(found: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Rewrites one validation error where FastAPI's own words do not tell the caller what to do."""
    kind, place, message, given = found["type"], list(found["loc"]), found["msg"], found.get("input")
    if kind == "extra_forbidden":
        outermost = BODIES.get(path.rsplit("/", 1)[-1], RankBody) if len(place) == 2 else RankBody
        fields = (LikedBody if "history" in place[:-1] else outermost).model_fields
        message = f"no such field; valid: {', '.join(fields)}"
    elif kind == "json_invalid":
        message = f"not JSON: {found['ctx']['error']} at character {place[-1]}"
        place, given = ["body"], None
    elif isinstance(given, bytes):  # FastAPI hands on the raw body when the header does not announce JSON
        message, given = "send JSON, with the header content-type: application/json", None
    elif kind == "model_attributes_type":
        message = f"{_what(place)} must be a JSON object"
    elif kind == "missing" and place == ["body"]:
        message = "the request has no body: send a JSON object"
    explained = {"type": kind, "loc": place, "msg": message}
    # Lists and objects are not sent back: they may be as large as the request.
    if isinstance(given, (bool, int)) or (isinstance(given, float) and math.isfinite(given)):
        explained["input"] = given
    elif isinstance(given, str):
        explained["input"] = given[:MAX_ECHOED_CHARACTERS]
    return explained


def _what(place: list[Any]) -> str:
    if place == ["body"]:
        return "the body"
    return "each like" if "history" in place else "each request"


def _json(status: int, content: Any) -> Response:
    # Escaped to ASCII: text sent by the caller may hold half of a surrogate pair, which UTF-8 cannot express.
    return Response(json.dumps(content), status, media_type="application/json")
