"""The wrapper: levels switched on and off, unseen users, embeddings, what shuffling and dropout do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import NUM_ITEMS, NUM_USERS, tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared, tiny_schema

from jobs.session import user_message
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import ConfigError, MetaConfig, ModelConfig
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.embedding import FeatureEmbedding
from llm4msr.models.layers import Order
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.ranker import Ranker
from llm4msr.storage import StorageError
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


def build(knowledge=True, items=False, **meta):
    torch.manual_seed(0)
    levels = ["scenario", "user", "item"] if items else ["scenario", "user"]
    config = tiny_config(model={"meta": meta}, knowledge={"levels": levels})
    if not knowledge:
        return build_model(tiny_schema(), config.model, None)
    model = build_model(tiny_schema(), config.model, 8, items)
    set_knowledge(model, tiny_knowledge(items=items))
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


def test_collator_gathers_item_knowledge(prepared, rows):
    table = tiny_knowledge(items=True)
    shared_index_N = np.where(table.item_index_N > 20, 3, table.item_index_N).astype(np.int32)  # equal texts
    batch = collator(prepared, replace(table, item_index_N=shared_index_N))(rows)
    np.testing.assert_array_equal(
        batch.item_knowledge_UK[batch.item_knowledge_index_B].numpy(),
        table.items_NK[shared_index_N[rows["item_row"]]].astype(np.float32),
    )
    assert batch.item_knowledge_UK[0].eq(0).all()
    assert len(batch.item_knowledge_UK) <= 20 + 1
    moved = batch.to(torch.device("meta"))
    assert moved.item_knowledge_UK.is_meta and moved.item_knowledge_index_B.is_meta


def test_collator_refuses_knowledge_of_other_data(prepared):
    table = tiny_knowledge(items=True)
    with pytest.raises(ValueError, match="knowledge table is of 29 items, the data has 30"):
        collator(prepared, replace(table, item_index_N=table.item_index_N[:-1]))
    with pytest.raises(ValueError, match="knowledge table is of 41 users, the data has 40"):
        collator(prepared, replace(table, user_index_N=np.append(table.user_index_N, np.int32(0))))


def test_unknown_user_and_item_are_unseen(prepared):
    row = {"row_id": [0], "user_row": [0], "item_row": [0], "scenario": [1], "label": [0], "search_source": [1]}
    table = tiny_knowledge(items=True)
    batch = collator(prepared, table)({k: np.array(v) for k, v in row.items()} | {"price": np.zeros(1)})
    assert batch.ids_BF.tolist() == [[1, 1, 1, 1]]
    assert batch.numeric_BN.tolist() == [[0.0, 0.0]]
    assert batch.sequences[0].tolist() == [[0, 0, 0]]
    assert batch.knowledge_index_B.tolist() == batch.item_knowledge_index_B.tolist() == [0]


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


LEVELS = [(True, True, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)]


@pytest.mark.parametrize("form", ["full", "low_rank"])
@pytest.mark.parametrize(("user", "scenario", "items"), LEVELS)
def test_levels_switch(prepared, rows, form, user, scenario, items):
    """Each level alone and all together; the gradient reaches every parameter."""
    meta = {"weight_form": form, "num_user_layers": 2, "scenario_dims": (6, 5)}
    model = build(items=items, user_level=user, scenario_level=scenario, **meta)
    parts = (model.user_meta, model.scenario_meta, model.item_knowledge)
    assert [part is not None for part in parts] == [user, scenario, items]
    batch = collator(prepared, tiny_knowledge(items=items))(rows)
    model(batch)[0].square().sum().backward()
    dense = {n: p for n, p in model.named_parameters() if "embedding.tables" not in n and "sequence" not in n}
    assert [n for n, p in dense.items() if p.grad is None] == []
    reached = [n for n, p in dense.items() if n.startswith("item_knowledge") and p.grad.abs().sum() > 0]
    assert len(reached) == (5 if items else 0)  # two layers' weights and biases, and the missing vector


def test_no_level_is_refused():
    config = ModelConfig(meta=MetaConfig(user_level=False, scenario_level=False))
    with pytest.raises(ConfigError, match=r"both off and no item has knowledge: nothing would read") as caught:
        build_model(tiny_schema(), config, 8)
    assert user_message(caught.value) == str(caught.value)  # a job says it without a traceback


def test_knowledge_of_other_data_is_refused(prepared):
    other = tiny_knowledge()
    other = replace(other, user_index_N=other.user_index_N[:-1])
    with pytest.raises(StorageError, match=r"of 39 users, the data has 40: .* run jobs\.extract") as caught:
        collator(prepared, other)
    assert user_message(caught.value) == str(caught.value)


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


def test_item_knowledge_stands_beside_the_embeddings_as_any_feature(prepared, rows):
    """Both levels of meta layers and the backbone see the embeddings and the projected item, by hand."""
    table = tiny_knowledge(items=True)
    model = build(items=True).eval()
    batch = collator(prepared, table)(rows)
    found_NK = table.items_NK[1:].astype(np.float32)
    vectors_BK = table.items_NK[table.item_index_N[rows["item_row"]]].astype(np.float32)
    standardised_BK = torch.from_numpy((vectors_BK - found_NK.mean(0)) / found_NK.std(0))
    trunk = model.item_knowledge.trunk
    item_BP = trunk.dense(standardised_BK)
    missing_B = torch.from_numpy(table.item_index_N[rows["item_row"]] == 0)
    assert 0 < missing_B.sum() < len(missing_B)
    item_BP[missing_B] = trunk.missing_Z
    x_BD = torch.cat([model.embedding(batch), item_BP], dim=1)
    h_BD = model.user_meta(x_BD, batch.knowledge_UK, batch.knowledge_index_B)
    expected = model.backbone(h_BD, batch.scenario_B) + model.scenario_meta(h_BD, batch.scenario_B)
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-5, rtol=1e-5)
    embedded = model.embedding.embedded_dim
    torch.testing.assert_close(model(batch)[1], x_BD[:, :embedded].square().sum(1))  # the penalty leaves it alone


def test_an_item_without_knowledge_scores_exactly_as_one_whose_knowledge_is_hidden(prepared, rows):
    table = tiny_knowledge(items=True)
    model = build(items=True).eval()
    with torch.no_grad():
        model.item_knowledge.trunk.missing_Z.normal_()
    none = replace(table, item_index_N=np.zeros_like(table.item_index_N))
    batch = collator(prepared, table)(rows)
    hidden = replace(batch, item_knowledge_index_B=torch.zeros_like(batch.item_knowledge_index_B))
    without, shown = model(collator(prepared, none)(rows))[0], model(batch)[0]
    assert torch.equal(without, model(hidden)[0])
    missing_B = batch.item_knowledge_index_B == 0
    torch.testing.assert_close(shown[missing_B], without[missing_B], atol=1e-6, rtol=1e-6)
    assert (shown - without)[~missing_B].abs().min() > 1e-5


@pytest.mark.parametrize("dims", [(), (12,), (64, 16)])
def test_width_of_the_projection(dims):
    config = tiny_config(model={"item_knowledge_dims": dims})
    model = build_model(tiny_schema(), config.model, 8, True)
    assert model.item_knowledge.output_dim == (dims[-1] if dims else 8)
    assert model.backbone.norm.gamma.shape == (model.embedding.output_dim + model.item_knowledge.output_dim,)


def test_knowledge_is_standardised_to_unit_scale():
    """Scenario prompts are much alike: what tells them apart must not be lost in what they share."""
    model = build(items=True)
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=8) * 10, rng.normal(size=(2, 8)) * 0.1
    vectors_NK = (rng.normal(size=(51, 8)) * 3 + 5).astype(np.float16)
    vectors_NK[0] = 0
    index_N = np.arange(51, dtype=np.int32)
    half_NK = vectors_NK[:20] / 2
    table = KnowledgeTable(vectors_NK, index_N, (shared + own).astype(np.float32), half_NK, index_N[:20])
    set_knowledge(model, table)
    trunk, knowledge_SK = model.scenario_meta.trunk, model.scenario_meta.knowledge_SK
    standardised_SK = (knowledge_SK - trunk.mean_K) / trunk.std_K
    torch.testing.assert_close(standardised_SK.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)
    for part, found_NK in ((model.user_meta, vectors_NK), (model.item_knowledge, half_NK)):
        standardised_NK = (torch.from_numpy(found_NK[1:]).float() - part.trunk.mean_K) / part.trunk.std_K
        torch.testing.assert_close(standardised_NK.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(standardised_NK.square().mean(0), torch.ones(8), atol=1e-4, rtol=0)
    alike_SK = np.tile(shared.astype(np.float32), (2, 1))  # nothing tells them apart: no division by zero
    set_knowledge(model, replace(table, scenarios_SK=alike_SK))
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
    model = build(items=True, knowledge_dropout=0.5)
    known_B = (rows["user_row"] <= NUM_USERS - 5) & (rows["item_row"] <= NUM_ITEMS - 4)
    batch = collator(prepared, tiny_knowledge(items=True))({k: v[known_B] for k, v in rows.items()})
    model(batch)[0].sum().backward()
    for part in (model.user_meta, model.item_knowledge):
        assert part.trunk.missing_Z.grad.abs().sum() > 0
    model = build(items=True, knowledge_dropout=0.0)
    model(batch)[0].sum().backward()
    for part in (model.user_meta, model.item_knowledge):
        assert part.trunk.missing_Z.grad.abs().sum() == 0


def test_a_share_of_the_rows_is_trained_without_item_knowledge(prepared, rows):
    many = {k: np.tile(v, 100) for k, v in rows.items()}
    batch = collator(prepared, tiny_knowledge(items=True))(many)
    model = build(items=True, knowledge_dropout=0.3, user_level=False)
    seen = []
    model.item_knowledge.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model.item_knowledge.trunk.missing_Z.fill_(1e3)  # whoever is hidden stands out
        model(batch)
        model.eval()(batch)
    shown_BP, evaluated_BP = seen
    known_B = Order(batch.scenario_B).sort(batch.item_knowledge_index_B) > 0
    assert shown_BP[~known_B].eq(1e3).all()
    assert shown_BP[known_B].eq(1e3).all(1).float().mean() == pytest.approx(0.3, abs=0.03)
    assert not evaluated_BP[known_B].eq(1e3).any()


def test_backbone_alone_ignores_knowledge(prepared, rows):
    model = build(knowledge=False).eval()
    with_knowledge = model(collator(prepared, tiny_knowledge())(rows))[0]
    torch.testing.assert_close(with_knowledge, model(collator(prepared, None)(rows))[0])


@pytest.mark.parametrize("backbone", ["star", "shared_bottom"])
@pytest.mark.parametrize("form", ["full", "low_rank"])
@pytest.mark.parametrize("items", [False, True])
def test_score_alone_equals_score_in_a_batch(prepared, rows, tmp_path, backbone, form, items):
    tree = {"backbone": backbone, "meta": {"weight_form": form}}
    uri = tiny_checkpoint(str(tmp_path / "ck"), prepared, tiny_knowledge(items=items), model=tree)
    ranker = Ranker.from_checkpoint(uri)
    together = ranker.score(rows)
    alone = np.concatenate([ranker.score({k: v[i : i + 1] for k, v in rows.items()}) for i in range(len(together))])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert together.std() > 0.005


@pytest.mark.parametrize("backbone", ["star", "shared_bottom"])
@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_bfloat16_autocast_is_close_to_float32(prepared, rows, backbone, form):
    torch.manual_seed(0)
    config = tiny_config(model={"backbone": backbone, "dropout": 0.0, "meta": {"weight_form": form}})
    model = build_model(tiny_schema(), config.model, 8, True)
    set_knowledge(model, tiny_knowledge(items=True))
    batch = collator(prepared, tiny_knowledge(items=True))(rows)
    model.eval()
    exact_B = model(batch)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logit_B = model(batch)[0].detach()
    assert logit_B.dtype == torch.bfloat16 or backbone == "star"
    torch.testing.assert_close(logit_B.float(), exact_B, atol=0.05, rtol=0.05)
    assert not torch.equal(logit_B.float(), exact_B)  # it did round
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logit_B = model(batch)[0]
    logit_B.float().square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad.to_dense()).all()
    assert {b.dtype for b in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_a_batch_without_rows_trains(prepared, rows, form):
    model = build(items=True, weight_form=form)
    batch = collator(prepared, tiny_knowledge(items=True))({k: v[:0] for k, v in rows.items()})
    logit_B, norm_B = model(batch)
    assert logit_B.shape == norm_B.shape == (0,)
    logit_B.sum().backward()
    dense = [p.grad for p in model.parameters() if p.grad is None or not p.grad.is_sparse]
    assert all(gradient is not None and gradient.eq(0).all() for gradient in dense)


@pytest.mark.parametrize("items", [False, True])
def test_order_of_the_rows_does_not_matter(prepared, rows, items):
    """Inside, rows are sorted by scenario; each row's logit and norm come back at its place."""
    model = build(items=items).eval()
    encode = collator(prepared, tiny_knowledge(items=items))
    expected = model(encode(rows))
    order = np.random.default_rng(0).permutation(len(rows["label"]))
    for ours, plain in zip(model(encode({k: v[order] for k, v in rows.items()})), expected, strict=True):
        torch.testing.assert_close(ours, plain[order])


def test_order_of_knowledge_rows_does_not_matter(prepared, rows, tmp_path):
    """The same vectors stored in another order, the index following, give the same scores."""
    table = moved = tiny_knowledge(items=True)
    for vectors, index in (("users_NK", "user_index_N"), ("items_NK", "item_index_N")):
        vectors_NK, index_N = getattr(table, vectors), getattr(table, index)
        order = np.r_[0, np.random.default_rng(1).permutation(np.arange(1, len(vectors_NK)))]
        place = np.argsort(order).astype(np.int32)
        moved = replace(moved, **{vectors: vectors_NK[order], index: place[index_N]})
    model = build(items=True).eval()
    expected = model(collator(prepared, table)(rows))[0]
    torch.testing.assert_close(model(collator(prepared, moved)(rows))[0], expected)
    shuffled = table.shuffled(0)
    for index in ("user_index_N", "item_index_N"):
        other = model(collator(prepared, replace(table, **{index: getattr(shuffled, index)}))(rows))[0]
        assert (other - expected).abs().max() > 1e-3
