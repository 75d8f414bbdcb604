"""Lets a causal LM answer prompts in words, and reads a hidden state off the prompt or the answer.

Rows are padded on the left, so that the newest token of every row stands in the same column. The choice of a token
depends on the row's own states and its own random numbers alone: a prompt gets the same answer alone and in any
batch, up to rounding. Rows that have ended leave the batch once they are half of it. No beams, no penalties.

Axes: B rows of a batch (those still writing), N rows of the whole batch, T tokens, M tokens of an answer at most, K
hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.forward import Prefix, Reader, pool
from llm4msr.knowledge.engines.runner import Passed


def draw_chances(config: KnowledgeConfig, contents: Sequence[str]) -> np.ndarray | None:
    """Returns (N, M) random numbers in [0, 1) that depend on `config.seed` and each prompt alone; None where greedy.

    Args:
        config: temperature, seed and max_new_tokens (M) of it.
        contents: `Prompt.content` of each prompt.
    """
    if config.temperature == 0:
        return None
    seeds = [hashlib.sha256(f"{config.seed}\n{content}".encode()).digest() for content in contents]
    return np.stack([np.random.default_rng(int.from_bytes(s)).random(config.max_new_tokens) for s in seeds])


class Writer:
    """Answers prompts with a loaded model.

    Args:
        model: The causal LM with its head.
        reader: Reads its states.
        config: max_new_tokens (M), temperature and state_from of it.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, model: torch.nn.Module, reader: Reader, config: KnowledgeConfig, end_ids: Sequence[int]) -> None:
        self._model = model
        self._reader = reader
        self._max_new_tokens = config.max_new_tokens
        self._temperature = config.temperature
        self._end_ids = torch.tensor(sorted(set(end_ids)), device=reader.device)
        self._from_answer = config.state_from == "generated"
        self._accepted = inspect.signature(model.forward).parameters
        self._out: Any = None
        reader.base.register_forward_hook(self._keep)

    def _keep(self, base: torch.nn.Module, arguments: Any, out: Any) -> None:
        # The states behind the logits; asking the whole model for them would keep those of all layers.
        self._out = out

    @torch.inference_mode()
    def write(
        self, token_ids: Sequence[Sequence[int]], chances_NM: np.ndarray | None, prefix: Prefix | None = None
    ) -> Passed:
        """Returns answers and vectors; the vector of a row that wrote nothing is zero where answers are read.

        Args:
            token_ids: Of each prompt, without the prefix; one at least.
            chances_NM: (N, M) a random number in [0, 1) for every token; only read where temperature is not 0.
            prefix: What stands before all of them.
        """
        reader = self._reader
        ids_BT, mask_BT = reader.pad(token_ids, "left")
        num_computed, num_rows = ids_BT.numel(), len(token_ids)
        cache = prefix.cache_of(num_rows) if prefix else None
        seen_BT = mask_BT
        if prefix:
            seen_BT = torch.cat([mask_BT.new_ones(num_rows, prefix.num_tokens), mask_BT], 1)
        position_BT = (seen_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        logits_BV, states_BTK, cache = self._step(ids_BT, seen_BT, position_BT, cache)
        vectors_NK = pool(states_BTK, mask_BT, reader.pooling, prefix)
        if self._from_answer:
            vectors_NK = torch.zeros_like(vectors_NK)
        chances = None if chances_NM is None else reader.to_device(chances_NM)
        answers_NM = torch.full((num_rows, self._max_new_tokens), -1, dtype=torch.int64, device=reader.device)
        rows_B = torch.arange(num_rows, device=reader.device)
        ended_B = torch.zeros(num_rows, dtype=torch.bool, device=reader.device)
        position_B = position_BT[:, -1]
        for step in range(self._max_new_tokens):
            token_B = self._choose(logits_BV, None if chances is None else chances[rows_B, step])
            ended_B = ended_B | torch.isin(token_B, self._end_ids)
            answers_NM[rows_B, step] = token_B.masked_fill(ended_B, -1)
            num_ended = int(ended_B.sum())
            if num_ended == len(rows_B) or (step + 1 == self._max_new_tokens and not self._from_answer):
                break
            if 2 * num_ended >= len(rows_B):
                left = torch.nonzero(~ended_B).squeeze(1)
                cache.batch_select_indices(left)
                rows_B, seen_BT, position_B, token_B, ended_B = (
                    x[left] for x in (rows_B, seen_BT, position_B, token_B, ended_B)
                )
            position_B = position_B + 1
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(rows_B), 1)], 1)
            logits_BV, states_BTK, cache = self._step(token_B[:, None], seen_BT, position_B[:, None], cache)
            if self._from_answer:
                self._add_state(vectors_NK, rows_B, states_BTK[:, -1].float(), ended_B, step)
        answers = [[token for token in row if token >= 0] for row in answers_NM.tolist()]
        return Passed(vectors_NK, num_computed, answers)

    def _step(
        self, ids_BT: torch.Tensor, seen_BT: torch.Tensor, position_BT: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Returns the logits of the last column, the states of all columns, and the cache with them."""
        optional = {"position_ids": position_BT, "logits_to_keep": 1}
        out = self._model(
            input_ids=ids_BT,
            attention_mask=seen_BT,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
            **self._reader.wanted,
        )
        states_BTK = self._reader.states(self._out)
        self._out = None
        return out.logits[:, -1].float(), states_BTK, out.past_key_values

    def _choose(self, logits_BV: torch.Tensor, chance_B: torch.Tensor | None) -> torch.Tensor:
        if chance_B is None:
            return logits_BV.argmax(1)
        cumulated_BV = torch.softmax(logits_BV.double() / self._temperature, 1).cumsum(1)
        target_B1 = (chance_B * cumulated_BV[:, -1])[:, None]
        return torch.searchsorted(cumulated_BV, target_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)

    def _add_state(
        self, vectors_NK: torch.Tensor, rows_B: torch.Tensor, state_BK: torch.Tensor, ended_B: torch.Tensor, step: int
    ) -> None:
        """Takes the state of the token just read into the vectors of the rows that had not ended before it."""
        before_BK = vectors_NK[rows_B]
        if self._reader.pooling == "mean":
            state_BK = before_BK + (state_BK - before_BK) / (step + 1)
        vectors_NK[rows_B] = torch.where(ended_B[:, None], before_BK, state_BK)
