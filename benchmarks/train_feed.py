"""The feed alone: how fast batches come out of the files, with nobody training on them.

Three ways to the same collated batches, each shuffled in a buffer of train.shuffle_buffer_rows rows and collated in a
thread beside the one that takes them:

* feed_ours: `TrainReader` over Parquet row groups.
* feed_ray_streaming: Ray Data, which reads the files anew in tasks of its own every epoch.
* feed_ray_materialized: Ray Data, its blocks kept in the object store, which must hold all rows; block order new in
  every epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.train_sides import Side

FEEDS = ("feed_ours", "feed_ray_streaming", "feed_ray_materialized")
PREFETCHED_BATCHES = 4


def feed_here(side: Side) -> dict[str, Any]:
    """Takes all batches of train.max_epochs epochs.

    Returns:
        rows_per_s: of each epoch; num_rows: of an epoch; startup_s: before the first.
    """
    from benchmarks.train_sides import collated_batches, config_of
    from jobs.session import ray_session
    from llm4msr.data.prepared import PreparedData
    from llm4msr.knowledge.table import KnowledgeTable

    started = time.perf_counter()
    config, prepared = config_of(side), PreparedData.open(side.prepared_uri)
    knowledge = KnowledgeTable.load(side.knowledge_uri) if side.knowledge_uri else None
    if side.step == "feed_ours":
        return _take(config.train.max_epochs, lambda e: collated_batches(config, prepared, knowledge, e), started)
    with ray_session():
        batches = _ray_batches(side.step, config, prepared, knowledge)
        return _take(config.train.max_epochs, batches, started)


def _take(num_epochs: int, batches: Callable[[int], Iterator[Any]], started: float) -> dict[str, Any]:
    rates, num_rows = [], 0
    startup_s = time.perf_counter() - started
    for epoch in range(num_epochs):
        began = time.perf_counter()
        num_rows = sum(len(batch) for batch in batches(epoch))
        rates.append(num_rows / (time.perf_counter() - began))
    return {"rows_per_s": rates, "num_rows": num_rows, "startup_s": startup_s}


def _ray_batches(step: str, config: Any, prepared: Any, knowledge: Any) -> Callable[[int], Iterator[Any]]:
    import ray

    from benchmarks.train_sides import make_collator
    from llm4msr.training.reader import prefetch

    collator, train = make_collator(prepared, knowledge), config.train
    dataset = ray.data.read_parquet([uri for uri, _ in prepared.files("train")]).select_columns(collator.columns)
    if step == "feed_ray_materialized":
        dataset = dataset.materialize()

    def epoch_batches(epoch: int) -> Iterator[Any]:
        ordered = dataset.randomize_block_order(seed=epoch) if step == "feed_ray_materialized" else dataset
        rows = ordered.iter_batches(
            batch_size=train.batch_size,
            batch_format="numpy",
            prefetch_batches=PREFETCHED_BATCHES,
            local_shuffle_buffer_size=train.shuffle_buffer_rows,
            local_shuffle_seed=epoch,
        )
        return prefetch(iter(rows), collator, PREFETCHED_BATCHES)

    return epoch_batches
