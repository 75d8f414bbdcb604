"""prepare: raw shards -> typed, encoded, split Parquet with its schema beside it. The Ray Data shell of the data layer.

Ray Data only hands out work: one block per shard or bucket, and small JSON results back. What is done lies in
`shards`, `buckets`, `features`, `splits` and `negatives`, which know no Ray. Users are dealt into buckets by a hash of
their id, so everything per user is local and memory is bounded by one bucket.

The result is the same whatever the order in which tasks run: every random choice is seeded by (data.seed, bucket).
The output directory is named by content (configuration, content of every raw file, `PREPARE_VERSION`), and written
once, its manifest last. Generating the synthetic raw files is left to the caller; so is starting Ray.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

import llm4msr
from llm4msr import storage, workspace
from llm4msr.config import Config, digest
from llm4msr.data import features, history, report, splits
from llm4msr.data.adapters import build_adapter
from llm4msr.data.buckets import count_moments, encode_bucket, fit_bucket
from llm4msr.data.prepared import (
    ALL_SCENARIOS,
    ID_FEATURES,
    ITEMS_FILE,
    REJECTS_FILE,
    SCHEMA_FILE,
    USERS_FILE,
    bucket_file,
    vocabulary_uri,
)
from llm4msr.data.shards import Plan, choose_num_buckets, parse_shard
from llm4msr.data.source import Adapter, DataError
from llm4msr.data.splits import TEST, Thresholds
from llm4msr.data.versions import file_versions
from llm4msr.schema import REJECTS, SPLITS, FeatureSchema, KeyType, Source, feature_table_schema

PREPARE_VERSION = 5

_log = logging.getLogger("llm4msr.data")


def prepare(config: Config, adapter: Adapter | None = None) -> str:
    """Prepares the data set of a configuration, unless that was done before. Ray must be running.

    Args:
        config: The resolved configuration.
        adapter: Reads the raw files; by default the one that data.kind names.

    Returns:
        URI of the finished directory; see `llm4msr.data.prepared` for what lies in it.

    Raises:
        DataError: The raw files cannot be used, or more rows are damaged than data.max_rejected_fraction allows, or
            a split or a scenario's train rows are empty, or a scenario lacks a label in valid.
        ConfigError: The split's thresholds, or a history feature, cannot be used.
    """
    data = config.data
    raw_uri = storage.absolute(data.raw_uri) if data.raw_uri else workspace.synthetic_raw_uri(config)
    thresholds = splits.configured_thresholds(data.split)
    adapter = adapter or build_adapter(data, raw_uri)
    names = [scenario.name for scenario in adapter.scenarios]
    if ALL_SCENARIOS in names:
        raise DataError(f"a scenario cannot be named {ALL_SCENARIOS!r}: reports use it for all scenarios: {names}")
    shards = adapter.shards()
    versions = file_versions([shard.uri for shard in shards], workspace.file_versions_uri(config))
    names_in_raw = [shard.uri.removeprefix(raw_uri).lstrip("/") for shard in shards]
    files = dict(zip(names_in_raw, versions, strict=True))
    directory = digest({"data": data, "files": files, "version": PREPARE_VERSION})
    uri = storage.join(workspace.prepared_root(config), directory)
    if storage.is_finished(uri):
        _log.info("%s is up to date", uri)
    else:
        events = tuple(shard for shard in shards if adapter.is_events(shard))
        plan = Plan(adapter, data, events, choose_num_buckets(data.num_buckets, events), f"{uri}.staging", uri)
        for leftover in (uri, plan.staging_uri, _failure_uri(plan)):
            storage.remove(leftover)
        try:
            manifest = _build(plan, thresholds)
        finally:
            storage.remove(plan.staging_uri)
        storage.write_manifest(uri, manifest | {"config": config.model_dump(mode="json")})
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": directory})
    return uri


def _build(plan: Plan, thresholds: Thresholds) -> dict[str, Any]:
    """Writes everything but the manifest, which it returns."""
    adapter, data, logs = plan.adapter, plan.data, plan.logs
    names = [scenario.name for scenario in adapter.scenarios]
    started = time.monotonic()
    parsed = _run("parse", parse_shard, len(plan.shards), plan)
    roles = report.by_role(parsed)
    _check_rejected(plan, roles, {})
    raw_rows = sum(role.num_good + role.num_rejected for role in roles)
    num_with_rows = sum(bool(result["rows"]) for result in parsed)

    tables: dict[Source, pa.Table] = {}
    rejects: dict[str, list[pa.Table]] = {}
    levels: tuple[tuple[Source, str, KeyType], ...] = (
        ("user", "users", adapter.user_key_type),
        ("item", "pairs", adapter.item_key_type),
    )
    for source, column, key_type in levels:
        entities, damaged, role = _read_entities(adapter, source)
        rejects[role.role] = damaged
        roles.append(role)
        _check_rejected(plan, roles, rejects)
        seen = _read_staged(plan, column, num_with_rows, [ID_FEATURES[source]])
        ids = [t[c] for t, c in ((entities, "key"), (seen, ID_FEATURES[source])) if t is not None]
        raw_features = [f for f in adapter.features if f.source == source]
        tables[source] = features.align_entities(entities, features.sorted_keys(ids, key_type), raw_features)
        _log.info("%d %ss", tables[source].num_rows, source)
    keys = {source: table["key"].combine_chunks() for source, table in tables.items()}

    if data.split.kind == "time" and thresholds.valid_from_ms is None:
        _run("time quantiles", count_moments, plan.num_buckets, plan)
        moments = _read_staged(plan, "moments", plan.num_buckets)
        at, num_rows = ([], []) if moments is None else (moments["timestamp_ms"], moments["num_rows"])
        thresholds = splits.quantile_thresholds(
            np.asarray(at, np.int64), np.asarray(num_rows, np.int64), data.split, thresholds.test_until_ms
        )
    _log.info("%s", report.explain_split(data.split.kind, thresholds))
    fitted = _run(
        "fit",
        fit_bucket,
        plan.num_buckets,
        plan,
        user_keys=keys["user"],
        item_keys=keys["item"],
        thresholds=thresholds,
        pools=_negative_pools(plan, keys["item"], num_with_rows),
    )
    num_written, num_found = sum(result["rows"] for result in parsed), sum(result["parsed"] for result in fitted)
    _check_found(plan, num_written, num_found, "rows")
    rows_SC = np.sum([result["rows"] for result in fitted], axis=0)
    positives_SC = np.sum([result["positives"] for result in fitted], axis=0)
    report.check_splits(rows_SC, positives_SC, names, data.split.kind, thresholds)
    for undefined in report.undefined_auc(rows_SC[TEST], positives_SC[TEST], names):
        _log.warning("test: %s", undefined)

    train_rows = {source: _train_rows(plan, source, len(keys[source])) for source in tables}
    schema, vocabularies = _write_features(plan, tables, train_rows, fitted)
    if logs:
        history.write_logs(plan.uri, _read_staged(plan, "likes", plan.num_buckets), len(keys["user"]), logs)
    first_row_id = np.cumsum([0] + [np.sum(result["rows"]) for result in fitted])[:-1].tolist()
    encoded = _run(
        "encode",
        encode_bucket,
        plan.num_buckets,
        plan,
        schema=schema,
        vocabularies={raw.name: vocabularies[raw.name] for raw in plan.context if raw.kind != "numeric"},
        first_row_id=first_row_id,
        user_rows=train_rows["user"],
        item_rows=train_rows["item"],
    )
    _write_rejects(plan, storage.join(plan.uri, REJECTS_FILE), rejects)
    _log.info("prepare: %d rows of %d raw rows in %.1f s", rows_SC.sum(), raw_rows, time.monotonic() - started)
    block = {
        "rows": report.rows_block(rows_SC, positives_SC, names),
        "rejected": report.rejected_block(roles),
        "raw_rows": raw_rows,
        "merged_rows": sum(result["merged"] for result in fitted),
        "after_test_until": sum(result["after_test_until"] for result in fitted),
        "drawn_negatives": sum(result["drawn"] for result in fitted),
        "no_negative_available": sum(result["no_negative"] for result in fitted),
        "num_users": len(keys["user"]),
        "num_items": len(keys["item"]),
        "unseen": report.unseen_block(
            rows_SC,
            np.sum([result["unseen_users"] for result in encoded], axis=0),
            np.sum([result["unseen_items"] for result in encoded], axis=0),
            names,
        ),
        "split": {"kind": data.split.kind} | thresholds.to_json(),
        "label_share": report.label_shares(rows_SC, positives_SC, names),
    }
    return {
        "kind": "prepared",
        "data": block,
        "files": {
            split: [
                {"file": bucket_file(split, bucket), "num_rows": result["num_rows"][s]}
                for bucket, result in enumerate(encoded)
                if result["num_rows"][s]
            ]
            for s, split in enumerate(SPLITS)
        },
        "num_buckets": plan.num_buckets,
        "scenarios": names,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "prepare": PREPARE_VERSION,
            "llm4msr": llm4msr.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "ray": ray.__version__,
        },
    }


def _run(stage: str, task: Callable[..., dict[str, Any]], num_tasks: int, plan: Plan, **shared: Any) -> list[Any]:
    """Runs ``task(index, plan=plan, **shared)`` for every index on the cluster; returns results in order of index."""
    started, last_log, num_rows = time.monotonic(), time.monotonic(), 0
    results: dict[int, dict[str, Any]] = {}
    if num_tasks:
        call = partial(_call, task=task, arguments=ray.put({"plan": plan, **shared}))
        indices = ray.data.from_items([{"index": i} for i in range(num_tasks)], override_num_blocks=num_tasks)
        for row in indices.map(call).iter_rows():
            if row["error"]:
                raise (DataError if row["is_data_error"] else RuntimeError)(row["error"])
            result = results[row["index"]] = json.loads(row["result"])
            num_rows += int(np.sum(result.get("rows", result.get("num_rows", 0))))
            if time.monotonic() - last_log >= 5 or len(results) == num_tasks:
                last_log = time.monotonic()
                rate = num_rows / max(last_log - started, 1e-9)
                _log.info("%s: %d of %d done, %d rows, %.0f rows/s", stage, len(results), num_tasks, num_rows, rate)
    return [results[i] for i in range(num_tasks)]


def _call(row: dict[str, Any], task: Callable[..., dict[str, Any]], arguments: ray.ObjectRef[Any]) -> dict[str, Any]:
    """Runs one task on a worker; an error comes back as text.

    Ray would bury what is wrong with the data in an error of its own, and Ray Data retries a task without end, and
    without a word, when a worker cannot unpickle its arguments (a node with other code than the driver's).
    """
    result, error, is_data_error = "", "", False
    try:
        result = json.dumps(task(row["index"], **ray.get(arguments)))
    except (DataError, storage.StorageError) as found:
        error, is_data_error = str(found), True
    except ray.exceptions.RaySystemError as found:
        error = f"a worker cannot read what the driver sent; do all nodes run the same code? {found}"
    return {**row, "result": result, "error": error, "is_data_error": is_data_error}


def _read_entities(adapter: Adapter, source: Source) -> tuple[pa.Table | None, list[pa.Table], report.RoleCount]:
    """Returns the table, None where the data has none, its damaged rows, and their counts."""
    blocks = list(adapter.parse_entities(source))
    tables = [block.table for block in blocks if block.table.num_rows]
    table = pa.concat_tables(tables) if tables else None
    rejects = [block.rejects for block in blocks if block.rejects.num_rows]
    reasons = pa.concat_tables(rejects)["reason"].value_counts().to_pylist() if rejects else []
    rejected = {entry["values"]: entry["counts"] for entry in reasons}
    num_good = table.num_rows if table is not None else 0
    if table is not None and len(table["key"].unique()) != num_good:
        twice = next(c["values"] for c in table["key"].value_counts().to_pylist() if c["counts"] > 1)
        raise DataError(f"the {source}s' files hold {source} {twice!r} more than once")
    return table, rejects, report.RoleCount(f"{source}s", num_good, dict(sorted(rejected.items())))


def _check_rejected(plan: Plan, roles: Sequence[report.RoleCount], rejects: Mapping[str, Sequence[pa.Table]]) -> None:
    if not (too_many := report.too_many_rejected(roles, plan.data.max_rejected_fraction)):
        return
    _write_rejects(plan, _failure_uri(plan), rejects)
    lines = []
    for role, line in too_many.items():
        if role in rejects:
            damaged = pa.concat_tables(rejects[role])
        else:
            files = [shard.uri for shard in plan.shards if shard.role == role]
            damaged = storage.read_parquet(_failure_uri(plan)).filter(pc.field("file").isin(files))
        lines += [line, *report.first_rejects(damaged)]
    raise DataError("\n".join([*lines, f"All damaged rows: {_failure_uri(plan)}"]))


def _failure_uri(plan: Plan) -> str:
    return f"{plan.uri}.rejects.parquet"


def _write_rejects(plan: Plan, uri: str, rejects: Mapping[str, Sequence[pa.Table]]) -> None:
    """Writes the damaged rows of all files: interactions in order of shard, then users and items."""
    with storage.atomic_write(uri) as file, pq.ParquetWriter(file, REJECTS, compression="zstd") as writer:
        for staged, _ in storage.list_files(plan.staged("rejects"), ".parquet"):
            writer.write_table(storage.read_parquet(staged).cast(REJECTS))
        for table in itertools.chain.from_iterable(rejects.values()):
            writer.write_table(table.cast(REJECTS))


def _read_staged(plan: Plan, kind: str, num_files: int, columns: Sequence[str] | None = None) -> pa.Table | None:
    files = _staged_files(plan, kind, num_files)
    return pa.concat_tables(storage.read_parquet(uri, columns) for uri in files) if files else None


def _staged_files(plan: Plan, kind: str, num_files: int) -> list[str]:
    """Lists intermediate files, of which the tasks have written so many."""
    files = [uri for uri, _ in storage.list_files(plan.staged(kind), ".parquet")]
    _check_found(plan, num_files, len(files), "files")
    return files


def _check_found(plan: Plan, num_written: int, num_found: int, what: str) -> None:
    if num_found != num_written:
        raise storage.StorageError(
            f"{plan.staging_uri}: {num_written} {what} were written, {num_found} were found again: the store lists "
            "late what was just written, or somebody removed it; give the same command again"
        )


def _negative_pools(plan: Plan, item_keys: pa.Array, num_with_rows: int) -> list[np.ndarray] | None:
    """Returns each scenario's distinct item rows: those the adapter names, or those seen in its interactions."""
    if not plan.data.negatives_per_positive:
        return None
    named = plan.adapter.negative_pools()
    seen = _read_staged(plan, "pairs", num_with_rows)
    pools = []
    for scenario in range(len(plan.adapter.scenarios)):
        if named is not None:
            ids = named[scenario].filter(pc.is_in(named[scenario], item_keys))  # an item's damaged row gave it no key
        elif seen is None:
            ids = item_keys.slice(0, 0)
        else:
            ids = seen.filter(pc.equal(seen["scenario"], scenario))["item_id"].combine_chunks()
        pools.append(np.unique(features.table_rows(ids, item_keys, "item")))
    return pools


def _train_rows(plan: Plan, source: Source, num_keys: int) -> np.ndarray:
    """Returns (num_keys + 1,) train rows of each table row; row 0 stays 0."""
    total = np.zeros(num_keys + 1, np.int64)
    for uri in _staged_files(plan, f"rows_of_{source}", plan.num_buckets):
        counts = storage.read_parquet(uri)
        total[counts["row"].to_numpy()] += counts["num_rows"].to_numpy()
    return total


def _write_features(
    plan: Plan, tables: dict[Source, pa.Table], train_rows: dict[Source, np.ndarray], fitted: Sequence[dict[str, Any]]
) -> tuple[FeatureSchema, dict[str, pa.Array]]:
    """Fits all features on train; writes the feature tables, the vocabularies and the schema."""
    adapter, min_count = plan.adapter, plan.data.min_count
    vocabularies: dict[str, pa.Array] = {}
    all_features, encoded = [], {}
    for source, table in tables.items():
        raw_features = [f for f in adapter.features if f.source == source]
        found, encoded[source], fitted_vocabularies = features.fit_entities(
            table, source, ID_FEATURES[source], raw_features, train_rows[source][1:], min_count
        )
        all_features += found
        all_features += plan.histories if source == "user" else ()
        vocabularies |= fitted_vocabularies
    for raw in plan.context:
        if raw.kind == "numeric":
            moments = features.Moments()
            for result in fitted:
                moments = moments.merge(features.Moments(*result["moments"][raw.name]))
            all_features.append(features.fit_feature(raw, moments=moments))
        else:
            counts = _read_staged(plan, f"values/{raw.name}", plan.num_buckets)
            vocabularies[raw.name] = features.fit_vocabulary(features.merge_counts([counts]), min_count)
            all_features.append(features.fit_feature(raw, vocabulary=vocabularies[raw.name]))
    schema = FeatureSchema(tuple(adapter.scenarios), tuple(all_features), adapter.user_key_type, adapter.item_key_type)
    for source, file in (("user", USERS_FILE), ("item", ITEMS_FILE)):
        table = encoded[source].cast(feature_table_schema(schema, source))
        storage.write_parquet(storage.join(plan.uri, file), table)
    for name, values in vocabularies.items():
        storage.write_parquet(vocabulary_uri(plan.uri, name), pa.table({"value": values}))
    storage.write_json(storage.join(plan.uri, SCHEMA_FILE), schema.to_json())
    return schema, vocabularies
