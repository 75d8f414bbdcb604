"""Validation metrics per scenario from counts that workers add, never average.

Each worker counts the rows that it scores; added over workers the counts give one result, however the rows were shared
out: the bins are integers, so AUC is the same bit for bit, and the float64 sums of log loss and GAUC differ by rounding
alone. AUC comes from fine bins of the logit and states the bound of its error; log loss and GAUC are exact.

Exact metrics of all scores at once are in `llm4msr.training.metrics`.

Axes: B rows of a batch, R rows of whole users, U users of a scenario, S scenarios, C bins.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from llm4msr.training.metrics import auc_by_group

# Bins over asinh(logit): rows of one bin count as tied. 0.0003 wide around logit 0, wider outwards, up to 10,000: an
# overconfident model's logits keep their order too.
NUM_BINS = 65_536
ASINH_RANGE = math.asinh(1e4)


class ScenarioCounts:
    """Counts of scored rows per scenario, 1 MiB a scenario.

    Args:
        num_scenarios: Scenarios of the data.
        device: Where the counts lie, and so where `tensors` can be added over workers.
    """

    def __init__(self, num_scenarios: int, device: torch.device | str = "cpu") -> None:
        self.rows_S2C = torch.zeros(num_scenarios, 2, NUM_BINS, dtype=torch.int64, device=device)
        # By scenario: log loss; AUC of each user times the user's rows; rows of users that have an AUC.
        self.sums_3S = torch.zeros(3, num_scenarios, dtype=torch.float64, device=device)

    def update(self, scenario_B: torch.Tensor, label_B: torch.Tensor, logit_B: torch.Tensor) -> None:
        """Counts one batch for AUC and log loss; the tensors may lie on any device.

        Args:
            scenario_B: int64 scenario index.
            label_B: 0 or 1.
            logit_B: Of any float type.
        """
        scenario_B, label_B, logit_B = (t.detach().to(self.sums_3S.device) for t in (scenario_B, label_B, logit_B))
        logit_B, is_positive_B = logit_B.double(), label_B.long()
        share_B = logit_B.asinh().div(ASINH_RANGE).nan_to_num(nan=0.0).clamp(-1, 1)
        bin_B = share_B.add(1).mul(NUM_BINS / 2).long().clamp(max=NUM_BINS - 1)
        place_B = (scenario_B * 2 + is_positive_B) * NUM_BINS + bin_B
        self.rows_S2C.view(-1).scatter_add_(0, place_B, torch.ones_like(place_B))
        loss_B = -logsigmoid(torch.where(is_positive_B > 0, logit_B, -logit_B))
        self.sums_3S[0].index_add_(0, scenario_B, loss_B)

    def update_users(
        self, user_R: np.ndarray, scenario_R: np.ndarray, label_R: np.ndarray, logit_R: np.ndarray
    ) -> None:
        """Counts users for GAUC. All rows of every user named must come in one call, on one worker.

        Args:
            user_R: int user of each row, in any order.
            scenario_R: int scenario index.
            label_R: 0 or 1.
            logit_R: Or any score that grows with it.
        """
        num_scenarios = self.sums_3S.shape[1]
        group_R = user_R.astype(np.int64) * num_scenarios + scenario_R
        group_U, auc_U, rows_U = auc_by_group(label_R, logit_R, group_R)
        sums_2S = [np.bincount(group_U % num_scenarios, w_U, num_scenarios) for w_U in (auc_U * rows_U, rows_U)]
        self.sums_3S[1:] += torch.from_numpy(np.stack(sums_2S)).to(self.sums_3S.device)

    def tensors(self) -> list[torch.Tensor]:
        """Returns the whole state, to be added over workers in place."""
        return [self.rows_S2C, self.sums_3S]

    def compute(self) -> dict[str, list[float]]:
        """Returns the metrics, one value per scenario; NaN where one is not defined or a logit was NaN.

        Returns:
            ``auc``: binned, rows of one bin tied.
            ``auc_bound``: The most that it can differ from the exact AUC: half the share of (positive, negative) pairs
                that fall into one bin.
            ``gauc``: As `metrics.gauc`; exact.
            ``log_loss``: Mean of -log(sigmoid(logit)), of -log(sigmoid(-logit)) for label 0, in nats; exact.
                `metrics.log_loss` keeps scores 1e-7 away from 0 and 1 and so differs beyond logits of 16.1: it counts
                at most 16.1 for a wrong row.
        """
        negative_SC, positive_SC = self.rows_S2C.double().unbind(1)
        below_SC = negative_SC.cumsum(1) - negative_SC / 2
        pairs_S = positive_SC.sum(1) * negative_SC.sum(1)
        loss_S, auc_sum_S, auc_rows_S = self.sums_3S
        loss_S = loss_S / (negative_SC + positive_SC).sum(1)
        metrics = {
            "auc": (positive_SC * below_SC).sum(1) / pairs_S,
            "auc_bound": (positive_SC * negative_SC).sum(1) / pairs_S / 2,
            "gauc": auc_sum_S / auc_rows_S,
            "log_loss": loss_S,
        }
        return {name: value_S.where(~loss_S.isnan(), math.nan).tolist() for name, value_S in metrics.items()}
