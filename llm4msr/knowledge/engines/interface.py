"""What every engine of knowledge extraction offers.

An engine turns prompts into vectors (and, where `knowledge.generate` is on, the model's words). Engines know neither
Ray nor the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from llm4msr.knowledge.prompts import Prompt

Device = Literal["auto", "cpu", "cuda"]
# Vectors are stored as float16: what does not fit is an error of its prompt.
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class EncodedBatch:
    """Vectors of N prompts and how they were read. Axes: N prompts, K knowledge width.

    Attributes:
        vectors: (N, K) float32; zeros where `errors` names a reason.
        num_tokens: (N,) int32, special tokens included; 0 where the prompt was never read.
        num_dropped_events: (N,) int32; events left out to keep the limit.
        num_cut_characters: (N,) int32; characters cut from the head to keep the limit.
        errors: For each prompt why it has no vector, or None.
        texts: For each prompt the model's answer, or None where it was not asked to write.
        num_generated_tokens: (N,) int32; length of the answers.
    """

    vectors: np.ndarray
    num_tokens: np.ndarray
    num_dropped_events: np.ndarray
    num_cut_characters: np.ndarray
    errors: tuple[str | None, ...]
    texts: tuple[str | None, ...]
    num_generated_tokens: np.ndarray


def failed_batch(num_prompts: int, error: str) -> EncodedBatch:
    """Returns prompts that were never read, all for the same reason."""
    none = np.zeros(num_prompts, np.int32)
    vectors = np.zeros((num_prompts, 0), np.float32)
    return EncodedBatch(vectors, none, none, none, (error,) * num_prompts, (None,) * num_prompts, none)


class DeviceLostError(RuntimeError):
    """The device is lost to this process; another process may still use it."""


@dataclass(frozen=True)
class BatchDone:
    """What one forward pass, or one round of requests, achieved. Adds up.

    Attributes:
        num_prompts: Prompts done, those without a vector included.
        num_failed: How many of them have no vector.
        num_tokens: Tokens of the prompts.
        num_computed_tokens: Tokens that went through the model: padding included, a shared prefix counted once.
        num_generated_tokens: Tokens that it wrote.
        busy_s: Seconds the model was at work on them.
    """

    num_prompts: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    busy_s: float = 0.0

    def __add__(self, other: BatchDone) -> BatchDone:
        """Returns the sum, field by field."""
        return BatchDone(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


OnBatch = Callable[[BatchDone], None]


@dataclass(frozen=True)
class Hardware:
    """What an engine runs on, for the share of the device's peak that it reaches.

    Attributes:
        device: Name of the device, such as "NVIDIA H200"; "cpu"; or the endpoint's address.
        num_parameters: Weights that every token passes through; None where they are not known.
        peak_flops: Dense multiply-add rate (FLOP/s, a multiply-add counts as two) in the engine's dtype that the
            device's maker states; None where it is not known.
    """

    device: str
    num_parameters: int | None = None
    peak_flops: float | None = None


class Engine(Protocol):
    """A loaded language model, wherever it runs.

    Attributes:
        identity: What tells its vectors from any other's; as `engines.build.engine_identity` returns it.
        hardware: What it runs on.
    """

    identity: dict[str, Any]
    hardware: Hardware

    def encode(self, prompts: Sequence[Prompt], on_batch: OnBatch | None = None) -> EncodedBatch:
        """Returns one vector per prompt, in order; a prompt without one has its reason in `errors`.

        Args:
            prompts: Any number of prompts; they are batched here.
            on_batch: Told after each batch what it did.

        Raises:
            DeviceLostError: This process can encode no more.
        """
        ...
