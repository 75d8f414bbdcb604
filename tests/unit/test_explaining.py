"""What is said of one score: each part of it against the model itself, with the part taken out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import NUM_USERS, SEQUENCES, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import subjects
from llm4msr.explaining import explain, scores_without_knowledge
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest, RequestError
from llm4msr.subjects import Neighbours, describe_item, describe_user, example_items, example_users

EVERYTHING = {
    "model": {"knowledge_match": True, "hidden_dims": [16, 8], "tower_dims": [8], "embedding_dim": 4},
    "knowledge": {"levels": ["scenario", "user", "item"], "user_vectors": "items"},
}
# Users 1035 to 1039 and the last four items have no knowledge (`tiny_knowledge`).
KNOWN, STRANGER, VAGUE_USER, VAGUE_ITEM = 1003, -1, 1038, 7027


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="module")
def uri(prepared, tmp_path_factory):
    place = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return tiny_checkpoint(place, prepared, tiny_knowledge(items=True), **EVERYTHING)


@pytest.fixture(scope="module")
def ranker(uri):
    return Ranker.from_checkpoint(uri)


@pytest.fixture(scope="module")
def neighbours(ranker):
    return Neighbours(ranker.checkpoint.knowledge, ranker.checkpoint.users)


def score(ranker, user=KNOWN, scenario="search", item=7004):
    return ranker.rank(RankRequest(user, scenario, [item])).results[0].score


def without(found):
    return {one.part: one.score for one in found.without}


@pytest.mark.parametrize("user", [KNOWN, STRANGER, VAGUE_USER])
@pytest.mark.parametrize("item", [7004, -1, VAGUE_ITEM])
@pytest.mark.parametrize("scenario", ["rec", "search"])
def test_the_score_is_that_of_a_request(ranker, neighbours, user, scenario, item):
    found = explain(ranker, neighbours, user, scenario, item)
    assert found.score == score(ranker, user, scenario, item)
    assert found.score == pytest.approx(1 / (1 + np.exp(-found.logit)), abs=1e-7)
    assert found.user.known == (user > 0) and found.item.known == (item > 0)
    assert found.user.knowledge_known == (user == KNOWN) and found.item.knowledge_known == (item == 7004)


def test_each_part_is_what_the_model_scores_with_that_part_taken_out_of_it(uri, ranker, neighbours):
    found = explain(ranker, neighbours, KNOWN, "search", 7004)

    def changed(change) -> float:
        other = Ranker.from_checkpoint(uri)
        with torch.no_grad():
            change(other.checkpoint.model)
        return score(Ranker(other.checkpoint))

    def no_user_level(model):
        # A user without knowledge has the layers of the learned vector, whatever else there is.
        model.user_meta.trunk.condense = lambda knowledge_UK: model.user_meta.trunk.missing_Z.expand(
            len(knowledge_UK), -1
        )

    def no_scenario_level(model):
        model.scenario_meta = None

    def no_match(model):
        model.match.std.fill_(torch.inf)

    def no_items(model):
        trunk = model.item_knowledge.trunk
        trunk.condense = lambda knowledge_UK: trunk.missing_Z.expand(len(knowledge_UK), -1)

    def nothing(model):
        for change in (no_user_level, no_scenario_level, no_match, no_items):
            change(model)

    expected = {
        "user_level": changed(no_user_level),
        "scenario_level": changed(no_scenario_level),
        "match": changed(no_match),
        "item_knowledge": changed(no_items),
        "all": changed(nothing),
    }
    assert without(found) == pytest.approx(expected, abs=1e-6)
    values = [found.score, *expected.values()]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-5  # the parts matter, each for itself
    assert [one.reason for one in found.without] == [None] * 5


def test_how_far_the_user_moves_the_input_and_what_the_scenario_adds(ranker, neighbours):
    seen = {}
    meta, backbone = ranker.checkpoint.model.user_meta, ranker.checkpoint.model.backbone
    handle = backbone.register_forward_hook(lambda module, given, out: seen.update(h=given[0], logit=out))
    inner = meta.apply_generated
    meta.apply_generated = lambda x_BD, layers: seen.update(x=x_BD) or inner(x_BD, layers)
    try:
        found = explain(ranker, neighbours, KNOWN, "rec", 7004)
        explained = explain(ranker, neighbours, KNOWN, "rec", 7004)
        ranker.rank(RankRequest(KNOWN, "rec", [7004]))  # the last one seen: with all parts
    finally:
        handle.remove()
        del meta.apply_generated
    moved = float((seen["h"] - seen["x"]).norm() / seen["x"].norm())
    assert found.user_level.value == pytest.approx(moved, rel=1e-5) and moved > 0
    assert found.scenario_level.value == pytest.approx(found.logit - float(seen["logit"][0]), abs=1e-5)
    assert explained == found


def test_the_cosine_of_user_and_item(ranker, neighbours):
    table, match = ranker.checkpoint.knowledge, ranker.checkpoint.model.match
    user_K, item_K = (
        match.standardised(torch.from_numpy(vectors_NK[index_N[row]].astype(np.float32)), level).numpy()
        for vectors_NK, index_N, row, level in (
            (table.users_NK, table.user_index_N, 4, "user"),
            (table.items_NK, table.item_index_N, 5, "item"),
        )
    )
    cosine = user_K @ item_K / np.linalg.norm(user_K) / np.linalg.norm(item_K)
    assert explain(ranker, neighbours, KNOWN, "rec", 7004).match.value == pytest.approx(cosine, abs=1e-5)
    for user, item, reason in (
        (VAGUE_USER, 7004, "the model has no knowledge of this user"),
        (KNOWN, VAGUE_ITEM, "the model has no knowledge of this item"),
    ):
        match = explain(ranker, neighbours, user, "rec", item).match
        assert (match.value, match.reason) == (None, reason)


def test_scenarios_in_knowledge_space(ranker, neighbours):
    (other,) = explain(ranker, neighbours, KNOWN, "rec", 7004).scenarios
    rec_K, search_K = ranker.checkpoint.knowledge.scenarios_SK
    cosine = rec_K @ search_K / np.linalg.norm(rec_K) / np.linalg.norm(search_K)
    assert other.name == "search" and other.raw_similarity == pytest.approx(cosine, abs=1e-5)
    assert other.similarity == pytest.approx(-1, abs=1e-5)


def test_what_a_backbone_alone_does_not_have(prepared, tmp_path):
    ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, None))
    found = explain(ranker, Neighbours(None, ranker.checkpoint.users), KNOWN, "rec", 7004)
    assert found.score == score(ranker, scenario="rec")
    assert without(found) == dict.fromkeys(("user_level", "scenario_level", "match", "item_knowledge", "all"))
    absent = (found.user_level, found.scenario_level, found.match, *found.without)
    assert all(one.reason for one in absent) and found.scenarios_reason and found.user.nearest.reason
    assert (found.scenarios, found.user.nearest.users) == ([], [])


def test_a_part_that_a_model_lacks(prepared, tmp_path):
    uri = tiny_checkpoint(str(tmp_path / "c"), prepared, tiny_knowledge(), model={"meta": {"scenario_level": False}})
    ranker = Ranker.from_checkpoint(uri)
    found = explain(ranker, Neighbours(ranker.checkpoint.knowledge, ranker.checkpoint.users), KNOWN, "rec", 7004)
    scores = without(found)
    assert (scores["scenario_level"], scores["match"], scores["item_knowledge"]) == (None, None, None)
    assert found.scenario_level.reason == "this model has no scenario-level meta layers"
    assert scores["all"] == scores["user_level"] != found.score


def test_scores_without_knowledge_are_those_of_explanations(ranker, neighbours):
    items = [7004, -1, VAGUE_ITEM, 7004]
    scores = scores_without_knowledge(ranker, KNOWN, "rec", items)
    expected = [without(explain(ranker, neighbours, KNOWN, "rec", item))["all"] for item in items]
    assert scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("user", "scenario", "item", "field"),
    [("u", "rec", 7004, "user"), (KNOWN, "shop", 7004, "scenario"), (KNOWN, "rec", "i", "items")],
)
def test_what_cannot_be_scored_is_refused(ranker, neighbours, user, scenario, item, field):
    with pytest.raises(RequestError) as caught:
        explain(ranker, neighbours, user, scenario, item)
    assert caught.value.field == field


# ---------------------------------------------------------------- who is near


def table_of(vectors_NK, index_N=None) -> KnowledgeTable:
    """Users with these vectors, one each unless the index says otherwise."""
    index_N = np.arange(1, len(vectors_NK) + 1) if index_N is None else index_N
    users_NK = np.concatenate([np.zeros((1, 2)), vectors_NK]).astype(np.float16)
    none_NK, none_N = np.zeros((1, 2), np.float16), np.zeros(31, np.int32)
    index_N = np.concatenate([[0], index_N]).astype(np.int32)
    return KnowledgeTable(users_NK, index_N, np.zeros((2, 2), np.float32), none_NK, none_N)


def near(ranker, table, row):
    found = Neighbours(table, ranker.checkpoint.users).find(row)
    return [(one.users, one.similarity) for one in found.users], found


def test_near_users_by_hand(ranker):
    """Mean (100, 0): less that, (10, 0), (8, 6), (0, -10), (-18, 4)."""
    table = table_of([(110, 0), (108, 6), (100, -10), (82, 4)])
    users, found = near(ranker, table, 1)
    assert [user for user, _ in users] == [["1001"], ["1002"], ["1003"]]
    assert [similarity for _, similarity in users] == pytest.approx([0.8, 0, -18 / np.sqrt(340)], abs=1e-3)
    assert (found.num_vectors, found.num_compared, found.reason) == (4, 4, None)


def test_users_who_share_a_vector_are_nearest(ranker):
    users, found = near(ranker, table_of([(110, 0), (90, 1)], [1, 2, 1, 0, 1]), 1)
    assert users[0] == (["1002", "1004"], 1.0) and found.users[0].num_users == 2
    assert near(ranker, table_of([(110, 0)], [1, 0]), 1)[1].reason == "the model has knowledge of no other user"
    assert near(ranker, table_of([(110, 0)], [1, 0]), 2)[1].reason == "the model has no knowledge of this user"


def test_many_vectors_are_sampled(ranker, monkeypatch):
    monkeypatch.setattr(subjects, "MAX_COMPARED", 10)
    rng = np.random.default_rng(0)
    table = table_of(rng.normal(size=(NUM_USERS, 2)))
    for row in (3, 4):  # one beside the sample, one in it
        users, found = near(ranker, table, row)
        assert (found.num_vectors, found.num_compared) == (NUM_USERS, 10)
        ids = [int(user) - 1000 + 1 for (user,), _ in users]
        assert len(ids) == 10 - (row == 4) and row not in ids and all(one % 4 == 0 for one in ids)


# ---------------------------------------------------------------- users and items


def test_what_a_user_liked(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"), more=SEQUENCES)
    ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, tiny_knowledge()))
    neighbours = Neighbours(ranker.checkpoint.knowledge, ranker.checkpoint.users)
    found = describe_user(ranker, neighbours, KNOWN)
    assert (found.text, found.num_train_rows, found.liked_reason) == ("user 1003", 1, None)
    logs = {log.log: log for log in found.liked}
    assert set(logs) == {"all", "search"}
    log = ranker.checkpoint.collator.logs["search"]
    rows = log.item_row_N[log.offset_U[4] : log.offset_U[5]]
    keys = ranker.checkpoint.items["key"].to_pylist()
    assert logs["search"].num_likes == len(rows) > 0
    assert [one.item for one in logs["search"].latest] == [str(keys[row - 1]) for row in rows[::-1]][:20]
    assert logs["search"].latest[0].text.startswith("genre ")
    assert len(logs["all"].latest) == min(logs["all"].num_likes, 20) > 0
    assert [log.num_likes for log in describe_user(ranker, neighbours, STRANGER).liked] == [0, 0]
    one, counted = example_users(ranker, "search", 4)
    assert counted == "likes in search"
    assert one[0].num == int(np.diff(log.offset_U).max())


def test_a_model_without_histories_says_so(ranker, neighbours):
    found = describe_user(ranker, neighbours, KNOWN)
    assert found.liked == [] and "reads no history" in found.liked_reason


def test_examples_of_users(ranker):
    found, counted = example_users(ranker, None, 12)
    assert counted == "training rows" and len({one.user for one in found}) == 12
    kinds = [one.kind for one in found]
    assert kinds == ["active"] * 6 + ["middling"] * 3 + ["without knowledge"] * 3
    assert [one.knowledge_known for one in found] == [True] * 9 + [False] * 3
    assert [len(example_users(ranker, "rec", num)[0]) for num in (1, 2, 3, 100)] == [1, 2, 3, NUM_USERS]
    with pytest.raises(RequestError, match="no scenario 'x'; valid: rec, search"):
        example_users(ranker, "x", 3)


def test_examples_of_items(ranker):
    checkpoint = ranker.checkpoint
    texts = ["" if i % 2 else f"item {i}" for i in range(checkpoint.items.num_rows)]
    rows = list(range(checkpoint.items.num_rows))
    items = checkpoint.items.select(["key"]).append_column("text", [texts]).append_column("num_train_rows", [rows])
    found = example_items(Ranker(replace(checkpoint, items=items)), 6)
    assert [one.item for one in found[:3]] == ["7028", "7026", "7024"]
    assert len({one.item for one in found}) == 6 and all(one.text for one in found)
    assert describe_item(ranker, 2**53 + 1).item == str(2**53 + 1)
