"""Users' vectors made of items' vectors, and that no training row sees the likes of its own moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge import pooled
from llm4msr.knowledge.folds import UserFolds, folds_of
from llm4msr.knowledge.pooled import write_pooled_users
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.settings import config_from_dict

NUM_FOLDS = 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


def train_rows(prepared: PreparedData) -> list[dict]:
    return [row for uri, _ in prepared.files("train") for row in storage.read_parquet(uri).to_pylist()]


def pooled_table(prepared: PreparedData, uri: str, num_folds: int = NUM_FOLDS) -> KnowledgeTable:
    """The table of an extraction whose users are pooled."""
    given = tiny_knowledge(items=True)
    given.save(uri)
    uris = [uri for uri, _ in prepared.files("train")]
    num_users = len(prepared.users())
    number = write_pooled_users(uri, uris, num_users, num_folds, given.items_NK, given.item_index_N)
    table = KnowledgeTable.load(uri)
    assert number == table.num_users_with_knowledge > 0
    return table


def moment(row: dict) -> int:
    return row["position"] if row["timestamp_ms"] is None else row["timestamp_ms"]


def expected_vector(table: KnowledgeTable, liked: list[int]) -> np.ndarray | None:
    """The sum of standardised unit vectors, of length 1, item by item."""
    mean_K, std_K = table.items_NK[1:].astype(np.float64).mean(0), table.items_NK[1:].astype(np.float64).std(0)
    total = np.zeros(table.width)
    for item in liked:
        vector_K = (table.items_NK[table.item_index_N[item]] - mean_K) / std_K
        total += vector_K / np.linalg.norm(vector_K)
    return total / np.linalg.norm(total) if liked else None


@pytest.mark.parametrize("block_likes", [pooled.BLOCK_LIKES, 7])
def test_a_user_is_the_mean_direction_of_the_liked_items(prepared, tmp_path, monkeypatch, block_likes):
    monkeypatch.setattr(pooled, "BLOCK_LIKES", block_likes)
    table = pooled_table(prepared, str(tmp_path))
    folds = table.folds
    assert folds is not None and folds.index_FN.shape == (NUM_FOLDS, len(prepared.users()) + 1)
    rows = train_rows(prepared)
    num_without = 0
    for user in range(1, len(prepared.users()) + 1):
        own = [r for r in rows if r["user_row"] == user and r["label"] and table.item_index_N[r["item_row"]]]
        fold_of = {r["row_id"]: int(folds_of(np.array([moment(r)]), np.array([0]), NUM_FOLDS)[0]) for r in own}
        for fold in (None, *range(NUM_FOLDS)):
            liked = [r["item_row"] for r in own if fold_of[r["row_id"]] != fold]
            if fold is None:
                place, vectors_NK = int(table.user_index_N[user]), table.users_NK
            else:
                place, vectors_NK = int(folds.index_FN[fold, user]), folds.vectors_NK
            expected_K = expected_vector(table, liked)
            if expected_K is None:
                assert place == 0
                num_without += 1
            else:
                np.testing.assert_allclose(vectors_NK[place], expected_K, atol=1e-3)
    assert num_without < NUM_FOLDS * len(prepared.users())
    assert len(table.users_NK) == table.num_users_with_knowledge + 1
    assert len(folds.vectors_NK) == np.count_nonzero(folds.index_FN) + 1


def test_who_liked_in_one_fold_only_has_nothing_there_and_who_liked_nothing_has_nothing(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "data"), num_rows=150)  # few rows: some users have one like, or none
    table = pooled_table(prepared, str(tmp_path / "table"), 2)
    folds = table.folds
    assert folds is not None
    liked = [{(moment(r)) for r in train_rows(prepared) if r["user_row"] == u and r["label"]} for u in range(1, 41)]
    single = [u for u, moments in enumerate(liked, start=1) if len(moments) == 1 and table.user_index_N[u]]
    none = [u for u, moments in enumerate(liked, start=1) if not moments]
    assert single and none
    assert ((folds.index_FN[:, single] > 0).sum(0) == 1).all()
    assert not table.user_index_N[none].any() and not folds.index_FN[:, none].any()


def test_a_fold_is_a_hash_of_the_moment():
    time_B = np.repeat(np.arange(1_600_000_000_000, 1_600_000_000_000 + 3000), 2)
    fold_B = folds_of(time_B, np.arange(6000), 4)
    assert (fold_B[::2] == fold_B[1::2]).all()  # rows of one moment stay together
    assert np.bincount(fold_B, minlength=4).min() > 1200
    without_B = folds_of(np.full(6, -1), np.array([5, 5, 6, 7, 8, 9]), 4)
    assert without_B.tolist() == folds_of(np.array([5, 5, 6, 7, 8, 9]), np.zeros(6), 4).tolist()


def test_training_sees_the_fold_of_the_row_and_everybody_else_the_whole(prepared, tmp_path):
    table = pooled_table(prepared, str(tmp_path))
    folds = table.folds
    assert folds is not None
    users, items = prepared.users(), prepared.items()
    collator = Collator(
        prepared.schema,
        EntityFeatures.from_table(users, prepared.schema, "user"),
        EntityFeatures.from_table(items, prepared.schema, "item"),
        table,
    )
    raw = storage.read_parquet(prepared.files("train")[0][0])
    rows = {name: raw[name].to_numpy() for name in collator.columns if name != "timestamp_ms"}
    rows["timestamp_ms"] = raw["timestamp_ms"].fill_null(-1).to_numpy()
    assert {"timestamp_ms", "position"} <= set(collator.columns)
    for training in (True, False):
        batch = collator(rows, training=training)
        found_BK = batch.knowledge_UK[batch.knowledge_index_B].numpy()
        for b, user in enumerate(rows["user_row"]):
            if training:
                fold = folds_of(rows["timestamp_ms"][b : b + 1], rows["position"][b : b + 1], NUM_FOLDS)[0]
                expected_K = folds.vectors_NK[folds.index_FN[fold, user]]
            else:
                expected_K = table.users_NK[table.user_index_N[user]]
            assert np.array_equal(found_BK[b], expected_K.astype(np.float32))
    collator.knowledge = replace(table, folds=None)
    assert not {"timestamp_ms", "position"} & set(collator.columns)
    assert collator(rows, training=True).knowledge_index_B.equal(collator(rows).knowledge_index_B)


def test_a_checkpoint_and_the_controls_have_no_folds(prepared, tmp_path):
    table = pooled_table(prepared, str(tmp_path / "table"))
    assert table.folds is not None
    assert table.shuffled(0).folds is None and table.random(0).folds is None
    table.save(str(tmp_path / "checkpoint"))
    assert KnowledgeTable.load(str(tmp_path / "checkpoint")).folds is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_FN": np.full((2, 5), 9, np.int32)}, "index_FN names rows outside of the 4 of vectors_NK"),
        ({"index_FN": np.zeros(5, np.int32)}, r"index_FN: found int32 of shape \(5,\)"),
        ({"vectors_NK": np.ones((4, 3), np.float16)}, "must be zeros"),
        ({"vectors_NK": np.zeros((4, 3), np.float32)}, "vectors_NK: found float32"),
    ],
)
def test_folds_that_do_not_fit_are_refused(changes, message):
    good = {"vectors_NK": np.zeros((4, 3), np.float16), "index_FN": np.zeros((2, 5), np.int32)}
    UserFolds(**good)
    with pytest.raises(ValueError, match=message):
        UserFolds(**good | changes)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="so both user and item are needed"):
        KnowledgeConfig(user_vectors="items")
    with pytest.raises(ValueError, match="refresh_min_new_events is for prompts"):
        KnowledgeConfig(user_vectors="items", levels=("user", "item"), refresh_min_new_events=2)
    with pytest.raises(ConfigError, match="knowledge_match compares a user's vector with an item's"):
        config_from_dict({"model": {"knowledge_match": True}})
