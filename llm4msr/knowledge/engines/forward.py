"""One forward pass: token ids in, one hidden-state vector per row out.

Rows are padded on the right whatever the tokenizer prefers, so positions need no repair. In a causal LM no token sees
what stands right of it, so such rows need no mask either, and attention runs on its fastest path. What the rows of a
chunk begin with in common (chat template, preamble) is computed once, and its keys and values are given to every row.
Whether a model allows either is tried out once when it is loaded, not guessed from its name.

Writing answers is done in `engines.generation`; what shares a pass, and what happens when one fails, in
`engines.runner`.

Axes: B rows of a batch, T tokens, K hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Pooling = Literal["last_token", "mean"]
# By how much states of the same tokens, computed in two ways, may differ: relative to their norm.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_PROBE_TOKENS = 12


@dataclass(frozen=True)
class Prefix:
    """What the model keeps of tokens that all rows of a chunk begin with.

    Attributes:
        num_tokens: How many there are.
        cache: Keys and values of one row, as the model returned them; never written to.
        state_sum_K: (K,) float32; sum of their states, for the mean.
    """

    num_tokens: int
    cache: Any
    state_sum_K: torch.Tensor

    def cache_of(self, num_rows: int) -> Any:
        """Returns a cache of so many equal rows, which the model may write to."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache


def pool(
    states_BTK: torch.Tensor, mask_BT: torch.Tensor, pooling: Pooling, prefix: Prefix | None = None
) -> torch.Tensor:
    """Reduces token states to one vector per row.

    Args:
        states_BTK: (B, T, K) hidden states.
        mask_BT: (B, T) 1 for real tokens, on whichever side the padding stands; one real token per row at least.
        pooling: last_token takes the last real token, mean averages over the real ones.
        prefix: Tokens before these, which belong to the mean.

    Returns:
        (B, K) float32.
    """
    if pooling == "mean":
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        sum_BK, count_B1 = (states_BTK.float() * weight_BT1).sum(1), weight_BT1.sum(1)
        if prefix is not None:
            sum_BK, count_B1 = sum_BK + prefix.state_sum_K, count_B1 + prefix.num_tokens
        return sum_BK / count_B1
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions_T * mask_BT).argmax(1)
    return states_BTK[torch.arange(len(last_B), device=mask_BT.device), last_B].float()


class Reader:
    """Reads hidden states off a loaded model.

    Args:
        base: The model without its head: ids in, `last_hidden_state` and, if asked, `hidden_states` out.
        pooling: How token states become a vector.
        layer: Hidden layer that is read; -1 is the last.
        pad_id: Any id that the model has.
        causal: Whether it is a causal LM; only such a model can do without a mask or share a prefix.

    Attributes:
        unmasked: Whether padding on the right needs no mask.
        shares_prefix: Whether `prefix` may be used.
    """

    def __init__(self, base: torch.nn.Module, pooling: Pooling, layer: int, pad_id: int, causal: bool) -> None:
        self.base: Any = base  # nn.Module's types know nothing of a language model's methods
        self.pooling = pooling
        self.device = next(base.parameters()).device
        self._layer = layer
        self._pad_id = pad_id
        self.unmasked = causal and self._tried(self._ignores_what_follows)
        self.shares_prefix = self.unmasked and self._tried(self._continues_from_a_cache)

    @torch.inference_mode()
    def read(self, token_ids: Sequence[Sequence[int]], prefix: Prefix | None = None) -> tuple[torch.Tensor, int]:
        """Returns (B, K) float32 vectors on the model's device, and the tokens that went through the model.

        Args:
            token_ids: Of each row, without the prefix; one at least.
            prefix: What stands before all of them.
        """
        ids_BT, mask_BT = self.pad(token_ids, "right")
        arguments: dict[str, Any] = {}
        if prefix is not None:
            arguments = {"past_key_values": prefix.cache_of(len(token_ids)), "use_cache": True}
        elif not self.unmasked and len(set(map(len, token_ids))) > 1:
            arguments = {"attention_mask": mask_BT}
        states_BTK = self.states(self.base(input_ids=ids_BT, **self.wanted, **arguments))
        return pool(states_BTK, mask_BT, self.pooling, prefix), ids_BT.numel()

    @torch.inference_mode()
    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Computes what rows begin with in common."""
        ids_1T = torch.tensor([list(token_ids)], device=self.device)
        out = self.base(input_ids=ids_1T, use_cache=True, **self.wanted)
        return Prefix(len(token_ids), out.past_key_values, self.states(out)[0].float().sum(0))

    @property
    def wanted(self) -> dict[str, bool]:
        """Arguments that make the model return the states to be read."""
        return {"output_hidden_states": True} if self._layer != -1 else {}

    def states(self, out: Any) -> torch.Tensor:
        """Returns the (B, T, K) states that are read from what the model without its head returned."""
        states_BTK: torch.Tensor = out.last_hidden_state if self._layer == -1 else out.hidden_states[self._layer]
        return states_BTK

    def pad(self, token_ids: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[torch.Tensor, ...]:
        """Returns ids_BT and mask_BT (int64, 1 for real tokens) on the device, padded on one side."""
        length = max(map(len, token_ids))
        ids_BT = np.full((len(token_ids), length), self._pad_id, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, ids in enumerate(token_ids):
            place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
            ids_BT[row, place] = ids
            mask_BT[row, place] = 1
        return self.to_device(ids_BT), self.to_device(mask_BT)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """Copies an array to the device; to a GPU without waiting for what it is busy with."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def _tried(self, attempt: Callable[[], bool]) -> bool:
        try:
            return attempt()
        except torch.AcceleratorError:
            raise  # the GPU is lost to this process
        except Exception:
            return False

    def _probe(self, start: int = 0) -> torch.Tensor:
        num_ids = self.base.get_input_embeddings().weight.shape[0]
        return torch.arange(start, start + _PROBE_TOKENS, device=self.device).remainder(num_ids).unsqueeze(0)

    def _ignores_what_follows(self) -> bool:
        half = _PROBE_TOKENS // 2
        ids_1T = self._probe()
        other_1T = torch.cat([ids_1T[:, :half], self._probe(start=half + 1)[:, half:]], 1)
        expected, got = (self.states(self.base(input_ids=i, **self.wanted))[:, 1:half] for i in (ids_1T, other_1T))
        return _close(got, expected)

    def _continues_from_a_cache(self) -> bool:
        ids_1T = self._probe()
        expected_1TK = self.states(self.base(input_ids=ids_1T, **self.wanted))
        prefix = self.prefix(ids_1T[0, :5].tolist())
        ids_BT = ids_1T[:, 5:].repeat(2, 1)
        for _ in range(2):  # twice: the first use must leave the prefix as it was
            out = self.base(input_ids=ids_BT, past_key_values=prefix.cache_of(2), use_cache=True, **self.wanted)
            if not _close(self.states(out), expected_1TK[:, 5:].expand(2, -1, -1)):
                return False
        return True


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    distance = torch.linalg.vector_norm(got.float() - expected.float())
    return bool(distance <= _ROUNDING[expected.dtype] * torch.linalg.vector_norm(expected.float()))
