"""Bring your own tables: interactions, and where there are any users and items, as CSV or Parquet with named columns.

Which column means what is said in the configuration (`TableConfig`); this module finds the files, checks that the
columns are there with types that can be read, and turns rows into events and entities. Scenarios are the distinct
names in the interactions, found in one pass over that column when they are first asked for.

What is left out: joins beyond users and items, time zones per row other than in the ISO text itself, and files in
other formats (JSON lines, Avro): convert them to Parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.config import DataConfig, TableFeature
from llm4msr.data import columns
from llm4msr.data.csv import LINE, NOT_A_NUMBER
from llm4msr.data.source import Block, DataError, RawFeature, RawKind, Shard
from llm4msr.data.table_layout import ROLE_OF, TableLayout
from llm4msr.data.tabular import DUPLICATE_KEY, NOT_A_TIME, BlockBuilder, first_seen, nearest, read_blocks
from llm4msr.schema import KeyType, Scenario, Source, key_arrow_type

MISSING_KEY = "missing key"
NOT_A_LABEL = "not a label"
UNKNOWN_SPLIT = "unknown split"
UNKNOWN_SCENARIO = "unknown scenario"

# Without a position column: position = (place of the file << this) + line.
_LINE_BITS = 40
_KIND: dict[str, RawKind] = {
    "categorical": "categorical",
    "numeric": "numeric",
    "text": "sequence",
    "sequence": "sequence",
}


class TableAdapter:
    """Reads the user's own tables below ``data.raw_uri``.

    Args:
        config: ``data`` section with kind = table.

    Raises:
        DataError: A feature's name cannot be used, or two features share one.
    """

    def __init__(self, config: DataConfig) -> None:
        self._table, self._split = config.table, config.split
        self._layout = TableLayout(config)
        self.features = tuple(
            RawFeature(f.name, f.source, _KIND[f.kind], f.max_length if _KIND[f.kind] == "sequence" else 0)
            for source in ("user", "item", "context")
            for f in self._table.features
            if f.source == source
        )

    def __getstate__(self) -> dict[str, Any]:
        """Looks into the files before the adapter travels, so that no worker has to."""
        _ = self.scenarios, self.user_key_type, self.item_key_type
        return self.__dict__

    @cached_property
    def scenarios(self) -> tuple[Scenario, ...]:
        """Distinct scenario names of the interactions, sorted, with their descriptions.

        Raises:
            DataError: There is none, or a description names one that is not there.
        """
        column = self._table.scenario_column
        names: set[str] = set()
        files = self._layout.files("events")
        for shard in files:
            self._layout.check_columns(shard)
            for block in read_blocks(shard.uri, [column]):
                names.update(pc.unique(columns.to_text(block.table[column])).to_pylist())
        ordered = sorted(names - {None})
        if not ordered:
            raise DataError(f"{[f.uri for f in files]}: no row has a value in the scenario column {column!r}")
        given = self._table.scenario_descriptions
        if unknown := sorted(set(given) - set(ordered)):
            raise DataError(
                f"data.table.scenario_descriptions names {unknown[0]!r}, which is no scenario of column {column!r};"
                f" valid: {ordered}.{nearest(unknown[0], ordered)}"
            )
        return tuple(Scenario(name, given.get(name, f"The scenario named {name}.")) for name in ordered)

    @cached_property
    def user_key_type(self) -> KeyType:
        """int64 where the user's id is an integer in every file, which only Parquet can say; else string."""
        return self._layout.key_type(self._table.user_column, ("events", "users"))

    @cached_property
    def item_key_type(self) -> KeyType:
        """The same for items."""
        return self._layout.key_type(self._table.item_column, ("events", "items"))

    def shards(self) -> list[Shard]:
        """Lists the files; see `Adapter.shards`."""
        found = [shard for role in ("events", "users", "items") for shard in self._layout.files(role)]
        for shard in found:
            self._layout.check_columns(shard)
        return found

    def is_events(self, shard: Shard) -> bool:
        """Tells whether a shard holds interactions."""
        return shard.role == "events"

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        """Parses one interactions file; rows without a position column are ordered by file and line."""
        self._layout.check_columns(shard)
        names = pa.array([s.name for s in self.scenarios])
        table = self._table
        first_position = [s.uri for s in self._layout.files("events")].index(shard.uri) << _LINE_BITS
        context = [f for f in table.features if f.source == "context"]
        for block in read_blocks(shard.uri, self._layout.columns("events")):
            raw, rows = block.table, BlockBuilder(block, shard.uri)
            for name, column, key_type in (
                ("user_id", table.user_column, self.user_key_type),
                ("item_id", table.item_column, self.item_key_type),
            ):
                keys = columns.to_key(raw[column], key_type)
                rows.require(keys, column, MISSING_KEY)
                rows.add(name, keys)
            scenario = pc.index_in(columns.to_text(raw[table.scenario_column]), names)
            rows.require(scenario, table.scenario_column)
            rows.add("scenario", scenario)
            rows.add("label", self._label(rows))
            times = pa.nulls(len(raw), pa.int64())
            if table.timestamp_column:
                times, bad = columns.to_time_ms(raw[table.timestamp_column], table.timestamp_unit, self._split.timezone)
                if bad is not None:
                    other, hint = columns.other_time_unit(raw[table.timestamp_column], table.timestamp_unit)
                    rows.reject(bad & other, NOT_A_TIME, table.timestamp_column, hint)
                rows.reject(bad, NOT_A_TIME, table.timestamp_column)
                rows.require(times, table.timestamp_column)
            rows.add("timestamp_ms", times)
            position = pc.add(raw[LINE].combine_chunks(), first_position)
            if table.position_column:
                position, bad = columns.to_integer(raw[table.position_column])
                rows.reject(bad, NOT_A_NUMBER, table.position_column)
                rows.require(position, table.position_column)
            rows.add("position", position)
            split = pa.nulls(len(raw), pa.int8())
            if self._split.column:
                split, bad = columns.to_split(raw[self._split.column])
                rows.reject(bad, UNKNOWN_SPLIT, self._split.column)
                rows.require(split, self._split.column)
            rows.add("split", split)
            for feature in context:
                self._add_feature(rows, feature)
            yield rows.build()

    def parse_entities(self, source: Source) -> Iterator[Block]:
        """Parses the users or items files; of rows with the same key the first one stays."""
        role, table = ROLE_OF[source], self._table
        column, key_type, text_columns, scenario_column = {
            "user": (table.user_column, self.user_key_type, table.user_text_columns, None),
            "item": (table.item_column, self.item_key_type, table.item_text_columns, table.item_scenario_column),
        }[source]
        seen_rows: set[Hashable] = set()
        seen_keys: set[Hashable] = set()
        for shard in self._layout.files(role):
            self._layout.check_columns(shard)
            for block in read_blocks(shard.uri, self._layout.columns(role)):
                raw, rows = block.table, BlockBuilder(block, shard.uri)
                keys = columns.to_key(raw[column], key_type)
                rows.require(keys, column, MISSING_KEY)
                rows.add("key", keys)
                texts = [columns.to_text(raw[name]) for name in text_columns]
                blank = pa.array([""] * len(raw), pa.string())
                rows.add("text", columns.join_text(texts, "; ") if texts else blank)
                for feature in table.features:
                    if feature.source == source:
                        self._add_feature(rows, feature)
                scenario = self._item_scenario(rows) if scenario_column else pa.nulls(len(raw), pa.int32())
                # An item may stand once for each scenario; its features and text are those of its first row.
                good = pa.array(rows.good)
                pairs = zip(keys.filter(good).to_pylist(), scenario.filter(good).to_pylist(), strict=True)
                listed = _scatter(rows.good, first_seen(pairs, seen_rows))
                rows.reject(~listed, DUPLICATE_KEY, column)
                good = pa.array(rows.good)
                rows.drop(~_scatter(rows.good, first_seen(keys.filter(good).to_pylist(), seen_keys)))
                yield rows.build()

    def merge(self, events: pa.Table) -> pa.Table:
        """Returns the rows as they are: each row of a table is an event of its own."""
        return events

    def negative_pools(self) -> dict[int, pa.Array] | None:
        """Returns which items may be drawn as negatives in each scenario.

        Returns:
            For every scenario index the distinct item ids that the items file lists for it, sorted; None where no
            ``item_scenario_column`` is set: then the items seen in the scenario are drawn from.
        """
        table = self._table
        if table.item_scenario_column is None:
            return None
        found: list[list[pa.Array]] = [[] for _ in self.scenarios]
        for shard in self._layout.files("items"):
            self._layout.check_columns(shard)
            for block in read_blocks(shard.uri, [table.item_column, table.item_scenario_column]):
                keys = columns.to_key(block.table[table.item_column], self.item_key_type)
                scenario = self._item_scenario(BlockBuilder(block, shard.uri))
                for index, parts in enumerate(found):
                    parts.append(pc.unique(keys.filter(pc.equal(scenario, index)).drop_null()))
        kind = key_arrow_type(self.item_key_type)
        distinct = [pc.unique(pa.chunked_array(parts, kind)) for parts in found]
        return {index: keys.take(pc.sort_indices(keys)) for index, keys in enumerate(distinct)}

    def _label(self, rows: BlockBuilder) -> pa.Array:
        table = self._table
        if table.label_column:
            label, bad = columns.to_label(rows.table[table.label_column])
            rows.reject(bad, NOT_A_LABEL, table.label_column)
            rows.require(label, table.label_column)
            return label
        if table.rating_column:
            rating, bad = columns.to_number(rows.table[table.rating_column])
            rows.reject(bad, NOT_A_NUMBER, table.rating_column)
            rows.require(rating, table.rating_column)
            return pc.greater_equal(rating, table.positive_rating).cast(pa.int8())
        return pa.array(np.ones(len(rows.table), np.int8))

    def _item_scenario(self, rows: BlockBuilder) -> pa.Array:
        column = self._table.item_scenario_column
        assert column is not None
        names = columns.to_text(rows.table[column])
        scenario = pc.index_in(names, pa.array([s.name for s in self.scenarios]))
        rows.require(names, column)
        rows.require(scenario, column, UNKNOWN_SCENARIO)
        return scenario

    def _add_feature(self, rows: BlockBuilder, feature: TableFeature) -> None:
        column = rows.table[feature.name]
        if feature.kind == "numeric":
            values, bad = columns.to_number(column)
            rows.reject(bad, NOT_A_NUMBER, feature.name)
            rows.add(feature.name, values)
        else:
            converters: dict[str, Callable[[pa.ChunkedArray], pa.Array]] = {
                "categorical": columns.to_text,
                "text": columns.to_words,
                "sequence": partial(columns.to_sequence, separator=feature.separator),
            }
            rows.add(feature.name, converters[feature.kind](column))


def _scatter(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns `values` at the places where `mask` is True and True elsewhere."""
    out = np.ones(len(mask), bool)
    out[mask] = values
    return out
