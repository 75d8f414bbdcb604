"""Carries batches through a model, whatever happens on the way.

A pass that runs out of memory is repeated in smaller batches, and the smaller size stays. A pass that fails otherwise
is repeated in halves until the rows at fault stand alone; the others get their vectors. On a GPU the next pass is
queued before the last one's result is waited for, so the device has no pause between batches.

Axes: B rows of a batch, K hidden width.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm4msr.knowledge.engines.batching import padded_tokens, plan_batches

# What allocators on a CPU say; there is no type of its own for it.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "could not create a memory", "bad_alloc")

logger = logging.getLogger("llm4msr.knowledge")


@dataclass(frozen=True)
class Passed:
    """What one forward pass gave.

    Attributes:
        vectors_BK: (B, K) float32 on the model's device.
        num_computed_tokens: Tokens that went through the model, padding included, without what it wrote.
        answers: Of each row the ids that the model wrote; empty where it was not asked to.
    """

    vectors_BK: torch.Tensor
    num_computed_tokens: int
    answers: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class _InFlight:
    rows: np.ndarray
    passed: Passed
    vectors_BK: torch.Tensor
    copied: torch.cuda.Event | None
    started: float


Forward = Callable[[np.ndarray], Passed]
OnDone = Callable[[np.ndarray, np.ndarray, Passed, float], None]
OnFailed = Callable[[int, str, float], None]


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether an allocator of torch, on a GPU or a CPU, had no more to give."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


class Runner:
    """Runs batches of at most so many tokens, fewer from the first time that memory runs out.

    Args:
        batch_tokens: Tokens per forward pass, padding included.
        device: Where the model runs.

    Attributes:
        batch_tokens: As it is now.
    """

    def __init__(self, batch_tokens: int, device: torch.device) -> None:
        self.batch_tokens = batch_tokens
        self._num_in_flight = 1 if device.type == "cuda" else 0

    def run(
        self, lengths: np.ndarray, rows: np.ndarray, forward: Forward, on_done: OnDone, on_failed: OnFailed
    ) -> None:
        """Takes every row through the model.

        Args:
            lengths: Tokens of each row that the caller knows, whether it is to be run or not.
            rows: Which of them to run.
            forward: One pass over the given rows; may raise anything.
            on_done: Told the rows of a pass, their (B, K) vectors, what else it gave, and the seconds it took.
            on_failed: Told a row that has no vector, why, and the seconds it took.

        Raises:
            torch.AcceleratorError: The GPU is lost to this process.
        """
        self._on_done, self._last_finish = on_done, 0.0
        in_flight: deque[_InFlight] = deque()
        queue = deque(rows[batch] for batch in plan_batches(lengths[rows], self.batch_tokens))
        while queue:
            batch = queue.popleft()
            started, reason, out_of_memory = time.perf_counter(), None, False
            try:
                in_flight.append(self._start(batch, forward, started))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                # Only words of it may outlive this block: its traceback holds the tensors of the failed pass.
                reason, out_of_memory = f"{type(error).__name__}: {error}", is_out_of_memory(error)
            while len(in_flight) > (self._num_in_flight if reason is None else 0):
                self._finish(in_flight.popleft())
            if reason is None:
                continue
            if out_of_memory:
                _free_memory()
            if len(batch) == 1:
                if out_of_memory:
                    reason = f"a prompt of {lengths[batch[0]]} tokens alone does not fit into memory"
                on_failed(int(batch[0]), reason, time.perf_counter() - started)
            elif out_of_memory:
                self._halve(padded_tokens(lengths[batch]))
                left = np.concatenate([batch, *queue])
                queue = deque(left[b] for b in plan_batches(lengths[left], self.batch_tokens))
            else:
                logger.warning("a forward pass over %d prompts raised %s; trying them in halves", len(batch), reason)
                queue.extendleft((batch[len(batch) // 2 :], batch[: len(batch) // 2]))
        while in_flight:
            self._finish(in_flight.popleft())

    def _start(self, rows: np.ndarray, forward: Forward, started: float) -> _InFlight:
        passed = forward(rows)
        if not passed.vectors_BK.is_cuda:
            return _InFlight(rows, passed, passed.vectors_BK, None, started)
        vectors_BK = torch.empty_like(passed.vectors_BK, device="cpu", pin_memory=True)
        vectors_BK.copy_(passed.vectors_BK, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _InFlight(rows, passed, vectors_BK, copied, started)

    def _finish(self, flight: _InFlight) -> None:
        if flight.copied is not None:
            flight.copied.synchronize()
        now = time.perf_counter()
        busy_s = now - max(flight.started, self._last_finish)
        self._last_finish = now
        self._on_done(flight.rows, flight.vectors_BK.numpy(), flight.passed, busy_s)

    def _halve(self, failed_tokens: int) -> None:
        self.batch_tokens = max(1, min(self.batch_tokens, failed_tokens) // 2)
        logger.warning(
            "a forward pass over %d tokens ran out of memory; going on with knowledge.batch_tokens = %d",
            failed_tokens,
            self.batch_tokens,
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
