"""How long the ranker takes for one user's candidates, and how much of it the kept user layers save.

A model with knowledge of users, scenarios and items (STAR, random weights: speed does not depend on their values)
scores candidates drawn from 50,000 items, on one thread:

* ``kept``: `Ranker.rank` for users whose meta layers are there already; ``generated``: for users who come first.
* ``one call, layers a row``: the trained model called once with a full row per candidate, the user's layers regenerated
  for each row. This is the comparison of the goal.
* ``one call, layers once``: the same rows as training would have them, the layers generated once for the one user.
* ``a call a row``: the trained model called for each candidate by itself (fewer of them, the time scaled up).

The last three get batches that are encoded already. Low-rank and full meta layers are measured apart.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from benchmarks.train_world import World, write_world
from llm4msr import storage
from llm4msr.batch import Batch
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.llm4msr import build_model, set_knowledge
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.settings import config_from_dict
from llm4msr.training.checkpoint import load_checkpoint
from llm4msr.training.saving import save_checkpoint
from llm4msr.training.tensors import write_tensors

NAME = "ranker"
FORMS = ("low_rank", "full")
CANDIDATES = (100, 1000, 2000)
MOST_MS, LEAST_RATIO = 5.0, 20.0
SINGLE_ROWS = 50
OF_THE_GOAL = "one call, layers a row"
OTHERS = ("generated", OF_THE_GOAL, "one call, layers once", "a call a row")


def run(world: World, num_requests: int, rounds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        world: Size of the data.
        num_requests: Of a round of each side; a tenth for the sides that call the trained model.
        rounds: Of each side.
        not_judged: As of `Result`.
    """
    torch.set_num_threads(1)
    sides: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        prepared_uri, knowledge_uri = write_world(folder, world)
        for form in FORMS:
            checkpoint_uri = write_checkpoint(f"{folder}/{form}", prepared_uri, knowledge_uri, form)
            sides |= make_sides(form, checkpoint_uri, num_requests)
        seconds = interleave(sides, rounds)
    medians = {f"{name}: ms": statistics.median(values) * 1000 for name, values in seconds.items()}
    ratios = {}
    for form in FORMS:
        kept = rates(seconds[f"{form}, 1000, kept"], 1000)
        for other in OTHERS:
            ratios[f"{form}, 1000: rows/s kept / {other}"] = paired_ratio(
                kept, rates(seconds[f"{form}, 1000, {other}"], 1000)
            )
    goals = (
        Goal(
            "1,000 candidates, low rank, layers generated: ms", medians["low_rank, 1000, generated: ms"], "<", MOST_MS
        ),
        *(
            Goal(
                f"rows/s over one call of the model with layers for each row, {form}",
                ratios[f"{form}, 1000: rows/s kept / {OF_THE_GOAL}"],
                ">=",
                LEAST_RATIO,
            )
            for form in FORMS
        ),
    )
    config = {
        "benchmark": NAME,
        "data": {"users": world.num_users, "items": world.num_items, "knowledge_width": world.knowledge_width},
        "backbone": "star",
        "candidates": CANDIDATES,
        "requests of a round": num_requests,
        "seconds": "of one request, mean over a round",
        "rounds": rounds,
        "threads": 1,
    }
    return Result(config, seconds, medians, ratios, goals, not_judged)


def write_checkpoint(uri: str, prepared_uri: str, knowledge_uri: str, form: str, seed: int = 0) -> str:
    """Writes a checkpoint with random weights, whose items have knowledge too; returns its place."""
    prepared, users = PreparedData.open(prepared_uri), KnowledgeTable.load(knowledge_uri)
    num_items = prepared.items().num_rows
    items_NK = np.random.default_rng(0).normal(size=(num_items + 1, users.width)).astype(np.float16)
    items_NK[0] = 0
    table = replace(users, items_NK=items_NK, item_index_N=np.arange(num_items + 1, dtype=np.int32))
    config = config_from_dict(
        {
            "workspace_uri": "unused",
            "model": {"backbone": "star", "knowledge_match": True, "meta": {"weight_form": form}},
            "knowledge": {"levels": ["scenario", "user", "item"], "user_vectors": "items"},
        }
    )
    torch.manual_seed(seed)
    model = build_model(prepared.schema, config.model, table.width, True)
    set_knowledge(model, table)
    write_tensors(f"{uri}.safetensors", model.state_dict())
    metadata = {"model_version": f"{form}-{seed}", "backbone": "star", "knowledge": "llm"}
    save_checkpoint(uri, config, prepared, table, f"{uri}.safetensors", metadata)
    storage.remove(f"{uri}.safetensors")
    return uri


def make_sides(form: str, checkpoint_uri: str, num_requests: int) -> dict[str, Callable[[], float]]:
    """Returns the sides of one weight form; each returns the seconds of a request."""
    checkpoint = load_checkpoint(checkpoint_uri)
    ranker, rng = Ranker(checkpoint), np.random.default_rng(1)
    users, items = checkpoint.users["key"].to_pylist(), checkpoint.items["key"].to_pylist()

    def ask(num_candidates: int, forget: bool) -> float:
        total = 0.0
        for _ in range(num_requests):
            candidates = [items[i] for i in rng.choice(len(items), num_candidates, replace=False)]
            asked = RankRequest(users[rng.integers(100)], checkpoint.schema.scenario_names[0], candidates)
            if forget:
                ranker.user_layers.cache_clear()
            else:
                ranker.rank(RankRequest(asked.user, asked.scenario, candidates[:1]))
            started = time.perf_counter()
            ranker.rank(asked)
            total += time.perf_counter() - started
        return total / num_requests

    def call(batches: list[Batch], scale: float) -> float:
        repeats = max(num_requests // 10, 1)
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(repeats):
                for batch in batches:
                    checkpoint.model(batch)
        return (time.perf_counter() - started) / repeats * scale

    sides = {}
    for number in CANDIDATES:
        sides[f"{form}, {number}, kept"] = lambda number=number: ask(number, False)
        sides[f"{form}, {number}, generated"] = lambda number=number: ask(number, True)
    rows = candidate_rows(checkpoint, 1000)
    together = checkpoint.collator(rows)
    whole = regenerated(together)
    single = [
        checkpoint.collator({name: column[i : i + 1] for name, column in rows.items()}) for i in range(SINGLE_ROWS)
    ]
    sides[f"{form}, 1000, {OF_THE_GOAL}"] = lambda: call([whole], 1.0)
    sides[f"{form}, 1000, one call, layers once"] = lambda: call([together], 1.0)
    sides[f"{form}, 1000, a call a row"] = lambda: call(single, 1000 / SINGLE_ROWS)
    return sides


def candidate_rows(checkpoint, num_rows: int) -> dict[str, np.ndarray]:
    """Returns prepared rows of one user in one scenario."""
    item_row = np.random.default_rng(2).choice(checkpoint.items.num_rows, num_rows, replace=False) + 1
    fixed = {"user_row": 1, "scenario": 0, "label": 0, "search_source": 0}
    rows = {name: np.full(num_rows, value, np.int32) for name, value in fixed.items()}
    return {**rows, "row_id": np.arange(num_rows), "item_row": item_row.astype(np.int32)}


def regenerated(batch: Batch) -> Batch:
    """Returns a batch of one user's rows in which each row is a user of its own, so that layers are made for each."""
    vector_K = batch.knowledge_UK[batch.knowledge_index_B[0]]
    return replace(
        batch,
        knowledge_UK=torch.cat([batch.knowledge_UK[:1], vector_K.expand(len(batch), -1)]),
        knowledge_index_B=torch.arange(1, len(batch) + 1),
    )


def main() -> int:
    """Runs the benchmark from the command line."""
    chosen = parser(NAME, __doc__.splitlines()[0]).parse_args()
    world = World(num_rows=2_000, num_valid_rows=200) if not chosen.short else World(2_000, 500, 3_000, 200)
    short = chosen.short
    result = run(world, 5 if short else 50, 1 if short else 7, "short form" if short else None)
    report(result, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
