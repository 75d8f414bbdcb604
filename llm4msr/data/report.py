"""What prepare says about the data it made, and when it refuses to make it.

Pure: works on the counts that the tasks return. In every table of counts the first axis is the split and the second
the scenario.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llm4msr.data.prepared import ALL_SCENARIOS
from llm4msr.data.source import DataError
from llm4msr.data.splits import TRAIN, VALID, Thresholds
from llm4msr.schema import SPLITS

# Damaged rows of each role that an error shows.
_SHOWN_REJECTS = 5
# What to change, by kind of split, so that other rows come into valid.
_REMEDIES = {
    "time": "data.split.valid_from and test_from, or without them data.split.valid_fraction and test_fraction",
    "per_user_last": "data.split.valid_fraction and test_fraction",
    "column": "the column that data.split.column names",
}


@dataclass(frozen=True)
class RoleCount:
    """Rows of all files of one role: an adapter's own name for its interactions, users or items."""

    role: str
    num_good: int
    rejected: Mapping[str, int]

    @property
    def num_rejected(self) -> int:
        """Rejected rows of all reasons."""
        return sum(self.rejected.values())


def by_role(results: Sequence[Mapping[str, Any]]) -> list[RoleCount]:
    """Adds up what parsing returned (role, rows, rejected) over the files of each role."""
    rows: Counter[str] = Counter()
    rejected: dict[str, Counter[str]] = {}
    for result in results:
        rows[result["role"]] += result["rows"]
        rejected.setdefault(result["role"], Counter()).update(result["rejected"])
    return [RoleCount(role, rows[role], dict(sorted(rejected[role].items()))) for role in sorted(rejected)]


def too_many_rejected(roles: Sequence[RoleCount], max_fraction: float) -> dict[str, str]:
    """Returns the roles that lost more than `max_fraction` of their rows, each with a line that says so."""
    lines = {}
    for role in roles:
        total = role.num_good + role.num_rejected
        if total and role.num_rejected / total > max_fraction:
            lines[role.role] = (
                f"{role.role}: {role.num_rejected} of {total} rows ({role.num_rejected / total:.2%}) are damaged; "
                f"data.max_rejected_fraction allows {max_fraction:.2%}"
            )
    return lines


def first_rejects(rejects: pa.Table) -> list[str]:
    """Returns a line for each of the first rows of a table of `schema.REJECTS`."""
    return [
        f"  {row['file']}:{row['line']} {row['reason']} {row['detail'] or ''}".rstrip()
        for row in rejects.slice(0, _SHOWN_REJECTS).to_pylist()
    ]


def check_splits(
    rows_SC: np.ndarray, positives_SC: np.ndarray, scenario_names: Sequence[str], kind: str, thresholds: Thresholds
) -> None:
    """Checks that there is something to train on and to measure with.

    Args:
        rows_SC: Rows by split and scenario.
        positives_SC: Those with label 1.
        scenario_names: In the order of their index.
        kind: data.split.kind.
        thresholds: Of the time split.

    Raises:
        DataError: A split has no row, or a scenario none in train, or a scenario lacks a label in valid.
    """
    empty = [
        f"the {name} split has no rows" for name, rows in zip(SPLITS, rows_SC.sum(axis=1), strict=True) if not rows
    ]
    if rows_SC[TRAIN].any():
        empty += [
            f"scenario {name!r} has no train rows"
            for name, rows in zip(scenario_names, rows_SC[TRAIN], strict=True)
            if not rows
        ]
    if empty:
        counts = "; ".join(
            f"{split}: " + ", ".join(f"{name} {rows}" for name, rows in zip(scenario_names, rows_C, strict=True))
            for split, rows_C in zip(SPLITS, rows_SC.tolist(), strict=True)
        )
        raise DataError(f"{'; '.join(empty)}. Rows by split and scenario: {counts}. {explain_split(kind, thresholds)}")
    undefined = undefined_auc(rows_SC[VALID], positives_SC[VALID], scenario_names)
    if undefined:
        raise DataError(
            f"the valid split cannot stop the training: {'; '.join(undefined)}. Each scenario needs rows of both "
            f"labels in valid: change {_REMEDIES[kind]}, or where the data holds positives alone set "
            f"data.negatives_per_positive. {explain_split(kind, thresholds)}"
        )


def undefined_auc(rows_C: np.ndarray, positives_C: np.ndarray, scenario_names: Sequence[str]) -> list[str]:
    """Returns one line for each scenario of a split whose AUC is not defined, for want of rows of both labels."""
    return [
        f"scenario {name!r} has {positives} positive and {rows - positives} negative rows, its AUC is not defined"
        for name, rows, positives in zip(scenario_names, rows_C.tolist(), positives_C.tolist(), strict=True)
        if not 0 < positives < rows
    ]


def explain_split(kind: str, thresholds: Thresholds) -> str:
    """Returns how the rows were divided, in words."""
    moments = ", ".join(f"{k} {v}" for k, v in thresholds.to_json().items() if v is not None and not k.endswith("_ms"))
    return f"data.split.kind = {kind!r}" + (f" with {moments}" if moments else "")


def rows_block(rows_SC: np.ndarray, positives_SC: np.ndarray, scenario_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns number of rows and positives of each split and scenario, and of all scenarios together."""
    return [
        {"split": split, "scenario": scenario, "num_rows": int(num_rows), "num_positives": int(num_positives)}
        for split, scenario, (num_rows, num_positives) in _cells(np.stack([rows_SC, positives_SC]), scenario_names)
    ]


def unseen_block(
    rows_SC: np.ndarray, users_SC: np.ndarray, items_SC: np.ndarray, scenario_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the shares of valid and test rows whose user, or item, has no train row; None where there is no row."""
    return [
        {
            "split": split,
            "scenario": scenario,
            "user_share": _share(users, rows),
            "item_share": _share(items, rows),
        }
        for split, scenario, (rows, users, items) in _cells(np.stack([rows_SC, users_SC, items_SC]), scenario_names)
        if split != SPLITS[TRAIN]
    ]


def label_shares(rows_SC: np.ndarray, positives_SC: np.ndarray, scenario_names: Sequence[str]) -> dict[str, Any]:
    """Returns the share of positives in each scenario, and in all, over all splits."""
    names = [*scenario_names, ALL_SCENARIOS]
    rows, positives = (np.append(x.sum(axis=0), x.sum()) for x in (rows_SC, positives_SC))
    return {name: _share(p, n) for name, p, n in zip(names, positives, rows, strict=True)}


def rejected_block(roles: Sequence[RoleCount]) -> list[dict[str, Any]]:
    """Returns the number of rejected rows of each role and reason."""
    return [
        {"role": role.role, "reason": reason, "num_rows": num_rows}
        for role in roles
        for reason, num_rows in role.rejected.items()
    ]


def _cells(counts_NSC: np.ndarray, scenario_names: Sequence[str]) -> Iterator[tuple[str, str, np.ndarray]]:
    with_all = np.concatenate([counts_NSC, counts_NSC.sum(axis=2, keepdims=True)], axis=2)
    for s, split in enumerate(SPLITS):
        for c, scenario in enumerate([*scenario_names, ALL_SCENARIOS]):
            yield split, scenario, with_all[:, s, c]


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
