"""What backbones made of experts share: a batch of experts, gates that mix them, and the scenarios' towers.

Experts of one group have equal widths, so a layer of all of them is one batched product.

Axes: B rows, S scenarios, N experts, D input width, H width of an expert's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.layers import Dropout, dense_stack


class Experts(nn.Module):
    """N dense stacks of the same input: Linear, ReLU, Dropout per hidden width, as `layers.dense_stack`.

    Args:
        num_experts: N.
        input_dim: D.
        hidden_dims: Widths of each expert; without any an expert is its input.
        dropout: After each hidden layer.

    Attributes:
        output_dim: H.
    """

    def __init__(self, num_experts: int, input_dim: int, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__()
        dims = (input_dim, *hidden_dims)
        self.num_experts, self.output_dim = num_experts, dims[-1]
        # As nn.Linear starts: uniform, within the inverse root of the layer's input width.
        self.weights_NDH = nn.ParameterList(
            torch.empty(num_experts, a, b).uniform_(-(a**-0.5), a**-0.5) for a, b in itertools.pairwise(dims)
        )
        self.biases_N1H = nn.ParameterList(
            torch.empty(num_experts, 1, b).uniform_(-(a**-0.5), a**-0.5) for a, b in itertools.pairwise(dims)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns what each expert makes of each row, (N, B, H)."""
        x_NBD = x_BD.expand(self.num_experts, *x_BD.shape)
        for weight_NDH, bias_N1H in zip(self.weights_NDH, self.biases_N1H, strict=True):
            x_NBD = self.dropout(torch.relu(torch.baddbmm(bias_N1H, x_NBD, weight_NDH)))
        return x_NBD


class Gate(nn.Module):
    """One linear layer without bias and a softmax: how much of each of N experts a row gets."""

    def __init__(self, input_dim: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, num_experts, bias=False)

    def forward(self, x_BD: torch.Tensor, expert_NBH: torch.Tensor) -> torch.Tensor:
        """Mixes the experts' outputs by the gate's weights for x; returns (B, H)."""
        weight_BN = self.linear(x_BD).softmax(1)
        return torch.einsum("bn,nbh->bh", weight_BN, expert_NBH)


class Mixture(nn.Module):
    """A mixture of experts: experts and the gate that mixes them, both on the same input.

    Attributes:
        output_dim: H.
    """

    def __init__(self, num_experts: int, input_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.experts = Experts(num_experts, input_dim, config.hidden_dims, config.dropout)
        self.gate = Gate(input_dim, num_experts)
        self.output_dim = self.experts.output_dim

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns (B, H)."""
        mixed_BH: torch.Tensor = self.gate(x_BD, self.experts(x_BD))
        return mixed_BH


class Tower(nn.Module):
    """Hidden layers of ``config.tower_dims`` and a last one of width 1, which nothing follows."""

    def __init__(self, input_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.hidden = dense_stack(input_dim, config.tower_dims, config.dropout)
        self.last = nn.Linear(config.tower_dims[-1] if config.tower_dims else input_dim, 1)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        logit_B1: torch.Tensor = self.last(self.hidden(x_BD))
        return logit_B1.squeeze(1)


def towers(num_scenarios: int, input_dim: int, config: ModelConfig) -> nn.ModuleList:
    """Returns one tower per scenario."""
    return nn.ModuleList(Tower(input_dim, config) for _ in range(num_scenarios))
