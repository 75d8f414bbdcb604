"""The HTTP API around what is served: a plain FastAPI application that knows nothing of Ray.

Every refused request is answered in FastAPI's own shape, ``{"detail": [{"type", "loc", "msg", "input"}]}``, whoever
found the fault. The pages at /docs and /redoc are left out because they load scripts from elsewhere; /openapi.json is
served.

Scoring runs on the event loop. Measured on two cores, handing it to threads was never faster: with eight requests of
2000 candidates at a time the model's part took 78 ms in threads and 13 ms on the loop, because threads wait for each
other's hold on the interpreter. A replica uses more CPUs through torch, a machine through more replicas. Between the
requests of a batch others have their turn.

Rankings wait for each other, so that between two of them the loop looks at the network: all that arrived while one was
made would else be ranked in a row, and a probe, or a request that is one too many, would wait for the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request

from llm4msr import __version__
from llm4msr.request import Key, LikedItem, RankRequest, RankResponse, RequestError
from serve.describe import describe
from serve.errors import add_handlers
from serve.explain import Explainer, KnowledgeSource, build_router
from serve.explain_schemas import CompareBody
from serve.gate import FACTS
from serve.page import add_page
from serve.schemas import (
    BatchBody,
    BatchReply,
    ErrorReply,
    FailureReply,
    HealthReply,
    ModelReply,
    RankBody,
    RankedItemReply,
    RankReply,
    TimingsReply,
)
from serve.served import Served, ShadowResult

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The body cannot be read"},
    401: {"model": ErrorReply, "description": "No valid token"},
    413: {"model": ErrorReply, "description": "The body is too large"},
    422: {"model": ErrorReply, "description": "The request cannot be scored: what is wrong, and what would be valid"},
    500: {"model": FailureReply, "description": "The server failed"},
    503: {"model": ErrorReply, "description": "Too many requests at once: try again after Retry-After seconds"},
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask.

    Attributes:
        max_candidates: Most candidates of one ranking.
        max_batch: Most rankings of one batch.
        candidate_sets: Items by the name that a request may give instead.
    """

    max_candidates: int = 2000
    max_batch: int = 100
    candidate_sets: Mapping[str, list[Key]] = field(default_factory=dict)


def build_api(served: Served, limits: Limits, source: KnowledgeSource | None = None) -> FastAPI:
    """Builds the application.

    Args:
        served: What answers.
        limits: What a request may ask.
        source: Where the prompts behind the model's knowledge are.
    """
    api = FastAPI(
        title="llm4msr ranker",
        summary="Scores and ranks candidate items for one user in one scenario.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )

    turn = asyncio.Lock()

    @api.post("/v1/rank", responses=REFUSALS)
    async def rank(body: RankBody, request: Request) -> RankReply:
        """Scores the candidates and returns them, the best first."""
        async with turn:
            await asyncio.sleep(0)  # without it nobody would be found waiting: whoever comes would be done at once
            return _rank(served, limits, body, request)

    @api.post("/v1/rank:batch", responses=REFUSALS)
    async def rank_batch(body: BatchBody, request: Request) -> BatchReply:
        """Scores for several users. If one ranking cannot be made, none is."""
        if len(body.requests) > limits.max_batch:
            raise RequestError("requests", f"{len(body.requests)} rankings: at most {limits.max_batch} in one request")
        rankings = []
        for place, one in enumerate(body.requests):
            try:
                async with turn:
                    await asyncio.sleep(0)
                    rankings.append(_rank(served, limits, one, request))
            except RequestError as error:
                raise RequestError(f"requests.{place}.{error.field}", str(error)) from error
        return BatchReply(rankings=rankings)

    @api.get("/v1/model", responses={401: REFUSALS[401], 503: REFUSALS[503]})
    async def model() -> ModelReply:
        """Describes the model that answers."""
        return describe(served, limits)

    @api.get("/healthz")
    async def healthz() -> HealthReply:
        """Tells that this replica lives."""
        return HealthReply(model_version=served.ranker.model_version)

    @api.get("/readyz")
    async def readyz() -> HealthReply:
        """Tells that this replica has its model loaded, checked and warm: before that it does not answer at all."""
        return HealthReply(model_version=served.ranker.model_version)

    explainer = Explainer(served, source or KnowledgeSource())
    refusals = {status: REFUSALS[status] for status in (401, 422, 500, 503)}
    api.include_router(build_router(explainer, lambda body: _candidates(limits, body), refusals))
    add_page(api)
    add_handlers(api)
    return api


def _rank(served: Served, limits: Limits, body: RankBody, request: Request) -> RankReply:
    items = _candidates(limits, body)
    history = None if body.history is None else [LikedItem(liked.item, liked.scenario) for liked in body.history]
    asked = RankRequest(body.user, body.scenario, items, body.top_k, body.context, history, body.knowledge)
    ranking, shadow = served.rank(asked)
    request.scope.get("state", {}).get(FACTS, {}).setdefault("rankings", []).append(_facts(asked, ranking, shadow))
    return RankReply(
        model_version=ranking.model_version,
        scenario=body.scenario,
        user=body.user,
        user_known=ranking.user_known,
        knowledge_known=ranking.knowledge_known,
        results=[RankedItemReply(item=r.item, score=r.score, known=r.known) for r in ranking.results],
        timings_ms=TimingsReply(**vars(ranking.timings_ms)),
    )


def _candidates(limits: Limits, body: RankBody | CompareBody) -> list[Key]:
    if (body.items is None) == (body.candidate_set is None):
        raise RequestError("items", "give either items or candidate_set")
    if body.candidate_set is not None:
        if body.candidate_set not in limits.candidate_sets:
            valid = ", ".join(limits.candidate_sets) or "this server has none"
            raise RequestError("candidate_set", f"no candidate set {body.candidate_set!r}; valid: {valid}")
        return limits.candidate_sets[body.candidate_set]
    if len(body.items) > limits.max_candidates:
        raise RequestError(
            "items",
            f"{len(body.items)} candidates: at most {limits.max_candidates} in one request; split them, "
            "scores of different requests can be compared",
        )
    return body.items


def _facts(asked: RankRequest, ranking: RankResponse, shadow: ShadowResult | None) -> dict[str, Any]:
    """Returns what is logged of a ranking: numbers, and names of the model's own."""
    facts = {
        "model_version": ranking.model_version,
        "scenario": asked.scenario,
        "num_candidates": len(asked.items),
        "num_unknown_items": ranking.num_unknown_items,
        "user_known": ranking.user_known,
        "knowledge_known": ranking.knowledge_known,
        "timings_ms": {name: round(value, 3) for name, value in vars(ranking.timings_ms).items()},
    }
    return facts if shadow is None else facts | {"shadow": vars(shadow)}
