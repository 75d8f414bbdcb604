"""What the tests of a disturbed extraction share: prepared data by hand, its recipe, and a job that can be killed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from unit.endpoint_server import WIDTH, vector_of

from llm4msr import storage, workspace
from llm4msr.config import Config
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE, bucket_file
from llm4msr.data.splits import bucket_of
from llm4msr.knowledge.place import store_root
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import Feature, FeatureSchema, Scenario, feature_table_schema, rows_schema
from llm4msr.settings import config_from_dict

SCHEMA = FeatureSchema(
    (Scenario("search", "users type a query"), Scenario("feed", "an endless list")),
    (Feature("user_id", "categorical", "user", 9), Feature("item_id", "categorical", "item", 9)),
    "int64",
    "string",
)
MODEL = "served-model"


class Row(NamedTuple):
    """One training row; `user` is the raw id, `item` counts from 1."""

    user: int
    item: int
    scenario: int
    label: int
    time_ms: int


class World(NamedTuple):
    """Raw users with their texts, items (row 1 first), and what happened."""

    users: dict[int, str]
    items: list[str]
    rows: list[Row]


def many_users(number: int) -> World:
    """Users 1000 to 1000 + number: every 100th is like the one before it but for the id, every 97th likes nothing."""
    items = [f"item {letter}{digit}" for letter in "abcdefgh" for digit in range(5)]
    users, rows = {}, []
    for i in range(number):
        twin, likes = i - (i % 100 == 1), i % 97 != 50
        users[1000 + i] = f"reader {twin}"
        for event in range(3):
            rows.append(Row(1000 + i, 1 + (twin * 7 + event * 11) % 40, event % 2, int(likes), 100 * event))
    return World(users, items, rows)


def write_prepared(config: Config, name: str, world: World, num_buckets: int = 4) -> None:
    """Writes what `jobs.prepare` would have written, train alone, and points to it."""
    uri = storage.join(workspace.prepared_root(config), name)
    keys = sorted(world.users)
    users = {"key": keys, "text": [world.users[key] for key in keys]}
    items = {"key": [f"i{n}" for n in range(1, len(world.items) + 1)], "text": world.items}
    for source, columns, file in (("user", users, USERS_FILE), ("item", items, ITEMS_FILE)):
        count = len(columns["key"])
        columns = columns | {"num_train_rows": [0] * count, f"{source}_id": list(range(2, count + 2))}
        storage.write_parquet(storage.join(uri, file), pa.table(columns, schema=feature_table_schema(SCHEMA, source)))
    bucket = bucket_of(pa.array([row.user for row in world.rows], pa.int64()), num_buckets)
    row_of = {key: i + 1 for i, key in enumerate(keys)}
    files = []
    for number in np.unique(bucket).tolist():
        rows = [world.rows[i] for i in np.flatnonzero(bucket == number)]
        columns = {
            "row_id": np.flatnonzero(bucket == number),
            "user_row": [row_of[row.user] for row in rows],
            "item_row": [row.item for row in rows],
            "scenario": [row.scenario for row in rows],
            "label": [row.label for row in rows],
            "timestamp_ms": [row.time_ms for row in rows],
            "position": list(range(len(rows))),
            "moment": list(range(len(rows))),
        }
        file = bucket_file("train", number)
        storage.write_parquet(storage.join(uri, file), pa.table(columns).cast(rows_schema(SCHEMA)))
        files.append({"file": file, "num_rows": len(rows)})
    storage.write_json(storage.join(uri, SCHEMA_FILE), SCHEMA.to_json())
    manifest = {"kind": "prepared", "files": {"train": files}, "num_buckets": num_buckets, "data": {}}
    storage.write_manifest(uri, manifest)
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": name})


def recipe(root: str, url: str, **knowledge: Any) -> dict[str, Any]:
    """The tree of a configuration whose vectors come from the endpoint at `url`."""
    settings = {"engine": "openai", "model": MODEL, "num_actors": 2, "rows_per_commit": 16} | knowledge
    settings["openai"] = {"base_url": url} | settings.get("openai", {})
    return {"workspace_uri": root, "knowledge": settings}


def make_config(root: str, url: str, **knowledge: Any) -> Config:
    return config_from_dict(recipe(root, url, **knowledge))


def summary(uri: str) -> dict[str, Any]:
    return storage.read_json(storage.join(uri, "summary.json"))


def prompts(uri: str) -> list[dict[str, Any]]:
    """The prompts of an extraction: level, subject_id, subject_row, key and text of each."""
    names = ["level", "subject_id", "subject_row", "key", "text"]
    return storage.read_parquet(storage.join(uri, "prompts"), names).to_pylist()


def part_files(config: Config) -> list[str]:
    """Every finished part of every store, found without the project's own listing."""
    fs, path = storage.filesystem(store_root(config))
    fs.invalidate_cache()
    found = fs.find(path) if fs.exists(path) else []
    return sorted(name for name in found if name.rsplit("/", 1)[-1].startswith("part-"))


def stored_rows(config: Config) -> list[dict[str, Any]]:
    """Every row of every part, read as plain Parquet files."""
    fs, _ = storage.filesystem(store_root(config))
    return [row for name in part_files(config) for row in pq.read_table(io.BytesIO(fs.cat_file(name))).to_pylist()]


def check_table(uri: str, failed: Sequence[str] = ()) -> KnowledgeTable:
    """Compares every vector of a table with what the endpoint answers to the prompt; subjects in `failed` have none."""
    table = KnowledgeTable.load(uri)
    given = {"user": np.zeros_like(table.user_index_N), "item": np.zeros_like(table.item_index_N)}
    for prompt in prompts(uri):
        row, expected = prompt["subject_row"], np.array(vector_of(prompt["text"]), np.float16)
        if prompt["subject_id"] in failed:
            expected = np.zeros(WIDTH, np.float16)
        else:
            given.get(prompt["level"], np.zeros(len(SCHEMA.scenarios)))[row] = 1
        vectors, index = {
            "user": (table.users_NK, table.user_index_N),
            "item": (table.items_NK, table.item_index_N),
            "scenario": (table.scenarios_SK, np.arange(len(SCHEMA.scenarios))),
        }[prompt["level"]]
        np.testing.assert_array_equal(vectors[index[row]], expected, err_msg=prompt["text"])
    np.testing.assert_array_equal(table.user_index_N > 0, given["user"])
    np.testing.assert_array_equal(table.item_index_N > 0, given["item"])
    return table
