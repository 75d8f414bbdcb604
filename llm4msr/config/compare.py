"""The section about comparing backbones, knowledge and ablations of the method over seeds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from llm4msr.config.base import Auto, PositiveInt, Section, Seed
from llm4msr.config.model import Backbone, Knowledge

LearningRate = Annotated[float, Field(gt=0)]
# By dotted key, such as {"model.meta.scenario_level": false}.
Changes = dict[str, Any]


class CompareVariant(Section):
    """An ablation: what is compared besides the plain kinds of knowledge."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    """As tables and plots name it; not one of compare.knowledge."""
    knowledge: Knowledge = "llm"
    """What it trains with: one of experiment.knowledge's kinds."""
    set: Changes = Field(default={})
    """What it changes, by dotted key of model, train or knowledge: {"model.meta.scenario_level" = false}."""


class CompareConfig(Section):
    """What jobs.compare trains: every backbone with every variant, each in one process, over experiment.seeds."""

    backbones: tuple[Backbone, ...] = ("shared_bottom", "star")
    """Values of model.backbone."""
    knowledge: tuple[Knowledge, ...] = ("none", "llm", "shuffled", "random")
    """The plain variants, named as their kind of knowledge."""
    variants: tuple[CompareVariant, ...] = ()
    """Further variants: levels on and off, forms of weights."""
    backbone_settings: dict[Backbone, Changes] = Field(default={})
    """What single backbones change, in all their variants: {star = {"model.dropout" = 0.3}}."""
    learning_rates: tuple[LearningRate, ...] = (1e-3, 3e-3, 1e-2)
    """Values of train.learning_rate that each model tries, on valid, with tuning_seed: the same budget for all. Where
    train.embedding_learning_rate is set it keeps its ratio to train.learning_rate."""
    tuning_seed: Seed = 0
    """Seed of the runs that choose the learning rate; one of experiment.seeds costs least."""
    reference: str = "none"
    """Variant that gains are measured against, within each backbone."""
    max_concurrent: PositiveInt | Auto = "auto"
    """Runs at the same time; auto: as many as the processors and GPUs hold."""
    cpus_per_run: PositiveInt = 1
    """Processors of a run, and threads of its torch. The same for all runs: rounding depends on it."""
    gpus_per_run: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of a run; below 1 runs share one. auto: 1 where the cluster has any."""
    cold_max_rows: Annotated[int, Field(ge=0)] = 3
    """Users and items with at most so many training rows are cold. Drawn negatives do not count: where there are any,
    positives are counted."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variants, in order."""
        return (*self.knowledge, *(variant.name for variant in self.variants))

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        for name, values in (("backbones", self.backbones), ("learning_rates", self.learning_rates)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)}: give at least one value, each once")
        if repeated := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(
                f"knowledge, names of variants: {repeated[0]!r} is there twice, but each names one variant"
            )
        for name in self.backbone_settings:
            if name not in self.backbones:
                raise ValueError(
                    f"backbone_settings has {name!r}, which is not compared: backbones = {list(self.backbones)}"
                )
        if self.reference not in self.names:
            raise ValueError(f"reference = {self.reference!r}: no such variant; valid: {', '.join(self.names)}")
        return self
