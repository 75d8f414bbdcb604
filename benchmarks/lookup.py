"""What finding text ids costs each replica of a node: a dictionary of its own, or the mapped order of their hashes.

* ``dictionary``: text to row, built by every replica.
* ``mapped``: `llm4msr.lookup.KeyIndex` over a table as a node's copy of a checkpoint has it, which all replicas map.

Each side runs as two replicas at a time, processes of their own. Ids are random text of 16 characters; a lookup asks
for 1,000 of them, one in twenty unknown. Memory is what loading and looking up added to a process: ``own`` (USS) is
what another replica costs again, ``share`` (PSS) divides shared pages among the two. Of a mapped file only pages that
were read count; ``file bytes an id`` is what all of it would take, once a node.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.harness import Goal, Result, parser, report
from llm4msr.lookup import KeyIndex
from llm4msr.training.node_copy import map_table, write_table

NAME = "lookup"
SIDES = ("dictionary", "mapped")
SIZES, SHORT_SIZES = (1_000_000, 5_000_000), (50_000,)
NUM_REPLICAS, NUM_CANDIDATES, UNKNOWN_EACH, NUM_LOOKUPS = 2, 1000, 20, 200
MOST_MS, MOST_OWN_SHARE = 1.0, 0.1
MIB = 2**20


def run(sizes: Sequence[int], rounds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        sizes: Numbers of ids.
        rounds: Of each side and size.
        not_judged: As of `Result`.
    """
    seconds: dict[str, list[float]] = {}
    medians, ratios = {}, {}
    goals: list[Goal] = []
    for size in sizes:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory(prefix="llm4msr-") as name:
            folder = Path(name)
            write_table(folder, "user", pa.table({"key": make_ids(size)}))
            file_bytes = sum(path.stat().st_size for path in folder.iterdir())
            for _ in range(rounds):
                for side in SIDES:
                    found[side].append(measure(side, folder))
        for side, rows in found.items():
            seconds[f"{side}, {size} ids"] = [row["seconds"] for row in rows]
            medians[f"{side}, {size} ids: ms of a lookup"] = statistics.median(row["seconds"] for row in rows) * 1000
            for kind in ("own", "share"):
                medians[f"{side}, {size} ids: {kind} MiB of a replica"] = statistics.median(row[kind] for row in rows)
        medians[f"mapped, {size} ids: file bytes an id"] = file_bytes / size
        own = statistics.median(b["own"] / a["own"] for a, b in zip(*found.values(), strict=True))
        ratios[f"{size} ids: own memory, mapped / dictionary"] = own
        ratios[f"{size} ids: lookups/s, mapped / dictionary"] = statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(*found.values(), strict=True)
        )
        goals += [
            Goal(f"{size} ids: ms of a lookup of 1,000", medians[f"mapped, {size} ids: ms of a lookup"], "<", MOST_MS),
            Goal(f"{size} ids: own memory over that of a dictionary", own, "<", MOST_OWN_SHARE),
        ]
    config = {
        "benchmark": NAME,
        "ids": list(sizes),
        "characters of an id": 16,
        "replicas": NUM_REPLICAS,
        "ids of a lookup": NUM_CANDIDATES,
        "unknown among them": NUM_CANDIDATES // UNKNOWN_EACH,
        "seconds": f"of one lookup, median of {NUM_LOOKUPS} in each replica",
        "rounds": rounds,
    }
    return Result(config, seconds, medians, ratios, tuple(goals), not_judged)


def make_ids(number: int) -> pa.Array:
    """Returns sorted, distinct texts of 16 characters."""
    drawn = np.unique(np.random.default_rng(0).integers(0, 2**63, number + number // 100, dtype=np.int64))[:number]
    return pa.array([f"{one:016x}" for one in drawn.tolist()])


def measure(side: str, folder: Path) -> dict[str, float]:
    """Runs the replicas of one side together.

    Returns:
        Means over them: seconds of a lookup, and MiB by kind of memory.
    """
    context = multiprocessing.get_context("spawn")
    replicas = []
    for _ in range(NUM_REPLICAS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_replica, args=(theirs, side, folder), daemon=True)
        process.start()
        theirs.close()  # so that one that ends early ends the wait for it
        replicas.append((process, ours))
    for order in ("load", "look at memory", "look up"):  # all are where one is
        for _, pipe in replicas:
            pipe.send(order)
        answers = [pipe.recv() for _, pipe in replicas]
        if order == "look at memory":
            memory = answers
    for process, pipe in replicas:
        pipe.close()
        process.join()
    return {
        "seconds": statistics.mean(answers),
        "own": statistics.mean(own for own, _ in memory),
        "share": statistics.mean(share for _, share in memory),
    }


def open_side(side: str, folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns what looks ids up."""
    table, order = map_table(folder, "user")
    if side == "mapped":
        index = KeyIndex(table["key"], "string", order)
        return lambda keys: index(keys, "items")
    rows = {key: i for i, key in enumerate(table["key"].to_pylist(), start=1)}
    return lambda keys: np.fromiter(map(rows.get, keys, repeat(0)), np.int32, len(keys))


def draw(folder: Path, rng: np.random.Generator) -> list[str]:
    """Returns ids of one lookup, distinct strings each time, as they come out of a request's JSON."""
    keys = map_table(folder, "user")[0]["key"].chunk(0)
    drawn = keys.take(pa.array(rng.integers(0, len(keys), NUM_CANDIDATES))).to_pylist()
    return [f"no {key}" if i % UNKNOWN_EACH == 0 else key for i, key in enumerate(drawn)]


def _replica(pipe: Connection, side: str, folder: Path) -> None:
    rng = np.random.default_rng()
    draw(folder, rng)  # what everybody needs is loaded before memory is looked at
    pipe.recv()
    before = psutil.Process().memory_full_info()
    find = open_side(side, folder)
    for _ in range(10):
        find(draw(folder, rng))
    pipe.send(None)
    pipe.recv()
    after = psutil.Process().memory_full_info()
    pipe.send(((after.uss - before.uss) / MIB, (after.pss - before.pss) / MIB))
    pipe.recv()
    took = []
    for _ in range(NUM_LOOKUPS):
        keys = draw(folder, rng)
        started = time.perf_counter()
        find(keys)
        took.append(time.perf_counter() - started)
    pipe.send(statistics.median(took))


def main() -> int:
    """Runs the benchmark from the command line."""
    chosen = parser(NAME, __doc__.splitlines()[0]).parse_args()
    short = chosen.short
    sizes, rounds = (SHORT_SIZES, 1) if short else (SIZES, 3)
    report(run(sizes, rounds, "short form" if short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
