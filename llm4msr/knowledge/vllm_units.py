"""Units of work through vLLM: read into rows, encoded by vLLM's own actors, and committed in groups.

vLLM schedules rows, not units, so a commit holds whatever rows were ready together. What was committed is still never
computed again; but an actor that was thought dead could commit a key a second time, with the same vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.interface import BatchDone, EncodedBatch, OnBatch
from llm4msr.knowledge.engines.vllm import encode_dataset
from llm4msr.knowledge.store import COUNTS, KnowledgeStore, keys_to_numpy

if TYPE_CHECKING:
    import ray.data


def encode_rows(
    work: ray.data.Dataset,
    read: Callable[[list[dict[str, Any]]], pa.Table],
    config: KnowledgeConfig,
    identity: dict[str, Any],
    store_root: str,
    num_actors: tuple[int, int],
    on_batch: OnBatch,
    build: Callable[..., Any] | None = None,
) -> ray.data.Dataset:
    """Returns a row of schema `actors.DONE` for each group, as it is committed.

    Args:
        work: Rows of `plan.PLAN`.
        read: Returns the prompts of one unit.
        config: The language model.
        identity: Of the engine.
        store_root: Directory of all knowledge stores.
        num_actors: vLLM engines, fewest and most.
        on_batch: Told after each commit what was done.
        build: As of `vllm.encode_dataset`.
    """
    rows = work.map_batches(
        lambda batch: pa.concat_tables([read(unit) for unit in batch["unit"].to_pylist()]),
        batch_size=1,
        batch_format="pyarrow",
    )
    return encode_dataset(rows, config, num_actors, build).map_batches(
        commit_rows,  # type: ignore[arg-type]  # Ray's types know no function with fn_kwargs
        batch_size=config.rows_per_commit,
        batch_format="pyarrow",
        fn_kwargs={"identity": identity, "store_root": store_root, "on_batch": on_batch},
    )


def commit_rows(table: pa.Table, identity: dict[str, Any], store_root: str, on_batch: OnBatch) -> pa.Table:
    """Commits rows of schema `vllm.ENCODED`; returns one row of schema `actors.DONE`."""
    batch = encoded_batch(table)
    KnowledgeStore(store_root, identity).commit(keys_to_numpy(table["key"]), batch)
    num_failed = sum(error is not None for error in batch.errors)
    num_tokens = int(batch.num_tokens.sum())
    on_batch(BatchDone(len(table), num_failed, num_tokens, num_tokens, int(batch.num_generated_tokens.sum())))
    # Which of them are scenarios is found out at the end.
    return pa.table({"num_failed": pa.array([num_failed]), "num_failed_scenarios": pa.array([0])})


def encoded_batch(table: pa.Table) -> EncodedBatch:
    """Returns rows of schema `vllm.ENCODED` as arrays."""
    errors = table["error"].to_pylist()
    good = np.flatnonzero([error is None for error in errors])
    values = (
        table["vector"].combine_chunks().drop_null().flatten().to_numpy().reshape(len(good), -1) if len(good) else None
    )
    vectors = np.zeros((len(table), 0 if values is None else values.shape[1]), np.float32)
    if values is not None:
        vectors[good] = values
    counts = {name: table[name].to_numpy().astype(np.int32) for name in COUNTS}
    return EncodedBatch(vectors=vectors, errors=tuple(errors), texts=tuple(table["text"].to_pylist()), **counts)
