"""What jobs.plan is asked: sizes, deadlines and prices. Not part of a job's configuration: nothing is run by it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm4msr.config.base import PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
# Counts may be written as 100e6; they stay floats, which hold whole numbers up to 2**53 exactly.
Count = Annotated[float, Field(ge=1, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

LanguageModel = Literal["minilm", "qwen-1.5b", "qwen-7b"]
Gpu = Literal["h200", "h100", "a100", "l4"]


class PlanArgs(Section):
    """Sizes of an application, and what its machines cost and may take."""

    users: Count
    """Users with training rows."""
    interactions: Count
    """Raw rows of the logs that are prepared."""
    items: Count
    """Items."""
    scenarios: Count = 2
    """Scenarios."""

    model: LanguageModel = "minilm"
    """The language model; minilm, the embedded encoder, runs on processors, the others on GPUs."""
    model_params: Positive | None = None
    """Another model: its weights without the table of words; needs knowledge_width. It runs on GPUs."""
    knowledge_width: PositiveInt | None = None
    """Length of that model's vectors."""
    users_asked: Share = 1
    """Share of the users who have a prompt; 0 for knowledge.user_vectors = items."""
    items_asked: Share = 0
    """Share of the items that have a prompt: 1 with the level item."""
    tokens_per_prompt: Positive | None = None
    """Tokens of a user's prompt; unset: the mean of real prompts."""
    rows_per_commit: PositiveInt = 512
    """knowledge.rows_per_commit."""
    num_gpus: PositiveInt | None = None
    """GPUs for the extraction; unset: as many as keep deadline_hours."""
    gpu: Gpu = "h100"
    """Kind of GPU."""

    deadline_hours: Positive = 24
    """Each of prepare, extraction, training and scoring may take so long."""
    users_changed_per_day: Share = 0.05
    """Share of the users whose prompts change in a day."""
    refresh_hours: Positive = 6
    """The daily refresh of knowledge may take so long."""

    train_share: PositiveShare = 0.8
    """Share of the interactions in train."""
    epochs: Positive = 5
    """Passes over train of one run."""
    runs: PositiveInt = 1
    """Runs that are trained: knowledge x seeds."""
    train_device: Literal["cpu", "gpu"] = "cpu"
    """What trains the ranker."""
    num_workers: PositiveInt | None = None
    """train.num_workers; unset: as many as keep deadline_hours."""
    embedding_dim: PositiveInt = 16
    """model.embedding_dim."""
    embedding_optimizer: Literal["adam", "rowwise_adagrad"] = "adam"
    """train.embedding_optimizer."""

    requests_per_s: Positive = 100
    """Requests at the busiest time of the day."""
    candidates: PositiveInt = 200
    """Items of one request."""
    utilisation: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of its time that a replica works at the busiest time."""
    table: Literal["local", "remote"] = "local"
    """Where replicas and workers read checkpoints and knowledge: a local disk, memory-mapped and so shared by the
    processes of a node, or s3://, a copy in the memory of each process."""

    score_candidates: NonNegative = 1000
    """jobs.score, once: items ranked for each user in each scenario."""
    top_k: PositiveInt = 100
    """score.top_k."""

    node_cores: PositiveInt = 32
    """Cores of a node without GPU."""
    node_memory_gb: Positive = 256
    """Memory of a node."""
    network_gbit_per_s: Positive = 25
    """Network of a node."""
    gpu_usd_per_h: NonNegative | None = None
    """Price of a GPU with its share of a node; unset: an assumption for each kind."""
    core_usd_per_h: NonNegative = 0.05
    """Price of a core with its share of a node's memory."""
    storage_usd_per_gb_month: NonNegative = 0.023
    """Price of object storage."""

    @model_validator(mode="after")
    def _check(self) -> PlanArgs:
        if (self.model_params is None) != (self.knowledge_width is None):
            raise ValueError("model_params and knowledge_width describe another model together: give both or neither")
        return self
