"""The simulated extraction: small pools by hand, bounds, losses, and units as the project's planner cuts them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from module_constants import constant

from llm4msr.planning.simulation import (
    MIN_ROWS_PER_UNIT,
    UNITS_AHEAD,
    UNITS_PER_ACTOR,
    Pool,
    rows_per_unit,
    simulate,
    simulate_extraction,
    unit_sizes,
    unit_tokens,
)


def test_the_simulation_has_the_constants_of_the_real_thing():
    assert constant("llm4msr/knowledge/actors.py", "UNITS_AHEAD") == UNITS_AHEAD
    assert constant("llm4msr/knowledge/pipeline.py", "UNITS_PER_ACTOR") == UNITS_PER_ACTOR
    assert constant("llm4msr/knowledge/pipeline.py", "MIN_ROWS_PER_UNIT") == MIN_ROWS_PER_UNIT
    assert rows_per_unit(10_000, 512, 4) == 512 and rows_per_unit(1000, 512, 4) == 64


def still(num_actors: int, **changed) -> Pool:
    return Pool(num_actors, 1.0, **{"load_s": 0.0, "dispatch_s": 0.0, **changed})


def test_small_simulations_by_hand():
    ones = np.ones(6)
    assert simulate(ones, still(1)) == (6, 6, 0, 0)
    assert simulate(ones, still(3, load_s=10))[0] == 12
    assert simulate(ones, still(100, dispatch_s=2))[0] == 13  # the driver is the limit
    # Units are handed out two deep: the long one holds up the unit that waits behind it.
    assert simulate(np.array([5.0, 1, 1, 1]), still(2))[0] == 6


def test_lost_work_is_done_again():
    work_U = np.full(200, 360.0)
    end_s, kept_s, lost_s, losses = simulate(work_U, still(10, losses_per_h=0.5, replace_s=60), seed=1)
    calm_s = simulate(work_U, still(10))[0]
    assert kept_s == 200 * 360 and losses > 5 and end_s > calm_s
    assert 0 < lost_s <= losses * 360  # never more than the unit at work
    assert simulate(work_U, still(10, losses_per_h=0.5, replace_s=60), seed=1) == (end_s, kept_s, lost_s, losses)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.integers(1, 20), st.floats(0, 1))
def test_a_simulation_is_between_its_bounds(work, num_actors, dispatch_s):
    end_s, kept_s, lost_s, losses = simulate(np.array(work), still(num_actors, dispatch_s=dispatch_s))
    assert kept_s == pytest.approx(sum(work)) and (lost_s, losses) == (0, 0)
    least = max(sum(work) / num_actors, max(work), dispatch_s * len(work))
    assert least * (1 - 1e-9) <= end_s <= sum(work) + dispatch_s * len(work) + 1e-6


@pytest.mark.parametrize(("num_prompts", "rows"), [(1, 512), (512, 512), (10_000, 512), (999, 64), (100, 3)])
def test_units_hold_all_prompts(num_prompts, rows):
    sizes_U = unit_sizes(num_prompts, rows)
    assert sizes_U.sum() == num_prompts and sizes_U.min() > 0 and sizes_U.max() <= rows
    tokens_U = unit_tokens(sizes_U, {100: 1, 300: 1}, seed=0)
    assert (tokens_U >= 100 * sizes_U).all() and (tokens_U <= 300 * sizes_U).all()


def test_the_last_units_cost_little_when_there_are_many():
    lengths = {100: 1, 300: 1}
    even, uneven, fine = (
        simulate_extraction(400_000, rows, [Pool(200, 20_000.0, dispatch_s=0.0, load_s=1.0)], lengths)[0]
        for rows in (2000, 480, 64)
    )
    assert (even.num_units, even.rows_per_unit) == (800, 500)  # cut finer than asked: four units an actor
    assert (uneven.num_units, fine.num_units) == (834, 6250)
    assert uneven.busy_share < 0.8 < 0.85 < min(even.busy_share, fine.busy_share) < 1
    (slow,) = simulate_extraction(400_000, 64, [Pool(200, 20_000.0, dispatch_s=0.05)], lengths)
    assert slow.hours * 3600 > 6250 * 0.05 and slow.busy_share < 0.1  # the driver is the limit
