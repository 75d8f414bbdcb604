"""Drawn negatives: what may never be drawn, and what happens when little or nothing is left."""

from __future__ import annotations

import numpy as np
import pytest

from llm4msr.data.negatives import draw_negatives

POOLS = [np.array([1, 2, 3, 4], np.int32), np.array([3, 4, 5], np.int32)]


def draw(rows: list[tuple[int, int, int, int]], k: int, pools=POOLS, seed: int = 0):
    user, item, scenario, label = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    positive, drawn, missing = draw_negatives(user, item, scenario, label, k, pools, np.random.default_rng(seed))
    return positive.tolist(), drawn.tolist(), missing


def test_only_items_of_the_pool_that_the_user_does_not_have_in_any_scenario():
    # User 1 has 1 and 2 (scenario 0) and 3 (scenario 1): only 4 is left in scenario 0, only 4 and 5 in scenario 1.
    positive, drawn, missing = draw([(1, 1, 0, 1), (1, 2, 0, 1), (1, 3, 1, 1)], k=50)
    assert missing == 0
    assert positive == [0] * 50 + [1] * 50 + [2] * 50
    assert set(drawn[:100]) == {4}
    assert set(drawn[100:]) == {4, 5}


def test_rows_with_label_0_get_none_but_their_items_are_the_users_too():
    positive, drawn, missing = draw([(1, 1, 0, 1), (1, 2, 0, 0), (1, 3, 0, 0)], k=3)
    assert (positive, drawn, missing) == ([0, 0, 0], [4, 4, 4], 0)


def test_who_owns_the_whole_pool_gets_none_and_is_counted():
    rows = [(1, i, 0, 1) for i in (1, 2, 3, 4)] + [(2, 1, 0, 1)]
    positive, drawn, missing = draw(rows, k=2)
    assert positive == [4, 4]
    assert set(drawn) <= {2, 3, 4}
    assert missing == 8


def test_the_last_free_item_of_a_large_pool_is_found():
    # Rejection sampling alone would need some 5000 rounds.
    pool = np.arange(1, 5001, dtype=np.int32)
    user, item = np.ones(4999, np.int64), np.delete(pool, 1233)
    label = np.zeros(4999, np.int8)
    label[:3] = 1
    positive, drawn, missing = draw_negatives(
        user, item, np.zeros(4999, np.int32), label, 2, [pool], np.random.default_rng(0)
    )
    assert (positive.tolist(), drawn.tolist(), missing) == ([0, 0, 1, 1, 2, 2], [1234] * 6, 0)


def test_an_empty_pool_is_counted():
    assert draw([(1, 1, 0, 1)], k=3, pools=[np.array([], np.int32)]) == ([], [], 3)


def test_the_seed_decides():
    rows = [(u, 1, 0, 1) for u in range(1, 30)]
    assert draw(rows, 4, seed=5) == draw(rows, 4, seed=5)
    assert draw(rows, 4, seed=5) != draw(rows, 4, seed=6)


@pytest.mark.parametrize("num_users", [300])
def test_draws_are_uniform_over_what_is_left(num_users):
    rows = [(u, 1, 0, 1) for u in range(num_users)]
    _, drawn, _ = draw(rows, 20)
    counts = np.bincount(drawn, minlength=5)
    # 6000 draws over 3 items: 2000 each, standard deviation 36.5.
    assert counts[1] == 0
    assert (np.abs(counts[2:] - 2000) < 5 * 36.5).all()
