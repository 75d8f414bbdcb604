"""Exact metrics of a checkpoint on a prepared split, scored through `Ranker`, and the item-mean baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm4msr import storage
from llm4msr.data.prepared import PreparedData
from llm4msr.ranker import Ranker
from llm4msr.training.metrics import scenario_rows
from llm4msr.training.reader import list_row_groups, read_row_group

EVALUATED_SPLITS = ("valid", "test")
SCORE_BATCH_SIZE = 8192
# Weight of the scenario's mean in an item's mean, in rows.
ITEM_MEAN_PRIOR_ROWS = 10.0


def _read_split(prepared: PreparedData, split: str) -> dict[str, np.ndarray]:
    pieces = [read_row_group(group) for group in list_row_groups(prepared.files(split))]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def evaluate_checkpoint(checkpoint_uri: str, prepared_uri: str) -> list[dict[str, Any]]:
    """Returns report rows (`results` of report.json) of one run on valid and test.

    Raises:
        StorageError: The checkpoint was trained on other prepared data: its rows would mean other users and items.
    """
    ranker = Ranker.from_checkpoint(checkpoint_uri)
    prepared = PreparedData.open(prepared_uri)
    metadata = ranker.checkpoint.metadata
    if metadata["prepared"] != prepared_uri.rsplit("/", 1)[-1]:
        raise storage.StorageError(f"{checkpoint_uri} was trained on {metadata['prepared']}, not on {prepared_uri}")
    results = []
    for split in EVALUATED_SPLITS:
        rows = _read_split(prepared, split)
        scores = [
            ranker.score({name: column[i : i + SCORE_BATCH_SIZE] for name, column in rows.items()})
            for i in range(0, len(rows["row_id"]), SCORE_BATCH_SIZE)
        ]
        results += _report_rows(
            metadata["backbone"], metadata["knowledge"], metadata["seed"], split, prepared, rows, np.concatenate(scores)
        )
    return results


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
        rows = _read_split(prepared, split)
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
    rows: dict[str, np.ndarray],
    score_R: np.ndarray,
) -> list[dict[str, Any]]:
    names = prepared.schema.scenario_names
    metrics = scenario_rows(names, rows["scenario"], rows["user_row"], rows["label"], score_R)
    return [{"backbone": backbone, "knowledge": knowledge, "seed": seed, "split": split, **row} for row in metrics]
