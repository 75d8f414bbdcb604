"""Out-of-fold knowledge: no training row sees a prompt that quotes its own item."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tiny import tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge import profiles
from llm4msr.knowledge.folds import UserFolds, item_folds
from llm4msr.knowledge.prompt_files import Subjects, write_user_prompts
from llm4msr.knowledge.table import FOLD_FILES, KnowledgeTable

NUM_FOLDS = 3


def test_the_fold_of_an_item_follows_from_its_id_alone():
    keys = pa.array([f"item {n}" for n in range(3000)])
    fold_N = item_folds(keys, 4)
    assert fold_N.dtype == np.int8 and fold_N[0] == 0 and len(fold_N) == 3001
    assert np.bincount(fold_N[1:]).min() > 600
    later = item_folds(keys.slice(1000, 500), 4)
    assert later[1:].tolist() == fold_N[1001:1501].tolist()


def test_a_prompt_quotes_no_item_of_the_fold_it_leaves_out_and_all_others(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "data"))
    items = prepared.items()
    # Each item has a text of its own, so that a prompt says which are quoted.
    texts = pa.array([f"thing{row:03d}" for row in range(1, len(items) + 1)])
    fold_N = item_folds(items["key"].combine_chunks(), NUM_FOLDS)
    users = prepared.users()
    subjects = Subjects(
        user_keys=users["key"].combine_chunks(),
        users=profiles.clean_texts(users["text"]),
        items=profiles.clean_texts(texts),
        item_texts=None,
        scenarios=prepared.schema.scenarios,
        identity_digest="id",
        max_events=1000,
        positives_only=False,
        with_users=True,
        fold_N=fold_N,
    )
    for uri, _ in prepared.files("train"):
        targets = [str(tmp_path / f"{place}-{uri.rsplit('/', 1)[-1]}") for place in range(NUM_FOLDS + 1)]
        done = write_user_prompts(subjects, uri, targets, None)
        rows = storage.read_parquet(uri)
        liked = {
            (user, item)
            for user, item, label in zip(*(rows[n].to_pylist() for n in ("user_row", "item_row", "label")), strict=True)
            if label
        }
        for fold, target in enumerate(targets, start=-1):
            table = storage.read_parquet(target)
            assert len(table) == done.num_prompts[fold + 1] > 0
            quoted = {
                (row, int(event.split(" ")[0].removeprefix("thing")))
                for row, events in zip(table["subject_row"].to_pylist(), table["events"].to_pylist(), strict=True)
                for event in events
            }
            assert quoted == {(user, item) for user, item in liked if fold < 0 or fold_N[item] != fold}


def folded(table: KnowledgeTable, num_items: int) -> KnowledgeTable:
    rng = np.random.default_rng(0)
    vectors_NK = rng.normal(size=(50, table.width)).astype(np.float16)
    vectors_NK[0] = 0
    index_FN = rng.integers(0, 50, (NUM_FOLDS, len(table.user_index_N))).astype(np.int32)
    fold_N = rng.integers(0, NUM_FOLDS, num_items + 1).astype(np.int8)
    return replace(table, folds=UserFolds(vectors_NK, index_FN, fold_N))


def test_training_sees_the_fold_of_the_rows_item_and_everybody_else_the_whole_prompt(tmp_path):
    prepared = tiny_prepared(str(tmp_path))
    users, items = prepared.users(), prepared.items()
    table = folded(tiny_knowledge(), len(items))
    folds = table.folds
    assert folds is not None
    collator = Collator(
        prepared.schema,
        EntityFeatures.from_table(users, prepared.schema, "user"),
        EntityFeatures.from_table(items, prepared.schema, "item"),
        table,
    )
    rows = {n: np.asarray(c) for n, c in zip(*_columns(prepared), strict=True)}
    for training in (True, False):
        batch = collator(rows, training=training)
        found_BK = batch.knowledge_UK[batch.knowledge_index_B].numpy()
        for b, (user, item) in enumerate(zip(rows["user_row"], rows["item_row"], strict=True)):
            if training:
                expected_K = folds.vectors_NK[folds.index_FN[folds.fold_N[item], user]]
            else:
                expected_K = table.users_NK[table.user_index_N[user]]
            assert np.array_equal(found_BK[b], expected_K.astype(np.float32))
    without = replace(collator.knowledge, folds=None)
    collator.knowledge = without
    assert collator(rows, training=True).knowledge_index_B.equal(collator(rows).knowledge_index_B)


def _columns(prepared):
    table = storage.read_parquet(prepared.files("train")[0][0])
    return table.column_names, [table[name] for name in table.column_names]


def test_a_checkpoint_and_the_controls_have_no_folds(tmp_path):
    table = folded(tiny_knowledge(), 30)
    table.save(str(tmp_path))
    assert KnowledgeTable.load(str(tmp_path)).folds is None
    assert table.shuffled(0).folds is None and table.random(0).folds is None
    for field, name in FOLD_FILES.items():
        np.save(tmp_path / name, getattr(table.folds, field))
    loaded = KnowledgeTable.load(str(tmp_path)).folds
    assert loaded is not None
    assert all(np.array_equal(getattr(loaded, f), getattr(table.folds, f)) for f in FOLD_FILES)
    np.save(tmp_path / FOLD_FILES["fold_N"], np.full(31, NUM_FOLDS, np.int8))
    with pytest.raises(storage.StorageError, match=r"fold_N names folds outside of the 3"):
        KnowledgeTable.load(str(tmp_path))


def test_one_fold_is_refused():
    with pytest.raises(ValueError, match="folds = 1 would leave nothing to quote"):
        KnowledgeConfig(folds=1)
