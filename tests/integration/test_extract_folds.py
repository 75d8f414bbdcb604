"""Out-of-fold knowledge end to end: prompts without a fold's items, their vectors, and what is kept of them."""

from __future__ import annotations

import extract_world as world
import numpy as np
import pytest
from unit.endpoint_server import WIDTH, serve, vector_of

from llm4msr import storage
from llm4msr.knowledge.folds import item_folds
from llm4msr.knowledge.pipeline import extract
from llm4msr.knowledge.table import KnowledgeTable

NUM_FOLDS = 3


@pytest.fixture
def server():
    with serve() as running:
        yield running


def test_each_fold_has_the_vectors_of_prompts_that_leave_it_out(ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url, folds=NUM_FOLDS)
    users = world.many_users(60)
    world.write_prepared(config, "data", users)
    uri = extract(config)
    table = KnowledgeTable.load(uri)
    folds = table.folds
    assert folds is not None and folds.index_FN.shape == (NUM_FOLDS, 61)
    keys = storage.read_parquet(storage.join(tmp_path.as_posix(), "prepared", "data", "items.parquet"))["key"]
    assert folds.fold_N.tolist() == item_folds(keys.combine_chunks(), NUM_FOLDS).tolist()
    files = storage.read_manifest(storage.join(uri, "prompts"), "")["files"]
    given = np.zeros_like(folds.index_FN)
    for file in files:
        if "fold" not in file:
            continue
        for prompt in storage.read_parquet(storage.join(uri, "prompts", file["file"])).to_pylist():
            fold, user = file["fold"], prompt["subject_row"]
            items = {1 + users.items.index(event.split(" (x")[0]) for event in prompt["events"]}
            assert items and fold not in folds.fold_N[list(items)]
            expected = np.array(vector_of(prompt["text"]), np.float16)
            np.testing.assert_array_equal(folds.vectors_NK[folds.index_FN[fold, user]], expected)
            given[fold, user] = 1
    # Who liked nothing outside of a fold has no knowledge there, and who liked nothing at all has none anywhere.
    assert np.array_equal(folds.index_FN > 0, given > 0)
    assert not folds.index_FN[:, table.user_index_N == 0].any()
    liked = {(row.user, row.item) for row in users.rows if row.label}
    for place, user in enumerate(sorted(users.users), start=1):
        for fold in range(NUM_FOLDS):
            others = [item for u, item in liked if u == user and folds.fold_N[item] != fold]
            assert bool(folds.index_FN[fold, place]) == bool(others)
    assert table.width == WIDTH
    # The whole prompts are what they are without folds.
    whole = extract(world.make_config(str(tmp_path), server.url))
    assert whole != uri and KnowledgeTable.load(whole).folds is None
    np.testing.assert_array_equal(KnowledgeTable.load(whole).users_NK, table.users_NK)
    assert world.summary(whole)["num_encoded"] == 0


def test_users_with_little_news_keep_the_prompts_of_all_folds(ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url, folds=NUM_FOLDS, refresh_min_new_events=2)
    users = world.many_users(30)
    world.write_prepared(config, "first", users)
    extract(config)
    rows = [*users.rows, world.Row(1003, 39, 0, 1, 900)]
    world.write_prepared(config, "second", users._replace(rows=rows))
    later = world.summary(extract(config))
    # One new like: user 1003 keeps everything, and only the scenarios' counts are new.
    assert later["num_kept"] == 1 and later["num_encoded"] == 2
    rows += [world.Row(1003, 38, 0, 1, 901), world.Row(1003, 37, 1, 1, 902)]
    world.write_prepared(config, "third", users._replace(rows=rows))
    later = world.summary(extract(config))
    assert later["num_kept"] == 0 and later["num_encoded"] > 2
