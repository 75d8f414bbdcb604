"""Writes the prompts of one data set to files: Parquet to encode from, and a text file to read.

These are the bodies of Ray tasks, kept apart from the encoder so that a process that writes prompts does not load it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.knowledge import profiles
from llm4msr.knowledge.profiles import ScenarioStats, Texts
from llm4msr.knowledge.prompts import prompts_table
from llm4msr.knowledge.store import prompt_keys
from llm4msr.schema import Scenario

NUM_SAMPLE_USERS = 20


def write_user_prompts(
    entities: tuple[pa.Array, Texts, Texts],
    rows_uri: str,
    target_uri: str,
    identity_digest: str,
    scenarios: tuple[Scenario, ...],
    max_events: int,
    positives_only: bool,
) -> tuple[ScenarioStats, pa.Table]:
    """Writes the user prompts of one file of training rows.

    Args:
        entities: Raw ids of the users, texts of the users, texts of the items.
        rows_uri: The rows.
        target_uri: Where the prompts go.
        identity_digest: Of the encoder.
        scenarios: Of the schema, in order.
        max_events: Item texts quoted per scenario.
        positives_only: Count rows with label 1 alone, because the others were drawn and are no interactions.

    Returns:
        The file's scenario counts, and subject_row and key of its prompts in order.
    """
    rows = storage.read_parquet(rows_uri, profiles.COLUMNS)
    subjects = list(profiles.user_prompts(rows, *entities, scenarios, max_events))
    prompts = [prompt for _, prompt in subjects]
    table = prompts_table(prompts, [row for row, _ in subjects], prompt_keys(identity_digest, prompts))
    storage.write_parquet(target_uri, table)
    counted = rows.filter(pc.equal(rows["label"], 1)) if positives_only else rows
    return ScenarioStats.count(counted, len(scenarios)), table.select(["subject_row", "key"])


def write_scenario_prompts(
    stats: ScenarioStats,
    items: Texts,
    scenarios: tuple[Scenario, ...],
    target_uri: str,
    identity_digest: str,
    positives_only: bool,
) -> pa.Table:
    """Writes the scenario prompts, in the order of the schema.

    Args:
        stats: Counts over all files of training rows.
        items: Texts of the items.
        scenarios: Of the schema, in order.
        target_uri: Where the prompts go.
        identity_digest: Of the encoder.
        positives_only: As given to `write_user_prompts`.

    Returns:
        The prompts as written, schema `prompts.PROMPTS`.
    """
    prompts = profiles.scenario_prompts(stats, items, scenarios, positives_only)
    table = prompts_table(prompts, range(len(prompts)), prompt_keys(identity_digest, prompts))
    storage.write_parquet(target_uri, table)
    return table


def write_sample(scenario_texts: Sequence[str], user_files: Sequence[str], target_uri: str) -> None:
    """Writes the scenario prompts and the first `NUM_SAMPLE_USERS` user prompts as text."""
    users: list[str] = []
    for file in user_files:
        if len(users) < NUM_SAMPLE_USERS:
            users += storage.read_parquet(file, ["text"])["text"].slice(0, NUM_SAMPLE_USERS - len(users)).to_pylist()
    with storage.atomic_write(target_uri) as file:
        file.write(("\n\n".join([*scenario_texts, *users]) + "\n").encode())
