"""What a search of jobs.tune tries: its trials, what is written down of each, and the recipe with the best values.

All trials are drawn before the first starts: a Latin hypercube, in which every part of the range of learning rates has
one trial and every width is tried equally often. So a rerun knows what is missing. How they are run is the business of
`llm4msr.training.tune`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tomli_w

from llm4msr import storage, workspace
from llm4msr.config import Config, ConfigError, digest
from llm4msr.settings import config_from_dict, with_values
from llm4msr.training.run import plan_runs
from llm4msr.training.task import TrainTask

TUNE_VERSION = 1  # part of a search's digest
TRIAL_FILE, RECIPE_FILE = "trial.json", "best.toml"


@dataclass(frozen=True)
class Trial:
    """One combination.

    Attributes:
        values: What it changes of the configuration, by dotted key.
        task: The run that tries it.
    """

    values: dict[str, Any]
    task: TrainTask

    @property
    def record_uri(self) -> str:
        """The place of what is known of it once it has ended."""
        return storage.join(self.task.run_uri, TRIAL_FILE)


@dataclass(frozen=True)
class Search:
    """All trials of a search, and its place, which follows from all that its result depends on."""

    uri: str
    trials: tuple[Trial, ...]


def plan_search(config: Config) -> Search:
    """Draws the trials.

    Raises:
        ConfigError: The tables are sharded: a trial is one process.
        StorageError: Data or knowledge is not there yet.
    """
    if config.model.embedding_sharding == "sharded":
        raise ConfigError(
            "model.embedding_sharding = 'sharded': a trial of jobs.tune is one process; search with 'replicated' tables"
        )
    drawn = []
    for values in draw_values(config):
        asked = {"experiment.knowledge": [config.tune.knowledge], "experiment.seeds": [config.experiment.seeds[0]]}
        (task,) = plan_runs(_changed(config, values | asked))
        drawn.append((values, task))
    depends_on = {
        "version": TUNE_VERSION,
        "halving": config.tune.model_dump(mode="json", include={"grace_epochs", "reduction_factor"}),
        "max_loss": config.train.max_loss,  # no part of a run's name, but it says what has diverged
        "trials": [task.name for _, task in drawn],
    }
    uri = storage.join(workspace.runs_root(config), f"tune-{digest(depends_on)[:8]}")
    return Search(
        uri, tuple(Trial(values, replace(t, run_uri=storage.join(uri, "trials", t.name))) for values, t in drawn)
    )


def draw_values(config: Config) -> list[dict[str, Any]]:
    """Returns the values of each trial by dotted key, the same for the same `tune.seed`."""
    section, train, meta = config.tune, config.train, config.model.meta
    rng, count = np.random.default_rng(section.seed), section.num_trials
    low, high = (math.log(rate) for rate in section.learning_rate_range)
    part_T = (rng.permutation(count) + rng.random(count)) / count
    rates = [float(f"{math.exp(low + (high - low) * part):.4g}") for part in part_T]
    drawn: list[dict[str, Any]] = [{"train.learning_rate": rate} for rate in rates]
    if train.embedding_learning_rate is not None and section.scale_embedding_rate:
        ratio = train.embedding_learning_rate / train.learning_rate
        for values, rate in zip(drawn, rates, strict=True):
            values["train.embedding_learning_rate"] = float(f"{ratio * rate:.4g}")
    for name, choices, used in (
        ("trunk_dims", section.trunk_dims_choices, True),
        ("rank", section.rank_choices, meta.weight_form == "low_rank"),
        ("scenario_dims", section.scenario_dims_choices, meta.scenario_level),
    ):
        if section.knowledge == "llm" and used:
            for values, index in zip(drawn, rng.permutation(np.arange(count) % len(choices)), strict=True):
                choice = choices[index]
                values[f"model.meta.{name}"] = list(choice) if isinstance(choice, tuple) else choice
    return drawn


def make_record(trial: Trial, state: str, curve: dict[int, float], message: str) -> dict[str, Any]:
    """Returns what is written down of a trial.

    Args:
        trial: The trial.
        state: finished: by itself; stopped: early, by ASHA; diverged; failed: its process died too often.
        curve: Best mean scenario AUC on valid so far, by epochs trained.
        message: Why it diverged or failed.

    Returns:
        name, values, state, valid_auc (None where diverged or failed), epochs, curve as pairs, message.
    """
    good = state in ("finished", "stopped")
    return {
        "name": trial.task.name,
        "values": trial.values,
        "state": state,
        "valid_auc": max(curve.values()) if good else None,
        "epochs": max(curve, default=0),
        "curve": sorted(curve.items()),
        "message": message,
    }


def shown(value: Any) -> Any:
    """Returns a scalar as it is, widths as 128x32, several values by the last parts of their keys."""
    if isinstance(value, dict):
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {shown(v)}" for key, v in value.items())
    return "x".join(map(str, value)) if isinstance(value, list) else value


def _changed(config: Config, values: dict[str, Any]) -> Config:
    return config_from_dict(with_values(config.model_dump(mode="json"), values))


def write_recipe(config: Config, uri: str, best: dict[str, Any]) -> str:
    """Writes the given configuration with the best trial's values as a recipe; returns where the user looks for it."""
    tree = with_values(config.model_dump(mode="json", exclude_defaults=True, exclude_none=True), best["values"])
    head = f"# The best of {config.tune.num_trials} trials of jobs.tune: valid AUC {best['valid_auc']:.4f}.\n"
    places = [storage.join(uri, RECIPE_FILE), *([config.tune.recipe_path] if config.tune.recipe_path else [])]
    for place in places:
        with storage.atomic_write(place) as file:
            file.write((head + tomli_w.dumps(tree)).encode())
    return places[-1]
