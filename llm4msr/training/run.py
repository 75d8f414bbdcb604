"""Runs of an experiment under Ray Train: which ones there are, where they go, and how one is started."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from llm4msr import storage, workspace
from llm4msr.config import Config, ConfigError, digest
from llm4msr.knowledge.place import knowledge_uri
from llm4msr.training.loop import TrainTask, train_worker

logger = logging.getLogger("llm4msr.training")

TRAIN_VERSION = 2  # part of a run's digest: with other code, a finished run is not the same run


def plan_runs(config: Config) -> list[TrainTask]:
    """Lists the runs of ``experiment.knowledge`` x ``experiment.seeds``.

    A run's place follows from all that its result depends on, so a finished run is found again and any change makes
    a new one. The backbone alone does not depend on the knowledge or on what reads it, and no run on the widths of an
    item knowledge that it does not have.

    Raises:
        StorageError: Data or knowledge is not there yet.
    """
    prepared_uri = workspace.prepared_uri(config)
    tasks = []
    for knowledge in config.experiment.knowledge:
        place = knowledge_uri(config) if knowledge != "none" else None
        levels = sorted(config.knowledge.levels) if knowledge != "none" else []
        unused = {"meta"} if knowledge == "none" else set()
        if "item" not in levels:
            unused.add("item_knowledge_dims")
        model = config.model.model_dump(mode="json", exclude=unused)
        for seed in config.experiment.seeds:
            depends_on = {
                "version": TRAIN_VERSION,
                "prepared": prepared_uri.rsplit("/", 1)[-1],
                "knowledge_table": place and place.rsplit("/", 1)[-1],
                "knowledge": knowledge,
                "levels": levels,
                "seed": seed,
                "model": model,
                "train": config.train.model_dump(mode="json", exclude={"log_every_steps"}),
            }
            name = f"{config.model.backbone}-{knowledge}-seed{seed}-{digest(depends_on)[:8]}"
            run_uri = storage.join(workspace.runs_root(config), name)
            tasks.append(TrainTask(config, prepared_uri, place, knowledge, seed, run_uri, name))
    return tasks


def train(task: TrainTask) -> dict[str, Any]:
    """Trains one run, or finds it finished; returns its checkpoint's metadata.

    Ray must be initialised. With 0 workers the loop runs in this process; otherwise in a DDP group of Ray Train.

    Raises:
        ConfigError: More workers are asked for than this machine can run.
        TrainingError: Training cannot go on.
        ray.train.TrainingFailedError: A worker failed.
    """
    if storage.is_finished(task.checkpoint_uri):
        logger.info("%s: already trained", task.name)
        return storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    num_workers = task.config.train.num_workers
    if num_workers == "auto":
        num_workers = num_gpus
    limit, unit = (num_gpus, "GPUs") if num_gpus else (int(resources.get("CPU", 0)), "CPUs")
    if num_workers > limit and not os.environ.get("RAY_ADDRESS"):
        # A cluster may grow; this machine does not, and Ray Train would wait for the missing workers for ever.
        raise ConfigError(f"train.num_workers: {num_workers} workers need as many {unit}, this machine has {limit}")
    if num_workers == 0:
        # One processor is left to the thread that collates batches; on a busy machine more threads only wait.
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    filesystem, path = storage.arrow_filesystem(storage.join(task.run_uri, "ray"))
    result = TorchTrainer(
        _worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if num_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=num_gpus > 0),
        run_config=RunConfig(name=task.name, storage_path=path, storage_filesystem=filesystem),
    ).fit()
    storage.remove(storage.join(task.run_uri, "ray"))  # Ray Train's own records
    return result.return_value


def _worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    # In a worker process this makes the epochs' lines visible; in process the job has done so already.
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it repeats each epoch's metrics
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    return train_worker(
        loop_config["task"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        report=lambda metrics: ray.train.report(metrics),
    )
