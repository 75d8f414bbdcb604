"""The one reader of a prepared data set: what lies where, and how to get it.

Layout of a prepared directory (written once by `llm4msr.data.pipeline.prepare`, its manifest last):

* schema.json                        `FeatureSchema.to_json`
* users.parquet, items.parquet       `schema.feature_table_schema`, sorted by key; record i is table row i + 1
* vocab/<feature>.parquet            column ``value``, record r has index r + 2; not for user_id and item_id, whose
                                     values are the keys of the tables and whose indices are columns there
* history/<log>.parquet              column ``item_rows``: what each user liked, oldest first; record i is table row
                                     i + 1. One for each log that a history reads: ``all``, or a scenario's index
* <split>/bucket-NNNNN.parquet       `schema.rows_schema`; one user's rows of a split lie in one file; a bucket
                                     without rows in a split has no file there
* rejects.parquet                    `schema.REJECTS`
* manifest.json                      kind, data (the report block), files, num_buckets, config, scenarios, created_at,
                                     versions

Streaming, shuffling and batching rows is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.schema import FIRST_INDEX, ITEM_ID, SPLITS, FeatureSchema, SchemaError

SCHEMA_FILE = "schema.json"
USERS_FILE = "users.parquet"
ITEMS_FILE = "items.parquet"
REJECTS_FILE = "rejects.parquet"
VOCAB_DIRECTORY = "vocab"
HISTORY_DIRECTORY = "history"
# Source ids are features of every data set; their vocabulary is the table itself.
ID_FEATURES = {"user": "user_id", "item": ITEM_ID}
ALL_SCENARIOS = "all"


def vocabulary_uri(uri: str, feature_name: str) -> str:
    """Returns the place of one feature's vocabulary in a prepared directory."""
    return storage.join(uri, VOCAB_DIRECTORY, f"{feature_name}.parquet")


def log_uri(uri: str, column: str) -> str:
    """Returns the place of the log that a column of the rows (`FeatureSchema.history_columns`) counts in."""
    return storage.join(uri, HISTORY_DIRECTORY, f"{column.removeprefix('history:')}.parquet")


def bucket_file(split: str, bucket: int) -> str:
    """Returns the name, below the prepared directory, of one bucket's rows of one split."""
    return f"{split}/bucket-{bucket:05d}.parquet"


@dataclass(frozen=True)
class PreparedData:
    """A finished prepared directory.

    Attributes:
        uri: The directory.
        schema: Features, scenarios and key types of the data.
        manifest: The manifest as written; ``manifest["data"]`` is the report block.
    """

    uri: str
    schema: FeatureSchema
    manifest: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> PreparedData:
        """Opens a prepared directory.

        Raises:
            StorageError: The directory is missing or unfinished, or is not a prepared data set.
            SchemaError: Its schema was written by another version.
        """
        manifest = storage.read_manifest(uri, "run jobs.prepare first")
        if manifest.get("kind") != "prepared":
            raise storage.StorageError(
                f"{uri}: manifest.json says kind {manifest.get('kind')!r}, a prepared data set has kind 'prepared'"
            )
        return cls(uri, FeatureSchema.from_json(storage.read_json(storage.join(uri, SCHEMA_FILE))), manifest)

    def files(self, split: str) -> list[tuple[str, int]]:
        """Returns (uri, num_rows) of each row file of a split, in order of bucket."""
        return [(storage.join(self.uri, f["file"]), f["num_rows"]) for f in self.manifest["files"][_known_split(split)]]

    def num_rows(self, split: str, scenario: str | None = None) -> int:
        """Returns the number of rows of a split, of one scenario where given by name."""
        if scenario is not None and scenario not in self.schema.scenario_names:
            raise SchemaError(f"no scenario {scenario!r}; the data has {list(self.schema.scenario_names)}")
        wanted = (_known_split(split), scenario or ALL_SCENARIOS)
        rows = self.manifest["data"]["rows"]
        return next(int(r["num_rows"]) for r in rows if (r["split"], r["scenario"]) == wanted)

    def users(self) -> pa.Table:
        """Returns the users' feature table; record i is table row i + 1."""
        return storage.read_parquet(storage.join(self.uri, USERS_FILE))

    def items(self) -> pa.Table:
        """Returns the items' feature table; record i is table row i + 1."""
        return storage.read_parquet(storage.join(self.uri, ITEMS_FILE))

    def vocabulary(self, feature_name: str) -> pa.Array:
        """Returns the values of a categorical or sequence feature; the value at position r has index r + 2.

        For user_id and item_id they are taken from the feature tables: the keys seen in train, in order of index.

        Raises:
            SchemaError: No such feature, or one that has no vocabulary: a numeric one, or a history.
        """
        feature = next((f for f in self.schema.features if f.name == feature_name), None)
        if feature is None or feature.kind not in ("categorical", "sequence"):
            valid = [f.name for f in self.schema.features if f.kind in ("categorical", "sequence")]
            raise SchemaError(f"feature {feature_name!r} has no vocabulary; those with one: {valid}")
        if ID_FEATURES.get(feature.source) != feature_name:
            return storage.read_parquet(vocabulary_uri(self.uri, feature_name))["value"].combine_chunks()
        table = self.users() if feature.source == "user" else self.items()
        known = table.filter(pc.greater_equal(table[feature_name], FIRST_INDEX)).sort_by(feature_name)
        return known["key"].combine_chunks()


def _known_split(split: str) -> str:
    if split not in SPLITS:
        raise SchemaError(f"no split {split!r}; a prepared data set has {list(SPLITS)}")
    return split
