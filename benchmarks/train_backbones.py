"""What each backbone costs in training: rows per second of its step, alone and with LLM4MSR (low rank) around it.

A step is the forward pass, the loss, the backward pass and the optimizers, over batches that lie ready in memory. All
models live in one process and take turns over the same rows, at the project's default widths. Reading, encoding and
validation are left out (`train_throughput`). Nothing is judged.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import torch
from rich.table import Table

from benchmarks.harness import Result, interleave, paired_ratio, parser, rates, report, wide_console
from benchmarks.train_meta import BATCH_SIZE
from benchmarks.train_sides import BareLoop, Side, collated_batches, config_of
from benchmarks.train_world import World, write_world
from llm4msr.config import Config
from llm4msr.config.model import Backbone
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import FeatureSchema

NAME = "train_backbones"
BACKBONES: tuple[str, ...] = get_args(Backbone)
BASELINE = "shared_bottom"


def run(
    world: World, backbones: Sequence[str], num_steps: int, rounds: int, threads: int, not_judged: str | None
) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        backbones: Which, `BASELINE` among them.
        num_steps: Steps of a round, each over another batch; fewer where an epoch has fewer.
        rounds: Of each side.
        threads: Of torch.
        not_judged: As of `Result`.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        prepared_uri, knowledge_uri = write_world(folder, world)
        prepared = PreparedData.open(prepared_uri)
        train = {"batch_size": BATCH_SIZE, "num_workers": 0}
        config = config_of(Side("floor", prepared_uri, knowledge_uri, {"train": train}, threads))
        tables = {False: None, True: KnowledgeTable.load(knowledge_uri)}
        batches = {
            knows: list(itertools.islice(collated_batches(config, prepared, knowledge), num_steps))
            for knows, knowledge in tables.items()
        }
        sides = {}
        for (backbone, knows), loop in make_loops(config, prepared.schema, backbones, tables[True]).items():
            loop.seconds(batches[knows][:1])  # the first step makes the optimizers' state
            sides[side_name(backbone, knows)] = functools.partial(loop.seconds, batches[knows])
    seconds = interleave(sides, rounds, warm_up=False)
    num_rows = sum(map(len, batches[False]))
    rows_per_s = {name: rates(values, num_rows) for name, values in seconds.items()}
    medians = {f"{name}: rows/s": statistics.median(values) for name, values in rows_per_s.items()}
    medians["distinct users in a batch"] = statistics.mean(len(batch.knowledge_UK) - 1 for batch in batches[True])
    ratios = {}
    for backbone in backbones:
        alone, known = side_name(backbone, False), side_name(backbone, True)
        ratios[f"{alone} / {BASELINE}"] = paired_ratio(rows_per_s[alone], rows_per_s[side_name(BASELINE, False)])
        ratios[f"{known} / {alone}"] = paired_ratio(rows_per_s[known], rows_per_s[alone])
    resolved = json.loads(config.model_dump_json(include={"model", "train"}, exclude={"model": {"backbone"}}))
    written = {
        "benchmark": NAME,
        "data": asdict(world) | {"num_buckets": world.num_buckets},
        "backbones": list(backbones),
        "steps of a round": len(batches[False]),
        "rows of a round": num_rows,
        "seconds": "of the steps of a round",
        "rounds": rounds,
        "threads": threads,
        **resolved,
    }
    return Result(written, seconds, medians, ratios, (), not_judged)


def make_loops(
    config: Config, schema: FeatureSchema, backbones: Sequence[str], table: KnowledgeTable
) -> dict[tuple[str, bool], BareLoop]:
    """Returns the loop of each backbone alone (False) and with LLM4MSR (True), all else as configured."""
    loops = {}
    for backbone, knows in itertools.product(backbones, (False, True)):
        model = config.model.model_copy(update={"backbone": backbone})
        chosen = config.model_copy(update={"model": model})
        loops[backbone, knows] = BareLoop(chosen, schema, table if knows else None)
    return loops


def side_name(backbone: str, knows: bool) -> str:
    """Returns the name of a side in the result."""
    return f"LLM4MSR({backbone})" if knows else backbone


def backbone_table(result: Result) -> Table:
    """Returns the rates of a run, one line a backbone, and their ratios: to the baseline, and with LLM4MSR to alone."""
    table = Table("backbone", "rows/s alone", f"/ {BASELINE}", "rows/s with LLM4MSR", "LLM4MSR / alone")
    for column in table.columns[1:]:
        column.justify = "right"
    for backbone in result.config["backbones"]:
        alone, known = side_name(backbone, False), side_name(backbone, True)
        table.add_row(
            backbone,
            f"{result.medians[f'{alone}: rows/s']:,.0f}",
            f"{result.ratios[f'{alone} / {BASELINE}']:.2f}",
            f"{result.medians[f'{known}: rows/s']:,.0f}",
            f"{result.ratios[f'{known} / {alone}']:.2f}",
        )
    return table


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_rows", type=int, help="of train; default 500,000, short 60,000")
    options.add_argument("--num_steps", type=int, help="of a round; default 10, short 2")
    options.add_argument("--rounds", type=int, help="of each side; default 7, short 1")
    options.add_argument("--threads", type=int, default=1, help="of torch")
    chosen = options.parse_args()
    world = World(num_rows=chosen.num_rows or (60_000 if chosen.short else 500_000), num_users=5_000)
    num_steps = chosen.num_steps or (2 if chosen.short else 10)
    rounds = chosen.rounds or (1 if chosen.short else 7)
    result = run(world, BACKBONES, num_steps, rounds, chosen.threads, "short form" if chosen.short else None)
    report(result, chosen.json)
    wide_console().print(backbone_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
