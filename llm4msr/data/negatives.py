"""Draws negatives for positive-only data: items of the scenario's pool that the user does not have.

Pure numpy. Uniform over the pool minus the user's own items, with replacement: one item may be drawn twice for a
user. Popularity-weighted or hard negatives are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Rounds of rejection sampling. Who owns a share f of the pool still misses f**ROUNDS of the draws after them; the
# exact set difference, one user at a time, is for those few.
ROUNDS = 16


def draw_negatives(
    user_row_B: np.ndarray,
    item_row_B: np.ndarray,
    scenario_B: np.ndarray,
    label_B: np.ndarray,
    num_per_positive: int,
    pools: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Draws `num_per_positive` items for each row with label 1.

    The same arguments give the same result.

    Args:
        user_row_B: All rows of some users, of all scenarios and splits: an item in any of them is never drawn.
        item_row_B: Their items.
        scenario_B: Their scenarios; a negative comes from the pool of its positive's scenario.
        label_B: 1 for the positives.
        num_per_positive: Draws per positive.
        pools: One array of distinct item rows per scenario.
        rng: Source of randomness.

    Returns:
        (N,) int64 index of the positive of each negative, ascending; (N,) int32 its item row; the number of
        negatives that could not be drawn, because the user has every item of the pool.
    """
    base = int(max([item_row_B.max(initial=0), *(pool.max(initial=0) for pool in pools)])) + 1
    owned = np.unique(user_row_B.astype(np.int64) * base + item_row_B)
    positive_N = np.repeat(np.flatnonzero(label_B == 1), num_per_positive)
    user_N, scenario_N = user_row_B[positive_N].astype(np.int64), scenario_B[positive_N]
    drawn_N = np.full(len(positive_N), -1, np.int32)
    for scenario, pool in enumerate(pools):
        pending = np.flatnonzero(scenario_N == scenario)
        for _ in range(ROUNDS if len(pool) else 0):
            if not len(pending):
                break
            candidates = pool[rng.integers(0, len(pool), len(pending))]
            free = ~_contains(owned, user_N[pending] * base + candidates)
            drawn_N[pending[free]] = candidates[free]
            pending = pending[~free]
        pending = pending[np.argsort(user_N[pending], kind="stable")]
        for mine in np.split(pending, np.flatnonzero(np.diff(user_N[pending])) + 1):
            left = pool[~_contains(owned, user_N[mine[:1]] * base + pool.astype(np.int64))] if len(mine) else pool
            if len(left) and len(mine):
                drawn_N[mine] = left[rng.integers(0, len(left), len(mine))]
    found = drawn_N >= 0
    return positive_N[found], drawn_N[found], int((~found).sum())


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found: np.ndarray = sorted_keys[place] == keys
    return found
