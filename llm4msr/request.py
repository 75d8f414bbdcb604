"""What a ranker is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Key = int | str
ContextValue = Key | float | Sequence[Key | float]


class RequestError(ValueError):
    """A request that cannot be scored; `field` names the part at fault, the message what would be valid."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class LikedItem:
    """One like of a user: the raw id of the item, and the name of the scenario where it was liked."""

    item: Key
    scenario: str


@dataclass(frozen=True)
class RankRequest:
    """One user, one scenario, N candidates, and where they are fresher than the model's logs the user's likes.

    Attributes:
        user: Raw user id.
        scenario: Scenario name.
        items: Raw item ids.
        top_k: Results returned, the best first; None returns all.
        context: Values of context features by name, the same for all candidates; of a sequence a list. As in training,
            an absent category or list adds nothing, a given value that training has not seen is unseen, and an absent
            number is its mean.
        history: What the user liked, oldest first, instead of the likes that the model's data have of this user; None
            takes these. It is read by history features, and by models whose users' vectors are made of items' vectors.
        knowledge: The user's vector as the language model made it, K numbers, instead of the model's own; None takes
            that, or one made of the history.
    """

    user: Key
    scenario: str
    items: Sequence[Key]
    top_k: int | None = None
    context: Mapping[str, ContextValue] | None = None
    history: Sequence[LikedItem] | None = None
    knowledge: Sequence[float] | None = None


@dataclass(frozen=True)
class RankedItem:
    """One candidate: its raw id, its score in (0, 1), and whether its id is in the model's item table."""

    item: Key
    score: float
    known: bool


@dataclass(frozen=True)
class Timings:
    """Where the milliseconds of an answer went.

    Attributes:
        encode: Raw ids and values to the model's input.
        knowledge: The user's meta layers, generated or found.
        model: The input to scores.
        total: From raw ids to sorted scores; more than the sum of the others.
    """

    encode: float
    knowledge: float
    model: float
    total: float


@dataclass(frozen=True)
class RankResponse:
    """The ranking.

    Attributes:
        model_version: Which model scored.
        user_known: Whether the user is in the model's user table.
        knowledge_known: Whether knowledge of this user was used.
        num_unknown_items: Candidates whose id is not in the model's item table, those cut off by top_k included.
        results: Highest score first; ties keep the order of the request.
        timings_ms: Milliseconds of its parts.
    """

    model_version: str
    user_known: bool
    knowledge_known: bool
    num_unknown_items: int
    results: list[RankedItem]
    timings_ms: Timings
