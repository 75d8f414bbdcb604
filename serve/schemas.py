"""What the API takes and returns.

Types are strict: "5" is a text id, 5 is a whole number, and neither is taken for the other, because a data set has
one kind of id and a silent conversion would look up the wrong row or none. Unknown fields are refused. What only a
loaded model can tell (its scenarios, its kind of ids, its context features) is checked by the ranker.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class OneMessage:
    """Annotation of a union: one error in plain words instead of one per member.

    Args:
        kind: Error type in the response.
        message: What would be valid.
    """

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.message = message

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wraps the union's own schema."""
        return core_schema.custom_error_schema(
            handler(source), custom_error_type=self.kind, custom_error_message=self.message
        )


# A float field would take text in no mode but whole numbers in all; JSON does not tell 1 from 1.0.
Number = int | float
Key = Annotated[int | str, OneMessage("id_type", "an id is a whole number or text")]
ContextValue = Annotated[
    int | float | str | list[int | float | str],
    OneMessage("context_type", "a context value is a number, text, or a list of them"),
]
# A history feature reads the last few; more than this is a mistake.
MAX_LIKED = 1000
# The widest hidden states of today's language models have 16,384 numbers.
MAX_KNOWLEDGE = 16_384


class Closed(BaseModel):
    """Base of every body: no unknown fields, no conversions; names may start with ``model_``."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True)


class LikedBody(Closed):
    """One like of the user."""

    item: Key
    """Raw item id. An unknown item counts as an unseen one."""
    scenario: str
    """Name of the scenario where it was liked."""


class RankBody(Closed):
    """One user, one scenario, the candidates to rank."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user": 1042, "scenario": "search", "items": [7001, 7002, 7003], "top_k": 2},
                {"user": "AE2F4", "scenario": "books", "items": ["B00A", "B00B"], "context": {"device": "phone"}},
                {"user": 7, "scenario": "rec", "items": [5, 6], "history": [{"item": 4, "scenario": "search"}]},
                {"user": 8, "scenario": "rec", "items": [5, 6], "knowledge": [0.25, -1.5, 0.0]},
            ]
        }
    )

    user: Key
    """Raw user id, of the type of the data. An unknown user is scored, with user_known false."""
    scenario: str
    """Name of a scenario of the model: see GET /v1/model."""
    items: Annotated[list[Key], Field(min_length=1)] | None = None
    """Raw item ids of the candidates. An unknown item is scored, with known false. Or give candidate_set."""
    candidate_set: str | None = None
    """Instead of items: the name of a set that the server was started with; see GET /v1/model."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Number of results, the best first; all when left out."""
    context: dict[str, ContextValue] | None = None
    """Values of context features by name, the same for all candidates; a list for features of kind sequence. Those left
    out count as absent."""
    history: Annotated[list[LikedBody], Field(max_length=MAX_LIKED)] | None = None
    """What the user liked, oldest first, instead of what the model's data know of the user. Left out, these are used;
    an empty list is a user without likes. For models with features of kind history, and those whose users' vectors are
    made of items' vectors: then a user whom the model does not know gets knowledge too."""
    knowledge: Annotated[list[Number], Field(max_length=MAX_KNOWLEDGE)] | None = None
    """The user's vector as the language model made it, instead of the model's own."""


class BatchBody(Closed):
    """Rankings for several users, or scenarios."""

    requests: Annotated[list[RankBody], Field(min_length=1)]
    """Each as for POST /v1/rank. If one cannot be answered, none is."""


class RankedItemReply(Closed):
    """One candidate."""

    item: int | str
    """Raw id, as asked."""
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    """Probability of a positive label."""
    known: bool
    """Whether the item is in the model's item table."""


class TimingsReply(Closed):
    """Milliseconds of the parts of an answer, without HTTP."""

    encode: float
    """Raw ids and values to the model's input."""
    knowledge: float
    """The user's meta layers, generated or found."""
    model: float
    """The model's input to scores."""
    total: float
    """From raw ids to sorted scores; more than the sum of the others."""


class RankReply(Closed):
    """The ranking."""

    model_version: str
    """The run that made the model."""
    scenario: str
    """As asked."""
    user: int | str
    """As asked."""
    user_known: bool
    """Whether the user is in the model's user table."""
    knowledge_known: bool
    """Whether knowledge of this user was used: the model's, the request's, or made of the request's history."""
    results: list[RankedItemReply]
    """Highest score first; ties keep the order of the request."""
    timings_ms: TimingsReply
    """Where the time went."""


class BatchReply(Closed):
    """The rankings."""

    rankings: list[RankReply]
    """In the order of the requests."""


class ErrorPart(BaseModel):
    """One fault of a request."""

    type: str
    """Kind of fault."""
    loc: list[str | int]
    """Where it is: body, field, place in a list. Empty: not in the body."""
    msg: str
    """What would be valid."""
    input: Any = None
    """What was found, if it is short."""


class ErrorReply(BaseModel):
    """A refused request."""

    detail: list[ErrorPart]
    """All that was found, at most twenty."""


class FailureReply(BaseModel):
    """A request that the server failed to answer."""

    detail: str
    """That it failed; why is in the server's log, under the request's id."""


class RefusedReply(Closed):
    """A checkpoint that was to be served and is not."""

    checkpoint_uri: str
    """As asked."""
    reason: str
    """Why it cannot be served."""


class CanaryReply(Closed):
    """The second model."""

    checkpoint_uri: str
    """Its checkpoint."""
    model_version: str
    """The run that made it."""
    share: float
    """Share of the users for whom it is asked."""
    mode: Literal["shadow", "answer"]
    """shadow: it scores beside the served one. answer: it answers for its share."""


class ScenarioReply(Closed):
    """One scenario of the model."""

    name: str
    """As in requests."""
    description: str
    """As in the prompts."""


class FeatureReply(Closed):
    """One input of the model."""

    name: str
    """Column name. Context features are named so in requests."""
    kind: Literal["categorical", "numeric", "sequence", "history"]
    """categorical, numeric, sequence, or history: items that the user liked."""
    source: Literal["user", "item", "context"]
    """Looked up by the user's id, by the item's id, or given with the request."""
    max_length: int
    """Values read of a sequence, the first ones, or likes of a history, the last ones; 0 for the others."""


class ModelReply(Closed):
    """What is served."""

    model_version: str
    """The run that made the model."""
    backbone: str
    """Name of the backbone."""
    knowledge: str
    """none: the backbone alone; llm: with knowledge; shuffled (knowledge of others), random (noise): controls."""
    scenarios: list[ScenarioReply]
    """In the order of their index."""
    features: list[FeatureReply]
    """In the order of the model's input."""
    user_key_type: Literal["int64", "string"]
    """Type of user ids."""
    item_key_type: Literal["int64", "string"]
    """Type of item ids."""
    num_users: int
    """Users in the model's table."""
    num_items: int
    """Items in the model's table."""
    max_candidates: int
    """Most candidates that one request may hold."""
    checkpoint_uri: str
    """The checkpoint that is served."""
    candidate_sets: dict[str, int]
    """Named sets of candidates, and how many items each has."""
    max_batch: int
    """Most requests in one POST /v1/rank:batch."""
    knowledge_dim: int | None
    """Numbers of a vector in a request's field knowledge; null for a model that reads no knowledge of users."""
    reads_history: bool
    """Whether a request's field history is read."""
    refused: RefusedReply | None
    """What the last change of this server asked for and did not get; null if nothing was refused."""
    canary: CanaryReply | None
    """A second model beside this one."""
    training: dict[str, Any]
    """How the model was trained: AUC on the validation split, digest of the prepared data, seed, and so on."""
    example: RankBody
    """A request that this model knows the user and the items of."""


class HealthReply(Closed):
    """The replica answers."""

    status: Literal["ok"] = "ok"
    """Always ok: a replica that cannot answer does not."""
    model_version: str
    """The run that made the model."""
