"""The HTTP API around one loaded ranker: a plain FastAPI application that knows nothing of Ray.

Every refused request is answered in FastAPI's own shape, ``{"detail": [{"type", "loc", "msg", "input"}]}``, whoever
found the fault. The pages at /docs and /redoc are left out because they load scripts from elsewhere; /openapi.json is
served.

Scoring runs on the event loop. Measured on two cores, handing it to threads was never faster: with eight requests of
2000 candidates at a time the model's part took 78 ms in threads and 13 ms on the loop, because threads wait for each
other's hold on the interpreter. A replica uses more CPUs through torch, a machine through more replicas.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from llm4msr import __version__
from llm4msr.ranker import Ranker
from llm4msr.request import LikedItem, RankRequest, RequestError
from serve.schemas import (
    FeatureReply,
    HealthReply,
    LikedBody,
    ModelReply,
    RankBody,
    RankedItemReply,
    RankReply,
    ScenarioReply,
    TimingsReply,
)

logger = logging.getLogger("llm4msr.serve")
NUM_EXAMPLE_ITEMS = 5
MAX_ECHOED_CHARACTERS = 200
MAX_ERRORS = 20
# Metadata of a checkpoint that GET /v1/model shows elsewhere, or that is too long to show.
NOT_TRAINING = frozenset({"model_version", "backbone", "knowledge", "history"})


def example_request(ranker: Ranker, num_items: int = NUM_EXAMPLE_ITEMS) -> RankRequest:
    """Returns a request for the most active user and the most frequent items of the training data."""
    checkpoint = ranker.checkpoint
    most_rows = [("num_train_rows", "descending")]
    users, items = checkpoint.users.sort_by(most_rows)["key"], checkpoint.items.sort_by(most_rows)["key"]
    return RankRequest(
        user=users[0].as_py(),
        scenario=checkpoint.schema.scenario_names[-1],
        items=items[:num_items].to_pylist(),
    )


def build_api(ranker: Ranker, max_candidates: int) -> FastAPI:
    """Builds the application.

    Args:
        ranker: Loaded.
        max_candidates: Most candidates that one request may hold.
    """
    api = FastAPI(
        title="llm4msr ranker",
        summary="Scores and ranks candidate items for one user in one scenario.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    model_reply = _describe(ranker, max_candidates)

    @api.post("/v1/rank")
    async def rank(body: RankBody) -> RankReply:
        """Scores the candidates and returns them, the best first."""
        if len(body.items) > max_candidates:
            raise RequestError(
                "items",
                f"{len(body.items)} candidates: at most {max_candidates} in one request; split them, "
                "scores of different requests can be compared",
            )
        history = None if body.history is None else [LikedItem(liked.item, liked.scenario) for liked in body.history]
        ranking = ranker.rank(
            RankRequest(body.user, body.scenario, body.items, body.top_k, body.context, history, body.knowledge)
        )
        return RankReply(
            model_version=ranking.model_version,
            scenario=body.scenario,
            user=body.user,
            user_known=ranking.user_known,
            knowledge_known=ranking.knowledge_known,
            results=[RankedItemReply(item=r.item, score=r.score, known=r.known) for r in ranking.results],
            timings_ms=TimingsReply(**vars(ranking.timings_ms)),
        )

    @api.get("/v1/model")
    async def model() -> ModelReply:
        """Describes the model that answers."""
        return model_reply

    @api.get("/healthz")
    async def healthz() -> HealthReply:
        """Tells that this replica has its model loaded and answers."""
        return HealthReply(model_version=ranker.model_version)

    @api.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        explained = [_explain(found) for found in errors[:MAX_ERRORS]]
        if len(errors) > MAX_ERRORS:
            more = {"type": "more", "loc": ["body"], "msg": f"and {len(errors) - MAX_ERRORS} more errors"}
            explained.append(more)
        return _json(422, {"detail": explained})

    @api.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _json(422, {"detail": [{"type": "request_error", "loc": ["body", error.field], "msg": str(error)}]})

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _json(500, {"detail": "internal error: the server's log has the cause"})

    return api


def _describe(ranker: Ranker, max_candidates: int) -> ModelReply:
    checkpoint = ranker.checkpoint
    schema, metadata, example = checkpoint.schema, checkpoint.metadata, example_request(ranker)
    return ModelReply(
        model_version=ranker.model_version,
        backbone=metadata["backbone"],
        knowledge=metadata["knowledge"],
        scenarios=[ScenarioReply(name=s.name, description=s.description) for s in schema.scenarios],
        features=[
            FeatureReply(name=f.name, kind=f.kind, source=f.source, max_length=f.max_length) for f in schema.features
        ],
        user_key_type=schema.user_key_type,
        item_key_type=schema.item_key_type,
        num_users=checkpoint.users.num_rows,
        num_items=checkpoint.items.num_rows,
        max_candidates=max_candidates,
        training={name: value for name, value in metadata.items() if name not in NOT_TRAINING},
        example=RankBody(user=example.user, scenario=example.scenario, items=list(example.items)),
    )


def _explain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites one validation error where FastAPI's own words do not tell the caller what to do."""
    kind, place, message, given = found["type"], list(found["loc"]), found["msg"], found.get("input")
    if kind == "extra_forbidden":
        fields = (LikedBody if "history" in place[:-1] else RankBody).model_fields
        message = f"no such field; valid: {', '.join(fields)}"
    elif kind == "json_invalid":
        message = f"not JSON: {found['ctx']['error']} at character {place[-1]}"
        place, given = ["body"], None
    elif isinstance(given, bytes):  # FastAPI hands on the raw body when the header does not announce JSON
        message, given = "send JSON, with the header content-type: application/json", None
    elif kind == "model_attributes_type":
        message = f"{'the body' if place == ['body'] else 'each like'} must be a JSON object"
    elif kind == "missing" and place == ["body"]:
        message = "the request has no body: send a JSON object"
    explained = {"type": kind, "loc": place, "msg": message}
    # Lists and objects are not sent back: they may be as large as the request.
    if isinstance(given, (bool, int)) or (isinstance(given, float) and math.isfinite(given)):
        explained["input"] = given
    elif isinstance(given, str):
        explained["input"] = given[:MAX_ECHOED_CHARACTERS]
    return explained


def _json(status: int, content: Any) -> Response:
    # Escaped to ASCII: text sent by the caller may hold half of a surrogate pair, which UTF-8 cannot express.
    return Response(json.dumps(content), status, media_type="application/json")
