"""The only scoring path outside training: one `Ranker` serves requests, evaluates splits and scores batches.

A ranker is a loaded checkpoint. Raw ids become table rows, context values become indices, rows become a batch as in
training, and the model's logit becomes a score. Unknown users and items are scored with their unseen features and
are named in the response. An item that training never saw is scored with its features and, where the model has item
knowledge, with what the language model knows of it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import numpy as np
import pyarrow as pa
import torch

from llm4msr.batch import Rows
from llm4msr.models.serving import ServingModel, UserLayers
from llm4msr.schema import ALL_SCENARIOS, FIRST_INDEX, PADDING_INDEX, UNSEEN_INDEX, Feature, KeyType
from llm4msr.training.checkpoint import Checkpoint, load_checkpoint

Key = int | str
ContextValue = Key | float | Sequence[Key | float]
INT64 = np.iinfo(np.int64)
# Among N numbers none lies more than sqrt(N - 1) standard deviations from their mean: what is farther is a mistake,
# and large enough a one would leave the model without a finite score.
MAX_DEVIATIONS = 1e6
CACHE_BYTES = 2**26


class RequestError(ValueError):
    """A request that cannot be scored; `field` names the part at fault, the message what would be valid."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class LikedItem:
    """One like of a user: the raw id of the item, and the name of the scenario where it was liked."""

    item: Key
    scenario: str


@dataclass(frozen=True)
class RankRequest:
    """One user, one scenario, N candidates, and where they are fresher than the model's logs the user's likes.

    Attributes:
        user: Raw user id.
        scenario: Scenario name.
        items: Raw item ids.
        top_k: Results returned, the best first; None returns all.
        context: Values of context features by name, the same for all candidates; of a sequence a list. As in training,
            an absent category or list adds nothing, a given value that training has not seen is unseen, and an absent
            number is its mean.
        history: What the user liked, oldest first, for the model's history features, instead of the likes that the
            model's logs have of this user; None takes these.
    """

    user: Key
    scenario: str
    items: Sequence[Key]
    top_k: int | None = None
    context: Mapping[str, ContextValue] | None = None
    history: Sequence[LikedItem] | None = None


@dataclass(frozen=True)
class RankedItem:
    """One candidate: its raw id, its score in (0, 1), and whether its id is in the model's item table."""

    item: Key
    score: float
    known: bool


@dataclass(frozen=True)
class RankResponse:
    """The ranking.

    Attributes:
        model_version: Which model scored.
        user_known: Whether the user is in the model's user table.
        knowledge_known: Whether the language model's knowledge of this user was used.
        results: Highest score first; ties keep the order of the request.
        model_ms: Milliseconds from raw ids to sorted scores.
    """

    model_version: str
    user_known: bool
    knowledge_known: bool
    results: list[RankedItem]
    model_ms: float


class KeyIndex:
    """Raw ids to table rows: 0 for an id that the table lacks.

    Args:
        keys: Sorted, distinct ids.
        key_type: int64 or string.
    """

    def __init__(self, keys: pa.Array, key_type: KeyType) -> None:
        self.key_type = key_type
        self.sorted_ids = keys.to_numpy() if key_type == "int64" else None
        self.rows = None if key_type == "int64" else {key: i for i, key in enumerate(keys.to_pylist(), start=1)}

    def __call__(self, keys: Sequence[Key], field: str) -> np.ndarray:
        """Returns int32 rows.

        Raises:
            RequestError: A key is of the wrong type for this data.
        """
        if self.rows is not None:
            wrong = [key for key in keys if not isinstance(key, str)]
            if wrong:
                raise RequestError(
                    field, f"{wrong[0]!r} is not a text id: ids of this data are text, such as {self.example()!r}"
                )
            return np.fromiter(map(self.rows.get, keys, repeat(0)), np.int32, len(keys))
        wrong = [k for k in keys if not isinstance(k, int) or isinstance(k, bool) or not INT64.min <= k <= INT64.max]
        if wrong:
            raise RequestError(
                field, f"{wrong[0]!r} is not a 64-bit integer: ids of this data are integers, such as {self.example()}"
            )
        if not len(self.sorted_ids):
            return np.zeros(len(keys), np.int32)
        wanted = np.asarray(keys, np.int64)
        place = np.minimum(np.searchsorted(self.sorted_ids, wanted), len(self.sorted_ids) - 1)
        return np.where(self.sorted_ids[place] == wanted, place + 1, 0).astype(np.int32)

    def example(self) -> Key | None:
        """Returns some id of the table."""
        if self.rows is not None:
            return next(iter(self.rows), None)
        return int(self.sorted_ids[0]) if len(self.sorted_ids) else None


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
        knowledge = checkpoint.knowledge
        self.serving = ServingModel(checkpoint.model, None if knowledge is None else _to_tensor(knowledge.items_NK))
        most_users = cache_bytes // max(self.serving.user_layers_bytes(), 1)
        self.user_layers = lru_cache(maxsize=max(most_users, 1))(self._generate)
        schema = checkpoint.schema
        self.user_rows = KeyIndex(checkpoint.users["key"].combine_chunks(), schema.user_key_type)
        self.item_rows = KeyIndex(checkpoint.items["key"].combine_chunks(), schema.item_key_type)
        self.context = {f.name: f for f in schema.features if f.source == "context"}
        self.context_index = {
            f.name: {v: i for i, v in enumerate(checkpoint.vocabulary(f.name).to_pylist(), start=FIRST_INDEX)}
            for kind in ("categorical", "sequence")
            for f in schema.select(kind, "context")
        }

    @classmethod
    def from_checkpoint(cls, uri: str) -> Ranker:
        """Loads a checkpoint from a local path or s3://.

        Raises:
            StorageError: It is missing, unfinished or damaged.
        """
        return cls(load_checkpoint(uri))

    @property
    def model_version(self) -> str:
        """Name of the run that made the model."""
        return self.checkpoint.metadata["model_version"]

    def rank(self, request: RankRequest) -> RankResponse:
        """Scores the candidates of one request.

        Raises:
            RequestError: Unknown scenario or context feature, no candidates, an id or value of the wrong type, or a
                history that the model does not read.
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
        rows = {
            "row_id": np.arange(num_rows, dtype=np.int64),
            "user_row": np.full(num_rows, user_row, np.int32),
            "item_row": distinct_U,
            "scenario": np.full(num_rows, names.index(request.scenario), np.int32),
            "label": np.zeros(num_rows, np.int8),
            **{
                column: np.full(num_rows, self.checkpoint.collator.logs[log].num_likes(user_row), np.int32)
                for log, column in self.checkpoint.schema.history_columns.items()
            },
            **self._context_columns(request.context or {}, num_rows),
        }
        liked = None if request.history is None else self._liked(request.history)
        score_N = self._score_candidates(rows, liked)[index_N]
        order_N = np.argsort(-score_N, kind="stable")[: request.top_k]
        return RankResponse(
            model_version=self.model_version,
            user_known=user_row > 0,
            knowledge_known=self._user_vector_row(user_row) > 0,
            results=[RankedItem(request.items[i], float(score_N[i]), bool(item_row_N[i])) for i in order_N],
            model_ms=(time.perf_counter() - started) * 1000,
        )

    def score(self, rows: Rows) -> np.ndarray:
        """Scores prepared rows (columns of `schema.rows_schema`), each with the history that it had at its moment.

        Returns:
            float64 scores in their order.
        """
        with torch.inference_mode():
            logit_B, _ = self.checkpoint.model(self.checkpoint.collator(rows))
            return torch.sigmoid(logit_B.double()).numpy()

    def _score_candidates(self, rows: Rows, liked: Mapping[str, np.ndarray] | None) -> np.ndarray:
        """Scores rows that are all of one user in one scenario: what is generated from the user is kept."""
        knowledge, item_B = self.checkpoint.knowledge, torch.zeros(0, dtype=torch.int64)
        if knowledge is not None:
            item_B = torch.from_numpy(knowledge.item_index_N[rows["item_row"]].astype(np.int64))
        user = self.user_layers(self._user_vector_row(int(rows["user_row"][0])))
        with torch.inference_mode():
            batch = self.checkpoint.collator.features(rows, liked)
            logit_B = self.serving(batch, user, item_B, int(rows["scenario"][0]))
            return torch.sigmoid(logit_B.double()).numpy()

    def _user_vector_row(self, user_row: int) -> int:
        """Returns the row of the users' vectors that the model reads for a user; 0 where there is none."""
        knowledge = self.checkpoint.knowledge if self.checkpoint.model.reads_users else None
        return 0 if knowledge is None else int(knowledge.user_index_N[user_row])

    def _generate(self, vector_row: int) -> UserLayers:
        if not vector_row:
            return self.serving.user_layers(None)
        vector_K = self.checkpoint.knowledge.users_NK[vector_row].astype(np.float32)
        return self.serving.user_layers(torch.from_numpy(vector_K))

    def _liked(self, history: Sequence[LikedItem]) -> dict[str, np.ndarray]:
        """Returns the item rows of the likes in each log that the model reads, in the order given."""
        schema = self.checkpoint.schema
        if not schema.history_columns:
            raise RequestError("history", "this model has no history features: leave history out")
        if unknown := [liked.scenario for liked in history if liked.scenario not in schema.scenario_names]:
            valid = ", ".join(schema.scenario_names)
            raise RequestError("history", f"no scenario {unknown[0]!r}; valid: {valid}")
        item_row_N = self.item_rows([liked.item for liked in history], "history")
        scenario_N = np.array([liked.scenario for liked in history], object)
        return {
            log: item_row_N if log == ALL_SCENARIOS else item_row_N[scenario_N == log] for log in schema.history_columns
        }

    def _context_columns(self, context: Mapping[str, ContextValue], num_rows: int) -> dict[str, np.ndarray]:
        unknown = sorted(set(context) - set(self.context))
        if unknown:
            valid = ", ".join(sorted(self.context)) or "this model has none"
            raise RequestError("context", f"no context feature {unknown[0]!r}; valid: {valid}")
        return {
            name: np.full(
                (num_rows, feature.max_length) if feature.kind == "sequence" else num_rows,
                self._encode(feature, context.get(name)),
                np.float32 if feature.kind == "numeric" else np.int32,
            )
            for name, feature in self.context.items()
        }

    def _encode(self, feature: Feature, value: ContextValue | None) -> float | int | list[int]:
        if feature.kind == "sequence":
            return self._encode_list(feature, [] if value is None else value)
        if isinstance(value, (list, tuple)):
            raise RequestError("context", f"{feature.name} is one value, found a list of {len(value)}")
        if feature.kind == "numeric":
            if value is None:
                return 0.0
            if isinstance(value, (str, bool)):
                raise RequestError("context", f"{feature.name} is numeric, found {value!r}")
            try:
                standardised = (float(value) - feature.mean) / feature.std
            except OverflowError:  # a whole number beyond float64
                standardised = np.inf
            if not abs(standardised) <= MAX_DEVIATIONS:
                raise RequestError(
                    "context",
                    f"{feature.name} is {str(value)[:30]}, more than {MAX_DEVIATIONS:.0e} standard deviations "
                    f"({feature.std:.6g} each) from the mean {feature.mean:.6g}",
                )
            return standardised
        return PADDING_INDEX if value is None else self.context_index[feature.name].get(str(value), UNSEEN_INDEX)

    def _encode_list(self, feature: Feature, values: ContextValue) -> list[int]:
        if not isinstance(values, (list, tuple)):
            raise RequestError("context", f"{feature.name} is a list of values, found {values!r}")
        if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (str, int, float))]:
            raise RequestError("context", f"{feature.name} is a list of text or numbers, found {wrong[0]!r} in it")
        index = self.context_index[feature.name]
        known = [index.get(str(value), UNSEEN_INDEX) for value in values[: feature.max_length]]
        return known + [PADDING_INDEX] * (feature.max_length - len(known))


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor over the memory of an array that may be read-only; it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
