"""What the meta networks cost: rows per second of LLM4MSR(STAR), low rank and full, against STAR alone.

The project's training loop in process, batch size 4096, one round after the other. User-level meta layers are made
once for each distinct user of a batch, so their cost follows from how many there are, and so does the gain of
``train.rows_per_user``, which keeps rows of one user together. All sides of a ratio read the same batches.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from benchmarks.train_sides import Side, config_of, default_threads, make_reader
from benchmarks.train_throughput import Figures, our_side
from benchmarks.train_world import World, write_world
from llm4msr.data.prepared import PreparedData

NAME = "train_meta"
BATCH_SIZE = 4096
NUM_EPOCHS = 2
ROWS_PER_USER = (1, 16)
WEIGHT_FORMS = ("low_rank", "full")


def make_side(world_uris: tuple[str, str], form: str | None, rows_per_user: int, threads: int) -> Side:
    """Returns a side that trains with one form of weights, STAR alone where it is None."""
    prepared_uri, knowledge_uri = world_uris
    train = {"batch_size": BATCH_SIZE, "max_epochs": NUM_EPOCHS, "patience": NUM_EPOCHS, "num_workers": 0}
    model = {"backbone": "star"} | ({"meta": {"weight_form": form}} if form else {})
    config = {"model": model, "train": train | {"rows_per_user": rows_per_user}}
    return Side("train", prepared_uri, knowledge_uri if form else None, config, threads)


def users_per_batch(side: Side) -> float:
    """Returns how many distinct users a batch of the first epoch has on average."""
    batches = make_reader(config_of(side), PreparedData.open(side.prepared_uri), ["user_row"]).epoch(0)
    return statistics.mean(len(np.unique(rows["user_row"])) for rows in batches)


def run(world: World, rounds: int, threads: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        rounds: Of each side.
        threads: Of torch.
        not_judged: As of `Result`.
    """
    figures, medians = Figures(), {}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        uris = write_world(folder, world)
        sides: dict[str, Callable[[], float]] = {}
        for rows_per_user, form in itertools.product(ROWS_PER_USER, (None, *WEIGHT_FORMS)):
            side, name = make_side(uris, form, rows_per_user, threads), side_name(form, rows_per_user)
            sides[name] = our_side(name, side, figures)
            medians[f"rows_per_user {rows_per_user}: distinct users in a batch"] = users_per_batch(side)
        resolved = json.loads(config_of(make_side(uris, "low_rank", 1, threads)).model_dump_json())
        seconds = interleave(sides, rounds, warm_up=False)
    rows_per_s = {name: rates(values, world.num_rows) for name, values in seconds.items()}
    medians |= {f"{name}: rows/s": statistics.median(values) for name, values in rows_per_s.items()}
    ratios = {
        f"{form} / STAR alone, rows_per_user {g}": paired_ratio(
            rows_per_s[side_name(form, g)], rows_per_s[side_name(None, g)]
        )
        for g, form in itertools.product(ROWS_PER_USER, WEIGHT_FORMS)
    }
    goals = tuple(
        Goal(
            f"LLM4MSR(STAR) {form} / STAR, rows_per_user {g}",
            ratios[f"{form} / STAR alone, rows_per_user {g}"],
            ">=",
            0.8,
        )
        for g, form in itertools.product(ROWS_PER_USER, WEIGHT_FORMS)
    )
    config = {
        "benchmark": NAME,
        "data": asdict(world) | {"num_buckets": world.num_buckets},
        "rounds": rounds,
        "threads": threads,
        "epochs": NUM_EPOCHS,
        "rate": "of the epochs after the first; seconds are of one epoch",
        "rows_per_user": ROWS_PER_USER,
        **{section: resolved[section] for section in ("model", "train")},
    }
    return Result(config, seconds, medians | figures.medians(), ratios, goals, not_judged)


def side_name(form: str | None, rows_per_user: int) -> str:
    """Returns the name of a side in the result."""
    return f"{'LLM4MSR(STAR) ' + form if form else 'STAR'}, rows_per_user {rows_per_user}"


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_rows", type=int, help="of train; default 500,000, short 60,000")
    options.add_argument("--rounds", type=int, help="of each side; default 5, short 1")
    options.add_argument("--threads", type=int, default=default_threads(), help="of torch; default one core less")
    chosen = options.parse_args()
    world = World(num_rows=chosen.num_rows or (60_000 if chosen.short else 500_000), num_users=5_000)
    rounds = chosen.rounds or (1 if chosen.short else 5)
    report(run(world, rounds, chosen.threads, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
