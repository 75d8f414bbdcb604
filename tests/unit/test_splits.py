"""Buckets, order and splits, against tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from llm4msr.config import ConfigError, SplitConfig
from llm4msr.data import splits
from llm4msr.data.source import DataError
from llm4msr.data.splits import Thresholds


def test_buckets_depend_on_the_id_alone_and_spread_ids_with_a_common_factor():
    ids = pa.array(np.arange(0, 800_000, 8), pa.int64())
    bucket = splits.bucket_of(ids, 8)
    assert np.bincount(bucket, minlength=8).min() > 0.95 * len(ids) / 8
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert (splits.bucket_of(ids.take(pa.array(shuffled)), 8) == bucket[shuffled]).all()


def test_buckets_of_strings_and_of_negative_ids():
    names = splits.bucket_of(pa.array(["u1", "u2", "u1"]), 5)
    assert names[0] == names[2] and ((names >= 0) & (names < 5)).all()
    # The published check value of CRC-32.
    assert splits.bucket_of(pa.array(["123456789"]), 1000)[0] == 0xCBF43926 % 1000
    assert 0 <= splits.bucket_of(pa.array([-(2**63)]), 3)[0] < 3
    assert splits.bucket_of(pa.array([], pa.string()), 3).tolist() == []


def test_rows_are_ordered_by_user_time_position_and_arrival():
    user = np.array([2, 1, 2, 2, 2])
    time = splits.moments_ms(pa.array([5, 9, 5, None, 5]))
    position = np.array([1, 0, 0, 9, 1])
    assert splits.order_rows(user, time, position).tolist() == [1, 3, 2, 0, 4]


def test_rank_in_user():
    rank, num_rows = splits.rank_in_user(np.array([4, 4, 7, 9, 9, 9]))
    assert rank.tolist() == [0, 1, 0, 0, 1, 2]
    assert num_rows.tolist() == [2, 2, 1, 3, 3, 3]
    assert [x.tolist() for x in splits.rank_in_user(np.array([], np.int32))] == [[], []]


def test_thresholds_are_read_in_the_configured_zone():
    split = SplitConfig(
        valid_from="2023-05-30",
        test_from="2023-05-31T00:00:00+00:00",
        test_until="2023-06-01",
        timezone="Asia/Shanghai",
    )
    found = splits.configured_thresholds(split)
    # 2023-05-30 00:00 in Beijing is 2023-05-29 16:00 UTC.
    assert found == Thresholds(1685376000000, 1685491200000, 1685548800000)
    assert found.to_json()["valid_from"] == "2023-05-29T16:00:00+00:00"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"valid_from": "yesterday", "test_from": "2023-01-01"}, "valid_from = 'yesterday': not an ISO date"),
        ({"valid_from": "2023-01-02", "test_from": "2023-01-02"}, "valid_from = '2023-01-02' must be before"),
        ({"valid_from": "2023-01-01", "test_from": "2023-01-03", "test_until": "2023-01-02"}, "must be before"),
    ],
)
def test_unusable_thresholds_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        splits.configured_thresholds(SplitConfig(**values))


def test_time_split_puts_the_threshold_itself_into_the_later_split():
    assert splits.split_by_time(np.array([9, 10, 19, 20, 99]), Thresholds(10, 20)).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.2), (0.2, 0.1), (0.1, 0.1)])
def test_quantiles_of_distinct_moments_give_the_exact_shares(valid, test):
    moments = np.random.default_rng(0).permutation(10) * 100
    split = SplitConfig(valid_fraction=valid, test_fraction=test)
    thresholds = splits.quantile_thresholds(moments, np.ones(10, int), split)
    counts = np.bincount(splits.split_by_time(moments, thresholds), minlength=3)
    assert counts.tolist() == [10 - round(10 * valid) - round(10 * test), round(10 * valid), round(10 * test)]


def test_quantiles_keep_rows_of_one_moment_together_and_ignore_rows_after_the_end():
    # Rows 0-5 at 100, 6-8 at 200, 9 at 300, and 50 at 400 that are left out. Valid begins at row 6, test at row 8:
    # both at 200, so valid is empty and the 200s are not torn apart.
    moments, num_rows = np.array([300, 100, 200, 100, 400]), np.array([1, 4, 3, 2, 50])
    split = SplitConfig(valid_fraction=0.2, test_fraction=0.2)
    assert splits.quantile_thresholds(moments, num_rows, split, 400) == Thresholds(200, 200, 400)
    with pytest.raises(DataError, match="no interaction"):
        splits.quantile_thresholds(moments, num_rows, split, 50)


def _per_user(n: int, valid: float, test: float, times: list[int | None] | None = None) -> list[int]:
    rank, num_rows = splits.rank_in_user(np.zeros(n, int))
    moments = splits.moments_ms(pa.array(range(n) if times is None else times, pa.int64()))
    return splits.split_per_user(
        rank, num_rows, moments, SplitConfig(valid_fraction=valid, test_fraction=test)
    ).tolist()


@pytest.mark.parametrize("have_times", [True, False])
def test_the_last_rows_of_each_user_are_held_out(have_times):
    def held_out(n: int, valid: float, test: float) -> list[int]:
        return _per_user(n, valid, test, None if have_times else [None] * n)

    assert held_out(10, 0.1, 0.2) == [0] * 7 + [1] + [2, 2]
    assert held_out(5, 0.1, 0.1) == [0, 0, 0, 1, 2]  # 0.5 rounds up
    assert held_out(4, 0.1, 0.1) == [0, 0, 0, 0]
    assert held_out(2, 0.45, 0.45) == [0, 0]  # fewer than three rows
    assert held_out(3, 0.4, 0.5) == [0, 2, 2]  # valid gives way so that one row stays in train
    assert held_out(3, 0.09, 0.9) == [0, 2, 2]


@pytest.mark.parametrize(
    ("times", "valid", "test", "expected"),
    [
        # Test would begin with the second 7, valid with the second 5: each moment goes to the later split.
        ([1, 2, 3, 4, 5, 5, 5, 7, 7, 7], 0.2, 0.2, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
        # Boundaries that fall between moments stay where they are.
        ([1, 1, 1, 1, 1, 1, 5, 5, 7, 7], 0.2, 0.2, [0] * 6 + [1, 1, 2, 2]),
        # The first moment is train whatever the fractions ask for: valid gives way, then test.
        ([1, 1, 1, 1, 1, 7, 7, 7, 7, 7], 0.1, 0.1, [0] * 5 + [2] * 5),
        ([1, 1, 1, 1, 1, 1, 1, 1, 8, 9], 0.1, 0.5, [0] * 8 + [2, 2]),
        ([4, 4, 4, 4, 4], 0.2, 0.4, [0] * 5),
        # Rows without a time are not of one moment; they sort first.
        ([None, None, None, None, 3], 0.2, 0.2, [0, 0, 0, 1, 2]),
    ],
)
def test_rows_of_one_moment_are_not_torn_apart(times, valid, test, expected):
    assert _per_user(len(times), valid, test, times) == expected


def test_users_are_split_one_by_one():
    """The last row of one user and the first of the next share a moment and are still apart."""
    rank, num_rows = splits.rank_in_user(np.array([1, 1, 2, 2, 2, 2, 2]))
    moments = np.array([4, 5, 5, 6, 7, 8, 9])
    assert splits.split_per_user(rank, num_rows, moments, SplitConfig()).tolist() == [0, 0, 0, 0, 0, 1, 2]
    nobody = np.array([], np.int64)
    assert splits.split_per_user(nobody, nobody, nobody, SplitConfig()).tolist() == []
