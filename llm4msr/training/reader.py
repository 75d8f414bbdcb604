"""Prepared rows to shuffled blocks of columns, for one worker of many.

An epoch's row groups are permuted (seeded), the rows within each too, and laid end to end: the line. The line is cut
into a fixed number of equal lanes. A lane is read in windows of rows that are shuffled together, and global step t is
made of the t-th slice of every lane, in order of lane. A worker reads some of the lanes. It follows that

* the rows of a global step and their order do not depend on the number of workers;
* a place in training is (epoch, step): reading goes on there without reading what lies before it;
* a worker holds its lanes' windows and one row group per lane, whatever the size of the data.

Rows are permuted within their row group because a window may be a part of one: cut from the file as it lies, the same
rows would come first in every epoch, and the same ones last. A model learns such an order by heart; on real data that
cost 0.015 AUC (docs/decisions/0008-lanes.md).

Lanes open their windows one after the other, not all in the same step, so that reading keeps an even pace. Fewer rows
than there are lanes sit out an epoch, as a rule others in the next one.

Validation reads whole files, each on one worker, so that one worker sees all rows of a user. Encoding rows into tensors
is not done here.

Axes: R rows of a window, N runs of rows of one user, T length of a sequence.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm4msr import storage
from llm4msr.batch import Rows

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group.

    Attributes:
        uri: The file.
        index: Of the row group in the file, from 0.
        num_rows: Its rows.
        metadata: The file's footer where it was read already, one object for all row groups of the file.
    """

    uri: str
    index: int
    num_rows: int
    metadata: pq.FileMetaData | None = field(default=None, compare=False, repr=False)


def list_row_groups(files: list[tuple[str, int]]) -> list[RowGroup]:
    """Lists the row groups of the given (uri, num_rows) files, in order.

    Raises:
        StorageError: A file is damaged, or holds another number of rows than its manifest says.
    """
    groups = []
    for uri, num_rows in files:
        metadata = storage.parquet_metadata(uri)
        if metadata.num_rows != num_rows:
            raise storage.StorageError(f"{uri}: {metadata.num_rows} rows, the manifest says {num_rows}")
        groups += _row_groups(uri, metadata)
    return groups


def _row_groups(uri: str, metadata: pq.FileMetaData) -> list[RowGroup]:
    return [RowGroup(uri, i, metadata.row_group(i).num_rows, metadata) for i in range(metadata.num_row_groups)]


def read_row_group(group: RowGroup, columns: Sequence[str] | None = None) -> Rows:
    """Reads one row group, or some columns of it, as numpy columns.

    Raises:
        StorageError: The file is missing or damaged, or lacks a column.
    """
    return to_columns(storage.read_row_group(group.uri, group.index, columns, group.metadata))


def read_split(files: list[tuple[str, int]]) -> Rows:
    """Reads all rows of the given (uri, num_rows) files, such as ``PreparedData.files("test")``, in order.

    Raises:
        StorageError: A file is missing or damaged, or holds another number of rows than its manifest says.
    """
    pieces = [read_row_group(group) for group in list_row_groups(files)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def to_columns(table: pa.Table) -> Rows:
    """Returns a table of `schema.rows_schema` as numpy columns, lists as (R, T); missing times become -1."""
    columns = {}
    for name in table.column_names:
        column = table[name].fill_null(-1) if name == "timestamp_ms" else table[name]
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)
        else:
            columns[name] = column.to_numpy()
    return columns


class TrainReader:
    """One worker's rows of every training step.

    Args:
        groups: All row groups of train, the same on every worker.
        batch_size: Rows of one step over all workers.
        num_lanes: Lanes that the data is cut into; with batch_size, seed, buffer_rows and rows_per_user it fixes the
            rows of every step.
        rank: This worker.
        world_size: Number of workers. Lanes are shared out among them, in equal numbers where they divide.
        seed: Seed of all orders.
        buffer_rows: Rows that all lanes together shuffle at a time: ``buffer_rows // num_lanes`` a lane, rounded down
            to whole slices, and at least one.
        rows_per_user: Within a window, a user's rows come in runs of at most so many; 1 is a full shuffle. More makes
            batches of fewer distinct users.
        columns: Columns to read; all where None. user_row must be among them where rows_per_user is above 1.

    Raises:
        ValueError: A number is below 1, the lanes do not divide batch_size or are fewer than the workers, or there are
            fewer rows than lanes.
    """

    def __init__(
        self,
        groups: list[RowGroup],
        *,
        batch_size: int,
        num_lanes: int,
        rank: int,
        world_size: int,
        seed: int,
        buffer_rows: int,
        rows_per_user: int = 1,
        columns: Sequence[str] | None = None,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert rows_per_user == 1 or columns is None or "user_row" in columns, columns
        num_rows = sum(group.num_rows for group in groups)
        for name, value in (("batch_size", batch_size), ("num_lanes", num_lanes), ("rows_per_user", rows_per_user)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if batch_size % num_lanes:
            raise ValueError(f"batch_size {batch_size} is not a multiple of num_lanes {num_lanes}")
        if world_size > num_lanes:
            raise ValueError(f"{world_size} workers share num_lanes {num_lanes}: at most one worker a lane")
        if num_rows < num_lanes:
            raise ValueError(f"{num_rows} rows of train for num_lanes {num_lanes}: at least one row a lane")
        self.groups, self.num_lanes, self.seed = groups, num_lanes, seed
        self.rows_per_user, self.columns = rows_per_user, columns
        self.lanes = np.array_split(np.arange(num_lanes), world_size)[rank].tolist()
        self.lane_rows, self.num_left_over = divmod(num_rows, num_lanes)
        self.slice_rows = batch_size // num_lanes
        self.window_steps = max(buffer_rows // batch_size, 1)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same on every worker; the last may be short."""
        return -(-self.lane_rows // self.slice_rows)

    def rows_in_step(self, step: int) -> int:
        """Returns the rows of a step over all workers."""
        return self.num_lanes * min(self.slice_rows, self.lane_rows - step * self.slice_rows)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Rows]:
        """Yields this worker's rows of every step of an epoch from `first_step` on.

        Raises:
            StorageError: A file is missing or damaged, or lacks a column.
        """
        rng = np.random.default_rng((self.seed, epoch))
        line = _shuffled_groups(self.groups, rng, self.seed, epoch)
        first_row = int(rng.integers(self.num_left_over + 1))  # what is left over sits out at both ends of the line
        lanes = [
            self._slices(epoch, lane, _Span(line, first_row + lane * self.lane_rows, self.columns), first_step)
            for lane in self.lanes
        ]
        for _ in range(first_step, self.steps_per_epoch):
            yield _joined([next(lane) for lane in lanes])

    def _slices(self, epoch: int, lane: int, span: _Span, first_step: int) -> Iterator[Rows]:
        """Yields a lane's slices from `first_step` on, window by window."""
        # Lane l opens its windows l / num_lanes of a window early; one that fits into a single window stays whole.
        early = lane * self.window_steps // self.num_lanes if self.steps_per_epoch > self.window_steps else 0
        step = first_step
        while step < self.steps_per_epoch:
            window, place = divmod(step + early, self.window_steps)
            first = max(step - place, 0)
            end = min(step - place + self.window_steps, self.steps_per_epoch)
            rng = np.random.default_rng((self.seed, epoch, lane, window))
            low, high = first * self.slice_rows, min(end * self.slice_rows, self.lane_rows)
            rows = _cut(_shuffled(span.read(low, high), rng, self.rows_per_user), self.slice_rows)
            yield from itertools.islice(rows, step - first, None)
            step = end


@dataclass(frozen=True)
class _ShuffledGroup:
    """A row group whose rows come in an order of the epoch's own."""

    group: RowGroup
    seed: np.random.SeedSequence

    def read(self, columns: Sequence[str] | None) -> Rows:
        return _shuffled(read_row_group(self.group, columns), np.random.default_rng(self.seed), 1)


def _shuffled_groups(groups: list[RowGroup], rng: np.random.Generator, seed: int, epoch: int) -> list[_ShuffledGroup]:
    order = rng.permutation(len(groups)).tolist()
    return [_ShuffledGroup(groups[i], np.random.SeedSequence((seed, epoch), spawn_key=(i,))) for i in order]


class _Span:
    """The rows of a line of row groups from one row on; keeps the row group that it read last."""

    def __init__(self, line: list[_ShuffledGroup], first_row: int, columns: Sequence[str] | None) -> None:
        self.line, self.columns = line, columns
        self.end_of_group = np.cumsum([shuffled.group.num_rows for shuffled in line]) - first_row
        self.held: tuple[int, Rows] | None = None

    def read(self, low: int, high: int) -> Rows:
        """Returns the rows from `low` to before `high`, in order."""
        columns: dict[str, np.ndarray] = {}
        index, num_copied = int(np.searchsorted(self.end_of_group, low, side="right")), 0
        while low + num_copied < high:
            if self.held is None or self.held[0] != index:
                self.held = None  # so that the old one does not lie in memory while the new one is read
                self.held = index, self.line[index].read(self.columns)
            start = low + num_copied - (self.end_of_group[index] - self.line[index].group.num_rows)
            for name, column in self.held[1].items():
                piece = column[start : start + high - low - num_copied]
                if name not in columns:
                    columns[name] = np.empty((high - low, *column.shape[1:]), column.dtype)
                columns[name][num_copied : num_copied + len(piece)] = piece
            index, num_copied = index + 1, num_copied + len(piece)
        return columns


def _joined(pieces: list[Rows]) -> Rows:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _shuffled(rows: Rows, rng: np.random.Generator, rows_per_user: int) -> Rows:
    """Shuffles runs of at most `rows_per_user` rows of one user."""
    num_rows = len(next(iter(rows.values())))
    order_R = rng.permutation(num_rows)
    if rows_per_user > 1:
        by_user_R = np.argsort(rows["user_row"].astype(np.int64) * num_rows + order_R)  # shuffled within the user
        user_R, place_R = rows["user_row"][by_user_R], np.arange(num_rows)
        is_first_R = np.r_[True, user_R[1:] != user_R[:-1]]
        place_in_user_R = place_R - np.maximum.accumulate(np.where(is_first_R, place_R, 0))
        start_N = np.flatnonzero(place_in_user_R % rows_per_user == 0)
        size_N = np.diff(np.r_[start_N, num_rows])
        run_N = rng.permutation(len(start_N))
        start_N, size_N = start_N[run_N], size_N[run_N]
        order_R = by_user_R[place_R + np.repeat(start_N - (np.cumsum(size_N) - size_N), size_N)]
    return {name: column[order_R] for name, column in rows.items()}


def _cut(rows: Rows, size: int) -> Iterator[Rows]:
    """Yields rows in order, `size` at a time; the last ones may be fewer."""
    for i in range(0, len(next(iter(rows.values()))), size):
        yield {name: column[i : i + size] for name, column in rows.items()}


def valid_share(files: list[tuple[str, int]], rank: int, world_size: int) -> list[tuple[str, int]]:
    """Returns the (uri, num_rows) files that a worker validates on, in order.

    Largest first, each file goes to the worker with the fewest rows so far. One user's rows of a split lie in one file,
    so what is computed within users is exact on one worker.
    """
    rows_of_worker, owner = [0] * world_size, {}
    for uri, num_rows in sorted(files, key=lambda file: (-file[1], file[0])):
        owner[uri] = rows_of_worker.index(min(rows_of_worker))
        rows_of_worker[owner[uri]] += num_rows
    return [(uri, num_rows) for uri, num_rows in files if owner[uri] == rank]


def read_batches(uri: str, batch_size: int, columns: Sequence[str] | None = None) -> Iterator[Rows]:
    """Yields a file's rows in order, at most `batch_size` at a time; no batch spans two row groups.

    Raises:
        StorageError: The file is missing or damaged, or lacks a column.
    """
    for group in _row_groups(uri, storage.parquet_metadata(uri)):
        yield from _cut(read_row_group(group, columns), batch_size)


def prefetch(items: Iterator[S], function: Callable[[S], T], depth: int = 4) -> Generator[T, None, None]:
    """Yields ``function(item)`` of each item, computed in a thread that stays at most `depth` ahead.

    An error in the thread is raised here; a consumer that stops early ends the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
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
