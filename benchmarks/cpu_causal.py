"""A causal LM on a CPU: hidden states by prefill in our engine against the paper's way, on the same real prompts.

The model has the shape of SmolLM-135M (a Llama), random weights, and the embedded encoder's tokenizer, so that its
prompts have their real lengths: about 124 M weights. The paper's way writes 64 tokens for one prompt at a time and
takes the hidden state from there; it is given a few prompts that stand for all lengths, and rates are compared.

Reported as well: the same prompts behind a long shared preamble, computed once or again in every row.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.harness import interleave, paired_ratio, rates
from benchmarks.real_prompts import MAX_TOKENS
from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.encoder import Encoder
from llm4msr.knowledge.engines.model_files import EMBEDDED, find_local
from llm4msr.knowledge.prompts import Prompt

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
NUM_NEW_TOKENS = 64
GOAL = "causal: prefill bfloat16 / the paper's way"
PREAMBLE = (
    "You know people by what they choose. This app sells groceries and things for the home: food is snacks, drinks, "
    "ingredients and what children eat, often bought again; kitchen is cookware, small appliances, tableware and "
    "tools, mostly bought once. Below is what one user chose in each of these scenarios, most recent first. Say which "
    "interests it shows in each scenario, which of them reach across scenarios, how they differ in price, in brand "
    "and in purpose, and what this user may want next in the one because of what was chosen in the other. Keep to "
    "what is written; guess neither age nor gender; leave out what only one purchase speaks for."
)


@dataclass(frozen=True)
class Measured:
    """As the fields of `harness.Result`."""

    config: dict[str, Any]
    seconds: dict[str, list[float]]
    medians: dict[str, float]
    ratios: dict[str, float]


def save_model(folder: Path) -> int:
    """Writes a model of `SHAPE` and returns the number of its weights."""
    local = find_local(EMBEDDED)
    assert local is not None, EMBEDDED
    tokenizer = transformers.AutoTokenizer.from_pretrained(local.path)
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **ids, **SHAPE))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def representative(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Returns `count` prompts evenly spaced over all, sorted by length: each the middle of its share."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.text()))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


class PapersWay:
    """Text one prompt at a time, and the last layer's state of the last token written, in float32.

    Args:
        folder: Of the model.
        prompts: What it reads.
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        texts = [prompt.text() for prompt in prompts]
        self._ids = [tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text in texts]

    @torch.inference_mode()
    def __call__(self) -> None:
        """Encodes all prompts."""
        for ids in self._ids:
            out = self._model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                min_new_tokens=NUM_NEW_TOKENS,
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_hidden_states=True,
            )
            assert len(out.hidden_states) == NUM_NEW_TOKENS
            out.hidden_states[-1][-1][0, -1].float().numpy()


def measure(folder: Path, prompts: Sequence[Prompt], rounds: int, short: bool) -> Measured:
    """Measures all sides in turn.

    Args:
        folder: Temporary; the model is written below it.
        prompts: Real ones, of which evenly spaced ones are taken.
        rounds: Of each side.
        short: Take fewer.
    """
    few, many = (2, 8) if short else (6, 120)
    model_path = folder / "causal"
    num_weights = save_model(model_path)
    slow, fast = representative(prompts, few), representative(prompts, many)

    def engine(share: bool = True, **settings: Any) -> Callable[[], None]:
        config = KnowledgeConfig(model=str(model_path), max_tokens=2 * MAX_TOKENS, **settings)
        encoder = Encoder(config, "cpu", len(os.sched_getaffinity(0)))
        if not share:  # whatever prompts begin with in common is shared, and no setting says otherwise
            encoder._reader.shares_prefix = False
        encoder.encode(fast[:2])  # the first pass of a model is slow
        return lambda: check(encoder.encode(fast).errors)

    sides = {
        "causal/generate_one_at_a_time/float32": PapersWay(model_path, slow),
        "causal/engine/float32": engine(dtype="float32"),
        "causal/engine/bfloat16": engine(dtype="bfloat16"),
        "causal/preamble_in_every_row/bfloat16": engine(share=False, dtype="bfloat16", preamble=PREAMBLE),
        "causal/preamble_shared/bfloat16": engine(dtype="bfloat16", preamble=PREAMBLE),
    }
    seconds = interleave(sides, rounds, warm_up=False)
    work = {side: len(slow if "generate" in side else fast) for side in sides}
    speed = {side: rates(values, work[side]) for side, values in seconds.items()}
    paper = speed["causal/generate_one_at_a_time/float32"]
    ratios = {
        "causal: prefill float32 / the paper's way": paired_ratio(speed["causal/engine/float32"], paper),
        GOAL: paired_ratio(speed["causal/engine/bfloat16"], paper),
        "causal: preamble shared / in every row": paired_ratio(
            speed["causal/preamble_shared/bfloat16"], speed["causal/preamble_in_every_row/bfloat16"]
        ),
    }
    config = {
        **SHAPE,
        "num_weights": num_weights,
        "num_new_tokens": NUM_NEW_TOKENS,
        "num_prompts": work,
        "preamble_characters": len(PREAMBLE),
    }
    medians = {f"{side} prompts/s": statistics.median(values) for side, values in speed.items()}
    return Measured(config, seconds, medians, ratios)


def check(errors: Sequence[str | None]) -> None:
    """Raises where a prompt has no vector: a side that fails fast is not fast."""
    failed = [error for error in errors if error]
    if failed:
        raise RuntimeError(f"{len(failed)} prompts failed, first: {failed[0]}")
