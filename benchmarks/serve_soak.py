"""Ten minutes at 70 % of capacity with new weights, a killed replica and a redeploy in it.

Two replicas behind HAProxy, as serve/config.yaml deploys them. First the capacity: the most answers a second with a
99th percentile below 50 ms, none failed and none told to come back. Then phases of one load each, with no load between
them until two replicas run and no other is left:
``calm``, ``swap`` (another checkpoint by `serve.rollout`), ``calm after the swap``, ``kill`` (SIGKILL of a replica),
``calm after the kill``, ``redeploy`` (a changed argument, so that every replica is replaced), ``calm at the end``.

Memory is that of the replicas' processes, added up (PSS: what they share is counted once), at the end of the first and
of the last calm phase, when as many replicas have answered for as long.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.harness import Goal, Result, parser, report
from benchmarks.ranker import write_checkpoint
from benchmarks.serve_sides import Cluster, Load, load, missing_tool, served_world, write_bodies
from benchmarks.train_world import World, write_world

NAME = "serve_soak"
SHARE, MOST_P99_MS, MOST_DRIFT = 0.7, 50.0, 0.05
CONNECTIONS, NUM_PACED = (1, 2, 4, 8, 16), 16
NUM_REPLICAS, SETTLE_S, MOST_WHOLE_S = 2, 5, 180
# Requests that were in the killed replica, and those sent to it before the proxy noticed.
MOST_LOST = NUM_PACED * 2
EVENTS = ("swap", "kill", "redeploy")
PHASES = ("calm", "swap", "calm after the swap", "kill", "calm after the kill", "redeploy", "calm at the end")


def run(world: World, seconds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        seconds: Of the whole soak, spread evenly over the phases.
        not_judged: As of `Result`.
    """
    config = {
        "benchmark": NAME,
        "candidates": 100,
        "users": world.num_users,
        "items": world.num_items,
        "replicas": NUM_REPLICAS,
        "seconds": seconds,
        "share of capacity": SHARE,
        "connections": NUM_PACED,
    }
    if reason := missing_tool():
        return Result(config, {}, {}, {}, (), reason)
    phase_s = max(seconds // len(PHASES), 1)
    with tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        data = write_world(name, world)
        uris = [write_checkpoint(f"{folder}/{seed}", *data, "low_rank", seed) for seed in (0, 1)]
        bodies = folder / "bodies"
        write_bodies(uris[0], bodies, 100)
        deployment = {"num_replicas": NUM_REPLICAS, "ray_actor_options": {"num_cpus": 0.5}}
        with Cluster(folder, uris[0], ha_proxy=True, deployment=deployment) as cluster:
            load(cluster.url, bodies, min(phase_s, 5), 4)  # warm
            tried = [load(cluster.url, bodies, min(phase_s, 10), number) for number in CONNECTIONS]
            capacity = max((t.requests_per_s for t in tried if t.p99_ms < MOST_P99_MS and not t.kinds), default=0.0)
            wanted = SHARE * (capacity or tried[0].requests_per_s)
            # A connection asks again after its answer and the pause.
            pause_ms = max(1000 * NUM_PACED / wanted - tried[0].p50_ms, 1.0)
            events = {
                "swap": lambda: cluster.rollout("--checkpoint_uri", uris[1]),
                "kill": lambda: _kill(cluster),
                "redeploy": lambda: _redeploy(cluster, uris[0]),
            }
            found: dict[str, Load] = {}
            memory: dict[str, float] = {}
            whole_s: dict[str, float] = {}
            for phase in PHASES:
                found[phase] = _phase(cluster, bodies, phase_s, pause_ms, events.get(phase))
                whole_s[phase] = _until_whole(cluster)
                memory[phase] = _memory_mib(cluster)
    return _result(config, capacity, wanted, found, memory, whole_s, not_judged)


def _phase(cluster: Cluster, bodies: Path, seconds: int, pause_ms: float, event: Callable[[], object] | None) -> Load:
    """Loads for so long, with something that happens after a moment; ends when both have ended.

    Raises:
        RuntimeError: The event failed.
    """
    troubles: list[BaseException] = []

    def happen() -> None:
        time.sleep(min(SETTLE_S, seconds / 3))
        try:
            event()
        except BaseException as error:  # told in the main thread
            troubles.append(error)

    thread = threading.Thread(target=happen) if event else None
    if thread:
        thread.start()
    found = load(cluster.url, bodies, seconds, NUM_PACED, pause_ms)
    if thread:
        thread.join()
    if troubles:
        raise RuntimeError(f"what was to happen under load failed: {troubles[0]}") from troubles[0]
    return found


def _until_whole(cluster: Cluster) -> float:
    """Waits until the replicas are whole, without load, and returns the seconds; at most `MOST_WHOLE_S`.

    Ray Serve keeps a replica that is to go for half a minute after its last request.
    """
    started = time.monotonic()
    while (took := time.monotonic() - started) < MOST_WHOLE_S:
        status = cluster.status()
        if status["status"] == "RUNNING" and status["replicas"] == {"RUNNING": NUM_REPLICAS}:
            break
        time.sleep(0.5)
    return took


def _kill(cluster: Cluster) -> None:
    os.kill(cluster.replicas()[0], signal.SIGKILL)


def _redeploy(cluster: Cluster, checkpoint_uri: str) -> None:
    (application,) = cluster.config["applications"]
    application["args"] |= {"checkpoint_uri": checkpoint_uri, "max_batch": 99}
    cluster.deploy()


def _memory_mib(cluster: Cluster) -> float:
    total = 0
    for pid in cluster.replicas():
        try:
            total += psutil.Process(pid).memory_full_info().pss
        except psutil.NoSuchProcess:  # one that was to go
            continue
    return total / 2**20


def _result(
    config: dict,
    capacity: float,
    wanted: float,
    found: dict[str, Load],
    memory: dict[str, float],
    whole_s: dict[str, float],
    why: str | None,
) -> Result:
    calm = [phase for phase in PHASES if phase not in EVENTS]
    medians = {
        f"capacity: requests/s at p99 < {MOST_P99_MS:.0f} ms": capacity,
        "wanted requests/s": wanted,
        "requests/s, median of the phases": statistics.median(loaded.requests_per_s for loaded in found.values()),
    }
    for phase, loaded in found.items():
        medians |= {
            f"{phase}: p50_ms": loaded.p50_ms,
            f"{phase}: p99_ms": loaded.p99_ms,
            f"{phase}: max_ms": loaded.max_ms,
            f"{phase}: failed requests": loaded.failed,
            f"{phase}: told to come back": loaded.told_to_come_back,
            **{f"{phase}: {kind}": number for kind, number in loaded.kinds.items()},
            f"{phase}: replicas' memory MiB": memory[phase],
            f"{phase}: s after it until replicas were whole": whole_s[phase],
        }
    ratios = {"replicas' memory: last calm phase / first": memory[calm[-1]] / memory[calm[0]]}
    lost = found["kill"].failed
    goals = (
        Goal("failed requests but for the kill", sum(f.failed for f in found.values()) - lost, "<=", 0),
        Goal("failed requests of the kill", lost, "<=", MOST_LOST),
        Goal("told to come back in the calm phases", sum(found[phase].told_to_come_back for phase in calm), "<=", 0),
        Goal("p99 ms of the calm phases, the worst", max(found[phase].p99_ms for phase in calm), "<", MOST_P99_MS),
        Goal("memory drift of the replicas", ratios["replicas' memory: last calm phase / first"] - 1, "<", MOST_DRIFT),
    )
    return Result(config, {}, medians, ratios, goals, why)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, help="of the soak; default 600, short 35")
    chosen = options.parse_args()
    world = served_world(chosen.short)
    seconds = chosen.seconds or (35 if chosen.short else 600)
    report(run(world, seconds, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
