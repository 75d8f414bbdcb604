"""The sections about the ranker: its networks, its training, and which runs are compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm4msr.config.base import Auto, Fraction, PositiveInt, Range, Section, Seed, SingleOrRange
from llm4msr.config.zoo import AdaptiveConfig, ExpertsConfig


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


Backbone = Literal[
    "shared_bottom",
    "star",
    "mlp",
    "deepfm",
    "dcnv2",
    "mmoe",
    "omoe",
    "ple",
    "hinet",
    "m3oe",
    "aitm",
    "sar_net",
    "m2m",
    "adasparse",
    "adaptdhm",
    "epnet",
    "ppnet",
    "pepnet",
    "hamur",
]


GATES_HIDDEN_LAYERS = ("ppnet", "pepnet", "hamur")


class ModelConfig(Section):
    """The ranker."""

    backbone: Backbone = "star"
    """Which model LLM4MSR stands around; docs/backbones.md says what each is, and names the controls."""
    embedding_dim: PositiveInt = 16
    """Width of every embedding."""
    embedding_sharding: Literal["replicated", "sharded"] = "replicated"
    """replicated: each worker holds all tables; sharded: their rows are spread over the workers by TorchRec (the extra
    ``sharded``; needs workers, and train.embedding_optimizer rowwise_adagrad). The checkpoint is the same."""
    hidden_dims: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the backbone's main network; of each expert, where it is made of experts."""
    tower_dims: tuple[PositiveInt, ...] = (32,)
    """Hidden widths of each scenario's tower, where the backbone has towers."""
    dropout: Fraction = 0.1
    """Dropout after each hidden layer of the backbone."""
    unseen_dropout: Fraction = 0.0
    """Share of training rows whose user id is shown as unseen; item ids likewise. For data with many new ids."""
    scenario_norm: bool = True
    """star: normalise its input with statistics kept per scenario (partitioned normalisation)."""
    item_knowledge_dims: tuple[PositiveInt, ...] = (64, 16)
    """Widths of the dense layers that bring an item's knowledge vector to the backbone (knowledge.levels: item)."""
    experts: ExpertsConfig = ExpertsConfig()
    """Of the backbones made of experts."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    """Of the backbones that adapt themselves to the scenario."""
    knowledge_match: bool = False
    """How near the user's knowledge is to the item's, as one more input; for knowledge.user_vectors = items."""
    meta: MetaConfig = MetaConfig()
    """The meta networks; not used where experiment.knowledge is none."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.backbone in GATES_HIDDEN_LAYERS and not self.hidden_dims:
            raise ValueError(f"hidden_dims is empty: {self.backbone} changes hidden layers; give at least one width")
        return self


class TrainConfig(Section):
    """Optimisation and the training group."""

    num_workers: Annotated[Annotated[int, Field(ge=0)] | Range | Auto, SingleOrRange] = "auto"
    """DDP workers of Ray Train; 0 = in process; [fewest, most]: as many as there is room for, changing while it runs.
    auto: one per GPU; without a GPU 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Also of the runs of jobs.tune and jobs.compare. auto: GPUs where the cluster has any now; cuda: also those that
    its autoscaler has yet to start (with num_workers of at least 1); cpu: none."""
    cpus_per_worker: PositiveInt | Auto = "auto"
    """Processors of a worker: one reads and collates, the others are threads of torch; 1 does both. auto: as many as
    let all workers fit on the nodes that are there (at most 8 beside a GPU)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's learning rate for dense weights. Sensitive: search it (jobs.tune)."""
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the embedding tables; none: learning_rate."""
    embedding_optimizer: Literal["adam", "dense_adam", "rowwise_adagrad"] = "adam"
    """adam: lazy Adam, two moments per weight, touches only the rows of the batch; rowwise_adagrad: the same with one
    number per row, 32 times less memory at width 16; its learning rate is some ten times higher. dense_adam: whole
    tables in each step, for small tables, with embedding_weight_decay."""
    embedding_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of dense_adam: times a weight, added to its gradient in each step, so that rows seldom looked up shrink."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Decoupled weight decay of the dense weights."""
    knowledge_rate: Annotated[float, Field(gt=0)] = 1.0
    """Times learning_rate: that of meta networks and item knowledge, whose inputs tell every user from every other."""
    knowledge_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the same: times a weight, added to its gradient in each step. 0 with a knowledge_rate of 1: weight_decay."""
    average_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which weights are averaged (exponentially); the averages are validated, saved and served. 0: off.
    Tables are averaged with embedding_optimizer dense_adam alone."""
    embedding_l2: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared norm of the embeddings that a row looks up, added to its loss."""
    batch_size: PositiveInt = 2048
    """Rows per step over all workers: a multiple of num_lanes x accumulate_steps."""
    accumulate_steps: PositiveInt = 1
    """Parts of a step that go through the model one after another: memory of a part, gradient of the whole."""
    num_lanes: PositiveInt = 8
    """Streams of rows that a batch is drawn from and that workers share out; at least the number of workers, best a
    multiple. The order of rows follows from it, not from the number of workers."""
    shuffle_buffer_rows: PositiveInt = 262_144
    """Rows shuffled together, over all workers."""
    rows_per_user: PositiveInt = 1
    """Up to so many rows of one user stay together when rows are shuffled: batches of fewer distinct users, for which
    user-level meta layers cost less. 1: a full shuffle."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; weights, loss and optimizer stay float32."""
    tf32: bool = True
    """On a GPU, float32 matrix products may round their inputs to TF32."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, faster after; not with sharded embeddings."""
    max_epochs: PositiveInt = 20
    """Passes over train at most."""
    patience: PositiveInt = 3
    """Stop after this many epochs without a better mean scenario AUC on valid."""
    max_loss: Annotated[float, Field(gt=0)] = 20.0
    """A step whose mean loss (nats per row) is above this, or not finite, stops the run: it has diverged."""
    log_every_steps: PositiveInt = 20
    """Steps between two TensorBoard points, and between two looks at loss and signals."""
    checkpoint_every_steps: PositiveInt = 1000
    """Steps between two checkpoints of the running training; the end of an epoch writes one too."""
    num_to_keep: PositiveInt = 2
    """Checkpoints of the running training kept; older ones are removed."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a group whose worker died is started again, from the last checkpoint."""

    @property
    def treats_knowledge_apart(self) -> bool:
        """Whether what reads knowledge has an optimizer of its own."""
        return self.knowledge_rate != 1 or self.knowledge_weight_decay > 0

    @property
    def most_workers(self) -> int:
        """The largest number of workers that the setting names; 1 for 0 and auto."""
        if isinstance(self.num_workers, tuple):
            return self.num_workers[1]
        return max(self.num_workers, 1) if isinstance(self.num_workers, int) else 1

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers = {list(self.num_workers)}: the first is the fewest, the second the most")
        if self.most_workers > self.num_lanes:
            raise ValueError(
                f"num_lanes {self.num_lanes} is less than the {self.most_workers} workers of num_workers: "
                f"each worker reads at least one lane; set num_lanes to {self.most_workers}"
            )
        if isinstance(self.num_workers, int) and self.num_workers > 1 and self.num_lanes % self.num_workers:
            fits = -(-self.num_lanes // self.num_workers) * self.num_workers
            raise ValueError(
                f"num_lanes {self.num_lanes} is not divisible by num_workers {self.num_workers}: workers would take "
                f"unequal parts of each step; set num_lanes to {fits}"
            )
        parts = self.num_lanes * self.accumulate_steps
        if self.batch_size % parts:
            fits = max(round(self.batch_size / parts), 1) * parts
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_lanes x accumulate_steps = {self.num_lanes} x "
                f"{self.accumulate_steps} = {parts}; the nearest that is: {fits}"
            )
        return self


Knowledge = Literal["none", "llm", "shuffled", "random"]
# Trained to be compared with, never served.
CONTROLS: tuple[Knowledge, ...] = ("shuffled", "random")


class ExperimentConfig(Section):
    """Which runs the pipeline trains and compares."""

    knowledge: tuple[Knowledge, ...] = ("none", "llm", "shuffled")
    """none: the backbone alone; llm: with LLM4MSR; and two controls, shuffled: with knowledge of others, random: with
    noise of the same mean and deviation."""
    seeds: tuple[Seed, ...] = (0,)
    """One run per seed and knowledge."""

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        for name, values in (("knowledge", self.knowledge), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)}: give at least one value, each once")
        return self
