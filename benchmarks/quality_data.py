"""The data of `quality_peers`: a prepared directory as flat columns, encoded once for all sides.

Axes: R rows of a split, T length of a sequence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.train_sides import make_collator
from llm4msr.data.prepared import PreparedData
from llm4msr.schema import PADDING_INDEX, SPLITS
from llm4msr.training.reader import read_split


def peer_scale(prepared: PreparedData) -> float:
    """Returns what a penalty of ours is multiplied with for the peers: one over the rows of an id table."""
    sizes = [f.num_embeddings for f in prepared.schema.features if f.name in ("user_id", "item_id")]
    return 1 / math.prod(sizes) ** (1 / len(sizes))


def export(prepared: PreparedData, folder: Path) -> dict[str, Any]:
    """Writes every split as flat Parquet, encoded by the project's own collator, and describes its columns.

    Returns:
        The file of each split; features: column, name, kind, num_embeddings, max_length, padding_index of each;
        num_scenarios.

    Raises:
        ValueError: The data has histories, which no two libraries encode alike.
    """
    schema = prepared.schema
    if histories := [f.name for f in schema.select("history")]:
        raise ValueError(f"{prepared.uri}: history features {histories} cannot be exported; prepare data without them")
    collate = make_collator(prepared, None)
    folder.mkdir(parents=True, exist_ok=True)
    features = [*schema.select("categorical"), *schema.select("sequence"), *schema.select("numeric")]
    for split in SPLITS:
        batch = collate(read_split(prepared.files(split)))
        sequences = [
            pa.FixedSizeListArray.from_arrays(pa.array(ids_RT.int().numpy().ravel()), ids_RT.shape[1])
            for ids_RT in batch.sequences
        ]
        columns = [*batch.ids_BF.int().numpy().T, *sequences, *batch.numeric_BN.numpy().T]
        arrays = {f"feature_{i}": pa.array(column) for i, column in enumerate(columns)}
        assert len(columns) == len(features), (len(columns), features)
        arrays |= {"scenario": pa.array(batch.scenario_B.int().numpy()), "label": pa.array(batch.label_B.numpy())}
        pq.write_table(pa.table(arrays), folder / f"{split}.parquet")
    described = [
        {
            "column": f"feature_{i}",
            "name": f.name,
            "kind": f.kind,
            "num_embeddings": f.num_embeddings,
            "max_length": f.max_length,
            "padding_index": PADDING_INDEX,
        }
        for i, f in enumerate(features)
    ]
    files = {split: str(folder / f"{split}.parquet") for split in SPLITS}
    return files | {"features": described, "num_scenarios": len(schema.scenarios)}


def read_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns label_R and scenario_R of an exported split."""
    table = pq.read_table(path, columns=["label", "scenario"])
    return table["label"].to_numpy(), table["scenario"].to_numpy()
