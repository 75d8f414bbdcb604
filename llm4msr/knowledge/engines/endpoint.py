"""Knowledge from an OpenAI-compatible HTTP endpoint: vLLM, SGLang, TGI or a hosted model.

A vector is what ``POST /embeddings`` gives for a prompt, kept as it is; with `generate` on, the model's words come from
``POST /chat/completions`` and the vector may be that of the words. Which layer and pooling make the vector is the
endpoint's affair, so both options must keep their defaults. The endpoint's tokenizer is not known, so prompts are cut
by an estimate (`engines.estimates`); a prompt that the endpoint still finds too long is an error of its own.
Retries and limits are in `engines.endpoint_client`.

Axes: N prompts, K knowledge width.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.endpoint_client import EndpointClient, RequestError, endpoint_address
from llm4msr.knowledge.engines.estimates import CutPrompt, cut, estimate_tokens, with_preamble
from llm4msr.knowledge.engines.interface import FLOAT16_MAX, BatchDone, EncodedBatch, Hardware, OnBatch
from llm4msr.knowledge.engines.model_files import EMBEDDED, EncoderError
from llm4msr.knowledge.prompts import PROMPT_VERSION, Prompt

# Servers accept 32 texts per request and more.
MAX_TEXTS_PER_REQUEST = 16


def endpoint_identity(config: KnowledgeConfig) -> dict[str, Any]:
    """Returns what tells this endpoint's vectors from any other's; asks nobody.

    The address is not part of it: the same model elsewhere gives the same vectors. `knowledge.revision` is a label to
    change when the model behind the name does.

    Args:
        config: The language model.

    Raises:
        EncoderError: The configuration asks for what an endpoint cannot give, or the address, where one is set,
            holds a secret (`endpoint_address`).
    """
    endpoint_address(config.openai)
    if config.model == EMBEDDED:
        raise EncoderError("knowledge.model 'embedded' is no model of an endpoint: name one that it serves")
    if config.layer != -1 or config.pooling != "auto":
        raise EncoderError(
            f"knowledge.layer = {config.layer}, knowledge.pooling = {config.pooling!r}: an endpoint chooses both "
            "itself; leave -1 and 'auto', or use knowledge.engine = 'transformers'"
        )
    identity: dict[str, Any] = {
        "engine": "openai",
        "model": config.model,
        "revision": config.revision,
        "max_tokens": config.max_tokens,
        "characters_per_token": config.openai.characters_per_token,
        "prompt_version": PROMPT_VERSION,
    }
    if config.preamble:
        identity["preamble"] = config.preamble
    if config.generate:
        identity["generate"] = {
            "chat_model": config.openai.chat_model or config.model,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
            "state_from": config.state_from,
        }
    return identity


class Endpoint:
    """A language model behind an HTTP endpoint; an `llm4msr.knowledge.engines.interface.Engine`.

    Args:
        config: The model and, in `openai`, its endpoint. Where the key's environment variable is unset, "EMPTY" is
            sent: local servers need none.
        num_actors: Actors that share `openai.requests_per_minute`.

    Attributes:
        identity: As `endpoint_identity` returns it.
        hardware: The endpoint's address; what runs there is not known.

    Raises:
        EncoderError: A library or the address is missing, or the configuration does not fit.
    """

    def __init__(self, config: KnowledgeConfig, num_actors: int = 1) -> None:
        self.identity = endpoint_identity(config)
        self._config = config
        self._client = EndpointClient(config.openai, num_actors)
        self.hardware = Hardware(device=self._client.base_url)
        self._width: int | None = None
        # One event loop for all calls: connections and the rate limit outlive a call.
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        weakref.finalize(self, self._runner.get_loop().close)

    def encode(self, prompts: Sequence[Prompt], on_batch: OnBatch | None = None) -> EncodedBatch:
        """Returns one vector per prompt, in order; a prompt without one has its reason in `errors`.

        Token counts are the endpoint's where it states them, else estimates; the count of a request for several
        prompts is shared out by their estimates. `BatchDone.busy_s` is the time since the previous batch ended, so
        that it adds up to the time of the call although requests overlap.

        Args:
            prompts: Any number of prompts.
            on_batch: Told after each request what it did.

        Raises:
            EncoderError: The endpoint cannot be reached, or refuses access or the model; what this call had is lost.
        """
        call = _Call(self._config, self._client, prompts, on_batch, self._width)
        try:
            self._runner.run(call.run())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        self._width = call.width
        return call.batch()


class _Call:
    """The state of one call of `Endpoint.encode`."""

    def __init__(
        self,
        config: KnowledgeConfig,
        client: EndpointClient,
        prompts: Sequence[Prompt],
        on_batch: OnBatch | None,
        width: int | None,
    ) -> None:
        self._config, self._client, self._prompts, self._on_batch = config, client, prompts, on_batch
        self.width = width
        self._cut: list[CutPrompt] = cut(prompts, config)
        self._vectors: list[np.ndarray | None] = [None] * len(prompts)
        self._errors: list[str | None] = [c.error for c in self._cut]
        self._texts: list[str | None] = [None] * len(prompts)
        self._num_tokens = np.zeros(len(prompts), dtype=np.int32)
        self._num_generated = np.zeros(len(prompts), dtype=np.int32)
        self._reported_at = time.monotonic()

    async def run(self) -> None:
        rows = [row for row, error in enumerate(self._errors) if error is None]
        if unsent := [row for row, error in enumerate(self._errors) if error is not None]:
            self._report(unsent)
        size = self._texts_per_request(len(rows))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        if groups and not self._client.reached:
            # Alone, so that an endpoint that is not there is found by one request, not by all.
            await self._group(groups.pop(0))
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._group(group))

    def batch(self) -> EncodedBatch:
        vectors = np.zeros((len(self._vectors), self.width or 0), dtype=np.float32)
        for row, vector in enumerate(self._vectors):
            if vector is not None:
                vectors[row] = vector
        return EncodedBatch(
            vectors=vectors,
            num_tokens=self._num_tokens,
            num_dropped_events=np.array([c.num_dropped_events for c in self._cut], dtype=np.int32),
            num_cut_characters=np.array([c.num_cut_characters for c in self._cut], dtype=np.int32),
            errors=tuple(self._errors),
            texts=tuple(self._texts),
            num_generated_tokens=self._num_generated,
        )

    def _texts_per_request(self, num_rows: int) -> int:
        """Returns few enough to keep all slots busy, and many where requests are rationed."""
        if self._config.generate:
            return 1  # an answer is written for one prompt at a time
        if self._config.openai.requests_per_minute is not None:
            return MAX_TEXTS_PER_REQUEST
        return max(1, min(MAX_TEXTS_PER_REQUEST, math.ceil(num_rows / self._config.openai.max_in_flight)))

    async def _group(self, rows: list[int]) -> None:
        if self._config.generate:
            (row,) = rows
            await self._write(row)
        if self._errors[rows[0]] is None:
            await self._embed(rows)
        self._report(rows)

    async def _write(self, row: int) -> None:
        """Asks for the model's words about one prompt."""
        config = self._config
        messages = [{"role": "system", "content": config.preamble}] if config.preamble else []
        try:
            answer = await self._client.chat(
                model=config.openai.chat_model or config.model,
                messages=[*messages, {"role": "user", "content": self._cut[row].text}],
                temperature=config.temperature,
                seed=answer_seed(config.seed, self._prompts[row]),
                max_tokens=config.max_new_tokens,
            )
            text = _read_text(answer)
        except RequestError as error:
            self._errors[row] = str(error)
            return
        if config.state_from == "generated" and not text.strip():
            self._errors[row] = "the answer is empty, so that it has no vector"
            return
        self._texts[row] = text
        self._num_tokens[row] = _usage(answer, "prompt_tokens") or self._cut[row].num_tokens
        self._num_generated[row] = _usage(answer, "completion_tokens") or estimate_tokens(
            text, config.openai.characters_per_token
        )

    async def _embed(self, rows: list[int]) -> None:
        """Asks for the vectors of some prompts or answers; of a refused request again one by one."""
        of_answer = self._config.state_from == "generated"
        texts = [self._texts[r] if of_answer else with_preamble(self._config.preamble, self._cut[r].text) for r in rows]
        try:
            answer = await self._client.embed(model=self._config.model, input=texts, encoding_format="float")
            vectors = _read_vectors(answer, len(rows))
        except RequestError as error:
            if error.of_content and len(rows) > 1:
                for row in rows:
                    await self._embed([row])
            else:
                for row in rows:
                    self._errors[row] = str(error)
            return
        if not of_answer:
            estimates = np.array([self._cut[row].num_tokens for row in rows])
            total = _usage(answer, "prompt_tokens") or estimates.sum()
            ends = np.rint(np.cumsum(estimates) * (total / estimates.sum())).astype(np.int32)
            self._num_tokens[rows] = np.diff(ends, prepend=0)
        for row, vector in zip(rows, vectors, strict=True):
            self._errors[row] = self._wrong(vector)
            if self._errors[row] is None:
                self._vectors[row] = vector

    def _wrong(self, vector: np.ndarray) -> str | None:
        highest = np.abs(vector).max()
        if not highest <= FLOAT16_MAX:
            return f"{self._config.model} gave a vector with largest value {highest}, not finite in float16"
        if self.width is None:
            self.width = len(vector)
        if len(vector) != self.width:
            return f"{self._config.model} gave a vector of width {len(vector)}, others have {self.width}"
        return None

    def _report(self, rows: list[int]) -> None:
        now = time.monotonic()
        busy_s, self._reported_at = now - self._reported_at, now
        if self._on_batch is None:
            return
        num_tokens = int(self._num_tokens[rows].sum())
        self._on_batch(
            BatchDone(
                num_prompts=len(rows),
                num_failed=sum(self._errors[row] is not None for row in rows),
                num_tokens=num_tokens,
                num_computed_tokens=num_tokens,
                num_generated_tokens=int(self._num_generated[rows].sum()),
                busy_s=busy_s,
            )
        )


def answer_seed(seed: int, prompt: Prompt) -> int:
    """Returns the seed of one prompt's answer, the same wherever and whenever it is asked for; 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt.content()}".encode()).digest()[:4], "big") >> 1


def _read_text(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        raise RequestError("the answer has no choices[0].message.content") from None
    if not isinstance(text, str):
        raise RequestError(f"the answer's text is a {type(text).__name__}")
    return text


def _read_vectors(answer: Any, number: int) -> list[np.ndarray]:
    """Returns the (K,) float64 vectors of an answer, in the order of the prompts."""
    try:
        by_index = {entry["index"]: np.asarray(entry["embedding"], dtype=np.float64) for entry in answer["data"]}
        indices = sorted(entry["index"] for entry in answer["data"])
    except (KeyError, TypeError, ValueError):
        raise RequestError("the answer has no data[].index and data[].embedding of numbers", of_content=True) from None
    if indices != list(range(number)):
        raise RequestError(f"the answer has vectors of index {indices} for {number} prompts", of_content=True)
    if any(vector.ndim != 1 or not len(vector) for vector in by_index.values()):
        raise RequestError("the answer has a vector that is no list of numbers", of_content=True)
    return [by_index[index] for index in range(number)]


def _usage(answer: Any, name: str) -> int | None:
    """Returns a count that the endpoint states, or None."""
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None
