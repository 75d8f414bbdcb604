"""Embedding tables: a batch to the backbone's input.

A table's first values follow from its own seed and are drawn block by block, so that they are the same however the
table is laid out: `fill_rows` makes any range of rows without the rest of the table.

Axes: B rows, F categorical features, E embedding width, D input width, T sequence length, V rows of a table, R rows of
a range of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llm4msr.models.backbones.base import InputLayout
from llm4msr.models.history import build_pooling, sequence_length
from llm4msr.schema import ITEM_ID, PADDING_INDEX, UNSEEN_INDEX, FeatureSchema

if TYPE_CHECKING:
    from llm4msr.batch import Batch

BLOCK_ROWS = 65_536
INITIAL_STD = 0.05


class FeatureEmbedding(nn.Module):
    """Embeds a batch: categorical features, mean-pooled sequences, pooled histories, numeric features as they are.

    Gradients of the tables are sparse, so that a step costs what it touches and not what the vocabulary holds.
    A history has no table of its own: it uses that of item_id.

    Args:
        schema: Names and sizes the features.
        embedding_dim: E.
        unseen_dropout: In training, the share of rows whose user id is shown as unseen; item ids likewise.
            It teaches index 1, which a vocabulary without rare values would never train. A history's attention sees
            the item as shown, so a hidden one is hidden from it too; the liked items are shown as they are.
        materialize: False leaves the tables on the meta device, without memory, for whoever lays them out otherwise
            (`llm4msr.training.sharding`). torch's generator moves on by the same amount either way.

    Attributes:
        table_seeds: The seed of each table's first values: `tables`, then `sequence_tables`. Drawn from torch's
            generator: ``torch.manual_seed`` decides them.
        fields: Names of the embedded features, in the order of their columns.
        embedded_dim: (F + number of sequences + number of histories) * E, the leading columns of x.
        output_dim: D = embedded_dim + number of numeric features.
    """

    def __init__(
        self, schema: FeatureSchema, embedding_dim: int, unseen_dropout: float = 0.0, materialize: bool = True
    ) -> None:
        super().__init__()
        categorical, sequences = schema.select("categorical"), schema.select("sequence")
        histories = schema.select("history")
        features = [*categorical, *sequences]
        self.table_seeds = torch.randint(2**62, (len(features),), device="cpu").tolist()
        tables = [
            _table(f.num_embeddings, embedding_dim, seed, materialize)
            for f, seed in zip(features, self.table_seeds, strict=True)
        ]
        self.tables = nn.ModuleList(tables[: len(categorical)])
        self.sequence_tables = nn.ModuleList(tables[len(categorical) :])
        self.histories = nn.ModuleList(build_pooling(f, embedding_dim) for f in histories)
        self.item_column = [f.name for f in categorical].index(ITEM_ID) if histories else None
        self.id_columns = [i for i, f in enumerate(categorical) if f.name in ("user_id", ITEM_ID)]
        self.unseen_dropout = unseen_dropout
        self.fields = tuple(f.name for f in (*features, *histories))
        self.embedding_dim = embedding_dim
        self.embedded_dim = len(self.fields) * embedding_dim
        self.output_dim = self.embedded_dim + len(schema.select("numeric"))

    def layout(self, num_more: int = 0) -> InputLayout:
        """Returns what the columns of x are, with so many more of item knowledge at the end."""
        return InputLayout(self.fields, self.embedding_dim, self.output_dim - self.embedded_dim + num_more)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns x_BD."""
        ids_BF = batch.ids_BF
        if self.training:
            ids_BF = hide_ids(ids_BF, self.id_columns, self.unseen_dropout)
        parts = [table(ids_B) for table, ids_B in zip(self.tables, ids_BF.unbind(1), strict=True)]
        for table, ids_BT in zip(self.sequence_tables, batch.sequences, strict=True):
            parts.append(table(ids_BT).sum(1) / sequence_length(ids_BT))  # the padding row is zero
        for pool, ids_BT in zip(self.histories, batch.histories, strict=True):
            assert self.item_column is not None
            parts.append(pool(ids_BT, self.tables[self.item_column](ids_BT), parts[self.item_column]))
        return torch.cat([*parts, batch.numeric_BN], dim=1)


def hide_ids(ids_BF: torch.Tensor, columns: list[int], share: float) -> torch.Tensor:
    """Returns the ids with a random share of each of the columns shown as unseen."""
    if share == 0:
        return ids_BF
    ids_BF = ids_BF.clone()
    for column in columns:
        hidden_B = torch.rand(len(ids_BF), device=ids_BF.device) < share
        ids_BF[:, column].masked_fill_(hidden_B, UNSEEN_INDEX)
    return ids_BF


@torch.no_grad()
def fill_rows(rows_RE: torch.Tensor, first: int, num_embeddings: int, seed: int) -> None:
    """Writes the first values of a table's rows ``first`` .. ``first + R``: normal; padding and unseen zero.

    An unseen value starts, and without training stays, neutral.

    Args:
        rows_RE: Filled in place; may lie on any device, and needs one block of memory beside it.
        first: The table's row that is rows_RE[0].
        num_embeddings: V.
        seed: Of the table. Block b of 65,536 rows is drawn on the CPU from a generator of its own with seed + b.
    """
    end = first + len(rows_RE)
    for block in range(first // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        size = min(BLOCK_ROWS, num_embeddings - start)
        block_RE = torch.empty(size, rows_RE.shape[1], device="cpu", dtype=torch.float32)
        block_RE.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed + block))
        if block == 0:
            block_RE[: UNSEEN_INDEX + 1] = 0
        a, b = max(start, first), min(start + size, end)
        rows_RE[a - first : b - first] = block_RE[a - start : b - start]


def _table(num_embeddings: int, embedding_dim: int, seed: int, materialize: bool) -> nn.Embedding:
    weight_VE = torch.empty(num_embeddings, embedding_dim, device=None if materialize else "meta")
    if weight_VE.device.type != "meta":
        fill_rows(weight_VE, 0, num_embeddings, seed)
    table: nn.Embedding = nn.Embedding.from_pretrained(weight_VE, freeze=False, padding_idx=PADDING_INDEX, sparse=True)
    return table
