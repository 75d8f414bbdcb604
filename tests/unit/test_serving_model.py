"""The model as requests use it scores as the model that was trained."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from tiny import NUM_ITEMS, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr.config.model import Backbone
from llm4msr.models import serving
from llm4msr.ranker import Ranker, RankRequest
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
    assert difference < TOLERANCE and logits.std() > 0.05


@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_it_scores_as_the_trained_model_whatever_the_backbone(prepared, rows, tmp_path, backbone):
    tree = {**EVERYTHING, "model": {**EVERYTHING["model"], "backbone": backbone}}
    difference, logits = differences(load(prepared, tmp_path, tree), rows)
    assert difference < TOLERANCE and logits.std() > 0.01


def test_a_backbone_alone_is_served_too(prepared, rows, tmp_path):
    difference, logits = differences(load(prepared, tmp_path, {}, knowledge=False), rows)
    assert difference < TOLERANCE and logits.std() > 0.05


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
