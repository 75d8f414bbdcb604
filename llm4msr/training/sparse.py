"""Sparse gradients of embedding tables: their exchange between workers, and the optimizers that take them.

DDP cannot reduce sparse gradients on NCCL, and would walk the whole table on gloo. The tables are therefore kept out
of DDP, and after each backward pass the workers exchange the rows that they touched: indices and values of all tables
together, padded to the longest share. The optimizers read and write those rows alone. The cost follows the batch, not
the vocabulary.

Axes: V rows of a table, E its width, R distinct rows that a step touches, T tables, W workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ROW_EPS = 1e-8


def embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters whose gradients are sparse, by name."""
    return {
        f"{name}.weight": module.get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.sparse
    }


@torch.no_grad()
def average_sparse_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each sparse gradient by its coalesced mean over the workers; nothing happens in a single process.

    Three collectives for all tables together: how many rows each worker touched of each table, their indices, their
    values. Only dense tensors travel, so gloo and NCCL are alike. All workers end with the same bits.

    Args:
        parameters: Tables (V, E) of one dtype on one device, the same on all workers; their widths may differ. One
            without a gradient counts as zero here, and stays without where no worker touched any of its rows.
    """
    parameters = list(parameters)
    if not parameters or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    own = [_coalesced(p) for p in parameters]
    size_WT = _gather(torch.tensor([len(g.values()) for g in own], device=parameters[0].device)).tolist()
    widths = [p.shape[1] for p in parameters]
    longest = max(sum(size_T) for size_T in size_WT)
    longest_values = max(sum(n * width for n, width in zip(size_T, widths, strict=True)) for size_T in size_WT)
    if longest == 0:
        return
    index_by_worker = _gather(_padded(torch.cat([g.indices()[0] for g in own]), longest))
    value_by_worker = _gather(_padded(torch.cat([g.values().flatten() for g in own]), longest_values))
    index_parts: list[list[torch.Tensor]] = [[] for _ in parameters]
    value_parts: list[list[torch.Tensor]] = [[] for _ in parameters]
    for size_T, indices, values in zip(size_WT, index_by_worker, value_by_worker, strict=True):
        first, first_value = 0, 0
        for t, (n, width) in enumerate(zip(size_T, widths, strict=True)):
            index_parts[t].append(indices[first : first + n])
            value_parts[t].append(values[first_value : first_value + n * width].view(n, width))
            first, first_value = first + n, first_value + n * width
    for parameter, index_WR, value_WRE in zip(parameters, index_parts, value_parts, strict=True):
        index_R = torch.cat(index_WR)
        if len(index_R):
            value_RE = torch.cat(value_WRE).div_(len(size_WT))
            parameter.grad = _sparse(index_R, value_RE, parameter).coalesce()


class _RowOptimizer(torch.optim.Optimizer, ABC):
    """Updates the rows that have a gradient, and reads no others: nothing of a table's size is made in a step."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's own would call a closure
        """Updates the rows of each table's sparse gradient; duplicate rows are summed first."""
        assert closure is None, "closures are not supported"
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        gradient = parameter.grad.coalesce()
                        index_R = gradient.indices()[0]
                        change_RE = self._change(index_R, gradient.values(), self.state[parameter], group)
                        # Select and copy are many times faster than index_add_ on a CPU; each row is there once.
                        parameter.index_copy_(0, index_R, parameter.index_select(0, index_R) - change_RE)

    @abstractmethod
    def _change(
        self, index_R: torch.Tensor, gradient_RE: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        """Brings the state of the rows up to date and returns what to subtract from them."""


class LazyAdam(_RowOptimizer):
    """Adam on sparse gradients: the rule and the state of `torch.optim.SparseAdam` in half its time on a CPU.

    A row without a gradient keeps its weights and its moments.

    Args:
        params: Tables (V, E).
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                zeros = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
                self.state[parameter] = {"step": 0, **dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))}

    def _change(
        self, index_R: torch.Tensor, gradient_RE: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        first_RE: torch.Tensor = state["exp_avg"].index_select(0, index_R).lerp_(gradient_RE, 1 - beta1)
        second_RE = state["exp_avg_sq"].index_select(0, index_R)
        second_RE.mul_(beta2).addcmul_(gradient_RE, gradient_RE, value=1 - beta2)
        state["exp_avg"].index_copy_(0, index_R, first_RE)
        state["exp_avg_sq"].index_copy_(0, index_R, second_RE)
        rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        return first_RE.div_(second_RE.sqrt_().add_(group["eps"])).mul_(rate)


class DenseAdam(torch.optim.Adam):
    """Adam over whole tables, though their gradients are sparse: `torch.optim.Adam`, whose decay is part of a gradient.

    Adam divides by the size of a weight's gradients. A row without data in a step has the decay alone for a gradient,
    and moves towards zero at the full rate, so the seldom a row is looked up, the more it is held back. A step costs
    what is in the tables, not what is in the batch.

    Args:
        params: Tables (V, E).
        lr: Learning rate.
        weight_decay: Times a weight, added to its gradient in each step.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's own would call a closure
        """Updates all rows of all tables; a table without a gradient has zeros for one."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        super().step()


class RowWiseAdagrad(_RowOptimizer):
    """Adagrad with one number per row: sum += mean over the row of g^2; w -= lr * g / (sqrt(sum) + eps).

    Adagrad is Duchi et al. (JMLR 2011); a row's shared sum is that of DLRM and TorchRec, where it is called
    EXACT_ROWWISE_ADAGRAD, so that tables may be trained replicated or sharded alike.

    Args:
        params: Tables (V, E).
        lr: Learning rate.
        eps: Added to the root of the sum.

    Attributes:
        state: By parameter, "sum": (V,) float.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, eps: float = ROW_EPS) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = parameter.detach().new_zeros(len(parameter))

    def _change(
        self, index_R: torch.Tensor, gradient_RE: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        sum_R: torch.Tensor = state["sum"].index_select(0, index_R).add_(gradient_RE.square().mean(1))
        state["sum"].index_copy_(0, index_R, sum_R)
        factor_R: torch.Tensor = group["lr"] / (sum_R.sqrt_().add_(group["eps"]))
        return gradient_RE * factor_R.unsqueeze(1)


def _coalesced(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is not None:
        return parameter.grad.coalesce()
    none = torch.zeros(0, dtype=torch.int64, device=parameter.device)
    return _sparse(none, parameter.new_zeros(0, parameter.shape[1]), parameter).coalesce()


def _sparse(index_R: torch.Tensor, value_RE: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    return torch.sparse_coo_tensor(index_R.unsqueeze(0), value_RE, parameter.shape, check_invariants=False)


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    out = tensor.new_zeros(length)
    out[: len(tensor)] = tensor
    return out


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the workers' tensors of one length, stacked in order of rank."""
    out = tensor.new_empty(dist.get_world_size() * len(tensor))
    dist.all_gather_single(out, tensor)
    return out.view(-1, len(tensor))
