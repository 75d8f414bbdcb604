"""What jobs.compare trains: a model for every backbone and variant, its learning rates, its seeds, and the choice.

A run's place follows from what it is (`llm4msr.training.run.plan_runs`), so a run that was trained before, by whatever
job, is found again. How runs are executed is the business of `llm4msr.comparison.run`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm4msr import storage
from llm4msr.config import Config, ConfigError, digest
from llm4msr.evaluation import EVALUATION_VERSION
from llm4msr.schema import ALL_SCENARIOS
from llm4msr.settings import config_from_dict, with_values
from llm4msr.training.run import plan_runs
from llm4msr.training.task import TrainTask

COMPARE_VERSION = 1  # part of a comparison's digest
PLAN_FILE = "plan.json"
EVALUATION_FILE, DETAIL_FILE = "evaluation.json", "evaluation_detail.json"
# What a variant may change: with other data the rows would not be the same.
CHANGEABLE = ("model.", "train.", "knowledge.")
# What the comparison itself sets.
TAKEN = ("model.backbone", "train.learning_rate", "train.num_workers")


@dataclass(frozen=True)
class Model:
    """One backbone with one variant.

    Attributes:
        backbone: Value of model.backbone.
        variant: Name of the variant.
        knowledge: Its kind of knowledge.
        changes: What differs from the configuration, by dotted key.
        tuning: By learning rate, the run that tries it.
        runs: By learning rate, the runs of all seeds at it.
    """

    backbone: str
    variant: str
    knowledge: str
    changes: dict[str, Any]
    tuning: dict[float, TrainTask]
    runs: dict[float, tuple[TrainTask, ...]]


@dataclass(frozen=True)
class Comparison:
    """All models of a comparison, and its place, which follows from all that its result depends on."""

    config: Config
    uri: str
    prepared_uri: str
    models: tuple[Model, ...]

    @property
    def num_runs(self) -> int:
        """Runs that it takes: each model's learning rates, and the other seeds at the best of them."""
        other_seeds = set(self.config.experiment.seeds) - {self.config.compare.tuning_seed}
        return sum(len(model.tuning) + len(other_seeds) for model in self.models)


@dataclass(frozen=True)
class Choice:
    """A model's learning rate.

    Attributes:
        learning_rate: The best on valid; None where no run could be trained.
        valid_auc: By learning rate: mean of the scenarios' AUC on valid, None where the run failed.
        tied: All learning rates with the best AUC; the first that was listed is taken.
    """

    learning_rate: float | None
    valid_auc: dict[float, float | None]
    tied: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether it is the lowest or the highest of several: a better one may lie beyond what was tried."""
        rates = self.valid_auc
        return len(rates) > 1 and self.learning_rate in (min(rates), max(rates))


@dataclass(frozen=True)
class Failure:
    """Why a run could not be trained or evaluated.

    Attributes:
        message: In a line.
        details: What Python said, where it was not foreseen.
        diverged: Whether training was stopped for its loss, weights or scores: another learning rate may do.
    """

    message: str
    details: str = ""
    diverged: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a comparison.

    Attributes:
        choices: Of each model, in order.
        failures: By the run's name: runs that are missing from the figures, or from the choice of a learning rate.
        diverged: The same of learning rates that proved too high for models which have another one.
    """

    choices: tuple[Choice, ...]
    failures: dict[str, Failure]
    diverged: dict[str, Failure]


def model_configs(config: Config) -> list[tuple[str, str, str, dict[str, Any], Config]]:
    """Lists backbone, variant, knowledge, changes and the resulting configuration of every model.

    Raises:
        ConfigError: Tables are sharded, or a variant or a backbone changes what it cannot.
    """
    section, tree = config.compare, config.model_dump(mode="json")
    if config.model.embedding_sharding == "sharded":
        raise ConfigError(
            "model.embedding_sharding = 'sharded': a run of jobs.compare is one process; compare 'replicated' tables"
        )
    variants: list[tuple[str, str, dict[str, Any], str]] = [(kind, kind, {}, "") for kind in section.knowledge]
    variants += [(v.name, v.knowledge, v.set, f"compare.variants.{i}.set") for i, v in enumerate(section.variants)]
    models: list[tuple[str, str, str, dict[str, Any], Config]] = []
    for backbone in section.backbones:
        own = section.backbone_settings.get(backbone, {})
        _check_changes(own, f"compare.backbone_settings.{backbone}")
        for name, knowledge, changed, key in variants:
            _check_changes(changed, key)
            changes = {**own, **changed}
            asked = {"model.backbone": backbone, "train.num_workers": 0, "experiment.knowledge": [knowledge]}
            try:
                changed_config = config_from_dict(with_values(tree, changes | asked))
            except ConfigError as error:
                raise ConfigError(f"{backbone} with variant {name!r} of jobs.compare: {error}") from error
            models.append((backbone, name, knowledge, changes, changed_config))
    return models


def extractions(config: Config) -> list[Config]:
    """Lists the configurations whose knowledge the comparison reads, each extraction once, those of most levels first.

    Raises:
        ConfigError: As for `model_configs`.
    """
    found = {digest(c.knowledge): c for _, _, knowledge, _, c in model_configs(config) if knowledge != "none"}
    return sorted(found.values(), key=lambda c: -len(c.knowledge.levels))


def plan_comparison(config: Config) -> Comparison:
    """Lists every run that may be trained.

    Raises:
        ConfigError: As for `model_configs`.
        StorageError: Data or knowledge is not there yet.
    """
    section, models = config.compare, []
    seeds = tuple(dict.fromkeys((*config.experiment.seeds, section.tuning_seed)))
    for backbone, variant, knowledge, changes, changed in model_configs(config):
        tuning, runs = {}, {}
        for rate in section.learning_rates:
            tasks = {task.seed: task for task in plan_runs(_at_rate(changed, rate, seeds))}
            tuning[rate] = tasks[section.tuning_seed]
            runs[rate] = tuple(tasks[seed] for seed in config.experiment.seeds)
        models.append(Model(backbone, variant, knowledge, changes, tuning, runs))
    depends_on = {
        "version": COMPARE_VERSION,
        "evaluation": EVALUATION_VERSION,
        "models": [[m.backbone, m.variant, [task.name for task in m.tuning.values()]] for m in models],
        "seeds": config.experiment.seeds,
        "reference": section.reference,
        "cold_max_rows": section.cold_max_rows,
    }
    uri = storage.join(storage.absolute(config.workspace_uri), f"compare-{digest(depends_on)[:8]}")
    return Comparison(config, uri, next(iter(models[0].tuning.values())).prepared_uri, tuple(models))


def write_plan(comparison: Comparison) -> None:
    """Writes down what is about to be done, for who looks at the workspace meanwhile.

    `num_runs` of the runs that are named will be trained: the other seeds of a model only at the best learning rate.
    """
    models = [
        {
            "backbone": model.backbone,
            "variant": model.variant,
            "tuning": [task.name for task in model.tuning.values()],
            "runs": {f"{rate:g}": [task.name for task in tasks] for rate, tasks in model.runs.items()},
        }
        for model in comparison.models
    ]
    plan = {"kind": "comparison plan", "version": COMPARE_VERSION, "num_runs": comparison.num_runs, "models": models}
    storage.write_json(storage.join(comparison.uri, PLAN_FILE), plan)


def choose(valid_auc: Mapping[float, float | None]) -> Choice:
    """Chooses the learning rate with the best AUC on valid; of equal ones the first."""
    defined = [auc for auc in valid_auc.values() if auc is not None]
    tied = tuple(rate for rate, auc in valid_auc.items() if defined and auc == max(defined))
    return Choice(tied[0] if tied else None, dict(valid_auc), tied)


def mean_valid_auc(evaluation: Iterable[Mapping[str, Any]]) -> float:
    """Returns the mean of the scenarios' exact AUC on valid, from the report rows of one run."""
    rows = [row for row in evaluation if row["split"] == "valid" and row["scenario"] != ALL_SCENARIOS]
    return statistics.fmean(row["auc"] for row in rows)


def _check_changes(changes: Mapping[str, Any], key: str) -> None:
    for name in changes:
        if name in TAKEN or not name.startswith(CHANGEABLE):
            raise ConfigError(
                f"{key}: {name!r} cannot be changed by it: give dotted keys of model, train or knowledge other than "
                f"{', '.join(TAKEN)}"
            )


def _at_rate(config: Config, rate: float, seeds: tuple[int, ...]) -> Config:
    train, changed = config.train, {"learning_rate": rate}
    if train.embedding_learning_rate is not None:
        ratio = train.embedding_learning_rate / train.learning_rate
        changed["embedding_learning_rate"] = float(f"{ratio * rate:.4g}")
    experiment = config.experiment.model_copy(update={"seeds": seeds})
    return config.model_copy(update={"train": train.model_copy(update=changed), "experiment": experiment})
