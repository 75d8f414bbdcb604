"""Training on ten times the rows: time of an epoch and peak memory of the worker, 1 M rows against 10 M.

One worker of Ray Train, one epoch, each size in a process of its own. Users, items and the model stay the same: only
the rows grow, which is what must not cost memory. The model is small (`MODEL`), so that reading, shuffling and
encoding are a large part of the time. Ray's start, the tables, validation and checkpoints are apart (start-up).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from benchmarks.train_sides import Side, config_of, default_threads, run_side
from benchmarks.train_throughput import Figures
from benchmarks.train_world import World, write_world

NAME = "train_growth"
GROWTH = 10
MODEL = {"backbone": "shared_bottom", "embedding_dim": 4, "hidden_dims": [16], "tower_dims": [8]}
TRAIN = {"batch_size": 8192, "max_epochs": 1, "num_workers": 1}


def run(world: World, rounds: int, threads: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: The smaller data.
        rounds: Of each size.
        threads: Of torch.
        not_judged: As of `Result`.
    """
    worlds = {"n": world, f"{GROWTH}n": replace(world, num_rows=GROWTH * world.num_rows)}
    figures = Figures()
    peaks: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        sides: dict[str, Callable[[], float]] = {}
        for size, of_size in worlds.items():
            prepared_uri, _ = write_world(str(Path(folder) / size), of_size)
            side = Side("train", prepared_uri, None, {"model": MODEL, "train": TRAIN}, threads)

            def train(size: str = size, side: Side = side) -> float:
                found = run_side(side)
                peaks[size].append(found["peak_rss_bytes"])
                epoch_s = found["num_rows"] / found["rows_per_s"][0]
                figures.add(
                    size,
                    **{
                        "peak RSS of the worker, MiB": found["peak_rss_bytes"] / 2**20,
                        "start-up s": found["startup_s"],
                        "share of time waiting for data": found["wait_s"][0] / epoch_s,
                        "valid AUC": found["valid_auc"][0],
                    },
                )
                return epoch_s

            sides[size] = train
        resolved = json.loads(config_of(side).model_dump_json())
        seconds = interleave(sides, rounds, warm_up=False)
    small, large = worlds
    ratios = {
        "time of an epoch, 10n / n": paired_ratio(seconds[large], seconds[small]),
        "peak RSS of the worker, 10n / n": paired_ratio(peaks[large], peaks[small]),
    }
    medians = {
        f"{size}: rows/s": statistics.median(rates(values, worlds[size].num_rows)) for size, values in seconds.items()
    }
    goals = (
        Goal("time of an epoch, 10x the rows", ratios["time of an epoch, 10n / n"], "<", 10.5),
        Goal("peak RSS of the worker, 10x the rows", ratios["peak RSS of the worker, 10n / n"], "<", 1.2),
    )
    config = {
        "benchmark": NAME,
        "data": {size: asdict(w) | {"num_buckets": w.num_buckets} for size, w in worlds.items()},
        "rounds": rounds,
        "threads": threads,
        "memory": "VmHWM of the process that trains",
        **{section: resolved[section] for section in ("model", "train")},
    }
    return Result(config, seconds, medians | figures.medians(), ratios, goals, not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_rows", type=int, help="n; default 1,000,000, short 50,000")
    options.add_argument("--rounds", type=int, help="of each size; default 5, short 1")
    options.add_argument("--threads", type=int, default=default_threads(), help="of torch; default one core less")
    chosen = options.parse_args()
    world = World(num_rows=chosen.num_rows or (50_000 if chosen.short else 1_000_000))
    rounds = chosen.rounds or (1 if chosen.short else 5)
    report(run(world, rounds, chosen.threads, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
