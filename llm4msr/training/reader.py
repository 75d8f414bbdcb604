"""Prepared rows to shuffled blocks of columns, for one worker of many.

The unit of reading is a Parquet row group. Each epoch orders all row groups anew (seeded), lays them end to end and
cuts the line into one equal share per worker, so that all workers take the same number of steps and each reads only
the groups its share touches. Within a worker, rows are shuffled in a buffer of many groups. Fewer rows than there are
workers (at most one per worker) sit out an epoch, others the next.

Validation reads each row exactly once over all workers, in unequal shares.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm4msr import storage
from llm4msr.batch import Rows

T = TypeVar("T")


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group."""

    uri: str
    index: int
    num_rows: int


def list_row_groups(files: list[tuple[str, int]]) -> list[RowGroup]:
    """Lists the row groups of the given (uri, num_rows) files, in order.

    Raises:
        StorageError: A file is damaged, or holds another number of rows than its manifest says.
    """
    groups = []
    for uri, num_rows in files:
        with _open(uri) as file:
            metadata = file.metadata
        if metadata.num_rows != num_rows:
            raise storage.StorageError(f"{uri}: {metadata.num_rows} rows, the manifest says {num_rows}")
        groups += [RowGroup(uri, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
    return groups


def read_row_group(group: RowGroup) -> Rows:
    """Reads one row group as numpy columns."""
    with _open(group.uri) as file:
        return to_columns(file.read_row_group(group.index))


def to_columns(table: pa.Table) -> Rows:
    """Returns a table of `schema.rows_schema` as numpy columns; missing times become -1."""
    columns = {}
    for name in table.column_names:
        column = table[name].fill_null(-1) if name == "timestamp_ms" else table[name]
        columns[name] = column.to_numpy()
    return columns


def _open(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise storage.StorageError(f"{uri}: not a readable Parquet file: {error}") from error


class TrainReader:
    """Shuffled batches of one worker's share.

    Args:
        groups: All row groups of train, the same on every worker.
        batch_size: Rows per batch on this worker.
        rank: This worker.
        world_size: Number of workers.
        seed: Seed of all orders.
        buffer_rows: Rows shuffled together.
    """

    def __init__(
        self, groups: list[RowGroup], batch_size: int, rank: int, world_size: int, seed: int, buffer_rows: int
    ) -> None:
        self.groups, self.batch_size, self.rank, self.world_size = groups, batch_size, rank, world_size
        self.seed, self.buffer_rows = seed, max(buffer_rows, batch_size)
        self.rows_per_worker = sum(g.num_rows for g in groups) // world_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the same on every worker; the last may be short."""
        return -(-self.rows_per_worker // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """Yields this worker's batches of one epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
        shuffle = np.random.default_rng((self.seed, epoch, self.rank))
        kept: list[Rows] = []
        num_kept = 0
        for piece in self._share([self.groups[i] for i in order]):
            kept.append(piece)
            num_kept += len(piece["row_id"])
            if num_kept >= self.buffer_rows:
                *batches, rest = self._cut(kept, shuffle)
                yield from batches
                kept, num_kept = [rest], len(rest["row_id"])
        if num_kept:
            yield from self._cut(kept, shuffle)

    def _share(self, groups: list[RowGroup]) -> Iterator[Rows]:
        first, last = self.rank * self.rows_per_worker, (self.rank + 1) * self.rows_per_worker
        start = 0
        for group in groups:
            low, high = max(first - start, 0), min(last - start, group.num_rows)
            if low < high:
                columns = read_row_group(group)
                yield {name: column[low:high] for name, column in columns.items()}
            start += group.num_rows

    def _cut(self, pieces: list[Rows], shuffle: np.random.Generator) -> list[Rows]:
        """Shuffles the pieces together and cuts them into batches; the last one may be short."""
        columns = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        order = shuffle.permutation(len(columns["row_id"]))
        columns = {name: column[order] for name, column in columns.items()}
        return [
            {name: column[i : i + self.batch_size] for name, column in columns.items()}
            for i in range(0, len(order), self.batch_size)
        ]


def read_share(groups: list[RowGroup], batch_size: int, rank: int, world_size: int) -> Iterator[Rows]:
    """Yields each row of every world_size-th row group once, in order."""
    for group in groups[rank::world_size]:
        columns = read_row_group(group)
        for i in range(0, group.num_rows, batch_size):
            yield {name: column[i : i + batch_size] for name, column in columns.items()}


def prefetch(items: Iterator[T], function: Callable[[T], T], depth: int = 4) -> Iterator[T]:
    """Yields ``function(item)`` of each item, computed in a thread that stays at most `depth` ahead.

    An error in the thread is raised here; a consumer that stops early ends the thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((function(item), None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
