"""The cost of a step as the vocabulary grows: 100,000 items against 7 million, the same batch.

Forward, backward and optimizers of STAR, over batches that lie ready in memory. Item ids are Zipf-distributed, as in
logs, over ids in random order, so that popular rows lie anywhere in the table; for contrast they are uniform. The
tables' optimizers are the two of ``train.embedding_optimizer``, which touch the rows of the batch alone; for contrast,
gradients are dense and Adam walks the whole table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, report
from benchmarks.train_sides import default_threads
from benchmarks.train_world import NUM_SOURCES, TAGS_LENGTH, world_schema, zipf_indices
from llm4msr.batch import Batch
from llm4msr.config import ModelConfig
from llm4msr.models.llm4msr import build_model
from llm4msr.schema import FIRST_INDEX, FeatureSchema
from llm4msr.training.sparse import embedding_parameters
from llm4msr.training.trainer import SPARSE_OPTIMIZERS

NAME = "train_vocabulary"
VOCABULARIES = (100_000, 7_000_000)
SHORT_VOCABULARIES = (10_000, 100_000)
BATCH_SIZE = 4096
NUM_USERS = 10_000
LEARNING_RATE = 1e-3
DENSE = "dense Adam"
IDS = ("zipf", "uniform")


def make_batch(schema: FeatureSchema, item_B: np.ndarray, rng: np.random.Generator) -> Batch:
    """Returns a batch of the given items, its other features uniform."""
    size = len(item_B)
    columns = [
        item_B + FIRST_INDEX if f.name == "item_id" else rng.integers(FIRST_INDEX, f.num_embeddings, size)
        for f in schema.select("categorical")
    ]
    (tags,) = schema.select("sequence")
    scenario_B = rng.integers(0, len(schema.scenarios), size)
    columns[-1] = np.where(scenario_B == 1, rng.integers(FIRST_INDEX, NUM_SOURCES + FIRST_INDEX, size), 0)
    return Batch(
        ids_BF=torch.from_numpy(np.stack(columns, axis=1)),
        numeric_BN=torch.zeros(size, 0),
        sequences=(torch.from_numpy(rng.integers(0, tags.num_embeddings, (size, TAGS_LENGTH))),),
        scenario_B=torch.from_numpy(scenario_B),
        label_B=torch.from_numpy(rng.integers(0, 2, size).astype(np.float32)),
        row_id_B=torch.arange(size),
    )


def make_batches(vocabulary: int, ids: str, num_batches: int, batch_size: int) -> list[Batch]:
    """Returns batches whose items are drawn by Zipf's law or uniformly."""
    rng = np.random.default_rng(0)
    count = num_batches * batch_size
    if ids == "zipf":
        items = rng.permutation(vocabulary)[zipf_indices(rng, vocabulary, count)]
    else:
        items = rng.integers(0, vocabulary, count)
    schema = world_schema(NUM_USERS, vocabulary)
    return [make_batch(schema, item_B, rng) for item_B in items.reshape(num_batches, batch_size)]


class Stepper:
    """A model with one way to update its tables.

    Args:
        vocabulary: Items.
        optimizer: Key of `SPARSE_OPTIMIZERS`, or `DENSE`.
    """

    def __init__(self, vocabulary: int, optimizer: str) -> None:
        torch.manual_seed(0)
        self._model = build_model(world_schema(NUM_USERS, vocabulary), ModelConfig(backbone="star"), None)
        tables = embedding_parameters(self._model)
        dense = [p for name, p in self._model.named_parameters() if name not in tables]
        self._optimizers: list[Any] = [torch.optim.AdamW(dense, lr=LEARNING_RATE, fused=True)]
        if optimizer == DENSE:
            for module in self._model.modules():
                if isinstance(module, nn.Embedding):
                    module.sparse = False
            self._optimizers.append(torch.optim.Adam(tables.values(), lr=LEARNING_RATE, fused=True))
        else:
            self._optimizers.append(SPARSE_OPTIMIZERS[optimizer](list(tables.values()), lr=LEARNING_RATE))
        self._model.train()

    def seconds_per_step(self, batches: list[Batch]) -> float:
        """Steps over the batches; returns the mean seconds of one."""
        started = time.perf_counter()
        for batch in batches:
            logit_B, _ = self._model(batch)
            loss = nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
        return (time.perf_counter() - started) / len(batches)


def run(vocabularies: tuple[int, int], num_steps: int, rounds: int, threads: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        vocabularies: The small and the large number of items.
        num_steps: Steps of a round with sparse gradients; with dense ones there are a twentieth of it.
        rounds: Of each side.
        threads: Of torch.
        not_judged: As of `Result`.
    """
    torch.set_num_threads(threads)
    num_dense_steps = max(num_steps // 20, 2)
    sides, medians = {}, {}
    for vocabulary in vocabularies:
        batches = {ids: make_batches(vocabulary, ids, num_steps, BATCH_SIZE) for ids in IDS}
        item_column = [f.name for f in world_schema(1, 1).select("categorical")].index("item_id")
        for ids, drawn in batches.items():
            distinct = statistics.mean(len(batch.ids_BF[:, item_column].unique()) for batch in drawn)
            medians[f"{vocabulary:,} items, {ids}: distinct items in a batch"] = distinct
        for optimizer in (*SPARSE_OPTIMIZERS, DENSE):
            stepper = Stepper(vocabulary, optimizer)
            for ids in IDS if optimizer != DENSE else IDS[:1]:
                part = batches[ids][: num_dense_steps if optimizer == DENSE else None]
                sides[side_name(vocabulary, optimizer, ids)] = lambda s=stepper, p=part: s.seconds_per_step(p)
    seconds = interleave(sides, rounds)
    small, large = vocabularies
    ratios = {
        f"step time {large:,} / {small:,} items, {optimizer}, {ids}": paired_ratio(
            seconds[side_name(large, optimizer, ids)], seconds[side_name(small, optimizer, ids)]
        )
        for optimizer in (*SPARSE_OPTIMIZERS, DENSE)
        for ids in (IDS if optimizer != DENSE else IDS[:1])
    }
    goals = tuple(
        Goal(f"step time, {large // small}x the vocabulary, {name}", ratios[ratio_name(vocabularies, name)], "<", 1.3)
        for name in SPARSE_OPTIMIZERS
    )
    medians |= {f"{name}: ms a step": statistics.median(values) * 1e3 for name, values in seconds.items()}
    config = {
        "benchmark": NAME,
        "vocabularies": vocabularies,
        "zipf exponent": 1.0,
        "batch_size": BATCH_SIZE,
        "num_users": NUM_USERS,
        "steps of a round": {"sparse": num_steps, "dense": num_dense_steps},
        "seconds": "of one step",
        "rounds": rounds,
        "threads": threads,
        "model": json.loads(ModelConfig(backbone="star").model_dump_json()),
        "learning_rate": LEARNING_RATE,
    }
    return Result(config, seconds, medians, ratios, goals, not_judged)


def side_name(vocabulary: int, optimizer: str, ids: str) -> str:
    """Returns the name of a side in the result."""
    return f"{vocabulary:,} items, {optimizer}, {ids}"


def ratio_name(vocabularies: tuple[int, int], optimizer: str) -> str:
    """Returns the name of the ratio that is judged."""
    small, large = vocabularies
    return f"step time {large:,} / {small:,} items, {optimizer}, {IDS[0]}"


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_steps", type=int, help="of a round; default 100, short 5")
    options.add_argument("--rounds", type=int, help="of each side; default 7, short 1")
    options.add_argument("--threads", type=int, default=default_threads(), help="of torch; default one core less")
    chosen = options.parse_args()
    num_steps = chosen.num_steps or (5 if chosen.short else 100)
    rounds = chosen.rounds or (1 if chosen.short else 7)
    vocabularies, reason = (SHORT_VOCABULARIES, "short form") if chosen.short else (VOCABULARIES, None)
    report(run(vocabularies, num_steps, rounds, chosen.threads, reason), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
