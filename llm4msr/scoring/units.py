"""What one process does with units of work: reads the rows, scores them and commits the scores. No Ray.

The files of a unit are written whole or not at all, its errors first: a unit is done when its scores are there. Doing
it twice writes the same files again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llm4msr import storage
from llm4msr.data.source import DataError
from llm4msr.golden import check_golden
from llm4msr.ranker import Ranker
from llm4msr.request import RequestError
from llm4msr.scoring.plan import Kind, read_candidates
from llm4msr.scoring.scorer import Candidates, Scored, Scorer

SCORES_DIRECTORY, ERRORS_DIRECTORY = "scores", "errors"
# What is said of a unit: counts, or why it could not be done.
DONE = pa.schema(
    [("num_rows", pa.int64()), ("num_failed", pa.int64()), ("num_candidates", pa.int64()), ("error", pa.string())]
)


@dataclass(frozen=True)
class Task:
    """What all units of a batch share.

    Attributes:
        output_uri: Where the scores go.
        checkpoint_uri: What scores.
        model_version: Of the checkpoint that the batch was planned for.
        kind: What a row is.
        columns: Columns that are read.
        scenarios: Of users: where they are scored.
        top_k: Of users: items that are kept.
        candidates_uri: Of users: the items that are ranked; None: all of the checkpoint.
    """

    output_uri: str
    checkpoint_uri: str
    model_version: str
    kind: Kind
    columns: tuple[str, ...]
    scenarios: tuple[str, ...] = ()
    top_k: int = 1
    candidates_uri: str | None = None


class ScoreUnit:
    """Loads the model once, then scores and commits one unit after the other.

    Args:
        task: What all units share.
        num_threads: Of torch.
    """

    def __init__(self, task: Task, num_threads: int) -> None:
        self._task, self._num_threads = task, num_threads
        self._scorer: Scorer | None = None
        self._candidates: Candidates | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Does the units of a table `plan.UNITS`; returns a row of schema `DONE` for each.

        What is wrong with checkpoint or input comes back as text: Ray would bury it in an error of its own.
        """
        done: list[dict[str, Any]] = []
        for unit in batch.to_pylist():
            try:
                done.append(self.run(unit))
            except (storage.StorageError, DataError, RequestError) as error:
                done.append({"error": str(error)})
        return pa.Table.from_pylist(done, schema=DONE)

    def run(self, unit: dict[str, Any]) -> dict[str, int]:
        """Scores and commits one unit; returns the counts of `DONE`.

        Raises:
            StorageError: The checkpoint or a file of the input is missing or damaged, the checkpoint is another one
                than the batch was planned for, or it does not score as it did when it was written.
            DataError: The candidates cannot be used.
            RequestError: One of the candidates is beyond 64 bits.
        """
        scorer = self._load() if self._scorer is None else self._scorer
        scored = self._score(scorer, unit)
        about = {"model_version": self._task.model_version}
        if len(scored.errors):
            errors = scored.errors.replace_schema_metadata(about)
            storage.write_parquet(part_uri(self._task.output_uri, ERRORS_DIRECTORY, unit["unit"]), errors)
        results = scored.results.replace_schema_metadata(about)
        storage.write_parquet(part_uri(self._task.output_uri, SCORES_DIRECTORY, unit["unit"]), results)
        return {
            "num_rows": unit["num_rows"],
            "num_failed": len(scored.errors),
            "num_candidates": scored.num_candidates,
        }

    def _load(self) -> Scorer:
        torch.set_num_threads(self._num_threads)
        task = self._task
        ranker = Ranker.from_checkpoint(task.checkpoint_uri, shared=True)
        if ranker.model_version != task.model_version:
            raise storage.StorageError(
                f"{task.checkpoint_uri} is {ranker.model_version}, the batch was planned for {task.model_version}: "
                "it was replaced meanwhile, or differs between nodes"
            )
        check_golden(ranker)
        self._scorer = scorer = Scorer(ranker)
        if task.kind == "users":
            checkpoint = ranker.checkpoint
            if task.candidates_uri is None:
                items = checkpoint.items["key"].to_pylist()
            else:
                items = read_candidates(task.candidates_uri, checkpoint.schema)
            self._candidates = scorer.candidates(items)
        return scorer

    def _score(self, scorer: Scorer, unit: dict[str, Any]) -> Scored:
        task, first_row = self._task, unit["row"]
        wanted = np.arange(unit["first"], unit["first"] + unit["num_rows"])
        table = storage.read_rows(unit["file"], task.columns, wanted)
        if task.kind == "lists":
            return scorer.score_lists(table, first_row)
        if task.kind == "pairs":
            return scorer.score_pairs(table, first_row)
        assert self._candidates is not None
        users = table.rename_columns(["user"])  # the checkpoint's own are in its column key
        return scorer.score_users(users, self._candidates, task.scenarios, task.top_k, first_row)


def part_uri(output_uri: str, directory: str, unit: int) -> str:
    """Returns the place of one unit's file; files in order of names hold rows in the order of the input."""
    return storage.join(output_uri, directory, f"part-{unit:07d}.parquet")
