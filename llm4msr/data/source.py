"""What an adapter hands to `jobs.prepare`: shards to parse and two entity tables, whatever the raw layout was.

An adapter knows one raw layout. It owns file names, headers, types, labels and scenario names; it does not know
splits, vocabularies or encoding. Its parsing is a pure generator over one shard, so Ray can run shards anywhere and
memory stays bounded by one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa

from llm4msr.schema import KeyType, Scenario, Source


class DataError(ValueError):
    """Raw data that cannot be used; the message names the file, row or column, what was found and what is valid."""


@dataclass(frozen=True)
class Shard:
    """One raw file. `role` tells the adapter which of its parsers reads it."""

    uri: str
    role: str
    num_bytes: int


RawKind = Literal["categorical", "numeric", "sequence"]


@dataclass(frozen=True)
class RawFeature:
    """A feature before its vocabulary is fitted.

    Attributes:
        name: Column in events (context) or in the entity table (user, item).
        source: Whose property it is.
        kind: Column type expected: categorical = string, numeric = float64, sequence = list<string>; all nullable.
        max_length: sequence only: values kept, the first ones.
    """

    name: str
    source: Source
    kind: RawKind
    max_length: int = 0


@dataclass(frozen=True)
class Block:
    """A parsed piece of one raw file.

    Attributes:
        table: Good rows. Of events: as `schema.events_schema`, plus columns the adapter keeps for `merge`.
            Of users and items: key (id), text, one column per feature.
        rejects: Rows that could not be used, as `schema.REJECTS`.
    """

    table: pa.Table
    rejects: pa.Table


class Adapter(Protocol):
    """One raw layout. Built from the data configuration; picklable; opens files only when asked to parse."""

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """The scenarios, in the order of their indices."""

    @property
    def user_key_type(self) -> KeyType:
        """The type of a user's id."""

    @property
    def item_key_type(self) -> KeyType:
        """The type of an item's id."""

    @property
    def features(self) -> tuple[RawFeature, ...]:
        """Features beyond the ids, which are features of every data set."""

    def shards(self) -> list[Shard]:
        """Lists the raw files, interactions, users and items alike.

        Raises:
            DataError: A file or column that the layout needs is missing; names what was found.
        """

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        """Parses one interactions shard, block by block (role "events", or the adapter's own: see `is_events`)."""

    def is_events(self, shard: Shard) -> bool:
        """Tells whether a shard holds interactions."""

    def parse_entities(self, source: Source) -> Iterator[Block]:
        """Parses all user or item files; yields nothing where the data has none."""

    def merge(self, events: pa.Table) -> pa.Table:
        """Merges raw rows that are one event, given all rows of some users; drops the columns kept for it."""

    def negative_pools(self) -> dict[int, pa.Array] | None:
        """Returns the item ids that negatives may be drawn from, by scenario; None: the items seen in the scenario."""
