"""Cuts prompts for engines whose tokenizer is not loaded here: tokens are estimated from the length of the text.

The cutting itself is that of `engines.fitting`: oldest events first, never the instruction. Lengths count
UTF-8 bytes, because a tokenizer spends about one token on a Chinese character and three or four Latin letters, which
are three bytes and three or four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.fitting import fit
from llm4msr.knowledge.prompts import Prompt


@dataclass(frozen=True)
class CutPrompt:
    """One prompt as it is sent.

    Attributes:
        text: What the model reads, without the preamble; empty where `error` names a reason.
        num_tokens: Estimate, preamble included; 0 where there is no text.
        num_dropped_events: Events left out to keep the limit.
        num_cut_characters: Characters cut from the head to keep the limit.
        error: Why it cannot be sent, or None.
    """

    text: str
    num_tokens: int = 0
    num_dropped_events: int = 0
    num_cut_characters: int = 0
    error: str | None = None


def estimate_tokens(text: str, characters_per_token: float) -> int:
    """Returns the tokens that a text should have: its UTF-8 bytes divided by `characters_per_token`, rounded up."""
    return math.ceil(len(text.encode("utf-8", "replace")) / characters_per_token)


def with_preamble(preamble: str, text: str) -> str:
    """Returns the text with the preamble, where there is one, on lines of its own before it."""
    return f"{preamble}\n{text}" if preamble else text


def cut(prompts: Sequence[Prompt], config: KnowledgeConfig) -> list[CutPrompt]:
    """Returns every prompt cut to about `config.max_tokens` tokens, the preamble counted.

    Args:
        prompts: Any number of prompts.
        config: Its max_tokens, preamble and openai.characters_per_token count.
    """

    def tokenise(texts: list[str]) -> list[list[int]]:
        whole = (with_preamble(config.preamble, text) for text in texts)
        return [[0] * estimate_tokens(text, config.openai.characters_per_token) for text in whole]

    return [
        _cut(prompt, len(fitted.token_ids), fitted.num_dropped_events, fitted.num_cut_characters, config.max_tokens)
        for prompt, fitted in zip(prompts, fit(prompts, tokenise, config.max_tokens), strict=True)
    ]


def _cut(prompt: Prompt, num_tokens: int, num_dropped: int, num_cut: int, max_tokens: int) -> CutPrompt:
    if not prompt.text().strip():
        return CutPrompt("", error="the prompt is empty")
    if not num_tokens:
        error = f"the instruction alone exceeds {max_tokens} tokens; raise knowledge.max_tokens"
        return CutPrompt("", 0, num_dropped, num_cut, error)
    if num_cut:
        body_characters = len(prompt.text(num_events=0)) - len(prompt.tail) - 1 - num_cut
        text = prompt.text(num_events=0, body_characters=body_characters)
    else:
        text = prompt.text(num_events=len(prompt.events) - num_dropped)
    return CutPrompt(text, num_tokens, num_dropped, num_cut)
