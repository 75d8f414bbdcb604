"""The cosine of user and item knowledge as an input of the backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_knowledge, tiny_prepared, tiny_schema

from llm4msr.batch import Collator, EntityFeatures
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.training.reader import list_row_groups, read_row_group


def test_match_is_the_cosine_of_standardised_vectors_and_zero_where_one_is_missing(tmp_path):
    prepared = tiny_prepared(str(tmp_path))
    rows = read_row_group(list_row_groups(prepared.files("train"))[0])
    users, items = prepared.users(), prepared.items()
    features = [EntityFeatures.from_table(t, prepared.schema, s) for t, s in ((users, "user"), (items, "item"))]
    table = tiny_knowledge(items=True)
    config = tiny_config(
        model={"knowledge_match": True}, knowledge={"levels": ["scenario", "user", "item"], "user_vectors": "items"}
    )
    model = build_model(tiny_schema(), config.model, 8, True).eval()
    set_knowledge(model, table)
    batch = Collator(prepared.schema, *features, table)(rows)
    match = model.match
    found_B = match(
        batch.knowledge_UK, batch.knowledge_index_B, batch.item_knowledge_UK, batch.item_knowledge_index_B
    ).squeeze(1)

    def standardised(vectors_NK, place):
        known_NK = vectors_NK[1:].astype(np.float64)
        return (vectors_NK[place].astype(np.float64) - known_NK.mean(0)) / known_NK.std(0)

    missing = 0
    for b, (user, item) in enumerate(zip(rows["user_row"], rows["item_row"], strict=True)):
        places = table.user_index_N[user], table.item_index_N[item]
        if not all(places):
            missing += 1
            assert found_B[b] == 0
            continue
        u_K, i_K = standardised(table.users_NK, places[0]), standardised(table.items_NK, places[1])
        cosine = u_K @ i_K / np.linalg.norm(u_K) / np.linalg.norm(i_K)
        assert found_B[b] == pytest.approx((cosine - float(match.mean)) / float(match.std), abs=2e-3)
    assert 0 < missing < len(rows["user_row"])
    users_PK, items_PK = table.random_pairs(500)
    pairs = torch.arange(1, 501)
    users_UK, items_UK = (torch.from_numpy(np.vstack([np.zeros(8), v])).float() for v in (users_PK, items_PK))
    scale = match(users_UK, pairs, items_UK, pairs)
    assert abs(scale.mean()) < 0.15 and scale.std() == pytest.approx(1, abs=0.1)
    assert model.backbone is not None and model(batch)[0].shape == (len(batch),)
    assert build_model(tiny_schema(), config.model, 8, False).match is None  # no item has knowledge
