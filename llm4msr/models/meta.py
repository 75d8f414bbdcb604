"""Hierarchical meta networks: knowledge vectors in, weights of meta layers out.

A `MetaNetwork` is a dense trunk K -> ... -> Z with heads that generate one `MetaLayer`'s weight and bias for each of
U subjects (users or scenarios). A generated layer is applied to B rows without ever holding a weight per row; two
orders of the same sum are used, whichever costs less (`apply_full`).

The paper fixes neither depth, widths, activation nor weight form; those here are a reconstruction (docs/method.md).

Axes: B rows, U subjects, K knowledge width, Z trunk width, D input width, H output width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llm4msr.models.layers import dense_stack


class KnowledgeTrunk(nn.Module):
    """Standardises knowledge vectors and condenses them: K -> trunk_dims.

    Vectors of one template share most of their direction; the statistics over the subjects take that out. They are
    buffers, set once from the training users, and travel with the weights.

    Args:
        knowledge_dim: K.
        trunk_dims: Hidden widths; the last is Z.
        missing: Whether row 0 stands for a subject without knowledge; it then gets a learned Z-vector.
    """

    def __init__(self, knowledge_dim: int, trunk_dims: Sequence[int], missing: bool) -> None:
        super().__init__()
        self.register_buffer("mean_K", torch.zeros(knowledge_dim))
        self.register_buffer("std_K", torch.ones(knowledge_dim))
        self.dense = dense_stack(knowledge_dim, trunk_dims)
        self.output_dim = trunk_dims[-1] if trunk_dims else knowledge_dim
        self.missing_Z = nn.Parameter(torch.zeros(self.output_dim)) if missing else None

    def set_statistics(self, mean_K: torch.Tensor, std_K: torch.Tensor) -> None:
        """Sets mean and standard deviation of the knowledge over the training subjects."""
        self.mean_K.copy_(mean_K)
        self.std_K.copy_(std_K.clamp(min=1e-6))

    def forward(self, knowledge_UK: torch.Tensor) -> torch.Tensor:
        """Returns z_UZ."""
        z_UZ = self.dense((knowledge_UK - self.mean_K) / self.std_K)
        if self.missing_Z is not None:
            z_UZ = torch.cat([self.missing_Z.unsqueeze(0), z_UZ[1:]])
        return z_UZ


class MetaLayer(nn.Module):
    """A layer x W_u + b_u whose weight and bias are generated from z_u.

    full: W_u = z_u A + a, any matrix of D x H. low_rank: W_u = P C_u Q with shared P (D x R), Q (R x H) and generated
    core C_u (R x R), as HAMUR (Li et al., CIKM 2023) and APG (Yan et al., NeurIPS 2022) do.

    Args:
        trunk_dim: Z.
        input_dim: D.
        output_dim: H.
        weight_form: full or low_rank.
        rank: R.
    """

    def __init__(self, trunk_dim: int, input_dim: int, output_dim: int, weight_form: str, rank: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim, self.full = input_dim, output_dim, weight_form == "full"
        self.bias_head = nn.Linear(trunk_dim, output_dim)
        if self.full:
            self.weight_head = nn.Linear(trunk_dim, input_dim * output_dim)
            weight_std = input_dim**-0.5
        else:
            self.rank = min(rank, input_dim, output_dim)
            self.down_DR = nn.Parameter(torch.randn(input_dim, self.rank) * input_dim**-0.5)
            self.up_RH = nn.Parameter(torch.randn(self.rank, output_dim) * self.rank**-0.5)
            self.weight_head = nn.Linear(trunk_dim, self.rank * self.rank)
            weight_std = self.rank**-0.5
        # A generated weight starts as an ordinary layer's: half of its variance shared by all subjects (the head's
        # bias), half their own (the head's weight, on a trunk output of about unit scale).
        nn.init.normal_(self.weight_head.weight, std=weight_std * (0.5 / trunk_dim) ** 0.5)
        nn.init.normal_(self.weight_head.bias, std=weight_std * 0.5**0.5)
        nn.init.zeros_(self.bias_head.bias)

    def forward(self, x_BD: torch.Tensor, z_UZ: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        """Applies to row b the layer generated from ``z_UZ[index_B[b]]``; returns (B, H)."""
        head, head_bias = self.weight_head.weight, self.weight_head.bias
        if self.full:
            out_BH = apply_full(x_BD, z_UZ, index_B, head, head_bias)
        else:
            out_BH = apply_full(x_BD @ self.down_DR, z_UZ, index_B, head, head_bias) @ self.up_RH
        return out_BH + self.bias_head(z_UZ)[index_B]

    def weight(self, z_UZ: torch.Tensor) -> torch.Tensor:
        """Returns the generated weights, (U, D, H): what `forward` multiplies with, in full."""
        generated = self.weight_head(z_UZ)
        if self.full:
            return generated.view(-1, self.input_dim, self.output_dim)
        return self.down_DR @ generated.view(-1, self.rank, self.rank) @ self.up_RH


def apply_full(
    x_BD: torch.Tensor, z_UZ: torch.Tensor, index_B: torch.Tensor, head: torch.Tensor, head_bias: torch.Tensor
) -> torch.Tensor:
    """Computes x_b W_u(b) for W_u = z_u A + a without a weight per row.

    Two orders of the same sum: weights of the distinct subjects and one padded batched product over their rows, or
    (z_b ⊗ x_b) A, which never forms a weight. The first wins when subjects have many rows each.

    Args:
        x_BD: Inputs.
        z_UZ: Trunk outputs of the subjects.
        index_B: Subject of each row.
        head: A, (D * H, Z).
        head_bias: a, (D * H).

    Returns:
        (B, H).
    """
    num_rows, input_dim = x_BD.shape
    num_subjects, trunk_dim = z_UZ.shape
    output_dim = len(head_bias) // input_dim
    count_U = torch.bincount(index_B, minlength=num_subjects)
    longest = int(count_U.max()) if num_rows else 0
    if num_subjects * (trunk_dim + longest) <= num_rows * (trunk_dim + 1):
        weight_UDH = nn.functional.linear(z_UZ, head, head_bias).view(num_subjects, input_dim, output_dim)
        if num_subjects == 1:
            return x_BD @ weight_UDH[0]
        order_B = torch.argsort(index_B, stable=True)
        first_U = torch.cumsum(count_U, 0) - count_U
        sorted_index_B = index_B[order_B]
        place_B = torch.arange(num_rows, device=x_BD.device) - first_U[sorted_index_B]
        slot_B = torch.empty_like(order_B).index_copy(0, order_B, sorted_index_B * longest + place_B)
        padded = torch.zeros(num_subjects * longest, input_dim, dtype=x_BD.dtype, device=x_BD.device)
        padded = padded.index_copy(0, slot_B, x_BD).view(num_subjects, longest, input_dim)
        return torch.bmm(padded, weight_UDH).view(num_subjects * longest, output_dim)[slot_B]
    head_ZDH = head.view(input_dim, output_dim, trunk_dim).permute(2, 0, 1).reshape(trunk_dim * input_dim, output_dim)
    outer_B = (z_UZ[index_B].unsqueeze(2) * x_BD.unsqueeze(1)).view(num_rows, trunk_dim * input_dim)
    return outer_B @ head_ZDH + x_BD @ head_bias.view(input_dim, output_dim)
