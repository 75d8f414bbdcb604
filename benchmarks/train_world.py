"""Data for the benchmarks of training: a prepared directory of any number of rows, as ``jobs.prepare`` lays it out.

Written directly, one bucket at a time, so that memory is that of a bucket (some 1.3 M rows) whatever the size. Users'
activity is lognormal and items' popularity follows Zipf's law, as in logs. Labels come from a planted logistic model
of a few latent factors, so there is something to learn. Popular items are scattered over the ids.

The knowledge table holds a random unit vector for each user and for both scenarios: its content is of no matter for
speed. Items have none.

Axes: U users, I items, R rows of a bucket, K knowledge width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.data.buckets import ROW_GROUP_ROWS
from llm4msr.data.prepared import (
    ITEMS_FILE,
    REJECTS_FILE,
    SCHEMA_FILE,
    USERS_FILE,
    PreparedData,
    bucket_file,
    vocabulary_uri,
)
from llm4msr.data.shards import BYTES_PER_BUCKET
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import (
    FIRST_INDEX,
    REJECTS,
    SPLITS,
    Feature,
    FeatureSchema,
    Scenario,
    feature_table_schema,
    rows_schema,
)

CSV_BYTES_PER_ROW = 100  # of an interaction log such as KuaiSAR's: it decides how many buckets there are
SCENARIOS = ("recommendation", "search")
NUM_USER_GROUPS, NUM_AGES, NUM_CATEGORIES, NUM_AUTHORS, NUM_TAGS, NUM_SOURCES = 20, 8, 100, 5000, 2000, 8
TAGS_LENGTH = 5
NUM_FACTORS = 4
FIRST_USER_KEY, FIRST_ITEM_KEY = 1_000_000, 5_000_000


@dataclass(frozen=True)
class World:
    """Size of the data; the defaults are like KuaiSAR's small release.

    Attributes:
        num_rows: Rows of train.
        num_users: U.
        num_items: I.
        num_valid_rows: Rows of valid; there is no test.
        knowledge_width: K.
        seed: Of everything.
    """

    num_rows: int = 1_000_000
    num_users: int = 10_000
    num_items: int = 50_000
    num_valid_rows: int = 20_000
    knowledge_width: int = 384
    seed: int = 0

    @property
    def num_buckets(self) -> int:
        """As many as jobs.prepare makes of logs of this size: a power of two."""
        return 1 << (max(-(-self.num_rows * CSV_BYTES_PER_ROW // BYTES_PER_BUCKET), 2) - 1).bit_length()


def world_schema(num_users: int, num_items: int) -> FeatureSchema:
    """Returns the features: ids, two categorical ones of users and of items, one sequence of items, one context."""
    return FeatureSchema(
        scenarios=tuple(Scenario(name, f"A {name} page.") for name in SCENARIOS),
        features=(
            Feature("user_id", "categorical", "user", num_users + FIRST_INDEX),
            Feature("user_group", "categorical", "user", NUM_USER_GROUPS + FIRST_INDEX),
            Feature("user_age", "categorical", "user", NUM_AGES + FIRST_INDEX),
            Feature("item_id", "categorical", "item", num_items + FIRST_INDEX),
            Feature("category", "categorical", "item", NUM_CATEGORIES + FIRST_INDEX),
            Feature("author", "categorical", "item", NUM_AUTHORS + FIRST_INDEX),
            Feature("tags", "sequence", "item", NUM_TAGS + FIRST_INDEX, max_length=TAGS_LENGTH),
            Feature("search_source", "categorical", "context", NUM_SOURCES + FIRST_INDEX),
        ),
        user_key_type="int64",
        item_key_type="int64",
    )


def zipf_indices(rng: np.random.Generator, vocabulary: int, count: int, exponent: float = 1.0) -> np.ndarray:
    """Returns `count` numbers below `vocabulary`, int64: rank r with probability ~ (r + 1) ** -exponent."""
    cumulated = np.cumsum(np.arange(1, vocabulary + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(cumulated, rng.random(count) * cumulated[-1]).clip(max=vocabulary - 1)


def write_world(uri: str, world: World) -> tuple[str, str]:
    """Writes data and knowledge of one size below `uri`.

    Returns:
        The places of the prepared directory and of the knowledge table.
    """
    prepared_uri, knowledge_uri = storage.join(uri, "prepared"), storage.join(uri, "knowledge")
    _write_prepared(prepared_uri, world)
    rng = np.random.default_rng((world.seed, 1))
    users_NK = _unit_vectors(rng, world.num_users + 1, world.knowledge_width).astype(np.float16)
    users_NK[0] = 0
    table = KnowledgeTable(
        users_NK=users_NK,
        user_index_N=np.arange(world.num_users + 1, dtype=np.int32),
        scenarios_SK=_unit_vectors(rng, len(SCENARIOS), world.knowledge_width),
        items_NK=np.zeros((1, world.knowledge_width), np.float16),
        item_index_N=np.zeros(world.num_items + 1, np.int32),
    )
    table.save(knowledge_uri)
    return prepared_uri, knowledge_uri


def joined_table(prepared: PreparedData, split: str) -> pa.Table:
    """Returns a split as the flat table that other libraries read: every feature, scenario and label in each row."""
    users, items = prepared.users(), prepared.items()
    parts = []
    for file, _ in prepared.files(split):
        rows = storage.read_parquet(file)
        columns = {}
        for feature in prepared.schema.features:
            if feature.source == "context":
                columns[feature.name] = rows[feature.name]
            else:
                entity, key = (users, "user_row") if feature.source == "user" else (items, "item_row")
                columns[feature.name] = entity[feature.name].take(pa.array(rows[key].to_numpy() - 1))
        parts.append(pa.table(columns | {"scenario": rows["scenario"], "label": rows["label"]}))
    return pa.concat_tables(parts).combine_chunks()


def _unit_vectors(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((count, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write_prepared(uri: str, world: World) -> None:
    rng = np.random.default_rng(world.seed)
    schema = world_schema(world.num_users, world.num_items)
    num_users, num_items = world.num_users, world.num_items
    group_U, category_I = rng.integers(0, NUM_USER_GROUPS, num_users), rng.integers(0, NUM_CATEGORIES, num_items)
    activity_U = rng.lognormal(0, 1, num_users)
    activity_U /= activity_U.sum()
    planted = _Planted(rng, group_U, category_I)
    tags_IT = rng.integers(FIRST_INDEX, NUM_TAGS + FIRST_INDEX, (num_items, TAGS_LENGTH))
    tags_IT[np.arange(TAGS_LENGTH) >= rng.integers(1, TAGS_LENGTH + 1, num_items)[:, None]] = 0
    storage.write_json(storage.join(uri, SCHEMA_FILE), schema.to_json())
    counts_SU = [rng.multinomial(count, activity_U) for count in (world.num_rows, world.num_valid_rows)]
    users = {
        "key": np.arange(num_users) + FIRST_USER_KEY,
        "text": [""] * num_users,
        "num_train_rows": counts_SU[0],
        "user_id": np.arange(num_users) + FIRST_INDEX,
        "user_group": group_U + FIRST_INDEX,
        "user_age": rng.integers(FIRST_INDEX, NUM_AGES + FIRST_INDEX, num_users),
    }
    popular_I = rng.permutation(num_items)  # the item of each rank
    files: dict[str, list] = {split: [] for split in SPLITS}
    counts = np.zeros((len(SPLITS), len(SCENARIOS), 2), np.int64)
    rows_of_item, first_row_id = np.zeros(num_items, np.int64), 0
    for bucket in range(world.num_buckets):
        bucket_U = np.arange(bucket, num_users, world.num_buckets)
        before_U = np.zeros(len(bucket_U), np.int64)
        for split, counts_U in enumerate(counts_SU):
            num_U = counts_U[bucket_U]
            columns = _draw_rows(rng, bucket_U, num_U, before_U, popular_I, planted)
            before_U += num_U
            num_rows = len(columns["label"])
            columns["row_id"] = np.arange(num_rows) + first_row_id
            first_row_id += num_rows
            if num_rows:
                order_R = rng.permutation(num_rows)
                arrays = {f.name: pa.array(columns[f.name][order_R]).cast(f.type) for f in rows_schema(schema)}
                name = bucket_file(SPLITS[split], bucket)
                table = pa.table(arrays, schema=rows_schema(schema))
                storage.write_parquet(storage.join(uri, name), table, row_group_size=ROW_GROUP_ROWS)
                files[SPLITS[split]].append({"file": name, "num_rows": num_rows})
                np.add.at(counts[split], (columns["scenario"], columns["label"]), 1)
            if split == 0:
                rows_of_item += np.bincount(columns["item_row"] - 1, minlength=num_items)
    items = {
        "key": np.arange(num_items) + FIRST_ITEM_KEY,
        "text": [""] * num_items,
        "num_train_rows": rows_of_item,
        "item_id": np.arange(num_items) + FIRST_INDEX,
        "category": category_I + FIRST_INDEX,
        "author": rng.integers(FIRST_INDEX, NUM_AUTHORS + FIRST_INDEX, num_items),
        "tags": pa.FixedSizeListArray.from_arrays(pa.array(tags_IT.ravel().astype(np.int32)), TAGS_LENGTH),
    }
    for file, source, columns in ((USERS_FILE, "user", users), (ITEMS_FILE, "item", items)):
        fields = feature_table_schema(schema, source)
        arrays = [pa.array(columns[f.name]).cast(f.type) for f in fields]
        storage.write_parquet(storage.join(uri, file), pa.table(arrays, schema=fields))
    for feature in schema.features:
        if feature.name not in ("user_id", "item_id"):
            values = [f"{feature.name} {i}" for i in range(feature.num_embeddings - FIRST_INDEX)]
            storage.write_parquet(vocabulary_uri(uri, feature.name), pa.table({"value": values}))
    storage.write_parquet(storage.join(uri, REJECTS_FILE), REJECTS.empty_table())
    report = {"rows": _row_counts(counts)}
    storage.write_manifest(uri, {"kind": "prepared", "data": report, "files": files, "num_buckets": world.num_buckets})


class _Planted:
    """The logistic model behind the labels: taste x property, where both lean on features that a ranker sees."""

    def __init__(self, rng: np.random.Generator, group_U: np.ndarray, category_I: np.ndarray) -> None:
        num_users, num_items = len(group_U), len(category_I)
        of_group = rng.standard_normal((len(SCENARIOS), NUM_USER_GROUPS, NUM_FACTORS), np.float32)
        own = rng.standard_normal((len(SCENARIOS), num_users, NUM_FACTORS), np.float32)
        self.taste_SUF = of_group[:, group_U] + 0.5 * own
        of_category = rng.standard_normal((NUM_CATEGORIES, NUM_FACTORS), np.float32)
        self.property_IF = of_category[category_I] + 0.5 * rng.standard_normal((num_items, NUM_FACTORS), np.float32)
        self.search_share_U = rng.beta(2, 3, num_users)

    def probability(self, user_R: np.ndarray, item_R: np.ndarray, scenario_R: np.ndarray) -> np.ndarray:
        logit_R = np.einsum("rf,rf->r", self.taste_SUF[scenario_R, user_R], self.property_IF[item_R])
        return 1 / (1 + np.exp(-(logit_R * 0.7 - 0.5)))


def _draw_rows(
    rng: np.random.Generator,
    bucket_U: np.ndarray,
    num_U: np.ndarray,
    before_U: np.ndarray,
    popular_I: np.ndarray,
    planted: _Planted,
) -> dict[str, np.ndarray]:
    """Draws the rows of one bucket and split: `num_U` of each of its users, after `before_U` earlier ones."""
    num_rows = int(num_U.sum())
    user_R = np.repeat(bucket_U, num_U)
    first_U = np.cumsum(num_U) - num_U
    position_R = np.arange(num_rows) - np.repeat(first_U - before_U, num_U)
    item_R = popular_I[zipf_indices(rng, len(popular_I), num_rows)]
    scenario_R = (rng.random(num_rows) < planted.search_share_U[user_R]).astype(np.int64)
    source_R = rng.integers(FIRST_INDEX, NUM_SOURCES + FIRST_INDEX, num_rows)
    return {
        "user_row": user_R + 1,
        "item_row": item_R + 1,
        "scenario": scenario_R,
        "label": (rng.random(num_rows) < planted.probability(user_R, item_R, scenario_R)).astype(np.int64),
        "timestamp_ms": 1_684_000_000_000 + position_R * 60_000,
        "position": position_R,
        "moment": position_R,
        "search_source": np.where(scenario_R == 1, source_R, 0),
    }


def _row_counts(counts: np.ndarray) -> list[dict[str, object]]:
    """Returns the report's rows from counts by split, scenario and label."""
    found = []
    for split, of_split in zip(SPLITS, counts, strict=True):
        named = [*zip(SCENARIOS, of_split, strict=True), ("all", of_split.sum(0))]
        found += [
            {"split": split, "scenario": name, "num_rows": int(c.sum()), "num_positives": int(c[1])}
            for name, c in named
        ]
    return found
