"""The sections about raw logs: where they are, what their columns mean, how they are split."""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from llm4msr.config.base import Auto, Fraction, PositiveInt, Section, Seed


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


class HistoryFeature(Section):
    """One feature made of what the user liked (label 1) before the row's time."""

    name: Annotated[str, Field(min_length=1)]
    """Of the feature; no other may have it."""
    scenario: Annotated[str, Field(min_length=1)] | None = None
    """The scenario whose likes it holds; unset: those of all scenarios, merged in time."""
    max_length: PositiveInt = 20
    """Items kept, the most recent ones."""
    pooling: Literal["mean", "attention"] = "mean"
    """mean: the mean of their item_id embeddings; attention: weighted by how each goes with the row's item (DIN)."""


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
    scenario_descriptions: dict[str, str] = Field(default={})
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


class KuaisarConfig(Section):
    """KuaiSAR raw files, and the synthetic copy of them."""

    bags: tuple[Literal["caption", "keyword"], ...] = ()
    """Bags of anonymised words to read as features: caption of the item; keyword of the query, in search rows."""


class MovieLensConfig(Section):
    """MovieLens raw files."""

    positive_rating: float = 4.0
    """Label = rating >= this."""
    age_bands: tuple[int, ...] = (25, 35)
    """Scenarios are age bands; these are the first ages of the second and later bands."""


class AmazonConfig(Section):
    """Amazon review files, one of each category; a category is a scenario."""

    categories: dict[str, str] = Field(default={})
    """Scenario to its review file below data.raw_uri: .json or .json.gz, or a folder of such files."""
    metadata: dict[str, str] = Field(default={})
    """Scenario to the metadata file of its products. Products without a record are known by their id alone."""
    scenario_descriptions: dict[str, str] = Field(default={})
    """A sentence about each scenario for the prompts. Scenarios not named here are described by their name."""
    positive_rating: float = 4.0
    """Label = rating >= this; ratings are 1 to 5."""
    max_title_words: PositiveInt = 16
    """Words of a product's title kept, the first ones."""
    max_categories: PositiveInt = 6
    """Categories of a product kept, the widest ones."""

    @model_validator(mode="after")
    def _check(self) -> AmazonConfig:
        for name in ("metadata", "scenario_descriptions"):
            if unknown := sorted(set(getattr(self, name)) - set(self.categories)):
                raise ValueError(f"{name} names {unknown[0]!r}, which categories does not: {sorted(self.categories)}")
        return self


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

    kind: Literal["kuaisar", "movielens", "amazon", "table", "synthetic"] = "synthetic"
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
    history: tuple[HistoryFeature, ...] = ()
    """Features of the user's past, each strictly before the row's time."""
    kuaisar: KuaisarConfig = KuaisarConfig()
    """Settings of kind = kuaisar, and of synthetic."""
    movielens: MovieLensConfig = MovieLensConfig()
    """Settings of kind = movielens."""
    amazon: AmazonConfig = AmazonConfig()
    """Settings of kind = amazon."""
    table: TableConfig = TableConfig(timestamp_column="timestamp")
    """Settings of kind = table."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Settings of kind = synthetic."""

    @field_validator("history")
    @classmethod
    def _names_differ(cls, history: tuple[HistoryFeature, ...]) -> tuple[HistoryFeature, ...]:
        names = [f.name for f in history]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} is given to more than one feature")
        return history

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
