"""The first stage of an extraction: prompts of all users, items and scenarios, written to files by Ray tasks.

Memory is bounded by one bucket of users per task; the texts of users and items are in each node's object store once.
A stage that was finished is not done again: its manifest lists its files.
"""

from __future__ import annotations

from typing import Any

import ray

from llm4msr import storage
from llm4msr.config import KnowledgeConfig
from llm4msr.data.prepared import PreparedData
from llm4msr.data.source import DataError
from llm4msr.knowledge import profiles
from llm4msr.knowledge.plan import PromptSet, read_prompt_set
from llm4msr.knowledge.profiles import MAX_ITEM_CHARACTERS, ScenarioStats
from llm4msr.knowledge.prompt_files import (
    Previous,
    Subjects,
    write_item_prompts,
    write_sample,
    write_scenario_prompts,
    write_user_prompts,
)

SCENARIOS_FILE = "scenarios.parquet"
ITEMS_PER_FILE = 100_000


def all_prompts(
    root: str,
    sample_uri: str,
    prepared: PreparedData,
    settings: KnowledgeConfig,
    identity_digest: str,
    previous: str | None,
) -> tuple[PromptSet, dict[str, int]]:
    """Writes all prompts, or finds them written by a run that was killed later.

    Args:
        root: Directory of the prompts.
        sample_uri: A text file with a few of them, to be read by people.
        prepared: What they are about.
        settings: Which levels, and how much is quoted.
        identity_digest: Of the encoder.
        previous: Directory of the prompts of the last extraction, from which users with little news keep their own.

    Returns:
        The prompts; num_users, num_items, and num_kept: users with an old prompt.

    Raises:
        DataError: There is nothing to ask about.
        StorageError: The files are not those that were written.
    """
    if not storage.is_finished(root):
        storage.write_manifest(root, _write(root, sample_uri, prepared, settings, identity_digest, previous))
    manifest = storage.read_manifest(root, "run jobs.extract again")
    prompts = read_prompt_set([(storage.join(root, file["file"]), file["level"]) for file in manifest["files"]])
    if len(prompts.keys_P) != sum(file["num_prompts"] for file in manifest["files"]):
        raise storage.StorageError(f"{root}: its files do not hold the prompts that manifest.json says; remove it")
    return prompts, manifest["counts"]


def _write(
    root: str,
    sample_uri: str,
    prepared: PreparedData,
    settings: KnowledgeConfig,
    identity_digest: str,
    previous: str | None,
) -> dict[str, Any]:
    users, items = prepared.users().select(["key", "text"]), prepared.items().select(["key", "text"])
    subjects = Subjects(
        user_keys=users["key"].combine_chunks(),
        users=profiles.clean_texts(users["text"]),
        items=profiles.clean_texts(items["text"]),
        item_texts=profiles.clean_texts(items["text"], MAX_ITEM_CHARACTERS) if "item" in settings.levels else None,
        scenarios=prepared.schema.scenarios,
        identity_digest=identity_digest,
        max_events=settings.max_events_per_scenario,
        # Drawn negatives are no interactions: nothing is said of them.
        positives_only=prepared.manifest["data"].get("drawn_negatives", 0) > 0,
        with_users="user" in settings.levels and settings.user_vectors == "prompt",
    )
    shared = ray.put(subjects)
    old = None if previous is None else _previous(previous, prepared, settings)
    # Files of an earlier attempt, which was killed or had other buckets.
    storage.remove(root)
    write_users, write_items = ray.remote(write_user_prompts), ray.remote(write_item_prompts)
    files = [(uri, uri.rsplit("/", 1)[-1]) for uri, _ in prepared.files("train")]
    users_done = [write_users.remote(shared, uri, storage.join(root, name), old) for uri, name in files]
    item_files: list[dict[str, Any]] = []
    if "item" in settings.levels:
        for number, first in enumerate(range(0, len(items), ITEMS_PER_FILE)):
            keys, name = items["key"].slice(first, ITEMS_PER_FILE).combine_chunks(), f"items-{number:05d}.parquet"
            task = write_items.remote(shared, keys, first + 1, storage.join(root, name))
            item_files.append({"file": name, "level": "item", "num_prompts": task})
    stats, num_prompts, num_kept = _gather(users_done)
    if not stats.pair_positive_P.any():
        raise DataError(
            f"{prepared.uri}: no user has a training row with label 1, so there is nothing to ask the language model; "
            "check the labels of the raw data and data.split"
        )
    entries: list[dict[str, Any]] = []
    if "scenario" in settings.levels:
        number = write_scenario_prompts(subjects, stats, storage.join(root, SCENARIOS_FILE))
        entries.append({"file": SCENARIOS_FILE, "level": "scenario", "num_prompts": number})
    for (_, name), number in zip(files, num_prompts, strict=True):
        if number:
            entries.append({"file": name, "level": "user", "num_prompts": number})
    entries += [file | {"num_prompts": ray.get(file["num_prompts"])} for file in item_files]
    if not any(entry["num_prompts"] for entry in entries):
        raise DataError(
            f"{prepared.uri}: there is nothing to ask about at knowledge.levels = {list(settings.levels)}: no known "
            "user liked anything, or no item has a text (data.table.item_text_columns)"
        )
    write_sample([storage.join(root, entry["file"]) for entry in entries], sample_uri)
    counts = {"num_users": len(users), "num_items": len(items), "num_kept": num_kept}
    return {"files": entries, "counts": counts, "num_buckets": prepared.manifest["num_buckets"]}


def _gather(tasks: list[ray.ObjectRef[Any]]) -> tuple[ScenarioStats, list[int], int]:
    """Returns the counts of all buckets, added up as they come in, the prompts of each, and users that kept theirs."""
    stats, num_prompts, num_kept = None, [0] * len(tasks), 0
    place_of, waiting = {task: i for i, task in enumerate(tasks)}, tasks
    while waiting:
        (task,), waiting = ray.wait(waiting)
        part = ray.get(task)
        stats = part.stats if stats is None else ScenarioStats.merge([stats, part.stats])
        num_prompts[place_of[task]] = part.num_prompts
        num_kept += part.num_kept
        del place_of[task]
    assert stats is not None
    return stats, num_prompts, num_kept


def _previous(root: str, prepared: PreparedData, settings: KnowledgeConfig) -> Previous:
    manifest = storage.read_manifest(root, "run jobs.extract again")
    return Previous(
        tuple(storage.join(root, file["file"]) for file in manifest["files"] if file["level"] == "user"),
        manifest["num_buckets"],
        prepared.manifest["num_buckets"],
        settings.refresh_min_new_events,
    )
