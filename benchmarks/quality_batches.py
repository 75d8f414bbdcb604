"""What the peers' scripts of `quality_peers` share: their data in memory, their batches, and their stopping rule.

It lies beside `quality_rechub.py` and `quality_fuxictr.py`, which run in environments of their own, so it imports
nothing of this project. How a library is fed does not change what it learns, and whole columns cut into batches cost a
fraction of a data loader that collates row by row.

Axes: R rows of a split, S scenarios.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import roc_auc_score


def begin() -> dict[str, Any]:
    """Returns the specification that the command line names, after seeding everything; torch gets one thread."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    random.seed(spec["seed"])
    np.random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    torch.set_num_threads(1)
    return spec


def read_split(spec: Mapping[str, Any], split: str) -> dict[str, torch.Tensor]:
    """Returns the columns of a split by name, R long, sequences as (R, length); label as float32."""
    table = pq.read_table(spec[split])
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = torch.from_numpy(column.flatten().to_numpy().reshape(len(table), -1).copy())
        else:
            columns[name] = torch.from_numpy(column.to_numpy().copy())
    columns["label"] = columns["label"].float()
    return columns


class Batches:
    """Columns cut into batches.

    Args:
        columns: By name, R long.
        batch_size: Rows of a batch; the last one may be smaller.
        seed: Shuffles anew in each pass, and leaves out a last batch of one row, which has no variance to normalise
            by; None keeps the order and every row.

    Attributes:
        num_passes: How often they were gone through.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], batch_size: int, seed: int | None = None) -> None:
        self.columns, self.batch_size, self.num_passes = columns, batch_size, 0
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        num_rows = len(columns["label"])
        self._num_rows = num_rows - 1 if seed is not None and num_rows % batch_size == 1 else num_rows

    def __len__(self) -> int:
        return -(-self._num_rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.num_passes += 1
        columns = self.columns
        if self._generator is not None:
            order_R = torch.randperm(len(columns["label"]), generator=self._generator)
        for start in range(0, self._num_rows, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self._num_rows))
            if self._generator is not None:
                rows = order_R[rows]
            yield {name: column[rows] for name, column in columns.items()}


def mean_scenario_auc(scenario_R: np.ndarray) -> Callable[[Any, Any], float]:
    """Returns a function of labels and scores, R long: the mean of the scenarios' AUC, by which all sides stop."""

    def mean_auc(label: Any, score: Any) -> float:
        label_R, score_R = np.ravel(label), np.ravel(score)
        parts = [scenario_R == s for s in np.unique(scenario_R)]
        return float(np.mean([roc_auc_score(label_R[part], score_R[part]) for part in parts]))

    return mean_auc


def finish(spec: Mapping[str, Any], predict: Callable[[dict[str, torch.Tensor]], Any], num_epochs: int) -> None:
    """Writes the scores of valid and test to the run's folder and prints its line of JSON.

    Args:
        spec: As of `begin`.
        predict: Columns to scores, in their order.
        num_epochs: Trained.
    """
    for split in ("valid", "test"):
        score_R = np.asarray(predict(read_split(spec, split)), np.float64).ravel()
        np.save(Path(spec["folder"]) / f"{split}.npy", score_R)
    print()
    print(json.dumps({"epochs": num_epochs}))
