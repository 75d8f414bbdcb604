"""Exact metrics per scenario, of all scores of a split at once.

Counts that workers add while training are in `llm4msr.training.counts`.

Axes: R rows, U groups of rows (users), T ties: runs of rows of one group and one score.
"""

from __future__ import annotations

import numpy as np

from llm4msr.schema import ALL_SCENARIOS

SCORE_EPSILON = 1e-7


def auc(label_R: np.ndarray, score_R: np.ndarray) -> float:
    """Returns the exact area under the ROC curve, ties counted half; NaN where one class is missing."""
    num_positives = int(label_R.sum())
    num_negatives = len(label_R) - num_positives
    if num_positives == 0 or num_negatives == 0:
        return float("nan")
    rank_R = _mean_rank(score_R)
    rank_sum = float(rank_R[label_R > 0].sum())
    return (rank_sum - num_positives * (num_positives + 1) / 2) / (num_positives * num_negatives)


def gauc(label_R: np.ndarray, score_R: np.ndarray, user_R: np.ndarray) -> float:
    """Returns the AUC within each user, averaged with the user's rows as weight (Zhu et al., KDD 2018).

    Users without both classes have no AUC and are left out; NaN where that leaves none.
    """
    _, auc_U, rows_U = auc_by_group(label_R, score_R, user_R)
    return float(np.average(auc_U, weights=rows_U)) if len(auc_U) else float("nan")


def auc_by_group(
    label_R: np.ndarray, score_R: np.ndarray, group_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the exact AUC within each group of rows that has both classes, ties counted half.

    Returns:
        group_U: Names of the groups, ascending; those without both classes are left out.
        auc_U: AUC of each.
        rows_U: Rows of each.
    """
    order_R = np.lexsort((score_R, group_R))
    group_R, label_R, score_R = group_R[order_R], label_R[order_R].astype(np.int64), score_R[order_R]
    is_first_R = np.ones(len(group_R), bool)
    is_first_R[1:] = group_R[1:] != group_R[:-1]
    first_U = np.flatnonzero(is_first_R)
    rows_U = np.diff(np.r_[first_U, len(group_R)])
    # Ranks within the group: position minus the group's start, averaged over ties.
    is_first_R[1:] |= score_R[1:] != score_R[:-1]
    first_T = np.flatnonzero(is_first_R)
    rows_T = np.diff(np.r_[first_T, len(group_R)])
    rank_R = np.repeat(first_T + (rows_T + 1) / 2, rows_T) - np.repeat(first_U, rows_U)
    positives_U = np.add.reduceat(label_R, first_U)
    rank_sum_U = np.add.reduceat(rank_R * label_R, first_U)
    both_U = (positives_U > 0) & (positives_U < rows_U)
    p_U, n_U = positives_U[both_U], (rows_U - positives_U)[both_U]
    auc_U = (rank_sum_U[both_U] - p_U * (p_U + 1) / 2) / (p_U * n_U)
    return group_R[first_U[both_U]], auc_U, rows_U[both_U]


def log_loss(label_R: np.ndarray, score_R: np.ndarray) -> float:
    """Returns the mean binary cross-entropy in nats; scores are kept 1e-7 away from 0 and 1."""
    score_R = np.clip(score_R.astype(np.float64), SCORE_EPSILON, 1 - SCORE_EPSILON)
    return float(-np.mean(np.where(label_R > 0, np.log(score_R), np.log1p(-score_R))))


def calibration(label_R: np.ndarray, score_R: np.ndarray) -> float:
    """Returns the sum of scores over the sum of labels; 1 is right, NaN without positives."""
    positives = float(label_R.sum())
    return float(score_R.sum(dtype=np.float64) / positives) if positives else float("nan")


def _mean_rank(score_R: np.ndarray) -> np.ndarray:
    """Returns ranks from 1, ties averaged."""
    _, inverse_R, count_T = np.unique(score_R, return_inverse=True, return_counts=True)
    last_T = np.cumsum(count_T)
    return (last_T - (count_T - 1) / 2)[inverse_R]


def scenario_rows(
    scenario_names: tuple[str, ...],
    scenario_R: np.ndarray,
    user_R: np.ndarray,
    label_R: np.ndarray,
    score_R: np.ndarray,
) -> list[dict[str, float | int | str | None]]:
    """Returns a report row for "all" and for each scenario; a metric that is not defined is None.

    Args:
        scenario_names: By scenario index.
        scenario_R: Scenario index.
        user_R: User of the row, for GAUC.
        label_R: 0 or 1.
        score_R: Probability.
    """
    rows = []
    for index, name in [(None, ALL_SCENARIOS), *enumerate(scenario_names)]:
        mask = slice(None) if index is None else scenario_R == index
        label, score = label_R[mask], score_R[mask]
        values = {"auc": np.nan, "gauc": np.nan, "log_loss": np.nan, "calibration": np.nan}
        if len(label):
            values = {
                "auc": auc(label, score),
                "gauc": gauc(label, score, user_R[mask]),
                "log_loss": log_loss(label, score),
                "calibration": calibration(label, score),
            }
        rows.append(
            {
                "scenario": name,
                **{k: None if np.isnan(v) else v for k, v in values.items()},
                "num_rows": len(label),
                "num_positives": int(label.sum()),
            }
        )
    return rows
