"""Scaling: rows per second of one worker and of two, one torch thread each, at the same global batch size.

STAR through Ray Train. Each worker reads and encodes in a thread of its own, so on a machine of two cores the workers
compete with these threads for them: what is lost to that is part of the figure. Efficiency is reported as it is.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import asdict

from benchmarks.harness import Result, interleave, paired_ratio, parser, rates, report
from benchmarks.train_sides import Side, config_of
from benchmarks.train_throughput import Figures, our_side
from benchmarks.train_world import World, write_world

NAME = "train_workers"
BATCH_SIZES = (4096, 16384)
WORKERS = (1, 2)
NUM_EPOCHS = 2
THREADS = 1


def make_side(prepared_uri: str, batch_size: int, num_workers: int) -> Side:
    """Returns a side that trains with some workers."""
    train = {"batch_size": batch_size, "num_workers": num_workers, "max_epochs": NUM_EPOCHS, "patience": NUM_EPOCHS}
    return Side("train", prepared_uri, None, {"model": {"backbone": "star"}, "train": train}, THREADS)


def run(world: World, rounds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        rounds: Of each side.
        not_judged: As of `Result`.
    """
    figures = Figures()
    cases = {f"{n} workers, batch {b}": (b, n) for b, n in itertools.product(BATCH_SIZES, WORKERS)}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        prepared_uri, _ = write_world(folder, world)
        sides = {name: our_side(name, make_side(prepared_uri, *case), figures) for name, case in cases.items()}
        resolved = json.loads(config_of(make_side(prepared_uri, BATCH_SIZES[0], WORKERS[0])).model_dump_json())
        seconds = interleave(sides, rounds, warm_up=False)
    rows_per_s = {name: rates(values, world.num_rows) for name, values in seconds.items()}
    few, many = WORKERS
    ratios = {}
    for batch_size in BATCH_SIZES:
        pair = (rows_per_s[f"{n} workers, batch {batch_size}"] for n in (many, few))
        speedup = paired_ratio(*pair)
        ratios[f"{many} workers / {few}, batch {batch_size}"] = speedup
        ratios[f"scaling efficiency {few} -> {many}, batch {batch_size}"] = speedup * few / many
    config = {
        "benchmark": NAME,
        "data": asdict(world) | {"num_buckets": world.num_buckets},
        "rounds": rounds,
        "threads of each worker": THREADS,
        "batch sizes, over all workers": BATCH_SIZES,
        "workers": WORKERS,
        "epochs": NUM_EPOCHS,
        "rate": "of the epochs after the first; seconds are of one epoch",
        **{section: resolved[section] for section in ("model", "train")},
    }
    medians = {f"{name}: rows/s": statistics.median(values) for name, values in rows_per_s.items()}
    return Result(config, seconds, medians | figures.medians(), ratios, (), not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_rows", type=int, help="of train; default 500,000, short 60,000")
    options.add_argument("--rounds", type=int, help="of each side; default 5, short 1")
    chosen = options.parse_args()
    world = World(num_rows=chosen.num_rows or (60_000 if chosen.short else 500_000), num_users=5_000)
    rounds = chosen.rounds or (1 if chosen.short else 5)
    report(run(world, rounds, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
