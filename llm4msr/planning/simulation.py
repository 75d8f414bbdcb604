"""What the arithmetic of an extraction leaves out, simulated: actors that load, queue, run dry at the end, or are lost.

The units are those of the project's own planner (`llm4msr.knowledge.plan.cut_units`), the lengths of the prompts those
of real ones. What hands units out in a real run is Ray Data; here it is its rule: an actor holds `UNITS_AHEAD` units,
one at work, and gets another when one is done; the driver hands out one unit after the other. Not simulated: reading
and writing (measured, in the plan's pipeline_share), and the driver's memory.

Axes: U units.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm4msr.knowledge.plan import PromptSet, cut_units
from llm4msr.knowledge.store import KEY_DTYPE

UNITS_AHEAD = 2  # as in llm4msr.knowledge.actors
# As in llm4msr.knowledge.pipeline: a small job is cut finer.
UNITS_PER_ACTOR, MIN_ROWS_PER_UNIT = 4, 64
BLOCKS_PER_UNIT = 8


@dataclass(frozen=True)
class Pool:
    """The actors and what befalls them.

    Attributes:
        num_actors: Actors, all asked for at once.
        prompt_tokens_per_s: Tokens that one reads in a second.
        load_s: Seconds from its start until it has loaded the model.
        dispatch_s: Seconds that the driver takes to hand out one unit.
        losses_per_h: How often an actor is lost in an hour, as on spot machines.
        replace_s: Seconds until another one stands in its place, before it loads.
    """

    num_actors: int
    prompt_tokens_per_s: float
    load_s: float = 120.0
    dispatch_s: float = 0.005
    losses_per_h: float = 0.0
    replace_s: float = 300.0


@dataclass(frozen=True)
class Simulated:
    """What came out.

    Attributes:
        num_units: Units.
        rows_per_unit: Prompts of a whole unit.
        hours: From start to the last commit.
        busy_share: Of all actors' time until then that went into work that was kept.
        lost_share: The same of work that was lost with its actor, and done again.
        num_losses: Actors lost while they worked or waited for their next unit.
    """

    num_units: int
    rows_per_unit: int
    hours: float
    busy_share: float
    lost_share: float
    num_losses: int


def rows_per_unit(num_prompts: int, rows_per_commit: int, num_actors: int) -> int:
    """Returns the size of a unit, by the rule of `llm4msr.knowledge.pipeline`."""
    return min(rows_per_commit, max(MIN_ROWS_PER_UNIT, math.ceil(num_prompts / (UNITS_PER_ACTOR * num_actors))))


def unit_sizes(num_prompts: int, rows: int) -> np.ndarray:
    """Returns (U,) prompts of each unit that `cut_units` makes.

    It plans every prompt in lists; here it plans blocks of prompts, eight to a unit (one where eight does not divide
    it), so that a hundred million fit.
    """
    block = rows // BLOCKS_PER_UNIT if rows % BLOCKS_PER_UNIT == 0 else rows
    num_blocks = math.ceil(num_prompts / block)
    whole = PromptSet(
        ("prompts",),
        ("user",),
        np.array([num_blocks]),
        np.zeros(num_blocks, KEY_DTYPE),
        np.zeros(num_blocks, np.int32),
    )
    units = cut_units(whole, np.arange(num_blocks), rows // block)["unit"].combine_chunks()
    sizes_U: np.ndarray = units.flatten().field("records").value_lengths().to_numpy().astype(np.int64) * block
    sizes_U[-1] -= num_blocks * block - num_prompts
    return sizes_U


def unit_tokens(sizes_U: np.ndarray, prompts_by_tokens: Mapping[int, int], seed: int) -> np.ndarray:
    """Returns (U,) tokens of each unit, its prompts drawn from real lengths.

    Args:
        sizes_U: Prompts of each unit.
        prompts_by_tokens: How many real prompts have so many tokens.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    length_L = np.array(list(prompts_by_tokens), np.float64)
    share_L = np.array(list(prompts_by_tokens.values()), np.float64)
    share_L /= share_L.sum()
    return rng.multinomial(sizes_U, share_L) @ length_L


def simulate(work_U: np.ndarray, pool: Pool, seed: int = 0) -> tuple[float, float, float, int]:
    """Runs units through a pool.

    Args:
        work_U: Seconds of each unit on an actor.
        pool: The actors.
        seed: Of their losses.

    Returns:
        Seconds until the last unit is done, seconds of kept and of lost work, and losses.
    """
    rng = np.random.default_rng(seed)
    mean_life_s = 3600 / pool.losses_per_h if pool.losses_per_h else math.inf
    free_s = np.full(pool.num_actors, pool.load_s)  # when each actor is done with what it was handed
    dies_s = rng.exponential(mean_life_s, pool.num_actors) if pool.losses_per_h else np.full(pool.num_actors, math.inf)
    # (when a place in an actor's queue is free, actor); at the beginning each has `UNITS_AHEAD`, first places first.
    places = [(0.0, actor + turn * pool.num_actors) for turn in range(UNITS_AHEAD) for actor in range(pool.num_actors)]
    handed_s, kept_s, lost_s, num_losses, end_s = 0.0, 0.0, 0.0, 0, 0.0
    for work_s in work_U.tolist():
        free_at_s, place = heapq.heappop(places)
        actor = place % pool.num_actors
        handed_s = max(handed_s, free_at_s) + pool.dispatch_s
        start_s = max(handed_s, float(free_s[actor]))
        while start_s + work_s > dies_s[actor]:
            lost_s += max(float(dies_s[actor]) - start_s, 0.0)
            num_losses += 1
            start_s = max(start_s, float(dies_s[actor]) + pool.replace_s + pool.load_s)
            dies_s[actor] += pool.replace_s + rng.exponential(mean_life_s)
        free_s[actor] = start_s + work_s
        kept_s += work_s
        end_s = max(end_s, start_s + work_s)
        heapq.heappush(places, (start_s + work_s, place))
    return end_s, kept_s, lost_s, num_losses


def simulate_extraction(
    num_prompts: int, rows_per_commit: int, pools: Sequence[Pool], prompts_by_tokens: Mapping[int, int], seed: int = 0
) -> list[Simulated]:
    """Simulates an extraction with each of several pools, from its first actor's start to its last commit.

    Args:
        num_prompts: Prompts that the store lacks.
        rows_per_commit: `knowledge.rows_per_commit`.
        pools: The actors.
        prompts_by_tokens: How many real prompts have so many tokens.
        seed: Of lengths and losses.
    """
    planned: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    found = []
    for pool in pools:
        rows = rows_per_unit(num_prompts, rows_per_commit, pool.num_actors)
        if rows not in planned:
            sizes_U = unit_sizes(num_prompts, rows)
            planned[rows] = sizes_U, unit_tokens(sizes_U, prompts_by_tokens, seed)
        sizes_U, tokens_U = planned[rows]
        seconds, kept_s, lost_s, num_losses = simulate(tokens_U / pool.prompt_tokens_per_s, pool, seed)
        actor_s = seconds * pool.num_actors
        found.append(
            Simulated(len(sizes_U), int(sizes_U[0]), seconds / 3600, kept_s / actor_s, lost_s / actor_s, num_losses)
        )
    return found
