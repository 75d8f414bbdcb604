"""Which rows share a pass, and what their beginnings have in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4msr.knowledge.engines.batching import padded_tokens, plan_batches, shared_prefix_length

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


@given(LENGTHS, st.integers(1, 1000))
def test_every_row_once_within_the_budget_longest_first(lengths, batch_tokens):
    batches = plan_batches(lengths, batch_tokens)
    flat = [int(i) for batch in batches for i in batch]
    assert flat == sorted(range(len(lengths)), key=lambda i: -lengths[i])  # sorted() is stable
    lengths = np.array(lengths, dtype=int)
    assert all(len(batch) == 1 or padded_tokens(lengths[batch]) <= batch_tokens for batch in batches)
    for batch in batches[:-1]:  # none has room for one more row
        assert (len(batch) + 1) * lengths[batch[0]] > batch_tokens


@given(st.lists(st.integers(20, 300), min_size=1, max_size=200), st.integers(300, 4000))
def test_padding_is_bounded_by_the_budget_not_by_the_number_of_rows(lengths, batch_tokens):
    # Ranges of length do not overlap, so the sum of (longest - shortest) is at most the longest of all.
    lengths = np.array(lengths)
    batches = plan_batches(lengths, batch_tokens)
    padding = sum(padded_tokens(lengths[b]) for b in batches) - lengths.sum()
    assert padding <= max(len(b) for b in batches) * (lengths.max() - lengths.min())


def test_by_hand():
    lengths = [3, 10, 4, 3, 25, 5]
    assert [b.tolist() for b in plan_batches(lengths, 12)] == [[4], [1], [5, 2], [0, 3]]
    assert plan_batches([], 12) == []


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=2, max_size=6),
)
def test_shared_prefix_is_the_longest_common_one(head, tails):
    rows = [head + tail for tail in tails]
    expected = 0
    while all(len(row) > expected + 1 and row[expected] == rows[0][expected] for row in rows):
        expected += 1
    average = sum(map(len, rows)) / len(rows)
    assert shared_prefix_length(rows) == (expected if expected >= 16 and expected >= 0.1 * average else 0)


@pytest.mark.parametrize(
    ("num_shared", "num_own", "expected"), [(15, 5, 0), (16, 5, 16), (30, 280, 0), (32, 280, 32), (16, 144, 16)]
)
def test_a_prefix_must_be_worth_it(num_shared, num_own, expected):
    rows = [[7] * num_shared + [i] * num_own for i in range(3)]
    assert shared_prefix_length(rows) == expected
    assert shared_prefix_length(rows[:1]) == 0


def test_equal_rows_keep_a_token_of_their_own():
    assert shared_prefix_length([[1] * 20, [1] * 20]) == 19
    assert shared_prefix_length([[1] * 20, [1] * 30]) == 19
