"""The first task of prepare: parses one raw file and deals its rows out to their users' buckets.

A plain function that writes files and returns JSON types; it may run anywhere, in any order, and a rerun writes the
same files again. Memory is bounded by `_FLUSH_ROWS` parsed rows. Nothing here knows Ray.

Staging, removed at the end:

* events/bucket-B/S.parquet         parsed rows of shard S in bucket B
* users/, pairs/, rejects/          of each shard: distinct user ids, distinct (scenario, item) pairs, damaged rows
* moments/                          of each bucket: distinct timestamps and their rows (time quantiles only)
* fitted/                           of each bucket: merged, ordered, split rows with table rows for ids
* rows_of_user/, rows_of_item/      of each bucket: train rows of each table row
* values/<feature>/                 of each bucket: counts of a context feature's values in train
* likes/                            of each bucket: what its users liked, in order (with data.history only)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data import features, history, splits
from llm4msr.data.source import Adapter, DataError, RawFeature, Shard
from llm4msr.schema import Feature, events_schema

BYTES_PER_BUCKET = 128 * 2**20
# Above this size there are at least two buckets, so that two workers read different files.
BYTES_OF_ONE_BUCKET = 8 * 2**20
# Parsed rows held back until they are written, so that many buckets do not mean tiny row groups.
_FLUSH_ROWS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What every task needs.

    Attributes:
        adapter: Parses and merges.
        data: The data configuration.
        shards: The interaction files.
        num_buckets: Buckets that users are divided into.
        staging_uri: Directory of the intermediate files.
        uri: The prepared directory.
    """

    adapter: Adapter
    data: DataConfig
    shards: tuple[Shard, ...]
    num_buckets: int
    staging_uri: str
    uri: str

    def staged(self, kind: str, index: int | None = None) -> str:
        """Returns the place of one kind of intermediate files, or of one of them."""
        place = storage.join(self.staging_uri, kind)
        return place if index is None else storage.join(place, f"{index:05d}.parquet")

    @property
    def context(self) -> tuple[RawFeature, ...]:
        """The features of the single row."""
        return tuple(f for f in self.adapter.features if f.source == "context")

    @property
    def histories(self) -> tuple[Feature, ...]:
        """The history features; raises ConfigError where one cannot be used."""
        return history.history_features(
            self.data.history, self.adapter.features, [s.name for s in self.adapter.scenarios]
        )

    @property
    def logs(self) -> dict[str, int | None]:
        """The column of each log that they read, and the index of its scenario (None: of all)."""
        return history.log_columns(self.histories, [s.name for s in self.adapter.scenarios])

    @property
    def events(self) -> pa.Schema:
        """Schema of parsed rows without what the adapter keeps for `merge`."""
        return events_schema(
            self.adapter.user_key_type, self.adapter.item_key_type, tuple((f.name, f.kind) for f in self.context)
        )


def choose_num_buckets(configured: int | str, shards: Sequence[Shard]) -> int:
    """Returns data.num_buckets, or where that is auto a power of two that follows the size of the interaction files.

    As logs grow the number doubles, so each new bucket lies inside one old bucket.
    """
    if isinstance(configured, int):
        return configured
    num_bytes = sum(shard.num_bytes for shard in shards)
    num_buckets = max(-(-num_bytes // BYTES_PER_BUCKET), 2 if num_bytes > BYTES_OF_ONE_BUCKET else 1)
    return 1 << (num_buckets - 1).bit_length()


def parse_shard(index: int, plan: Plan) -> dict[str, Any]:
    """Parses one shard and appends its rows to their users' buckets.

    Returns:
        role; rows: good rows; rejected: rows by reason.

    Raises:
        DataError: The adapter yields rows that break its contract.
    """
    shard = plan.shards[index]
    num_rows = 0
    rejected: Counter[str] = Counter()
    users: list[pa.Array] = []
    pairs: list[pa.Table] = []
    rejects: list[pa.Table] = []

    def good_rows() -> Iterator[pa.Table]:
        nonlocal num_rows
        for block in plan.adapter.parse_events(shard):
            if block.rejects.num_rows:
                rejects.append(block.rejects)
                rejected.update(block.rejects["reason"].to_pylist())
            if block.table.num_rows:
                check_events(block.table, plan, shard.uri)
                num_rows += block.table.num_rows
                users.append(pc.unique(block.table["user_id"]))
                pairs.append(block.table.group_by(["scenario", "item_id"], use_threads=False).aggregate([]))
                yield block.table

    with ExitStack() as stack:
        writers: dict[int, pq.ParquetWriter] = {}
        for table in _gather(good_rows()):
            bucket_B = splits.bucket_of(table["user_id"].combine_chunks(), plan.num_buckets)
            table = table.take(pa.array(np.argsort(bucket_B, kind="stable")))
            ends = np.cumsum(np.bincount(bucket_B, minlength=plan.num_buckets))
            for bucket in np.unique(bucket_B).tolist():
                if bucket not in writers:
                    uri = plan.staged(f"events/bucket-{bucket:05d}", index)
                    file = stack.enter_context(storage.atomic_write(uri))
                    writers[bucket] = stack.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))
                begin = int(ends[bucket - 1]) if bucket else 0
                writers[bucket].write_table(table.slice(begin, int(ends[bucket]) - begin))
    if num_rows:
        distinct = pa.concat_tables(pairs).group_by(["scenario", "item_id"], use_threads=False).aggregate([])
        storage.write_parquet(plan.staged("pairs", index), distinct)
        ids = features.sorted_keys(users, plan.adapter.user_key_type)
        storage.write_parquet(plan.staged("users", index), pa.table({"user_id": ids}))
    if rejects:
        storage.write_parquet(plan.staged("rejects", index), pa.concat_tables(rejects))
    return {"role": shard.role, "rows": num_rows, "rejected": dict(rejected)}


def check_events(table: pa.Table, plan: Plan, where: str) -> None:
    """Checks that parsed rows keep the adapter's contract.

    Raises:
        DataError: A column is missing or has another type, a key is null, or a scenario or label is out of range.
    """
    for field in plan.events:
        found = table.schema.field(field.name).type if field.name in table.column_names else "no such column"
        if found != field.type:
            raise DataError(f"{where}: parsed rows need a column {field.name!r} of type {field.type}; found {found}")
    limits = {"scenario": len(plan.adapter.scenarios), "label": 2}
    for name in ("user_id", "item_id", "scenario", "label"):
        if table[name].null_count:
            raise DataError(f"{where}: {table[name].null_count} parsed rows have no {name}")
        if name in limits:
            low, high = pc.min_max(table[name]).as_py().values()
            if low < 0 or high >= limits[name]:
                raise DataError(f"{where}: parsed {name} {low}..{high} is outside 0..{limits[name] - 1}")


def _gather(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables until they have `_FLUSH_ROWS` rows together."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= _FLUSH_ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
