"""Cuts the prompts to be encoded into units of work, so that every key is encoded once.

A unit is what an actor encodes and commits at once. The plan of an extraction is written before its first unit runs
and read again by every rerun: so a unit that is done twice (by a rerun, or by an actor that was thought dead) is the
same commit, the same file, and no key ever lies in two.

Arrays only. Axes: P prompts over all files, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.knowledge.store import StoreIndex, keys_to_numpy

# One unit per row; each entry of a unit: a file of prompts, by its place in the list of files, and records in it.
PLAN = pa.schema([("unit", pa.list_(pa.struct([("file", pa.int32()), ("records", pa.list_(pa.int32()))])))])


@dataclass(frozen=True)
class PromptSet:
    """All prompts of one extraction.

    Attributes:
        files: URIs of the files of prompts.
        levels: Level of each file.
        ends_F: (F,) int64; P-position after the last prompt of each file.
        keys_P: `store.KEY_DTYPE`; key of each prompt.
        subject_row_P: int32; user_row, item_row or scenario index.
    """

    files: tuple[str, ...]
    levels: tuple[str, ...]
    ends_F: np.ndarray
    keys_P: np.ndarray
    subject_row_P: np.ndarray

    def of_level(self, level: str) -> np.ndarray:
        """Returns the (P,) mask of the prompts of one level."""
        sizes = np.diff(self.ends_F, prepend=0)
        return np.repeat(np.array([of == level for of in self.levels], dtype=bool), sizes)

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the file of each prompt, by its number, and the record there."""
        file = np.searchsorted(self.ends_F, positions, side="right")
        return file, positions - np.concatenate([[0], self.ends_F])[file]


def missing_prompts(prompts: PromptSet, index: StoreIndex) -> np.ndarray:
    """Returns the positions of the prompts whose key the store lacks, in order; of equal keys the first."""
    absent = np.flatnonzero(index.find(prompts.keys_P) < 0)
    _, first = np.unique(prompts.keys_P[absent], return_index=True)
    return absent[np.sort(first)]


def cut_units(prompts: PromptSet, missing: np.ndarray, rows_per_unit: int) -> pa.Table:
    """Returns a table `PLAN` of units of `rows_per_unit` prompts at most.

    Args:
        prompts: All prompts.
        missing: Positions of those to be encoded.
        rows_per_unit: As `knowledge.rows_per_commit`.
    """
    return _to_table(prompts, [missing[i : i + rows_per_unit] for i in range(0, len(missing), rows_per_unit)])


def open_plan(uri: str, prompts: PromptSet, missing: np.ndarray, rows_per_unit: int) -> pa.Table:
    """Returns the units of the missing prompts, from the plan at `uri`, or from a new plan written there.

    Of a planned unit only the missing prompts are returned: all, or, where some of them failed, those. A plan is
    replaced only where it does not hold every missing prompt: parts of the store were removed since.

    Args:
        uri: Place of the plan.
        prompts: All prompts.
        missing: Positions of those to be encoded.
        rows_per_unit: Of a new plan.
    """
    if storage.exists(uri):
        flat, unit = _positions(storage.read_parquet(uri), prompts)
        wanted = np.isin(flat, missing)
        if wanted.sum() == len(missing):
            flat, unit = flat[wanted], unit[wanted]
            return _to_table(prompts, np.split(flat, np.flatnonzero(np.diff(unit)) + 1) if len(flat) else [])
    plan = cut_units(prompts, missing, rows_per_unit)
    storage.write_parquet(uri, plan)
    return plan


def num_planned(units: pa.Table) -> int:
    """Returns the number of prompts in some units."""
    return len(_flatten(units)[2])


def _to_table(prompts: PromptSet, groups: Sequence[np.ndarray]) -> pa.Table:
    units = []
    for positions in groups:
        file, record = prompts.place(positions)
        units.append([{"file": int(f), "records": record[file == f].tolist()} for f in np.unique(file)])
    return pa.table({"unit": units}, schema=PLAN)


def _positions(plan: pa.Table, prompts: PromptSet) -> tuple[np.ndarray, np.ndarray]:
    """Returns the position of every planned prompt, and the unit of each."""
    unit, file, record = _flatten(plan)
    starts_F = np.concatenate([[0], prompts.ends_F])
    return starts_F[file] + record, unit


def _flatten(plan: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns unit, file and record of every planned prompt."""
    if not len(plan):
        return (np.zeros(0, np.int64),) * 3
    units = plan["unit"].combine_chunks()
    entries = units.flatten()
    records = entries.field("records")
    of_entry = np.repeat(np.arange(len(units)), units.value_lengths().to_numpy())
    lengths = records.value_lengths().to_numpy()
    return (
        np.repeat(of_entry, lengths),
        np.repeat(entries.field("file").to_numpy(), lengths),
        records.flatten().to_numpy(),
    )


def read_prompt_set(files: Sequence[tuple[str, str]]) -> PromptSet:
    """Reads keys and subjects of all prompts.

    Args:
        files: (uri, level) of each file of prompts.

    Raises:
        StorageError: A file is missing or damaged.
    """
    tables = [storage.read_parquet(uri, ["key", "subject_row"]) for uri, _ in files]
    return PromptSet(
        tuple(uri for uri, _ in files),
        tuple(level for _, level in files),
        np.cumsum([len(table) for table in tables]),
        keys_to_numpy(pa.concat_tables(tables)["key"]),
        pa.concat_tables(tables)["subject_row"].to_numpy(),
    )
