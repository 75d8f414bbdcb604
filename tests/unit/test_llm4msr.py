"""The wrapper: levels switched on and off, unseen users, embeddings, what shuffling and dropout do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import NUM_USERS, tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared, tiny_schema

from llm4msr.batch import Collator, EntityFeatures
from llm4msr.models.layers import FeatureEmbedding
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.ranker import Ranker
from llm4msr.training.reader import list_row_groups, read_row_group


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("tiny") / "prepared"))


def collator(prepared, knowledge):
    users = EntityFeatures.from_table(prepared.users(), prepared.schema, "user")
    items = EntityFeatures.from_table(prepared.items(), prepared.schema, "item")
    return Collator(prepared.schema, users, items, knowledge)


@pytest.fixture(scope="module")
def rows(prepared):
    return read_row_group(list_row_groups(prepared.files("train"))[0])


def build(knowledge=True, **meta):
    torch.manual_seed(0)
    config = tiny_config(model={"meta": meta})
    model = build_model(tiny_schema(), config.model, 8 if knowledge else None)
    if knowledge:
        table = tiny_knowledge()
        users_UK = torch.from_numpy(table.users_NK[1:].astype(np.float32))
        set_knowledge(model, users_UK, torch.from_numpy(table.scenarios_SK))
    return model


def test_collator_gathers_every_kind_of_feature(prepared, rows):
    table = tiny_knowledge()
    batch = collator(prepared, table)(rows)
    users, items = prepared.users(), prepared.items()
    user, item = rows["user_row"][5] - 1, rows["item_row"][5] - 1
    assert batch.ids_BF[5].tolist() == [
        users["user_id"][user].as_py(),
        items["item_id"][item].as_py(),
        items["genre"][item].as_py(),
        rows["search_source"][5],
    ]
    np.testing.assert_allclose(batch.numeric_BN[5], [users["age"][user].as_py(), rows["price"][5]])
    assert batch.sequences[0][5].tolist() == items["tags"][item].as_py()
    np.testing.assert_array_equal(
        batch.knowledge_UK[batch.knowledge_index_B].numpy(),
        table.users_NK[table.user_index_N[rows["user_row"]]].astype(np.float32),
    )
    assert batch.knowledge_UK[0].eq(0).all()
    assert len(batch.knowledge_UK) <= NUM_USERS + 1  # distinct users, not rows
    np.testing.assert_array_equal(batch.label_B.numpy(), rows["label"])


def test_unknown_user_and_item_are_unseen(prepared):
    row = {"row_id": [0], "user_row": [0], "item_row": [0], "scenario": [1], "label": [0], "search_source": [1]}
    batch = collator(prepared, tiny_knowledge())({k: np.array(v) for k, v in row.items()} | {"price": np.zeros(1)})
    assert batch.ids_BF.tolist() == [[1, 1, 1, 1]]
    assert batch.numeric_BN.tolist() == [[0.0, 0.0]]
    assert batch.sequences[0].tolist() == [[0, 0, 0]]
    assert batch.knowledge_index_B.tolist() == [0]


def test_sequences_are_mean_pooled_over_their_length():
    embedding = FeatureEmbedding(tiny_schema(), 4)
    table = embedding.sequence_tables[0].weight
    batch = collator_batch([[2, 4, 0], [0, 0, 0], [3, 3, 5]])
    pooled = embedding(batch)[:, 16:20]
    torch.testing.assert_close(
        pooled, torch.stack([(table[2] + table[4]) / 2, table[0] * 0, (2 * table[3] + table[5]) / 3])
    )


def collator_batch(tags):
    from llm4msr.batch import Batch

    n = len(tags)
    zeros = torch.zeros(n)
    return Batch(
        torch.ones(n, 4, dtype=torch.int64), torch.zeros(n, 2), (torch.tensor(tags),), zeros.long(), zeros, zeros.long()
    )


def test_embedding_gradients_are_sparse_and_touch_only_looked_up_rows(prepared, rows):
    model = build()
    batch = collator(prepared, tiny_knowledge())(rows)
    model(batch)[0].sum().backward()
    for i, table in enumerate(model.embedding.tables):
        gradient = table.weight.grad
        assert gradient.is_sparse
        assert set(gradient.coalesce().indices()[0].tolist()) <= set(batch.ids_BF[:, i].tolist())


def test_padding_and_unseen_start_neutral():
    embedding = FeatureEmbedding(tiny_schema(), 4)
    for table in (*embedding.tables, *embedding.sequence_tables):
        assert table.weight[:2].eq(0).all()
        assert table.weight[2:].abs().sum() > 0


def test_unseen_dropout_hides_user_and_item_ids_only(prepared, rows):
    embedding = FeatureEmbedding(tiny_schema(), 4, unseen_dropout=0.999999)
    batch = collator(prepared, None)(rows)
    shown = embedding(batch)
    assert shown[:, 0:8].eq(0).all()  # user_id and item_id look up the unseen row
    assert shown[:, 8:12].abs().sum(1).gt(0).all()  # genre does not
    embedding.eval()
    assert embedding(batch)[:, 0:8].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("form", ["full", "low_rank"])
@pytest.mark.parametrize(("user", "scenario"), [(True, True), (True, False), (False, True)])
def test_levels_switch(prepared, rows, form, user, scenario):
    model = build(user_level=user, scenario_level=scenario, weight_form=form, num_user_layers=2, scenario_dims=(6, 5))
    assert (model.user_meta is None, model.scenario_meta is None) == (not user, not scenario)
    batch = collator(prepared, tiny_knowledge())(rows)
    model(batch)[0].square().sum().backward()
    dense = {n: p for n, p in model.named_parameters() if "embedding.tables" not in n and "sequence" not in n}
    assert [n for n, p in dense.items() if p.grad is None] == []


def test_no_level_is_refused():
    with pytest.raises(ValueError, match=r"user_level and model.meta.scenario_level are both off"):
        build(user_level=False, scenario_level=False)


def test_user_level_residual_is_the_paper_formula(prepared, rows):
    model = build(scenario_level=False).eval()
    batch = collator(prepared, tiny_knowledge())(rows)
    x_BD = model.embedding(batch)
    meta = model.user_meta
    z_UZ = meta.trunk(batch.knowledge_UK)
    weight_UDD, bias_UD = meta.layers[0].weight(z_UZ), meta.layers[0].bias_head(z_UZ)
    index_B = batch.knowledge_index_B
    changed = torch.einsum("bd,bdh->bh", x_BD, weight_UDD[index_B]) + bias_UD[index_B]
    h_BD = x_BD + torch.nn.functional.gelu(changed)
    torch.testing.assert_close(model(batch)[0], model.backbone(h_BD, batch.scenario_B), atol=1e-5, rtol=1e-5)


def test_knowledge_is_standardised_to_unit_scale():
    """Scenario prompts are much alike: what tells them apart must not be lost in what they share."""
    model = build(knowledge=True)
    shared, own = torch.randn(8) * 10, torch.randn(2, 8) * 0.1
    users_UK = torch.randn(50, 8) * 3 + 5
    set_knowledge(model, users_UK, shared + own)
    trunk, knowledge_SK = model.scenario_meta.trunk, model.scenario_meta.knowledge_SK
    standardised_SK = (knowledge_SK - trunk.mean_K) / trunk.std_K
    torch.testing.assert_close(standardised_SK.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)
    standardised_UK = (users_UK - model.user_meta.trunk.mean_K) / model.user_meta.trunk.std_K
    torch.testing.assert_close(standardised_UK.square().mean(0), torch.ones(8), atol=1e-4, rtol=0)
    set_knowledge(model, users_UK, shared.expand(2, 8))  # nothing tells them apart: no division by zero
    assert torch.isfinite(model.scenario_meta.trunk(model.scenario_meta.knowledge_SK)).all()


def test_penalty_is_the_squared_norm_of_the_embeddings_alone(prepared, rows):
    model = build(knowledge=False).eval()
    batch = collator(prepared, None)(rows)
    x_BD = model.embedding(batch)
    assert x_BD.shape[1] == 4 * 5 + 2  # four categorical features, one sequence, two numbers
    torch.testing.assert_close(model(batch)[1], x_BD[:, :20].square().sum(1))


def test_scenario_level_adds_its_logit(prepared, rows):
    model = build(user_level=False).eval()
    batch = collator(prepared, tiny_knowledge())(rows)
    x_BD = model.embedding(batch)
    expected = model.backbone(x_BD, batch.scenario_B) + model.scenario_meta(x_BD, batch.scenario_B)
    torch.testing.assert_close(model(batch)[0], expected)
    assert model.scenario_meta(x_BD, batch.scenario_B).abs().max() > 1e-3


def test_knowledge_dropout_trains_the_missing_vector(prepared, rows):
    model = build(knowledge_dropout=0.5)
    known = {k: v[rows["user_row"] <= NUM_USERS - 5] for k, v in rows.items()}
    model(collator(prepared, tiny_knowledge())(known))[0].sum().backward()
    assert model.user_meta.trunk.missing_Z.grad.abs().sum() > 0
    model = build(knowledge_dropout=0.0)
    model(collator(prepared, tiny_knowledge())(known))[0].sum().backward()
    assert model.user_meta.trunk.missing_Z.grad.abs().sum() == 0


def test_backbone_alone_ignores_knowledge(prepared, rows):
    model = build(knowledge=False).eval()
    with_knowledge = model(collator(prepared, tiny_knowledge())(rows))[0]
    torch.testing.assert_close(with_knowledge, model(collator(prepared, None)(rows))[0])


@pytest.mark.parametrize("backbone", ["star", "shared_bottom"])
@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_score_alone_equals_score_in_a_batch(prepared, rows, tmp_path, backbone, form):
    uri = tiny_checkpoint(
        str(tmp_path / "ck"), prepared, tiny_knowledge(), model={"backbone": backbone, "meta": {"weight_form": form}}
    )
    ranker = Ranker.from_checkpoint(uri)
    together = ranker.score(rows)
    alone = np.concatenate([ranker.score({k: v[i : i + 1] for k, v in rows.items()}) for i in range(len(together))])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert together.std() > 0.01


def test_order_of_knowledge_rows_does_not_matter(prepared, rows, tmp_path):
    """The same vectors stored in another order, the index following, give the same scores."""
    from llm4msr.knowledge.table import KnowledgeTable

    table = tiny_knowledge()
    order = np.r_[0, np.random.default_rng(1).permutation(np.arange(1, len(table.users_NK)))]
    place = np.argsort(order).astype(np.int32)
    moved = KnowledgeTable(table.users_NK[order], place[table.user_index_N], table.scenarios_SK)
    model = build().eval()
    expected = model(collator(prepared, table)(rows))[0]
    torch.testing.assert_close(model(collator(prepared, moved)(rows))[0], expected)
    other = model(collator(prepared, table.shuffled(0))(rows))[0]
    assert (other - expected).abs().max() > 1e-3
