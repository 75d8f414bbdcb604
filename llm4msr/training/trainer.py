"""Model, optimizers and step of one worker: torch alone, the same in process and in a DDP group.

Axes: B rows, S scenarios, R rows of a file.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm4msr.batch import Batch, Collator, Rows
from llm4msr.config import Config
from llm4msr.data.prepared import PreparedData
from llm4msr.models.llm4msr import MultiScenarioModel
from llm4msr.schema import rows_schema
from llm4msr.training.averaging import WeightAverage
from llm4msr.training.counts import ScenarioCounts
from llm4msr.training.reader import list_row_groups, prefetch, read_batches, to_columns, valid_share
from llm4msr.training.sparse import DenseAdam, LazyAdam, RowWiseAdagrad, average_sparse_gradients, embedding_parameters

VALID_BATCH_SIZE = 8192
AVERAGE = "average."  # of tensors beside the optimizers'
SPARSE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": LazyAdam,
    "rowwise_adagrad": RowWiseAdagrad,
}


class Trainer:
    """Takes steps and validates.

    Args:
        config: The run's configuration.
        model: On `device`, the same initial weights on every worker.
        collator: Encodes rows.
        rank: This worker.
        world_size: Number of workers; above 1 a process group must be initialised.
        device: Where the model lives.
    """

    def __init__(
        self,
        config: Config,
        model: MultiScenarioModel,
        collator: Collator,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.train, self.model, self.collator = config.train, model, collator
        self.rank, self.world_size, self.device = rank, world_size, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.train.precision == "bfloat16")
        torch.set_float32_matmul_precision("high" if self.train.tf32 else "highest")
        self.num_parameters = sum(p.numel() for p in model.parameters())
        learning_rate = self.train.learning_rate
        table_rate = self.train.embedding_learning_rate or learning_rate
        self.sharded = config.model.embedding_sharding == "sharded"
        if self.sharded:
            sharding().shard_embedding(model, device, table_rate)
        model.to(device)
        tables = embedding_parameters(model)  # none where they are sharded
        self.step_model: MultiScenarioModel | DistributedDataParallel = model
        if self.train.compile:
            embedding: nn.Module = model.embedding
            embedding.forward = torch.compiler.disable(embedding.forward)  # its gradients are sparse
            model.compile(dynamic=True)  # scenarios have other numbers of rows in each step
        if world_size > 1:
            for parameter in tables.values():
                dist.broadcast(parameter.data, 0)
            # Sparse gradients are exchanged by average_sparse_gradients; statistics are already the same everywhere.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(tables))
            self.step_model = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
        dense = {name: p for name, p in model.named_parameters() if name not in tables}
        knowing = model.knowledge_parameters() if self.train.treats_knowledge_apart else {}
        rest = {name: p for name, p in dense.items() if name not in knowing}
        self.parameters = {"dense": rest, "embedding": tables, "knowledge": knowing}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "dense": torch.optim.AdamW(
                rest.values(), lr=learning_rate, weight_decay=self.train.weight_decay, fused=True
            )
        }
        if knowing:
            rate, decay = self.train.knowledge_rate * learning_rate, self.train.knowledge_weight_decay
            self.optimizers["knowledge"] = torch.optim.Adam(knowing.values(), rate, weight_decay=decay, fused=True)
        if tables:
            kind, decay = self.train.embedding_optimizer, self.train.embedding_weight_decay
            self.optimizers["embedding"] = (
                DenseAdam(tables.values(), table_rate, decay)
                if kind == "dense_adam"
                else SPARSE_OPTIMIZERS[kind](tables.values(), lr=table_rate)
            )
        self.average: WeightAverage | None = None
        if self.train.average_steps:
            # A lazy optimizer touches few rows of a table in a step: their mean would cost a walk over all of it.
            whole = dense | (tables if self.train.embedding_optimizer == "dense_adam" else {})
            self.average = WeightAverage(whole, self.train.average_steps)

    def collate(self, rows: Rows, num_lanes: int) -> list[Batch]:
        """Returns this worker's rows of a step as the parts that go through the model one after another.

        A part takes its piece of each lane's slice, so what it holds over all workers does not depend on their number.

        Args:
            rows: Slices of equal length, one lane's after the other's.
            num_lanes: Lanes of this worker.
        """
        parts, length = self.train.accumulate_steps, len(rows["row_id"]) // num_lanes
        edges = [length * part // parts for part in range(parts + 1)]

        def piece(column: np.ndarray, a: int, b: int) -> np.ndarray:
            wide = column.shape[1:]
            return column.reshape(num_lanes, length, *wide)[:, a:b].reshape(num_lanes * (b - a), *wide)

        batches = [
            self.collator({name: piece(column, a, b) for name, column in rows.items()}, training=True)
            for a, b in itertools.pairwise(edges)
        ]
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches

    def step(self, batches: list[Batch], rows_in_step: int) -> torch.Tensor:
        """Takes one optimizer step.

        The loss is the mean over the rows of all workers: each adds its share of the sum, so that shares and parts may
        be of unequal length.

        Args:
            batches: This worker's parts of the step.
            rows_in_step: Rows over all workers.

        Returns:
            (S, 2) float64: sum of the loss over this worker's rows, and their number, by scenario.
        """
        self.model.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        sums_S2 = torch.zeros((), dtype=torch.float64, device=self.device)
        parallel = self.step_model if isinstance(self.step_model, DistributedDataParallel) else None
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            with parallel.no_sync() if parallel and number < len(batches) else contextlib.nullcontext():
                with self.autocast:
                    logit_B, norm_B = self.step_model(batch)
                loss_B = nn.functional.binary_cross_entropy_with_logits(
                    logit_B.float(), batch.label_B, reduction="none"
                )
                total = loss_B.sum()
                if self.train.embedding_l2:
                    total = total + self.train.embedding_l2 * norm_B.float().sum()
                (total * (self.world_size / rows_in_step)).backward()
            sums_S2 = sums_S2 + self._by_scenario(loss_B.detach(), batch.scenario_B)
        average_sparse_gradients(self.parameters["embedding"].values())
        for optimizer in self.optimizers.values():
            optimizer.step()
        if self.average:
            self.average.update()
        return sums_S2

    def _by_scenario(self, loss_B: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        sums_S2 = torch.zeros(self.collator.num_scenarios, 2, dtype=torch.float64, device=self.device)
        pairs_B2 = torch.stack([loss_B.double(), torch.ones_like(loss_B, dtype=torch.float64)], dim=1)
        return sums_S2.index_add_(0, scenario_B, pairs_B2)

    def validate(self, prepared: PreparedData) -> dict[str, list[float]]:
        """Scores valid, each row once over all workers, with the averaged weights where there are any.

        Returns:
            `ScenarioCounts.compute` of all workers' rows.
        """
        counts = ScenarioCounts(self.collator.num_scenarios, self.device)
        files = valid_share(prepared.files("valid"), self.rank, self.world_size)
        num_idle = self._num_idle_batches(files)
        self.model.eval()
        averaged = self.average.applied() if self.average else contextlib.nullcontext()
        with averaged, torch.inference_mode(), self.autocast:
            for uri, _ in files:
                scored = [self._score(rows, batch, counts) for rows, batch in self._valid_batches(uri)]
                counts.update_users(*(np.concatenate(columns) for columns in zip(*scored, strict=True)))
            nothing = to_columns(rows_schema(prepared.schema).empty_table())
            for _ in range(num_idle):
                self.model(self.collator(nothing).to(self.device))
        if self.world_size > 1:
            for tensor in counts.tensors():
                dist.all_reduce(tensor)
        return counts.compute()

    def _num_idle_batches(self, files: list[tuple[str, int]]) -> int:
        """Returns how many empty batches this worker must score: sharded tables are looked up by all workers at once.

        Raises:
            StorageError: A file is damaged, or holds another number of rows than its manifest says.
        """
        groups = list_row_groups(files)
        if not self.sharded or self.world_size == 1:
            return 0
        own = sum(-(-group.num_rows // VALID_BATCH_SIZE) for group in groups)
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) - own

    def _valid_batches(self, uri: str) -> Iterator[tuple[Rows, Batch]]:
        rows = read_batches(uri, VALID_BATCH_SIZE, self.collator.columns)
        return prefetch(rows, lambda rows: (rows, self.collator(rows)))

    def _score(self, rows: Rows, batch: Batch, counts: ScenarioCounts) -> tuple[np.ndarray, ...]:
        batch = batch.to(self.device)
        logit_B = self.model(batch)[0].float()
        counts.update(batch.scenario_B, batch.label_B, logit_B)
        return rows["user_row"], rows["scenario"], rows["label"], logit_B.cpu().numpy()

    def model_state(self) -> dict[str, torch.Tensor]:
        """Returns weights and buffers; where tables are sharded, all workers must call it and rank 0 alone has all."""
        state = self.model.state_dict()
        if self.sharded:
            state |= sharding().gather_tables(self.model) or {}
        return state

    def best_state(self) -> dict[str, torch.Tensor]:
        """Returns what `validate` scored with: `model_state`, with the averaged weights where there are any."""
        state = self.model_state()
        return state | self.average.mean if self.average else state

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Returns the optimizers' tensors as ``<optimizer>.<parameter>.<key>``; `model_state` says for whom.

        The averaged weights are among them, as ``average.<parameter>``.
        """
        packed = {}
        for kind, optimizer in self.optimizers.items():
            for name, parameter in self.parameters[kind].items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    packed[f"{kind}.{name}.{key}"] = torch.as_tensor(value)
        if self.sharded:
            sums = sharding().gather_row_sums(self.model) or {}
            packed |= {f"embedding.{name}.sum": tensor for name, tensor in sums.items()}
        if self.average:
            packed |= {f"{AVERAGE}{name}": tensor for name, tensor in self.average.state().items()}
        return packed

    def load(self, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> None:
        """Goes back to a saved model and saved optimizers, whatever the number of workers that saved them."""
        if self.sharded:
            sharding().load_tables(self.model, model)
            own = self.model.state_dict()
            model = {name: tensor for name, tensor in model.items() if name in own}
            sums = {k[len("embedding.") : -len(".sum")]: v for k, v in optimizer.items() if k.startswith("embedding.")}
            sharding().load_row_sums(self.model, sums)
            optimizer = {k: v for k, v in optimizer.items() if not k.startswith("embedding.")}
        self.model.load_state_dict(model)
        if self.average:
            self.average.load({k.removeprefix(AVERAGE): v for k, v in optimizer.items() if k.startswith(AVERAGE)})
            optimizer = {k: v for k, v in optimizer.items() if not k.startswith(AVERAGE)}
        for packed, value in optimizer.items():
            kind, _, rest = packed.partition(".")
            name, _, key = rest.rpartition(".")
            parameter = self.parameters[kind][name]
            # A count of steps is a number for LazyAdam, and a tensor for AdamW.
            saved: int | torch.Tensor = int(value) if value.dtype == torch.int64 else value.to(self.device, copy=True)
            self.optimizers[kind].state[parameter][key] = saved


def sharding() -> ModuleType:
    """Returns the module of sharded tables; it needs TorchRec, which a run without them does not."""
    from llm4msr.training import sharding as module

    return module
