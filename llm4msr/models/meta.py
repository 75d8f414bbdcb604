"""Hierarchical meta networks: knowledge vectors in, weights of meta layers out.

A `MetaNetwork` is a dense trunk K -> ... -> Z with heads that generate one `MetaLayer`'s weight and bias for each of
U subjects (users or scenarios). A generated layer is applied to B rows without a weight per row (`SubjectRows`).

The paper fixes neither depth, widths, activation nor weight form; those here are a reconstruction (docs/method.md).

Axes: B rows, U subjects, K knowledge width, Z trunk width, D input width, H output width, R rank,
N slots of L rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llm4msr.models.layers import dense_stack

FIRST_SHARE = 0.1
CPU_WEIGHTS, GPU_WEIGHTS = 2**20, 2**26  # generated weights held at a time; a CPU keeps its in its cache


class KnowledgeTrunk(nn.Module):
    """Standardises knowledge vectors and condenses them: K -> trunk_dims.

    Vectors of one template share most of their direction; the statistics over the subjects take that out. They are
    buffers, set once from the training users, and travel with the weights.

    Args:
        knowledge_dim: K.
        trunk_dims: Hidden widths; the last is Z.
        missing: Whether row 0 stands for a subject without knowledge; it then gets a learned Z-vector.
    """

    mean_K: torch.Tensor
    std_K: torch.Tensor

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
        z_UZ = self.condense(knowledge_UK)
        if self.missing_Z is not None:
            z_UZ = torch.cat([self.missing_Z.unsqueeze(0), z_UZ[1:]])
        return z_UZ

    def condense(self, knowledge_UK: torch.Tensor) -> torch.Tensor:
        """Returns z_UZ of subjects that all have knowledge."""
        z_UZ: torch.Tensor = self.dense((knowledge_UK - self.mean_K).div_(self.std_K))
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

    @torch.no_grad()
    def shrink(self) -> None:
        """Makes what it adds to a residual, or to a logit, small at first: the model begins as its backbone."""
        for generated in (self.weight_head, self.bias_head) if self.full else (self.bias_head,):
            generated.weight.mul_(FIRST_SHARE)
            generated.bias.mul_(FIRST_SHARE)
        if not self.full:
            self.up_RH.mul_(FIRST_SHARE)

    def forward(self, x_BD: torch.Tensor, z_UZ: torch.Tensor, rows: SubjectRows) -> torch.Tensor:
        """Applies to each row the layer generated from its subject's z; returns (B, H)."""
        bias_BH: torch.Tensor = self.bias_head(z_UZ).index_select(0, rows.index_B)
        if self.full:
            z_NZ = z_UZ.index_select(0, rows.subject_N)
            return rows.unslot(_multiply(rows.slot(x_BD), z_NZ, self.weight_head)) + bias_BH
        core_UR = self.weight_head(z_UZ)
        x_NLR = rows.slot(self.shared_part(x_BD))
        core_NRR = core_UR.index_select(0, rows.subject_N).view(-1, self.rank, self.rank)
        return bias_BH.addmm_(rows.unslot(x_NLR @ core_NRR), self.up_RH.to(bias_BH.dtype))

    def generate(self, z_UZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what of the layer is each subject's: `own_part`, and the bias (U, H)."""
        return self.own_part(z_UZ), self.bias_head(z_UZ)

    def shared_part(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns what of the product all subjects share: x P if low_rank, x itself if full."""
        return x_BD if self.full else x_BD @ self.down_DR

    def own_part(self, z_UZ: torch.Tensor) -> torch.Tensor:
        """Returns the weights that follow `shared_part`: C_u Q (U, R, H) if low_rank, W_u (U, D, H) if full."""
        generated: torch.Tensor = self.weight_head(z_UZ)
        if self.full:
            return generated.view(-1, self.input_dim, self.output_dim)
        return generated.view(-1, self.rank, self.rank) @ self.up_RH

    def weight(self, z_UZ: torch.Tensor) -> torch.Tensor:
        """Returns the generated weights, (U, D, H): what `forward` multiplies with, in full."""
        return self.own_part(z_UZ) if self.full else self.down_DR @ self.own_part(z_UZ)


class SubjectRows:
    """Where the rows of each subject are in a batch: N slots of `length` rows, each of one subject.

    A product with a weight per subject is then one batched product over the slots. A subject has as many slots as its
    rows fill, so that one with many rows (no knowledge: a tenth of a training batch) does not stretch the others'; the
    length is the cheapest for the batch at hand.

    Args:
        index_B: Subject of each row.
        num_subjects: U.
        trunk_dim: Z: generating a slot's weight costs as much as multiplying Z rows with it.
    """

    def __init__(self, index_B: torch.Tensor, num_subjects: int, trunk_dim: int) -> None:
        self.index_B = index_B
        num_rows, device = len(index_B), index_B.device
        count_U = torch.bincount(index_B, minlength=num_subjects)
        lengths = [1, *(step << i for i in range(num_rows.bit_length()) for step in (2, 3))]
        length_L1 = torch.tensor(lengths, device=device).unsqueeze(1)
        num_slots = (-(-count_U // length_L1)).sum(1).tolist()
        slots = zip(num_slots, lengths, strict=True)
        self.num_slots, self.length = min(slots, key=lambda slot: slot[0] * (slot[1] + trunk_dim))
        slots_U = -(-count_U // self.length)
        self.subject_N = torch.repeat_interleave(slots_U, output_size=self.num_slots)
        # A row's place: its rank among its subject's rows, after the slots of the subjects before.
        order_B = torch.argsort(index_B, stable=True)
        shift_U = (slots_U.cumsum(0) - slots_U) * self.length - (count_U.cumsum(0) - count_U)
        place_B = torch.arange(num_rows, device=device) + shift_U[index_B[order_B]]
        self.place_B = torch.empty_like(order_B).index_copy(0, order_B, place_B)

    def slot(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns the rows in their slots, zeros elsewhere, (N, L, D); of autocast's dtype if it is on."""
        device = x_BD.device.type
        if torch.is_autocast_enabled(device):
            x_BD = x_BD.to(torch.get_autocast_dtype(device))
        padded = x_BD.new_zeros(self.num_slots * self.length, x_BD.shape[1])
        return padded.index_copy(0, self.place_B, x_BD).view(self.num_slots, self.length, x_BD.shape[1])

    def unslot(self, x_NLH: torch.Tensor) -> torch.Tensor:
        """Returns the slots' rows in the batch's order, (B, H)."""
        return x_NLH.flatten(0, 1).index_select(0, self.place_B)


def _multiply(x_NLD: torch.Tensor, z_NZ: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """Multiplies each slot with the weight that the head generates from its z; returns (N, L, H)."""
    # The head's bias is the weight of a further z that is always 1.
    z_NZ = nn.functional.pad(z_NZ, (0, 1), value=1.0)
    head_WZ = torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1)
    at_once = max((CPU_WEIGHTS if x_NLD.device.type == "cpu" else GPU_WEIGHTS) // len(head_WZ), 1)
    return _generated_product(x_NLD, z_NZ, head_WZ, at_once)


class _GeneratedProduct(torch.autograd.Function):
    """x_NLD times the weights that z_NZ generates, one per slot.

    Weights exist for some slots at a time and are generated again in the backward pass: memory does not grow with the
    number of subjects, and on a CPU they stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, x_NLD: torch.Tensor, z_NZ: torch.Tensor, head_WZ: torch.Tensor, at_once: int) -> torch.Tensor:
        ctx.save_for_backward(x_NLD, z_NZ, head_WZ)
        ctx.at_once = at_once
        z_NZ, head_WZ = z_NZ.to(x_NLD.dtype), head_WZ.to(x_NLD.dtype)
        return torch.cat([torch.bmm(x, _weights(x, z, head_WZ)) for x, z in _split(at_once, x_NLD, z_NZ)])

    @staticmethod
    def backward(ctx: Any, gradient_NLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x_NLD, z_NZ, head_WZ = ctx.saved_tensors
        head, head_gradient = head_WZ.to(x_NLD.dtype), torch.zeros_like(head_WZ)
        x_gradients, z_gradients = [], []
        for x, z, gradient in _split(ctx.at_once, x_NLD, z_NZ.to(x_NLD.dtype), gradient_NLH):
            x_gradients.append(torch.bmm(gradient, _weights(x, z, head).transpose(1, 2)))
            weight_gradient = torch.bmm(x.transpose(1, 2), gradient).flatten(1)
            z_gradients.append(weight_gradient @ head)
            head_gradient += weight_gradient.t() @ z
        return torch.cat(x_gradients), torch.cat(z_gradients), head_gradient, None


_generated_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor] = _GeneratedProduct.apply


def _weights(x_NLD: torch.Tensor, z_NZ: torch.Tensor, head_WZ: torch.Tensor) -> torch.Tensor:
    input_dim = x_NLD.shape[2]
    return (z_NZ @ head_WZ.t()).view(len(z_NZ), input_dim, len(head_WZ) // input_dim)


def _split(at_once: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, at_once) for tensor in tensors), strict=True)
