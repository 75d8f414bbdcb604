"""Sparse gradients of embedding tables over many workers.

DDP cannot reduce sparse gradients on NCCL, and would walk the whole table on gloo. The tables are therefore kept out
of DDP, and after each backward pass the workers exchange the rows that they touched: indices and values, padded to
the longest share. The cost follows the batch, not the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters whose gradients are sparse, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.sparse
    }


def average_sparse_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each sparse gradient by its mean over the workers; nothing happens in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    world_size = dist.get_world_size()
    for parameter in parameters:
        gradient = parameter.grad.coalesce()
        indices, values = gradient.indices().squeeze(0), gradient.values()
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world_size)]
        dist.all_gather(sizes, torch.tensor([len(indices)], device=values.device))
        lengths = [int(size) for size in sizes]
        longest = max(lengths)
        padded_indices = indices.new_zeros(longest)
        padded_indices[: len(indices)] = indices
        padded_values = values.new_zeros(longest, values.shape[1])
        padded_values[: len(values)] = values
        all_indices = [torch.empty_like(padded_indices) for _ in range(world_size)]
        all_values = [torch.empty_like(padded_values) for _ in range(world_size)]
        dist.all_gather(all_indices, padded_indices)
        dist.all_gather(all_values, padded_values)
        parameter.grad = torch.sparse_coo_tensor(
            torch.cat([i[:n] for i, n in zip(all_indices, lengths, strict=True)]).unsqueeze(0),
            torch.cat([v[:n] for v, n in zip(all_values, lengths, strict=True)]) / world_size,
            parameter.shape,
            check_invariants=False,
        ).coalesce()
