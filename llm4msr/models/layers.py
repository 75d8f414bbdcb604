"""Layers that backbones and meta networks share.

Rows of one scenario are handled together: `ScenarioRows` sorts a batch by scenario once, and each scenario's rows are
then a slice, without a copy.

Axes: B rows, S scenarios, D input width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """Returns an nn.ModuleList, which knows no element type, typed as a sequence of what it holds."""
    return cast(Sequence[M], nn.ModuleList(modules))


class Dropout(nn.Dropout):
    """Dropout whose mask takes a third of the time on a CPU: 16 random bits per value, p rounded to 1 / 65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeroes a share p of the values in training and scales the rest by 1 / (1 - p)."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(self.p * 2**16)
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / max(2**16 - dropped, 1))


def dense_stack(input_dim: int, hidden_dims: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Returns Linear, ReLU, Dropout per hidden width; nothing follows the last."""
    layers: list[nn.Module] = []
    for hidden_dim in hidden_dims:
        layers += [nn.Linear(input_dim, hidden_dim), nn.ReLU(), Dropout(dropout)]
        input_dim = hidden_dim
    return nn.Sequential(*layers)


class _Permute(torch.autograd.Function):
    """x[order_B], its gradient gathered by the inverse: no row meets another, so nothing needs adding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order_B: torch.Tensor, inverse_B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order_B, inverse_B)
        return x.index_select(0, order_B)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order_B, inverse_B = ctx.saved_tensors
        return _permute(gradient, inverse_B, order_B), None, None


_permute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = _Permute.apply


class Order:
    """The order of a batch's rows by their scenario, and the way back.

    Args:
        scenario_B: Rows of equal scenarios keep their order.
    """

    def __init__(self, scenario_B: torch.Tensor) -> None:
        self._order_B = torch.argsort(scenario_B, stable=True)
        self._place_B = torch.empty_like(self._order_B)
        self._place_B[self._order_B] = torch.arange(len(scenario_B), device=scenario_B.device)

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows of x sorted by scenario."""
        return _permute(x, self._order_B, self._place_B)

    def restore(self, sorted_x: torch.Tensor) -> torch.Tensor:
        """Returns sorted rows in the batch's order."""
        return _permute(sorted_x, self._place_B, self._order_B)


class ScenarioRows:
    """Where the rows of each scenario are in a batch. One that is sorted already, as the wrapper's, is not copied.

    Attributes:
        count_S: Rows of each scenario.
        sizes: The same on the host.
    """

    def __init__(self, scenario_B: torch.Tensor, num_scenarios: int) -> None:
        self.count_S = torch.bincount(scenario_B, minlength=num_scenarios)
        num_descents = (scenario_B[1:] < scenario_B[:-1]).sum()
        *sizes, num_descents = torch.cat([self.count_S, num_descents.view(1)]).tolist()
        self.sizes: list[int] = sizes
        self._order = Order(scenario_B) if num_descents else None

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows of x sorted by scenario."""
        return x if self._order is None else self._order.sort(x)

    def map(self, sorted_x: torch.Tensor, function: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Applies ``function(s, rows of scenario s)`` to sorted rows and returns the results in the batch's order.

        Scenarios without rows are called too, on zero rows: each parameter then takes part in every step, which
        distributed training relies on.
        """
        parts = [function(s, part) for s, part in enumerate(torch.split(sorted_x, self.sizes))]
        out = torch.cat(parts)
        return out if self._order is None else self._order.restore(out)


class _Normalise(torch.autograd.Function):
    """scale_s * (x - mean_s) * inverse_std_s + shift_s, with the gradient that goes through mean and deviation.

    Every worker's rows take part in the statistics, so two sums per scenario and column are added over the workers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        scale_SD: torch.Tensor,
        shift_SD: torch.Tensor,
        mean_SD: torch.Tensor,
        inverse_std_SD: torch.Tensor,
        share_S1: torch.Tensor,
        sizes: list[int],
    ) -> torch.Tensor:
        factor_SD = scale_SD * inverse_std_SD
        centred = [part - mean_SD[s] for s, part in enumerate(torch.split(x_BD, sizes))]
        ctx.save_for_backward(scale_SD, inverse_std_SD, share_S1, *centred)
        ctx.sizes = sizes
        return torch.cat([torch.addcmul(shift_SD[s], part, factor_SD[s]) for s, part in enumerate(centred)])

    @staticmethod
    def backward(ctx: Any, gradient_BD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale_SD, inverse_std_SD, share_S1, *centred = ctx.saved_tensors
        gradients = torch.split(gradient_BD, ctx.sizes)
        shift_gradient_SD = torch.stack([gradient.sum(0) for gradient in gradients])
        scale_gradient_SD = torch.stack([(a * b).sum(0) for a, b in zip(gradients, centred, strict=True)])
        scale_gradient_SD *= inverse_std_SD
        through_2SD = _sum_over_workers(torch.stack([shift_gradient_SD, scale_gradient_SD]))
        factor_SD = scale_SD * inverse_std_SD
        constant_SD, slope_SD = -share_S1 * factor_SD * through_2SD
        slope_SD *= inverse_std_SD
        x_gradient_BD = torch.cat(
            [
                torch.addcmul(torch.addcmul(constant_SD[s], part, slope_SD[s]), gradients[s], factor_SD[s])
                for s, part in enumerate(centred)
            ]
        )
        return x_gradient_BD, scale_gradient_SD, shift_gradient_SD, None, None, None, None


_normalise: Callable[..., torch.Tensor] = _Normalise.apply


def _sum_over_workers(value: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


class ScenarioNorm(nn.Module):
    """Partitioned normalisation (STAR, Sheng et al. 2021, eq. 3-4) with statistics kept per scenario.

    y = (gamma * gamma_s) * (x - mean_s) / sqrt(var_s + eps) + (beta + beta_s). In training mean_s and var_s are those
    of the scenario's rows in the global batch, over all workers; in evaluation the running ones, so that a score
    never depends on the rows beside it. A scenario with fewer than two rows in a step uses the running ones.
    """

    mean_SD: torch.Tensor
    var_SD: torch.Tensor

    def __init__(self, num_scenarios: int, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))
        self.gamma_SD = nn.Parameter(torch.ones(num_scenarios, dim))
        self.beta_SD = nn.Parameter(torch.zeros(num_scenarios, dim))
        self.register_buffer("mean_SD", torch.zeros(num_scenarios, dim))
        self.register_buffer("var_SD", torch.ones(num_scenarios, dim))

    def forward(self, x_BD: torch.Tensor, rows: ScenarioRows) -> torch.Tensor:
        """Normalises rows sorted by scenario, each with its scenario's statistics; float32 under autocast too."""
        x_BD = x_BD.to(self.mean_SD.dtype)
        if self.training:
            mean_SD, var_SD, share_S1 = self._batch_statistics(x_BD.detach(), rows)
        else:
            mean_SD, var_SD, share_S1 = self.mean_SD, self.var_SD, self.mean_SD.new_zeros(len(self.mean_SD), 1)
        inverse_std_SD = torch.rsqrt(var_SD + self.eps)
        scale_SD, shift_SD = self.gamma * self.gamma_SD, self.beta + self.beta_SD
        return _normalise(x_BD, scale_SD, shift_SD, mean_SD, inverse_std_SD, share_S1, rows.sizes)

    @torch.no_grad()
    def _batch_statistics(self, x_BD: torch.Tensor, rows: ScenarioRows) -> tuple[torch.Tensor, ...]:
        """Returns mean, variance, and 1 / rows of each scenario; 0 for one that keeps the running statistics."""
        # Centred on the running mean: the variance of features with a large mean keeps its digits.
        centred = [part - self.mean_SD[s] for s, part in enumerate(torch.split(x_BD, rows.sizes))]
        sums_SD = torch.stack([torch.cat([part.sum(0), part.square().sum(0)]) for part in centred])
        sums_SD = _sum_over_workers(torch.cat([sums_SD, rows.count_S.unsqueeze(1).to(sums_SD.dtype)], dim=1))
        count_S1 = sums_SD[:, -1:]
        share_S1 = torch.where(count_S1 >= 2, 1 / count_S1, 0.0)
        offset_SD, square_SD = (sums_SD[:, :-1] * share_S1).chunk(2, dim=1)
        mean_SD = self.mean_SD + offset_SD
        var_SD = torch.where(share_S1 > 0, (square_SD - offset_SD.square()).clamp(min=0), self.var_SD)
        unbiased_SD = var_SD * torch.where(share_S1 > 0, 1 / (1 - share_S1), 1.0)
        self.mean_SD.lerp_(mean_SD, self.momentum)
        self.var_SD.lerp_(unbiased_SD, self.momentum)
        return mean_SD, var_SD, share_S1
