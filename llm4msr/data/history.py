"""What each user liked, in order: the logs that history features read, and where each row stands in them.

A log holds the likes (label 1, all splits) of one scenario, or of all of them merged, user by user. Nothing is copied
per row: a row carries the number of its user's likes strictly before its moment, and its history ends there. So a row
sees neither itself nor what else was shown at the same moment, nor anything later. Drawn negatives carry the number of
their positive.

A moment is a time; for rows without one it is a position. Rows of one user without a time come first, as everywhere in
prepare.

Left out: ratings, dwell time and other strengths of a like, and dislikes.

Axes: B rows of a bucket, sorted by user, time and position; U table rows of users + 1; N likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.config.data import HistoryFeature
from llm4msr.data.prepared import ID_FEATURES, log_uri
from llm4msr.data.source import DataError, RawFeature
from llm4msr.data.splits import NO_TIME
from llm4msr.schema import ALL_SCENARIOS, SPLITS, Feature, FeatureSchema, history_column


@dataclass(frozen=True)
class LikeLog:
    """The likes of all users in one log, as flat arrays.

    Attributes:
        offset_U: int64 (U + 1,): the likes of the user in table row r are those from offset_U[r] to offset_U[r + 1].
            Row 0, the unknown user, has none.
        item_row_N: int32 rows of the items' table, oldest first within a user.
    """

    offset_U: np.ndarray
    item_row_N: np.ndarray

    def num_likes(self, user_row_B: np.ndarray) -> np.ndarray:
        """Returns how many likes of each of the users the log holds, int32."""
        count_B: np.ndarray = (self.offset_U[user_row_B + 1] - self.offset_U[user_row_B]).astype(np.int32)
        return count_B


class Moments:
    """The moments of rows that are sorted by user, time and position.

    Args:
        user_row_B: Ascending.
        timestamp_ms_B: As `splits.moments_ms` returns, ascending within a user.
        position_B: Ascending within a user's rows of one time.
    """

    def __init__(self, user_row_B: np.ndarray, timestamp_ms_B: np.ndarray, position_B: np.ndarray) -> None:
        new_user_B, new_moment_B = np.ones((2, len(user_row_B)), bool)
        new_user_B[1:] = user_row_B[1:] != user_row_B[:-1]
        other_place_B = (timestamp_ms_B[1:] == NO_TIME) & (position_B[1:] != position_B[:-1])
        new_moment_B[1:] = new_user_B[1:] | (timestamp_ms_B[1:] != timestamp_ms_B[:-1]) | other_place_B
        row_B = np.arange(len(user_row_B))
        self._first_of_user_B = np.maximum.accumulate(np.where(new_user_B, row_B, 0))
        self._first_of_moment_B = np.maximum.accumulate(np.where(new_moment_B, row_B, 0))

    def number(self) -> np.ndarray:
        """Returns (B,) int32: the number of each row's moment among its user's, 0 first."""
        count_B = np.cumsum(self._first_of_moment_B == np.arange(len(self._first_of_moment_B)))
        number_B: np.ndarray = (count_B - count_B[self._first_of_user_B]).astype(np.int32)
        return number_B

    def count_before(self, event_B: np.ndarray) -> np.ndarray:
        """Returns (B,) int32: how many rows of the same user at earlier moments are events.

        Args:
            event_B: (B,) bool.
        """
        earlier_B = np.cumsum(event_B) - event_B
        before_B: np.ndarray = earlier_B[self._first_of_moment_B] - earlier_B[self._first_of_user_B]
        return before_B.astype(np.int32)

    def largest_before(self, value_B: np.ndarray) -> np.ndarray:
        """Returns (B,) the largest value among the rows of the same user at earlier moments, 0 where there is none.

        Args:
            value_B: (B,) integers from 0.
        """
        # Each user's values are lifted above those of the users before, so that one running maximum serves all.
        step = int(value_B.max(initial=0)) + 1
        lifted_B = np.maximum.accumulate(self._first_of_user_B * step + value_B)
        before_B = lifted_B[np.maximum(self._first_of_moment_B - 1, 0)] - self._first_of_user_B * step
        return np.where(self._first_of_moment_B > self._first_of_user_B, before_B, 0)


def history_features(
    wanted: Sequence[HistoryFeature], features: Sequence[RawFeature], scenario_names: Sequence[str]
) -> tuple[Feature, ...]:
    """Returns the configured histories as features of the user.

    Args:
        wanted: data.history.
        features: All other features of the data but the ids.
        scenario_names: In the order of their index.

    Raises:
        ConfigError: A name is that of another feature, or a scenario is not there.
    """
    taken = {*ID_FEATURES.values(), *(f.name for f in features)}
    for f in wanted:
        if f.name in taken:
            raise ConfigError(f"data.history: {f.name!r} is the name of another feature; taken: {sorted(taken)}")
        if f.scenario is not None and f.scenario not in scenario_names:
            raise ConfigError(
                f"data.history: {f.name!r} is of scenario {f.scenario!r}, which is not there; valid: "
                f"{list(scenario_names)}, or leave it out for the likes of all scenarios"
            )
    return tuple(
        Feature(f.name, "history", "user", max_length=f.max_length, log=f.scenario or ALL_SCENARIOS, pooling=f.pooling)
        for f in wanted
    )


def log_columns(histories: Sequence[Feature], scenario_names: Sequence[str]) -> dict[str, int | None]:
    """Returns the column of each log that histories read, and the index of its scenario (None: of all)."""
    return {
        history_column(f.log, scenario_names): None if f.log == ALL_SCENARIOS else list(scenario_names).index(f.log)
        for f in histories
    }


def place_rows(rows: pa.Table, moments: Moments, columns: dict[str, int | None]) -> pa.Table:
    """Adds to each row its number of earlier likes in each log.

    Args:
        rows: (B rows) with scenario, label and split, in the order of `moments`.
        moments: Of these rows.
        columns: As `log_columns` returns.

    Raises:
        DataError: A row would see likes of a later split, as only splits named by the data can make it.
    """
    liked_B, scenario_B, split_B = (rows[name].to_numpy() for name in ("label", "scenario", "split"))
    late_B = moments.largest_before(np.where(liked_B, split_B, 0)) > split_B
    if late_B.any():
        row = int(np.argmax(late_B))
        raise DataError(
            f"data.history: {int(late_B.sum())} rows come after likes of a later split, which their history would "
            f"hold, such as a {SPLITS[split_B[row]]} row of user row {rows['user_row'][row].as_py()}; with histories "
            "each user's rows of train must come before those of valid, and these before those of test"
        )
    for column, scenario in columns.items():
        event_B = liked_B == 1 if scenario is None else (liked_B == 1) & (scenario_B == scenario)
        rows = rows.append_column(column, pa.array(moments.count_before(event_B)))
    return rows


def likes(rows: pa.Table, timestamp_ms_B: np.ndarray, position_B: np.ndarray) -> pa.Table:
    """Returns user_row, item_row and scenario of the rows with label 1, by user, then time, then position.

    Likes that share all of these are ordered by item and scenario, never by where they stood in the files.
    """
    rows = rows.select(["user_row", "item_row", "scenario", "label"])
    user_row_B, item_row_B, scenario_B, label_B = (column.to_numpy() for column in rows.columns)
    order = np.lexsort((scenario_B, item_row_B, position_B, timestamp_ms_B, user_row_B))
    return rows.drop_columns(["label"]).take(pa.array(order[label_B[order] == 1]))


def write_logs(uri: str, staged: pa.Table, num_users: int, columns: dict[str, int | None]) -> None:
    """Writes the logs of a prepared directory: record i holds the likes of users' table row i + 1.

    Args:
        uri: The prepared directory.
        staged: What `likes` returned of all buckets, in any order of buckets; each user lies in one.
        num_users: Records of the users' table.
        columns: As `log_columns` returns.
    """
    user_row_N, item_row_N, scenario_N = (staged[name].to_numpy() for name in ("user_row", "item_row", "scenario"))
    order = np.argsort(user_row_N, kind="stable")
    for column, scenario in columns.items():
        chosen = order if scenario is None else order[scenario_N[order] == scenario]
        counts = np.bincount(user_row_N[chosen], minlength=num_users + 1)[1:]
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int64())
        items = pa.LargeListArray.from_arrays(offsets, pa.array(item_row_N[chosen], pa.int32()))
        storage.write_parquet(log_uri(uri, column), pa.table({"item_rows": items}))


def read_logs(uri: str, schema: FeatureSchema) -> dict[str, LikeLog]:
    """Returns the logs that a schema's histories read, by name, from a prepared directory or a checkpoint.

    Raises:
        StorageError: One is missing or damaged.
    """
    logs = {}
    for log, column in schema.history_columns.items():
        lists = storage.read_parquet(log_uri(uri, column))["item_rows"].combine_chunks()
        sizes = lists.value_lengths().to_numpy()
        logs[log] = LikeLog(np.concatenate([[0, 0], np.cumsum(sizes)]).astype(np.int64), lists.flatten().to_numpy())
    return logs
