"""Puts the knowledge table of a data set together from the store, block by block.

The vectors are written in the order in which their prompts come, and so mostly in the order in which their parts were
committed: whatever the number of users, one block of vectors and the parts it lies in are in memory at a time.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.knowledge.plan import PromptSet
from llm4msr.knowledge.store import KnowledgeStore, StoreIndex, key_text
from llm4msr.knowledge.table import FILES

BLOCK_BYTES = 1 << 25


def write_table(
    uri: str, store: KnowledgeStore, index: StoreIndex, prompts: PromptSet, num_subjects: dict[str, int]
) -> dict[str, int]:
    """Writes the files of a `KnowledgeTable`.

    Args:
        uri: Its directory.
        store: Holds the vectors.
        index: Of the store.
        prompts: All prompts; those without a vector leave their subject without knowledge.
        num_subjects: Scenarios, users and items by level, whether they have prompts or not.

    Returns:
        width; num_users_with_knowledge, num_items_with_knowledge.
    """
    position_P = index.find(prompts.keys_P)
    width = store.vectors(index, position_P[position_P >= 0][:1]).shape[1]
    scenario_P = prompts.of_level("scenario")
    scenarios_SK = np.zeros((num_subjects["scenario"], width), np.float32)
    if scenario_P.any():
        scenarios_SK[prompts.subject_row_P[scenario_P]] = store.vectors(index, position_P[scenario_P])
    _save(storage.join(uri, FILES["scenarios_SK"]), scenarios_SK)
    counts = {"width": width}
    for level in ("user", "item"):
        found_P = prompts.of_level(level) & (position_P >= 0)
        distinct_U, row_P = _in_order(position_P[found_P])
        index_N = np.zeros(num_subjects[level] + 1, np.int32)
        index_N[prompts.subject_row_P[found_P]] = row_P + 1
        _save(storage.join(uri, FILES[f"{level}_index_N"]), index_N)
        _save_vectors(storage.join(uri, FILES[f"{level}s_NK"]), store, index, distinct_U, width)
        counts[f"num_{level}s_with_knowledge"] = int(np.count_nonzero(index_N))
    return counts


def write_errors(uri: str, index: StoreIndex, prompts: PromptSet) -> pa.Table:
    """Writes why prompts have no vector; returns the same.

    Columns: level, subject_id, subject_row, key (text), and error, null where the prompt was not tried yet.
    """
    failed = np.flatnonzero(index.find(prompts.keys_P) < 0)
    file_P, record_P = prompts.place(failed)
    ids: list[str] = []
    for file in np.unique(file_P):
        column = storage.read_parquet(prompts.files[file], ["subject_id"])["subject_id"]
        ids += column.take(record_P[file_P == file]).to_pylist()
    found = pa.table(
        {
            "level": pa.array([prompts.levels[file] for file in file_P], pa.string()),
            "subject_id": pa.array(ids, pa.string()),
            "subject_row": pa.array(prompts.subject_row_P[failed], pa.int32()),
            "key": pa.array([key_text(key) for key in prompts.keys_P[failed]], pa.string()),
            "error": pa.array(index.error_of(prompts.keys_P[failed]), pa.string()),
        }
    )
    storage.write_parquet(uri, found)
    return found


def _in_order(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct positions by first appearance, and for each given one its place among them."""
    distinct, first, inverse = np.unique(positions, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]


def _save(uri: str, array: np.ndarray) -> None:
    with storage.atomic_write(uri) as file:
        np.save(file, array, allow_pickle=False)


def _save_vectors(uri: str, store: KnowledgeStore, index: StoreIndex, positions: np.ndarray, width: int) -> None:
    """Writes row 0 of zeros and then the vectors at some positions as one .npy file."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(positions) + 1, width)}
    rows = max(BLOCK_BYTES // (2 * width), 1)
    with storage.atomic_write(uri) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.zeros(width, "<f2").tobytes())
        for start in range(0, len(positions), rows):
            file.write(store.vectors(index, positions[start : start + rows]).astype("<f2", copy=False).tobytes())
