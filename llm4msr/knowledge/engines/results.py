"""An `EncodedBatch` in the making: where one prompt's failure stays its own.

Axes: B prompts of a batch, N prompts of a call, K knowledge width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm4msr.knowledge.engines.fitting import Fitted
from llm4msr.knowledge.engines.interface import FLOAT16_MAX, EncodedBatch


class Results:
    """Vectors, answers and errors of N prompts as they come in.

    Args:
        num_prompts: How many there are (N).
        width: Length of a vector (K).

    Attributes:
        errors: Of each prompt why it has no vector, or None.
        num_tokens: (N,) int32; tokens of each prompt.
    """

    def __init__(self, num_prompts: int, width: int) -> None:
        self.errors: list[str | None] = [None] * num_prompts
        self.num_tokens = np.zeros(num_prompts, dtype=np.int32)
        self._vectors_NK = np.zeros((num_prompts, width), dtype=np.float32)
        self._num_dropped, self._num_cut, self._num_generated = np.zeros((3, num_prompts), dtype=np.int32)
        self._texts: list[str | None] = [None] * num_prompts

    def add_fitted(self, row: int, fitted: Fitted) -> None:
        """Takes in how a prompt was cut, or why it cannot be read."""
        self.errors[row] = fitted.error
        self.num_tokens[row] = len(fitted.token_ids)
        self._num_dropped[row], self._num_cut[row] = fitted.num_dropped_events, fitted.num_cut_characters

    def add_vectors(self, rows_B: np.ndarray, vectors_BK: np.ndarray, name: str) -> None:
        """Takes in vectors; one that float16 cannot hold becomes an error that names the model."""
        highest_B = np.abs(vectors_BK).max(axis=1)
        for row, vector_K, highest in zip(rows_B, vectors_BK, highest_B, strict=True):
            if highest <= FLOAT16_MAX:  # false for NaN
                self._vectors_NK[row] = vector_K
            else:
                self.errors[row] = f"{name} gave a vector with largest value {highest}, not finite in float16"

    def add_answers(
        self, rows_B: np.ndarray, texts: Sequence[str], answers: Sequence[Sequence[int]], *, required: bool
    ) -> None:
        """Takes in answers as text and as ids; where they are required, an empty one is an error."""
        for row, text, answer in zip(rows_B, texts, answers, strict=True):
            self._num_generated[row] = len(answer)
            if required and not text:
                self.errors[row] = self.errors[row] or "the model wrote nothing"
                self._vectors_NK[row] = 0
            elif self.errors[row] is None:
                self._texts[row] = text

    def add_failure(self, row: int, reason: str) -> None:
        """Takes in that a prompt was never read, and why."""
        self.errors[row], self.num_tokens[row] = reason, 0

    def encoded(self) -> EncodedBatch:
        """Returns all of it; a prompt without a vector has zeros."""
        return EncodedBatch(
            self._vectors_NK,
            self.num_tokens,
            self._num_dropped,
            self._num_cut,
            tuple(self.errors),
            tuple(self._texts),
            self._num_generated,
        )
