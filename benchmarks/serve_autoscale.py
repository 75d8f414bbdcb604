"""One replica to three and back under a step of load: how long it takes, and what callers see meanwhile.

A deployment behind HAProxy that may have one to three replicas. A trickle of requests, then a step of as many
connections as three replicas aim at, then the trickle again. Delays of the autoscaler are 2 s up and 10 s down, so that
the benchmark ends; in production they are 10 s and 300 s (serve/config.yaml), which come on top.

The seconds end when so many replicas run; those that are to go have no new requests then, but stay for half a minute
more (Ray Serve drains them). Requests told to come back (503 with Retry-After) are counted apart from those that
failed: one replica has more than it can answer until the others are there.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Goal, Result, parser, report
from benchmarks.ranker import write_checkpoint
from benchmarks.serve_sides import Cluster, Load, load, missing_tool, served_world, write_bodies
from benchmarks.train_world import World, write_world

NAME = "serve_autoscale"
MOST_REPLICAS, TARGET_ONGOING = 3, 4
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 2, 10
TRICKLE, TRICKLE_PAUSE_MS, STEP = 1, 500.0, 16
# Beyond the delays: what starting a replica and deciding may cost.
MOST_UP_S, MOST_DOWN_S = 30.0, 40.0
LOOK_S = 0.25


def run(world: World, step_s: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        step_s: How long the step lasts, and the trickle after it.
        not_judged: As of `Result`.
    """
    config = {
        "benchmark": NAME,
        "candidates": 100,
        "users": world.num_users,
        "items": world.num_items,
        "seconds of a load": step_s,
        "connections of the step": STEP,
        "target_ongoing_requests": TARGET_ONGOING,
        "upscale_delay_s": UPSCALE_DELAY_S,
        "downscale_delay_s": DOWNSCALE_DELAY_S,
    }
    if reason := missing_tool():
        return Result(config, {}, {}, {}, (), reason)
    with tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        checkpoint_uri = write_checkpoint(f"{folder}/c", *write_world(name, world), "low_rank")
        bodies = folder / "bodies"
        write_bodies(checkpoint_uri, bodies, 100)
        scaling = {
            "min_replicas": 1,
            "max_replicas": MOST_REPLICAS,
            "target_ongoing_requests": TARGET_ONGOING,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
            "metrics_interval_s": 1,
            "look_back_period_s": 2,
        }
        deployment = {"autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 0.5}}
        with Cluster(folder, checkpoint_uri, ha_proxy=True, deployment=deployment) as cluster:
            trickle = load(cluster.url, bodies, 3, TRICKLE, TRICKLE_PAUSE_MS)
            step, up_s = _until(cluster, MOST_REPLICAS, lambda: load(cluster.url, bodies, step_s, STEP))
            after, down_s = _until(cluster, 1, lambda: load(cluster.url, bodies, step_s, TRICKLE, TRICKLE_PAUSE_MS))
    medians = {}
    for phase, loaded in (("trickle", trickle), ("step", step), ("trickle again", after)):
        medians |= {
            f"{phase}: requests/s": loaded.requests_per_s,
            f"{phase}: p50_ms": loaded.p50_ms,
            f"{phase}: p99_ms": loaded.p99_ms,
            f"{phase}: max_ms": loaded.max_ms,
            f"{phase}: failed requests": loaded.failed,
            f"{phase}: told to come back": loaded.told_to_come_back,
            **{f"{phase}: {kind}": number for kind, number in loaded.kinds.items()},
        }
    for way, took in (("1 to 3 replicas: s", up_s), ("3 to 1 replicas: s", down_s)):
        if took is not None:
            medians[way] = took
    goals = (
        Goal("seconds from 1 to 3 replicas", up_s, "<", MOST_UP_S),
        Goal("seconds from 3 to 1 replicas", down_s, "<", MOST_DOWN_S),
        Goal("failed requests", trickle.failed + step.failed + after.failed, "<=", 0),
    )
    return Result(config, {}, medians, {}, goals, not_judged)


def _until(cluster: Cluster, number: int, work: Callable[[], Load]) -> tuple[Load, float | None]:
    """Loads, and looks how long it takes until so many replicas answer; None if they are not by the end of the load."""
    seen: list[float] = []
    ended = threading.Event()
    started = time.monotonic()

    def look() -> None:
        while not ended.is_set() and not seen:
            if cluster.status()["replicas"].get("RUNNING") == number:
                seen.append(time.monotonic() - started)
            time.sleep(LOOK_S)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        found = work()
    finally:
        ended.set()
        thread.join()
    return found, seen[0] if seen else None


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, help="of the step, and of the trickle after it; default 60, short 30")
    chosen = options.parse_args()
    world = served_world(chosen.short)
    seconds = chosen.seconds or (30 if chosen.short else 60)
    report(run(world, seconds, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
