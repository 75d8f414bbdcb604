"""The training loop of one worker: epochs, early stop, checkpoints, and going on after a crash.

Who starts it, on how many workers and on which device, is the business of `llm4msr.training.run`.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import ConfigError
from llm4msr.data.history import read_logs
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.llm4msr import MultiScenarioModel, build_model, set_knowledge
from llm4msr.training.running import Run, agreed
from llm4msr.training.saving import save_checkpoint
from llm4msr.training.task import TrainTask, load_knowledge
from llm4msr.training.trainer import Trainer

logger = logging.getLogger("llm4msr.training")


def train_worker(
    task: TrainTask,
    rank: int,
    world_size: int,
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool] = lambda: False,
    preempted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains until the mean scenario AUC on valid stops improving, and writes the best weights as a checkpoint.

    Goes on from the newest good checkpoint of a training that was stopped, by whatever and at whatever point.

    Args:
        task: What to train.
        rank: This worker.
        world_size: Number of workers; above 1 a process group must be initialised.
        device: Where the model lives.
        report: Called once per epoch on every worker with that epoch's metrics.
        should_stop: Asked now and then on each worker; true on one stops all, after a checkpoint.
        preempted: Asked now and then on all workers at the same step, answers the same on all; true writes a
            checkpoint and training goes on.

    Returns:
        The checkpoint's metadata.

    Raises:
        TrainingDiverged: The loss is not finite or exploded, or weights or scores are not finite.
        TrainingError: Train has fewer rows than lanes, or valid has a scenario without both classes.
        TrainingInterrupted: `should_stop` said so.
    """
    if agreed(world_size, rank == 0 and storage.is_finished(task.checkpoint_uri)):
        # A worker that died after the last line below made Ray Train start the group again.
        trained: dict[str, Any] = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
        return trained
    prepared = PreparedData.open(task.prepared_uri)
    knowledge = load_knowledge(task)
    model = _new_model(task, prepared, knowledge)
    collator = Collator(
        prepared.schema,
        EntityFeatures.from_table(prepared.users(), prepared.schema, "user"),
        EntityFeatures.from_table(prepared.items(), prepared.schema, "item"),
        knowledge,
        read_logs(prepared.uri, prepared.schema),
    )
    trainer = Trainer(task.config, model, collator, rank, world_size, device)
    run = Run(task, prepared, trainer, should_stop, preempted)
    state, train = run.state, task.config.train
    try:
        while state.epoch < train.max_epochs and state.epoch - max(state.best_epoch, 0) <= train.patience:
            report(run.epoch())
    finally:
        run.close(sys.exception())
    metadata = {
        "model_version": task.name,
        "backbone": task.config.model.backbone,
        "knowledge": task.knowledge,
        "seed": task.seed,
        "prepared": task.prepared_uri.rsplit("/", 1)[-1],
        "best_epoch": state.best_epoch,
        "valid_auc": state.best_auc,
        "num_parameters": trainer.num_parameters,
        "world_size": world_size,
        "num_threads": torch.get_num_threads(),
        # Of rank 0, in the order of the epochs: one that was gone on with elsewhere has several.
        "devices": list(dict.fromkeys(epoch["device"] for epoch in state.history if "device" in epoch)),
        "history": state.history,
        "seconds": round(run.seconds(), 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if rank == 0:
        assert state.best_file is not None, "an epoch at least"
        best = storage.join(task.training_uri, state.best_file["file"])
        save_checkpoint(task.checkpoint_uri, task.config, prepared, knowledge, best, metadata)
        storage.remove(task.training_uri)
    return metadata


def _new_model(task: TrainTask, prepared: PreparedData, knowledge: KnowledgeTable | None) -> MultiScenarioModel:
    torch.manual_seed(task.seed)  # the same initial weights on every worker
    config = task.config
    materialize = config.model.embedding_sharding == "replicated"
    if knowledge is None:
        return build_model(prepared.schema, config.model, None, materialize=materialize)
    if "item" in config.knowledge.levels and not knowledge.has_items:
        if config.model.knowledge_match:
            raise ConfigError(
                f"{task.name}: model.knowledge_match is on, but no item has knowledge: no item has a text "
                "(data.table.item_text_columns); switch it off, or give items a text"
            )
        logger.warning("%s: no item has knowledge: the model is built without item knowledge", task.name)
    model = build_model(prepared.schema, config.model, knowledge.width, knowledge.has_items, materialize)
    set_knowledge(model, knowledge)
    return model
