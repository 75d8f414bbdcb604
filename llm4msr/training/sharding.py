"""Embedding tables spread over the workers by TorchRec, for vocabularies beyond one device.

Each table's rows are cut into as many ranges as there are workers (row-wise). A step sends the ids to the rows'
workers and the looked-up sums back; the backward pass sends gradients the same way, divides them by the number of
workers as DDP does, and there and then updates the rows by fbgemm's EXACT_ROWWISE_ADAGRAD, the rule of
`llm4msr.training.sparse.RowWiseAdagrad`. So the tables are nobody's parameters: DDP, the dense optimizer and
``model.state_dict()`` see the rest of the model alone.

Tables and row sums are handed out and taken in under the names that they have in a replicated model: a checkpoint is
the same either way, for any number of workers, and whoever serves it needs no TorchRec.

Left out: accumulation of gradients; taking back a step whose loss was not finite (the backward pass has updated the
rows already); and history features, whose attention needs each liked item by itself where a sharded table gives sums
(`llm4msr.training.run` refuses them).

Axes: B rows of this worker, C rows of the worker that has most, F categorical features, G features that have a table,
T sequence length, E embedding width, D input width, V rows of a table.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from llm4msr.batch import Batch
from llm4msr.config import ConfigError
from llm4msr.models.embedding import BLOCK_ROWS, FeatureEmbedding, fill_rows, hide_ids
from llm4msr.models.history import sequence_length
from llm4msr.models.llm4msr import MultiScenarioModel
from llm4msr.schema import PADDING_INDEX
from llm4msr.training.sparse import ROW_EPS

if TYPE_CHECKING:
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor


def shard_embedding(model: MultiScenarioModel, device: torch.device, learning_rate: float) -> None:
    """Replaces the model's embedding by one whose tables are spread over the workers of the process group.

    Their first values are those that a replicated model of the same ``torch.manual_seed`` has. No worker ever holds
    more of a table than its rows.

    Args:
        model: Built with its tables on the meta device (``FeatureEmbedding(materialize=False)``), with the same seed on
            every worker.
        device: Of the tables: cpu (gloo) or cuda (NCCL).
        learning_rate: Of the tables.

    Raises:
        ConfigError: TorchRec is not installed.
    """
    assert dist.is_initialized(), "sharded tables need a process group, be it of one worker"
    template = model.embedding
    model.register_module("embedding", ShardedEmbedding(template, _Tables(template, device, learning_rate)))


def _tables_of(model: MultiScenarioModel) -> _Tables:
    embedding: nn.Module = model.embedding
    assert isinstance(embedding, ShardedEmbedding), "a model whose tables are not sharded"
    return embedding.sharded


def gather_tables(model: MultiScenarioModel) -> dict[str, torch.Tensor] | None:
    """Returns all tables on the CPU of rank 0, None elsewhere: ``embedding.tables.0.weight``: (V, E), and so on.

    Every worker must call it. Rows travel in blocks of 65,536.
    """
    tables: dict[str, torch.Tensor] | None = _tables_of(model).gather(_Tables.weights)
    return tables


def load_tables(model: MultiScenarioModel, state: Mapping[str, torch.Tensor]) -> None:
    """Sets the rows of this worker; each worker calls it for itself.

    Args:
        model: A model with sharded tables.
        state: What `gather_tables` returned, with any number of workers, or a replicated model's state. Only slices
            ``state[name][first:end]`` are read, so a reader that makes them on demand will do.
    """
    _tables_of(model).load(_Tables.weights, state)


def gather_row_sums(model: MultiScenarioModel) -> dict[str, torch.Tensor] | None:
    """Returns the optimizer's sums (V,) on the CPU of rank 0 by their table's name; `gather_tables` says the rest."""
    sums: dict[str, torch.Tensor] | None = _tables_of(model).gather(_Tables.row_sums)
    return sums


def load_row_sums(model: MultiScenarioModel, state: Mapping[str, torch.Tensor]) -> None:
    """Sets the optimizer's sums of this worker's rows: `load_tables` for `gather_row_sums`, or for RowWiseAdagrad's."""
    _tables_of(model).load(_Tables.row_sums, state)


class ShardedEmbedding(nn.Module):
    """`FeatureEmbedding` over sharded tables, which are no part of its parameters or its state.

    Its forward pass is a collective: all workers must make the same number of them, in training as in evaluation. Their
    numbers of rows may differ; a worker that has run out of rows joins with an empty batch.

    Args:
        template: The embedding that it stands for.
        sharded: Its tables.

    Attributes:
        embedded_dim, output_dim, unseen_dropout: As of the template.
    """

    def __init__(self, template: FeatureEmbedding, sharded: _Tables) -> None:
        super().__init__()
        self.sharded = sharded
        self.id_columns = template.id_columns
        self.unseen_dropout = template.unseen_dropout
        self.embedded_dim = template.embedded_dim
        self.output_dim = template.output_dim

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns x_BD."""
        ids_BF = batch.ids_BF
        if self.training:
            ids_BF = hide_ids(ids_BF, self.id_columns, self.unseen_dropout)
        sums = self.sharded.look_up(ids_BF, batch.sequences)
        num_categorical = ids_BF.shape[1]
        means = [s / sequence_length(ids_BT) for s, ids_BT in zip(sums[num_categorical:], batch.sequences, strict=True)]
        return torch.cat([*sums[:num_categorical], *means, batch.numeric_BN], dim=1)


class _Tables:
    """The tables inside TorchRec's DistributedModelParallel. No module, so that no module counts them as its own."""

    def __init__(self, template: FeatureEmbedding, device: torch.device, learning_rate: float) -> None:
        try:
            import torchrec  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"model.embedding_sharding = 'sharded' needs TorchRec ({error}): pip install 'llm4msr[sharded]' "
                "(without CUDA 'llm4msr[sharded-cpu]', then --no-deps 'torchrec>=1.8,<1.9'), or set it to 'replicated'"
            ) from error
        _silence_torchrec()
        names = [f"embedding.{name}.weight" for name, m in template.named_modules() if isinstance(m, nn.Embedding)]
        tables = [*template.tables, *template.sequence_tables]
        assert all(table.weight.is_meta for table in tables), "tables must be on the meta device: materialize=False"
        self.keys = [f"table_{i}" for i in range(len(tables))]  # TorchRec allows no dots
        self.names = dict(zip(self.keys, names, strict=True))
        self.embedding_dim = tables[0].embedding_dim
        self.parallel = _distribute(dict(zip(self.keys, tables, strict=True)), device, learning_rate)
        for (_, sharded), seed in zip(self.weights(), template.table_seeds, strict=True):
            for shard in sharded.local_shards():
                fill_rows(shard.tensor, shard.metadata.shard_offsets[0], sharded.metadata().size[0], seed)

    def look_up(self, ids_BF: torch.Tensor, sequences: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Returns the sum (B, E) of the embeddings of each row's ids, for each feature; padding adds nothing."""
        from torchrec import KeyedJaggedTensor

        # fbgemm has no kernels for inference tensors: what inference_mode means here is that no gradient is wanted.
        wants_gradient = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wants_gradient):
            num_rows, most_rows = len(ids_BF), _largest(len(ids_BF), ids_BF.device)
            columns = [*ids_BF.t().unsqueeze(2), *sequences]
            lengths_GB = torch.stack([(ids_BT != PADDING_INDEX).sum(1) for ids_BT in columns])
            lengths_GC = nn.functional.pad(lengths_GB, (0, most_rows - num_rows))  # gloo exchanges equal shares only
            ids = torch.cat([ids_BT.flatten() for ids_BT in columns])
            features = KeyedJaggedTensor(self.keys, ids[ids != PADDING_INDEX], lengths=lengths_GC.flatten())
            embedded = self.parallel(features)
            assert list(embedded.keys()) == self.keys
            sums_BD: torch.Tensor = embedded.values()
            return torch.split(sums_BD[:num_rows], self.embedding_dim, dim=1)

    def weights(self) -> list[tuple[str, ShardedTensor]]:
        """Returns the tables' names and weights (V, E); local shards are the memory that is trained."""
        state = self.parallel.module.state_dict()
        return [(self.names[key], state[f"embedding_bags.{key}.weight"]) for key in self.keys]

    def row_sums(self) -> list[tuple[str, ShardedTensor]]:
        """Returns the tables' names and their optimizer's sums (V,); local shards are the memory that is used."""
        state = self.parallel.fused_optimizer.state_dict()["state"]
        return [(self.names[key], state[f"embedding_bags.{key}.weight"][f"{key}.momentum1"]) for key in self.keys]

    @torch.no_grad()
    def gather(self, part: Callable[[_Tables], list[tuple[str, ShardedTensor]]]) -> dict[str, torch.Tensor] | None:
        """Returns the part as plain tensors on the CPU of rank 0."""
        rank, gathered = dist.get_rank(), {}
        for name, sharded in part(self):
            if rank == 0:
                gathered[name] = torch.empty(sharded.metadata().size)
            for owner, first, block in _blocks(sharded):
                if rank == owner != 0:
                    dist.send(block.contiguous(), 0)
                elif rank == 0 != owner:
                    dist.recv(block, owner)
                if rank == 0:
                    gathered[name][first : first + len(block)] = block
        return gathered if rank == 0 else None

    @torch.no_grad()
    def load(
        self, part: Callable[[_Tables], list[tuple[str, ShardedTensor]]], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Copies this worker's rows of the part out of plain tensors."""
        for name, sharded in part(self):
            for owner, first, block in _blocks(sharded):
                if owner == dist.get_rank():
                    block.copy_(state[name][first : first + len(block)])


def _distribute(tables: dict[str, nn.Embedding], device: torch.device, learning_rate: float) -> Any:
    """Returns TorchRec's module over tables of these sizes; its memory is not initialised."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingPlan

    configs = [
        EmbeddingBagConfig(
            name=key,
            feature_names=[key],
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            pooling=PoolingType.SUM,
        )
        for key, table in tables.items()
    ]
    collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": learning_rate,
            "eps": ROW_EPS,
        }
    )
    world_size = dist.get_world_size()
    plan = construct_module_sharding_plan(
        collection,
        {key: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value) for key in tables},
        sharder=sharder,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        world_size=world_size,
        device_type=device.type,
    )
    return DistributedModelParallel(
        collection,
        device=device,
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
        init_data_parallel=False,
        init_parameters=False,
    )


def _blocks(sharded: ShardedTensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields (rank that holds it, its first row, rows) for each block of the table, in order.

    The rows are the worker's own memory where it holds them, and room for them where it does not.
    """
    own = sharded.local_tensor()
    for shard in sharded.metadata().shards_metadata:
        place, first, num_rows = shard.placement, shard.shard_offsets[0], shard.shard_sizes[0]
        owner = None if place is None else place.rank()
        assert owner is not None, "TorchRec places every shard on a rank"
        for start in range(0, num_rows, BLOCK_ROWS):
            size = min(BLOCK_ROWS, num_rows - start)
            held = owner == dist.get_rank()
            yield owner, first + start, own[start : start + size] if held else own.new_empty(size, *own.shape[1:])


def _largest(number: int, device: torch.device) -> int:
    """Returns the largest of the workers' numbers."""
    if dist.get_world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _silence_torchrec() -> None:
    """Hides warnings about calls that are TorchRec's own."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
