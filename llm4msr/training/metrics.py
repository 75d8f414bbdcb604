"""Metrics per scenario: exact ones for evaluation, mergeable counts for validation between epochs.

Exact metrics take all scores of a split at once. During training each worker counts scores in fine bins; counts are
added over workers, never averaged, so any number of workers gives one result.

Axes: R rows, S scenarios, C bins.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from llm4msr.schema import ALL_SCENARIOS

# Bins over asinh(logit): rows of one bin count as tied. 0.0003 wide around logit 0, wider outwards, up to 10,000: an
# overconfident model's logits keep their order too.
NUM_BINS = 65_536
ASINH_RANGE = math.asinh(1e4)
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
    order_R = np.lexsort((score_R, user_R))
    user_R, label_R, score_R = user_R[order_R], label_R[order_R].astype(np.int64), score_R[order_R]
    first_U = np.flatnonzero(np.r_[True, user_R[1:] != user_R[:-1]])
    count_U = np.diff(np.r_[first_U, len(user_R)])
    positives_U = np.add.reduceat(label_R, first_U) if len(first_U) else np.zeros(0, np.int64)
    # Ranks within the user: position minus the user's start, ties (same user, same score) averaged.
    new_R = np.r_[True, (user_R[1:] != user_R[:-1]) | (score_R[1:] != score_R[:-1])]
    start_T = np.flatnonzero(new_R)
    size_T = np.diff(np.r_[start_T, len(user_R)])
    rank_R = np.repeat(start_T + (size_T + 1) / 2, size_T) - np.repeat(first_U, count_U)
    rank_sum_U = np.add.reduceat(rank_R * label_R, first_U) if len(first_U) else np.zeros(0)
    negatives_U = count_U - positives_U
    both_U = (positives_U > 0) & (negatives_U > 0)
    if not both_U.any():
        return float("nan")
    p_U, n_U = positives_U[both_U], negatives_U[both_U]
    auc_U = (rank_sum_U[both_U] - p_U * (p_U + 1) / 2) / (p_U * n_U)
    return float(np.average(auc_U, weights=count_U[both_U]))


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


class BinnedAuc:
    """AUC per scenario from counts of positives and negatives in bins of the logit.

    The counts are one tensor: add it over workers, then read. Against the exact AUC the error is at most half the
    share of (positive, negative) pairs that fall into one bin.
    """

    def __init__(self, num_scenarios: int) -> None:
        self.counts_S2C = torch.zeros(num_scenarios, 2, NUM_BINS, dtype=torch.int64)

    def update(self, scenario_B: torch.Tensor, label_B: torch.Tensor, logit_B: torch.Tensor) -> None:
        """Counts one batch."""
        share_B = (logit_B.double().asinh() / ASINH_RANGE).clamp(-1, 1)
        place_B = share_B.add(1).mul(NUM_BINS / 2).long().clamp(max=NUM_BINS - 1)
        flat_B = (scenario_B * 2 + label_B.long()) * NUM_BINS + place_B
        self.counts_S2C += torch.bincount(flat_B.cpu(), minlength=self.counts_S2C.numel()).view_as(self.counts_S2C)

    def compute(self) -> list[float]:
        """Returns the AUC of each scenario; NaN where a class is missing."""
        negative_SC, positive_SC = self.counts_S2C.double().unbind(1)
        below_SC = negative_SC.cumsum(1) - negative_SC / 2
        pairs_S = positive_SC.sum(1) * negative_SC.sum(1)
        return ((positive_SC * below_SC).sum(1) / pairs_S).tolist()
