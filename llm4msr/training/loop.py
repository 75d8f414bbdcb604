"""The training loop of one worker: torch alone, the same in process and in a DDP group.

Who starts it, on how many workers and on which device, is the business of `llm4msr.training.run`.
"""

from __future__ import annotations

import copy
import logging
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from llm4msr import storage
from llm4msr.batch import Batch, Collator, EntityFeatures
from llm4msr.config import Config
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.llm4msr import MultiScenarioModel, build_model, set_knowledge
from llm4msr.training.checkpoint import save_checkpoint
from llm4msr.training.metrics import BinnedAuc
from llm4msr.training.reader import TrainReader, list_row_groups, prefetch, read_share
from llm4msr.training.sparse import average_sparse_gradients, embedding_parameters

logger = logging.getLogger("llm4msr.training")

VALID_BATCH_SIZE = 8192


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says where it stopped and what to change."""


@dataclass(frozen=True)
class TrainTask:
    """One run.

    Attributes:
        config: The resolved configuration.
        prepared_uri: Finished prepared data.
        knowledge_uri: Finished knowledge table; None trains the backbone alone.
        knowledge: none, llm or shuffled.
        seed: Of initialisation, dropout, order of rows, and the shuffling of knowledge.
        run_uri: Where checkpoint/ and tensorboard/ go.
        name: Of the run; the model's version.
    """

    config: Config
    prepared_uri: str
    knowledge_uri: str | None
    knowledge: str
    seed: int
    run_uri: str
    name: str

    @property
    def checkpoint_uri(self) -> str:
        """The place of the finished checkpoint."""
        return storage.join(self.run_uri, "checkpoint")


def load_knowledge(task: TrainTask) -> KnowledgeTable | None:
    """Returns the knowledge table that the run trains with."""
    if task.knowledge_uri is None:
        return None
    table = KnowledgeTable.load(task.knowledge_uri)
    return table.shuffled(task.seed) if task.knowledge == "shuffled" else table


def train_worker(
    task: TrainTask, rank: int, world_size: int, device: torch.device, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains until the mean scenario AUC on valid stops improving, and writes the best weights as a checkpoint.

    Args:
        task: What to train.
        rank: This worker.
        world_size: Number of workers; above 1 a process group must be initialised.
        device: Where the model lives.
        report: Called once per epoch on every worker with that epoch's metrics.

    Returns:
        The checkpoint's metadata.

    Raises:
        TrainingError: The loss is not finite, or valid has a scenario without both classes.
    """
    started = time.perf_counter()
    config = task.config
    prepared = PreparedData.open(task.prepared_uri)
    knowledge = load_knowledge(task)
    collator = Collator(
        prepared.schema,
        EntityFeatures.from_table(prepared.users(), prepared.schema, "user"),
        EntityFeatures.from_table(prepared.items(), prepared.schema, "item"),
        knowledge,
    )
    torch.manual_seed(task.seed)  # the same initial weights on every worker
    if knowledge is None:
        model = build_model(prepared.schema, config.model, None)
    else:
        model = build_model(prepared.schema, config.model, knowledge.width, knowledge.has_items)
        set_knowledge(model, knowledge)
        if "item" in config.knowledge.levels and not knowledge.has_items:
            logger.warning("%s: no item has knowledge: the model is built without item knowledge", task.name)
    model.to(device)
    torch.manual_seed(task.seed * 1000 + rank)  # dropout differs between workers
    trainer = _Trainer(task, model, collator, prepared, rank, world_size, device)

    best_auc, best_epoch, best_state, history = -math.inf, -1, None, []
    for epoch in range(config.train.max_epochs):
        metrics = trainer.run_epoch(epoch)
        history.append(metrics)
        if metrics["valid_auc"] > best_auc:
            best_auc, best_epoch = metrics["valid_auc"], epoch
            best_state = copy.deepcopy(model.state_dict()) if rank == 0 else None
        report(metrics)
        if epoch - best_epoch >= config.train.patience:
            break
    metadata = {
        "model_version": task.name,
        "backbone": config.model.backbone,
        "knowledge": task.knowledge,
        "seed": task.seed,
        "prepared": task.prepared_uri.rsplit("/", 1)[-1],
        "best_epoch": best_epoch,
        "valid_auc": best_auc,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "world_size": world_size,
        "history": history,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if rank == 0:
        trainer.close()
        save_checkpoint(task.checkpoint_uri, config, prepared, knowledge, best_state, metadata)
    return metadata


class _Trainer:
    """What stays the same from epoch to epoch."""

    def __init__(
        self,
        task: TrainTask,
        model: MultiScenarioModel,
        collator: Collator,
        prepared: PreparedData,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        train = task.config.train
        self.task, self.collator, self.device = task, collator, device
        self.rank, self.world_size = rank, world_size
        self.scenario_names = prepared.schema.scenario_names
        self.reader = TrainReader(
            list_row_groups(prepared.files("train")),
            train.batch_size // world_size,
            rank,
            world_size,
            task.seed,
            train.shuffle_buffer_rows,
        )
        self.valid_groups = list_row_groups(prepared.files("valid"))
        self.model = model
        self.step_model: nn.Module = model
        embeddings = embedding_parameters(model)
        if world_size > 1:
            for parameter in embeddings.values():
                dist.broadcast(parameter.data, 0)
            # Sparse gradients are exchanged by average_sparse_gradients; statistics are already the same everywhere.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(embeddings))
            self.step_model = DistributedDataParallel(model, forward_sync_buffers=False)
        dense = [p for name, p in model.named_parameters() if name not in embeddings]
        self.embeddings = list(embeddings.values())
        self.optimizers = [
            torch.optim.AdamW(dense, lr=train.learning_rate, weight_decay=train.weight_decay),
            torch.optim.SparseAdam(self.embeddings, lr=train.learning_rate),
        ]
        self.log = _Scalars(task.run_uri) if rank == 0 else None
        self.step = 0

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """Trains one epoch, validates, logs; returns the same metrics on every worker but for rows_per_s and wait."""
        started = time.perf_counter()
        losses, wait_s, num_rows = [], 0.0, 0
        self.model.train()
        batches = prefetch(self.reader.epoch(epoch), self._collate)
        waited_since = time.perf_counter()
        for batch in batches:
            wait_s += time.perf_counter() - waited_since
            losses.append(self._train_step(batch.to(self.device)))
            num_rows += len(batch)
            self.step += 1
            if self.step % self.task.config.train.log_every_steps == 0:
                self._check(losses[-1], epoch)
                if self.log:
                    elapsed_s = time.perf_counter() - started
                    self.log.write(
                        self.step,
                        {
                            "train/loss": float(losses[-1]),
                            "train/rows_per_s": num_rows * self.world_size / elapsed_s,
                            "train/data_wait_fraction": wait_s / elapsed_s,
                        },
                    )
            waited_since = time.perf_counter()
        train_s = time.perf_counter() - started
        loss = self._mean(torch.stack(losses).mean())
        self._check(loss, epoch)
        auc_S = self._validate()
        metrics = {
            "epoch": epoch,
            "loss": float(loss),
            "valid_auc": float(np.mean(auc_S)),
            "valid_auc_by_scenario": dict(zip(self.scenario_names, auc_S, strict=True)),
            "rows_per_s": round(num_rows * self.world_size / train_s),
            "data_wait_s": round(wait_s, 3),
        }
        if self.log:
            self.log.write(
                self.step,
                {
                    "epoch/loss": metrics["loss"],
                    "valid/auc_mean": metrics["valid_auc"],
                    **{f"valid/auc_{name}": value for name, value in metrics["valid_auc_by_scenario"].items()},
                    "epoch/rows_per_s": metrics["rows_per_s"],
                    "epoch/data_wait_s": wait_s,
                },
            )
            logger.info(
                "%s epoch %d: loss %.4f, valid AUC %s, %s rows/s",
                self.task.name,
                epoch,
                metrics["loss"],
                " ".join(f"{name} {value:.4f}" for name, value in metrics["valid_auc_by_scenario"].items()),
                f"{metrics['rows_per_s']:,}",
            )
        return metrics

    def close(self) -> None:
        """Ends the scalar log."""
        if self.log:
            self.log.close()

    def _collate(self, rows: Any) -> Batch:
        batch = self.collator(rows)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _train_step(self, batch: Batch) -> torch.Tensor:
        logit_B, norm_B = self.step_model(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B)
        penalty = self.task.config.train.embedding_l2 * norm_B.mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss + penalty).backward()
        average_sparse_gradients(self.embeddings)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def _validate(self) -> list[float]:
        counts = BinnedAuc(len(self.scenario_names))
        self.model.eval()
        with torch.inference_mode():
            rows = read_share(self.valid_groups, VALID_BATCH_SIZE, self.rank, self.world_size)
            for batch in prefetch(rows, self._collate):
                batch = batch.to(self.device)
                logit_B, _ = self.model(batch)
                counts.update(batch.scenario_B, batch.label_B, logit_B)
        if self.world_size > 1:
            total = counts.counts_S2C.to(self.device)
            dist.all_reduce(total)
            counts.counts_S2C = total.cpu()
        auc_S = counts.compute()
        missing = [name for name, value in zip(self.scenario_names, auc_S, strict=True) if math.isnan(value)]
        if missing:
            raise TrainingError(
                f"valid has no rows of both labels in {missing}: AUC is not defined there; move data.split's thresholds"
            )
        return auc_S

    def _mean(self, value: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def _check(self, loss: torch.Tensor, epoch: int) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(
                f"{self.task.name}: loss is {float(loss)} at epoch {epoch}, step {self.step}; "
                f"lower train.learning_rate (now {self.task.config.train.learning_rate})"
            )


class _Scalars:
    """TensorBoard scalars below run_uri/tensorboard; a remote place gets them when the run ends."""

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, "tensorboard")
        storage.remove(self.uri)
        self.folder = None if storage.is_local(self.uri) else tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.folder.name if self.folder else str(storage.local_path(self.uri)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        if self.folder:
            for path in sorted(Path(self.folder.name).iterdir()):
                storage.copy(str(path), storage.join(self.uri, path.name))
            self.folder.cleanup()
