"""Layers that backbones and meta networks share.

Axes: B rows, S scenarios, D input width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn


def dense_stack(input_dim: int, hidden_dims: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Returns Linear, ReLU, Dropout per hidden width; nothing follows the last."""
    layers: list[nn.Module] = []
    for hidden_dim in hidden_dims:
        layers += [nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout)]
        input_dim = hidden_dim
    return nn.Sequential(*layers)


def scenario_rows(scenario_B: torch.Tensor, num_scenarios: int) -> list[torch.Tensor]:
    """Returns the row numbers of each scenario; an empty tensor for one that the batch lacks."""
    return [torch.nonzero(scenario_B == s).squeeze(1) for s in range(num_scenarios)]


def map_by_scenario(
    x_BD: torch.Tensor, rows: list[torch.Tensor], function: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Applies ``function(s, x of scenario s)`` to each scenario's rows and puts the results back in their places.

    Scenarios without rows are called too, on zero rows: each parameter then takes part in every step, which
    distributed training relies on.
    """
    parts = [function(s, x_BD[index]) for s, index in enumerate(rows)]
    order_B = torch.cat(rows)
    out = torch.empty((len(x_BD), *parts[0].shape[1:]), dtype=parts[0].dtype, device=x_BD.device)
    return out.index_copy(0, order_B, torch.cat(parts))


class _SumOverWorkers(torch.autograd.Function):
    """Adds a tensor over all workers; each worker's input takes part in every worker's loss, so gradients add too."""

    @staticmethod
    def forward(_, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class ScenarioNorm(nn.Module):
    """Partitioned normalisation (STAR, Sheng et al. 2021, eq. 3-4) with statistics kept per scenario.

    y = (gamma * gamma_s) * (x - mean_s) / sqrt(var_s + eps) + (beta + beta_s). In training mean_s and var_s are those
    of the scenario's rows in the global batch, over all workers; in evaluation the running ones, so that a score
    never depends on the rows beside it. A scenario with fewer than two rows in a step uses the running ones.
    """

    def __init__(self, num_scenarios: int, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))
        self.gamma_SD = nn.Parameter(torch.ones(num_scenarios, dim))
        self.beta_SD = nn.Parameter(torch.zeros(num_scenarios, dim))
        self.register_buffer("mean_SD", torch.zeros(num_scenarios, dim))
        self.register_buffer("var_SD", torch.ones(num_scenarios, dim))

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Normalises each row with its scenario's statistics."""
        mean_SD, var_SD = self._batch_statistics(x_BD, scenario_B) if self.training else (self.mean_SD, self.var_SD)
        scale_SD = self.gamma * self.gamma_SD * torch.rsqrt(var_SD + self.eps)
        shift_SD = self.beta + self.beta_SD
        return (x_BD - mean_SD[scenario_B]) * scale_SD[scenario_B] + shift_SD[scenario_B]

    def _batch_statistics(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones_B1 = torch.ones_like(x_BD[:, :1])
        sums = torch.zeros(len(self.mean_SD), 2 * x_BD.shape[1] + 1, dtype=x_BD.dtype, device=x_BD.device)
        # Centred on the running mean: the variance of features with a large mean keeps its digits.
        centred_BD = x_BD - self.mean_SD[scenario_B]
        sums = sums.index_add(0, scenario_B, torch.cat([centred_BD, centred_BD.square(), ones_B1], dim=1))
        if dist.is_available() and dist.is_initialized():
            sums = _SumOverWorkers.apply(sums)
        dim = x_BD.shape[1]
        count_S1 = sums[:, -1:].detach()
        enough_S1 = count_S1 >= 2
        offset_SD = sums[:, :dim] / count_S1.clamp(min=1)
        batch_var_SD = (sums[:, dim : 2 * dim] / count_S1.clamp(min=1) - offset_SD.square()).clamp(min=0)
        mean_SD = torch.where(enough_S1, self.mean_SD + offset_SD, self.mean_SD)
        var_SD = torch.where(enough_S1, batch_var_SD, self.var_SD)
        with torch.no_grad():
            unbiased_SD = var_SD * torch.where(enough_S1, count_S1 / (count_S1 - 1).clamp(min=1), 1.0)
            self.mean_SD.lerp_(mean_SD, self.momentum)
            self.var_SD.lerp_(unbiased_SD, self.momentum)
        return mean_SD, var_SD
