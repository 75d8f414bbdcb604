"""The only scoring path outside training: one `Ranker` serves requests, evaluates splits and scores batches.

A ranker is a loaded checkpoint. Raw ids become table rows, context values become indices, rows become a batch as in
training, and the model's logit becomes a score. Unknown users and items are scored with their unseen features and
are named in the response. An item that training never saw is scored with its features and, where the model has item
knowledge, with what the language model knows of it. A user whom the model's tables lack may come with a vector, or
with a history of which one is made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from llm4msr.batch import Rows
from llm4msr.knowledge.pooled import pool_likes
from llm4msr.lookup import ContextEncoder, KeyIndex
from llm4msr.models.serving import ServingModel, UserLayers
from llm4msr.request import LikedItem, RankedItem, RankRequest, RankResponse, RequestError, Timings
from llm4msr.schema import ALL_SCENARIOS
from llm4msr.training.checkpoint import Checkpoint, load_checkpoint
from llm4msr.training.node_copy import map_checkpoint

CACHE_BYTES = 2**26


class Ranker:
    """Scores with one checkpoint.

    Args:
        checkpoint: Loaded. Its model must not be trained any further.
        cache_bytes: Memory for the meta layers of users who asked lately; those of at least one are kept.

    Attributes:
        user_layers: Meta layers by the row of a user's vector; ``cache_info()`` tells how often they were there.
    """

    def __init__(self, checkpoint: Checkpoint, cache_bytes: int = CACHE_BYTES) -> None:
        self.checkpoint = checkpoint
        schema, knowledge = checkpoint.schema, checkpoint.knowledge
        self.serving = ServingModel(checkpoint.model, None if knowledge is None else _to_tensor(knowledge.items_NK))
        most_users = cache_bytes // max(self.serving.user_layers_bytes(), 1)
        self.user_layers = lru_cache(maxsize=max(most_users, 1))(self._generate)
        orders = checkpoint.text_orders
        self.user_rows = KeyIndex(checkpoint.users["key"], schema.user_key_type, orders.get("user"))
        self.item_rows = KeyIndex(checkpoint.items["key"], schema.item_key_type, orders.get("item"))
        encoded = [f.name for kind in ("categorical", "sequence") for f in schema.select(kind, "context")]
        self.context = ContextEncoder(schema, {name: checkpoint.vocabulary(name) for name in encoded})

    @classmethod
    def from_checkpoint(cls, uri: str, shared: bool = False) -> Ranker:
        """Loads a checkpoint from a local path or s3://.

        Args:
            uri: The checkpoint.
            shared: Whether large tables are shared with the node's other processes, by way of a copy on its disk.

        Raises:
            StorageError: It is missing, unfinished or damaged, or there is no room for the copy.
        """
        return cls(map_checkpoint(uri) if shared else load_checkpoint(uri))

    @property
    def model_version(self) -> str:
        """Name of the run that made the model."""
        return str(self.checkpoint.metadata["model_version"])

    @property
    def makes_vectors(self) -> bool:
        """Whether a user's vector can be made of a history: the model's own are made of its items' vectors."""
        checkpoint = self.checkpoint
        from_items = checkpoint.metadata["knowledge"] == "llm" and checkpoint.config.knowledge.user_vectors == "items"
        return from_items and checkpoint.model.reads_users

    def rank(self, request: RankRequest) -> RankResponse:
        """Scores the candidates of one request.

        Raises:
            RequestError: Unknown scenario or context feature, no candidates, an id or value of the wrong type, or a
                history or knowledge that the model does not read.
        """
        started = time.perf_counter()
        names = self.checkpoint.schema.scenario_names
        if request.scenario not in names:
            raise RequestError("scenario", f"no scenario {request.scenario!r}; valid: {', '.join(names)}")
        if not request.items:
            raise RequestError("items", "no candidates: give at least one item")
        if request.top_k is not None and request.top_k < 1:
            raise RequestError("top_k", f"{request.top_k} results are not possible: give 1 or more, or leave it out")
        user_row = int(self.user_rows([request.user], "user")[0])
        item_row_N = self.item_rows(request.items, "items")
        # Each distinct row is scored once: batched sums may differ in the last bit from one place of a batch to
        # another, and the same item (or two unknown ones) must not get two scores.
        distinct_U, index_N = np.unique(item_row_N, return_inverse=True)
        num_rows = len(distinct_U)
        user_row_U, scenario_U = np.full((2, num_rows), [[user_row], [names.index(request.scenario)]], np.int32)
        rows = self.rows(user_row_U, distinct_U, scenario_U, self.context(request.context or {}, num_rows))
        liked = None if request.history is None else self._liked(request.history)
        looked_up = time.perf_counter()
        layers, knowledge_known = self._layers(request, user_row, liked)
        generated = time.perf_counter()
        batch = self.checkpoint.collator.features(rows, liked)
        encoded = time.perf_counter()
        with torch.inference_mode():
            logit_U = self.serving(batch, layers, self.vector_rows(distinct_U), int(batch.scenario_B[0]))
            score_N = torch.sigmoid(logit_U.double()).numpy()[index_N]
        scored = time.perf_counter()
        order_N = np.argsort(-score_N, kind="stable")[: request.top_k]
        results = [RankedItem(request.items[i], float(score_N[i]), bool(item_row_N[i])) for i in order_N]
        return RankResponse(
            model_version=self.model_version,
            user_known=user_row > 0,
            knowledge_known=knowledge_known,
            num_unknown_items=int((item_row_N == 0).sum()),
            results=results,
            timings_ms=Timings(
                encode=(looked_up - started + encoded - generated) * 1000,
                knowledge=(generated - looked_up) * 1000,
                model=(scored - encoded) * 1000,
                total=(time.perf_counter() - started) * 1000,
            ),
        )

    def score(self, rows: Rows) -> np.ndarray:
        """Scores prepared rows (columns of `schema.rows_schema`), each with the history that it had at its moment.

        Returns:
            float64 scores in their order.
        """
        with torch.inference_mode():
            logit_B, _ = self.checkpoint.model(self.checkpoint.collator(rows))
            return torch.sigmoid(logit_B.double()).numpy()

    def rows(self, user_row_B: np.ndarray, item_row_B: np.ndarray, scenario_B: np.ndarray, context: Rows) -> Rows:
        """Returns candidates as prepared rows; each user's history is all that the checkpoint's logs have.

        Args:
            user_row_B: int32, 0 for an unknown user.
            item_row_B: int32, 0 for an unknown item.
            scenario_B: int32 indices.
            context: Columns of the context features, as of `ContextEncoder`.
        """
        logs = self.checkpoint.collator.logs
        return {
            "row_id": np.arange(len(user_row_B), dtype=np.int64),
            "user_row": user_row_B,
            "item_row": item_row_B,
            "scenario": scenario_B,
            "label": np.zeros(len(user_row_B), np.int8),
            **{name: logs[log].num_likes(user_row_B) for log, name in self.checkpoint.schema.history_columns.items()},
            **context,
        }

    def user_vector_row(self, user_row: int) -> int:
        """Returns the row of a user's vector; 0 where there is none, and for a model that reads none."""
        knowledge = self.checkpoint.knowledge
        if knowledge is None or not self.checkpoint.model.reads_users:
            return 0
        return int(knowledge.user_index_N[user_row])

    def vector_rows(self, item_row_N: np.ndarray) -> torch.Tensor:
        """Returns the rows of the items' vectors, int64, 0 where there is none; zeros for a backbone alone."""
        knowledge = self.checkpoint.knowledge
        index_N = np.zeros(len(item_row_N)) if knowledge is None else knowledge.item_index_N[item_row_N]
        return torch.from_numpy(index_N.astype(np.int64))

    def _liked(self, history: Sequence[LikedItem]) -> dict[str, np.ndarray]:
        """Returns the item rows of the likes in each log that the model reads, in the order given; "all" is all."""
        schema = self.checkpoint.schema
        if not schema.history_columns and not self.makes_vectors:
            raise RequestError("history", "this model reads no history of the user: leave history out")
        if unknown := [liked.scenario for liked in history if liked.scenario not in schema.scenario_names]:
            valid = ", ".join(schema.scenario_names)
            raise RequestError("history", f"no scenario {unknown[0]!r}; valid: {valid}")
        item_row_N = self.item_rows([liked.item for liked in history], "history")
        scenario_N = np.array([liked.scenario for liked in history], object)
        logs = {*schema.history_columns, ALL_SCENARIOS}
        return {log: item_row_N if log == ALL_SCENARIOS else item_row_N[scenario_N == log] for log in logs}

    def _layers(
        self, request: RankRequest, user_row: int, liked: Mapping[str, np.ndarray] | None
    ) -> tuple[UserLayers, bool]:
        """Returns the user's meta layers, and whether any knowledge of the user is in them."""
        checkpoint = self.checkpoint
        if not checkpoint.model.reads_users:
            if request.knowledge is not None:
                raise RequestError("knowledge", "this model reads no knowledge of users: leave knowledge out")
            return self.user_layers(0), False
        vector_K = None
        if request.knowledge is not None:
            vector_K = self._given(request.knowledge)
        elif liked is not None and self.makes_vectors:
            vector_K = self._made_of(liked[ALL_SCENARIOS])
        else:
            row = self.user_vector_row(user_row)
            return self.user_layers(row), row > 0
        return self.serving.user_layers(None if vector_K is None else torch.from_numpy(vector_K)), vector_K is not None

    def _given(self, vector: Sequence[float]) -> np.ndarray:
        width = self.serving.width
        if len(vector) != width:
            raise RequestError("knowledge", f"{len(vector)} numbers: the language model's vectors have {width}")
        vector_K = np.asarray(vector, np.float64)
        if not (np.abs(vector_K) <= np.finfo(np.float16).max).all():  # NaN too
            raise RequestError("knowledge", "numbers within ±65504 are needed: vectors are kept as float16")
        return vector_K.astype(np.float32)

    def _made_of(self, item_row_L: np.ndarray) -> np.ndarray | None:
        """Returns the vector of a user who liked these items; None where no vector of any is there."""
        row_L = self.vector_rows(item_row_L).numpy()
        if not row_L.any():
            return None
        knowledge, items = self.checkpoint.knowledge, self.checkpoint.model.item_knowledge
        assert knowledge is not None and items is not None, "vectors are made by a model that reads those of items"
        mean_K, std_K = items.trunk.mean_K.numpy(), items.trunk.std_K.numpy()  # statistics over the items
        return pool_likes(knowledge.items_NK[row_L[row_L > 0]], mean_K, std_K)

    def _generate(self, vector_row: int) -> UserLayers:
        knowledge = self.checkpoint.knowledge
        if knowledge is None or not vector_row:
            return self.serving.user_layers(None)
        vector_K = knowledge.users_NK[vector_row].astype(np.float32)
        return self.serving.user_layers(torch.from_numpy(vector_K))


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor over the memory of an array that may be read-only; it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
