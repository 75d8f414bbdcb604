"""Tiny prepared data, knowledge and checkpoints with known content, written as the pipeline would write them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import torch

from llm4msr import storage
from llm4msr.config import Config
from llm4msr.data.history import Moments, likes, log_columns, place_rows, write_logs
from llm4msr.data.prepared import (
    ITEMS_FILE,
    REJECTS_FILE,
    SCHEMA_FILE,
    USERS_FILE,
    PreparedData,
    bucket_file,
    vocabulary_uri,
)
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.schema import REJECTS, SPLITS, Feature, FeatureSchema, Scenario, feature_table_schema, rows_schema
from llm4msr.settings import config_from_dict
from llm4msr.training.saving import save_checkpoint
from llm4msr.training.tensors import write_tensors

NUM_USERS, NUM_ITEMS, NUM_GENRES = 40, 30, 5
SEARCH_SOURCES = ["box", "suggestion"]
WORDS = ["red", "green", "blue"]
# What histories and lists of the context may be; `tiny_prepared` adds them where asked.
SEQUENCES = (
    Feature("liked", "history", "user", max_length=5, log="all", pooling="attention"),
    Feature("found", "history", "user", max_length=3, log="search"),
    Feature("words", "sequence", "context", len(WORDS) + 2, max_length=2),
)


def tiny_schema(user_key_type: str = "int64", more: tuple[Feature, ...] = ()) -> FeatureSchema:
    """Two scenarios; every kind and source of feature but those of `SEQUENCES`, which may be added."""
    features = (
        Feature("user_id", "categorical", "user", NUM_USERS + 2),
        Feature("age", "numeric", "user", mean=40.0, std=10.0),
        Feature("item_id", "categorical", "item", NUM_ITEMS + 2),
        Feature("genre", "categorical", "item", NUM_GENRES + 2),
        Feature("tags", "sequence", "item", 6, max_length=3),
        Feature("search_source", "categorical", "context", len(SEARCH_SOURCES) + 2),
        Feature("price", "numeric", "context", mean=5.0, std=2.0),
        *more,
    )
    return FeatureSchema(
        scenarios=(Scenario("rec", "Recommended items."), Scenario("search", "Searched items.")),
        features=tuple(sorted(features, key=lambda f: ("user", "item", "context").index(f.source))),
        user_key_type=user_key_type,
        item_key_type="int64",
    )


def tiny_prepared(
    uri: str,
    num_rows: int = 1200,
    seed: int = 0,
    user_key_type: str = "int64",
    more: tuple[Feature, ...] = (),
) -> PreparedData:
    """Writes a prepared directory: users 1000.., items 7000.. (one id beyond 2**53), two buckets, learnable labels.

    With features of `SEQUENCES` the splits follow one another in time.
    """
    rng = np.random.default_rng(seed)
    schema = tiny_schema(user_key_type, more)
    user_keys = (
        [f"u{i:03d}" for i in range(NUM_USERS)] if user_key_type == "string" else list(range(1000, 1000 + NUM_USERS))
    )
    item_keys = [*range(7000, 7000 + NUM_ITEMS - 1), 2**53 + 1]
    genre = rng.integers(0, NUM_GENRES, NUM_ITEMS)
    storage.write_json(storage.join(uri, SCHEMA_FILE), schema.to_json())
    users = {
        "key": user_keys,
        "text": [f"user {k}" for k in user_keys],
        "num_train_rows": [1] * NUM_USERS,
        "user_id": np.arange(2, NUM_USERS + 2, dtype=np.int32),
        "age": rng.normal(size=NUM_USERS).astype(np.float32),
    }
    items = {
        "key": item_keys,
        "text": [f"genre {g}" for g in genre],
        "num_train_rows": [1] * NUM_ITEMS,
        "item_id": np.arange(2, NUM_ITEMS + 2, dtype=np.int32),
        "genre": (genre + 2).astype(np.int32),
        "tags": [[2, 3 + int(g) % 3, 0] for g in genre],
    }
    for name, source, columns in ((USERS_FILE, "user", users), (ITEMS_FILE, "item", items)):
        table = pa.table(columns, schema=feature_table_schema(schema, source))
        storage.write_parquet(storage.join(uri, name), table)
    vocabularies = {"genre": "abcde", "tags": "wxyz", "search_source": SEARCH_SOURCES, "words": WORDS}
    for feature, values in vocabularies.items():
        storage.write_parquet(vocabulary_uri(uri, feature), pa.table({"value": list(values)}))
    taste = rng.normal(size=(2, NUM_USERS, NUM_GENRES)) * 2
    files, report_rows, row_id, places, tables = {}, [], 0, [], []
    for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        files[split] = []
        counts = {"rec": [0, 0], "search": [0, 0]}
        for bucket in range(2):
            count = int(num_rows * share) // 2
            user = rng.integers(0, NUM_USERS // 2, count) * 2 + bucket
            item, scenario = rng.integers(0, NUM_ITEMS, count), rng.integers(0, 2, count)
            label = rng.random(count) < 1 / (1 + np.exp(-taste[scenario, user, genre[item]]))
            columns = {
                "row_id": np.arange(row_id, row_id + count),
                "user_row": (user + 1).astype(np.int32),
                "item_row": (item + 1).astype(np.int32),
                "scenario": scenario.astype(np.int32),
                "label": label.astype(np.int8),
                "timestamp_ms": rng.integers(0, 10**12, count),
                "position": np.arange(count),
                "moment": np.arange(count),
                "search_source": np.where(scenario == 1, rng.integers(2, 4, count), 0),
                "price": rng.normal(size=count).astype(np.float32),
            }
            if more:
                columns["timestamp_ms"] += SPLITS.index(split) * 10**12
                words = np.where(scenario == 1, rng.integers(1, 5, (2, count)), 0)
                columns["words"] = pa.array(words.T.tolist())
            places.append(bucket_file(split, bucket))
            tables.append(pa.table(columns).append_column("split", pa.array([SPLITS.index(split)] * count)))
            files[split].append({"file": bucket_file(split, bucket), "num_rows": count})
            row_id += count
            for s, name in enumerate(counts):
                counts[name][0] += int((scenario == s).sum())
                counts[name][1] += int(label[scenario == s].sum())
        counts["all"] = [sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values())]
        report_rows += [
            {"split": split, "scenario": name, "num_rows": n, "num_positives": p} for name, (n, p) in counts.items()
        ]
    for place, table in zip(places, tiny_logs(uri, tables, schema), strict=True):
        rows = table.select(rows_schema(schema).names).cast(rows_schema(schema))
        storage.write_parquet(storage.join(uri, place), rows, row_group_size=100)
    storage.write_parquet(storage.join(uri, REJECTS_FILE), REJECTS.empty_table())
    storage.write_manifest(uri, {"kind": "prepared", "data": {"rows": report_rows}, "files": files})
    return PreparedData.open(uri)


def tiny_logs(uri: str, tables: list[pa.Table], schema: FeatureSchema) -> list[pa.Table]:
    """Writes the logs that the schema's histories read; returns the tables with each row's place in them."""
    logs = log_columns(schema.select("history"), schema.scenario_names)
    if not logs:
        return tables
    rows = pa.concat_tables(tables)
    user_row_R, timestamp_ms_R = rows["user_row"].to_numpy(), rows["timestamp_ms"].to_numpy()
    order = np.lexsort((timestamp_ms_R, user_row_R))
    user_row_R, timestamp_ms_R, position_R = user_row_R[order], timestamp_ms_R[order], np.zeros(len(order), int)
    rows = place_rows(rows.take(pa.array(order)), Moments(user_row_R, timestamp_ms_R, position_R), logs)
    write_logs(uri, likes(rows, timestamp_ms_R, position_R), NUM_USERS, logs)
    rows = rows.sort_by("row_id")
    first = np.cumsum([0, *(len(table) for table in tables)])
    return [rows.slice(a, b - a) for a, b in itertools.pairwise(first.tolist())]


def tiny_knowledge(width: int = 8, seed: int = 0, items: bool = False) -> KnowledgeTable:
    """Random vectors; the last five users have none, nor, where items have any, the last four items."""
    rng = np.random.default_rng(seed)
    users_NK, user_index_N = tiny_vectors(rng, NUM_USERS, NUM_USERS - 5, width)
    scenarios_SK = rng.normal(size=(2, width)).astype(np.float32)
    items_NK, item_index_N = tiny_vectors(rng, NUM_ITEMS, NUM_ITEMS - 4 if items else 0, width)
    return KnowledgeTable(users_NK, user_index_N, scenarios_SK, items_NK, item_index_N)


def tiny_vectors(rng: np.random.Generator, num_rows: int, num_with: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One random vector for each of the first `num_with` rows, row 0 in front; and the index of all rows."""
    vectors_NK = rng.normal(size=(num_with + 1, width)).astype(np.float16)
    vectors_NK[0] = 0
    index_N = np.zeros(num_rows + 1, np.int32)
    index_N[1 : num_with + 1] = np.arange(1, num_with + 1)
    return vectors_NK, index_N


def tiny_config(**tree) -> Config:
    """A configuration for small models; sections are given as dictionaries."""
    base = {
        "workspace_uri": "unused",
        "model": {"embedding_dim": 4, "hidden_dims": [16, 8], "tower_dims": [8]},
        "train": {"num_workers": 0, "batch_size": 64, "max_epochs": 2, "learning_rate": 0.01},
    }
    for section, values in tree.items():
        base[section] = {**base[section], **values} if isinstance(base.get(section), dict) else values
    return config_from_dict(base)


def tiny_checkpoint(
    uri: str, prepared: PreparedData, knowledge: KnowledgeTable | None, /, seed: int = 0, **tree
) -> str:
    """Writes a checkpoint with random weights large enough that scores differ; returns its place."""
    config = tiny_config(**tree)
    torch.manual_seed(seed)
    if knowledge is None:
        model = build_model(prepared.schema, config.model, None)
    else:
        model = build_model(prepared.schema, config.model, knowledge.width, knowledge.has_items)
        set_knowledge(model, knowledge)
    with torch.no_grad():
        for table in (*model.embedding.tables, *model.embedding.sequence_tables):
            table.weight[1:].normal_(std=1.0)
        small = list(model.user_meta.layers) if model.user_meta and config.model.meta.residual else []
        small += model.scenario_meta.layers[-1:] if model.scenario_meta else []
        for layer in small:  # what they add, before they are trained
            (layer.weight_head.weight if layer.full else layer.up_RH).mul_(10)
    metadata = {
        "model_version": f"tiny-{seed}",
        "backbone": config.model.backbone,
        "knowledge": "llm" if knowledge else "none",
        "seed": seed,
        "prepared": prepared.uri.rsplit("/", 1)[-1],
        "valid_auc": 0.5,
    }
    weights_uri = f"{uri}.safetensors"
    write_tensors(weights_uri, model.state_dict())
    save_checkpoint(uri, config, prepared, knowledge, weights_uri, metadata)
    storage.remove(weights_uri)
    return uri
