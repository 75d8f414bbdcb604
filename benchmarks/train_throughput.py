"""Rows per second of the whole training loop, through Ray Train with one worker, against a floor and against peers.

All sides train on the same rows (`train_world`), in processes of their own, with the same number of torch threads:

* loop: the project's loop as a user runs it: reading, shuffling, encoding, steps, losses by scenario, logs. STAR,
  LLM4MSR(STAR) and shared_bottom.
* floor: the same model and optimizers over the same batches, ready in memory (`train_sides`).
* torch-rechub, fuxictr: the comparable network of each, fed and trained as its documentation shows (`train_peers`).
  They compare with shared_bottom: same features, vocabularies, widths, batch size.
* feed_*: batches that nobody trains on: ours, and Ray Data's (`train_feed`).

A rate is that of the epochs after the first; start-up, loading, validation and checkpoints are apart.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from benchmarks.train_feed import FEEDS
from benchmarks.train_peers import PEERS, make_environment, train_peer, write_tables
from benchmarks.train_sides import Side, config_of, default_threads, run_side
from benchmarks.train_world import World, write_world
from llm4msr.data.prepared import PreparedData

NAME = "train_throughput"
BATCH_SIZE = 4096
NUM_EPOCHS = 2
MODELS = {"star": ("star", False), "llm4msr(star)": ("star", True), "shared_bottom": ("shared_bottom", False)}
FLOORS = ("star", "llm4msr(star)")
PEER_GOALS = {"torch-rechub": 2.5, "fuxictr": 1.5}


def after_first(rows_per_s: Sequence[float]) -> float:
    """Returns the rate over the epochs after the first."""
    return len(rows_per_s[1:]) / sum(1 / rate for rate in rows_per_s[1:])


class Figures:
    """What the sides say beside their seconds, by side and figure."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, side: str, **values: float) -> None:
        """Notes one round of a side."""
        for name, value in values.items():
            self._values[side, name].append(value)

    def medians(self) -> dict[str, float]:
        """Returns the median over the rounds of each figure."""
        return {f"{side}: {name}": statistics.median(values) for (side, name), values in self._values.items()}


def our_side(name: str, side: Side, figures: Figures) -> Callable[[], float]:
    """Returns a side that runs in a process and counts the seconds of an epoch after the first."""

    def run() -> float:
        found = run_side(side)
        figures.add(name, **{"peak RSS MiB": found["peak_rss_bytes"] / 2**20})
        if "startup_s" in found:
            figures.add(name, **{"start-up s": found["startup_s"]})
        if "wait_s" in found:
            epoch_s = [found["num_rows"] / rate for rate in found["rows_per_s"]]
            waited = sum(found["wait_s"][1:]) / sum(epoch_s[1:])
            figures.add(name, **{"share of time waiting for data": waited, "valid AUC": found["valid_auc"][-1]})
        if found.get("subjects"):
            figures.add(name, **{"distinct users in a batch": found["subjects"]})
        return found["num_rows"] / after_first(found["rows_per_s"])

    return run


def peer_side(
    name: str, python: Path, tables: dict[str, Any], side: Side, folder: Path, figures: Figures
) -> Callable[[], float]:
    """Returns a side that trains with another library; `side` is ours that it compares with."""

    def run() -> float:
        found = train_peer(name, python, tables, config_of(side), folder, side.threads)
        figures.add(name, **{"start-up s": found["load_s"], "valid AUC": found["auc"]})
        return statistics.mean(found["epoch_s"][1:])

    return run


def run(world: World, rounds: int, threads: int, peers: Sequence[str], not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        rounds: Of each side.
        threads: Of torch.
        peers: Which of `PEERS` run.
        not_judged: As of `Result`.
    """
    figures = Figures()
    pythons = {name: make_environment(PEERS[name]) for name in peers}
    train = {"batch_size": BATCH_SIZE, "max_epochs": NUM_EPOCHS, "patience": NUM_EPOCHS, "num_workers": 1}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        prepared_uri, knowledge_uri = write_world(folder, world)

        def side(step: str, model: str) -> Side:
            backbone, knows = MODELS[model]
            config = {"model": {"backbone": backbone}, "train": train}
            return Side(step, prepared_uri, knowledge_uri if knows else None, config, threads)

        sides = {f"loop {model}": our_side(f"loop {model}", side("train", model), figures) for model in MODELS}
        sides |= {f"floor {model}": our_side(f"floor {model}", side("floor", model), figures) for model in FLOORS}
        if peers:
            tables = write_tables(PreparedData.open(prepared_uri), Path(folder) / "flat")
        for name, python in pythons.items():
            place = Path(folder) / name
            sides[name] = peer_side(name, python, tables, side("train", "shared_bottom"), place, figures)
        sides |= {feed: our_side(feed, side(feed, "llm4msr(star)"), figures) for feed in FEEDS}
        resolved = json.loads(config_of(side("train", "llm4msr(star)")).model_dump_json())
        seconds = interleave(sides, rounds, warm_up=False)
    rows_per_s = {name: rates(values, world.num_rows) for name, values in seconds.items()}
    ratios = {f"loop / floor, {m}": paired_ratio(rows_per_s[f"loop {m}"], rows_per_s[f"floor {m}"]) for m in FLOORS}
    for name in peers:
        for model in ("shared_bottom", "star"):
            ratios[f"loop {model} / {name}"] = paired_ratio(rows_per_s[f"loop {model}"], rows_per_s[name])
    for feed in FEEDS[1:]:
        ratios[f"{FEEDS[0]} / {feed}"] = paired_ratio(rows_per_s[FEEDS[0]], rows_per_s[feed])
    goals = [Goal(f"whole loop / bare loop, {m}", ratios[f"loop / floor, {m}"], ">=", 0.8) for m in FLOORS]
    goals += [
        Goal(f"whole loop, shared_bottom / {name}", ratios.get(f"loop shared_bottom / {name}"), ">=", target)
        for name, target in PEER_GOALS.items()
    ]
    config = {
        "benchmark": NAME,
        "data": asdict(world) | {"num_buckets": world.num_buckets},
        "rounds": rounds,
        "threads": threads,
        "epochs": NUM_EPOCHS,
        "rate": "of the epochs after the first; seconds are of one epoch",
        "peers": {n: asdict(PEERS[n]) | {"compares with": "shared_bottom", "loader processes": 1} for n in peers},
        **{section: resolved[section] for section in ("model", "train")},
    }
    medians = {f"{name}: rows/s": statistics.median(values) for name, values in rows_per_s.items()}
    return Result(config, seconds, medians | figures.medians(), ratios, tuple(goals), not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_rows", type=int, help="of train; default 1,000,000, short 60,000")
    options.add_argument("--rounds", type=int, help="of each side; default 5, short 1")
    options.add_argument("--threads", type=int, default=default_threads(), help="of torch; default one core less")
    options.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="other libraries to run")
    chosen = options.parse_args()
    world = World(num_rows=chosen.num_rows or (60_000 if chosen.short else 1_000_000))
    reason = "short form" if chosen.short else "not with all peers" if set(chosen.peers) != set(PEERS) else None
    rounds = chosen.rounds or (1 if chosen.short else 5)
    report(run(world, rounds, chosen.threads, chosen.peers, reason), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
