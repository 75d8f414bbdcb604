"""The whole extraction on a tiny prepared directory written by hand, with the embedded encoder and real Ray actors."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4msr import storage, workspace
from llm4msr.config import Config, ConfigError
from llm4msr.data.source import DataError
from llm4msr.knowledge.engines.encoder import Encoder
from llm4msr.knowledge.explain import explain
from llm4msr.knowledge.extraction import Extraction
from llm4msr.knowledge.pipeline import extract
from llm4msr.knowledge.place import knowledge_uri, store_root
from llm4msr.knowledge.prompts import prompts_from_table
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import Feature, FeatureSchema, Scenario, feature_table_schema, rows_schema
from llm4msr.settings import config_from_dict
from llm4msr.storage import StorageError

SCHEMA = FeatureSchema(
    (Scenario("search", "users type a query"), Scenario("feed", "an endless list")),
    (Feature("user_id", "categorical", "user", 9), Feature("item_id", "categorical", "item", 9)),
    "int64",
    "string",
)
ITEMS = ["green tea", "steel pan", "hated knife", "future kettle", "last mixer", ""]  # item rows 1 to 6
# (user_row, item_row, scenario, label, timestamp_ms); users 1 and 3 lie in bucket 0, users 2 and 4 in bucket 1.
TRAIN = [
    [(1, 1, 0, 1, 10), (1, 2, 1, 1, 20), (1, 3, 1, 0, 30), (3, 3, 0, 0, 10)],
    [(2, 2, 1, 1, 10), (2, 6, 1, 1, 20), (4, 1, 0, 1, 5), (4, 1, 0, 1, 6)],
]
LATER = {"valid": [(1, 4, 0, 1, 40), (3, 4, 0, 1, 40)], "test": [(2, 5, 1, 1, 50)]}


def as_table(records: list[tuple], first_row: int) -> pa.Table:
    names = ("user_row", "item_row", "scenario", "label", "timestamp_ms")
    columns = dict(zip(names, zip(*records, strict=True), strict=True))
    order = list(range(first_row, first_row + len(records)))
    columns |= {"row_id": order, "position": order, "moment": order}
    return pa.table(columns).select(rows_schema(SCHEMA).names).cast(
        rows_schema(SCHEMA)
    )  # fmt: skip


def prepare(config: Config, name: str, train: list[list[tuple]], num_users: int = 4, drawn: int = 0) -> None:
    """Writes what `jobs.prepare` would have written."""
    uri = storage.join(workspace.prepared_root(config), name)
    users = {"key": [100 + i for i in range(num_users)], "text": ["24 years old", *[""] * (num_users - 1)]}
    items = {"key": [f"i{n}" for n in range(len(ITEMS))], "text": ITEMS}
    for source, columns, file in (("user", users, "users.parquet"), ("item", items, "items.parquet")):
        count = len(columns["key"])
        columns = columns | {"num_train_rows": [0] * count, f"{source}_id": list(range(2, count + 2))}
        storage.write_parquet(storage.join(uri, file), pa.table(columns, schema=feature_table_schema(SCHEMA, source)))
    files: dict[str, list[dict]] = {}
    for split, buckets in {"train": train, **{s: [r] for s, r in LATER.items()}}.items():
        for bucket, records in enumerate(buckets):
            entry = {"file": f"{split}/bucket-{bucket:05d}.parquet", "num_rows": len(records)}
            storage.write_parquet(storage.join(uri, entry["file"]), as_table(records, 100 * bucket))
            files.setdefault(split, []).append(entry)
    storage.write_json(storage.join(uri, "schema.json"), SCHEMA.to_json())
    storage.write_manifest(
        uri, {"kind": "prepared", "files": files, "num_buckets": 2, "data": {"drawn_negatives": drawn}}
    )
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": name})


def make_config(root: str, **knowledge) -> Config:
    settings = {"num_actors": 1, "rows_per_commit": 2, "dtype": "float32", **knowledge}
    return config_from_dict({"workspace_uri": root, "knowledge": settings})


def summary(uri: str) -> dict:
    return storage.read_json(storage.join(uri, "summary.json"))


def parts(config: Config) -> list[Path]:
    return sorted(Path(store_root(config)).glob("*/part-*.parquet"))


def test_extract_from_prepared_data_to_table(ray_cluster, tmp_path, caplog):
    config = make_config(str(tmp_path))
    with pytest.raises(StorageError, match=r"run jobs\.prepare"):
        knowledge_uri(config)
    prepare(config, "first", TRAIN)
    with pytest.raises(StorageError, match=r"run jobs\.extract"):
        knowledge_uri(config)
    with caplog.at_level(logging.INFO, "llm4msr.knowledge"):
        uri = extract(config)
    assert re.search(r"5 prompts, 5 distinct, 0 already in the store, 5 to encode on 1 actors \(cpu\)", caplog.text)
    assert "encoded 5 prompts in " in caplog.text
    assert knowledge_uri(config) == uri

    # Users 1, 2 and 4 liked something; user 3 did not. The vectors are those of the prompts, by user.
    table = KnowledgeTable.load(uri)
    assert sorted(table.user_index_N[[1, 2, 4]]) == [1, 2, 3]
    assert table.user_index_N[3] == 0 and table.user_index_N.shape == (5,)
    prompts = {p.subject_id: p for p in prompts_from_table(storage.read_parquet(storage.join(uri, "prompts")))}
    assert sorted(prompts) == ["100", "101", "103", "feed", "search"]
    names = ["100", "101", "103", "search", "feed"]
    expected = Encoder(config.knowledge, "cpu").encode([prompts[n] for n in names]).vectors
    got = np.concatenate([table.users_NK[table.user_index_N[[1, 2, 4]]], table.scenarios_SK])
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert np.abs(expected[0] - expected[1]).max() > 0.05

    # Nothing of valid, test or disliked rows is quoted.
    text = (Path(uri) / "prompts.txt").read_text()
    assert "Liked in search (2): green tea (x2)" in text and "Liked in feed (2, 1 untitled): steel pan" in text
    quoted = str(storage.read_parquet(storage.join(uri, "prompts")).to_pylist())
    assert not re.search("knife|kettle|mixer", quoted + text)

    found = summary(uri)
    assert (found["num_prompts"], found["num_encoded"], found["num_cached"], found["num_failed"]) == (5, 5, 0, 0)
    assert (found["num_users"], found["num_users_with_knowledge"], found["width"]) == (4, 3, 384)
    assert (found["num_dropped_events"], found["num_truncated_prompts"]) == (0, 0)
    assert len(parts(config)) == 3  # five prompts, two to a commit
    assert storage.read_manifest(uri, "")["summary"] == found

    with caplog.at_level(logging.INFO, "llm4msr.knowledge"):
        assert extract(config) == uri
    assert f"{uri} is up to date" in caplog.text and summary(uri) == found


def test_users_made_of_items_need_no_prompts_of_users(ray_cluster, tmp_path):
    config = make_config(str(tmp_path), levels=["scenario", "user", "item"], user_vectors="items")
    prepare(config, "first", TRAIN)
    uri = extract(config)
    table = KnowledgeTable.load(uri)
    prompts = storage.read_parquet(storage.join(uri, "prompts"))
    assert sorted(set(prompts["level"].to_pylist())) == ["item", "scenario"]
    # Users 1, 2 and 4 liked an item with a text, user 4 the same one twice; item 6 has none, and user 3 liked nothing.
    assert (table.user_index_N > 0).tolist() == [False, True, True, False, True]
    assert summary(uri)["num_users_with_knowledge"] == 3 and summary(uri)["num_users"] == 4
    items_NK = table.items_NK[1:].astype(np.float64)
    mean_K, std_K = items_NK.mean(0), np.maximum(items_NK.std(0), 1e-6)

    def unit(vector):
        return vector / np.linalg.norm(vector)

    tea, pan = (unit((table.items_NK[table.item_index_N[row]] - mean_K) / std_K) for row in (1, 2))
    np.testing.assert_allclose(table.users_NK[table.user_index_N[1]], unit(tea + pan), atol=1e-3)
    np.testing.assert_allclose(table.users_NK[table.user_index_N[4]], tea, atol=1e-3)
    assert table.folds is not None and table.folds.index_FN.shape == (2, 5)
    explained = explain(Extraction.open(str(tmp_path)), "user", "100")
    assert explained.has_knowledge and explained.prompt is None
    assert any("mean of those of the items" in note for note in explained.notes)
    # The published way, from the same store: nothing of the items is read twice.
    prompted = make_config(str(tmp_path), levels=["scenario", "user", "item"])
    other = extract(prompted)
    assert other != uri and KnowledgeTable.load(other).folds is None
    assert summary(other)["num_encoded"] == 3


def test_only_what_the_store_lacks_is_encoded(ray_cluster, tmp_path):
    config = make_config(str(tmp_path))
    prepare(config, "first", TRAIN)
    first = extract(config)
    before = KnowledgeTable.load(first).users_NK.copy()

    # Killed after the commits, before the manifest: nothing is encoded again.
    storage.remove(storage.join(first, "manifest.json"))
    with pytest.raises(StorageError, match=r"run jobs\.extract again"):
        knowledge_uri(config)
    assert extract(config) == first
    assert (summary(first)["num_encoded"], summary(first)["num_cached"]) == (0, 5)

    # A lost part: its keys are encoded again, into the same file.
    lost = parts(config)[0]
    keys = pq.read_table(lost)["key"].to_pylist()
    lost.unlink()
    storage.remove(storage.join(first, "manifest.json"))
    extract(config)
    assert (summary(first)["num_encoded"], summary(first)["num_cached"]) == (len(keys), 5 - len(keys))
    assert lost in parts(config)
    np.testing.assert_allclose(KnowledgeTable.load(first).users_NK, before, atol=2e-3)

    # New users: theirs and the scenarios' prompts (their counts changed) are encoded, and another directory written.
    more = [*TRAIN, [(5, 2, 0, 1, 10), (6, 2, 0, 1, 10)]]
    prepare(config, "second", more, num_users=6)
    second = extract(config)
    assert second != first and knowledge_uri(config) == second
    # Users 5 and 6 have one prompt between them, in equal words.
    found = summary(second)
    assert (found["num_prompts"], found["num_distinct_prompts"]) == (7, 6)
    assert (found["num_cached"], found["num_encoded"]) == (3, 3)
    table = KnowledgeTable.load(second)
    assert table.num_users_with_knowledge == 5
    np.testing.assert_array_equal(*table.users_NK[table.user_index_N[[5, 6]]])

    # A damaged part stops the job and is named.
    broken = parts(config)[0]
    broken.write_bytes(b"PAR1")
    storage.remove(storage.join(second, "manifest.json"))
    with pytest.raises(StorageError, match=broken.name):
        extract(config)


def test_drawn_negatives_are_no_interactions(ray_cluster, tmp_path):
    config = make_config(str(tmp_path))
    prepare(config, "given", TRAIN)
    given = (Path(extract(config)) / "prompts.txt").read_text()
    assert given.startswith("Scenario search: users type a query. 4 interactions, 75.0% positive, 3 users, 2 items.\n")
    prepare(config, "drawn", TRAIN, drawn=2)
    drawn = (Path(extract(config)) / "prompts.txt").read_text()
    assert drawn.startswith(
        "Scenario search: users type a query. 3 interactions, 2 users, 1 items.\n"
        "Other scenario feed: an endless list. 3 interactions, 2 users, 2 items; "
        "50.0% of search's users are here too.\n"
    )
    assert "positive" not in drawn
    # What the users liked is the same.
    assert drawn[drawn.index("User: ") :] == given[given.index("User: ") :]


def test_nobody_liked_anything(ray_cluster, tmp_path):
    config = make_config(str(tmp_path))
    prepare(config, "first", [[(1, 1, 0, 0, 10), (2, 2, 1, 0, 20)]])
    with pytest.raises(DataError, match="no user has a training row with label 1"):
        extract(config)


def test_too_many_actors_are_refused(ray_cluster, tmp_path):
    config = make_config(str(tmp_path), num_actors=500)
    prepare(config, "first", TRAIN)
    with pytest.raises(ConfigError, match=r"knowledge\.num_actors 500: the cluster has 4 CPUs"):
        extract(config)


def test_workspace_in_an_object_store(ray_cluster, bucket):
    config = make_config(f"s3://{bucket}/ws")
    prepare(config, "first", TRAIN)
    uri = extract(config)
    assert uri == knowledge_uri(config) and uri.startswith(f"s3://{bucket}/ws/knowledge/")
    table = KnowledgeTable.load(uri)
    assert table.num_users_with_knowledge == 3 and table.width == 384
    assert summary(uri)["num_encoded"] == 5
    stored = storage.list_files(store_root(config))
    parts = [name.rsplit("/", 1)[-1].partition("-")[0] for name, _ in stored]
    assert parts[0] == "identity.json" and len(parts) > 1 and set(parts[1:]) == {"part"}
