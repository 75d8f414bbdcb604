"""Histories inside the model: pooling by hand, a table that two uses share, gradients against a dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import SEQUENCES, tiny_config, tiny_prepared, tiny_schema
from torch import nn

from llm4msr.batch import Batch, Collator, EntityFeatures
from llm4msr.data.history import read_logs
from llm4msr.models.embedding import FeatureEmbedding
from llm4msr.models.history import AttentionPooling, MeanPooling
from llm4msr.models.llm4msr import build_model
from llm4msr.training.reader import list_row_groups, read_row_group
from llm4msr.training.sparse import LazyAdam, RowWiseAdagrad
from llm4msr.training.trainer import Trainer

E, ITEM = 4, 1  # item_id is the second categorical feature
IDS_BT = torch.tensor([[5, 7, 5], [6, 0, 0], [0, 0, 0]])


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(9, E, padding_idx=0)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    prepared = tiny_prepared(str(tmp_path_factory.mktemp("data") / "prepared"), more=SEQUENCES)
    tables = (prepared.users(), "user"), (prepared.items(), "item")
    entities = [EntityFeatures.from_table(table, prepared.schema, source) for table, source in tables]
    collate = Collator(prepared.schema, *entities, None, read_logs(prepared.uri, prepared.schema))
    return collate(read_row_group(list_row_groups(prepared.files("test"))[0]))


def test_mean_by_hand(table):
    w = table.weight
    expected = torch.stack([(2 * w[5] + w[7]) / 3, w[6], torch.zeros(E)])
    torch.testing.assert_close(MeanPooling()(IDS_BT, table(IDS_BT), torch.ones(3, E)), expected)


def test_attention_by_hand(table):
    """The activation unit written out, item by item: sum of a(h, c) h, not normalised."""
    pool, candidate_BE = AttentionPooling(E), torch.randn(3, E)
    first, activation, last = pool.unit
    expected = torch.zeros(3, E)
    for b, row in enumerate(IDS_BT.tolist()):
        for index in (i for i in row if i != 0):
            h, c = table.weight[index], candidate_BE[b]
            hidden = first.weight @ torch.cat([h, c, h - c, h * c]) + first.bias
            hidden = torch.where(hidden > 0, hidden, activation.weight * hidden)
            expected[b] += (last.weight @ hidden + last.bias) * h
    torch.testing.assert_close(pool(IDS_BT, table(IDS_BT), candidate_BE), expected)
    assert expected[2].eq(0).all()


@pytest.mark.parametrize("pool", [MeanPooling(), AttentionPooling(E)])
def test_padding_changes_nothing_and_gets_no_gradient(table, pool):
    """Not even where the padding row were not zero: attention masks its weight."""
    candidate_BE = torch.randn(3, E)
    longer_BT = nn.functional.pad(IDS_BT, (0, 4))
    found = pool(longer_BT, table(longer_BT), candidate_BE)
    torch.testing.assert_close(found, pool(IDS_BT, table(IDS_BT), candidate_BE))
    assert found[2].eq(0).all()  # no likes
    if isinstance(pool, AttentionPooling):
        items_BTE = torch.randn(3, 7, E, requires_grad=True)
        pool(longer_BT, items_BTE, candidate_BE).square().sum().backward()
        assert items_BTE.grad[longer_BT == 0].eq(0).all()
        assert items_BTE.grad[longer_BT != 0].ne(0).all()


def test_a_history_is_a_field_of_the_input(batch):
    embedding = FeatureEmbedding(tiny_schema(more=SEQUENCES), E)
    assert embedding.fields == ("user_id", "item_id", "genre", "search_source", "tags", "words", "liked", "found")
    layout, x_BD = embedding.layout(), embedding(batch)
    assert x_BD.shape == (len(batch), layout.input_dim) == (len(batch), 8 * E + 2)
    items = embedding.tables[ITEM]
    for name, pool, ids_BT in zip(("liked", "found"), embedding.histories, batch.histories, strict=True):
        expected = pool(ids_BT, items(ids_BT), items(batch.ids_BF[:, ITEM]))
        torch.testing.assert_close(x_BD[:, layout.columns(name)], expected)
        assert x_BD[:, layout.columns(name)][ids_BT.eq(0).all(1)].eq(0).all()
    words = embedding.sequence_tables[1]
    length = batch.sequences[1].ne(0).sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(x_BD[:, layout.columns("words")], words(batch.sequences[1]).sum(1) / length)


def test_without_histories_the_model_is_as_before():
    torch.manual_seed(3)
    plain = FeatureEmbedding(tiny_schema(), E)
    after = torch.rand(1)
    assert plain.fields == ("user_id", "item_id", "genre", "search_source", "tags")
    assert not [name for name in plain.state_dict() if "histor" in name]
    torch.manual_seed(3)
    meta = FeatureEmbedding(tiny_schema(), E, materialize=False)
    assert torch.equal(after, torch.rand(1))
    assert meta.table_seeds == plain.table_seeds


def test_a_hidden_item_is_hidden_from_the_attention_too(batch):
    embedding = FeatureEmbedding(tiny_schema(more=SEQUENCES), E, unseen_dropout=0.999999)
    items, layout = embedding.tables[ITEM], embedding.layout()
    with torch.no_grad():
        items.weight[1:].normal_()
    pool, ids_BT = embedding.histories[0], batch.histories[0]
    unseen_BE = items.weight[1].expand(len(batch), E)
    expected = pool(ids_BT, items(ids_BT), unseen_BE)  # the liked items themselves are shown
    torch.testing.assert_close(embedding(batch)[:, layout.columns("liked")], expected)
    assert (expected - pool(ids_BT, items(ids_BT), items(batch.ids_BF[:, ITEM]))).abs().max() > 1e-3


def dense_reference(embedding: FeatureEmbedding) -> FeatureEmbedding:
    """The same embedding with dense gradients."""
    dense = copy.deepcopy(embedding)
    for table in (*dense.tables, *dense.sequence_tables):
        table.sparse = False
    return dense


@pytest.mark.parametrize("optimizer", [LazyAdam, RowWiseAdagrad])
def test_both_uses_of_the_item_table_add_up(batch, optimizer):
    """Sparse gradients of the row's item and of two histories are those of a dense table; so is the step."""
    torch.manual_seed(0)
    sparse = FeatureEmbedding(tiny_schema(more=SEQUENCES), E).double()
    dense = dense_reference(sparse)
    weight_D = torch.randn(sparse.output_dim, dtype=torch.float64)
    batch = batch._map(lambda t: t.double() if t.is_floating_point() else t)
    for embedding in (sparse, dense):
        (embedding(batch) @ weight_D).square().sum().backward()
    gradients = [embedding.tables[ITEM].weight.grad for embedding in (sparse, dense)]
    assert gradients[0].is_sparse
    torch.testing.assert_close(gradients[0].to_dense(), gradients[1])
    assert gradients[1][0].eq(0).all()  # padding
    # Histories alone reach rows that no row's item is.
    own, touched = set(batch.ids_BF[:, ITEM].tolist()), set(gradients[0].coalesce().indices()[0].tolist())
    assert touched == (own | set(torch.cat([h.flatten() for h in batch.histories]).tolist())) - {0}
    for a, b in zip(sparse.histories.parameters(), dense.histories.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.abs().sum() > 0
    table = sparse.tables[ITEM].weight
    before = table.detach().clone()
    optimizer([table], lr=0.1).step()
    if optimizer is LazyAdam:
        expected = nn.Parameter(before.clone())
        expected.grad = gradients[1].to_sparse(1)
        torch.optim.SparseAdam([expected], lr=0.1).step()
    else:
        scale = gradients[1].square().mean(1, keepdim=True).sqrt() + 1e-8
        expected = before - 0.1 * gradients[1] / scale
    torch.testing.assert_close(table.detach(), expected.detach())


@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_a_row_alone_scores_as_in_the_batch(batch, backbone):
    torch.manual_seed(0)
    config = tiny_config(model={"backbone": backbone}).model
    model = build_model(tiny_schema(more=SEQUENCES), config, None).eval()
    with torch.no_grad():
        for table in (*model.embedding.tables, *model.embedding.sequence_tables):
            table.weight[1:].normal_()
        together = model(batch)[0]
        alone = [model(batch._map(lambda t, i=i: t[i : i + 1]))[0] for i in range(0, len(batch), 9)]
    torch.testing.assert_close(torch.cat(alone), together[::9], atol=1e-5, rtol=1e-5)


def test_a_batch_without_rows(batch):
    empty: Batch = batch._map(lambda t: t[:0])
    model = build_model(tiny_schema(more=SEQUENCES), tiny_config().model, None)
    model(empty)[0].sum().backward()
    assert all(p.grad is not None for p in model.embedding.histories.parameters())


def test_parts_of_a_step_keep_lists_with_their_rows(tmp_path):
    """Part p of a step is piece p of each lane's slice, for columns of lists as for all others."""
    prepared = tiny_prepared(str(tmp_path / "prepared"), more=SEQUENCES)
    rows = {k: v[:12] for k, v in read_row_group(list_row_groups(prepared.files("train"))[0]).items()}
    tables = (prepared.users(), "user"), (prepared.items(), "item")
    entities = [EntityFeatures.from_table(table, prepared.schema, source) for table, source in tables]
    collate = Collator(prepared.schema, *entities, None, read_logs(prepared.uri, prepared.schema))
    config = tiny_config(train={"accumulate_steps": 3, "num_lanes": 2, "batch_size": 12})
    trainer = Trainer(config, build_model(prepared.schema, config.model, None), collate, 0, 1, torch.device("cpu"))
    parts = trainer.collate(rows, num_lanes=2)
    places = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert [p.row_id_B.tolist() for p in parts] == [rows["row_id"][i].tolist() for i in places]
    assert [p.sequences[1].tolist() for p in parts] == [rows["words"][i].tolist() for i in places]


def test_half_precision(table):
    pool, candidate_BE = AttentionPooling(E), torch.randn(3, E)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(IDS_BT, table(IDS_BT), candidate_BE)
    torch.testing.assert_close(found, pool(IDS_BT, table(IDS_BT), candidate_BE), atol=0.03, rtol=0.03)
    assert found.dtype == torch.float32
