"""Golden requests: some that a checkpoint was asked when it was written, and the scores that it gave.

Whoever loads it asks them again before it serves: other scores mean damaged tables, another version of this code or of
its libraries, or a processor that computes otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.ranker import Ranker
from llm4msr.request import Key, RankRequest
from llm4msr.training.checkpoint import read_checkpoint

GOLDEN_FILE = "golden.json"
NUM_ITEMS = 20
TOLERANCE = 1e-4  # processors and libraries round differently


def write_golden(uri: str) -> None:
    """Asks the checkpoint that is being written, and keeps the scores in it.

    In every scenario: the user with the most training rows, one with a middling number, and one whom it does not know.

    Args:
        uri: The checkpoint, complete but for its manifest.
    """
    ranker = Ranker(read_checkpoint(uri), cache_bytes=0)
    users, items = (_by_rows(table) for table in (ranker.checkpoint.users, ranker.checkpoint.items))
    stranger: Key = "" if ranker.checkpoint.schema.user_key_type == "string" else int(np.iinfo(np.int64).min)
    asked = [
        RankRequest(user, scenario, items[:NUM_ITEMS])
        for scenario in ranker.checkpoint.schema.scenario_names
        for user in dict.fromkeys((*users[:1], *users[len(users) // 2 :][:1], stranger))
    ]
    rows = [{"user": r.user, "scenario": r.scenario, "items": r.items, "scores": _scores(ranker, r)} for r in asked]
    storage.write_json(storage.join(uri, GOLDEN_FILE), rows)


def check_golden(ranker: Ranker) -> None:
    """Asks the golden requests of the ranker's checkpoint again.

    Raises:
        StorageError: There are none, or a score is another one.
    """
    place = storage.join(ranker.checkpoint.uri, GOLDEN_FILE)
    if not storage.exists(place):
        raise storage.StorageError(f"{place}: no such file: the checkpoint is of an older version, train it again")
    rows: list[dict[str, Any]] = storage.read_json(place)
    for row in rows:
        scores = _scores(ranker, RankRequest(row["user"], row["scenario"], row["items"]))
        wrong = [i for i, (a, b) in enumerate(zip(scores, row["scores"], strict=True)) if not abs(a - b) <= TOLERANCE]
        if wrong:
            i = wrong[0]
            raise storage.StorageError(
                f"{place}: user {row['user']!r} in scenario {row['scenario']!r}: item {row['items'][i]!r} has the "
                f"score {scores[i]:.6f}; when the checkpoint was written it had {row['scores'][i]:.6f}: its files or "
                "the libraries are not those it was written with"
            )


def _scores(ranker: Ranker, request: RankRequest) -> list[float]:
    """Returns the scores in the order of the request; its items are distinct."""
    score = {result.item: result.score for result in ranker.rank(request).results}
    return [score[item] for item in request.items]


def _by_rows(table: pa.Table) -> list[Key]:
    """Returns the keys of a feature table, those with the most training rows first."""
    keys: list[Key] = table.sort_by([("num_train_rows", "descending")])["key"].to_pylist()
    return keys
