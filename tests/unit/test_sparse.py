"""Tables: their first values, the exchange of their gradients, and the optimizers of single rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_schema
from torch import nn
from torch.profiler import profile

from llm4msr.models.embedding import BLOCK_ROWS, FeatureEmbedding, fill_rows
from llm4msr.training.sparse import DenseAdam, LazyAdam, RowWiseAdagrad, average_sparse_gradients

V, E = 50, 8


def test_any_range_of_rows_is_made_without_the_rest():
    num_rows = 2 * BLOCK_ROWS + 1001
    whole = torch.empty(num_rows, 3)
    fill_rows(whole, 0, num_rows, seed=7)
    for first, end in ((0, 10), (5, BLOCK_ROWS + 5), (BLOCK_ROWS - 1, num_rows), (num_rows - 3, num_rows), (9, 9)):
        part = torch.full((end - first, 3), torch.nan)
        fill_rows(part, first, num_rows, seed=7)
        assert torch.equal(part, whole[first:end])
    assert whole[:2].eq(0).all()
    assert whole[2:].ne(0).all()
    assert whole.std().item() == pytest.approx(0.05, rel=0.01)
    assert whole[:BLOCK_ROWS].ne(whole[BLOCK_ROWS : 2 * BLOCK_ROWS]).any(1).all()  # blocks are not alike
    other = torch.empty(num_rows, 3)
    fill_rows(other, 0, num_rows, seed=8)
    assert other[2:1000].ne(whole[2:1000]).any(1).all()


def test_the_seed_of_torch_decides_all_and_the_meta_device_changes_nothing():
    def build(seed: int, **options) -> tuple[FeatureEmbedding, torch.Tensor]:
        torch.manual_seed(seed)
        return FeatureEmbedding(tiny_schema(), 4, **options), torch.rand(3)

    (one, after), (same, _), (other, _) = build(1), build(1), build(2)
    (meta, after_meta) = build(1, materialize=False)
    with torch.device("meta"):
        under_meta, _ = build(1)
    weights = one.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in same.state_dict().items())
    assert all(not torch.equal(weights[name], value) for name, value in other.state_dict().items())
    assert not torch.equal(one.tables[0].weight[:7], one.tables[2].weight[:7])
    assert meta.table_seeds == under_meta.table_seeds == one.table_seeds
    assert torch.equal(after, after_meta)
    for name, value in meta.state_dict().items():
        assert value.is_meta
        assert value.shape == weights[name].shape
    assert under_meta.tables[0].weight.is_meta


def tables(seed: int = 0, sizes=((V, E), (30, 4), (20, E))) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*size, generator=generator)) for size in sizes]


def sparse_gradient(parameter: nn.Parameter, num_touched: int, seed: int, below: int | None = None) -> torch.Tensor:
    """Rows with duplicates, in no order; only rows below a number, if one is given."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(below or len(parameter), (1, num_touched), generator=generator)
    values = torch.randn(num_touched, parameter.shape[1], generator=generator)
    return torch.sparse_coo_tensor(index, values, parameter.shape, check_invariants=True)


# Rows that each worker touches of each table; None: no gradient at all. The last table is touched by nobody.
TOUCHED = ((12, None, 5, None), (3, 9, 0, None))


def exchange(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parameters = exchanged_tables(rank)
    counter = Counter()
    originals = {name: getattr(dist, name) for name in ("all_gather_single", "all_reduce", "all_gather", "broadcast")}
    for name, function in originals.items():
        setattr(dist, name, counter.count(function))
    average_sparse_gradients(iter(parameters))
    for name, function in originals.items():
        setattr(dist, name, function)
    found = [None if p.grad is None else (p.grad.indices(), p.grad.values()) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    average_sparse_gradients(parameters)  # nobody touched anything
    assert all(p.grad is None for p in parameters)
    torch.save((found, counter.calls), f"{folder}/{rank}")
    dist.destroy_process_group()


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self, function):
        def counted(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return counted


def exchanged_tables(rank: int) -> list[nn.Parameter]:
    parameters = tables(sizes=((V, E), (30, 4), (20, E), (10, 2)))
    for t, (parameter, touched) in enumerate(zip(parameters, TOUCHED[rank], strict=True)):
        parameter.grad = None if touched is None else sparse_gradient(parameter, touched, 10 * rank + t)
    return parameters


def test_gradients_are_averaged_with_three_collectives_for_all_tables(tmp_path):
    mp.spawn(exchange, (str(tmp_path),), nprocs=2)
    (one, calls), (two, _) = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert calls == 3
    workers = [exchanged_tables(0), exchanged_tables(1)]
    for t, parameter in enumerate(workers[0]):
        if t == 3:
            assert one[t] is None
            assert two[t] is None
            continue
        (index, value), (index_2, value_2) = one[t], two[t]
        assert torch.equal(index, index_2)
        assert torch.equal(value, value_2)
        expected = sum(w[t].grad.to_dense() for w in workers if w[t].grad is not None) / 2
        found = torch.zeros_like(parameter).index_add_(0, index[0], value)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
        assert index.shape[1] == len(index.unique())


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for t, parameter in enumerate(parameters):
            parameter.grad = None if (step + t) % 3 == 2 else sparse_gradient(parameter, 15, 100 * step + t)
        optimizer.step()


@pytest.mark.parametrize("kind", [LazyAdam, RowWiseAdagrad])
def test_a_saved_optimizer_goes_on_bit_by_bit(kind):
    straight, resumed = tables(), tables()
    optimizer = kind(straight, lr=0.1)
    train(optimizer, straight, range(4))
    with torch.no_grad():
        for target, source in zip(resumed, straight, strict=True):
            target.copy_(source)
    continued = kind(resumed, lr=0.7)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, straight, range(4, 8))
    train(continued, resumed, range(4, 8))
    for one, two in zip(straight, resumed, strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(continued.state[two][name]))


def test_lazy_adam_is_sparse_adam():
    one, two = tables(), tables()
    ours, torchs = LazyAdam(one, lr=0.1), torch.optim.SparseAdam(two, lr=0.1)
    train(ours, one, range(8))
    train(torchs, two, range(8))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert ours.state[a]["step"] == torchs.state[b]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[a][name], torchs.state[b][name], atol=1e-7, rtol=1e-6)


def test_dense_adam_is_torchs_adam_on_dense_gradients_and_shrinks_what_nobody_looks_up():
    def table(sparse: bool) -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(V, E, padding_idx=0, sparse=sparse)

    (ours, idle), expected = (table(True), table(True)), table(False)
    before = expected.weight.detach().clone()
    optimizer = DenseAdam([ours.weight, idle.weight], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Adam(expected.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        index_R = torch.randint(0, V // 2, (16,), generator=generator)
        for embedding, rule in ((ours, optimizer), (expected, reference)):
            rule.zero_grad()
            embedding(index_R).square().sum().backward()
            rule.step()
    torch.testing.assert_close(ours.weight, expected.weight, rtol=1e-6, atol=1e-7)
    for shrunk in (ours.weight[V // 2 :], idle.weight[V // 2 :]):  # by some five times the rate each
        assert (before[V // 2 :].abs() - shrunk.detach().abs()).median().item() == pytest.approx(0.05, rel=0.1)
    assert ours.weight[0].eq(0).all() and idle.weight[0].eq(0).all()


def test_rowwise_adagrad_by_hand():
    table = nn.Parameter(torch.ones(3, 2))
    optimizer = RowWiseAdagrad([table], lr=0.5, eps=0.25)
    # Row 2 twice: (1, 2) + (2, 2) = (3, 4), whose mean square is 12.5.
    table.grad = torch.sparse_coo_tensor(
        [[2, 0, 2]], torch.tensor([[1.0, 2], [2, 0], [2, 2]]), (3, 2), check_invariants=True
    )
    optimizer.step()
    assert optimizer.state[table]["sum"].tolist() == [2.0, 0.0, 12.5]
    expected = [[1 - 0.5 * 2 / (2**0.5 + 0.25), 1], [1, 1], [1 - 0.5 * g / (12.5**0.5 + 0.25) for g in (3, 4)]]
    torch.testing.assert_close(table.detach(), torch.tensor(expected))


def test_rowwise_adagrad_is_fbgemms():
    ops = pytest.importorskip(
        "fbgemm_gpu.split_table_batched_embeddings_ops_training", reason="needs the extra 'sharded'"
    )
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    (table,) = tables(sizes=((V, E),))
    fbgemm = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(V, E, ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        eps=1e-8,
    )
    theirs = fbgemm.split_embedding_weights()[0]
    theirs.copy_(table.detach())
    optimizer = RowWiseAdagrad([table], lr=0.1)
    for step in range(8):
        gradient = sparse_gradient(table, 40, step)
        table.grad = gradient
        optimizer.step()
        fbgemm(gradient._indices()[0], torch.arange(41)).backward(gradient._values())
    torch.testing.assert_close(table.detach(), theirs, atol=1e-6, rtol=1e-6)
    (sums,) = fbgemm.split_optimizer_states()[0]
    torch.testing.assert_close(optimizer.state[table]["sum"], sums, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [LazyAdam, RowWiseAdagrad])
def test_a_step_makes_nothing_of_the_tables_size(kind):
    allocated = []
    for num_rows in (1000, 1_000_000):
        table = nn.Parameter(torch.zeros(num_rows, 4))
        optimizer = kind([table], lr=0.1)
        for seed in range(2):
            table.grad = sparse_gradient(table, 64, seed, below=1000)
            with profile(profile_memory=True) as profiler:
                optimizer.step()
        allocated.append(sum(max(event.cpu_memory_usage, 0) for event in profiler.events()))
    assert 0 < allocated[1] < 100_000  # a column of the large table alone would be 4,000,000 bytes
    assert allocated[1] == allocated[0]
