"""Users' vectors made of items' vectors, and that no training row sees the likes of its own moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge import pooled
from llm4msr.knowledge.folds import UserFolds, folds_of
from llm4msr.knowledge.pooled import write_pooled_users
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.settings import config_from_dict
from llm4msr.training.loop import train_worker
from llm4msr.training.task import TrainTask

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
        fold_of = {r["row_id"]: (user + r["moment"]) % NUM_FOLDS for r in own}
        has_folds = len(set(fold_of.values())) > 1
        for fold in (None, *range(NUM_FOLDS)):
            liked = [r["item_row"] for r in own if fold_of[r["row_id"]] != fold]
            if fold is None:
                place, vectors_NK = int(table.user_index_N[user]), table.users_NK
            else:
                place, vectors_NK = int(folds.index_FN[fold, user]), folds.vectors_NK
            expected_K = expected_vector(table, liked) if fold is None or has_folds else None
            if expected_K is None:
                assert place == 0
                num_without += 1
            else:
                np.testing.assert_allclose(vectors_NK[place], expected_K, atol=1e-3)
    assert num_without < NUM_FOLDS * len(prepared.users())
    assert len(table.users_NK) == table.num_users_with_knowledge + 1
    assert len(folds.vectors_NK) == np.count_nonzero(folds.index_FN) + 1


def test_who_liked_in_one_fold_only_has_nothing_in_any_and_who_liked_nothing_has_nothing(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "data"), num_rows=150)  # few rows: some users have one like, or none
    table = pooled_table(prepared, str(tmp_path / "table"), 2)
    folds = table.folds
    assert folds is not None
    liked = [{r["moment"] % 2 for r in train_rows(prepared) if r["user_row"] == u and r["label"]} for u in range(1, 41)]
    single = [u for u, of_user in enumerate(liked, start=1) if len(of_user) == 1 and table.user_index_N[u]]
    none = [u for u, of_user in enumerate(liked, start=1) if not of_user]
    assert single and none
    assert not folds.index_FN[:, single].any()
    assert not table.user_index_N[none].any() and not folds.index_FN[:, none].any()
    # Whether a row has a vector is a matter of its user alone, and so says nothing of its label.
    assert ((folds.index_FN > 0).sum(0) % 2 == 0).all()


def test_moments_are_dealt_to_folds_in_turn():
    user_B, moment_B = np.repeat(np.arange(1, 301), 7), np.tile(np.arange(7), 300)
    fold_B = folds_of(user_B, moment_B, 2).reshape(300, 7)
    assert (np.diff(fold_B, axis=1) != 0).all()
    assert set(fold_B.sum(1)) == {3, 4} and abs(fold_B.mean() - 0.5) < 0.01
    assert folds_of(np.array([1, 1, 1]), np.array([4, 4, 5]), 4).tolist() == [1, 1, 2]


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
    rows = {name: raw[name].to_numpy() for name in collator.columns}
    assert "moment" in rows
    for training in (True, False):
        batch = collator(rows, training=training)
        found_BK = batch.knowledge_UK[batch.knowledge_index_B].numpy()
        for b, user in enumerate(rows["user_row"]):
            if training:
                expected_K = folds.vectors_NK[folds.index_FN[(user + rows["moment"][b]) % NUM_FOLDS, user]]
            else:
                expected_K = table.users_NK[table.user_index_N[user]]
            assert np.array_equal(found_BK[b], expected_K.astype(np.float32))
    collator.knowledge = replace(table, folds=None)
    assert "moment" not in collator.columns
    assert collator(rows, training=True).knowledge_index_B.equal(collator(rows).knowledge_index_B)


def test_a_checkpoint_has_no_folds(prepared, tmp_path):
    table = pooled_table(prepared, str(tmp_path / "table"))
    assert table.folds is not None
    table.save(str(tmp_path / "checkpoint"))
    assert KnowledgeTable.load(str(tmp_path / "checkpoint")).folds is None


def test_a_control_has_the_folds_of_whom_its_vectors_come_from(prepared, tmp_path):
    table = pooled_table(prepared, str(tmp_path))
    shuffled = table.shuffled(3)
    assert table.folds is not None and shuffled.folds is not None
    owner = {int(place): user for user, place in enumerate(table.user_index_N) if place}
    moved = 0
    for user, place in enumerate(shuffled.user_index_N):
        given = shuffled.folds.index_FN[:, user]
        if not place:
            assert not given.any()
            continue
        assert np.array_equal(given, table.folds.index_FN[:, owner[int(place)]])
        moved += owner[int(place)] != user
    assert moved == table.num_users_with_knowledge > 2


def test_noise_is_the_same_in_all_folds_and_there_where_vectors_are(prepared, tmp_path):
    table = pooled_table(prepared, str(tmp_path))
    noise = table.random(0)
    assert table.folds is not None and noise.folds is not None
    assert np.array_equal(noise.folds.index_FN > 0, table.folds.index_FN > 0)
    for fold in range(NUM_FOLDS):
        has = noise.folds.index_FN[fold] > 0
        assert np.array_equal(noise.folds.index_FN[fold][has], noise.user_index_N[has])
    assert np.array_equal(noise.folds.vectors_NK, noise.users_NK)


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


def test_a_match_without_any_knowledge_of_items_is_refused(prepared, tmp_path):
    uri = str(tmp_path / "knowledge")
    tiny_knowledge(items=False).save(uri)
    config = tiny_config(
        model={"knowledge_match": True}, knowledge={"levels": ["scenario", "user", "item"], "user_vectors": "items"}
    )
    task = TrainTask(config, prepared.uri, uri, "llm", 0, str(tmp_path / "run"), "run")
    with pytest.raises(ConfigError, match="no item has knowledge: no item has a text"):
        train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
