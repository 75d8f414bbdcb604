"""The section about searching the learning rate and the widths of the meta networks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm4msr.config.base import Auto, PositiveInt, Section, Seed

Dims = tuple[PositiveInt, ...]


class TuneConfig(Section):
    """What jobs.tune tries; each trial is one training in one process."""

    knowledge: Literal["llm", "none"] = "llm"
    """llm: LLM4MSR is searched; none: the backbone alone, its learning rate only."""
    num_trials: PositiveInt = 16
    """Combinations that are tried."""
    learning_rate_range: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1e-4, 1e-2)
    """[lowest, highest] train.learning_rate; log-uniform: each of num_trials equal parts of the range has one trial."""
    scale_embedding_rate: bool = True
    """Where train.embedding_learning_rate is set it keeps its ratio to train.learning_rate; false: it stays."""
    trunk_dims_choices: tuple[Dims, ...] = ((64, 32), (128, 32), (256, 64))
    """Choices of model.meta.trunk_dims, tried equally often; one choice fixes it. So with the next two."""
    rank_choices: tuple[PositiveInt, ...] = (8, 16, 32)
    """Choices of model.meta.rank; not searched where model.meta.weight_form is full."""
    scenario_dims_choices: tuple[Dims, ...] = ((32,), (64,), (128,))
    """Choices of model.meta.scenario_dims; not searched where model.meta.scenario_level is off."""
    grace_epochs: PositiveInt = 2
    """Epochs that every trial may train before it can be stopped early (ASHA); train.max_epochs: none is."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """After grace_epochs, and each time it trained so many times longer, a trial goes on if it is among the best
    1 / reduction_factor of those that came as far."""
    max_concurrent: PositiveInt | Auto = "auto"
    """Trials at the same time; auto: as many as the processors and GPUs hold."""
    cpus_per_trial: PositiveInt | Auto = "auto"
    """Processors of a trial, and threads of its torch; auto: all of them shared out among the trials that run at once
    (at most 8 beside a GPU)."""
    gpus_per_trial: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of a trial; below 1 trials share one. auto: 1 where the cluster has any."""
    seed: Seed = 0
    """Seed of the combinations. Trials train with the first of experiment.seeds."""
    recipe_path: str | None = None
    """Where the recipe with the best values is written, local or s3://, beside best.toml of the search; unset: there
    only."""

    @model_validator(mode="after")
    def _check(self) -> TuneConfig:
        low, high = self.learning_rate_range
        if low >= high:
            raise ValueError(
                f"learning_rate_range = [{low:g}, {high:g}]: the first is the lowest, the second the highest"
            )
        for name in ("trunk_dims_choices", "rank_choices", "scenario_dims_choices"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} = {_plain(values)}: give at least one choice, each once")
        return self


def _plain(values: tuple[Any, ...]) -> list[Any]:
    return [list(value) if isinstance(value, tuple) else value for value in values]
