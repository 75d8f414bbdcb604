"""Writes the prompts of one data set to files: Parquet to encode from, and a text file to read.

One file per bucket of users, one per so many items, one of the scenarios. These are the bodies of Ray tasks, kept
apart from the engines so that a process that writes prompts loads no model.

A user whose logs changed little may keep the prompt of the last extraction, and with it the vector
(`knowledge.refresh_min_new_events`); see `Previous`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.knowledge import profiles
from llm4msr.knowledge.profiles import LikedRows, ScenarioStats, Texts
from llm4msr.knowledge.prompts import PROMPTS, prompts_table
from llm4msr.knowledge.store import keys_to_arrow, prompt_keys
from llm4msr.schema import Scenario

NUM_SAMPLES = 20
ROW_GROUP_ROWS = 1024  # an actor reads the row groups of its unit, not the whole file
_BUCKET = re.compile(r"bucket-(\d+)\.parquet")


@dataclass(frozen=True)
class Subjects:
    """What all prompts of one data set are made from; sent to each node once.

    Attributes:
        user_keys: Raw ids of the users' feature table.
        users: Texts of the users.
        items: Texts of the items, short, for quoting.
        item_texts: The same, long, for prompts about items; None where there are none.
        scenarios: Of the schema, in order.
        identity_digest: Of the encoder.
        max_events: Item texts quoted per user and scenario.
        positives_only: Count rows with label 1 alone, because the others were drawn and are no interactions.
        with_users: Write user prompts, not only count.
    """

    user_keys: pa.Array
    users: Texts
    items: Texts
    item_texts: Texts | None
    scenarios: tuple[Scenario, ...]
    identity_digest: str
    max_events: int
    positives_only: bool
    with_users: bool


@dataclass(frozen=True)
class Previous:
    """The user prompts of the last extraction, from which a user with little news keeps its own.

    Attributes:
        files: URIs of its files of user prompts.
        num_buckets: Buckets its users were divided into.
        new_num_buckets: Buckets they are divided into now.
        min_new_events: From so many new liked rows on, a user gets a new prompt.
    """

    files: tuple[str, ...]
    num_buckets: int
    new_num_buckets: int
    min_new_events: int

    def of_bucket(self, file: str) -> list[str]:
        """Returns the old files that can hold users of a new file; both number their bucket by the same hash."""
        step = math.gcd(self.num_buckets, self.new_num_buckets)
        return [old for old in self.files if (_bucket(old) - _bucket(file)) % step == 0]


@dataclass(frozen=True)
class UserPrompts:
    """What came of one bucket: its scenario counts, its prompts, and how many users kept an old one."""

    stats: ScenarioStats
    num_prompts: int
    num_kept: int


def write_user_prompts(subjects: Subjects, rows_uri: str, target_uri: str, previous: Previous | None) -> UserPrompts:
    """Writes the user prompts of one bucket of training rows.

    Args:
        subjects: What prompts are made from.
        rows_uri: The rows; whole users.
        target_uri: Where the prompts go, named as the bucket is.
        previous: The last extraction, where users may keep its prompts.
    """
    rows = storage.read_parquet(rows_uri, profiles.COLUMNS)
    counted = rows.filter(pc.equal(rows["label"], 1)) if subjects.positives_only else rows
    stats = ScenarioStats.count(counted, len(subjects.scenarios))
    if not subjects.with_users:
        return UserPrompts(stats, 0, 0)
    liked = LikedRows.select(rows, subjects.items)
    found = list(
        profiles.user_profiles(
            liked, subjects.user_keys, subjects.users, subjects.items, subjects.scenarios, subjects.max_events
        )
    )
    prompts = [profile.prompt for profile in found]
    table = prompts_table(
        prompts,
        [profile.user_row for profile in found],
        keys_to_arrow(prompt_keys(subjects.identity_digest, prompts)),
        [profile.num_liked for profile in found],
        [profile.last_liked_ms for profile in found],
    )
    num_kept = 0
    if previous is not None and len(table):
        for old_uri in previous.of_bucket(target_uri):
            table, kept = keep_previous(table, storage.read_parquet(old_uri), liked, previous.min_new_events)
            num_kept += kept
    storage.write_parquet(target_uri, table, ROW_GROUP_ROWS)
    return UserPrompts(stats, len(table), num_kept)


def keep_previous(prompts: pa.Table, old: pa.Table, liked: LikedRows, min_new_events: int) -> tuple[pa.Table, int]:
    """Replaces the prompts of users with little news by their old ones.

    An old prompt is kept only if all it quotes must still be training rows: up to the time of its last liked row, the
    user has at least as many liked rows as then.

    Args:
        prompts: User prompts as made now, schema `PROMPTS`, by subject_row.
        old: User prompts of the last extraction, of any users.
        liked: The rows from which `prompts` were made.
        min_new_events: Liked rows since the old prompt was made that call for a new one.

    Returns:
        The prompts, by subject_row, and how many are old ones whose text is not that of the new.
    """
    at = pc.index_in(prompts["subject_id"], value_set=old["subject_id"].combine_chunks())
    known = np.flatnonzero(at.is_valid().to_numpy())
    at = at.drop_null().to_numpy()
    if not len(known):
        return prompts, 0
    rows = prompts["subject_row"].to_numpy()[known]
    now_ms, then_ms = (
        pc.fill_null(column, profiles.NO_TIME).to_numpy()
        for column in (prompts["last_liked_ms"].take(known), old["last_liked_ms"].take(at))
    )
    num_now, num_then = prompts["num_liked"].to_numpy()[known], old["num_liked"].to_numpy()[at]
    num_later = liked.num_later(rows, then_ms)
    num_new = np.maximum(num_later, num_now - num_then)
    keep = (num_new < min_new_events) & (num_now - num_later >= num_then) & (now_ms >= then_ms)
    keep &= keys_differ(prompts["key"].take(known), old["key"].take(at))
    if not keep.any():
        return prompts, 0
    kept = old.take(at[keep]).set_column(
        PROMPTS.get_field_index("subject_row"), "subject_row", pa.array(rows[keep], pa.int32())
    )
    stays = np.ones(len(prompts), dtype=bool)
    stays[known[keep]] = False
    return pa.concat_tables([prompts.filter(pa.array(stays)), kept]).sort_by("subject_row"), int(keep.sum())


def keys_differ(a: pa.ChunkedArray, b: pa.ChunkedArray) -> np.ndarray:
    """Returns where two columns of keys differ."""
    differ: np.ndarray = pc.not_equal(a.combine_chunks(), b.combine_chunks()).to_numpy(zero_copy_only=False)
    return differ


def write_item_prompts(subjects: Subjects, item_keys: pa.Array, first_row: int, target_uri: str) -> int:
    """Writes the prompts of some items and returns their number; items without text have none.

    Args:
        subjects: What prompts are made from.
        item_keys: Raw ids of these items.
        first_row: item_row of the first.
        target_uri: Where the prompts go.
    """
    assert subjects.item_texts is not None
    found = list(profiles.item_prompts(item_keys, subjects.item_texts, first_row, len(item_keys)))
    prompts = [prompt for _, prompt in found]
    keys = keys_to_arrow(prompt_keys(subjects.identity_digest, prompts))
    storage.write_parquet(target_uri, prompts_table(prompts, [row for row, _ in found], keys), ROW_GROUP_ROWS)
    return len(prompts)


def write_scenario_prompts(subjects: Subjects, stats: ScenarioStats, target_uri: str) -> int:
    """Writes the scenario prompts, in the order of the schema, and returns their number.

    Args:
        subjects: What prompts are made from.
        stats: Counts over all training rows.
        target_uri: Where the prompts go.
    """
    prompts = profiles.scenario_prompts(stats, subjects.items, subjects.scenarios, subjects.positives_only)
    keys = keys_to_arrow(prompt_keys(subjects.identity_digest, prompts))
    storage.write_parquet(target_uri, prompts_table(prompts, range(len(prompts)), keys))
    return len(prompts)


def write_sample(files: Sequence[str], target_uri: str) -> None:
    """Writes the first `NUM_SAMPLES` prompts of each level as text, in the order of the files."""
    texts: dict[str, list[str]] = {}
    for file in files:
        level = "item" if "items-" in file else "user" if _BUCKET.search(file) else "scenario"
        have = texts.setdefault(level, [])
        if len(have) < NUM_SAMPLES:
            have += storage.read_parquet(file, ["text"])["text"].slice(0, NUM_SAMPLES - len(have)).to_pylist()
    with storage.atomic_write(target_uri) as target:
        target.write(("\n\n".join(text for have in texts.values() for text in have) + "\n").encode())


def _bucket(uri: str) -> int:
    found = _BUCKET.search(uri)
    assert found, uri
    return int(found.group(1))
