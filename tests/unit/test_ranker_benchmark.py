"""The benchmark of the ranker: all sides score the same rows alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import ranker as bench
from benchmarks.train_world import World, write_world
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.training.checkpoint import load_checkpoint

WORLD = World(num_rows=2_000, num_users=500, num_items=3_000, num_valid_rows=200)


def test_every_side_is_measured():
    result = bench.run(WORLD, 2, 1, "short form")
    assert len(result.seconds) == 2 * (2 * 3 + 3) and all(s[0] > 0 for s in result.seconds.values())
    assert len(result.ratios) == 8 and len(result.goals) == 3 and result.met is None


@pytest.mark.parametrize("form", bench.FORMS)
def test_what_is_compared_is_the_same_scoring(tmp_path, form):
    prepared_uri, knowledge_uri = write_world(str(tmp_path), WORLD)
    checkpoint = load_checkpoint(bench.write_checkpoint(str(tmp_path / "c"), prepared_uri, knowledge_uri, form))
    assert checkpoint.config.model.meta.weight_form == form and checkpoint.knowledge.num_items_with_knowledge == 3_000
    rows = bench.candidate_rows(checkpoint, 100)
    batch = bench.regenerated(checkpoint.collator(rows))
    assert len(checkpoint.collator(rows).knowledge_UK) == 2  # of nobody and of the one user: generated once
    assert len(batch.knowledge_UK) == 101 and len(set(batch.knowledge_index_B.tolist())) == 100
    with torch.inference_mode():
        score_B = torch.sigmoid(checkpoint.model(batch)[0].double()).numpy()
    keys = checkpoint.items["key"].to_pylist()
    asked = RankRequest(
        checkpoint.users["key"][0].as_py(), checkpoint.schema.scenario_names[0], [keys[i - 1] for i in rows["item_row"]]
    )
    ranked = {r.item: r.score for r in Ranker(checkpoint).rank(asked).results}
    np.testing.assert_allclose([ranked[item] for item in asked.items], score_B, atol=1e-5)
    assert score_B.std() > 1e-3
