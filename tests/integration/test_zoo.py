"""Every backbone, alone and inside LLM4MSR: it learns, its checkpoint scores as it did, and it is served.

The data have a planted taste per user. The knowledge stands in for a language model's: vectors that tell the taste.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import NUM_USERS, tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.evaluation import evaluate_checkpoint, evaluate_item_mean
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.backbones import BACKBONES
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.schema import FIRST_INDEX, SPLITS
from llm4msr.training.loop import train_worker
from llm4msr.training.reader import list_row_groups, read_row_group
from llm4msr.training.saving import save_checkpoint
from llm4msr.training.task import TrainTask
from llm4msr.training.tensors import write_tensors
from serve.api import Limits, build_api
from serve.served import Served

KNOWLEDGE = ("none", "llm")
KNOWLEDGE_WIDTH = 16
NUM_ROWS = 6000
FIRST_OTHER_GENRE = 2
MIN_GAIN = 0.2  # of AUC over the item mean
TRAIN = {"max_epochs": 4, "batch_size": 128, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def taste_N() -> np.ndarray:
    """+1 for users who like the genres below `FIRST_OTHER_GENRE`, -1 for those who like the others."""
    return np.random.default_rng(7).permutation(np.arange(NUM_USERS) % 2 * 2 - 1)


@pytest.fixture(scope="module")
def prepared(taste_N, tmp_path_factory):
    """Labels follow the user's taste, in search less than in rec; an item alone says nothing."""
    prepared = tiny_prepared(str(tmp_path_factory.mktemp("zoo") / "prepared"), NUM_ROWS)
    rng = np.random.default_rng(8)
    side_I = np.where(np.array(prepared.items()["genre"]) - FIRST_INDEX < FIRST_OTHER_GENRE, 1, -1)
    for split in SPLITS:
        for uri, num_rows in prepared.files(split):
            table = storage.read_parquet(uri)
            user_N, item_N, scenario_N = (table[name].to_numpy() for name in ("user_row", "item_row", "scenario"))
            strength_N = np.where(scenario_N == 0, 0.45, 0.35)
            liked_N = rng.random(num_rows) < 0.5 + strength_N * taste_N[user_N - 1] * side_I[item_N - 1]
            changed = table.to_pydict() | {"label": liked_N.astype(np.int8)}
            storage.write_parquet(uri, pa.table(changed, schema=table.schema), row_group_size=500)
    return prepared


@pytest.fixture(scope="module")
def knowledge(taste_N) -> KnowledgeTable:
    """Users' vectors point along their taste, but for noise; those of scenarios are random; items have none."""
    rng = np.random.default_rng(9)
    users_NK = np.zeros((NUM_USERS + 1, KNOWLEDGE_WIDTH), np.float16)
    users_NK[1:] = np.outer(taste_N, rng.normal(size=KNOWLEDGE_WIDTH)) + rng.normal(size=(NUM_USERS, KNOWLEDGE_WIDTH))
    scenarios_SK = rng.normal(size=(2, KNOWLEDGE_WIDTH)).astype(np.float32)
    return replace(
        tiny_knowledge(KNOWLEDGE_WIDTH),
        users_NK=users_NK,
        user_index_N=np.arange(NUM_USERS + 1, dtype=np.int32),
        scenarios_SK=scenarios_SK,
    )


@pytest.fixture(scope="module")
def item_mean(prepared) -> dict[tuple[str, str], float]:
    return auc_of(evaluate_item_mean(prepared.uri))


def auc_of(rows: list[dict]) -> dict[tuple[str, str], float]:
    return {(row["split"], row["scenario"]): row["auc"] for row in rows}


@pytest.fixture(scope="module")
def train(prepared, knowledge, tmp_path_factory):
    """Trains a backbone once for all tests; returns the checkpoint's place and metadata."""
    root = tmp_path_factory.mktemp("runs")
    knowledge_uri = str(root / "knowledge")
    knowledge.save(knowledge_uri)
    trained = {}

    def train(backbone: str, kind: str) -> tuple[str, dict]:
        name = f"{backbone}-{kind}"
        if name not in trained:
            config = tiny_config(model={"backbone": backbone}, train=TRAIN)
            uri = knowledge_uri if kind == "llm" else None
            task = TrainTask(config, prepared.uri, uri, kind, 0, str(root / name), name)
            metadata = train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
            trained[name] = task.checkpoint_uri, metadata
        return trained[name]

    return train


@pytest.mark.parametrize("kind", KNOWLEDGE)
@pytest.mark.parametrize("backbone", BACKBONES)
class TestEveryBackbone:
    def test_learns(self, train, prepared, item_mean, backbone, kind):
        checkpoint_uri, metadata = train(backbone, kind)
        auc = auc_of(evaluate_checkpoint(checkpoint_uri, prepared.uri))
        gains = {key: value - item_mean[key] for key, value in auc.items()}
        assert min(gains.values()) > MIN_GAIN, gains
        # The checkpoint scores as the model did while it was trained.
        scenarios = [auc["valid", name] for name in prepared.schema.scenario_names]
        assert np.mean(scenarios) == pytest.approx(metadata["valid_auc"], abs=1e-3)

    def test_a_checkpoint_gives_equal_scores(self, prepared, knowledge, tmp_path, backbone, kind):
        """Not trained: weights that no initialisation gives, and running statistics that have moved."""
        table = knowledge if kind == "llm" else None
        config = tiny_config(model={"backbone": backbone, "embedding_dim": 8})
        torch.manual_seed(0)
        model = build_model(prepared.schema, config.model, table.width if table else None)
        if table:
            set_knowledge(model, table)
        users = EntityFeatures.from_table(prepared.users(), prepared.schema, "user")
        items = EntityFeatures.from_table(prepared.items(), prepared.schema, "item")
        rows = read_row_group(list_row_groups(prepared.files("test"))[0])
        batch = Collator(prepared.schema, users, items, table)(rows)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            model.train()(batch)
            expected = torch.sigmoid(model.eval()(batch)[0].double()).numpy()
        weights_uri, checkpoint_uri = str(tmp_path / "weights.safetensors"), str(tmp_path / "checkpoint")
        write_tensors(weights_uri, model.state_dict())
        metadata = {"model_version": "x", "backbone": backbone, "knowledge": kind, "seed": 0, "prepared": "prepared"}
        save_checkpoint(checkpoint_uri, config, prepared, table, weights_uri, metadata)
        scores = Ranker.from_checkpoint(checkpoint_uri).score(rows)
        np.testing.assert_array_equal(scores, expected)
        assert len(np.unique(scores)) > len(scores) / 2

    def test_is_served(self, train, prepared, backbone, kind):
        checkpoint_uri, _ = train(backbone, kind)
        ranker = Ranker.from_checkpoint(checkpoint_uri)
        items = [*range(7000, 7010), 1]  # the last is unknown
        scores = {}
        for scenario in prepared.schema.scenario_names:
            answer = ranker.rank(RankRequest(user=1000, scenario=scenario, items=items))
            assert answer.knowledge_known == (kind == "llm")
            assert [result.score for result in answer.results] == sorted(
                (r.score for r in answer.results), reverse=True
            )
            scores[scenario] = {result.item: result.score for result in answer.results}
            assert set(scores[scenario]) == set(items)
        assert scores["rec"] != scores["search"]
        # An item's score does not depend on the candidates beside it.
        alone = ranker.rank(RankRequest(user=1000, scenario="rec", items=[7003])).results[0].score
        assert alone == pytest.approx(scores["rec"][7003], abs=1e-5)


@pytest.mark.parametrize(("backbone", "kind"), [("ple", "llm"), ("dcnv2", "none")])
def test_over_http(train, backbone, kind):
    checkpoint_uri, _ = train(backbone, kind)
    ranker = Ranker.from_checkpoint(checkpoint_uri)
    served = Served()
    served.change({"checkpoint_uri": checkpoint_uri})
    api = build_api(served, Limits())

    async def call(method: str, path: str, **content) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://ranker") as client:
            return await client.request(method, path, **content)

    model = asyncio.run(call("GET", "/v1/model")).json()
    assert (model["backbone"], model["knowledge"]) == (backbone, kind)
    body = {"user": 1003, "scenario": "search", "items": [7000, 7001, 7002]}
    answer = asyncio.run(call("POST", "/v1/rank", json=body)).json()
    expected = ranker.rank(RankRequest(**body)).results
    assert [(r["item"], r["score"]) for r in answer["results"]] == [(r.item, r.score) for r in expected]
