"""What the tests of training share: a workspace whose data and knowledge are there, and what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job_process import write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage, workspace
from llm4msr.config import Config
from llm4msr.knowledge.place import knowledge_pointer_uri
from llm4msr.training.run import plan_runs
from llm4msr.training.task import TrainTask

TIMES = {"rows_per_s", "data_wait_s"}  # of an epoch's metrics; all others follow from the data


def tree(root: str, **train: Any) -> dict[str, Any]:
    """A configuration whose single run, of LLM4MSR, learns for some seconds."""
    settings = {"num_workers": 0, "batch_size": 64, "learning_rate": 0.003, "max_epochs": 4, "patience": 9}
    return {
        "workspace_uri": root,
        "model": {"embedding_dim": 4, "hidden_dims": [16, 8], "tower_dims": [8]},
        "train": settings | {"checkpoint_every_steps": 25, "log_every_steps": 5} | train,
        "experiment": {"knowledge": ["llm"]},
    }


def make_workspace(root: str, folder: Path, num_rows: int = 8000, **train: Any) -> tuple[TrainTask, Path]:
    """Writes data, knowledge and recipe; returns the run that jobs.train would train, and the recipe's path."""
    config = tiny_config(**tree(root, **train))
    tiny_prepared(storage.join(workspace.prepared_root(config), "made"), num_rows=num_rows)
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": "made"})
    tiny_knowledge().save(storage.join(workspace.knowledge_root(config), "made"))
    storage.write_manifest(storage.join(workspace.knowledge_root(config), "made"), {"kind": "knowledge"})
    storage.write_json(knowledge_pointer_uri(config), {"directory": "made"})
    return only_run(config), write_recipe(folder / "recipe.toml", tree(root, **train))


def only_run(config: Config) -> TrainTask:
    (task,) = plan_runs(config)
    return task


def states(task: TrainTask) -> list[str]:
    """Names of the finished checkpoints of a training that has not ended."""
    found = storage.list_files(task.training_uri, "manifest.json")
    return sorted(name.split("/")[-2] for name, _ in found)


def step_of(state: str) -> int:
    """The steps that a checkpoint of a training is named after."""
    return int(state.rsplit("/", 1)[-1].split("-")[1])


def outcome(task: TrainTask) -> dict[str, Any]:
    """A finished run's metadata without times and places."""
    metadata = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
    metadata["history"] = [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in metadata["history"]]
    return {k: v for k, v in metadata.items() if k not in ("seconds", "world_size", "num_threads", "model_version")}


def weights(task: TrainTask) -> bytes:
    """The bytes of a finished run's weights."""
    fs, path = storage.filesystem(storage.join(task.checkpoint_uri, "model.safetensors"))
    return fs.cat_file(path)


def step_losses(task: TrainTask) -> list[float]:
    """The loss of each step that was logged, in order, from a local TensorBoard folder."""
    events = EventAccumulator(str(storage.local_path(storage.join(task.run_uri, "tensorboard"))))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]
