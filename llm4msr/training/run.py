"""Runs of an experiment under Ray Train: which ones there are, where they go, and how one is started and stopped."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from llm4msr import logs, storage, workspace
from llm4msr.config import Config, ConfigError, digest
from llm4msr.knowledge.place import knowledge_uri
from llm4msr.placement import Node, alive_nodes, most_cpus, num_fitting
from llm4msr.training.device import on_gpu, open_device
from llm4msr.training.gloo import GlooConfig
from llm4msr.training.loop import train_worker
from llm4msr.training.signals import sigterm_event
from llm4msr.training.stop import asking, forwarded, start_flag
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted, TrainTask

logger = logging.getLogger("llm4msr.training")

TRAIN_VERSION = 5  # part of a run's digest: with other code, a finished run is not the same run
# What a run's result does not depend on, but for rounding and for which weights dropout hides.
HOW_NOT_WHAT = {
    "device",
    "num_workers",
    "cpus_per_worker",
    "log_every_steps",
    "checkpoint_every_steps",
    "num_to_keep",
    "max_failures",
    "max_loss",
}
MOST_CPUS_BESIDE_GPU = 8


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
        unused = {"meta", "knowledge_match"} if knowledge == "none" else set()
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
                "train": config.train.model_dump(mode="json", exclude=HOW_NOT_WHAT),
            }
            name = f"{config.model.backbone}-{knowledge}-seed{seed}-{digest(depends_on)[:8]}"
            run_uri = storage.join(workspace.runs_root(config), name)
            tasks.append(TrainTask(config, prepared_uri, place, knowledge, seed, run_uri, name))
    return tasks


def train(task: TrainTask) -> dict[str, Any]:
    """Trains one run, goes on with it, or finds it finished; returns its checkpoint's metadata.

    Ray must be initialised. With 0 workers the loop runs in this process; otherwise in a DDP group of Ray Train, which
    is started again from the last checkpoint when a worker dies. SIGTERM writes a checkpoint first.

    Raises:
        ConfigError: More workers are asked for than this machine can run, or GPUs that are not there without saying
            how many workers.
        TrainingError: Training cannot go on, or workers failed more often than ``train.max_failures``.
        TrainingInterrupted: SIGTERM came.
    """
    if storage.is_finished(task.checkpoint_uri):
        logger.info("%s: already trained", task.name)
        storage.remove(task.training_uri)  # of a process that died between its last two lines
        trained: dict[str, Any] = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
        return trained
    train_config = task.config.train
    nodes = alive_nodes(ray.nodes())
    num_gpus = sum(node.num_gpus for node in nodes)
    gpu = on_gpu(train_config.device, num_gpus)
    num_workers = train_config.num_workers
    if num_workers == "auto":
        if gpu and not num_gpus:
            raise ConfigError(
                "train.device = 'cuda' with train.num_workers = 'auto': the cluster has no GPU now; on one that grows "
                "give train.num_workers, for example [1, 4], so that its autoscaler knows how many to start"
            )
        num_workers = num_gpus if gpu else 0
    with sigterm_event() as stop, logs.about(run=task.name):
        metadata = _train_here(task, stop) if num_workers == 0 else _train_group(task, num_workers, nodes, gpu, stop)
        if stop.is_set():
            raise TrainingInterrupted(f"{task.name}: finished, then stopped as asked; the same command goes on")
        return metadata


def _train_here(task: TrainTask, stop: threading.Event) -> dict[str, Any]:
    """Trains in this process; what torch was set to is set again afterwards."""
    if task.config.model.embedding_sharding == "sharded":
        raise ConfigError("model.embedding_sharding = 'sharded' needs train.num_workers of at least 1, found 0")
    cpus = task.config.train.cpus_per_worker
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(_threads(len(os.sched_getaffinity(0)) if cpus == "auto" else cpus))
    device = open_device(on_gpu(task.config.train.device, int(torch.cuda.is_available())))
    try:
        return train_worker(task, 0, 1, device, lambda metrics: None, stop.is_set)
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _train_group(
    task: TrainTask, num_workers: int | tuple[int, int], nodes: Sequence[Node], gpu: bool, stop: threading.Event
) -> dict[str, Any]:
    fewest, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    limit = sum(node.num_gpus if gpu else node.num_cpus for node in nodes)
    grows = bool(os.environ.get("RAY_ADDRESS"))  # this machine does not, and Ray Train would wait for ever
    if fewest > limit and not grows:
        unit = "GPUs" if gpu else "CPUs"
        raise ConfigError(f"train.num_workers: {fewest} workers need as many {unit}, this machine has {limit}")
    if most > task.config.train.num_lanes:
        raise ConfigError(
            f"train.num_lanes: {task.config.train.num_lanes} lanes are too few for {most} workers (one per GPU); "
            f"set train.num_lanes to {most}"
        )
    cpus = task.config.train.cpus_per_worker
    if cpus == "auto":
        cpus = most_cpus(nodes, most, int(gpu), MOST_CPUS_BESIDE_GPU if gpu else None)
    room = num_fitting(nodes, cpus, int(gpu))
    if fewest > room and not grows:
        raise ConfigError(
            f"train.cpus_per_worker: {fewest} workers of {cpus} CPUs do not fit on this machine, {room} would; "
            "lower it, or train.num_workers"
        )
    if fewest > room:
        logger.warning(
            "%s: waiting for nodes for %d of %d workers, %d CPUs%s each: the cluster does not have them now; "
            "`ray status` says what is on its way",
            *(task.name, fewest - room, fewest, cpus, " and a GPU" if gpu else ""),
        )
    scratch = storage.join(task.run_uri, "ray")
    filesystem, path = storage.arrow_filesystem(scratch)
    flag = start_flag()
    with forwarded(stop, flag):
        trainer = TorchTrainer(
            _worker,  # type: ignore[arg-type]  # Ray's types know no loop that returns something
            train_loop_config={"task": task, "flag": flag, "num_threads": _threads(cpus), "gpu": gpu},
            torch_config=TorchConfig(backend="nccl") if gpu else GlooConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers,  # type: ignore[arg-type]  # Ray's types know no (fewest, most)
                use_gpu=gpu,
                resources_per_worker={"CPU": cpus},
            ),
            # A name of its own: Ray Train would take up the records of an earlier start under the same name.
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=task.config.train.max_failures),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise TrainingError(_why_workers_failed(task, error)) from error
        except ray.train.ControllerError as error:
            hint = "; train.device asks for a GPU: look at nvidia-smi on the nodes of the workers" if gpu else ""
            reason = str(error).strip().splitlines()[-1]
            raise TrainingError(f"{task.name}: the workers could not be started: {reason}{hint}") from error
    storage.remove(scratch)  # Ray Train's own records
    outcome: dict[str, Any] = result.return_value  # type: ignore[attr-defined]  # Ray's types are of its older Result
    for kind in (TrainingDiverged, TrainingError, TrainingInterrupted):
        if kind.__name__ in outcome:
            raise kind(outcome[kind.__name__])
    return outcome


def _why_workers_failed(task: TrainTask, error: ray.train.WorkerGroupError) -> str:
    reasons = {str(failure).strip().splitlines()[-1] for failure in error.worker_failures.values()}
    return (
        f"{task.name}: workers failed more often than train.max_failures = {task.config.train.max_failures}; "
        f"the last time: {'; '.join(sorted(reasons))}; the same command goes on from the last checkpoint"
    )


def _threads(cpus: int) -> int:
    """Returns torch's threads: one processor is left to the thread that reads and collates, where there are several."""
    return max(1, cpus - 1)


def _worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    # In a worker process this makes the epochs' lines visible.
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it repeats each epoch's metrics
    context = ray.train.get_context()
    with logs.about(stage="train", run=loop_config["task"].name, rank=context.get_world_rank()):
        return _train_in_group(loop_config)


def _train_in_group(loop_config: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(loop_config["num_threads"])
    context = ray.train.get_context()
    try:
        open_device(loop_config["gpu"])
        with asking(loop_config["flag"]) as should_stop:
            return train_worker(
                loop_config["task"],
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=ray.train.torch.get_device(),
                report=lambda metrics: ray.train.report(metrics),
                should_stop=should_stop,
                preempted=_Preempted(),
            )
    except (TrainingError, TrainingInterrupted) as error:
        # All workers end here together. Raised, it would be a failure that Ray Train answers with another start.
        return {type(error).__name__: str(error)}


class _Preempted:
    """Whether Ray Train announced that a node will be taken away; true once per announcement."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def __call__(self) -> bool:
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self.known if info is not None else set()
        self.known |= new
        return bool(new)
