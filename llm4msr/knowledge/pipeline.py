"""The Ray job behind `jobs.extract`: prepared rows -> prompts -> vectors in the store -> knowledge table.

1. One task per training file writes that file's user prompts and counts its scenarios; then the scenario prompts.
2. Prompts whose key the store lacks are encoded and committed by a pool of actors (`llm4msr.knowledge.actors`). A run
   that is killed loses what was not committed; the next run does that and nothing else.
3. The table is put together from the store, and the manifest is written last.

Layout of ``knowledge/<digest>/``: prompts/bucket-NNNNN.parquet and prompts/scenarios.parquet (`prompts.PROMPTS`),
prompts.txt (a sample to read), users.npy, user_index.npy, scenarios.npy (`KnowledgeTable`), summary.json,
manifest.json.

A prompt without a usable vector is data, not a crash: it stays out of the store, its user has no knowledge, and the
summary counts it; beyond `MAX_FAILED_FRACTION`, or for a scenario, the job fails. Ray is initialised by the caller.
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
from llm4msr.config import Config, KnowledgeConfig, digest
from llm4msr.data.prepared import PreparedData
from llm4msr.data.source import DataError
from llm4msr.knowledge import place, profiles
from llm4msr.knowledge.actors import cut_units, encode_units, plan_pool
from llm4msr.knowledge.encoder import encoder_identity
from llm4msr.knowledge.model_files import EncoderError
from llm4msr.knowledge.profiles import ScenarioStats
from llm4msr.knowledge.prompt_files import write_sample, write_scenario_prompts, write_user_prompts
from llm4msr.knowledge.store import KnowledgeStore
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import Scenario

PROMPTS_DIRECTORY = "prompts"
SCENARIOS_FILE = "scenarios.parquet"
SAMPLE_FILE = "prompts.txt"
SUMMARY_FILE = "summary.json"
MAX_FAILED_FRACTION = 0.01

logger = logging.getLogger("llm4msr.knowledge")


@dataclass(frozen=True)
class _Prompts:
    """All prompts: keys, scenarios first; user_row of the keys after them; (uri, number of prompts) of each file."""

    keys: pa.Array
    user_rows: np.ndarray
    files: list[tuple[str, int]]


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
    prepared = PreparedData.open(workspace.prepared_uri(config))
    resources = ray.cluster_resources()
    pool = plan_pool(config.knowledge, int(resources.get("GPU", 0)), int(resources.get("CPU", 1)))
    identity = encoder_identity(config.knowledge, pool.device)
    store = KnowledgeStore(place.store_root(config), identity)
    source = {
        "prepared": prepared.uri.rsplit("/", 1)[-1],
        "encoder_digest": store.identity_digest,
        "max_events_per_scenario": config.knowledge.max_events_per_scenario,
    }
    uri = storage.join(workspace.knowledge_root(config), digest(source))
    if storage.is_finished(uri):
        logger.info("%s is up to date", uri)
    else:
        prompts = _write_prompts(prepared, store.identity_digest, config.knowledge, uri)
        missing = store.missing(prompts.keys)
        num_distinct = len(pc.unique(prompts.keys))
        logger.info(
            "%d prompts, %d distinct, %d already in the store, %d to encode on %d actors (%s)",
            *(len(prompts.keys), num_distinct, num_distinct - len(missing), len(missing)),
            *(pool.num_actors, pool.device),
        )
        encode_started = time.monotonic()
        failures: dict[str, str] = {}
        if len(missing):
            rows_per_unit = min(config.knowledge.rows_per_commit, math.ceil(len(missing) / pool.num_actors))
            units = cut_units(prompts.keys, missing, prompts.files, rows_per_unit)
            failures = encode_units(units, config.knowledge, identity, place.store_root(config), pool)
            check_failures(failures, prompts.keys, prepared.schema.scenarios)
        seconds = time.monotonic() - encode_started
        summary = {
            "num_prompts": len(prompts.keys),
            "num_distinct_prompts": num_distinct,
            "num_cached": num_distinct - len(missing),
            "num_encoded": len(missing) - len(failures),
            "num_failed": len(failures),
            "failures": [{"key": key, "error": error} for key, error in sorted(failures.items())[:20]],
            **_write_table(store, prompts, failures, prepared, uri),
            "encode_seconds": round(seconds, 3),
            "prompts_per_second": round(len(missing) / seconds, 2) if len(missing) else None,
            "seconds": round(time.monotonic() - started, 3),
        }
        storage.write_json(storage.join(uri, SUMMARY_FILE), summary)
        created_at = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {"kind": "knowledge", **source, "encoder": identity, "config": config.model_dump(mode="json")}
        storage.write_manifest(uri, manifest | {"created_at": created_at, "summary": summary})
        logger.info(
            "knowledge of %d of %d users in %s: %d prompts encoded, %d from the store, %d failed, %d shortened",
            *(summary["num_users_with_knowledge"], summary["num_users"], uri),
            *(summary["num_encoded"], summary["num_cached"], summary["num_failed"], summary["num_truncated_prompts"]),
        )
    storage.write_json(place.knowledge_pointer_uri(config), {"directory": uri.rsplit("/", 1)[-1]})
    return uri


def _write_prompts(prepared: PreparedData, identity_digest: str, config: KnowledgeConfig, uri: str) -> _Prompts:
    scenarios, users = prepared.schema.scenarios, prepared.users().select(["key", "text"])
    items = profiles.clean_texts(prepared.items()["text"])
    entities = ray.put((users["key"].combine_chunks(), profiles.clean_texts(users["text"]), items))
    sources = [source for source, _ in prepared.files("train")]
    targets = [storage.join(uri, PROMPTS_DIRECTORY, source.rsplit("/", 1)[-1]) for source in sources]
    # Drawn negatives are no interactions: nothing is said of them.
    positives_only = prepared.manifest["data"].get("drawn_negatives", 0) > 0
    settings = (identity_digest, scenarios, config.max_events_per_scenario, positives_only)
    task = ray.remote(write_user_prompts)
    done = ray.get(
        [task.remote(entities, source, target, *settings) for source, target in zip(sources, targets, strict=True)]
    )
    if not any(len(part) for _, part in done):
        raise DataError(
            f"{prepared.uri}: no user has a training row with label 1, so there is nothing to ask the language model; "
            "check the labels of the raw data and data.split"
        )
    scenarios_uri = storage.join(uri, PROMPTS_DIRECTORY, SCENARIOS_FILE)
    stats = ScenarioStats.merge([stats for stats, _ in done])
    table = write_scenario_prompts(stats, items, scenarios, scenarios_uri, identity_digest, positives_only)
    write_sample(table["text"].to_pylist(), targets, storage.join(uri, SAMPLE_FILE))
    users_part = pa.concat_tables(part for _, part in done)
    keys = pa.concat_arrays([*table["key"].chunks, *users_part["key"].chunks])
    files = [(scenarios_uri, len(table)), *((t, len(part)) for t, (_, part) in zip(targets, done, strict=True))]
    return _Prompts(keys, users_part["subject_row"].to_numpy(), files)


def check_failures(failures: dict[str, str], keys: pa.Array, scenarios: tuple[Scenario, ...]) -> None:
    """Decides whether the job can go on without the vectors of some prompts.

    Args:
        failures: Errors by key.
        keys: Keys of all prompts, those of the scenarios first.
        scenarios: Of the schema, in order.

    Raises:
        EncoderError: A scenario has no vector, or more than `MAX_FAILED_FRACTION` of all prompts have none.
    """
    for scenario, key in zip(scenarios, keys.slice(0, len(scenarios)).to_pylist(), strict=True):
        if key in failures:
            raise EncoderError(f"the prompt of scenario {scenario.name!r} has no vector: {failures[key]}")
    failed = int(pc.sum(pc.is_in(keys, value_set=pa.array(list(failures), pa.string()))).as_py())
    if failed:
        key, error = next(iter(failures.items()))
        message = f"{failed} of {len(keys)} prompts have no vector; the first, {key}: {error}"
        if failed > MAX_FAILED_FRACTION * len(keys):
            raise EncoderError(f"{message} (at most {MAX_FAILED_FRACTION:.0%} may fail)")
        logger.warning(message)


def _write_table(
    store: KnowledgeStore, prompts: _Prompts, failures: dict[str, str], prepared: PreparedData, uri: str
) -> dict[str, Any]:
    """Puts the knowledge table together from the store and returns the counts for the summary."""
    good = pc.invert(pc.is_in(prompts.keys, value_set=pa.array(list(failures), pa.string())))
    vectors, counts = store.read(prompts.keys.filter(good))
    num_scenarios = len(prepared.schema.scenarios)
    rows = prompts.user_rows[good.to_numpy(zero_copy_only=False)[num_scenarios:]]
    users_NK = np.zeros((len(rows) + 1, vectors.shape[1]), dtype=np.float16)
    users_NK[1:] = vectors[num_scenarios:]
    num_users = prepared.users().num_rows
    user_index_N = np.zeros(num_users + 1, dtype=np.int32)
    user_index_N[rows] = np.arange(1, len(rows) + 1, dtype=np.int32)
    table = KnowledgeTable(users_NK, user_index_N, vectors[:num_scenarios].astype(np.float32))
    table.save(uri)
    truncated = (counts["num_dropped_events"] > 0) | (counts["num_cut_characters"] > 0)
    return {
        "num_users": num_users,
        "num_users_with_knowledge": table.num_users_with_knowledge,
        "width": table.width,
        "num_tokens": int(counts["num_tokens"].sum()),
        "num_dropped_events": int(counts["num_dropped_events"].sum()),
        "num_truncated_prompts": int(truncated.sum()),
    }
