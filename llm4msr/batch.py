"""Rows to tensors: the one encoding path of training, evaluation and serving.

A prepared row names its user and item by their rows in the feature tables; `Collator` gathers their features and
the knowledge of the distinct users and items from memory, and cuts what the user liked before the row out of the logs.
Context features come with the row. Nothing here knows where rows come from, so a request is encoded exactly as a
training row is.

Axes: B rows, F categorical features, N numeric features, T length of a sequence or history, U distinct users or items
+ 1, K knowledge width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import ITEM_ID, PADDING_INDEX, UNSEEN_INDEX, Feature, FeatureSchema, Source
from llm4msr.storage import StorageError

if TYPE_CHECKING:
    from llm4msr.data.history import LikeLog

Rows = Mapping[str, np.ndarray]  # columns of schema.rows_schema: (B,), or (B, T) of a sequence


@dataclass(frozen=True)
class Batch:
    """One step's tensors.

    Attributes:
        ids_BF: int64 embedding indices, features in schema order.
        numeric_BN: float32, standardised.
        sequences: int64 (B, T) per sequence feature, padded with 0 at the end.
        scenario_B: int64 scenario index.
        label_B: float32 0 or 1.
        row_id_B: int64.
        knowledge_UK: float32 knowledge of the batch's distinct users; row 0 is zeros = none. None without knowledge.
        knowledge_index_B: int64 rows of knowledge_UK.
        item_knowledge_UK: The same of the batch's distinct items.
        item_knowledge_index_B: int64 rows of item_knowledge_UK.
        histories: int64 (B, T) indices of item_id per history feature, oldest first, padded with 0 at the end.
    """

    ids_BF: torch.Tensor
    numeric_BN: torch.Tensor
    sequences: tuple[torch.Tensor, ...]
    scenario_B: torch.Tensor
    label_B: torch.Tensor
    row_id_B: torch.Tensor
    knowledge_UK: torch.Tensor | None = None
    knowledge_index_B: torch.Tensor | None = None
    item_knowledge_UK: torch.Tensor | None = None
    item_knowledge_index_B: torch.Tensor | None = None
    histories: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.scenario_B)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                changed[field.name] = tuple(map(function, value)) if isinstance(value, tuple) else function(value)
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """Copies every tensor to a device, without waiting for copies out of pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Moves every tensor to page-locked memory."""
        return self._map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class EntityFeatures:
    """Encoded features of all users or all items; row 0 is the unknown one, its features unseen.

    Attributes:
        ids: int32 (rows + 1, categorical features).
        numeric: float32 (rows + 1, numeric features).
        sequences: int32 (rows + 1, T) per sequence feature.
    """

    ids: np.ndarray
    numeric: np.ndarray
    sequences: tuple[np.ndarray, ...]

    @classmethod
    def from_table(cls, table: pa.Table, schema: FeatureSchema, source: Source) -> EntityFeatures:
        """Builds from ``users.parquet`` or ``items.parquet`` (`schema.feature_table_schema`)."""

        def stack(features: tuple[Feature, ...], dtype: type, unknown: float) -> np.ndarray:
            out = np.empty((table.num_rows + 1, len(features)), dtype)
            out[0] = unknown
            for i, feature in enumerate(features):
                out[1:, i] = table[feature.name].to_numpy()
            return out

        sequences = []
        for feature in schema.select("sequence", source):
            values = np.zeros((table.num_rows + 1, feature.max_length), np.int32)
            flat = table[feature.name].combine_chunks().flatten().to_numpy()
            values[1:] = flat.reshape(-1, feature.max_length)
            sequences.append(values)
        return cls(
            ids=stack(schema.select("categorical", source), np.int32, UNSEEN_INDEX),
            numeric=stack(schema.select("numeric", source), np.float32, 0.0),
            sequences=tuple(sequences),
        )


class Collator:
    """Encodes rows into batches.

    Args:
        schema: Names the context columns that rows carry.
        users: Features by user_row.
        items: Features by item_row.
        knowledge: Knowledge by user_row and item_row; None for a model without it.
        logs: What users liked, of each log that a history feature of the schema reads; all of them must be given.

    Raises:
        StorageError: The knowledge is of another number of users or items: it does not belong to this data.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        users: EntityFeatures,
        items: EntityFeatures,
        knowledge: KnowledgeTable | None,
        logs: Mapping[str, LikeLog] | None = None,
    ) -> None:
        if knowledge is not None:
            for level, rows, index_N in (
                ("users", len(users.ids), knowledge.user_index_N),
                ("items", len(items.ids), knowledge.item_index_N),
            ):
                if len(index_N) != rows:
                    raise StorageError(
                        f"the knowledge table is of {len(index_N) - 1} {level}, the data has {rows - 1}: "
                        "it was extracted from other data; run jobs.extract for this one"
                    )
        self.users = users
        self.items = items
        self.knowledge = knowledge
        self.num_scenarios = len(schema.scenarios)
        self.context_ids = [f.name for f in schema.select("categorical", "context")]
        self.context_numeric = [f.name for f in schema.select("numeric", "context")]
        self.context_sequences = [f.name for f in schema.select("sequence", "context")]
        self.histories = schema.select("history")
        self.history_columns = schema.history_columns
        self.logs = {} if logs is None else logs
        assert set(self.history_columns) <= set(self.logs), (self.history_columns, sorted(self.logs))
        if self.histories:
            item_id = [f.name for f in schema.select("categorical", "item")].index(ITEM_ID)
            self.item_index_N = items.ids[:, item_id].astype(np.int64)

    @property
    def columns(self) -> list[str]:
        """The columns of prepared rows that are read: of time and order the moment alone, where knowledge has folds."""
        context = (*self.context_ids, *self.context_numeric, *self.context_sequences)
        if self.knowledge is not None and self.knowledge.folds is not None:
            context += ("moment",)
        return ["row_id", "user_row", "item_row", "scenario", "label", *self.history_columns.values(), *context]

    def __call__(self, rows: Rows, training: bool = False) -> Batch:
        """Encodes B rows; their order is kept.

        Args:
            rows: The rows.
            training: Their users' knowledge is that without the likes of the row's fold (`llm4msr.knowledge.folds`).
        """
        batch, table = self.features(rows), self.knowledge
        if table is None:
            return batch
        if training and table.folds is not None:
            vectors_NK = table.folds.vectors_NK
            index_B = table.folds.rows(rows["user_row"], rows["moment"])
        else:
            vectors_NK, index_B = table.users_NK, table.user_index_N[rows["user_row"]]
        user_UK, user_B = _gather_distinct(vectors_NK, index_B)
        item_UK, item_B = _gather_distinct(table.items_NK, table.item_index_N[rows["item_row"]])
        return replace(
            batch,
            knowledge_UK=user_UK,
            knowledge_index_B=user_B,
            item_knowledge_UK=item_UK,
            item_knowledge_index_B=item_B,
        )

    def features(self, rows: Rows, liked: Mapping[str, np.ndarray] | None = None) -> Batch:
        """Encodes B rows without knowledge; their order is kept.

        Args:
            rows: The rows.
            liked: Item rows, oldest first, by log: what all these rows' user liked, instead of the logs.
        """
        user_row_B, item_row_B = rows["user_row"], rows["item_row"]
        num_rows = len(user_row_B)

        def gather(name: str, context: list[str], dtype: type) -> torch.Tensor:
            users, items = getattr(self.users, name), getattr(self.items, name)
            out = np.empty((num_rows, users.shape[1] + items.shape[1] + len(context)), dtype)
            out[:, : users.shape[1]] = users[user_row_B]
            out[:, users.shape[1] : users.shape[1] + items.shape[1]] = items[item_row_B]
            for i, column in enumerate(context, start=users.shape[1] + items.shape[1]):
                out[:, i] = rows[column]
            return torch.from_numpy(out)

        return Batch(
            ids_BF=gather("ids", self.context_ids, np.int64),
            numeric_BN=gather("numeric", self.context_numeric, np.float32),
            sequences=tuple(
                torch.from_numpy(table[entity_row].astype(np.int64))
                for entity, entity_row in ((self.users, user_row_B), (self.items, item_row_B))
                for table in entity.sequences
            )
            + tuple(torch.from_numpy(rows[name].astype(np.int64)) for name in self.context_sequences),
            scenario_B=torch.from_numpy(rows["scenario"].astype(np.int64)),
            label_B=torch.from_numpy(rows["label"].astype(np.float32)),
            row_id_B=torch.from_numpy(rows["row_id"].astype(np.int64)),
            histories=tuple(self._history(feature, rows, liked) for feature in self.histories),
        )

    def _history(self, feature: Feature, rows: Rows, liked: Mapping[str, np.ndarray] | None) -> torch.Tensor:
        """Returns the items (B, T) that one history feature holds."""
        if liked is not None:
            item_row_N, begin_B = liked[feature.log], np.zeros(len(rows["user_row"]), np.int64)
            end_B = begin_B + len(item_row_N)
        else:
            log = self.logs[feature.log]
            item_row_N, begin_B = log.item_row_N, log.offset_U[rows["user_row"]]
            end_B = begin_B + rows[self.history_columns[feature.log]]
        begin_B = np.maximum(begin_B, end_B - feature.max_length)
        place_BT = begin_B[:, None] + np.arange(feature.max_length)
        index_BT = np.full(place_BT.shape, PADDING_INDEX, np.int64)
        held_BT = place_BT < end_B[:, None]
        index_BT[held_BT] = self.item_index_N[item_row_N[place_BT[held_BT]]]
        return torch.from_numpy(index_BT)


def _gather_distinct(vectors_NK: np.ndarray, row_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct vectors that rows name (float32; row 0 is that of no knowledge) and each row's place."""
    distinct_U, index_B = np.unique(row_B, return_inverse=True)
    if len(distinct_U) == 0 or distinct_U[0] != 0:  # row 0 = none is always there, for dropout
        distinct_U, index_B = np.concatenate([[0], distinct_U]), index_B + 1
    return torch.from_numpy(vectors_NK[distinct_U].astype(np.float32)), torch.from_numpy(index_B.astype(np.int64))
