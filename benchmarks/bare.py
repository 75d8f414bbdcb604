"""The embedded encoder without any of this project's code: what others do, and the floor of what can be done.

Axes: B prompts of a batch, T tokens, K hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# Rows of one encode() call of sentence-transformers: its default.
NUM_ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class ReadyBatch:
    """A batch as the model takes it, and which prompts its rows are."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    rows_B: np.ndarray


class BareModel:
    """Tokenizer and weights as the transformers library loads them, mean pooling.

    Args:
        path: The model's folder.
        dtype: Of weights and arithmetic.
        max_tokens: Texts are cut to it.
    """

    def __init__(self, path: Path, dtype: torch.dtype, max_tokens: int) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._model = transformers.AutoModel.from_pretrained(path, dtype=dtype, add_pooling_layer=False).eval()
        self._max_tokens = max_tokens

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, special tokens included."""
        return self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]

    def one_at_a_time(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (N, K) float32 vectors, each from a call of tokenizer and model of its own."""
        out = []
        for text in texts:
            ids_BT = torch.tensor(self.token_ids([text]))
            out.append(self._vectors(ids_BT, torch.ones_like(ids_BT)))
        return np.concatenate(out)

    def ready_batches(self, texts: Sequence[str], batch_tokens: int, by_length: bool = True) -> list[ReadyBatch]:
        """Cuts texts into batches of at most `batch_tokens` tokens, padding included.

        Args:
            texts: The prompts.
            batch_tokens: Rows times the longest row of a batch at most.
            by_length: Sort them first; else they stay in order.
        """
        ids = self.token_ids(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if by_length else range(len(ids))
        batches: list[list[int]] = []
        longest = 0
        for i in order:
            longest = max(longest, len(ids[i]))
            if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
                batches.append([])
                longest = len(ids[i])
            batches[-1].append(i)
        return [self._ready(ids, rows) for rows in batches]

    def forward(self, batches: Sequence[ReadyBatch]) -> np.ndarray:
        """Returns the (N, K) float32 vectors of all prompts of ready-made batches, in the order of the prompts."""
        vectors = np.concatenate([self._vectors(batch.ids_BT, batch.mask_BT) for batch in batches])
        out = np.empty_like(vectors)
        out[np.concatenate([batch.rows_B for batch in batches])] = vectors
        return out

    def _ready(self, ids: list[list[int]], rows: list[int]) -> ReadyBatch:
        padded = self._tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
        return ReadyBatch(padded["input_ids"], padded["attention_mask"], np.array(rows))

    @torch.inference_mode()
    def _vectors(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> np.ndarray:
        states_BTK = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        return ((states_BTK * weight_BT1).sum(1) / weight_BT1.sum(1)).numpy()


def sentence_transformer(path: Path, max_tokens: int) -> Any:
    """Returns the same weights under sentence-transformers: mean pooling, no normalisation, the same limit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(path), max_seq_length=max_tokens)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def min_cosine(a_NK: np.ndarray, b_NK: np.ndarray) -> float:
    """Returns the smallest cosine between the rows of two arrays of vectors."""
    a, b = a_NK.astype(np.float64), b_NK.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())
