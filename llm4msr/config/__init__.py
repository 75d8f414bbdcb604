"""The whole configuration of a run: one frozen tree of sections, each field documented where it is declared.

``--help`` of any job prints these texts. How the tree is loaded from TOML, environment and flags is the business of
`llm4msr.settings`; what a field means for the method is said in ``docs/method.md``.
"""

from __future__ import annotations

from pydantic import model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm4msr.config.base import ConfigError, Section, digest
from llm4msr.config.compare import CompareConfig, CompareVariant
from llm4msr.config.data import (
    AmazonConfig,
    DataConfig,
    MovieLensConfig,
    SplitConfig,
    SyntheticConfig,
    TableConfig,
    TableFeature,
)
from llm4msr.config.knowledge import KnowledgeConfig, OpenAIConfig
from llm4msr.config.model import CONTROLS, ExperimentConfig, MetaConfig, ModelConfig, TrainConfig
from llm4msr.config.score import ScoreConfig
from llm4msr.config.tune import TuneConfig

__all__ = [
    "CONTROLS",
    "ENV_PREFIX",
    "AmazonConfig",
    "CompareConfig",
    "CompareVariant",
    "Config",
    "ConfigError",
    "DataConfig",
    "ExperimentConfig",
    "KnowledgeConfig",
    "MetaConfig",
    "ModelConfig",
    "MovieLensConfig",
    "OpenAIConfig",
    "ScoreConfig",
    "Section",
    "SplitConfig",
    "SyntheticConfig",
    "TableConfig",
    "TableFeature",
    "TrainConfig",
    "TuneConfig",
    "digest",
]

ENV_PREFIX = "LLM4MSR_"


class Config(BaseSettings):
    """Everything a job needs."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    workspace_uri: str = "workspace/demo"
    """Everything is written below this folder, local or s3://: prepared/ knowledge/ runs/ report.json."""
    data: DataConfig = DataConfig()
    """Where the logs are and how they become train, valid and test."""
    knowledge: KnowledgeConfig = KnowledgeConfig()
    """The frozen language model and its prompts."""
    model: ModelConfig = ModelConfig()
    """The ranker."""
    train: TrainConfig = TrainConfig()
    """Optimisation and the training group."""
    experiment: ExperimentConfig = ExperimentConfig()
    """Which runs the pipeline trains and compares."""
    tune: TuneConfig = TuneConfig()
    """What jobs.tune searches."""
    compare: CompareConfig = CompareConfig()
    """What jobs.compare compares."""
    score: ScoreConfig = ScoreConfig()
    """What jobs.score scores."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.knowledge.refresh_min_new_events and self.data.split.kind == "column":
            raise ValueError(
                "knowledge.refresh_min_new_events needs data.split.kind 'time' or 'per_user_last': with 'column' a row "
                "that an old prompt quotes may have become valid or test"
            )
        if self.model.embedding_sharding == "sharded":
            self._check_sharded()
        if self.train.embedding_weight_decay and self.train.embedding_optimizer != "dense_adam":
            raise ValueError(
                f"train.embedding_weight_decay = {self.train.embedding_weight_decay:g} needs train.embedding_optimizer "
                f"'dense_adam', found {self.train.embedding_optimizer!r}, which leaves rows that nobody looks up as "
                "they are; or use train.embedding_l2"
            )
        if self.model.knowledge_match and self.knowledge.user_vectors != "items":
            raise ValueError(
                "model.knowledge_match compares a user's vector with an item's: with knowledge.user_vectors = "
                f"{self.knowledge.user_vectors!r} a training row's user vector was made from its own item, and the "
                "ranker would learn to look for it there; set user_vectors to 'items', or switch knowledge_match off"
            )
        meta, levels = self.model.meta, self.knowledge.levels
        if set(self.experiment.knowledge) == {"none"}:
            return self
        if not (meta.user_level or meta.scenario_level or "item" in levels):
            raise ValueError(
                "model.meta.user_level and model.meta.scenario_level are both off: nothing would read the knowledge "
                f"of experiment.knowledge = {list(self.experiment.knowledge)}; switch one on, or use ['none']"
            )
        for level, wanted in (("user", meta.user_level), ("scenario", meta.scenario_level)):
            if wanted and level not in levels:
                raise ValueError(
                    f"model.meta.{level}_level is on, but knowledge.levels = {list(levels)} lacks {level!r}: "
                    "add it there, or switch the meta layers off"
                )
        return self

    def _check_sharded(self) -> None:
        """TorchRec's tables are updated inside the backward pass, by an optimizer of their own, on workers."""
        if self.data.history:
            raise ValueError(
                f"data.history names {[f.name for f in self.data.history]} and model.embedding_sharding = 'sharded': "
                "a sharded table gives sums, not the single items that a history is made of; use 'replicated', or no "
                "history"
            )
        train = self.train
        for key, found, fits, needed in (
            (
                "embedding_optimizer",
                train.embedding_optimizer,
                train.embedding_optimizer == "rowwise_adagrad",
                "'rowwise_adagrad'",
            ),
            ("accumulate_steps", train.accumulate_steps, train.accumulate_steps == 1, "1"),
            ("compile", train.compile, not train.compile, "false"),
            ("average_steps", train.average_steps, train.average_steps == 0, "0"),
            ("num_workers", train.num_workers, train.num_workers != 0, "workers of Ray Train"),
        ):
            if not fits:
                raise ValueError(f"model.embedding_sharding = 'sharded' needs train.{key} {needed}, found {found!r}")
