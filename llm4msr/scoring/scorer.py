"""A table of questions to a table of scores: what one process does with one unit of work. No Ray.

Three kinds of table are scored: lists (a user, a scenario, and the candidates), pairs (a user, a scenario, one
candidate), and users (each in some scenarios, all with the same candidates). Ids, context and candidates are checked,
encoded and scored by the parts of a `Ranker`, so an answer is that of `Ranker.rank` but for rounding, its order, its
ties and its errors included. What differs is how much is scored at once:

* Few candidates: many users go through the model together (`Ranker.score`): one pass per user would mostly be overhead.
* Many: a user's layers are generated once, and the candidates follow in blocks that stay in the processor's cache.

A row that cannot be scored becomes a row of `ERRORS`.

Left out: histories and vectors that a request may bring (what the checkpoint knows of the user is used), and a choice
of items by scenario: a checkpoint counts the training rows of an item in all scenarios together.

Axes: B candidates in one pass, N candidates of one list, U the distinct table rows among them, L lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llm4msr.batch import Rows
from llm4msr.lookup import KeyIndex
from llm4msr.ranker import Ranker
from llm4msr.request import Key, RequestError
from llm4msr.scoring.tables import ERRORS, error_row, key_column, list_results, pair_results

# With 128 candidates a user alone is scored as fast as among others (a STAR with LLM4MSR, one core: 1.2 ms); with 20
# six times slower, with 1,000 twice as fast.
FEW_CANDIDATES = 128
BLOCK_CANDIDATES = 2048  # of one user; 8192 are a fifth slower
BATCH_CANDIDATES = 4096  # of many users


@dataclass(frozen=True)
class Scored:
    """What became of one table.

    Attributes:
        results: Of lists and users `list_results`, of pairs `pair_results`.
        errors: `ERRORS`.
        num_candidates: How many were scored.
    """

    results: pa.Table
    errors: pa.Table
    num_candidates: int


@dataclass(frozen=True)
class Candidates:
    """Items that are ranked together; each table row among them is scored once.

    Attributes:
        items: Raw ids, N.
        distinct_U: Their distinct rows of the items' table.
        index_N: Place of each item's row in distinct_U.
    """

    items: Sequence[Key]
    distinct_U: np.ndarray
    index_N: np.ndarray


@dataclass
class _List:
    """One list that can be scored, and its best candidates once it is."""

    row: int
    user: Key
    user_row: int
    scenario: int
    candidates: Candidates
    context: Rows
    top_k: int | None
    best: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def rank(self, score_U: np.ndarray) -> None:
        score_N = score_U[self.candidates.index_N]
        order = best_first(score_N, self.top_k)
        self.best, self.scores = order.tolist(), score_N[order].tolist()


class Scorer:
    """Scores tables with one ranker.

    Args:
        ranker: Loaded.
    """

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker
        self.schema = ranker.checkpoint.schema
        self._scenarios = {name: i for i, name in enumerate(self.schema.scenario_names)}

    def candidates(self, items: Sequence[Key]) -> Candidates:
        """Looks items up.

        Raises:
            RequestError: There are none, or one is of the wrong type.
        """
        if not items:
            raise RequestError("items", "no candidates: give at least one item")
        return Candidates(items, *np.unique(self.ranker.item_rows(items, "items"), return_inverse=True))

    def score_lists(self, table: pa.Table, first_row: int = 0) -> Scored:
        """Ranks the candidates of each row.

        Args:
            table: Columns user, scenario, items (a list), and if wanted top_k (a whole number; without it all are
                kept) and context (a struct of context features by name).
            first_row: Number of its first row.
        """
        errors: list[dict[str, Any]] = []
        lists = []
        for number, row in enumerate(table.to_pylist(), start=first_row):
            try:
                lists.append(self._read(number, row))
            except RequestError as error:
                errors.append(error_row(number, row["user"], str(error)))
        return self._score(lists, errors)

    def score_users(
        self, table: pa.Table, candidates: Candidates, scenarios: Sequence[str], top_k: int, first_row: int = 0
    ) -> Scored:
        """Finds the best candidates of each user in each scenario.

        Args:
            table: Column user.
            candidates: The same for all.
            scenarios: Names.
            top_k: Candidates that are kept.
            first_row: Number of the table's first row.
        """
        users = table["user"].to_pylist()
        messages: dict[int, str] = {}
        user_row_B = _look_up(self.ranker.user_rows, users, "user", messages)
        context = self.ranker.context({}, 1)
        lists = [
            _List(first_row + i, user, user_row, self._scenarios[name], candidates, context, top_k)
            for i, (user, user_row) in enumerate(zip(users, user_row_B.tolist(), strict=True))
            if i not in messages
            for name in scenarios
        ]
        return self._score(lists, [error_row(first_row + i, users[i], message) for i, message in messages.items()])

    def score_pairs(self, table: pa.Table, first_row: int = 0) -> Scored:
        """Scores each row; one that cannot be scored keeps its place and has no score.

        Args:
            table: Columns user, scenario, item, and if wanted context.
            first_row: Number of its first row.
        """
        scores, errors = [np.zeros(0)], []
        for start in range(0, len(table), BATCH_CANDIDATES):
            score_B, messages = self._score_batch(table.slice(start, BATCH_CANDIDATES))
            scores.append(score_B)
            for i in sorted(messages):
                errors.append(error_row(first_row + start + i, table["user"][start + i].as_py(), messages[i]))
        schema = pair_results(self.schema)
        columns = {name: key_column(table[name], schema.field(name).type) for name in ("user", "scenario", "item")}
        score_R = pa.array(np.concatenate(scores), from_pandas=True)  # NaN becomes null
        row_R = np.arange(first_row, first_row + len(table))
        results = pa.table({"row": row_R, **columns, "score": score_R}, schema=schema)
        return Scored(results, pa.Table.from_pylist(errors, ERRORS), len(table) - len(errors))

    def _score_batch(self, table: pa.Table) -> tuple[np.ndarray, dict[int, str]]:
        """Returns the scores of pairs that go through the model together, NaN of bad rows, and what is wrong there."""
        messages: dict[int, str] = {}
        user_row_B = _look_up(self.ranker.user_rows, table["user"].to_pylist(), "user", messages)
        scenario_B = _look_up(self._scenario_rows, table["scenario"].to_pylist(), "scenario", messages)
        item_row_B = _look_up(self.ranker.item_rows, table["item"].to_pylist(), "item", messages)
        encoded: list[Rows] = []
        if "context" in table.column_names:
            encode = self.ranker.context
            encoded = _each(lambda context: encode(context or {}, 1), table["context"].to_pylist(), messages)
        good = np.setdiff1d(np.arange(len(table)), np.fromiter(messages, np.int64, len(messages)))
        score_B = np.full(len(table), np.nan)
        if len(good):
            context = _concatenate([encoded[i] for i in good]) if encoded else self.ranker.context({}, len(good))
            score_B[good] = self._together(user_row_B[good], item_row_B[good], scenario_B[good], context)
        return score_B, messages

    def _read(self, number: int, row: Mapping[str, Any]) -> _List:
        """Returns one list, checked as `Ranker.rank` checks a request."""
        scenario, top_k = int(self._scenario_rows([row["scenario"]], "scenario")[0]), row.get("top_k")
        candidates = self.candidates(row["items"])
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise RequestError("top_k", f"{top_k} results are not possible: give 1 or more, or leave it out")
        user_row = int(self.ranker.user_rows([row["user"]], "user")[0])
        context = self.ranker.context(row.get("context") or {}, 1)
        return _List(number, row["user"], user_row, scenario, candidates, context, top_k)

    def _scenario_rows(self, names: Sequence[str], name: str) -> np.ndarray:
        if unknown := [found for found in names if found not in self._scenarios]:
            raise RequestError(name, f"no scenario {unknown[0]!r}; valid: {', '.join(self._scenarios)}")
        return np.fromiter(map(self._scenarios.get, names), np.int32, len(names))

    def _score(self, lists: list[_List], errors: list[dict[str, Any]]) -> Scored:
        for one in lists:
            if len(one.candidates.distinct_U) > FEW_CANDIDATES:
                one.rank(self._alone(one))
        for several in _filled(one for one in lists if len(one.candidates.distinct_U) <= FEW_CANDIDATES):
            length_L = [len(one.candidates.distinct_U) for one in several]
            score_B = self._together(
                np.repeat(np.array([one.user_row for one in several], np.int32), length_L),
                np.concatenate([one.candidates.distinct_U for one in several]),
                np.repeat(np.array([one.scenario for one in several], np.int32), length_L),
                {
                    name: np.repeat(values, length_L, axis=0)
                    for name, values in _concatenate([one.context for one in several]).items()
                },
            )
            for one, score_U in zip(several, np.split(score_B, np.cumsum(length_L)[:-1]), strict=True):
                one.rank(score_U)
        names = self.schema.scenario_names
        results = pa.table(
            {
                "row": [one.row for one in lists],
                "user": [one.user for one in lists],
                "scenario": [names[one.scenario] for one in lists],
                "items": [[one.candidates.items[i] for i in one.best] for one in lists],
                "scores": [one.scores for one in lists],
            },
            schema=list_results(self.schema),
        )
        num_candidates = sum(len(one.candidates.items) for one in lists)
        return Scored(results, pa.Table.from_pylist(errors, ERRORS), num_candidates)

    def _alone(self, one: _List) -> np.ndarray:
        """Returns the scores of one list's distinct candidates."""
        checkpoint, serving = self.ranker.checkpoint, self.ranker.serving
        knowledge, distinct_U = checkpoint.knowledge, one.candidates.distinct_U
        layers = self.ranker.user_layers(self.ranker.user_vector_row(one.user_row))
        score_U = np.empty(len(distinct_U))
        for start in range(0, len(distinct_U), BLOCK_CANDIDATES):
            item_row_B = distinct_U[start : start + BLOCK_CANDIDATES]
            num_rows = len(item_row_B)
            rows = self.ranker.rows(
                np.full(num_rows, one.user_row, np.int32),
                item_row_B,
                np.full(num_rows, one.scenario, np.int32),
                {name: np.repeat(values, num_rows, axis=0) for name, values in one.context.items()},
            )
            vector_B = np.zeros(0) if knowledge is None else knowledge.item_index_N[item_row_B]
            with torch.inference_mode():
                batch = checkpoint.collator.features(rows)
                logit_B = serving(batch, layers, torch.from_numpy(vector_B.astype(np.int64)), one.scenario)
                score_U[start : start + num_rows] = torch.sigmoid(logit_B.double()).numpy()
        return score_U

    def _together(self, *columns: Any) -> np.ndarray:
        """Returns the scores of candidates of many users; arguments as of `_rows`."""
        return self.ranker.score(self.ranker.rows(*columns))


def best_first(score_N: np.ndarray, top_k: int | None) -> np.ndarray:
    """Returns the places of the highest scores, the highest first; equal ones in their order, as in `Ranker.rank`."""
    if top_k is None or top_k >= len(score_N):
        return np.argsort(-score_N, kind="stable")
    last = np.partition(score_N, len(score_N) - top_k)[len(score_N) - top_k]
    above = np.flatnonzero(score_N > last)
    level = np.flatnonzero(score_N == last)[: top_k - len(above)]
    places = np.sort(np.concatenate([above, level]))
    return places[np.argsort(-score_N[places], kind="stable")]


def _look_up(
    index: KeyIndex | Callable[[Sequence[Any], str], np.ndarray],
    keys: Sequence[Any],
    name: str,
    messages: dict[int, str],
) -> np.ndarray:
    """Looks keys up together, or where one cannot be looked up one by one; `messages` says of which and why."""
    try:
        return index(keys, name)
    except RequestError:
        found = _each(lambda key: int(index([key], name)[0]), keys, messages)
        return np.array([0 if row is None else row for row in found], np.int32)


def _each(function: Callable[[Any], Any], values: Sequence[Any], messages: dict[int, str]) -> list[Any]:
    """Applies a function to each value; where it raises RequestError the result is None, and said why."""
    found: list[Any] = []
    for i, value in enumerate(values):
        try:
            found.append(function(value))
        except RequestError as error:
            found.append(None)
            messages.setdefault(i, str(error))
    return found


def _concatenate(parts: Sequence[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _filled(lists: Iterator[_List]) -> Iterator[list[_List]]:
    """Yields lists together until they have `BATCH_CANDIDATES`."""
    several, num_candidates = [], 0
    for one in lists:
        several.append(one)
        num_candidates += len(one.candidates.distinct_U)
        if num_candidates >= BATCH_CANDIDATES:
            yield several
            several, num_candidates = [], 0
    if several:
        yield several
