"""The model as requests use it scores as the model that was trained."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import NUM_ITEMS, NUM_USERS, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.config.model import Backbone
from llm4msr.knowledge.pooled import write_pooled_users
from llm4msr.models import serving
from llm4msr.ranker import Ranker
from llm4msr.request import LikedItem, RankRequest, RequestError
from llm4msr.training.checkpoint import load_checkpoint
from llm4msr.training.reader import list_row_groups, read_row_group

TOLERANCE = 1e-5  # of a logit
EVERYTHING = {
    "model": {"knowledge_match": True, "hidden_dims": [16, 8], "tower_dims": [8], "embedding_dim": 4},
    "knowledge": {"levels": ["scenario", "user", "item"], "user_vectors": "items"},
}
VARIANTS = {
    "everything": EVERYTHING,
    "full weights": {**EVERYTHING, "model": {**EVERYTHING["model"], "meta": {"weight_form": "full"}}},
    "as published": {"knowledge": {"levels": ["scenario", "user"]}},
    "two user layers, not added": {"model": {"meta": {"num_user_layers": 2, "residual": False}}},
    "scenario level alone": {"model": {"meta": {"user_level": False}}},
    "user level alone": {"model": {"meta": {"scenario_level": False}}},
    "match alone": {
        **EVERYTHING,
        "model": {**EVERYTHING["model"], "meta": {"user_level": False, "scenario_level": False}},
    },
}
SCENARIOS, CONTEXT = ("rec", "search"), {"price": 7.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="module")
def rows(prepared):
    return read_row_group(list_row_groups(prepared.files("train"))[0])


def load(prepared, folder, tree, knowledge=True, **options):
    items = "item" in tree.get("knowledge", {}).get("levels", [])
    table = tiny_knowledge(items=items) if knowledge else None
    uri = tiny_checkpoint(str(folder / "checkpoint"), prepared, table, **tree)
    return Ranker(load_checkpoint(uri), **options)


def differences(ranker, rows):
    """Serves some users all items in both scenarios; returns the largest difference to the trained model's logits, and
    the logits."""
    found, logits = [], []
    model, collator, knowledge = ranker.checkpoint.model, ranker.checkpoint.collator, ranker.checkpoint.knowledge
    for user_row in (0, 1, 2, 3, 39, 40):  # 0: unknown, the last ones without knowledge
        for scenario in (0, 1):
            items = np.arange(NUM_ITEMS + 1, dtype=np.int32)  # 0: unknown, the last ones without knowledge
            asked = {name: column[: len(items)].copy() for name, column in rows.items()}
            asked["user_row"][:], asked["item_row"][:], asked["scenario"][:] = user_row, items, scenario
            with torch.inference_mode():
                expected = model(collator(asked))[0]
                vector_row = 0 if knowledge is None else knowledge.user_index_N[user_row]
                item_B = np.zeros(0) if knowledge is None else knowledge.item_index_N[items].astype(np.int64)
                batch, layers = collator.features(asked), ranker.user_layers(int(vector_row))
                logit = ranker.serving(batch, layers, torch.from_numpy(item_B), scenario)
            found.append((logit - expected).abs().max().item())
            logits.append(logit)
    return max(found), torch.cat(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_scores_as_the_trained_model(prepared, rows, tmp_path, variant):
    ranker = load(prepared, tmp_path, VARIANTS[variant])
    difference, logits = differences(ranker, rows)
    assert difference < TOLERANCE and logits.std() > 0.02


@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_it_scores_as_the_trained_model_whatever_the_backbone(prepared, rows, tmp_path, backbone):
    tree = {**EVERYTHING, "model": {**EVERYTHING["model"], "backbone": backbone}}
    difference, logits = differences(load(prepared, tmp_path, tree), rows)
    assert difference < TOLERANCE and logits.std() > 0.005


def test_a_backbone_alone_is_served_too(prepared, rows, tmp_path):
    difference, logits = differences(load(prepared, tmp_path, {}, knowledge=False), rows)
    assert difference < TOLERANCE and logits.std() > 0.02


def test_items_too_many_to_keep_are_condensed_in_each_request(prepared, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "PROJECTED_BYTES", 0)
    monkeypatch.setattr(serving, "BLOCK_ROWS", 7)
    ranker = load(prepared, tmp_path, EVERYTHING)
    assert ranker.serving.item_NP is None and len(ranker.serving.item_length_N) == 27
    difference, _ = differences(ranker, rows)
    assert difference < TOLERANCE


def test_layers_are_generated_once_for_a_user_and_only_a_bounded_number_is_kept(prepared, tmp_path):
    ranker = load(prepared, tmp_path, EVERYTHING, cache_bytes=0)
    size = ranker.serving.user_layers_bytes()
    assert size > 0 and ranker.user_layers.cache_info().maxsize == 1
    ranker = Ranker(ranker.checkpoint, cache_bytes=3 * size + size // 2)
    users = prepared.users()["key"].to_pylist()

    def ask(user):
        return ranker.rank(RankRequest(user, "rec", [7000, 7001], context=CONTEXT)).results

    first = [ask(user) for user in users[:3]]
    assert ranker.user_layers.cache_info()[:] == (0, 3, 3, 3)
    assert [ask(user) for user in users[:3]] == first
    assert ranker.user_layers.cache_info()[:] == (3, 3, 3, 3)
    ask(users[3])  # the first user's are dropped for it
    assert ask(users[0]) == first[0]
    assert ranker.user_layers.cache_info()[:] == (3, 5, 3, 3)


def test_users_without_knowledge_share_their_layers(prepared, tmp_path):
    ranker = load(prepared, tmp_path, EVERYTHING)
    users = prepared.users()["key"].to_pylist()
    answers = [ranker.rank(RankRequest(user, "rec", [7000], context=CONTEXT)) for user in (users[-1], users[-2], -99)]
    assert [answer.knowledge_known for answer in answers] == [False] * 3
    assert ranker.user_layers.cache_info()[:2] == (2, 1)


# ---------------------------------------------------------------- users whom the model does not know


def scores(ranker, **asked):
    answer = ranker.rank(RankRequest(scenario="rec", items=list(range(7000, 7010)), context=CONTEXT, **asked))
    by_item = {result.item: result.score for result in answer.results}
    return [by_item[item] for item in range(7000, 7010)], answer.knowledge_known


def test_a_vector_in_the_request_stands_for_the_users_own(prepared, tmp_path):
    ranker = load(prepared, tmp_path, EVERYTHING)
    knowledge = ranker.checkpoint.knowledge
    user = prepared.users()["key"].to_pylist()[4]
    vector = knowledge.users_NK[knowledge.user_index_N[5]].tolist()
    own, known = scores(ranker, user=user)
    assert known and scores(ranker, user=user, knowledge=vector) == (pytest.approx(own, abs=1e-6), True)
    other, _ = scores(ranker, user=user, knowledge=[-x for x in vector])
    assert np.abs(np.subtract(own, other)).max() > 1e-3
    stranger, known = scores(ranker, user=-1)
    given, now_known = scores(ranker, user=-1, knowledge=vector)
    assert (known, now_known) == (False, True) and np.abs(np.subtract(stranger, given)).max() > 1e-3
    assert ranker.user_layers.cache_info().currsize == 2  # of the request's vectors nothing is kept


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([1.0] * 7, "7 numbers: the language model's vectors have 8"),
        ([], "0 numbers: the language model's vectors have 8"),
        ([1.0] * 7 + [float("nan")], "numbers within ±65504 are needed"),
        ([1.0] * 7 + [1e6], "numbers within ±65504 are needed"),
    ],
)
def test_a_vector_that_cannot_be_the_language_models_is_refused(prepared, tmp_path, vector, message):
    with pytest.raises(RequestError, match=message) as error:
        scores(load(prepared, tmp_path, EVERYTHING), user=1, knowledge=vector)
    assert error.value.field == "knowledge"


def test_a_model_that_reads_no_vectors_refuses_them(prepared, tmp_path):
    for folder, tree, knowledge in (("a", {}, False), ("b", VARIANTS["scenario level alone"], True)):
        with pytest.raises(RequestError, match="this model reads no knowledge of users: leave knowledge out"):
            scores(load(prepared, tmp_path / folder, tree, knowledge), user=1, knowledge=[0.0] * 8)


def test_a_vector_is_made_of_the_history(prepared, tmp_path):
    """As the extraction makes it of the same likes; items without a vector do not count, and none leaves no vector."""
    checkpoint = load(prepared, tmp_path, EVERYTHING).checkpoint
    table, keys = checkpoint.knowledge, prepared.items()["key"].to_pylist()
    liked_rows = [3, 9, 3, 30, 12]  # item row 30 has no vector
    rows = pa.table(
        {
            "user_row": pa.array([7] * 5, pa.int32()),
            "item_row": pa.array(liked_rows, pa.int32()),
            "label": pa.array([1] * 5, pa.int8()),
            "moment": pa.array(range(5), pa.int64()),
        }
    )
    bucket = str(tmp_path / "bucket.parquet")
    storage.write_parquet(bucket, rows)
    write_pooled_users(str(tmp_path / "made"), [bucket], NUM_USERS, 2, table.items_NK, table.item_index_N)
    expected_K = np.load(tmp_path / "made" / "users.npy")[1].astype(np.float32)

    metadata = {**checkpoint.metadata, "knowledge": "llm"}
    ranker = Ranker(replace(checkpoint, metadata=metadata))
    history = [LikedItem(keys[row - 1], "rec") for row in liked_rows]
    made, known = scores(ranker, user=-1, history=history)
    given, _ = scores(ranker, user=-1, knowledge=expected_K.tolist())
    assert known and made == pytest.approx(given, abs=1e-5)
    nobody, known = scores(ranker, user=-1, history=[LikedItem(keys[29], "rec"), LikedItem(-5, "search")])
    assert not known and nobody == scores(ranker, user=-1)[0] != made
    known_user = prepared.users()["key"].to_pylist()[0]
    assert scores(ranker, user=known_user, history=[])[1] is False  # as asked: a user without likes
    shuffled = Ranker(replace(checkpoint, metadata={**metadata, "knowledge": "shuffled"}))
    with pytest.raises(RequestError, match="reads no history"):
        scores(shuffled, user=-1, history=history)
