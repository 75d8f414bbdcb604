"""How the items that a user liked become one vector, for each history feature.

The items are embedded by the table of item_id, which the row's own item uses too. Padding adds exactly nothing, and a
user without likes has zeros.

`AttentionPooling` is the activation unit of the Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978): a
small network looks at a liked item and the candidate together and gives the liked item's weight; the weights are not
normalised, so that a strong interest is a long vector (section 4.3). Left out: Dice, its data-adaptive activation
(PReLU stands there, as in the paper's base model), and mini-batch aware regularisation. Instead of the outer product
of the two vectors the unit sees their difference and their product, as in the authors' code.

Axes: B rows, T history length, M liked items of all rows, E embedding width.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.schema import PADDING_INDEX, Feature

# Width of the activation unit's hidden layer in the paper.
UNIT_DIM = 36


class MeanPooling(nn.Module):
    """The mean of the items, whatever the candidate."""

    def forward(self, ids_BT: torch.Tensor, items_BTE: torch.Tensor, candidate_BE: torch.Tensor) -> torch.Tensor:
        """Returns (B, E)."""
        return items_BTE.sum(1) / sequence_length(ids_BT)  # the padding row is zero


class AttentionPooling(nn.Module):
    """The sum of a(h, c) h over the items h, with a(h, c) = w PReLU(W [h, c, h - c, h * c]) and no softmax."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Linear(4 * embedding_dim, UNIT_DIM), nn.PReLU(), nn.Linear(UNIT_DIM, 1))

    def forward(self, ids_BT: torch.Tensor, items_BTE: torch.Tensor, candidate_BE: torch.Tensor) -> torch.Tensor:
        """Returns (B, E)."""
        held_BT = ids_BT != PADDING_INDEX  # most histories are short: the unit sees liked items alone, padding never
        item_ME = items_BTE[held_BT]
        candidate_ME = candidate_BE.index_select(0, held_BT.nonzero()[:, 0])
        both = [item_ME, candidate_ME, item_ME - candidate_ME, item_ME * candidate_ME]
        weight_M: torch.Tensor = self.unit(torch.cat(both, dim=1)).squeeze(1)
        weight_BT = weight_M.new_zeros(ids_BT.shape).masked_scatter(held_BT, weight_M)
        return (weight_BT.unsqueeze(2) * items_BTE).sum(1)


def build_pooling(feature: Feature, embedding_dim: int) -> nn.Module:
    """Returns the pooling that a history feature names."""
    return MeanPooling() if feature.pooling == "mean" else AttentionPooling(embedding_dim)


def sequence_length(ids_BT: torch.Tensor) -> torch.Tensor:
    """Returns how many ids of each sequence are no padding, at least 1: (B, 1)."""
    return (ids_BT != PADDING_INDEX).sum(1, keepdim=True).clamp(min=1)
