"""What a loaded model knows of its users and items, and what the language model was told of them.

Facts come from the checkpoint alone: tables, logs of likes, vectors. Prompts and words lie in the extraction that the
knowledge came from (`read_words`). What is absent has a reason in words. Raw ids are text here, whatever their type.

Axes: N rows of users or items, M rows that were found, K knowledge width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.knowledge.explain import explain as explain_subject
from llm4msr.knowledge.extraction import Extraction
from llm4msr.knowledge.nearest import mean_vector, nearest_rows
from llm4msr.knowledge.prompts import Level
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.ranker import Ranker
from llm4msr.request import Key, RequestError

NUM_NEAREST, NUM_LIKED, NUM_IDS = 10, 20, 5
MAX_COMPARED = 200_000  # vectors; more are sampled
KEPT_ANSWERS = 256
NO_KNOWLEDGE = "this model is a backbone alone: it was trained without knowledge"

Kind = Literal["active", "middling", "without knowledge"]


@dataclass(frozen=True)
class LikedFact:
    """An item that the user liked: raw id as text, and what the data say of it."""

    item: str
    text: str


@dataclass(frozen=True)
class LikedLog:
    """What a history feature reads: the scenario or "all", the number of likes, and the latest ones, newest first."""

    log: str
    num_likes: int
    latest: list[LikedFact]


@dataclass(frozen=True)
class NearUser:
    """A vector near the user's, and whose it is: some of the raw ids as text, and how many there are."""

    users: list[str]
    num_users: int
    similarity: float


@dataclass(frozen=True)
class Nearest:
    """The nearest other users, nearest first, by the cosine after the mean is taken away; or why there are none.

    Attributes:
        users: At most `NUM_NEAREST`.
        num_vectors: Vectors of users that there are.
        num_compared: How many of them were looked at: all, or evenly spaced ones.
        reason: Why there are none.
    """

    users: list[NearUser]
    num_vectors: int
    num_compared: int
    reason: str | None = None


@dataclass(frozen=True)
class UserFacts:
    """What a model knows of a user; raw ids are text.

    Attributes:
        user: Raw id.
        known: Whether the model's table has the user.
        knowledge_known: Whether there is a vector.
        text: What the data say.
        num_train_rows: Training rows.
        liked: By log.
        liked_reason: Why that is empty.
        nearest: Near users.
    """

    user: str
    known: bool
    knowledge_known: bool
    text: str
    num_train_rows: int
    liked: list[LikedLog]
    liked_reason: str | None
    nearest: Nearest


@dataclass(frozen=True)
class ItemFacts:
    """What a model knows of an item; as of `UserFacts`."""

    item: str
    known: bool
    knowledge_known: bool
    text: str
    num_train_rows: int


@dataclass(frozen=True)
class Words:
    """What the language model read and wrote of a subject; None with a reason.

    Attributes:
        prompt: As it was read, or uncut where it was not.
        text: Its answer.
        model: Its name.
        reason: Why either is absent.
    """

    prompt: str | None
    text: str | None
    model: str | None
    reason: str | None


class Neighbours:
    """Who is near in a table of knowledge; answers are kept, as one user is asked for again and again.

    Args:
        table: The model's; None for a backbone alone.
        users: The model's feature table.
    """

    def __init__(self, table: KnowledgeTable | None, users: pa.Table) -> None:
        self.table = table
        self.keys = users["key"]
        if table is not None:
            num_vectors = len(table.users_NK) - 1
            self.step = -(-num_vectors // MAX_COMPARED) or 1
            self.sample_NK = table.users_NK[:: self.step]  # a view: what lies on disk stays there
        self.find = lru_cache(maxsize=KEPT_ANSWERS)(self._find)
        self.mean_K = lru_cache(maxsize=1)(lambda: mean_vector(self.sample_NK, 1))

    def _find(self, user_row: int) -> Nearest:
        """Returns the users near to the one in a row of the feature table."""
        table = self.table
        if table is None:
            return Nearest([], 0, 0, NO_KNOWLEDGE)
        own, num_vectors, num_compared = int(table.user_index_N[user_row]), len(table.users_NK) - 1, len(self.sample_NK)
        if not own:
            return Nearest([], num_vectors, 0, "the model has no knowledge of this user")
        is_shared = np.count_nonzero(table.user_index_N == own) > 1  # others with the same vector are the nearest
        left_out = own // self.step if own % self.step == 0 and not is_shared else 0
        centred_K = table.users_NK[own].astype(np.float32) - self.mean_K()
        found = nearest_rows(self.sample_NK, self.mean_K(), centred_K, NUM_NEAREST, left_out)
        users = [self._near(table, place * self.step, similarity, user_row) for place, similarity in found]
        reason = None if users else "the model has knowledge of no other user"
        return Nearest(users, num_vectors, num_compared - 1, reason)

    def _near(self, table: KnowledgeTable, vector_row: int, similarity: float, user_row: int) -> NearUser:
        row_M = np.flatnonzero(table.user_index_N == vector_row)
        row_M = row_M[row_M != user_row]
        some = [str(self.keys[int(row) - 1].as_py()) for row in row_M[:NUM_IDS]]
        return NearUser(some, len(row_M), round(min(max(similarity, -1.0), 1.0), 6))


@dataclass(frozen=True)
class UserExample:
    """A user to try: raw id, what the data say, why chosen, and how many rows or likes (see `example_users`)."""

    user: str
    text: str
    kind: Kind
    num: int
    knowledge_known: bool


def example_users(ranker: Ranker, scenario: str | None, num: int) -> tuple[list[UserExample], str]:
    """Returns users to try: half the most active, some middling, some without knowledge where there are any.

    Args:
        ranker: The model.
        scenario: Where they are active, if the checkpoint knows the likes of that scenario; else all training rows
            count.
        num: How many at most.

    Returns:
        The users, and what their number counts.

    Raises:
        RequestError: No such scenario.
    """
    checkpoint = ranker.checkpoint
    names = checkpoint.schema.scenario_names
    if scenario is not None and scenario not in names:
        raise RequestError("scenario", f"no scenario {scenario!r}; valid: {', '.join(names)}")
    log = None if scenario is None else checkpoint.collator.logs.get(scenario)
    num_N = checkpoint.users["num_train_rows"].to_numpy() if log is None else np.diff(log.offset_U)[1:]
    known_N = np.zeros(len(num_N), bool)
    if checkpoint.knowledge is not None:
        known_N = checkpoint.knowledge.user_index_N[1:] > 0
    order_N = np.argsort(-num_N, kind="stable")
    if checkpoint.model.reads_users:
        lacking, order_N = order_N[~known_N[order_N]], order_N[known_N[order_N]]
    else:
        lacking = order_N[:0]
    num_lacking = min(max(num // 4, num - len(order_N)), len(lacking))
    num_active = min(-(-num // 2), len(order_N))
    busy_N = order_N[num_N[order_N] > 0]
    first = min(max(len(busy_N) // 2, num_active), len(order_N))
    middling = order_N[first : first + num - num_active - num_lacking]
    chosen: list[tuple[np.ndarray, Kind]] = [
        (order_N[:num_active], "active"),
        (middling, "middling"),
        (lacking[:num_lacking], "without knowledge"),
    ]
    keys, texts = checkpoint.users["key"], checkpoint.users["text"]
    examples = [
        UserExample(str(keys[at].as_py()), texts[at].as_py(), kind, int(num_N[at]), bool(known_N[at]))
        for places, kind in chosen
        for at in places.tolist()
    ]
    return examples, "training rows" if log is None else f"likes in {scenario}"


def example_items(ranker: Ranker, num: int) -> list[ItemFacts]:
    """Returns items to rank, with a text where any has one: the most frequent, and as many spread over the others."""
    items = ranker.checkpoint.items
    num_rows_N = items["num_train_rows"].to_numpy()
    has_text_N = pc.not_equal(items["text"], "").to_numpy()
    order_N = np.argsort(-num_rows_N, kind="stable")
    if has_text_N.any():
        order_N = order_N[has_text_N[order_N]]
    first, others = order_N[: -(-num // 2)], order_N[-(-num // 2) :]
    spaced = others[np.linspace(0, len(others) - 1, min(num // 2, len(others)), dtype=np.int64)]
    return [describe_item(ranker, items["key"][at].as_py()) for at in (*first.tolist(), *spaced.tolist())]


def describe_user(ranker: Ranker, neighbours: Neighbours, user: Key) -> UserFacts:
    """Returns what the model knows of a user.

    Raises:
        RequestError: The id is of the wrong type for the data.
    """
    checkpoint, row = ranker.checkpoint, int(ranker.user_rows([user], "user")[0])
    known = checkpoint.knowledge is not None and bool(checkpoint.knowledge.user_index_N[row])
    liked, reason = _liked(ranker, row)
    record = _record(checkpoint.users, row)
    return UserFacts(
        str(user), row > 0, known, record["text"], record["num_train_rows"], liked, reason, neighbours.find(row)
    )


def describe_item(ranker: Ranker, item: Key) -> ItemFacts:
    """Returns what the model knows of an item.

    Raises:
        RequestError: The id is of the wrong type for the data.
    """
    checkpoint, row = ranker.checkpoint, int(ranker.item_rows([item], "item")[0])
    known = checkpoint.knowledge is not None and bool(checkpoint.knowledge.item_index_N[row])
    record = _record(checkpoint.items, row)
    return ItemFacts(str(item), row > 0, known, record["text"], record["num_train_rows"])


def read_words(extraction: Extraction, level: Level, subject_id: str, row: int) -> Words:
    """Returns what the language model was told of a subject and what it wrote.

    Args:
        extraction: Where the model's knowledge came from.
        level: What `subject_id` names.
        subject_id: Raw id as text, or a scenario's name.
        row: Its row in the feature table, 0 if it has none; of a scenario its index.

    Raises:
        StorageError: A file is missing or damaged.
    """
    model = extraction.manifest["config"]["knowledge"]["model"]
    if level != "scenario" and not row:
        return Words(None, None, model, f"the data do not have this {level}")
    # Its own vector alone: who is near is asked of the model's table, not of one of any size.
    found = explain_subject(replace(extraction, table=_alone(extraction.table, level, row)), level, subject_id)
    prompt = found.prompt_read or found.prompt
    reason = found.reason
    if prompt is None and reason is None:
        reason = "no prompt was written: the vector is the mean of those of the items that the user liked"
    elif found.generated_text is None and reason is None:
        reason = "the language model was not asked to write: knowledge.generate was off"
    return Words(prompt, found.generated_text, model, reason)


def _alone(table: KnowledgeTable, level: Level, row: int) -> KnowledgeTable:
    """Returns the table with the vector of one subject and without those of all other users and items."""
    changed = {}
    for name in ("user", "item"):
        vectors_NK, index_N = getattr(table, f"{name}s_NK"), getattr(table, f"{name}_index_N")
        own = int(index_N[row]) if name == level else 0
        changed[f"{name}s_NK"] = np.asarray(vectors_NK[[0, own]] if own else vectors_NK[:1])
        changed[f"{name}_index_N"] = np.zeros_like(index_N)
        if own:
            changed[f"{name}_index_N"][row] = 1
    return replace(table, folds=None, **changed)


def _liked(ranker: Ranker, user_row: int) -> tuple[list[LikedLog], str | None]:
    items, logs = ranker.checkpoint.items, ranker.checkpoint.collator.logs
    if not logs:
        return [], "this model reads no history, so its checkpoint does not say what users liked"
    liked = []
    for name, log in logs.items():
        begin, end = log.offset_U[user_row : user_row + 2].tolist()
        latest = log.item_row_N[max(begin, end - NUM_LIKED) : end][::-1].tolist()
        facts = [_record(items, row) for row in latest]
        liked.append(LikedLog(name, end - begin, [LikedFact(str(fact["key"]), fact["text"]) for fact in facts]))
    return liked, None


def _record(table: pa.Table, row: int) -> dict[str, Any]:
    """Returns what the data say of a user or item by its table row, which is 0 where they have none."""
    if not row:
        return {"key": "", "text": "", "num_train_rows": 0}
    record: dict[str, Any] = table.select(["key", "text", "num_train_rows"]).slice(row - 1, 1).to_pylist()[0]
    return record
