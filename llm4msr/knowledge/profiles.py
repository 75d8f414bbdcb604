"""From prepared training rows to prompts: what each user liked where, and what each scenario is like.

Pure functions over one bucket of rows at a time; a bucket holds whole users, so user prompts need nothing else and
counts of users add up over buckets. Grouping is done on arrays; Python touches one user at a time, to build the text.
Only rows of the training split may be given to this module: whatever comes in can be quoted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.knowledge.prompts import Liked, Prompt, ScenarioFacts, item_prompt, scenario_prompt, user_prompt
from llm4msr.schema import Scenario

# Columns of `schema.rows_schema` that profiles need.
COLUMNS = ("user_row", "item_row", "scenario", "label", "timestamp_ms", "position")
MAX_TEXT_CHARACTERS = 80
# A prompt about an item reads more of it; what is too long for the model is cut there.
MAX_ITEM_CHARACTERS = 2000
NUM_MOST_LIKED = 10
NO_TIME = -(2**62)


@dataclass(frozen=True)
class Texts:
    """Distinct texts of an entity table, cleaned for quoting.

    Attributes:
        codes: (num_rows + 1,) int32; position in `values` of each table row's text, -1 where it has none (row 0 too).
        values: Distinct texts, none empty.
    """

    codes: np.ndarray
    values: pa.StringArray

    def at(self, row: int) -> str:
        """Returns the text of a table row, "" where it has none."""
        code = self.codes[row]
        return self.values[int(code)].as_py() if code >= 0 else ""


def clean_texts(texts: pa.Array | pa.ChunkedArray, max_characters: int = MAX_TEXT_CHARACTERS) -> Texts:
    """Prepares the text column of an entity table; record i is table row i + 1.

    Markup and a model's control tokens (``<b>``, ``<|im_end|>``, ``</s>``) and line breaks become spaces, since raw
    texts come from outside; long ones end after `max_characters`. Equal results count as one text.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    texts = pc.replace_substring_regex(pc.fill_null(texts, ""), r"<[|/A-Za-z][^<>]{0,40}>", " ")
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"[\s;]+", " "))
    texts = pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(texts, 0, max_characters))
    encoded = pc.if_else(pc.equal(texts, ""), None, texts).dictionary_encode()
    codes = np.full(len(texts) + 1, -1, dtype=np.int32)
    codes[1:] = pc.fill_null(encoded.indices, -1).to_numpy()
    return Texts(codes, encoded.dictionary)


@dataclass(frozen=True)
class UserProfile:
    """One user's prompt and how much stands behind it.

    Attributes:
        user_row: Row of the users' feature table.
        prompt: What the model reads.
        num_liked: Liked training rows.
        last_liked_ms: Time of the last of them; None where the data has no times.
    """

    user_row: int
    prompt: Prompt
    num_liked: int
    last_liked_ms: int | None


@dataclass(frozen=True)
class LikedRows:
    """Liked rows of whole users by user, scenario, most recent first. Axes: L rows.

    Attributes:
        user_L: user_row.
        scenario_L: Index of the scenario.
        code_L: Position of the item's text in `Texts.values`, -1 where it has none.
        time_ms_L: int64; `NO_TIME` where the data has none.
        recency_L: Rank over a user's rows of all scenarios, smaller is more recent, ties in the order of scenarios.
    """

    user_L: np.ndarray
    scenario_L: np.ndarray
    code_L: np.ndarray
    time_ms_L: np.ndarray
    recency_L: np.ndarray

    @classmethod
    def select(cls, rows: pa.Table, items: Texts) -> LikedRows:
        """Takes what known users liked from training rows with `COLUMNS`, in any order."""
        rows = rows.filter(pc.and_(pc.equal(rows["label"], 1), pc.greater(rows["user_row"], 0)))
        user, scenario = rows["user_row"].to_numpy(), rows["scenario"].to_numpy()
        time = pc.fill_null(rows["timestamp_ms"].cast(pa.int64()), NO_TIME).to_numpy()
        position = rows["position"].to_numpy()
        order = np.lexsort((-position, -time, scenario, user))
        recency = np.empty(len(order), dtype=np.int64)
        recency[np.lexsort((-position[order], -time[order], user[order]))] = np.arange(len(order))
        code = items.codes[rows["item_row"].to_numpy()[order]]
        return cls(user[order], scenario[order], code, time[order], recency)

    def num_later(self, user_rows: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
        """Returns how many rows of each of these users, given in ascending order, are later than a time of its own."""
        if not len(user_rows):
            return np.zeros(0, np.int64)
        at_L = np.minimum(np.searchsorted(user_rows, self.user_L), len(user_rows) - 1)
        later_L = (user_rows[at_L] == self.user_L) & (self.time_ms_L > times_ms[at_L])
        return np.bincount(at_L[later_L], minlength=len(user_rows))


def user_profiles(
    liked: LikedRows, keys: pa.Array, users: Texts, items: Texts, scenarios: Sequence[Scenario], max_events: int
) -> Iterator[UserProfile]:
    """Yields the profile of every user with a liked row, in order of user_row.

    Args:
        liked: What whole users liked.
        keys: Raw ids of the users' feature table; record i is user_row i + 1.
        users: Texts of the users.
        items: Texts of the items.
        scenarios: Of the schema, in order.
        max_events: Item texts quoted per scenario, the most recent ones.
    """
    user, scenario, code = liked.user_L, liked.scenario_L, liked.code_L
    starts, counts = _segments(user, scenario)
    untitled = np.add.reduceat((code < 0).astype(np.int64), starts) if len(starts) else counts
    # Repeats of a text within a user's scenario become one event, where the most recent of them stood.
    text_order = np.lexsort((np.arange(len(code)), code, scenario, user))
    text_starts, num_repeats = _segments(user[text_order], scenario[text_order], code[text_order])
    first = text_order[text_starts]
    in_time = np.argsort(first)
    first, num_repeats = first[in_time], num_repeats[in_time]
    titled = code[first] >= 0
    first, num_repeats = first[titled], num_repeats[titled]
    event_ends = np.searchsorted(first, starts + counts)
    event_starts = np.searchsorted(first, starts)
    texts = items.values.take(pa.array(code[first])).to_pylist()
    event_recency = liked.recency_L[first].tolist()

    def in_scenario(segment: int) -> Liked:
        begin, end = event_starts[segment], min(event_ends[segment], event_starts[segment] + max_events)
        events = tuple(
            texts[i] if num_repeats[i] == 1 else f"{texts[i]} (x{num_repeats[i]})" for i in range(begin, end)
        )
        name = scenarios[scenario[starts[segment]]].name
        return Liked(name, int(counts[segment]), int(untitled[segment]), events, tuple(event_recency[begin:end]))

    owners, last = user[starts], liked.time_ms_L[starts]
    bounds = np.append(_segments(owners)[0], len(owners))
    for begin, end in itertools.pairwise(bounds.tolist()):
        row, last_ms = int(owners[begin]), int(last[begin:end].max())
        prompt = user_prompt(
            str(keys[row - 1].as_py()), users.at(row), [in_scenario(segment) for segment in range(begin, end)]
        )
        yield UserProfile(row, prompt, int(counts[begin:end].sum()), None if last_ms == NO_TIME else last_ms)


def item_prompts(keys: pa.Array, items: Texts, first_row: int, num_rows: int) -> Iterator[tuple[int, Prompt]]:
    """Yields (item_row, prompt) of every item with a text among some rows of the items' feature table.

    Args:
        keys: Raw ids of these rows.
        items: Texts of the whole table.
        first_row: Table row of the first.
        num_rows: How many.
    """
    ids = keys.to_pylist()
    for row in range(first_row, first_row + num_rows):
        if items.codes[row] >= 0:
            yield row, item_prompt(str(ids[row - first_row]), items.at(row))


def _segments(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns start and length of each run of equal values in columns sorted together."""
    length = len(columns[0])
    if not length:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    changed = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    starts = np.concatenate([[0], np.flatnonzero(changed) + 1])
    return starts, np.diff(np.append(starts, length))


@dataclass(frozen=True)
class ScenarioStats:
    """Counts over training rows that add up over buckets. Axes: S scenarios, P (scenario, item) pairs seen.

    Attributes:
        num_rows_S: Rows.
        num_positive_S: Rows with label 1.
        num_users_SS: Users with rows in both scenarios; on the diagonal, users of the scenario.
        pairs_P: scenario + item_row * S, ascending.
        pair_positive_P: Rows with label 1 of each pair.
    """

    num_rows_S: np.ndarray
    num_positive_S: np.ndarray
    num_users_SS: np.ndarray
    pairs_P: np.ndarray
    pair_positive_P: np.ndarray

    @classmethod
    def count(cls, rows: pa.Table, num_scenarios: int) -> ScenarioStats:
        """Counts the rows of one bucket, which holds whole users."""
        user, scenario = rows["user_row"].to_numpy(), rows["scenario"].to_numpy()
        positive = rows["label"].to_numpy() == 1
        users, compact = np.unique(user, return_inverse=True)
        seen = np.zeros((len(users), num_scenarios), dtype=np.float64)
        seen[compact, scenario] = 1
        seen = seen[users > 0]
        pairs, inverse = np.unique(
            rows["item_row"].to_numpy().astype(np.int64) * num_scenarios + scenario, return_inverse=True
        )
        return cls(
            np.bincount(scenario, minlength=num_scenarios),
            np.bincount(scenario[positive], minlength=num_scenarios),
            (seen.T @ seen).astype(np.int64),
            pairs,
            np.bincount(inverse[positive], minlength=len(pairs)),
        )

    @classmethod
    def merge(cls, parts: Sequence[ScenarioStats]) -> ScenarioStats:
        """Adds up the counts of buckets that share no user."""
        pairs, inverse = np.unique(np.concatenate([p.pairs_P for p in parts]), return_inverse=True)
        weights = np.concatenate([p.pair_positive_P for p in parts])
        return cls(
            np.sum([p.num_rows_S for p in parts], axis=0),
            np.sum([p.num_positive_S for p in parts], axis=0),
            np.sum([p.num_users_SS for p in parts], axis=0),
            pairs,
            np.bincount(inverse, weights=weights, minlength=len(pairs)).astype(np.int64),
        )


def scenario_facts(
    stats: ScenarioStats, items: Texts, scenarios: Sequence[Scenario], positives_only: bool = False
) -> list[ScenarioFacts]:
    """Returns what the scenario-level prompts say, in the order of `scenarios`.

    Args:
        stats: Counts over all training rows.
        items: Texts of the items.
        scenarios: Of the schema, in order.
        positives_only: `stats` counts rows with label 1 alone, so there is no share of positives.
    """
    num_scenarios = len(scenarios)
    pair_scenario, pair_item = stats.pairs_P % num_scenarios, stats.pairs_P // num_scenarios
    facts = []
    for index, scenario in enumerate(scenarios):
        here = pair_scenario == index
        code, likes = items.codes[pair_item[here]], stats.pair_positive_P[here]
        likes_of_text = np.bincount(code[code >= 0], weights=likes[code >= 0], minlength=len(items.values))
        top = np.argsort(-likes_of_text, kind="stable")[:NUM_MOST_LIKED]
        top = top[likes_of_text[top] > 0]
        facts.append(
            ScenarioFacts(
                name=scenario.name,
                description=scenario.description,
                num_rows=int(stats.num_rows_S[index]),
                num_positive=None if positives_only else int(stats.num_positive_S[index]),
                num_users=int(stats.num_users_SS[index, index]),
                num_items=int(np.count_nonzero(pair_item[here] > 0)),
                shared_users=tuple(int(n) for n in stats.num_users_SS[index]),
                most_liked=tuple(items.values.take(pa.array(top)).to_pylist()),
            )
        )
    return facts


def scenario_prompts(
    stats: ScenarioStats, items: Texts, scenarios: Sequence[Scenario], positives_only: bool = False
) -> list[Prompt]:
    """Returns one prompt per scenario, in order; arguments as of `scenario_facts`."""
    facts = scenario_facts(stats, items, scenarios, positives_only)
    return [scenario_prompt(index, facts) for index in range(len(facts))]
