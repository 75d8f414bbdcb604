"""The model that answers, and how another one takes its place while requests go on.

A change is asked for by `Choice`, the application's ``user_config``. What is new is loaded, asked its golden requests
and compared with what is served, all beside the requests; only then it takes over, from one request to the next. A
checkpoint that is missing, damaged, or not of the same kind is refused: what was served before goes on, and
``GET /v1/model`` says what was refused and why. (An error raised to Ray Serve instead would have it replace healthy
replicas by ones that cannot start.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.golden import check_golden
from llm4msr.ranker import Ranker
from llm4msr.request import Key, RankRequest, RankResponse

logger = logging.getLogger("llm4msr.serve")

NUM_WARM_UP_ITEMS, NUM_WARM_UP_REQUESTS, NUM_EXAMPLE_ITEMS = 100, 3, 5
HASHED_PARTS = 1 << 16


class CanaryChoice(BaseModel):
    """A second model beside the one that answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint_uri: str
    """Its checkpoint."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the users for whom it is asked: the same users in every replica, and more of them in a larger share."""
    mode: Literal["shadow", "answer"] = "shadow"
    """shadow: it scores what the served model answers, and the differences are observed. answer: it answers."""


class Choice(BaseModel):
    """What to serve: the ``user_config`` of the deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint_uri: str
    """Checkpoint of the model that answers, local or s3://; every node must be able to read it."""
    previous_uri: str | None = None
    """What was served before: where roll-back goes."""
    canary: CanaryChoice | None = None
    """A second model, for a share of the users."""


@dataclass(frozen=True)
class Refused:
    """A checkpoint that was asked for and is not served."""

    checkpoint_uri: str
    reason: str


@dataclass(frozen=True)
class ShadowResult:
    """What a shadow found: the largest difference of a score, and whether both had the same item first."""

    model_version: str
    max_difference: float
    same_first: bool


@dataclass(frozen=True)
class _State:
    """Replaced as a whole, so that a request sees one state from beginning to end."""

    choice: Choice
    ranker: Ranker
    example: RankRequest
    canary: Ranker | None
    refused: Refused | None


def parse_choice(tree: Any) -> Choice:
    """Checks a ``user_config``.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not valid.
    """
    try:
        return Choice.model_validate(tree)
    except ValidationError as error:
        lines = []
        for found in error.errors():
            name = ".".join(map(str, ("user_config", *found["loc"])))
            canary = "canary" in found["loc"]
            valid = ", ".join((CanaryChoice if canary else Choice).model_fields)
            unknown = found["type"] == "extra_forbidden"
            lines.append(f"{name}: no such key; valid: {valid}" if unknown else f"{name}: {found['msg']}")
        raise ConfigError("\n".join(lines)) from error


def example_request(ranker: Ranker, num_items: int) -> RankRequest:
    """Returns a request for the most active user and the most frequent items of the training data."""
    checkpoint = ranker.checkpoint
    # Not by sorting the tables, which are mapped: that would be a copy of them.
    user = int(np.argmax(checkpoint.users["num_train_rows"].to_numpy()))
    item_N = np.argsort(-checkpoint.items["num_train_rows"].to_numpy(), kind="stable")[:num_items]
    return RankRequest(
        user=checkpoint.users["key"][user].as_py(),
        scenario=checkpoint.schema.scenario_names[-1],
        items=[checkpoint.items["key"][item].as_py() for item in item_N.tolist()],
    )


def load_ranker(checkpoint_uri: str) -> Ranker:
    """Loads a checkpoint, asks its golden requests, and scores a few times, so that no caller pays for torch's start.

    Raises:
        StorageError: The checkpoint is missing, unfinished or damaged, or does not score as it did when it was written.
    """
    ranker = Ranker.from_checkpoint(checkpoint_uri, shared=True)
    check_golden(ranker)
    request = example_request(ranker, NUM_WARM_UP_ITEMS)
    for _ in range(NUM_WARM_UP_REQUESTS):
        ranker.rank(request)
    return ranker


def why_incompatible(served: Ranker, other: Ranker) -> str | None:
    """Returns why callers of one model could not be answered by another one; None if they can."""
    one, two = served.checkpoint.schema, other.checkpoint.schema
    if missing := set(one.scenario_names) - set(two.scenario_names):
        return f"it has no scenario {sorted(missing)[0]!r}; its scenarios: {', '.join(two.scenario_names)}"
    for kind in ("user_key_type", "item_key_type"):
        if getattr(one, kind) != getattr(two, kind):
            return f"its {kind} is {getattr(two, kind)}, what is served has {getattr(one, kind)}"
    for name, feature in served.context.features.items():
        if name not in other.context.features:
            return f"it has no context feature {name!r}, which callers may send"
        if feature.kind != other.context.features[name].kind:
            return f"its context feature {name!r} is {other.context.features[name].kind}, not {feature.kind}"
    return None


class Served:
    """Which model answers whom; empty until the first `change`. Requests and changes may come in any thread."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._state: _State | None = None

    @property
    def ranker(self) -> Ranker:
        """The model that answers now."""
        return self._state.ranker

    @property
    def example(self) -> RankRequest:
        """A request that the model knows the user and the items of."""
        return self._state.example

    @property
    def canary(self) -> Ranker | None:
        """The second model."""
        return self._state.canary

    @property
    def choice(self) -> Choice:
        """What is served now."""
        return self._state.choice

    @property
    def refused(self) -> Refused | None:
        """What the last change asked for and did not get."""
        return self._state.refused

    def change(self, user_config: Any) -> None:
        """Serves something else from the next request on; takes as long as loading does.

        What is refused changes nothing.

        Args:
            user_config: A tree of `Choice`.

        Raises:
            ConfigError: It is not valid, and nothing is served yet.
            StorageError: The checkpoint cannot be served, and nothing is served yet.
        """
        with self._changing:
            now = self._state
            try:
                choice = parse_choice(user_config)
                ranker = self._load(choice.checkpoint_uri, now and now.ranker)
                canary = None if choice.canary is None else self._load(choice.canary.checkpoint_uri, ranker)
            except Exception as error:  # whatever is wrong with it, what is served goes on
                if now is None:
                    raise
                uri = user_config.get("checkpoint_uri") if isinstance(user_config, dict) else None
                logger.error("refused: %s: %s", uri, error)
                self._state = replace(now, refused=Refused(str(uri), f"{type(error).__name__}: {error}"))
                return
            if now is None or ranker is not now.ranker:
                before = "" if now is None else f" instead of {now.ranker.model_version}"
                logger.info("serving %s%s", ranker.model_version, before)
            self._state = _State(choice, ranker, example_request(ranker, NUM_EXAMPLE_ITEMS), canary, None)

    def rank(self, request: RankRequest) -> tuple[RankResponse, ShadowResult | None]:
        """Scores a request with the model whose turn it is, and with its shadow.

        Raises:
            RequestError: The request cannot be scored.
        """
        state = self._state
        canary = state.choice.canary
        if state.canary is None or not is_among(request.user, canary.share):
            return state.ranker.rank(request), None
        if canary.mode == "answer":
            return state.canary.rank(request), None
        whole = replace(request, top_k=None)
        answer = state.ranker.rank(whole)
        result = _compare(answer, state.canary, whole)
        return replace(answer, results=answer.results[: request.top_k]), result

    def _load(self, uri: str, served: Ranker | None) -> Ranker:
        """Returns a ranker that was checked; one that is there already is not loaded again."""
        there = () if self._state is None else (self._state.ranker, self._state.canary)
        for ranker in there:
            if ranker is not None and ranker.checkpoint.uri == storage.absolute(uri):
                return ranker
        ranker = load_ranker(storage.absolute(uri))
        if served is not None and (why := why_incompatible(served, ranker)):
            raise ConfigError(f"{uri}: cannot take the place of {served.model_version}: {why}")
        return ranker


def is_among(user: Key, share: float) -> bool:
    """Tells whether a user belongs to a share of all users; who belongs to a share belongs to every larger one."""
    hashed = hashlib.sha256(json.dumps(user).encode()).digest()
    return int.from_bytes(hashed[:2], "big") < share * HASHED_PARTS


def _compare(answer: RankResponse, shadow: Ranker, request: RankRequest) -> ShadowResult | None:
    """Scores a request once more; what goes wrong there is no matter of the caller's."""
    try:
        other = shadow.rank(request)
    except Exception:
        logger.exception("the shadow %s failed", shadow.model_version)
        return None
    one, two = ({result.item: result.score for result in ranking.results} for ranking in (answer, other))
    difference = max(abs(score - two[item]) for item, score in one.items())
    return ShadowResult(shadow.model_version, difference, answer.results[0].item == other.results[0].item)
