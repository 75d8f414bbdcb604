"""Types that every layer shares: features, scenarios, and the Arrow schema of each stored table.

Index 0 of every categorical or sequence feature is padding, 1 is "unseen or rare", values start at 2. A context
feature that a row does not have is padding too; a user or item without a value is "unseen".
Row 0 of every feature table is "unknown user" or "unknown item", known ones start at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

PADDING_INDEX = 0
UNSEEN_INDEX = 1
FIRST_INDEX = 2

SPLITS = ("train", "valid", "test")
# The name that reports give to all scenarios together.
ALL_SCENARIOS = "all"

Kind = Literal["categorical", "numeric", "sequence", "history"]
Source = Literal["user", "item", "context"]
KeyType = Literal["int64", "string"]
Pooling = Literal["mean", "attention"]
# The feature whose embeddings a history is made of.
ITEM_ID = "item_id"


class SchemaError(ValueError):
    """A schema that does not fit the data or the code."""


@dataclass(frozen=True)
class Scenario:
    """One scenario: `name` as in requests and reports; `description` is quoted in prompts."""

    name: str
    description: str


@dataclass(frozen=True)
class Feature:
    """One input of the model.

    Attributes:
        name: Column name in the prepared tables.
        kind: categorical (one index), numeric (one standardised float), sequence (indices, mean-pooled), history (the
            items that the user liked before the row's moment, by the embeddings of item_id).
        source: Whose property it is. context features belong to the single row. A history is the user's.
        num_embeddings: Rows of the embedding table, padding and unseen included; 0 for numeric and history.
        max_length: Indices per row of a sequence or history; 0 otherwise.
        mean: Mean over train rows of a numeric feature, in its own unit.
        std: Standard deviation over train rows of a numeric feature, in its own unit; never 0.
        log: history: the scenario whose likes it holds, or `ALL_SCENARIOS`; empty otherwise.
        pooling: history: how its items become one vector.
    """

    name: str
    kind: Kind
    source: Source
    num_embeddings: int = 0
    max_length: int = 0
    mean: float = 0.0
    std: float = 1.0
    log: str = ""
    pooling: Pooling = "mean"


@dataclass(frozen=True)
class FeatureSchema:
    """All that a model must know of the data.

    Attributes:
        scenarios: In the order of their index.
        features: user features, then item, then context; the order of columns in every batch.
        user_key_type: Arrow type of raw user ids.
        item_key_type: Arrow type of raw item ids.
    """

    scenarios: tuple[Scenario, ...]
    features: tuple[Feature, ...]
    user_key_type: KeyType
    item_key_type: KeyType

    def __post_init__(self) -> None:
        """Checks what the constructor was given."""
        names = [f.name for f in self.features]
        if len(set(names)) != len(names):
            raise SchemaError(f"feature names must differ: {sorted(n for n in set(names) if names.count(n) > 1)} twice")
        order = [("user", "item", "context").index(f.source) for f in self.features]
        if order != sorted(order):
            raise SchemaError(
                f"features must be ordered user, item, context; found {[f.source for f in self.features]}"
            )
        if not self.scenarios or len(set(self.scenario_names)) != len(self.scenarios):
            raise SchemaError(f"scenario names must differ and be at least one: {list(self.scenario_names)}")
        if ALL_SCENARIOS in self.scenario_names:
            raise SchemaError(f"no scenario can be named {ALL_SCENARIOS!r}: reports use it for all rows together")
        logs = (ALL_SCENARIOS, *self.scenario_names)
        for feature in self.select("history"):
            if feature.log not in logs or feature.source != "user" or feature.max_length < 1 or ITEM_ID not in names:
                raise SchemaError(
                    f"history {feature.name!r} must be of source user with max_length of at least 1, beside a feature "
                    f"{ITEM_ID!r}, and its log one of {list(logs)}; found {feature}"
                )
        if taken := sorted(set(names) & set(self.history_columns.values())):
            raise SchemaError(f"a feature cannot be named {taken[0]!r}: prepared rows have such a column for a history")

    @property
    def scenario_names(self) -> tuple[str, ...]:
        """Names in the order of their index."""
        return tuple(s.name for s in self.scenarios)

    def select(self, kind: Kind, source: Source | None = None) -> tuple[Feature, ...]:
        """Returns the features of one kind, and of one source where given, in order."""
        return tuple(f for f in self.features if f.kind == kind and source in (None, f.source))

    @property
    def history_columns(self) -> dict[str, str]:
        """The column of prepared rows for each log that a history reads: {log: column}, each log once."""
        return {f.log: history_column(f.log, self.scenario_names) for f in self.select("history")}

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> FeatureSchema:
        """Rebuilds a schema written by `to_json`.

        Raises:
            SchemaError: A field is missing or unknown.
        """
        try:
            return cls(
                scenarios=tuple(Scenario(**s) for s in tree["scenarios"]),
                features=tuple(Feature(**f) for f in tree["features"]),
                user_key_type=tree["user_key_type"],
                item_key_type=tree["item_key_type"],
            )
        except (KeyError, TypeError) as error:
            raise SchemaError(f"not a feature schema of this version: {error}") from error


def key_arrow_type(key_type: KeyType) -> pa.DataType:
    """Returns the Arrow type of a raw id column."""
    return {"int64": pa.int64(), "string": pa.string()}[key_type]


def history_column(log: str, scenario_names: Sequence[str]) -> str:
    """Returns the column of prepared rows that says how many events of the user's log lie before the row's moment."""
    return f"history:{log if log == ALL_SCENARIOS else list(scenario_names).index(log)}"


# A raw row that could not be used. `line` counts physical lines from 1 (the header is line 1); rows of Parquet
# files count from 1. `raw` is the start of the row's text.
REJECTS = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("raw", pa.string()),
    ]
)


def events_schema(user_key: KeyType, item_key: KeyType, context: tuple[tuple[str, Kind], ...] = ()) -> pa.Schema:
    """Returns the schema of parsed raw rows: what every adapter yields.

    Columns: user_id, item_id; scenario (index); label (0 or 1); timestamp_ms (Unix time; null where only an order
    exists); position (orders the rows of one user where times tie or are absent); split (index into `SPLITS`, null
    unless the data names it); then one column per context feature: string for categorical, float64 for numeric,
    list of string for sequence, all nullable.
    """
    types = {"categorical": pa.string(), "numeric": pa.float64(), "sequence": pa.list_(pa.string())}
    return pa.schema(
        [
            ("user_id", key_arrow_type(user_key)),
            ("item_id", key_arrow_type(item_key)),
            ("scenario", pa.int32()),
            ("label", pa.int8()),
            ("timestamp_ms", pa.int64()),
            ("position", pa.int64()),
            ("split", pa.int8()),
        ]
        + [(name, types[kind]) for name, kind in context]
    )


def rows_schema(schema: FeatureSchema) -> pa.Schema:
    """Returns the schema of prepared rows: ``train/ valid/ test/``.

    Columns: row_id (unique over all splits); user_row, item_row (rows of the feature tables); scenario (index);
    label (0 or 1); timestamp_ms (null where only an order exists); position (order within the user's rows of all
    splits, 0 first); moment (number of the row's time, or of its given position where it has none, among the user's,
    0 first, so that rows of one impression share it); then `FeatureSchema.history_columns` (likes of the user in that
    log strictly before the row's moment); then one column per context feature, encoded: int32 index, float32, or
    fixed-size list of int32 padded with 0. Drawn negatives carry position, moment and likes of their positive.
    """
    return pa.schema(
        [
            ("row_id", pa.int64()),
            ("user_row", pa.int32()),
            ("item_row", pa.int32()),
            ("scenario", pa.int32()),
            ("label", pa.int8()),
            ("timestamp_ms", pa.int64()),
            ("position", pa.int64()),
            ("moment", pa.int32()),
        ]
        + [(column, pa.int32()) for column in schema.history_columns.values()]
        + [(f.name, _encoded_type(f)) for f in schema.features if f.source == "context"]
    )


def feature_table_schema(schema: FeatureSchema, source: Source) -> pa.Schema:
    """Returns the schema of ``users.parquet`` or ``items.parquet``, sorted by key; record i is table row i + 1.

    Columns: key (raw id); text (quoted in prompts, may be empty); num_train_rows; then one column per feature of
    this source but histories, encoded as the context of `rows_schema`.
    """
    key = schema.user_key_type if source == "user" else schema.item_key_type
    return pa.schema(
        [("key", key_arrow_type(key)), ("text", pa.string()), ("num_train_rows", pa.int64())]
        + [(f.name, _encoded_type(f)) for f in schema.features if f.source == source and f.kind != "history"]
    )


def _encoded_type(feature: Feature) -> pa.DataType:
    if feature.kind == "sequence":
        return pa.list_(pa.int32(), feature.max_length)
    return pa.float32() if feature.kind == "numeric" else pa.int32()
