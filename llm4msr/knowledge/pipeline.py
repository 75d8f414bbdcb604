"""The Ray job behind `jobs.extract`: prepared rows -> prompts -> vectors in the store -> knowledge table.

1. One task per bucket of users writes their prompts and counts their scenarios; one per so many items writes theirs;
   then the scenario prompts. Memory is bounded by one bucket per task, and the texts of users and items once per node.
2. Prompts whose key the store lacks are cut into units (`llm4msr.knowledge.plan`), encoded and committed by a pool of
   actors (`llm4msr.knowledge.actors`). A run that is killed loses the units at work; the next run does what is missing
   and nothing else. The driver holds about 50 bytes per prompt and no vector.
3. The table is put together from the store, block by block, and the manifest is written last.

Layout of ``knowledge/<digest>/``: prompts/*.parquet (`prompts.PROMPTS`) with a manifest of their own, prompts.txt (a
sample to read), plan.parquet, the files of `KnowledgeTable`, errors.parquet (prompts without a vector), tensorboard/,
summary.json, manifest.json.

A prompt without a usable vector is data, not a crash: its subject has no knowledge, and the summary counts it; beyond
`knowledge.max_error_fraction`, or for a scenario, the job fails. Ray is initialised by the caller.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from llm4msr import storage, workspace
from llm4msr.config import Config, digest
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge import place
from llm4msr.knowledge.actors import Pool, encode_units, plan_pool
from llm4msr.knowledge.assemble import write_errors, write_table
from llm4msr.knowledge.engines.build import engine_identity
from llm4msr.knowledge.engines.model_files import EncoderError
from llm4msr.knowledge.plan import PromptSet, missing_prompts, num_planned, open_plan
from llm4msr.knowledge.pooled import write_pooled_users
from llm4msr.knowledge.progress import speed, write_scalars
from llm4msr.knowledge.prompt_stage import all_prompts
from llm4msr.knowledge.store import KnowledgeStore, StoreIndex
from llm4msr.knowledge.table import FILES, load_array
from llm4msr.placement import alive_nodes
from llm4msr.storage import MANIFEST

SAMPLE_FILE = "prompts.txt"
PLAN_FILE = "plan.parquet"
TENSORBOARD_DIRECTORY = "tensorboard"
UNITS_PER_ACTOR = 4
MIN_ROWS_PER_UNIT = 64
# Part of what an extraction is: raise it when the same prompts would give another table.
EXTRACT_VERSION = 3

logger = logging.getLogger("llm4msr.knowledge")


@dataclass(frozen=True)
class _Job:
    """What the stages of one extraction share. config: its dtype is the one of the cluster's device."""

    config: Config
    prepared: PreparedData
    pool: Pool
    identity: dict[str, Any]
    store: KnowledgeStore
    source: dict[str, Any]
    previous: str | None
    uri: str


def extract(config: Config) -> str:
    """Extracts the knowledge of this configuration's prepared data; what the store has is not computed again.

    Args:
        config: The whole configuration.

    Returns:
        The finished directory ``knowledge/<digest>/``.

    Raises:
        StorageError: The data was not prepared, or a stored part is damaged.
        EncoderError: The model cannot be used, or too many prompts have no usable vector.
        DataError: No user has a liked training row.
        ConfigError: More actors are asked for than can run at once.
    """
    started = time.monotonic()
    pointer = place.knowledge_pointer_uri(config)
    job = _open(config)
    if storage.is_finished(job.uri):
        logger.info("%s is up to date", job.uri)
        num_failed = storage.read_json(storage.join(job.uri, place.SUMMARY_FILE))["num_failed"]
        if num_failed:
            logger.warning("%d of its prompts have no vector; remove its %s to try them again", num_failed, MANIFEST)
    else:
        prompts, counts = all_prompts(
            storage.join(job.uri, place.PROMPTS_DIRECTORY),
            storage.join(job.uri, SAMPLE_FILE),
            *(job.prepared, job.config.knowledge, job.store.identity_digest),
            job.previous and storage.join(job.previous, place.PROMPTS_DIRECTORY),
        )
        done = _encode(job, prompts)
        index = job.store.index()
        errors = write_errors(storage.join(job.uri, place.ERRORS_FILE), index, prompts)
        if errors["error"].null_count:
            raise storage.StorageError(
                f"{job.store.uri}: {errors['error'].null_count} prompts have neither vector nor error though all were "
                "encoded; were files removed meanwhile? Run jobs.extract again"
            )
        check_errors(errors, len(prompts.keys_P), job.config.knowledge.max_error_fraction)
        num_subjects = {
            "scenario": len(job.prepared.schema.scenarios),
            "user": counts["num_users"],
            "item": counts["num_items"],
        }
        table = write_table(job.uri, job.store, index, prompts, num_subjects)
        if job.config.knowledge.user_vectors == "items":
            table["num_users_with_knowledge"] = _pool_users(job, counts["num_users"])
        summary = {
            **counts,
            **done,
            "num_failed": len(errors),
            "failures": errors.slice(0, 20).to_pylist(),
            **table,
            **_shortened(job.store, index, prompts),
            "seconds": round(time.monotonic() - started, 3),
        }
        storage.write_json(storage.join(job.uri, place.SUMMARY_FILE), summary)
        write_scalars(storage.join(job.uri, TENSORBOARD_DIRECTORY), summary)
        created_at = datetime.now(UTC).isoformat(timespec="seconds")
        whole = config.model_dump(mode="json")
        manifest = {"kind": "knowledge", **job.source, "encoder": job.identity, "config": whole}
        storage.write_manifest(job.uri, manifest | {"created_at": created_at, "summary": summary})
        _say(job.uri, summary)
    directory = {"directory": job.uri.rsplit("/", 1)[-1]}
    storage.write_json(pointer, directory)
    if "user" in config.knowledge.levels and config.knowledge.user_vectors == "prompt":
        storage.write_json(place.last_pointer_uri(config, job.source), directory)
    return job.uri


def _pool_users(job: _Job, num_users: int) -> int:
    rows_uris = [uri for uri, _ in job.prepared.files("train")]
    items = [load_array(storage.join(job.uri, FILES[name])) for name in ("items_NK", "item_index_N")]
    return write_pooled_users(job.uri, rows_uris, num_users, job.config.knowledge.folds, *items)


def _open(config: Config) -> _Job:
    prepared = PreparedData.open(workspace.prepared_uri(config))
    pool = plan_pool(config.knowledge, alive_nodes(ray.nodes()))
    identity = engine_identity(config.knowledge, pool.device)
    if config.knowledge.engine == "transformers":
        # One dtype and one commit on all nodes, whatever their processors prefer and their caches hold.
        settled = {"dtype": identity["dtype"], "revision": identity.get("revision", config.knowledge.revision)}
        config = config.model_copy(update={"knowledge": config.knowledge.model_copy(update=settled)})
    store = KnowledgeStore(place.store_root(config), identity)
    source: dict[str, Any] = {
        "version": EXTRACT_VERSION,
        "prepared": prepared.uri.rsplit("/", 1)[-1],
        "encoder_digest": store.identity_digest,
        "max_events": config.knowledge.max_events_per_scenario,
        "levels": sorted(config.knowledge.levels),
        "user_vectors": config.knowledge.user_vectors,
        "folds": config.knowledge.folds if config.knowledge.user_vectors == "items" else None,
        "scenarios": list(prepared.schema.scenario_names),
        "refresh_min_new_events": config.knowledge.refresh_min_new_events,
        "refreshed_from": None,
    }
    previous, uri = None, None
    root = workspace.knowledge_root(config)
    last = place.last_pointer_uri(config, source)
    if config.knowledge.refresh_min_new_events and storage.exists(last):
        previous = storage.join(root, storage.read_json(last)["directory"])
        manifest = storage.read_manifest(previous, "run jobs.extract again")
        if manifest | source == manifest | {"refreshed_from": None}:
            uri, source["refreshed_from"] = previous, manifest["refreshed_from"]  # it is this extraction
        else:
            source["refreshed_from"] = previous.rsplit("/", 1)[-1]
    return _Job(config, prepared, pool, identity, store, source, previous, uri or storage.join(root, digest(source)))


def _encode(job: _Job, prompts: PromptSet) -> dict[str, Any]:
    """Encodes what the store lacks; returns the figures of it for the summary."""
    settings = job.config.knowledge
    missing = missing_prompts(prompts, job.store.index())
    num_prompts, num_distinct = len(prompts.keys_P), len(np.unique(prompts.keys_P))
    counts = {
        "num_prompts": num_prompts,
        "num_distinct_prompts": num_distinct,
        "num_cached": num_distinct - len(missing),
        "num_encoded": len(missing),
    }
    logger.info(
        "%d prompts, %d distinct, %d already in the store, %d to encode on %s actors (%s)",
        *(num_prompts, num_distinct, num_distinct - len(missing), len(missing)),
        *(_pool_size(job.pool), job.pool.device if settings.engine != "openai" else settings.engine),
    )
    plan_uri = storage.join(job.uri, PLAN_FILE)
    if not len(missing):
        num_needed = num_planned(storage.read_parquet(plan_uri)) if storage.exists(plan_uri) else 0
        return counts | {"share_encoded": round(num_needed / num_distinct, 4)}
    # A small job is cut finer, so that all actors have work until its end.
    rows_per_unit = max(MIN_ROWS_PER_UNIT, math.ceil(len(missing) / (UNITS_PER_ACTOR * job.pool.max_actors)))
    units = open_plan(plan_uri, prompts, missing, min(settings.rows_per_commit, rows_per_unit))
    assert num_planned(units) == len(missing), (num_planned(units), len(missing))
    reading, complete = encode_units(
        units,
        prompts.files,
        settings,
        job.identity,
        place.store_root(job.config),
        job.pool,
        storage.join(job.uri, TENSORBOARD_DIRECTORY),
        int(settings.max_error_fraction * num_prompts),
    )
    if not complete:
        errors = write_errors(storage.join(job.uri, place.ERRORS_FILE), job.store.index(), prompts)
        check_errors(errors, num_prompts, settings.max_error_fraction)
        raise AssertionError("the encoding ended early without an error that forbids to go on")
    # What earlier attempts of this extraction encoded counts as well.
    num_needed = num_planned(storage.read_parquet(plan_uri))
    return counts | {"share_encoded": round(num_needed / num_distinct, 4)} | speed(reading)


def check_errors(errors: pa.Table, num_prompts: int, max_error_fraction: float) -> None:
    """Decides whether the job can go on without the vectors of some prompts.

    Args:
        errors: As `assemble.write_errors` returns them.
        num_prompts: All prompts.
        max_error_fraction: Share of them that may have no vector.

    Raises:
        EncoderError: A scenario has no vector, or more than `max_error_fraction` of all prompts have none.
    """
    errors = errors.filter(pc.is_valid(errors["error"]))
    if not len(errors):
        return
    for row in errors.filter(pc.equal(errors["level"], "scenario")).to_pylist():
        raise EncoderError(f"the prompt of scenario {row['subject_id']!r} has no vector: {row['error']}")
    first = [f"{row['level']} {row['subject_id']}: {row['error']}" for row in errors.slice(0, 3).to_pylist()]
    message = f"{len(errors)} of {num_prompts} prompts have no vector; the first: {'; '.join(first)}"
    if len(errors) > max_error_fraction * num_prompts:
        raise EncoderError(f"{message} (knowledge.max_error_fraction allows {max_error_fraction:g} of them)")
    logger.warning(message)


def _shortened(store: KnowledgeStore, index: StoreIndex, prompts: PromptSet) -> dict[str, int]:
    """Returns how many prompts were cut to the model's limit, and by how much."""
    positions = np.unique(index.find(prompts.keys_P))
    totals = {"num_tokens": 0, "num_dropped_events": 0, "num_truncated_prompts": 0}
    positions = positions[positions >= 0]
    for start in range(0, len(positions), 1 << 18):
        names = ["num_tokens", "num_dropped_events", "num_cut_characters"]
        table = store.columns(index, positions[start : start + (1 << 18)], names)
        tokens, dropped, cut = (table[name].to_numpy() for name in names)
        totals["num_tokens"] += int(tokens.sum())
        totals["num_dropped_events"] += int(dropped.sum())
        totals["num_truncated_prompts"] += int(np.count_nonzero((dropped > 0) | (cut > 0)))
    return totals


def _pool_size(pool: Pool) -> str:
    return str(pool.min_actors) if pool.min_actors == pool.max_actors else f"{pool.min_actors} to {pool.max_actors}"


def _say(uri: str, summary: dict[str, Any]) -> None:
    logger.info(
        "knowledge of %d of %d users in %s: %d prompts encoded (%.1f %%), %d from the store, %d failed, %d shortened",
        *(summary["num_users_with_knowledge"], summary["num_users"], uri, summary["num_encoded"]),
        *(100 * summary["share_encoded"], summary["num_cached"], summary["num_failed"]),
        summary["num_truncated_prompts"],
    )
    if summary["num_kept"]:
        logger.info("%d users keep the knowledge of the last extraction: too little is new", summary["num_kept"])
    if "tokens_per_second" in summary:
        used = summary["model_flop_utilisation"]
        logger.info(
            "%.1f prompts/s, %.0f tokens/s, padding %.1f %%, model FLOP utilisation %s",
            *(summary["prompts_per_second"], summary["tokens_per_second"], 100 * (summary["padding_share"] or 0)),
            "unknown: no peak known of this device" if used is None else f"{100 * used:.1f} %",
        )
