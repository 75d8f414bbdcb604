"""One training by torch-rechub, as its documentation shows it; run as a script by `train_peers` in a venv of its own.

Its `SharedBottom` with one tower, which is what a row passes in a shared bottom of several scenarios; the scenario is
a feature. Its `DataGenerator` over columns in memory makes the batches, its `MTLTrainer` takes the steps. Loading is
timed apart. Prints one line of JSON at the end. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import SharedBottom
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator


def read_columns(path: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the features by name, sequences as (rows, length), and the labels as (rows, 1)."""
    table = pq.read_table(path).combine_chunks()
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = column.flatten().to_numpy().reshape(len(table), -1)
        else:
            columns[name] = column.to_numpy()
    label = columns.pop("label").astype(np.float32)
    return columns, label[:, None]


def feature(spec: dict[str, Any], embedding_dim: int) -> SparseFeature | SequenceFeature:
    """Returns torch-rechub's own description of a feature."""
    name, size = spec["name"], spec["num_embeddings"]
    if spec["kind"] == "sequence":
        return SequenceFeature(name, vocab_size=size, embed_dim=embedding_dim, pooling="mean", padding_idx=0)
    return SparseFeature(name, vocab_size=size, embed_dim=embedding_dim)


def main() -> int:
    """Trains as the JSON file named on the command line says."""
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    torch.manual_seed(0)
    started = time.perf_counter()
    x, y = read_columns(spec["train"])
    x_valid, y_valid = read_columns(spec["valid"])
    generator = DataGenerator(x, y)
    train, valid, _ = generator.generate_dataloader(
        x_val=x_valid,
        y_val=y_valid,
        x_test=x_valid,
        y_test=y_valid,
        batch_size=spec["batch_size"],
        num_workers=spec["num_loaders"],
    )
    loaded = time.perf_counter()
    options = {"activation": "relu", "dropout": spec["dropout"]}
    model = SharedBottom(
        [feature(f, spec["embedding_dim"]) for f in spec["features"]],
        ["classification"],
        {"dims": spec["hidden_dims"], **options},
        [{"dims": spec["tower_dims"], **options}],
    )
    trainer = MTLTrainer(
        model,
        task_types=["classification"],
        optimizer_params={"lr": spec["learning_rate"], "weight_decay": spec["weight_decay"]},
        device="cpu",
    )
    epoch_s = []
    for _ in range(spec["num_epochs"]):
        before = time.perf_counter()
        trainer.train_one_epoch(train)
        epoch_s.append(time.perf_counter() - before)
    auc = float(trainer.evaluate(model, valid)[0])
    print()
    print(json.dumps({"epoch_s": epoch_s, "load_s": loaded - started, "auc": auc}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
