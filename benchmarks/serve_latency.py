"""How fast the endpoint answers: one replica, 100 candidates, against the same application behind uvicorn alone.

* Throughput: the most answers a second, over 1 to 32 connections that ask without a pause, with a 99th percentile
  below 50 ms and no failed request.
* Latency: percentiles at about 50 requests a second.

Sides take turns, each with servers of its own that stay up for all rounds. The load's own processor time is in all
figures: on a machine of two cores it is one of two.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Goal, Result, paired_ratio, parser, report
from benchmarks.ranker import write_checkpoint
from benchmarks.serve_sides import Cluster, Load, bare, load, missing_tool, served_world, write_bodies
from benchmarks.train_world import World, write_world

NAME = "serve_latency"
SIDES = ("haproxy", "default proxy", "bare")
CONNECTIONS = (1, 2, 4, 8, 16, 32)
MOST_P99_MS, RATE_PER_S, NUM_PACED = 50.0, 50, 10
LEAST_SHARE, MOST_OVERHEAD_MS = 0.6, 2.0


def run(world: World, seconds: int, rounds: int, num_candidates: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        seconds: Of each load.
        rounds: Of all loads.
        num_candidates: Of a request.
        not_judged: As of `Result`.
    """
    config = {
        "benchmark": NAME,
        "candidates": num_candidates,
        "users": world.num_users,
        "items": world.num_items,
        "connections": CONNECTIONS,
        "seconds of a load": seconds,
        "rounds": rounds,
    }
    if reason := missing_tool():
        return Result(config, {}, {}, {}, (), reason)
    best: dict[str, list[float]] = {side: [] for side in SIDES}
    paced: dict[str, list[Load]] = {side: [] for side in SIDES}
    failed = shed = 0
    with tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint_uri = write_checkpoint(f"{folder}/c", *write_world(name, world), "low_rank")
        bodies = folder / "bodies"
        write_bodies(checkpoint_uri, bodies, num_candidates)
        urls = {"bare": stack.enter_context(bare(folder, checkpoint_uri))}
        for side in SIDES[:2]:
            place = folder / side[:1]
            place.mkdir()
            cluster = Cluster(place, checkpoint_uri, side == "haproxy", deployment={"num_replicas": 1})
            urls[side] = stack.enter_context(cluster).url
        for side in SIDES:
            load(urls[side], bodies, min(seconds, 3), 4)  # warm
        for _ in range(rounds):
            for side in SIDES:
                loads = [load(urls[side], bodies, seconds, number) for number in CONNECTIONS]
                good = [found.requests_per_s for found in loads if found.p99_ms < MOST_P99_MS and not found.kinds]
                best[side].append(max(good, default=0.0))
                paced[side].append(load(urls[side], bodies, seconds, NUM_PACED, 1000 * NUM_PACED / RATE_PER_S))
                failed += paced[side][-1].failed
                shed += paced[side][-1].told_to_come_back
    medians = {f"{side}: requests/s at p99 < 50 ms": statistics.median(values) for side, values in best.items()}
    for side, loads in paced.items():
        medians[f"{side}: requests/s, paced"] = statistics.median(found.requests_per_s for found in loads)
        for part in ("p50_ms", "p95_ms", "p99_ms"):
            medians[f"{side}: {part} at 50 requests/s"] = statistics.median(getattr(found, part) for found in loads)
    medians |= {"failed requests, paced": failed, "told to come back, paced": shed}
    ratios = {
        f"{side} / bare: requests/s": paired_ratio(best[side], best["bare"]) if all(best["bare"]) else 0.0
        for side in SIDES[:2]
    }
    overhead = statistics.median(a.p50_ms - b.p50_ms for a, b in zip(paced["haproxy"], paced["bare"], strict=True))
    medians["haproxy - bare: p50 ms at 50 requests/s"] = overhead
    goals = (
        Goal("throughput through HAProxy over bare uvicorn", ratios["haproxy / bare: requests/s"], ">=", LEAST_SHARE),
        Goal("p50 added by Ray Serve and HAProxy: ms", overhead, "<", MOST_OVERHEAD_MS),
        Goal("requests at 50 requests/s that failed or were told to come back", failed + shed, "<=", 0),
    )
    return Result(config, {}, medians, ratios, goals, not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, help="of each load; default 8, short 1")
    options.add_argument("--rounds", type=int, help="default 3, short 1")
    options.add_argument("--candidates", type=int, default=100)
    chosen = options.parse_args()
    short = chosen.short
    world = served_world(short)
    seconds, rounds = chosen.seconds or (1 if short else 8), chosen.rounds or (1 if short else 3)
    result = run(world, seconds, rounds, chosen.candidates, "short form" if short else None)
    report(result, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
