"""What the endpoints for people take and return: explanations, comparisons, and examples to try.

Raw ids are text here, whatever their type: whoever shows them need not compute with them, and a browser's numbers hold
53 bits of an id's 64.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve.schemas import Closed, ContextValue, Key

MAX_SCENARIOS = 10


class MeasuredReply(Closed):
    """A number, or why there is none."""

    value: float | None
    """The number."""
    reason: str | None
    """Why there is none."""


class WithoutReply(Closed):
    """The score without a part of the model, or why there is none."""

    part: Literal["user_level", "scenario_level", "match", "item_knowledge", "all"]
    """user_level: the user's meta layers are those of a user without knowledge. scenario_level: the logit of the
    scenario's meta layers is not added. match: the comparison of user and item is left at its mean. item_knowledge: the
    item is taken for one without knowledge. all: these four together. Each leaves the others as they are."""
    logit: float | None
    """Before the sigmoid."""
    score: float | None
    """The score."""
    reason: str | None
    """Why both are null: the model has no such part."""


class LikedReply(Closed):
    """An item that the user liked."""

    item: str
    """Raw id."""
    text: str
    """What the data say of it; may be empty."""


class LikedLogReply(Closed):
    """What the user liked in a scenario, or in all."""

    log: str
    """The scenario, or "all"."""
    num_likes: int
    """How many likes there are."""
    latest: list[LikedReply]
    """The latest, newest first; at most 20."""


class NearUserReply(Closed):
    """A vector near the user's. Users whose prompts were the same share one."""

    users: list[str]
    """Whose it is: raw ids, at most 5."""
    num_users: int
    """Whose it is: how many."""
    similarity: float
    """Cosine of the vectors, each less the mean of all."""


class NearestReply(Closed):
    """The nearest other users in knowledge space."""

    users: list[NearUserReply]
    """Nearest first, at most 10."""
    num_vectors: int
    """Vectors of users that the model has."""
    num_compared: int
    """How many were looked at: all, or where there are more than 200,000, evenly spaced ones."""
    reason: str | None
    """Why there are none."""


class WordsReply(Closed):
    """What the language model read and wrote, before the model was trained."""

    prompt: str | None
    """What it read."""
    text: str | None
    """What it wrote."""
    model: str | None
    """Its name."""
    reason: str | None
    """Why either is absent."""


class UserReply(Closed):
    """What is known of a user."""

    user: str
    """Raw id, as asked."""
    known: bool
    """Whether the user is in the model's table."""
    knowledge_known: bool
    """Whether the model has knowledge of the user."""
    text: str
    """What the data say; may be empty."""
    num_train_rows: int
    """Training rows."""
    liked: list[LikedLogReply]
    """What the user liked, by the logs that the model reads."""
    liked_reason: str | None
    """Why that is empty."""
    nearest: NearestReply
    """Who is near."""
    words: WordsReply
    """The language model's prompt and words."""


class ItemReply(Closed):
    """What is known of an item."""

    item: str
    """Raw id."""
    known: bool
    """Whether the item is in the model's table."""
    knowledge_known: bool
    """Whether the model has knowledge of the item."""
    text: str
    """What the data say; may be empty."""
    num_train_rows: int
    """Training rows."""


class NearScenarioReply(Closed):
    """Another scenario in knowledge space."""

    name: str
    """Its name."""
    raw_similarity: float
    """Cosine of its vector with that of the scenario asked."""
    similarity: float
    """The same after the scenarios' mean is taken away; of two scenarios it is always -1."""


class ExplainReply(Closed):
    """Why one score is what it is."""

    model_version: str
    """The run that made the model."""
    knowledge: str
    """As of GET /v1/model: what the model was trained with."""
    scenario: str
    """As asked."""
    score: float
    """That of POST /v1/rank for this user, scenario, item and context."""
    logit: float
    """The score before the sigmoid."""
    without: list[WithoutReply]
    """The score without parts of the model. Parts work on one another: the differences do not add up."""
    user_level: MeasuredReply
    """How far the user's meta layers move the backbone's input x to h: the length of h - x over that of x."""
    scenario_level: MeasuredReply
    """The logit that the scenario's meta layers add."""
    match: MeasuredReply
    """Cosine of the user's and the item's knowledge, as the model reads them."""
    scenarios: list[NearScenarioReply]
    """The other scenarios."""
    scenarios_reason: str | None
    """Why these are absent."""
    user: UserReply
    """The user."""
    item: ItemReply
    """The item."""
    item_words: WordsReply
    """The language model's prompt and words of the item."""
    scenario_words: WordsReply
    """The language model's prompt and words of the scenario."""


class UserExampleReply(Closed):
    """A user to try."""

    user: str
    """Raw id."""
    text: str
    """What the data say; may be empty."""
    kind: Literal["active", "middling", "without knowledge"]
    """Why this one."""
    num: int
    """How active: see `counted`."""
    knowledge_known: bool
    """Whether the model has knowledge of the user."""


class UsersReply(Closed):
    """Users to try."""

    users: list[UserExampleReply]
    """The most active, then middling ones, then some without knowledge."""
    counted: str
    """What their numbers count."""


class ItemsReply(Closed):
    """Items."""

    items: list[ItemReply]
    """Those asked for, in that order; or examples, the most frequent and some spread over the others."""


class CompareBody(Closed):
    """One user and candidates, in several scenarios."""

    user: Key
    """Raw user id, of the type of the data."""
    items: Annotated[list[Key], Field(min_length=1)] | None = None
    """Raw item ids of the candidates. Or give candidate_set."""
    candidate_set: str | None = None
    """Instead of items: the name of a set; see GET /v1/model."""
    scenarios: Annotated[list[str], Field(min_length=1, max_length=MAX_SCENARIOS)]
    """Names of scenarios, at most 10."""
    context: dict[str, ContextValue] | None = None
    """Values of context features by name, as of POST /v1/rank."""


class ComparedReply(Closed):
    """A candidate in one scenario. Ranks count from 1; ties keep the order of the request."""

    item: str
    """Raw id."""
    score: float
    """As of POST /v1/rank."""
    rank: int
    """Place by score."""
    score_without: float
    """Without any part of the model that reads knowledge."""
    rank_without: int
    """Place by that."""


class CompareReply(Closed):
    """What knowledge changes in a ranking."""

    model_version: str
    """The run that made the model."""
    rankings: dict[str, list[ComparedReply]]
    """By scenario; in the order of the request, an item named twice once."""
