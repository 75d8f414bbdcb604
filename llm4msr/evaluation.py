"""Exact metrics of a checkpoint on prepared splits, scored through `Ranker`, and the item-mean baseline.

Axes: R rows, N rows of a feature table, C bins of score.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm4msr import storage
from llm4msr.batch import Rows
from llm4msr.data.prepared import PreparedData
from llm4msr.ranker import Ranker
from llm4msr.schema import ALL_SCENARIOS
from llm4msr.training.metrics import scenario_rows
from llm4msr.training.reader import list_row_groups, read_row_group, read_split

# Of the figures below: raised when the same scores would give other ones, so that kept ones are computed again.
EVALUATION_VERSION = 1
EVALUATED_SPLITS = ("valid", "test")
SCORE_BATCH_SIZE = 8192
# Weight of the scenario's mean in an item's mean, in rows.
ITEM_MEAN_PRIOR_ROWS = 10.0
ACTIVITY_FROM = (0, 1, 4, 11, 31)  # fewest training rows of each part of the users
RELIABILITY_BINS = 10


def evaluate_checkpoint(checkpoint_uri: str, prepared_uri: str) -> list[dict[str, Any]]:
    """Returns report rows (`results` of report.json) of one run on valid and test.

    Raises:
        StorageError: The checkpoint was trained on other prepared data: its rows would mean other users and items.
    """
    ranker, prepared = _open(checkpoint_uri, prepared_uri)
    about = _about(ranker)
    return [
        row
        for split, rows, score_R in _scored_splits(ranker, prepared)
        for row in _report_rows(*about, split, prepared, rows, score_R)
    ]


def evaluate_in_detail(
    checkpoint_uri: str, prepared_uri: str, cold_max_rows: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns what `evaluate_checkpoint` does, and the same metrics for parts of the rows.

    Users and items are told apart by their training rows. Where negatives were drawn, only positives count: a drawn
    negative is nobody's experience, and drawing evenly gives an item that nobody chose as many of them as any other.

    Args:
        checkpoint_uri: A finished checkpoint.
        prepared_uri: The data it was trained on.
        cold_max_rows: A user or item with at most so many training rows is cold.

    Returns:
        Report rows, and a tree of JSON values: version: EVALUATION_VERSION; cold_max_rows; counted: "rows" or
        "positives"; slices: rows of `split`, `kind` (user activity, user, item), `slice` (1-3; cold; warm) and what
        `scenario_rows` returns; reliability: rows of `split`, `scenario` and what `reliability` returns.

    Raises:
        StorageError: As for `evaluate_checkpoint`.
    """
    ranker, prepared = _open(checkpoint_uri, prepared_uri)
    about, names = _about(ranker), prepared.schema.scenario_names
    user_N, item_N, counted = _training_rows(prepared_uri)
    results: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for split, rows, score_R in _scored_splits(ranker, prepared):
        results += _report_rows(*about, split, prepared, rows, score_R)
        parts = [
            *(("user activity", name, mask_R) for name, mask_R in activity_slices(user_N[rows["user_row"]])),
            *(("user", name, mask_R) for name, mask_R in _cold(user_N[rows["user_row"]], cold_max_rows)),
            *(("item", name, mask_R) for name, mask_R in _cold(item_N[rows["item_row"]], cold_max_rows)),
        ]
        for kind, name, mask_R in parts:
            scenario_R, user_R, label_R = (rows[column][mask_R] for column in ("scenario", "user_row", "label"))
            metrics = scenario_rows(names, scenario_R, user_R, label_R, score_R[mask_R])
            slices += [{"split": split, "kind": kind, "slice": name, **row} for row in metrics]
        for index, scenario in [(None, ALL_SCENARIOS), *enumerate(names)]:
            which = slice(None) if index is None else rows["scenario"] == index
            bins = reliability(rows["label"][which], score_R[which])
            curves += [{"split": split, "scenario": scenario, **row} for row in bins]
    return results, {
        "version": EVALUATION_VERSION,
        "cold_max_rows": cold_max_rows,
        "counted": counted,
        "slices": slices,
        "reliability": curves,
    }


def activity_slices(num_rows_R: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Divides rows by their user's training rows: 0, 1-3, 4-10, 11-30, 31+.

    A part without a row joins the next one that has any, at the end the one before.

    Args:
        num_rows_R: Training rows of each row's user.

    Returns:
        Name and mask of each part that has rows, in order.
    """
    part_R = np.searchsorted(ACTIVITY_FROM, num_rows_R, side="right") - 1
    slices, low = [], 0
    parts = np.unique(part_R).tolist()
    for part in parts:
        high = None if part == parts[-1] else ACTIVITY_FROM[part + 1] - 1
        name = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        slices.append((name, part_R == part))
        low = (high or 0) + 1
    return slices


def reliability(label_R: np.ndarray, score_R: np.ndarray) -> list[dict[str, float | int]]:
    """Returns mean score, share of positives and rows of ten bins of score that hold equally many rows.

    Equal scores lie in one bin, so there may be fewer bins, and they may be of unequal size.
    """
    if not len(score_R):
        return []
    edges = np.quantile(score_R, np.arange(1, RELIABILITY_BINS) / RELIABILITY_BINS)
    bin_R = np.searchsorted(edges, score_R, side="left")
    rows_C, score_C, label_C = (
        np.bincount(bin_R, weights, RELIABILITY_BINS) for weights in (None, score_R, label_R.astype(np.float64))
    )
    return [
        {"mean_score": score_C[c] / rows_C[c], "mean_label": label_C[c] / rows_C[c], "num_rows": int(rows_C[c])}
        for c in np.flatnonzero(rows_C)
    ]


def _cold(num_rows_R: np.ndarray, cold_max_rows: int) -> list[tuple[str, np.ndarray]]:
    is_cold_R = num_rows_R <= cold_max_rows
    return [("cold", is_cold_R), ("warm", ~is_cold_R)]


@functools.lru_cache(maxsize=1)  # a process evaluates many runs on the same data
def _training_rows(prepared_uri: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns training rows of each row of the users' and the items' table, row 0 in front, and what was counted."""
    prepared = PreparedData.open(prepared_uri)
    users, items = prepared.users(), prepared.items()
    if not prepared.manifest["data"].get("drawn_negatives"):
        user_N, item_N = (np.append(0, table["num_train_rows"].to_numpy()) for table in (users, items))
        return user_N, item_N, "rows"
    user_N, item_N = np.zeros(users.num_rows + 1, np.int64), np.zeros(items.num_rows + 1, np.int64)
    for group in list_row_groups(prepared.files("train")):
        rows = read_row_group(group, ("user_row", "item_row", "label"))
        for count_N, column in ((user_N, "user_row"), (item_N, "item_row")):
            count_N += np.bincount(rows[column][rows["label"] > 0], minlength=len(count_N))
    return user_N, item_N, "positives"


def _open(checkpoint_uri: str, prepared_uri: str) -> tuple[Ranker, PreparedData]:
    ranker = Ranker.from_checkpoint(checkpoint_uri)
    trained_on = ranker.checkpoint.metadata["prepared"]
    if trained_on != prepared_uri.rsplit("/", 1)[-1]:
        raise storage.StorageError(f"{checkpoint_uri} was trained on {trained_on}, not on {prepared_uri}")
    return ranker, PreparedData.open(prepared_uri)


def _about(ranker: Ranker) -> tuple[str, str, int]:
    metadata = ranker.checkpoint.metadata
    return metadata["backbone"], metadata["knowledge"], metadata["seed"]


def _scored_splits(ranker: Ranker, prepared: PreparedData) -> Iterator[tuple[str, Rows, np.ndarray]]:
    """Yields name, rows and scores of each evaluated split."""
    for split in EVALUATED_SPLITS:
        rows = read_split(prepared.files(split))
        scores = [
            ranker.score({name: column[i : i + SCORE_BATCH_SIZE] for name, column in rows.items()})
            for i in range(0, len(rows["row_id"]), SCORE_BATCH_SIZE)
        ]
        yield split, rows, np.concatenate(scores)


def evaluate_item_mean(prepared_uri: str) -> list[dict[str, Any]]:
    """Returns report rows of a scorer that knows only each item's mean label in train.

    score = (positives of the item + m * scenario mean) / (rows of the item + m), with m = 10 rows.
    """
    prepared = PreparedData.open(prepared_uri)
    num_items, num_scenarios = prepared.items().num_rows + 1, len(prepared.schema.scenarios)
    item_rows, item_positives = np.zeros(num_items), np.zeros(num_items)
    scenario_total, scenario_positives = np.zeros(num_scenarios), np.zeros(num_scenarios)
    for group in list_row_groups(prepared.files("train")):
        rows = read_row_group(group)
        item_rows += np.bincount(rows["item_row"], minlength=num_items)
        item_positives += np.bincount(rows["item_row"], weights=rows["label"], minlength=num_items)
        scenario_total += np.bincount(rows["scenario"], minlength=num_scenarios)
        scenario_positives += np.bincount(rows["scenario"], weights=rows["label"], minlength=num_scenarios)
    scenario_mean = scenario_positives / np.maximum(scenario_total, 1)
    results = []
    for split in EVALUATED_SPLITS:
        rows = read_split(prepared.files(split))
        prior = ITEM_MEAN_PRIOR_ROWS * scenario_mean[rows["scenario"]]
        score = (item_positives[rows["item_row"]] + prior) / (item_rows[rows["item_row"]] + ITEM_MEAN_PRIOR_ROWS)
        results += _report_rows("item_mean", "none", None, split, prepared, rows, score)
    return results


def _report_rows(
    backbone: str,
    knowledge: str,
    seed: int | None,
    split: str,
    prepared: PreparedData,
    rows: Rows,
    score_R: np.ndarray,
) -> list[dict[str, Any]]:
    names = prepared.schema.scenario_names
    metrics = scenario_rows(names, rows["scenario"], rows["user_row"], rows["label"], score_R)
    return [{"backbone": backbone, "knowledge": knowledge, "seed": seed, "split": split, **row} for row in metrics]
