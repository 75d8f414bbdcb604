"""One training by fuxictr, as its documentation shows it; run as a script by `train_peers` in a venv of its own.

The package carries its building blocks without the zoo's DNN, so the same network is put together from them: its
`FeatureEmbedding` and `MLP_Block` under its `BaseModel`. The scenario is a feature. Its `RankDataLoader` reads the
Parquet files that its preprocessing would write (one file per split), or .npz, and its `fit` takes the steps. An
evaluation at the end of an epoch is taken out of the epoch's time. Prints one line of JSON at the end. Imports nothing
of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel

DATASET = "benchmark"


class TimedDnn(BaseModel):
    """Embeddings of all features, one stack of dense layers, and the time of each epoch."""

    def __init__(self, feature_map: FeatureMap, spec: dict[str, Any]) -> None:
        super().__init__(feature_map, model_id="dnn", verbose=0, model_root=spec["folder"], metrics=["AUC"])
        width = spec["embedding_dim"]
        self.embedding_layer = FeatureEmbedding(feature_map, width)
        self.mlp = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            hidden_units=[*spec["hidden_dims"], *spec["tower_dims"]],
            output_dim=1,
            output_activation=self.output_activation,
            dropout_rates=spec["dropout"],
        )
        self.compile("adam", "binary_crossentropy", spec["learning_rate"])
        self.reset_parameters()
        self.model_to_device()
        self.epoch_s: list[float] = []
        self._evaluated_s = 0.0

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns y_pred, (B, 1)."""
        return {"y_pred": self.mlp(self.embedding_layer(self.get_inputs(inputs), flatten_emb=True))}

    def train_epoch(self, data_generator: Any) -> None:
        """Trains one epoch and notes its time."""
        self._evaluated_s, started = 0.0, time.perf_counter()
        super().train_epoch(data_generator)
        self.epoch_s.append(time.perf_counter() - started - self._evaluated_s)

    def eval_step(self) -> None:
        """Evaluates on valid, and notes its time."""
        started = time.perf_counter()
        super().eval_step()
        self._evaluated_s += time.perf_counter() - started


def write_npz(path: Path) -> Path:
    """Writes a Parquet file's columns as .npz beside it, sequences as (rows, length)."""
    table = pq.read_table(path).combine_chunks()
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        columns[name] = column.flatten().to_numpy().reshape(len(table), -1) if is_list else column.to_numpy()
    np.savez(path.with_suffix(".npz"), **columns)
    return path.with_suffix(".npz")


def feature_map(spec: dict[str, Any]) -> FeatureMap:
    """Returns the description of the features, in the form in which fuxictr's preprocessing leaves it."""
    features = []
    for f in spec["features"]:
        described = {"source": "", "type": f["kind"], "vocab_size": f["num_embeddings"], "padding_idx": 0}
        if f["kind"] == "sequence":
            described |= {"max_len": f["max_length"], "feature_encoder": "layers.MaskedAveragePooling()"}
        elif f["name"] == "scenario":
            described.pop("padding_idx")
        features.append({f["name"]: described})
    tree = {"dataset_id": DATASET, "labels": ["label"], "features": features}
    path = Path(spec["folder"]) / "feature_map.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    found = FeatureMap(DATASET, spec["folder"])
    found.load(str(path), {"embedding_dim": spec["embedding_dim"]})
    return found


def main() -> int:
    """Trains as the JSON file named on the command line says."""
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    torch.manual_seed(0)
    os.makedirs(Path(spec["folder"]) / DATASET, exist_ok=True)
    paths = {split: Path(spec[split]) for split in ("train", "valid")}
    if spec["data_format"] == "npz":
        paths = {split: write_npz(path) for split, path in paths.items()}
    started = time.perf_counter()
    described = feature_map(spec)
    train, valid = RankDataLoader(
        described,
        stage="train",
        train_data=str(paths["train"]),
        valid_data=str(paths["valid"]),
        batch_size=spec["batch_size"],
        shuffle=True,
        data_format=spec["data_format"],
        num_workers=spec["num_loaders"],
    )
    loaded = time.perf_counter()
    model = TimedDnn(described, spec)
    model.fit(train, epochs=spec["num_epochs"], validation_data=valid)
    auc = float(model.evaluate(valid)["AUC"])
    print()
    print(json.dumps({"epoch_s": model.epoch_s, "load_s": loaded - started, "auc": auc}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
