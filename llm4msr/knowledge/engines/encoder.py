"""The transformers engine: prompts in, one hidden-state vector per prompt out, and the model's words if wanted.

The model is loaded without its head unless it is to write: no logits are computed for vectors. A causal LM gives the
state of its last token, an encoder the mean over its tokens (`KnowledgeConfig.pooling`); vectors are kept as they are,
not scaled to unit length. A prompt has the same vector alone and in any batch, up to rounding.

Prompts go through in chunks: while the model reads one, the next is tokenised. Only this file imports `transformers`;
passes are in `llm4msr.knowledge.engines.forward`, answers in `llm4msr.knowledge.engines.generation`, failures in
`llm4msr.knowledge.engines.runner`. Spreading work over actors is done in `llm4msr.knowledge.pipeline`.

Axes: B prompts of a batch, N prompts of a call, K hidden width.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_flash_attn_2_available

from llm4msr.config import KnowledgeConfig, digest
from llm4msr.knowledge.engines.batching import shared_prefix_length
from llm4msr.knowledge.engines.devices import (
    count_parameters,
    enough_memory,
    peak_flops,
    resolve_device,
    resolve_dtype,
)
from llm4msr.knowledge.engines.fitting import Fitted, fit_each
from llm4msr.knowledge.engines.forward import Pooling, Prefix, Reader
from llm4msr.knowledge.engines.generation import Writer, draw_chances
from llm4msr.knowledge.engines.interface import BatchDone, Device, DeviceLostError, EncodedBatch, Hardware, OnBatch
from llm4msr.knowledge.engines.model_files import EMBEDDED, EncoderError, cached_commit, find_local
from llm4msr.knowledge.engines.results import Results
from llm4msr.knowledge.engines.runner import Passed, Runner
from llm4msr.knowledge.prompts import PROMPT_VERSION, Prompt

# Weights of a head that the vector does not pass through may be absent from a checkpoint.
_UNUSED_WEIGHTS = ("pooler.",)
_AUTO_BATCH_TOKENS = {"cuda": 32768, "cpu": 2048}
# Part of what a vector is, where the model writes.
_GENERATION_FIELDS = ("generate", "max_new_tokens", "temperature", "seed", "state_from")
# Fewer prompts at a time leave too little choice of similar lengths.
_MIN_CHUNK = 128


@dataclass(frozen=True)
class _Setup:
    """All that is known of a model before its weights are loaded."""

    name: str
    path: str
    revision: str | None
    config: Any
    tokenizer: Any
    causal: bool
    dtype: str
    pooling: Pooling
    max_tokens: int
    identity: dict[str, Any]


def encoder_identity(config: KnowledgeConfig, device: Device = "auto") -> dict[str, Any]:
    """Returns what tells this encoder's vectors from any other's; reads the model's files but loads no weights.

    Args:
        config: The language model.
        device: Where it will run; decides what dtype "auto" means.

    Raises:
        EncoderError: The model is not to be found or does not fit the configuration.
    """
    return _set_up(config, device).identity


class Encoder:
    """A loaded language model.

    Args:
        config: Which model and how it is read.
        device: "auto" takes a GPU where there is one.
        num_threads: CPU threads of torch in this process; None leaves them as they are.

    Attributes:
        identity: As `encoder_identity` returns it.
        identity_digest: 16 hex digits of it.
        width: Length K of every vector.
        hardware: What it runs on.

    Raises:
        EncoderError: The model is not to be found, cannot be loaded, or does not fit the configuration.
    """

    def __init__(self, config: KnowledgeConfig, device: Device = "auto", num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        kind = resolve_device(device)
        self._config = config
        self._setup = setup = _set_up(config, device)
        with enough_memory(setup.name, setup.dtype):
            model: Any = _load_model(setup, config)  # the types of its methods miss what decorators made of them
            model = model.to(kind).eval()  # a GPU's memory may end here
        base = model.base_model
        self.identity = setup.identity
        self.identity_digest = digest(self.identity)
        self.width = int(setup.config.get_text_config().hidden_size)
        device_name = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
        self.hardware = Hardware(device_name, count_parameters(base), peak_flops(device_name, setup.dtype))
        # Padding is never seen, so which id stands there does not matter as long as the model has it.
        pad_id = setup.tokenizer.pad_token_id or setup.tokenizer.eos_token_id or 0
        self._reader = Reader(base, setup.pooling, config.layer, pad_id, setup.causal)
        self._writer = None
        if config.generate:
            stated = model.generation_config.eos_token_id
            ends = [*(stated if isinstance(stated, list) else [stated]), setup.tokenizer.eos_token_id]
            self._writer = Writer(model, self._reader, config, [i for i in ends if i is not None])
        if config.compile:
            base.forward = torch.compile(base.forward, dynamic=True)
        batch_tokens = _AUTO_BATCH_TOKENS[kind] if config.batch_tokens == "auto" else config.batch_tokens
        self._runner = Runner(batch_tokens, self._reader.device)
        # Two full batches, so that the next chunk is tokenised by the time it is needed.
        self._chunk = max(_MIN_CHUNK, 2 * batch_tokens // setup.max_tokens)

    def encode(self, prompts: Sequence[Prompt], on_batch: OnBatch | None = None) -> EncodedBatch:
        """Returns one vector per prompt, in order.

        A prompt without a usable vector (empty, too long, the tokenizer or the model raises, values not finite or
        beyond float16, no room in memory) has zeros and its reason in `errors`; the others are not affected.

        Args:
            prompts: Any number of prompts; they are batched here.
            on_batch: Told after each batch what it did.

        Raises:
            DeviceLostError: The GPU is lost to this process.
        """
        out = Results(len(prompts), self.width)
        with ThreadPoolExecutor(1, "tokenise") as thread:
            ahead = thread.submit(self._fit, prompts[: self._chunk])
            for start in range(0, len(prompts), self._chunk):
                fitted = ahead.result()
                following = start + self._chunk
                ahead = thread.submit(self._fit, prompts[following : following + self._chunk])
                for i, one in enumerate(fitted, start):
                    out.add_fitted(i, one)
                try:
                    self._encode_chunk(prompts, start, fitted, out, on_batch or (lambda done: None))
                except torch.AcceleratorError as error:
                    raise DeviceLostError(f"{self.hardware.device}: {error}") from error
        return out.encoded()

    def _fit(self, prompts: Sequence[Prompt]) -> list[Fitted]:
        num_token_ids = self._reader.base.get_input_embeddings().weight.shape[0]
        return fit_each(prompts, self._tokenise, self._setup.max_tokens, num_token_ids)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._config.preamble:
            texts = [f"{self._config.preamble}\n{text}" for text in texts]
        if not self.identity["chat_template"]:
            plain: list[list[int]] = self._setup.tokenizer(texts)["input_ids"]
            return plain
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = self._setup.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        ids: list[list[int]] = self._setup.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def _encode_chunk(
        self, prompts: Sequence[Prompt], start: int, fitted: list[Fitted], out: Results, report: OnBatch
    ) -> None:
        """Takes the chunk that begins at prompt `start` through the model, into `out`."""
        rows = np.array([start + i for i, one in enumerate(fitted) if one.error is None], dtype=np.int64)
        if len(rows) < len(fitted):
            num_unread = len(fitted) - len(rows)
            report(BatchDone(num_prompts=num_unread, num_failed=num_unread))
        token_ids = {int(row): fitted[row - start].token_ids for row in rows}
        prefix = self._prefix(list(token_ids.values()))
        num_shared = prefix.num_tokens if prefix else 0
        if prefix:
            report(BatchDone(num_computed_tokens=num_shared))

        def forward(rows_B: np.ndarray) -> Passed:
            own = [token_ids[int(row)][num_shared:] for row in rows_B]
            if self._writer is None:
                return Passed(*self._reader.read(own, prefix))
            chances_BM = draw_chances(self._config, [prompts[row].content() for row in rows_B])
            return self._writer.write(own, chances_BM, prefix)

        def on_done(rows_B: np.ndarray, vectors_BK: np.ndarray, passed: Passed, busy_s: float) -> None:
            texts = [self._setup.tokenizer.decode(a, skip_special_tokens=True).strip() for a in passed.answers]
            out.add_vectors(rows_B, vectors_BK, self._setup.name)
            if self._writer is not None:
                out.add_answers(rows_B, texts, passed.answers, required=self._config.state_from == "generated")
            report(
                BatchDone(
                    num_prompts=len(rows_B),
                    num_failed=sum(out.errors[row] is not None for row in rows_B),
                    num_tokens=int(out.num_tokens[rows_B].sum()),
                    num_computed_tokens=passed.num_computed_tokens,
                    num_generated_tokens=sum(map(len, passed.answers)),
                    busy_s=busy_s,
                )
            )

        def on_failed(row: int, reason: str, busy_s: float) -> None:
            out.add_failure(row, reason)
            report(BatchDone(num_prompts=1, num_failed=1, busy_s=busy_s))

        # What is written needs room too.
        room = self._config.max_new_tokens if self._writer else 0
        self._runner.run(out.num_tokens + room, rows, forward, on_done, on_failed)

    def _prefix(self, token_ids: list[list[int]]) -> Prefix | None:
        """Returns what the rows begin with in common, None where it is not worth it or the model cannot share it."""
        if not self._reader.shares_prefix or not (num_shared := shared_prefix_length(token_ids)):
            return None
        try:
            prefix = self._reader.prefix(token_ids[0][:num_shared])
        except torch.AcceleratorError:
            raise
        except Exception:  # what is wrong shows again, row by row
            return None
        # Padding stands between the prefix and what follows when answers are written, and a window would count it.
        return None if self._writer and any(prefix.cache.is_sliding) else prefix


def _set_up(config: KnowledgeConfig, device: Device) -> _Setup:
    local = find_local(config.model)
    if local is not None:
        name, path, revision = local.name, str(local.path), None
        # A folder is what it holds, wherever it stands.
        origin: dict[str, Any] = {"model": EMBEDDED if name == EMBEDDED else "local", "files": local.files}
    else:
        name = path = config.model
        with _explained(name, config.revision):
            revision = cached_commit(cached_file(path, "config.json", revision=config.revision)) or config.revision
        origin = {"model": config.model, "revision": revision or "main"}
    with _explained(name, config.revision):
        model_config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if getattr(model_config, "is_encoder_decoder", False):
        raise EncoderError(f"{name} is an encoder-decoder model; give a causal LM or an encoder")
    causal = _is_causal(model_config)
    pooling = config.pooling if config.pooling != "auto" else "last_token" if causal else "mean"
    if pooling == "last_token" and not causal:
        raise EncoderError(
            f"knowledge.pooling 'last_token' needs a causal LM; {name} ({model_config.model_type}) is an encoder, "
            "whose last token has no special meaning: use 'mean' or 'auto'"
        )
    if config.generate and not causal:
        raise EncoderError(
            f"knowledge.generate needs a causal LM; {name} ({model_config.model_type}) is an encoder and cannot write"
        )
    text_config = model_config.get_text_config()
    if not -1 <= config.layer <= text_config.num_hidden_layers:
        raise EncoderError(
            f"knowledge.layer {config.layer}: {name} has layers 0 (embeddings) to {text_config.num_hidden_layers}, "
            "or -1 for the last"
        )
    limits = [getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length]
    longest = min(int(limit) for limit in [*limits, sys.maxsize] if limit)
    room = longest - config.max_new_tokens if config.generate else longest
    if room < 1:
        raise EncoderError(
            f"knowledge.max_new_tokens {config.max_new_tokens}: {name} has {longest} positions, no room for a prompt"
        )
    max_tokens = min(config.max_tokens, room)
    tokenizer.model_max_length = sys.maxsize  # cutting is done here, so a warning about long texts would mislead
    dtype = resolve_dtype(config, device)
    identity = origin | {
        "dtype": dtype,
        "pooling": pooling,
        "layer": config.layer,
        "max_tokens": max_tokens,
        "prompt_version": PROMPT_VERSION,
        "chat_template": bool(tokenizer.chat_template),
    }
    if config.preamble:
        identity["preamble"] = config.preamble
    if config.generate:
        identity |= {k: getattr(config, k) for k in _GENERATION_FIELDS}
    return _Setup(name, path, revision, model_config, tokenizer, causal, dtype, pooling, max_tokens, identity)


def _load_model(setup: _Setup, config: KnowledgeConfig) -> transformers.PreTrainedModel:
    loader = transformers.AutoModelForCausalLM if config.generate else transformers.AutoModel
    settings = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if config.attention == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise EncoderError(
                "knowledge.attention 'flash_attention_2' needs a GPU and the package flash-attn, which is not usable "
                "here: install it or take 'auto', 'sdpa' or 'eager'"
            )
        if setup.dtype == "float32":
            raise EncoderError("knowledge.attention 'flash_attention_2' needs knowledge.dtype bfloat16 or float16")
    with _explained(setup.name, setup.revision), _quiet():
        loaded: Any = loader.from_pretrained(
            setup.path,
            revision=setup.revision,
            trust_remote_code=False,
            dtype=getattr(torch, setup.dtype),
            output_loading_info=True,
            **settings,
        )
    model: transformers.PreTrainedModel
    model, report = loaded  # its types leave out what output_loading_info adds
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(_UNUSED_WEIGHTS))
    if missing:
        raise EncoderError(
            f"{setup.name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}: "
            "it is incomplete or of another architecture"
        )
    # Keys and values are kept only where they are asked for.
    model.config.get_text_config().use_cache = False
    return model


def _is_causal(model_config: Any) -> bool:
    """Tells a causal LM from an encoder; some encoder types have a causal variant, which says so in its config."""
    # Some configurations lack the field where it would be false.
    if getattr(model_config, "is_decoder", False) or any(
        a.endswith("ForCausalLM") for a in model_config.architectures or ()
    ):
        return True
    kind = model_config.model_type
    return (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise EncoderError(
            f"knowledge.model {name!r}{at} cannot be loaded; check its spelling and revision, the network or the "
            f"local cache, and that it needs no code of its own (trust_remote_code stays off): {error}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the loader from drawing bars and from reporting the head that is left out on purpose."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
