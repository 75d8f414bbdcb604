"""Knowledge from vLLM on GPUs, offline, through the processors of `ray.data.llm`: an engine with actors of its own.

The tests of this project check the requests, the settings and the flow of rows, with a stand-in for the engine: none
of them has run vLLM itself, which needs an NVIDIA GPU and the extra ``vllm``.

What differs from the transformers engine:

- vLLM gives the pooled embedding of the last layer only: `knowledge.layer` must be -1. It is not scaled to unit length.
- Prompts are read without a chat template, and cut by an estimate (`engines.estimates`); what an estimate
  misses is cut by vLLM at the front, so that the instruction stays.
- One engine either embeds or writes. With `knowledge.generate` the prompts go through two engines one after the other,
  the words being kept in Ray's object store between them; the vector is the prompt's.

Axes: K knowledge width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.endpoint import answer_seed
from llm4msr.knowledge.engines.estimates import cut, with_preamble
from llm4msr.knowledge.engines.interface import FLOAT16_MAX
from llm4msr.knowledge.engines.model_files import EMBEDDED, EncoderError, find_local
from llm4msr.knowledge.prompts import KEY, PARTS, PROMPT_VERSION, PROMPTS, Prompt

if TYPE_CHECKING:
    import ray.data

# Ray's name for the reason why a row has no result; its stages pass such rows on untouched.
ERROR = "__inference_error__"
# Eight batches are under way per engine: enough for the 1,024 sequences that vLLM runs at once on an H100.
BATCH_SIZE = 128

# One encoded prompt. vector: null where error names a reason; text: null where none was asked for.
ENCODED = pa.schema(
    [
        ("key", KEY),
        ("vector", pa.list_(pa.float32())),
        ("error", pa.string()),
        ("text", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_generated_tokens", pa.int32()),
        ("num_dropped_events", pa.int32()),
        ("num_cut_characters", pa.int32()),
    ]
)
# A prompt between the engine that writes and the one that embeds, which sets a num_generated_tokens of its own.
_WRITTEN = pa.schema(
    [
        *[PROMPTS.field(name) for name in ("key", *PARTS)],
        ("text", pa.string()),
        ("num_written_tokens", pa.int32()),
        (ERROR, pa.string()),
    ]
)


def vllm_identity(config: KnowledgeConfig) -> dict[str, Any]:
    """Returns what tells this engine's vectors from any other's; needs neither vLLM nor a GPU.

    Args:
        config: The language model.

    Raises:
        EncoderError: The model folder is not to be found, or the configuration asks for what vLLM cannot give.
    """
    _check_options(config)
    local = find_local(config.model)
    if local is None:
        identity: dict[str, Any] = {"model": config.model, "revision": config.revision or "main"}
    else:
        identity = {"model": EMBEDDED if local.name == EMBEDDED else "local", "files": local.files}
    identity |= {
        "engine": "vllm",
        "dtype": config.dtype,
        "pooling": config.pooling,
        "max_tokens": config.max_tokens,
        "characters_per_token": config.openai.characters_per_token,
        "prompt_version": PROMPT_VERSION,
    }
    if config.preamble:
        identity["preamble"] = config.preamble
    if config.generate:
        identity["generate"] = {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
        }
    return identity


def check(config: KnowledgeConfig) -> None:
    """Checks that vLLM is installed and can do what the configuration asks for.

    Raises:
        EncoderError: It is not, or cannot; the message says what to change.
    """
    _check_options(config)
    if importlib.util.find_spec("vllm") is None:
        raise EncoderError(
            "knowledge.engine 'vllm' needs vLLM, which is not installed: pip install llm4msr[vllm], on Linux with an "
            "NVIDIA GPU; or use knowledge.engine = 'transformers'"
        )


def _check_options(config: KnowledgeConfig) -> None:
    if config.layer != -1:
        raise EncoderError(
            f"knowledge.layer = {config.layer}: vLLM gives the last layer only; leave -1, or use "
            "knowledge.engine = 'transformers'"
        )
    if config.state_from == "generated":
        raise EncoderError(
            "knowledge.state_from = 'generated': in vLLM one engine writes and another embeds, so the state behind the "
            "answer is not to be had; use 'prompt', or knowledge.engine = 'transformers'"
        )
    if config.gpus_per_actor < 1:
        raise EncoderError(
            f"knowledge.gpus_per_actor = {config.gpus_per_actor}: vLLM takes whole GPUs; more than one splits the model"
        )


def embed_request(row: Mapping[str, Any], config: KnowledgeConfig) -> dict[str, Any]:
    """Returns what the embedding engine reads of one prompt.

    Args:
        row: Columns `key` and those of `prompts.PARTS`.
        config: The language model.

    Returns:
        ``prompt`` and ``tokenization_kwargs`` as vLLM takes them, what was cut, and in `ERROR` why the prompt cannot be
        sent, or an error that the row has already.
    """
    (cut_prompt,) = cut([_prompt(row)], config)
    return {
        "prompt": with_preamble(config.preamble, cut_prompt.text),
        "tokenization_kwargs": {"truncate_prompt_tokens": config.max_tokens, "truncation_side": "left"},
        "num_dropped_events": cut_prompt.num_dropped_events,
        "num_cut_characters": cut_prompt.num_cut_characters,
        ERROR: row.get(ERROR) or cut_prompt.error or "",
    }


def generate_request(row: Mapping[str, Any], config: KnowledgeConfig) -> dict[str, Any]:
    """Returns what the writing engine reads of one prompt.

    Args:
        row: Columns `key` and those of `prompts.PARTS`.
        config: The language model.

    Returns:
        ``messages`` and ``sampling_params`` as vLLM takes them, and in `ERROR` why the prompt cannot be sent.
    """
    prompt = _prompt(row)
    (cut_prompt,) = cut([prompt], config)
    messages = [{"role": "system", "content": config.preamble}] if config.preamble else []
    return {
        "messages": [*messages, {"role": "user", "content": cut_prompt.text}],
        "sampling_params": {
            "temperature": config.temperature,
            "seed": answer_seed(config.seed, prompt),
            "max_tokens": config.max_new_tokens,
        },
        ERROR: cut_prompt.error or "",
    }


def processor_configs(config: KnowledgeConfig, num_actors: int | tuple[int, int]) -> dict[str, Any]:
    """Returns the settings of each engine that the configuration needs, by task: generate (where on), then embed.

    Args:
        config: The language model.
        num_actors: Engines at most, or (fewest, most); each takes `gpus_per_actor` GPUs.
    """
    from ray.data.llm import vLLMEngineProcessorConfig

    local = find_local(config.model)
    engine: dict[str, Any] = {
        "dtype": config.dtype,
        "seed": config.seed,
        "tensor_parallel_size": int(config.gpus_per_actor),
        "trust_remote_code": False,
    }
    if local is None and config.revision is not None:
        engine |= {"revision": config.revision, "tokenizer_revision": config.revision}
    if config.batch_tokens != "auto":
        engine["max_num_batched_tokens"] = config.batch_tokens
    shared: dict[str, Any] = {
        "model_source": config.model if local is None else str(local.path),
        "batch_size": BATCH_SIZE,
        "concurrency": num_actors,
        "should_continue_on_error": True,
        "detokenize_stage": False,
    }
    # use_activation: whether an embedding is scaled to unit length. vLLM's own choice of pooling is the model's.
    pooler: dict[str, Any] = {"use_activation": False}
    if config.pooling != "auto":
        pooler["pooling_type"] = {"last_token": "LAST", "mean": "MEAN"}[config.pooling]
    configs = {}
    if config.generate:
        # Twice the limit leaves room for the chat template and for an estimate that is too low.
        length = 2 * config.max_tokens + config.max_new_tokens
        configs["generate"] = vLLMEngineProcessorConfig(
            task_type="generate", engine_kwargs=engine | {"max_model_len": length}, **shared
        )
    configs["embed"] = vLLMEngineProcessorConfig(
        task_type="embed",
        engine_kwargs=engine | {"max_model_len": config.max_tokens, "pooler_config": pooler},
        # The engine tokenises, since only its own tokenising can cut.
        chat_template_stage=False,
        tokenize_stage=False,
        **shared,
    )
    return configs


def encode_dataset(
    prompt_rows: ray.data.Dataset,
    config: KnowledgeConfig,
    num_actors: int | tuple[int, int] = 1,
    build: Callable[..., Callable[[ray.data.Dataset], ray.data.Dataset]] | None = None,
) -> ray.data.Dataset:
    """Returns the vector, or the error, of every prompt of a data set; the vectors are made as they are read.

    Args:
        prompt_rows: Rows with the columns `key` and `prompts.PARTS`; others are left out.
        config: The language model.
        num_actors: Engines at most, or (fewest, most).
        build: Makes a processor as `ray.data.llm.build_processor` does; None for that one.

    Returns:
        Rows of schema `ENCODED`, in any order. With `generate` on, the words have been written when this returns.

    Raises:
        EncoderError: vLLM is not installed or cannot do what is asked for.
    """
    if build is None:
        check(config)
        from ray.data.llm import build_processor

        build = build_processor
    configs = processor_configs(config, num_actors)
    rows = prompt_rows.select_columns(["key", *PARTS])
    if config.generate:
        write = build(
            configs["generate"],
            preprocess=functools.partial(generate_request, config=config),
            postprocess=_written,
        )
        # Both engines at once would need twice the GPUs, and wait for ever where these are not to be had.
        rows = write(rows).map_batches(_write_table, batch_format="pyarrow").materialize()
    embed = build(configs["embed"], preprocess=functools.partial(embed_request, config=config), postprocess=_embedded)
    return embed(rows).map_batches(
        _encode_table,  # type: ignore[arg-type]  # Ray's types know no function with fn_kwargs
        batch_format="pyarrow",
        fn_kwargs={"model": config.model},
    )


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(
        level=row["level"],
        subject_id=row["subject_id"],
        head=row["head"],
        events=tuple(map(str, row["events"])),
        tail=row["tail"],
        sections=tuple(map(str, row["sections"])),
        event_sections=tuple(map(int, row["event_sections"])),
    )


def _written(row: dict[str, Any]) -> dict[str, Any]:
    """Takes from a row of the writing engine what is kept; rows with an error never come here."""
    kept = {name: row[name] for name in ("key", *PARTS)}
    return kept | {"text": row["generated_text"], "num_written_tokens": row["num_generated_tokens"]}


def _embedded(row: dict[str, Any]) -> dict[str, Any]:
    """Takes from a row of the embedding engine what is kept; rows with an error never come here."""
    names = ("key", "text", "num_written_tokens", "num_dropped_events", "num_cut_characters")
    vector_K = np.asarray(row["embeddings"], dtype=np.float32).reshape(-1).tolist()
    return {name: row.get(name) for name in names} | {"vector": vector_K, "num_input_tokens": row["num_input_tokens"]}


def _write_table(table: pa.Table) -> pa.Table:
    rows = [{**row, ERROR: row.get(ERROR) or ""} for row in table.to_pylist()]
    for row in rows:
        if row[ERROR]:
            row |= {"text": None, "num_written_tokens": 0}
    return pa.Table.from_pylist(rows, schema=_WRITTEN)


def _encode_table(table: pa.Table, model: str) -> pa.Table:
    rows = []
    for row in table.to_pylist():
        error, vector = row.get(ERROR) or None, row.get("vector")
        if error is None and not (highest := np.abs(vector).max(initial=0)) <= FLOAT16_MAX:
            error = f"{model} gave a vector with largest value {highest}, not finite in float16"
        rows.append(
            {
                "key": row["key"],
                "vector": None if error else vector,
                "error": error,
                "text": row.get("text"),
                "num_tokens": row.get("num_input_tokens") or 0,
                "num_generated_tokens": row.get("num_written_tokens") or 0,
                "num_dropped_events": row.get("num_dropped_events") or 0,
                "num_cut_characters": row.get("num_cut_characters") or 0,
            }
        )
    return pa.Table.from_pylist(rows, schema=ENCODED)
