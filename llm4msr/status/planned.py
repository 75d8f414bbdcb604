"""How many runs were asked for: by the configuration that the newest run holds, as jobs.train or jobs.compare read it.

A run's folder is named by a digest of all that its result depends on, which only `llm4msr.training.run` can make (it
needs torch and Ray). Here configurations are compared instead: the same result, however many workers made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm4msr import storage
from llm4msr.storage import MANIFEST

DETAIL_FILE = "evaluation_detail.json"  # beside the runs that jobs.compare evaluated
FINISHED = f"checkpoint/{MANIFEST}"
# As in llm4msr.training.run and llm4msr.knowledge.place, which a test compares: how the work is done, not what it is.
TRAIN_HOW = frozenset(
    {"device", "num_workers", "cpus_per_worker", "log_every_steps", "checkpoint_every_steps", "num_to_keep"}
    | {"max_failures", "max_loss"}
)
KNOWLEDGE_HOW = frozenset(
    {"attention", "compile", "batch_tokens", "device", "num_actors", "gpus_per_actor", "cpus_per_actor"}
    | {"rows_per_commit", "max_error_fraction", "openai"}
)


def planned_runs(runs_uri: str, runs: Mapping[str, Mapping[str, float]]) -> tuple[int, int, str] | None:
    """Returns how many of the runs that the last command asked for are finished, how many it asked for, and its name.

    Args:
        runs_uri: The folder of the runs.
        runs: Times of the files of each run, by their names below it.

    Returns:
        None where no run holds a configuration yet, or it is one of another version.
    """
    by_age = sorted(runs, key=lambda name: -max(runs[name].values()))
    found = next(((name, where) for name in by_age if (where := _config_place(runs[name]))), None)
    if found is None:
        return None
    name, where = found
    try:
        config = _read_config(storage.join(runs_uri, name), where)
        compared = [run for run, files in runs.items() if DETAIL_FILE in files and FINISHED in files]
        # A run of a comparison asks for one kind of knowledge; before its own evaluation nothing else tells it apart.
        if DETAIL_FILE in runs[name] or (compared and len(config["experiment"]["knowledge"]) == 1):
            return len(compared), _compared_runs(config), "jobs.compare"
        wanted = [(kind, seed) for kind in config["experiment"]["knowledge"] for seed in config["experiment"]["seeds"]]
        done = sum(_is_done(runs_uri, runs, config, kind, seed) for kind, seed in wanted)
    except (storage.StorageError, KeyError, TypeError):
        return None
    return done, len(wanted), "jobs.train"


def _is_done(
    runs_uri: str, runs: Mapping[str, Mapping[str, float]], config: dict[str, Any], kind: str, seed: int
) -> bool:
    prefix, wanted = f"{config['model']['backbone']}-{kind}-seed{seed}-", _what(config, kind)
    return any(
        _what(_read_config(storage.join(runs_uri, name), "checkpoint/config.json"), kind) == wanted
        for name, files in runs.items()
        if name.startswith(prefix) and FINISHED in files
    )


def _compared_runs(config: dict[str, Any]) -> int:
    """Returns how many runs a comparison takes: each model's learning rates, and the other seeds at the best."""
    section = config["compare"]
    num_models = len(section["backbones"]) * (len(section["knowledge"]) + len(section["variants"]))
    other_seeds = set(config["experiment"]["seeds"]) - {section["tuning_seed"]}
    return num_models * (len(section["learning_rates"]) + len(other_seeds))


def _what(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns what a run's result depends on, by its configuration, as `llm4msr.training.run.plan_runs` sees it."""
    levels = config["knowledge"]["levels"] if kind != "none" else []
    unused = {"meta", "knowledge_match"} if kind == "none" else set()
    if "item" not in levels:
        unused.add("item_knowledge_dims")
    return {
        "data": config["data"],
        "knowledge": None if kind == "none" else _without(config["knowledge"], KNOWLEDGE_HOW),
        "model": _without(config["model"], unused),
        "train": _without(config["train"], TRAIN_HOW),
    }


def _without(section: dict[str, Any], names: set[str] | frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def _config_place(files: Mapping[str, float]) -> str | None:
    """Returns the file of a run that holds its configuration."""
    if FINISHED in files:
        return "checkpoint/config.json"
    saved = [name for name in files if name.startswith("training/step-") and name.endswith(f"/{MANIFEST}")]
    return max(saved, default=None)


def _read_config(run_uri: str, where: str) -> dict[str, Any]:
    tree: dict[str, Any] = storage.read_json(storage.join(run_uri, where))
    config: dict[str, Any] = tree if where.startswith("checkpoint/") else tree["about"]["config"]
    return config
