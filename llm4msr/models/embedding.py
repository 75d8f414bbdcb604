"""Embedding tables: a batch to the backbone's input.

Axes: B rows, F categorical features, E embedding width, D input width, T sequence length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llm4msr.schema import PADDING_INDEX, UNSEEN_INDEX, FeatureSchema

if TYPE_CHECKING:
    from llm4msr.batch import Batch


class FeatureEmbedding(nn.Module):
    """Embeds a batch: categorical features, mean-pooled sequences, numeric features as they are, concatenated.

    Gradients of the tables are sparse, so that a step costs what it touches and not what the vocabulary holds.

    Args:
        schema: Names and sizes the features.
        embedding_dim: E.
        unseen_dropout: In training, the share of rows whose user id is shown as unseen; item ids likewise.
            It teaches index 1, which a vocabulary without rare values would never train.

    Attributes:
        embedded_dim: (F + number of sequences) * E, the leading columns of x.
        output_dim: D = embedded_dim + number of numeric features.
    """

    def __init__(self, schema: FeatureSchema, embedding_dim: int, unseen_dropout: float = 0.0) -> None:
        super().__init__()
        categorical, sequences = schema.select("categorical"), schema.select("sequence")
        self.tables = nn.ModuleList(_table(f.num_embeddings, embedding_dim) for f in categorical)
        self.sequence_tables = nn.ModuleList(_table(f.num_embeddings, embedding_dim) for f in sequences)
        self.id_columns = [i for i, f in enumerate(categorical) if f.name in ("user_id", "item_id")]
        self.unseen_dropout = unseen_dropout
        self.embedded_dim = (len(categorical) + len(sequences)) * embedding_dim
        self.output_dim = self.embedded_dim + len(schema.select("numeric"))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns x_BD."""
        ids_BF = batch.ids_BF
        if self.training and self.unseen_dropout > 0:
            ids_BF = ids_BF.clone()
            for column in self.id_columns:
                hidden_B = torch.rand(len(ids_BF), device=ids_BF.device) < self.unseen_dropout
                ids_BF[:, column].masked_fill_(hidden_B, UNSEEN_INDEX)
        parts = [table(ids_BF[:, i]) for i, table in enumerate(self.tables)]
        for table, ids_BT in zip(self.sequence_tables, batch.sequences, strict=True):
            length_B1 = (ids_BT != PADDING_INDEX).sum(1, keepdim=True).clamp(min=1)
            parts.append(table(ids_BT).sum(1) / length_B1)  # the padding row is zero
        return torch.cat([*parts, batch.numeric_BN], dim=1)


def _table(num_embeddings: int, embedding_dim: int) -> nn.Embedding:
    table = nn.Embedding(num_embeddings, embedding_dim, padding_idx=PADDING_INDEX, sparse=True)
    nn.init.normal_(table.weight, std=0.05)
    with torch.no_grad():
        table.weight[: UNSEEN_INDEX + 1] = 0  # an unseen value starts, and without training stays, neutral
    return table
