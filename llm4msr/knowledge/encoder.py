"""The frozen language model: prompts in, one hidden-state vector per prompt out.

The model is loaded without its head: no logits are computed and no text is generated. A causal LM gives the state of
its last token, an encoder the mean over its tokens (`KnowledgeConfig.pooling`); vectors are kept as they are, not
scaled to unit length. Prompts are padded on the right whatever the tokenizer prefers, so positions need no repair and
a prompt has the same vector alone and in any batch, up to rounding.

Only this file imports `transformers`. Spreading work over actors is done in `llm4msr.knowledge.pipeline`.

Axes: B prompts of a batch, T tokens, K hidden width.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from llm4msr.config import KnowledgeConfig, digest
from llm4msr.knowledge.fitting import fit
from llm4msr.knowledge.model_files import EMBEDDED, EncoderError, find_local
from llm4msr.knowledge.prompts import PROMPT_VERSION, Prompt
from llm4msr.knowledge.store import FLOAT16_MAX, EncodedBatch

Pooling = Literal["last_token", "mean"]
Device = Literal["auto", "cpu", "cuda"]
# Weights of a head that the vector does not pass through may be absent from a checkpoint.
_UNUSED_WEIGHTS = ("pooler.",)


def pool(states_BTK: torch.Tensor, mask_BT: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Reduces token states to one vector per row.

    Args:
        states_BTK: (B, T, K) hidden states.
        mask_BT: (B, T) 1 for real tokens, on whichever side the padding stands; one real token per row at least.
        pooling: last_token takes the last real token, mean averages over the real ones.

    Returns:
        (B, K) float32.
    """
    if pooling == "mean":
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        return (states_BTK.float() * weight_BT1).sum(1) / weight_BT1.sum(1)
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions_T * mask_BT).argmax(1)
    return states_BTK[torch.arange(len(last_B), device=mask_BT.device), last_B].float()


@dataclass(frozen=True)
class _Setup:
    """All that is known of a model before its weights are loaded."""

    name: str
    path: str
    revision: str | None
    config: Any
    tokenizer: Any
    dtype: str
    pooling: Pooling
    layer: int
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
    return _set_up(config, _resolve(device)).identity


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

    Raises:
        EncoderError: The model is not to be found, cannot be loaded, or does not fit the configuration.
    """

    def __init__(self, config: KnowledgeConfig, device: Device = "auto", num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._device = _resolve(device)
        self._setup = _set_up(config, self._device)
        self._batch_size = config.batch_size
        self._model = _load_model(self._setup).to(self._device).eval()
        self.identity = self._setup.identity
        self.identity_digest = digest(self.identity)
        self.width = int(self._setup.config.get_text_config().hidden_size)

    def encode(self, prompts: Sequence[Prompt], on_batch: Callable[[int], None] | None = None) -> EncodedBatch:
        """Returns one vector per prompt, in order.

        A prompt without a usable vector (instruction longer than the limit, values not finite or beyond float16) has
        zeros and its reason in `errors`; the others are not affected.

        Args:
            prompts: Any number of prompts; they are batched here.
            on_batch: Told the number of prompts of each batch when it is done.
        """
        fitted = fit(prompts, self._tokenise, self._setup.max_tokens)
        lengths = np.array([len(f.token_ids) for f in fitted], dtype=np.int32)
        vectors = np.zeros((len(fitted), self.width), dtype=np.float32)
        # Neighbours in length share a batch, so that little of it is padding.
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            vectors[rows] = self._forward([fitted[i].token_ids for i in rows])
            if on_batch is not None:
                on_batch(len(rows))
        errors = [
            None
            if length
            else f"the instruction alone exceeds {self._setup.max_tokens} tokens; raise knowledge.max_tokens"
            for length in lengths
        ]
        highest = np.abs(vectors).max(axis=1, initial=0)
        for i in np.flatnonzero(~(highest <= FLOAT16_MAX)):
            errors[i] = f"{self._setup.name} gave a vector with largest value {highest[i]}, not finite in float16"
            vectors[i] = 0
        return EncodedBatch(
            vectors=vectors,
            num_tokens=lengths,
            num_dropped_events=np.array([f.num_dropped_events for f in fitted], dtype=np.int32),
            num_cut_characters=np.array([f.num_cut_characters for f in fitted], dtype=np.int32),
            errors=tuple(errors),
        )

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self.identity["chat_template"]:
            return self._setup.tokenizer(texts)["input_ids"]
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = self._setup.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return self._setup.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _forward(self, token_ids: list[list[int]]) -> np.ndarray:
        length = max(map(len, token_ids))
        # Padding is masked, so which id stands there does not matter as long as the model has it.
        ids_BT = np.zeros((len(token_ids), length), dtype=np.int64)
        ids_BT += self._setup.tokenizer.pad_token_id or self._setup.tokenizer.eos_token_id or 0
        mask_BT = np.zeros_like(ids_BT)
        for row, ids in enumerate(token_ids):
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
        mask = torch.from_numpy(mask_BT).to(self._device)
        layer = self._setup.layer
        out = self._model(
            input_ids=torch.from_numpy(ids_BT).to(self._device), attention_mask=mask, output_hidden_states=layer != -1
        )
        states_BTK = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return pool(states_BTK, mask, self._setup.pooling).cpu().numpy()


def _resolve(device: Device) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _set_up(config: KnowledgeConfig, device: str) -> _Setup:
    local = find_local(config.model)
    if local is not None:
        name, path, revision = local.name, str(local.path), None
        # A folder is what it holds, wherever it stands.
        origin: dict[str, Any] = {"model": EMBEDDED if name == EMBEDDED else "local", "files": local.files}
    else:
        name = path = config.model
        with _explained(name, config.revision):
            revision = _commit(cached_file(path, "config.json", revision=config.revision)) or config.revision
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
    text_config = model_config.get_text_config()
    if not -1 <= config.layer <= text_config.num_hidden_layers:
        raise EncoderError(
            f"knowledge.layer {config.layer}: {name} has layers 0 (embeddings) to {text_config.num_hidden_layers}, "
            "or -1 for the last"
        )
    limits = [config.max_tokens, getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length]
    max_tokens = min(int(limit) for limit in limits if limit)
    tokenizer.model_max_length = sys.maxsize  # cutting is done here, so a warning about long texts would mislead
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    identity = origin | {
        "dtype": dtype,
        "pooling": pooling,
        "layer": config.layer,
        "max_tokens": max_tokens,
        "prompt_version": PROMPT_VERSION,
        "chat_template": bool(tokenizer.chat_template),
    }
    return _Setup(name, path, revision, model_config, tokenizer, dtype, pooling, config.layer, max_tokens, identity)


def _load_model(setup: _Setup) -> torch.nn.Module:
    with _explained(setup.name, setup.revision), _quiet():
        model, report = transformers.AutoModel.from_pretrained(
            setup.path,
            revision=setup.revision,
            trust_remote_code=False,
            dtype=getattr(torch, setup.dtype),
            output_loading_info=True,
        )
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(_UNUSED_WEIGHTS))
    if missing:
        raise EncoderError(
            f"{setup.name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}: "
            "it is incomplete or of another architecture"
        )
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


def _commit(config_path: str | None) -> str | None:
    """Returns the commit that a cached file belongs to: the cache keeps it under ``snapshots/<commit>/``."""
    name = Path(config_path).parent.name if config_path else ""
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else None


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
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
