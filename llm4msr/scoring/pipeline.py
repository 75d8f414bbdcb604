"""The Ray job behind `jobs.score`: the rows of a batch, scored by a pool of actors that hold one `Ranker` each.

Ray Data only hands out units of work (`llm4msr.scoring.plan`) and brings counts back; an actor reads its rows and
commits its scores itself (`llm4msr.scoring.units`). A job that is killed loses the units at work; the same command
does what is missing and nothing else.

Layout of the output: plan.json (what is scored, and how it was cut), scores/part-*.parquet (`tables.list_results` or
`tables.pair_results`, with model_version in their metadata; in order of names they hold the order of the input),
errors/part-*.parquet (`tables.ERRORS`; only of units that have any), manifest.json.

A row that cannot be scored is data, not a crash; beyond `score.max_failed_fraction` the job fails. Memory: an actor
holds its model, the rows of one unit with their answers, and one row group of the input. Ray is initialised by the
caller.
"""

from __future__ import annotations

import logging
import math
import time
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from llm4msr import storage
from llm4msr.config import Config, ConfigError, ScoreConfig
from llm4msr.data.source import DataError
from llm4msr.scoring.plan import (
    choose_rows_per_unit,
    chosen_scenarios,
    cut_units,
    open_input,
    open_model,
    open_plan,
    read_candidates,
)
from llm4msr.scoring.units import ERRORS_DIRECTORY, SCORES_DIRECTORY, ScoreUnit, Task

UNITS_AHEAD = 2  # that wait at an actor, so that it never waits for one
SECONDS_BETWEEN_LINES = 5

logger = logging.getLogger("llm4msr.scoring")


def score(config: Config) -> str:
    """Scores a batch; what was scored before is not scored again.

    Args:
        config: The whole configuration; `config.score` says what is scored.

    Returns:
        The finished directory.

    Raises:
        StorageError: The checkpoint or the input is missing or damaged.
        DataError: The input cannot be used, or too many of its rows.
        ConfigError: A scenario is unknown, something else lies at the output, or no node has room for an actor.
    """
    started = time.monotonic()
    settings = config.score
    model = open_model(config)
    rows = open_input(settings, model)
    task: dict[str, Any] = {
        "checkpoint_uri": model.uri,
        "model_version": model.version,
        "kind": rows.kind,
        "columns": rows.columns,
    }
    num_candidates = 1
    if rows.kind == "users":
        candidates_uri = settings.candidates_uri and storage.absolute(settings.candidates_uri)
        scenarios = chosen_scenarios(settings, model.schema)
        num_items = len(read_candidates(candidates_uri, model.schema)) if candidates_uri else model.num_items
        num_candidates = num_items * len(scenarios)
        task |= {"scenarios": scenarios, "top_k": settings.top_k, "candidates_uri": candidates_uri}
    num_actors = count_actors(settings, [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]])
    rows_per_unit = choose_rows_per_unit(settings, rows, num_candidates, num_actors)
    uri, plan = open_plan(config, model, rows, rows_per_unit)
    if storage.is_finished(uri):
        logger.info("%s is up to date", uri)
        return uri
    units = cut_units(rows, plan["rows_per_unit"])
    num_failed = _run(units, Task(output_uri=uri, **task), settings, num_actors)
    manifest = {
        "kind": "scores",
        **plan,
        "model_version": model.version,
        "checkpoint_uri": model.uri,
        "num_rows": sum(rows.num_rows),
        "num_failed": num_failed,
        "num_files": len(units),
        "config": config.model_dump(mode="json"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
    }
    storage.write_manifest(uri, manifest)
    logger.info("%s: scores of %d %s by %s, %d failed", uri, sum(rows.num_rows), rows.kind, model.version, num_failed)
    return uri


def count_actors(settings: ScoreConfig, cpus_of_nodes: list[int]) -> int:
    """Returns how many actors score.

    Raises:
        ConfigError: Not one fits on any node.
    """
    if settings.num_actors != "auto":
        return settings.num_actors
    fit = sum(num_cpus // settings.cpus_per_actor for num_cpus in cpus_of_nodes)
    if not fit:
        raise ConfigError(
            f"score.cpus_per_actor {settings.cpus_per_actor}: no node has so many CPUs now, the largest has "
            f"{max(cpus_of_nodes, default=0)}; on a cluster that grows give score.num_actors"
        )
    return fit


def _run(units: pa.Table, task: Task, settings: ScoreConfig, num_actors: int) -> int:
    """Does the units that are not done; returns how many rows of all units failed.

    Raises:
        DataError: More failed than may.
        StorageError: A unit could not be done.
    """
    done, num_failed = _done(task.output_uri)
    missing = units.filter(pc.invert(pc.is_in(units["unit"], pa.array(sorted(done), pa.int64()))))
    num_rows = pc.sum(units["num_rows"]).as_py()
    most = math.floor(settings.max_failed_fraction * num_rows)
    num_scored, num_candidates, num_left = 0, 0, pc.sum(missing["num_rows"]).as_py() or 0
    logger.info(
        "%d %s, %d to score in %d units with %s on %d actors",
        *(num_rows, task.kind, num_left, len(missing), task.model_version, min(num_actors, max(len(missing), 1))),
    )
    if len(missing) and num_failed <= most:
        started = said = time.monotonic()
        for row in _scored(missing, task, settings, num_actors).iter_rows():
            if row["error"]:
                raise storage.StorageError(row["error"])
            num_scored += row["num_rows"]
            num_failed += row["num_failed"]
            num_candidates += row["num_candidates"]
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_LINES or num_scored == num_left:
                said, rate = now, num_candidates / max(now - started, 1e-9)
                logger.info(
                    "scored %d of %d %s, %d candidates, %.0f candidates/s, %d failed",
                    *(num_scored, num_left, task.kind, num_candidates, rate, num_failed),
                )
            if num_failed > most:
                break
    if num_failed > most:
        raise DataError(_too_many(task, num_failed, num_rows, settings.max_failed_fraction))
    return num_failed


def _scored(units: pa.Table, task: Task, settings: ScoreConfig, num_actors: int) -> ray.data.Dataset:
    """Returns the rows `units.DONE` of all units; reading them does the work."""
    work = ray.data.from_arrow([units.slice(i, 1).combine_chunks() for i in range(len(units))])
    size = min(num_actors, len(units))
    return work.map_batches(
        ScoreUnit,
        fn_constructor_kwargs={"task": task, "num_threads": settings.cpus_per_actor},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=size, max_size=size, max_tasks_in_flight_per_actor=UNITS_AHEAD),
        num_cpus=settings.cpus_per_actor,
    )


def _done(uri: str) -> tuple[set[int], int]:
    """Returns the units that are committed, and how many of their rows failed."""

    def parts(directory: str) -> dict[int, str]:
        files = storage.list_files(storage.join(uri, directory), ".parquet")
        return {int(name.rsplit("-", 1)[-1].removesuffix(".parquet")): name for name, _ in files}

    done = set(parts(SCORES_DIRECTORY))
    failed = [name for unit, name in parts(ERRORS_DIRECTORY).items() if unit in done]
    return done, sum(storage.parquet_metadata(name).num_rows for name in failed)


def _too_many(task: Task, num_failed: int, num_rows: int, allowed: float) -> str:
    place = storage.join(task.output_uri, ERRORS_DIRECTORY)
    first: list[dict[str, Any]] = storage.read_parquet(storage.list_files(place, ".parquet")[0][0])[:3].to_pylist()
    lines = [f"row {row['row']}, user {row['user']}: {row['message']}" for row in first]
    return "\n".join(
        [
            f"{num_failed} of {num_rows} {task.kind} cannot be scored, score.max_failed_fraction allows {allowed:g} of "
            "them; the first:",
            *lines,
            f"All so far: {place}",
        ]
    )
