"""The sections about the ranker: its networks, its training, and which runs are compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm4msr.config.base import Auto, Fraction, PositiveInt, Section, Seed


class MetaConfig(Section):
    """Hierarchical meta networks (reconstruction: see docs/method.md)."""

    user_level: bool = True
    """User-level meta layers at the bottom: h = x + act(x W_u + b_u)."""
    scenario_level: bool = True
    """Scenario-level meta layers in parallel with the backbone; their logit is added."""
    weight_form: Literal["full", "low_rank"] = "low_rank"
    """full: the meta network generates W; low_rank: W = U K V with shared U, V and generated K."""
    rank: PositiveInt = 16
    """Width of K for low_rank."""
    trunk_dims: tuple[PositiveInt, ...] = (128, 32)
    """Widths of the dense trunk between the knowledge vector and the heads."""
    num_user_layers: PositiveInt = 1
    """User-level meta layers stacked."""
    scenario_dims: tuple[PositiveInt, ...] = (64,)
    """Hidden widths of the scenario-level stack; a last layer of width 1 gives the logit."""
    residual: bool = True
    """Residual around each user-level meta layer."""
    knowledge_dropout: Fraction = 0.1
    """Share of training rows that see no user knowledge, and of item knowledge, so that unseen ones are scored well."""


Backbone = Literal["shared_bottom", "star"]


class ModelConfig(Section):
    """The ranker."""

    backbone: Backbone = "star"
    """shared_bottom or star: the keys of llm4msr.models.backbones.BACKBONES."""
    embedding_dim: PositiveInt = 16
    """Width of every embedding."""
    hidden_dims: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the backbone's main network (shared bottom; star topology)."""
    tower_dims: tuple[PositiveInt, ...] = (32,)
    """Hidden widths of each scenario's tower (shared_bottom)."""
    dropout: Fraction = 0.1
    """Dropout after each hidden layer of the backbone."""
    unseen_dropout: Fraction = 0.0
    """Share of training rows whose user id is shown as unseen; item ids likewise. For data with many new ids."""
    scenario_norm: bool = True
    """star: normalise its input with statistics kept per scenario (partitioned normalisation)."""
    item_knowledge_dims: tuple[PositiveInt, ...] = (64, 16)
    """Widths of the dense layers that bring an item's knowledge vector to the backbone (knowledge.levels: item)."""
    meta: MetaConfig = MetaConfig()
    """The meta networks; not used where experiment.knowledge is none."""


class TrainConfig(Section):
    """Optimisation and the training group."""

    num_workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """DDP workers of Ray Train; 0 = in process. auto: one per GPU; without a GPU 0."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's learning rate for dense weights and embeddings. Sensitive: search it."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Decoupled weight decay of the dense weights."""
    embedding_l2: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared norm of the embeddings that a row looks up, added to its loss."""
    batch_size: PositiveInt = 2048
    """Rows per step over all workers."""
    max_epochs: PositiveInt = 20
    """Passes over train at most."""
    patience: PositiveInt = 3
    """Stop after this many epochs without a better mean scenario AUC on valid."""
    shuffle_buffer_rows: PositiveInt = 262_144
    """Rows shuffled together."""
    log_every_steps: PositiveInt = 20
    """Steps between two TensorBoard points."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if isinstance(self.num_workers, int) and self.num_workers > 1 and self.batch_size % self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by num_workers {self.num_workers}")
        return self


Knowledge = Literal["none", "llm", "shuffled"]


class ExperimentConfig(Section):
    """Which runs the pipeline trains and compares."""

    knowledge: tuple[Knowledge, ...] = ("none", "llm", "shuffled")
    """none: the backbone alone; llm: with LLM4MSR; shuffled: with knowledge of others (the control)."""
    seeds: tuple[Seed, ...] = (0,)
    """One run per seed and knowledge."""

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        for name, values in (("knowledge", self.knowledge), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)}: give at least one value, each once")
        return self
