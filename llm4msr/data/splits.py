"""Where a row goes: its bucket, its place among its user's rows, its split.

Pure numpy and Arrow. A bucket holds whole users, so everything that is per user is local to one bucket. Splits follow
time, never row counts of the whole: rows of one impression share a timestamp and are never torn apart.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.config import ConfigError, SplitConfig
from llm4msr.data.source import DataError
from llm4msr.schema import SPLITS

TRAIN, VALID, TEST = range(len(SPLITS))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Thresholds:
    """First moments of valid, of test, and after test, in ms of Unix time; None where there is none."""

    valid_from_ms: int | None = None
    test_from_ms: int | None = None
    test_until_ms: int | None = None

    def to_json(self) -> dict[str, int | str | None]:
        """Returns the moments, and the same as ISO text in UTC."""
        moments = {k: v for k, v in asdict(self).items() if v is not None}
        text = {k.removesuffix("_ms"): (_EPOCH + timedelta(milliseconds=v)).isoformat() for k, v in moments.items()}
        return asdict(self) | text


def bucket_of(user_ids: pa.Array, num_buckets: int) -> np.ndarray:
    """Returns the bucket of each user id: a hash of the id alone, so that it never changes with the input's order.

    int64 ids go through the finaliser of splitmix64 (consecutive ids and ids with a common factor spread evenly),
    strings through CRC-32, once per distinct value.

    Args:
        user_ids: (B,) int64 or string, no nulls.
        num_buckets: At least 1.

    Returns:
        (B,) int64 in [0, num_buckets).
    """
    if pa.types.is_integer(user_ids.type):
        x_B = user_ids.to_numpy(zero_copy_only=False).astype(np.uint64)
        x_B = (x_B ^ (x_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_B = (x_B ^ (x_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_B ^= x_B >> np.uint64(31)
        bucket_B: np.ndarray = (x_B % np.uint64(num_buckets)).astype(np.int64)
        return bucket_B
    encoded = user_ids.dictionary_encode()
    hashes = np.array([zlib.crc32(value.encode()) for value in encoded.dictionary.to_pylist()], np.int64)
    return (hashes % num_buckets)[encoded.indices.to_numpy()] if len(encoded) else np.zeros(0, np.int64)


def moments_ms(timestamps: pa.Array) -> np.ndarray:
    """Returns (B,) int64 timestamps in ms; rows without one get the smallest int64, so that they sort first."""
    moment_B: np.ndarray = pc.fill_null(timestamps, NO_TIME).to_numpy(zero_copy_only=False)
    return moment_B


def order_rows(user_row_B: np.ndarray, timestamp_ms_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
    """Returns the permutation that sorts rows by user, time, position, and the order in which they came."""
    return np.lexsort((position_B, timestamp_ms_B, user_row_B))


def rank_in_user(user_row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks rows that are sorted by user.

    Returns:
        (B,) int64 place among the user's rows, 0 first; (B,) int64 number of that user's rows.
    """
    starts = np.flatnonzero(np.r_[True, user_row_B[1:] != user_row_B[:-1]]) if len(user_row_B) else np.zeros(0, int)
    counts = np.diff(np.r_[starts, len(user_row_B)])
    return np.arange(len(user_row_B)) - np.repeat(starts, counts), np.repeat(counts, counts)


def configured_thresholds(split: SplitConfig) -> Thresholds:
    """Returns the thresholds that the configuration names; all None where it names none.

    Raises:
        ConfigError: A threshold is not ISO 8601, or they are not in order.
    """
    names = ("valid_from", "test_from", "test_until")
    found = {name: _parse_moment(name, getattr(split, name), split.timezone) for name in names}
    given = [(name, moment) for name, moment in found.items() if moment is not None]
    for (name, earlier), (later_name, later) in itertools.pairwise(given):
        if earlier >= later:
            raise ConfigError(
                f"data.split.{name} = {getattr(split, name)!r} must be before "
                f"data.split.{later_name} = {getattr(split, later_name)!r}"
            )
    return Thresholds(**{f"{name}_ms": moment for name, moment in found.items()})


def quantile_thresholds(
    timestamp_ms_N: np.ndarray, num_rows_N: np.ndarray, split: SplitConfig, test_until_ms: int | None = None
) -> Thresholds:
    """Returns the moments at the quantiles of time that the split's fractions ask for.

    With R rows before `test_until_ms`, sorted by time, valid begins at the moment of row
    floor(R (1 - valid_fraction - test_fraction)) and test at that of row floor(R (1 - test_fraction)), rows counted
    from 0. All rows of one moment are on the same side, so the shares are approximate.

    Args:
        timestamp_ms_N: (N,) moments in any order; one may occur several times.
        num_rows_N: (N,) rows at each.
        split: The fractions.
        test_until_ms: Rows from then on do not count.

    Raises:
        DataError: There is no row.
    """
    if test_until_ms is not None:
        keep = timestamp_ms_N < test_until_ms
        timestamp_ms_N, num_rows_N = timestamp_ms_N[keep], num_rows_N[keep]
    order = np.argsort(timestamp_ms_N, kind="stable")
    timestamp_ms_N, ends_N = timestamp_ms_N[order], np.cumsum(num_rows_N[order])
    if not len(ends_N) or not ends_N[-1]:
        raise DataError("there is no interaction to take time quantiles of; check data.split.test_until and the files")

    def moment(fraction: float) -> int:
        # The small term undoes the rounding of 1 - 0.2 - 0.1 and the like.
        row = min(int(ends_N[-1] * fraction + 1e-6), int(ends_N[-1]) - 1)
        return int(timestamp_ms_N[np.searchsorted(ends_N, row, side="right")])

    return Thresholds(
        moment(1 - split.valid_fraction - split.test_fraction), moment(1 - split.test_fraction), test_until_ms
    )


def split_by_time(timestamp_ms_B: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Returns (B,) int8: train before valid_from, valid before test_from, test from then on."""
    assert thresholds.valid_from_ms is not None and thresholds.test_from_ms is not None
    edges = np.array([thresholds.valid_from_ms, thresholds.test_from_ms])
    return np.searchsorted(edges, timestamp_ms_B, side="right").astype(np.int8)


def split_per_user(
    rank_B: np.ndarray, num_rows_B: np.ndarray, timestamp_ms_B: np.ndarray, split: SplitConfig
) -> np.ndarray:
    """Returns (B,) int8: of each user's n rows in order the last ones are test, those before them valid.

    The last round(test_fraction n) rows are test and the round(valid_fraction n) before them valid, halves rounded
    up. A user with fewer than 3 rows stays wholly in train.

    A user's rows of one moment (one impression) stay together: where a split would begin among them, it begins with
    the first of them, so the later split takes them all, and valid is counted back from where test then begins. The
    user's first moment is always train: where the fractions leave nothing else to train on, first valid and then
    test gives way, and a user of a single moment stays wholly in train. A row without a time is a moment of its own.

    Args:
        rank_B: Place of each row among its user's rows, 0 first; rows are sorted by user.
        num_rows_B: Number of rows of each row's user.
        timestamp_ms_B: As `moments_ms` returns, ascending within a user.
        split: The fractions.
    """
    row_B = np.arange(len(rank_B))
    is_first_B = (rank_B == 0) | (timestamp_ms_B == NO_TIME)
    is_first_B[1:] |= timestamp_ms_B[1:] != timestamp_ms_B[:-1]
    # The place among its user's rows of the first row of each row's moment.
    edge_B = rank_B - (row_B - np.maximum.accumulate(np.where(is_first_B, row_B, 0)))
    start_U = np.flatnonzero(rank_B == 0)
    num_rows_U = num_rows_B[start_U]
    num_first_U = np.add.reduceat(edge_B == 0, start_U, dtype=np.int64)

    def begin(fraction: float, end_U: np.ndarray) -> np.ndarray:
        """Returns the place where a split that ends before `end_U` begins."""
        num_held_out_U = np.floor(fraction * num_rows_U + 0.5).astype(np.int64)
        edge_U = edge_B[start_U + np.clip(end_U - num_held_out_U, 0, num_rows_U - 1)]
        return np.where(num_held_out_U == 0, end_U, np.minimum(np.maximum(edge_U, num_first_U), end_U))

    test_U = begin(split.test_fraction, num_rows_U)
    valid_U = begin(split.valid_fraction, test_U)
    test_B, valid_B = np.repeat(test_U, num_rows_U), np.repeat(valid_U, num_rows_U)
    split_B = np.where(rank_B >= test_B, TEST, np.where(rank_B >= valid_B, VALID, TRAIN))
    return np.where(num_rows_B < 3, TRAIN, split_B).astype(np.int8)


def _parse_moment(name: str, text: str | None, timezone: str) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"data.split.{name} = {text!r}: not an ISO date or date-time such as 2023-05-30 or 2023-05-30T14:00:00"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(timezone))
    return (moment - _EPOCH) // timedelta(milliseconds=1)
