"""The pool of actors that encode prompts: how many, what one does with a unit of work, and running all units.

An actor commits what it encoded to the store itself, so vectors never travel through Ray and every finished unit
survives whatever happens next.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm4msr import logs, storage
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.knowledge.engines.build import build_engine
from llm4msr.knowledge.engines.interface import BatchDone, DeviceLostError, Engine, Hardware, OnBatch, failed_batch
from llm4msr.knowledge.engines.model_files import EMBEDDED, EncoderError
from llm4msr.knowledge.plan import num_planned
from llm4msr.knowledge.progress import LOADING, Monitor, Reading
from llm4msr.knowledge.prompts import PARTS, prompts_from_table
from llm4msr.knowledge.store import KnowledgeStore, keys_to_numpy
from llm4msr.placement import Node, alive_nodes, most_cpus, num_fitting

# The embedded encoder runs one thread per actor: on two idle cores that is as fast as one actor of two threads (82
# prompts of 88 tokens per second), on busy ones at least twice as fast, since threads of one actor wait for each other.
# A model that may be large is not loaded once per core: one actor then takes up to this many CPUs.
MAX_CPUS_PER_ACTOR = 8
UNITS_AHEAD = 2  # that wait at an actor, so that it never waits for one; more would leave others idle at the end
# On a CPU, torch and oneDNN keep up to 1,024 plans each, one per shape of a batch: half a gigabyte for the embedded
# model in bfloat16, and no faster. Read when the libraries are loaded, so it must stand in the process's environment.
CPU_ENVIRONMENT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}

# So often a unit may end its process (a lost GPU, the kernel's out-of-memory killer) before its prompts are given up.
MAX_ATTEMPTS = 4
# What is said of a unit that was committed: prompts without a vector, and those of scenarios among them.
DONE = pa.schema([("num_failed", pa.int64()), ("num_failed_scenarios", pa.int64())])

logger = logging.getLogger("llm4msr.knowledge")


@dataclasses.dataclass(frozen=True)
class Pool:
    """Actors and what each of them occupies.

    Attributes:
        min_actors: Actors that are always there.
        max_actors: Actors at most; the pool grows while units wait.
        num_gpus: GPUs per actor: 0, a share of one, or whole ones.
        num_cpus: CPUs per actor and torch threads of its process.
    """

    min_actors: int
    max_actors: int
    num_gpus: float
    num_cpus: int

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the actors' models run."""
        return "cuda" if self.num_gpus else "cpu"


def plan_pool(config: KnowledgeConfig, nodes: Sequence[Node]) -> Pool:
    """Returns the actors for a cluster: as many as its GPUs hold, or without any, as its CPUs are good for.

    Actors for GPUs that are not there yet ask for one CPU each, which any node with a GPU has, unless
    `cpus_per_actor` says more.

    Args:
        config: `num_actors` where it is not "auto" is taken as it is.
        nodes: Of the cluster as it is now; one that grows may have none yet.

    Raises:
        ConfigError: More actors are asked for than can run at once on a cluster that does not grow, or GPUs that are
            not there without saying how many actors.
    """
    num_gpus, share = sum(node.num_gpus for node in nodes), config.gpus_per_actor
    on_gpu = config.engine == "vllm" or (
        config.engine == "transformers" and (config.device == "cuda" or (config.device == "auto" and num_gpus > 0))
    )
    gpus = share if on_gpu else 0
    own_cpus = None if config.cpus_per_actor == "auto" else config.cpus_per_actor
    fit_on_gpus = num_fitting(nodes, own_cpus or 1, share)
    if config.num_actors != "auto":
        low, high = (config.num_actors,) * 2 if isinstance(config.num_actors, int) else config.num_actors
    elif on_gpu and not fit_on_gpus:
        raise ConfigError(
            f"knowledge.gpus_per_actor {share:g}: the cluster has {num_gpus} GPUs now, none free for that; on one "
            "that grows give knowledge.num_actors, for example [1, 8], so that its autoscaler knows how many to start"
        )
    elif on_gpu:
        low = high = fit_on_gpus
    elif config.engine == "openai":
        low = high = 1
    else:
        largest = max([node.num_cpus for node in nodes], default=0)
        wanted = own_cpus or min(MAX_CPUS_PER_ACTOR if config.model != EMBEDDED else 1, max(largest, 1))
        low = high = max(1, num_fitting(nodes, wanted, 0))
    ceiling = 1 if config.engine == "openai" else MAX_CPUS_PER_ACTOR
    at_once = max(low, min(high, fit_on_gpus)) if on_gpu else low
    per_actor = own_cpus or most_cpus(nodes, at_once, gpus, ceiling)
    fit = num_fitting(nodes, per_actor, gpus)
    if isinstance(config.num_actors, int) and low > fit:
        num_cpus = sum(node.num_cpus for node in nodes)
        have = f"{num_gpus} GPUs and {num_cpus} CPUs" if on_gpu else f"{num_cpus} CPUs"
        raise ConfigError(
            f"knowledge.num_actors {low}: the cluster has {have}, enough for {fit} with {per_actor} CPUs each; give at "
            "most that, or [fewest, most] on a cluster that grows"
        )
    return Pool(low, high, gpus, per_actor)


def waited_for(pool: Pool, nodes: Sequence[Node]) -> str | None:
    """Returns what the autoscaler has to start before the fewest actors can run; None where they have room now."""
    room = num_fitting(nodes, pool.num_cpus, pool.num_gpus)
    if room >= pool.min_actors:
        return None
    each = f"{pool.num_cpus} CPUs" + (f" and {pool.num_gpus:g} GPUs" if pool.num_gpus else "")
    return f"nodes for {pool.min_actors - room} of {pool.min_actors} actors, {each} each"


class EncodeUnit:
    """One actor of the pool: loads the model once, then encodes and commits one unit of work after the other.

    Args:
        config: The language model; its dtype is resolved.
        identity: As the driver found it.
        store_root: Directory of all knowledge stores.
        files: URIs of the files of prompts.
        device: Where the model runs.
        num_threads: CPU threads of the model.
        num_actors: Actors that share the rate limits of an endpoint.
        on_begin: Told the name of each unit before it is run; returns how often it was told that name.
        on_ready: Told what the actor runs on once its model is loaded.
        on_batch: Told after each batch what it did.

    """

    def __init__(
        self,
        config: KnowledgeConfig,
        identity: dict[str, Any],
        store_root: str,
        files: tuple[str, ...],
        device: Literal["cpu", "cuda"],
        num_threads: int,
        num_actors: int = 1,
        on_begin: Callable[[str], int] | None = None,
        on_ready: Callable[[Hardware], None] | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        self._config, self._identity = config, identity
        self._place = (device, num_threads, num_actors)
        self._store = KnowledgeStore(store_root, identity)
        self._files = files
        self._on_begin, self._on_ready, self._on_batch = on_begin, on_ready, on_batch
        self._engine: Engine | None = None
        logs.describe(stage="extract")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Runs the units in column ``unit``; returns a row of schema `DONE` for each."""
        return pa.Table.from_pylist([self.run(unit) for unit in batch["unit"].to_pylist()], schema=DONE)

    def run(self, unit: list[dict[str, Any]]) -> dict[str, int]:
        """Encodes and commits one unit, unless it was committed; returns the fields of `DONE`.

        Raises:
            EncoderError: The model on this node is not the driver's, or cannot be loaded.
        """
        table = read_unit(self._files, unit)
        keys = keys_to_numpy(table["key"])
        uri = self._store.part_uri(keys)
        if storage.exists(uri):
            errors = storage.read_parquet(uri, ["error"])["error"]
            if errors.null_count == len(errors):
                return dict.fromkeys(DONE.names, 0)  # by an actor that died before it could say so
        if self._on_begin is not None and self._on_begin(uri) > MAX_ATTEMPTS:
            batch = failed_batch(len(table), f"its unit ended {MAX_ATTEMPTS} processes; see the logs of the actors")
        else:
            try:
                batch = self._loaded().encode(prompts_from_table(table), self._on_batch)
            except DeviceLostError:
                logger.exception("this process is of no more use: it ends, and Ray starts another")
                os._exit(1)
        self._store.commit(keys, batch)
        failed = [level for level, error in zip(table["level"].to_pylist(), batch.errors, strict=True) if error]
        return {"num_failed": len(failed), "num_failed_scenarios": failed.count("scenario")}

    def _loaded(self) -> Engine:
        """Returns the engine, loaded on first use: what goes wrong then reaches the driver as it was raised."""
        if self._engine is None:
            engine = build_engine(self._config, *self._place)
            if engine.identity != self._identity:
                raise EncoderError(
                    f"knowledge.model {self._config.model!r} differs between nodes: the driver has {self._identity}, "
                    f"{ray.util.get_node_ip_address()} has {engine.identity}"
                )
            self._engine = engine
            logger.info("language model loaded on %s", engine.hardware.device)
            if self._on_ready is not None:
                self._on_ready(engine.hardware)
        return self._engine


def read_unit(files: tuple[str, ...], unit: list[dict[str, Any]]) -> pa.Table:
    """Returns the prompts of one unit: columns key and `prompts.PARTS`."""
    return pa.concat_tables(storage.read_rows(files[part["file"]], ["key", *PARTS], part["records"]) for part in unit)


def encode_units(
    units: pa.Table,
    files: tuple[str, ...],
    config: KnowledgeConfig,
    identity: dict[str, Any],
    store_root: str,
    pool: Pool,
    tensorboard_uri: str,
    max_failed: int,
) -> tuple[Reading, bool]:
    """Runs all units on a pool of actors, logging progress.

    Args:
        units: Rows of `plan.PLAN`.
        files: URIs of the files of prompts.
        config: The language model; its dtype is resolved.
        identity: Of the engine.
        store_root: Directory of all knowledge stores.
        pool: The actors.
        tensorboard_uri: Directory for TensorBoard's files.
        max_failed: With more prompts without a vector there is no point in going on.

    Returns:
        What was achieved, and whether all units were run: not where more than `max_failed` prompts, or one of a
        scenario, got no vector.

    Raises:
        EncoderError: The model cannot be used.
    """
    total = num_planned(units)
    # The figures die with the driver's node, if at all, and are never a reason to fail.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    tally: Any = ray.remote(_Tally).options(**options).remote()  # Ray's types lack its methods' .remote
    work = ray.data.from_arrow([units.slice(i, 1).combine_chunks() for i in range(len(units))])
    share = min(1.0, pool.num_gpus) or 1.0  # of a device, and so of its peak

    def on_ready(hardware: Hardware) -> None:
        peak = hardware.peak_flops and hardware.peak_flops * share
        tally.ready.remote(dataclasses.replace(hardware, peak_flops=peak))

    def on_batch(done: BatchDone) -> None:
        tally.add.remote(done)

    if config.engine == "vllm":
        from llm4msr.knowledge.vllm_units import encode_rows

        tally.ready.remote(Hardware("vllm"))
        read, limits = functools.partial(read_unit, files), (pool.min_actors, pool.max_actors)
        results = encode_rows(work, read, config, identity, store_root, limits, on_batch)
    else:
        results = work.map_batches(
            EncodeUnit,
            fn_constructor_kwargs={
                "config": config,
                "identity": identity,
                "store_root": store_root,
                "files": files,
                "device": pool.device,
                "num_threads": pool.num_cpus,
                "num_actors": pool.max_actors,
                "on_begin": lambda name: ray.get(tally.begin.remote(name)),
                "on_ready": on_ready,
                "on_batch": on_batch,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.min_actors, len(units)),
                max_size=min(pool.max_actors, len(units)),
                max_tasks_in_flight_per_actor=UNITS_AHEAD,
            ),
            num_gpus=pool.num_gpus or None,
            num_cpus=pool.num_cpus,
            runtime_env={"env_vars": CPU_ENVIRONMENT} if pool.device == "cpu" else None,
        )
    if lacking := waited_for(pool, alive_nodes(ray.nodes())):
        logger.warning(
            "waiting for %s: the cluster does not have them now; `ray status` says what is on its way", lacking
        )
    until_ready = f"waiting for {lacking}" if lacking else LOADING
    num_failed, complete = 0, True
    started = time.monotonic()
    with Monitor(lambda: ray.get(tally.read.remote()), total, tensorboard_uri, until_ready):
        for row in results.iter_rows():
            num_failed += row["num_failed"]
            if num_failed > max_failed or row["num_failed_scenarios"]:
                complete = False
                break
    reading = ray.get(tally.read.remote())
    logger.info("encoded %d prompts in %.0f s", reading.done.num_prompts, time.monotonic() - started)
    return reading, complete


class _Tally:
    """Adds up what the actors report; what a replaced actor does again counts again."""

    def __init__(self) -> None:
        self._done = BatchDone()
        self._hardware: Hardware | None = None
        self._ready: list[float] = []
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]

    def ready(self, hardware: Hardware) -> None:
        self._hardware = self._hardware or hardware
        self._ready.append(time.monotonic())

    def add(self, done: BatchDone) -> None:
        if not self._ready:  # this process replaces one that died
            self._ready.append(time.monotonic())
        self._done += done

    def read(self) -> Reading:
        elapsed = [time.monotonic() - moment for moment in self._ready]
        return Reading(self._done, max(elapsed, default=0.0), self._hardware, len(elapsed), sum(elapsed))
