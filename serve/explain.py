"""Endpoints for people: why a score is what it is, what knowledge changes in a ranking, and what to try.

They are beside the path of requests: made in threads, one at a time in a replica, so that rankings keep their latency.
The prompts and words of the language model are read from the extraction where the server knows it; whatever is wrong
there is said in the answer, and the rest is answered.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import APIRouter, Query
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.explaining import explain, scores_without_knowledge
from llm4msr.knowledge import place
from llm4msr.knowledge.extraction import Extraction
from llm4msr.knowledge.prompts import Level
from llm4msr.lookup import KeyIndex
from llm4msr.ranker import Ranker
from llm4msr.request import ContextValue, Key, RankRequest, RequestError
from llm4msr.subjects import (
    NO_KNOWLEDGE,
    Neighbours,
    Words,
    describe_item,
    describe_user,
    example_items,
    example_users,
    read_words,
)
from serve.explain_schemas import (
    CompareBody,
    ComparedReply,
    CompareReply,
    ExplainReply,
    ItemReply,
    ItemsReply,
    UserExampleReply,
    UserReply,
    UsersReply,
)
from serve.schemas import ContextValue as ContextValueOfBody
from serve.served import Served, is_among

logger = logging.getLogger("llm4msr.serve")

MAX_EXAMPLES = 100
KEPT_WORDS = 256
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")

Limit = Annotated[int, Query(ge=1, le=MAX_EXAMPLES)]
ContextText = Annotated[
    str | None,
    Query(
        description="Values of context features by name, a JSON object as in POST /v1/rank; left out, all are absent.",
        examples=['{"device": "phone"}'],
    ),
]
CONTEXT = TypeAdapter(dict[str, ContextValueOfBody], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class KnowledgeSource:
    """Where the extraction behind the served model lies, for its prompts.

    Attributes:
        knowledge_uri: Its directory, below ``knowledge`` of a workspace.
        workspace_uri: Instead: the workspace where the model's own configuration finds it.
    """

    knowledge_uri: str | None = None
    workspace_uri: str | None = None

    def open(self, ranker: Ranker) -> Extraction:
        """Opens the extraction of a model.

        Raises:
            StorageError: It is not there, or of other data.
            ConfigError: The place is not one of an extraction, or nobody said where it is.
        """
        checkpoint = ranker.checkpoint
        if self.knowledge_uri is not None:
            uri = storage.absolute(self.knowledge_uri).rstrip("/")
        elif self.workspace_uri is not None:
            uri = place.knowledge_uri(checkpoint.config.model_copy(update={"workspace_uri": self.workspace_uri}))
        else:
            raise ConfigError("the server was not told where the extraction lies: start it with knowledge_uri")
        workspace_uri, _, name = uri.rpartition("/knowledge/")
        if not workspace_uri or "/" in name:
            raise ConfigError(f"knowledge_uri: {uri} is not WORKSPACE/knowledge/NAME, as jobs.extract writes it")
        extraction = Extraction.open(workspace_uri, name)
        data, own = extraction.manifest["prepared"], checkpoint.metadata["prepared"]
        if data != own:
            raise storage.StorageError(f"{uri} was extracted from the data {data}, the model was trained on {own}")
        return extraction


class Background:
    """What is kept beside one model, as it is asked for again and again; it does not keep the model itself."""

    def __init__(self, ranker: Ranker) -> None:
        self.neighbours = Neighbours(ranker.checkpoint.knowledge, ranker.checkpoint.users)
        self.extraction: Extraction | None = None
        self.words = lru_cache(maxsize=KEPT_WORDS)(self._words)

    def _words(self, level: Level, subject_id: str, row: int) -> Words:
        return read_words(self.extraction, level, subject_id, row)


class Explainer:
    """Answers the endpoints with whatever is served now.

    Args:
        served: What is served.
        source: Where the prompts are.
    """

    def __init__(self, served: Served, source: KnowledgeSource) -> None:
        self.served = served
        self.source = source
        self.one_at_a_time = threading.Lock()
        self._backgrounds: WeakKeyDictionary[Ranker, Background] = WeakKeyDictionary()

    def ranker_of(self, user: Key) -> Ranker:
        """Returns the model that answers a user's requests."""
        choice, canary = self.served.choice.canary, self.served.canary
        if choice is not None and canary is not None and choice.mode == "answer" and is_among(user, choice.share):
            return canary
        return self.served.ranker

    def background(self, ranker: Ranker) -> Background:
        """Returns what is kept beside a model."""
        if ranker not in self._backgrounds:
            self._backgrounds[ranker] = Background(ranker)
        return self._backgrounds[ranker]

    def words(self, ranker: Ranker, level: Level, subject_id: str, row: int) -> dict[str, Any]:
        """Returns the fields of `serve.explain_schemas.WordsReply`; what cannot be read is a reason, not an error."""
        if ranker.checkpoint.knowledge is None:
            return asdict(Words(None, None, None, NO_KNOWLEDGE))
        if (control := ranker.checkpoint.metadata["knowledge"]) != "llm":
            return asdict(
                Words(None, None, None, f"this model is a control: its knowledge is {control}, not of prompts")
            )
        background = self.background(ranker)
        try:
            if background.extraction is None:
                background.extraction = self.source.open(ranker)
            return asdict(background.words(level, subject_id, row))
        except (ConfigError, storage.StorageError) as error:
            return asdict(Words(None, None, None, str(error)))
        except (OSError, ValueError):
            logger.exception("the extraction of %s cannot be read", ranker.model_version)
            return asdict(Words(None, None, None, "the extraction cannot be read: the server's log has the cause"))

    def user(self, ranker: Ranker, user: Key) -> UserReply:
        """Describes a user."""
        facts = describe_user(ranker, self.background(ranker).neighbours, user)
        row = int(ranker.user_rows([user], "user")[0])
        return UserReply(**asdict(facts), words=self.words(ranker, "user", str(user), row))

    def explain(self, user: str, scenario: str, item: str, context: Mapping[str, ContextValue] | None) -> ExplainReply:
        """Explains one score."""
        served = self.served.ranker
        ranker = self.ranker_of(to_key(user, served.user_rows, "user"))
        user_key, item_key = to_key(user, ranker.user_rows, "user"), to_key(item, ranker.item_rows, "item")
        found = explain(ranker, self.background(ranker).neighbours, user_key, scenario, item_key, context)
        fields = asdict(found) | {"user": self.user(ranker, user_key)}
        item_row = int(ranker.item_rows([item_key], "item")[0])
        index = ranker.checkpoint.schema.scenario_names.index(scenario)
        return ExplainReply(
            model_version=ranker.model_version,
            knowledge=ranker.checkpoint.metadata["knowledge"],
            item_words=self.words(ranker, "item", str(item_key), item_row),
            scenario_words=self.words(ranker, "scenario", scenario, index),
            **fields,
        )

    def compare(self, body: CompareBody, items: Sequence[Key]) -> CompareReply:
        """Ranks with and without knowledge."""
        ranker, distinct = self.ranker_of(body.user), list(dict.fromkeys(items))
        rankings = {}
        for scenario in body.scenarios:
            answer = ranker.rank(RankRequest(body.user, scenario, distinct, context=body.context))
            by_item = {result.item: result.score for result in answer.results}
            score_N = np.array([by_item[item] for item in distinct])
            without_N = scores_without_knowledge(ranker, body.user, scenario, distinct, body.context)
            numbers = zip(distinct, score_N.tolist(), ranks(score_N), without_N.tolist(), ranks(without_N), strict=True)
            rankings[scenario] = [
                ComparedReply(item=str(item), score=score, rank=rank, score_without=other, rank_without=other_rank)
                for item, score, rank, other, other_rank in numbers
            ]
        return CompareReply(model_version=ranker.model_version, rankings=rankings)


def build_router(
    explainer: Explainer, candidates: Callable[[CompareBody], list[Key]], refusals: dict[int | str, dict[str, Any]]
) -> APIRouter:
    """Returns the endpoints.

    Args:
        explainer: What answers.
        candidates: The items that a body names, within the server's limits.
        refusals: What else an endpoint may answer, for the description of the API.
    """
    router = APIRouter(responses=refusals)

    @router.get("/v1/explain")
    def explain_score(user: str, scenario: str, item: str, context: ContextText = None) -> ExplainReply:
        """Explains one score: raw ids as text, whatever their type."""
        with explainer.one_at_a_time, _of_query():
            return explainer.explain(user, scenario, item, to_context(context))

    @router.post("/v1/compare")
    def compare(body: CompareBody) -> CompareReply:
        """Scores the candidates with and without knowledge, in several scenarios."""
        with explainer.one_at_a_time:
            return explainer.compare(body, candidates(body))

    @router.get("/v1/user")
    def describe(user: str) -> UserReply:
        """Tells what is known of a user: the raw id as text."""
        with explainer.one_at_a_time, _of_query():
            ranker = explainer.ranker_of(to_key(user, explainer.served.ranker.user_rows, "user"))
            return explainer.user(ranker, to_key(user, ranker.user_rows, "user"))

    @router.get("/v1/users")
    def users(scenario: str | None = None, limit: Limit = 12) -> UsersReply:
        """Names users to try: the most active, some middling, some without knowledge."""
        with explainer.one_at_a_time, _of_query():
            examples, counted = example_users(explainer.served.ranker, scenario, limit)
        return UsersReply(users=[UserExampleReply(**asdict(one)) for one in examples], counted=counted)

    @router.get("/v1/items")
    def items(
        item: Annotated[list[str] | None, Query(max_length=MAX_EXAMPLES)] = None, limit: Limit = 20
    ) -> ItemsReply:
        """Describes the items named, raw ids as text; or names some to try."""
        ranker = explainer.served.ranker
        with explainer.one_at_a_time, _of_query():
            if item is None:
                found = example_items(ranker, limit)
            else:
                found = [describe_item(ranker, to_key(one, ranker.item_rows, "item")) for one in item]
        return ItemsReply(items=[ItemReply(**asdict(one)) for one in found])

    return router


def to_key(text: str, index: KeyIndex, field: str) -> Key:
    """Returns a raw id of the data's type.

    Args:
        text: As it was typed.
        index: The data's ids.
        field: Where it was typed.

    Raises:
        RequestError: It cannot be an id of this data.
    """
    key = int(text) if index.key_type == "int64" and WHOLE_NUMBER.fullmatch(text) else text
    index([key], field)
    return key


def to_context(text: str | None) -> dict[str, ContextValue] | None:
    """Returns the values of context features that a query's JSON has.

    Raises:
        RequestError: It is not a JSON object of such values.
    """
    try:
        return None if text is None else CONTEXT.validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        name = f"{found['loc'][0]}: " if found["loc"] else ""
        raise RequestError("context", f"give a JSON object of values by name: {name}{found['msg']}") from error


def ranks(score_N: np.ndarray) -> list[int]:
    """Returns the place of each score, the highest first, from 1; equal ones in their order."""
    place_N = np.empty(len(score_N), np.int64)
    place_N[np.argsort(-score_N, kind="stable")] = np.arange(1, len(score_N) + 1)
    return place_N.tolist()


@contextmanager
def _of_query() -> Iterator[None]:
    """Says of what cannot be answered that it was in the query."""
    try:
        yield
    except RequestError as error:
        fault = {"type": "request_error", "loc": ("query", error.field), "msg": str(error)}
        raise RequestValidationError([fault]) from error
