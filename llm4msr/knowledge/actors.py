"""The pool of actors that encode prompts: cutting the work into units, running them, and saying how far it is.

An actor commits what it encoded to the store itself, so vectors never travel through Ray and every finished unit
survives whatever happens next.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from llm4msr import storage
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.knowledge.encoder import Device, Encoder
from llm4msr.knowledge.model_files import EMBEDDED, EncoderError
from llm4msr.knowledge.prompts import PARTS, prompts_from_table
from llm4msr.knowledge.store import EncodedBatch, KnowledgeStore

PROGRESS_SECONDS = 5.0
# The embedded encoder runs one thread per actor: on two idle cores that is as fast as one actor of two threads (82
# prompts of 88 tokens per second), on busy ones at least twice as fast, since threads of one actor wait for each other.
# A model that may be large is not loaded once per core: one actor then takes up to this many CPUs.
MAX_CPUS_PER_ACTOR = 8

logger = logging.getLogger("llm4msr.knowledge")


@dataclass(frozen=True)
class Pool:
    """Actors and what each of them occupies.

    Attributes:
        num_actors: Actors.
        num_gpus: GPUs per actor, 0 or 1.
        num_cpus: CPUs per actor and torch threads of its process.
    """

    num_actors: int
    num_gpus: int
    num_cpus: int

    @property
    def device(self) -> Device:
        """Where the actors' models run."""
        return "cuda" if self.num_gpus else "cpu"


def plan_pool(config: KnowledgeConfig, num_gpus: int, num_cpus: int) -> Pool:
    """Returns the actors for a cluster: one per GPU, or without any, as many as its CPUs are good for.

    Args:
        config: `num_actors` where it is not "auto" is taken as it is.
        num_gpus: GPUs of the cluster.
        num_cpus: CPUs of the cluster.

    Raises:
        ConfigError: More actors are asked for than can ever run at once.
    """
    if num_gpus:
        num_actors = num_gpus if config.num_actors == "auto" else config.num_actors
        pool = Pool(num_actors, 1, max(1, min(num_cpus // num_actors, MAX_CPUS_PER_ACTOR)))
        available, kind = num_gpus, "GPUs"
    else:
        per_actor = 1 if config.model == EMBEDDED else min(num_cpus, MAX_CPUS_PER_ACTOR)
        num_actors = max(1, num_cpus // per_actor) if config.num_actors == "auto" else config.num_actors
        pool = Pool(num_actors, 0, max(1, min(num_cpus // num_actors, MAX_CPUS_PER_ACTOR)))
        available, kind = num_cpus, "CPUs"
    if pool.num_actors > available:
        raise ConfigError(
            f"knowledge.num_actors {pool.num_actors}: the cluster has {available} {kind}; give at most that"
        )
    return pool


def cut_units(
    keys: pa.Array, missing: pa.Array, files: Sequence[tuple[str, int]], rows_per_unit: int
) -> list[list[dict[str, Any]]]:
    """Cuts the prompts to be encoded into units of work; of equal prompts one is encoded.

    Args:
        keys: Keys of all prompts, file after file.
        missing: Distinct keys that must be encoded.
        files: (uri, number of prompts) of the prompt files, in the order of `keys`.
        rows_per_unit: Prompts per unit at most.

    Returns:
        Per unit the files it reads and which records of each: ``[{"uri": ..., "records": [...]}, ...]``.
    """
    place = pc.index_in(keys, value_set=missing)
    wanted = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    _, first = np.unique(place.filter(place.is_valid()).to_numpy(), return_index=True)
    wanted = wanted[np.sort(first)]
    ends = np.cumsum([num_rows for _, num_rows in files])
    units = []
    for start in range(0, len(wanted), rows_per_unit):
        records = wanted[start : start + rows_per_unit]
        owner = np.searchsorted(ends, records, side="right")
        units.append(
            [
                {"uri": files[f][0], "records": (records[owner == f] - (ends[f] - files[f][1])).tolist()}
                for f in np.unique(owner)
            ]
        )
    return units


class EncodeUnit:
    """One actor of the pool: loads the model once, then encodes and commits one unit of work after the other.

    Args:
        config: The language model.
        identity: As the driver found it.
        store_root: Directory of all knowledge stores.
        device: Where the model runs.
        num_threads: CPU threads of the model.
        on_batch: Told the number of prompts of each batch when it is done.

    Raises:
        EncoderError: The model on this node is not the driver's.
    """

    def __init__(
        self,
        config: KnowledgeConfig,
        identity: dict[str, Any],
        store_root: str,
        device: Device,
        num_threads: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._encoder = Encoder(config, device, num_threads)
        if self._encoder.identity != identity:
            raise EncoderError(
                f"knowledge.model {config.model!r} differs between nodes: the driver has {identity}, "
                f"{ray.util.get_node_ip_address()} has {self._encoder.identity}"
            )
        self._store = KnowledgeStore(store_root, identity)
        self._on_batch = on_batch

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Runs the units in column ``unit`` (JSON) and returns the failures (JSON) of each."""
        return pa.table({"failures": [json.dumps(self.run(json.loads(unit))) for unit in batch["unit"].to_pylist()]})

    def run(self, unit: list[dict[str, Any]]) -> dict[str, str]:
        """Encodes and commits one unit; returns the errors of prompts without a vector, by key."""
        table = pa.concat_tables(storage.read_parquet(f["uri"], ["key", *PARTS]).take(f["records"]) for f in unit)
        keys = table["key"].to_pylist()
        batch = self._encoder.encode(prompts_from_table(table), self._on_batch)
        good = np.flatnonzero([error is None for error in batch.errors])
        if len(good):
            kept = EncodedBatch(
                batch.vectors[good],
                batch.num_tokens[good],
                batch.num_dropped_events[good],
                batch.num_cut_characters[good],
                (None,) * len(good),
            )
            self._store.commit([keys[i] for i in good], kept)
        return {key: error for key, error in zip(keys, batch.errors, strict=True) if error}


def encode_units(
    units: Sequence[list[dict[str, Any]]],
    config: KnowledgeConfig,
    identity: dict[str, Any],
    store_root: str,
    pool: Pool,
) -> dict[str, str]:
    """Runs all units on a pool of actors, logging progress; returns the errors of prompts without a vector, by key."""
    total = sum(len(file["records"]) for unit in units for file in unit)
    counter = ray.remote(_Counter).options(num_cpus=0).remote()
    work = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    results = work.map_batches(
        EncodeUnit,
        fn_constructor_kwargs={
            "config": config,
            "identity": identity,
            "store_root": store_root,
            "device": pool.device,
            "num_threads": pool.num_cpus,
            "on_batch": lambda num_prompts: counter.add.remote(num_prompts),
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(pool.num_actors, len(units))),
        num_gpus=pool.num_gpus or None,
        num_cpus=pool.num_cpus,
    )
    failures: dict[str, str] = {}
    ended, started = threading.Event(), time.monotonic()
    watcher = threading.Thread(target=_log_progress, args=(counter, total, ended), daemon=True)
    watcher.start()
    try:
        for row in results.iter_rows():
            failures |= json.loads(row["failures"])
    finally:
        ended.set()
        watcher.join()
    logger.info("encoded all %d prompts in %.0f s", total, time.monotonic() - started)
    return failures


class _Counter:
    """Adds up what the actors have done; what a restarted actor does again counts again."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, number: int) -> None:
        self._total += number

    def total(self) -> int:
        return self._total


def _log_progress(counter: Any, total: int, ended: threading.Event) -> None:
    started = time.monotonic()
    while not ended.wait(PROGRESS_SECONDS):
        done = min(ray.get(counter.total.remote()), total)
        if not done:
            started = time.monotonic()  # the rate leaves out the time in which models are loaded
        logger.info(progress_line(done, total, time.monotonic() - started) if done else "loading the language model")


def progress_line(done: int, total: int, seconds: float) -> str:
    """Returns how far the encoding is, how fast, and when it should end.

    Args:
        done: Prompts encoded so far, at least one.
        total: Prompts to encode.
        seconds: Time it took.
    """
    rate = done / max(seconds, 1e-9)
    left = round((total - done) / rate)
    return f"encoded {done}/{total} prompts, {rate:.1f} prompts/s, {left // 60} min {left % 60} s left"
