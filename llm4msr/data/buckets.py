"""The three tasks of prepare that run over one bucket, a file of whole users: count moments, fit, encode.

Each is a plain function that reads and writes files and returns JSON types; it may run anywhere, in any order, and a
rerun writes the same files again. Memory is bounded by one bucket. Nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data import features, history, splits
from llm4msr.data.negatives import draw_negatives
from llm4msr.data.prepared import bucket_file
from llm4msr.data.shards import Plan
from llm4msr.data.source import DataError
from llm4msr.data.splits import TRAIN, Thresholds
from llm4msr.schema import SPLITS, FeatureSchema, rows_schema

ROW_GROUP_ROWS = 65_536


def count_moments(index: int, plan: Plan) -> dict[str, Any]:
    """Counts the rows at each timestamp of one bucket, for time quantiles.

    Raises:
        DataError: A row has no timestamp.
    """
    table, _ = _merged(index, plan)
    counts = _timestamps(table).value_counts()
    moments = pa.table({"timestamp_ms": counts.field("values"), "num_rows": counts.field("counts")})
    storage.write_parquet(plan.staged("moments", index), moments)
    return {"rows": table.num_rows}


def fit_bucket(
    index: int,
    plan: Plan,
    user_keys: pa.Array,
    item_keys: pa.Array,
    thresholds: Thresholds,
    pools: Sequence[np.ndarray] | None,
) -> dict[str, Any]:
    """Merges, orders and splits one bucket's rows, draws its negatives, and counts what vocabularies are fitted on.

    Args:
        index: The bucket.
        plan: The plan.
        user_keys: Sorted keys of the users' table.
        item_keys: Sorted keys of the items' table.
        thresholds: Of the time split; only test_until_ms is used with other kinds.
        pools: Distinct item rows of each scenario to draw negatives from; None where none are drawn.

    Returns:
        parsed, merged, after_test_until, drawn, no_negative: numbers of rows; rows, positives: by split, by scenario;
        moments: of each numeric context feature in train.

    Raises:
        DataError: A row has no timestamp, or names no split, where the configured split needs it, or its history
            would hold likes of a later split.
    """
    table, num_parsed = _merged(index, plan)
    num_merged = table.num_rows
    timestamp_ms_B = splits.moments_ms(
        _timestamps(table) if plan.data.split.kind == "time" else table["timestamp_ms"].combine_chunks()
    )
    if thresholds.test_until_ms is not None:
        keep = timestamp_ms_B < thresholds.test_until_ms
        table, timestamp_ms_B = table.filter(pa.array(keep)), timestamp_ms_B[keep]
    user_row_B = features.table_rows(table["user_id"].combine_chunks(), user_keys, "user")
    position_B = pc.fill_null(table["position"], 0).to_numpy()
    order = splits.order_rows(user_row_B, timestamp_ms_B, position_B)
    table, timestamp_ms_B, user_row_B = table.take(pa.array(order)), timestamp_ms_B[order], user_row_B[order]
    position_B = position_B[order]
    rank_B, num_rows_B = splits.rank_in_user(user_row_B)
    moments = history.Moments(user_row_B, timestamp_ms_B, position_B)
    if plan.data.split.kind == "time":
        split_B = splits.split_by_time(timestamp_ms_B, thresholds)
    elif plan.data.split.kind == "per_user_last":
        split_B = splits.split_per_user(rank_B, num_rows_B, timestamp_ms_B, plan.data.split)
    else:
        split_B = _named_split(table, plan)
    fitted = pa.table(
        {
            "user_row": pa.array(user_row_B),
            "item_row": pa.array(features.table_rows(table["item_id"].combine_chunks(), item_keys, "item")),
            "scenario": table["scenario"],
            "label": table["label"],
            "timestamp_ms": table["timestamp_ms"],
            "position": pa.array(rank_B, pa.int64()),
            "moment": pa.array(moments.number()),
            "split": pa.array(split_B, pa.int8()),
        }
        | {f.name: table[f.name] for f in plan.context}
    )
    if plan.data.history:
        fitted = history.place_rows(fitted, moments, plan.logs)
        storage.write_parquet(plan.staged("likes", index), history.likes(fitted, timestamp_ms_B, position_B))
    fitted, num_drawn, num_missing = _with_negatives(fitted, pools, plan.data, index)
    storage.write_parquet(plan.staged("fitted", index), fitted, row_group_size=ROW_GROUP_ROWS)
    return {
        "parsed": num_parsed,
        "merged": num_parsed - num_merged,
        "after_test_until": num_merged - table.num_rows,
        "drawn": num_drawn,
        "no_negative": num_missing,
        "moments": _count_train(fitted, plan, index),
        **count_rows(fitted, len(plan.adapter.scenarios)),
    }


def encode_bucket(
    index: int,
    plan: Plan,
    schema: FeatureSchema,
    vocabularies: Mapping[str, pa.Array],
    first_row_id: Sequence[int],
    user_rows: np.ndarray,
    item_rows: np.ndarray,
) -> dict[str, Any]:
    """Writes the final rows of one bucket, one file per split that has any, shuffled.

    Args:
        index: The bucket.
        plan: The plan.
        schema: The fitted schema.
        vocabularies: Of the categorical and sequence context features.
        first_row_id: row_id of each bucket's first row.
        user_rows: (num_users + 1,) train rows of each row of the users' table, row 0 unused.
        item_rows: The same of the items.

    Returns:
        num_rows: by split; unseen_users, unseen_items: rows by split, by scenario, whose user or item has no train row.
    """
    fitted = storage.read_parquet(plan.staged("fitted", index))
    split_B = fitted["split"].to_numpy()
    encoded = {
        "row_id": pa.array(np.arange(len(split_B), dtype=np.int64) + first_row_id[index]),
        **{name: fitted[name] for name in rows_schema(schema).names if name in fitted.column_names},
        **features.encode_context(fitted, [f for f in schema.features if f.source == "context"], vocabularies),
    }
    rows = pa.table(encoded).select(rows_schema(schema).names).cast(rows_schema(schema))
    num_rows = []
    for split, name in enumerate(SPLITS):
        chosen = np.flatnonzero(split_B == split)
        num_rows.append(len(chosen))
        if len(chosen):
            chosen = np.random.default_rng([plan.data.seed, index, split]).permutation(chosen)
            uri = storage.join(plan.uri, bucket_file(name, index))
            storage.write_parquet(uri, rows.take(pa.array(chosen)), row_group_size=ROW_GROUP_ROWS)
    unseen = {
        "users": user_rows[rows["user_row"].to_numpy()] == 0,
        "items": item_rows[rows["item_row"].to_numpy()] == 0,
    }
    num_scenarios = len(schema.scenarios)
    return {"num_rows": num_rows} | {
        f"unseen_{what}": count_rows(fitted.filter(pa.array(mask)), num_scenarios)["rows"]
        for what, mask in unseen.items()
    }


def count_rows(rows: pa.Table, num_scenarios: int) -> dict[str, list[list[int]]]:
    """Counts rows with columns split, scenario and label.

    Returns:
        rows and positives, each by split, by scenario.
    """
    cell_B = rows["split"].to_numpy().astype(np.int64) * num_scenarios + rows["scenario"].to_numpy()
    size = len(SPLITS) * num_scenarios
    positive_B = rows["label"].to_numpy() == 1
    return {
        "rows": np.bincount(cell_B, minlength=size).reshape(len(SPLITS), -1).tolist(),
        "positives": np.bincount(cell_B[positive_B], minlength=size).reshape(len(SPLITS), -1).tolist(),
    }


def _merged(index: int, plan: Plan) -> tuple[pa.Table, int]:
    """Returns a bucket's rows after the adapter's merge, and how many there were before."""
    uri = plan.staged(f"events/bucket-{index:05d}")
    if not storage.list_files(uri, ".parquet"):
        return plan.events.empty_table(), 0
    parsed = storage.read_parquet(uri)
    return plan.adapter.merge(parsed).select(plan.events.names).cast(plan.events), parsed.num_rows


def _timestamps(table: pa.Table) -> pa.Array:
    timestamps = table["timestamp_ms"].combine_chunks()
    if timestamps.null_count:
        row = table.filter(pc.is_null(timestamps)).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"data.split.kind = 'time' needs a time on every row; {timestamps.null_count} rows have none, such as "
            f"user {row['user_id']!r}, item {row['item_id']!r}. data.split.kind = 'per_user_last' needs no times"
        )
    return timestamps


def _named_split(table: pa.Table, plan: Plan) -> np.ndarray:
    if table["split"].null_count:
        row = table.filter(pc.is_null(table["split"])).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"data.split.kind = 'column': user {row['user_id']!r}, item {row['item_id']!r} has no value in column "
            f"{plan.data.split.column!r}; valid values are {', '.join(SPLITS)}"
        )
    split_B: np.ndarray = table["split"].to_numpy()
    return split_B


def _with_negatives(
    fitted: pa.Table, pools: Sequence[np.ndarray] | None, data: DataConfig, bucket: int
) -> tuple[pa.Table, int, int]:
    """Appends the drawn negatives; each is its positive's row with another item and label 0."""
    if pools is None:
        return fitted, 0, 0
    positive, item_row, num_missing = draw_negatives(
        fitted["user_row"].to_numpy(),
        fitted["item_row"].to_numpy(),
        fitted["scenario"].to_numpy(),
        fitted["label"].to_numpy(),
        data.negatives_per_positive,
        pools,
        np.random.default_rng([data.seed, bucket]),
    )
    drawn = fitted.take(pa.array(positive))
    for name, values in (("item_row", pa.array(item_row)), ("label", pa.array(np.zeros(len(drawn), np.int8)))):
        drawn = drawn.set_column(drawn.column_names.index(name), name, values)
    return pa.concat_tables([fitted, drawn]), len(drawn), num_missing


def _count_train(fitted: pa.Table, plan: Plan, bucket: int) -> dict[str, list[float]]:
    """Stages the counts of one bucket's train rows; returns the moments of numeric context features."""
    train = fitted.filter(pc.equal(fitted["split"], TRAIN))
    for what in ("user", "item"):
        row, num_rows = np.unique(train[f"{what}_row"].to_numpy(), return_counts=True)
        counts = pa.table({"row": pa.array(row, pa.int32()), "num_rows": pa.array(num_rows, pa.int64())})
        storage.write_parquet(plan.staged(f"rows_of_{what}", bucket), counts)
    moments = {}
    for feature in plan.context:
        column = train[feature.name]
        if feature.kind == "numeric":
            found = features.Moments.of(features.numbers(column))
            moments[feature.name] = [found.weight, found.mean, found.squares]
        else:
            values = features.first_values(column, feature.max_length)[0] if feature.kind == "sequence" else column
            counts = features.count_values(values)
            storage.write_parquet(plan.staged(f"values/{feature.name}", bucket), counts)
    return moments
