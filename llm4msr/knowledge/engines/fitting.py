"""Cuts prompts to a model's token limit: events go first, oldest first, then the head's end; never the instruction.

A shortened prompt is tokenised as a whole, since tokens may span the seams between its parts; a binary search over
the number of quoted events keeps that to a few calls for a whole batch. Knows a tokenizer only as a function, which
may add to every text: a chat template, special tokens, a preamble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm4msr.knowledge.prompts import Prompt

Tokenise = Callable[[list[str]], list[list[int]]]


@dataclass
class Fitted:
    """One prompt within the limit.

    Attributes:
        token_ids: What the model reads, special tokens included; empty where `error` says why.
        num_dropped_events: Events that were left out, of all in the prompt.
        num_cut_characters: Characters cut from the end of what stands before the instruction.
        error: Why the prompt cannot be read, or None.
    """

    token_ids: list[int]
    num_dropped_events: int = 0
    num_cut_characters: int = 0
    error: str | None = None


def fit_each(prompts: Sequence[Prompt], tokenise: Tokenise, max_tokens: int, num_token_ids: int) -> list[Fitted]:
    """Returns every prompt in at most `max_tokens` tokens; one that cannot be read has an error, alone.

    Args:
        prompts: Any number of prompts.
        tokenise: Token ids of each text, special tokens and chat template included; may raise.
        max_tokens: Limit, special tokens included.
        num_token_ids: Rows of the model's table of embeddings, which every id must be below: on a GPU one beyond
            would end the whole process.
    """
    out = [Fitted([], error="the prompt is empty") for _ in prompts]
    filled = [i for i, prompt in enumerate(prompts) if prompt.text().strip()]
    for i, fitted in zip(filled, _fit_apart([prompts[i] for i in filled], tokenise, max_tokens), strict=True):
        out[i] = fitted
        highest = max(fitted.token_ids, default=0)
        if highest >= num_token_ids:
            out[i] = Fitted([], error=f"token id {highest} is beyond the model's {num_token_ids} embeddings")
    return out


def _fit_apart(prompts: Sequence[Prompt], tokenise: Tokenise, max_tokens: int) -> list[Fitted]:
    """Fits all at once; where that raises, each half apart, down to the prompts that raise."""
    try:
        return fit(prompts, tokenise, max_tokens)
    except Exception as error:
        if len(prompts) == 1:
            return [Fitted([], error=f"the tokenizer raised {type(error).__name__}: {error}")]
    half = len(prompts) // 2
    return [f for part in (prompts[:half], prompts[half:]) for f in _fit_apart(part, tokenise, max_tokens)]


def fit(prompts: Sequence[Prompt], tokenise: Tokenise, max_tokens: int) -> list[Fitted]:
    """Returns every prompt in at most `max_tokens` tokens.

    Args:
        prompts: Any number of prompts.
        tokenise: Token ids of each text, special tokens and chat template included.
        max_tokens: Limit, special tokens included.
    """
    out = [
        Fitted(ids, error=None if ids else "the prompt has no tokens") for ids in tokenise([p.text() for p in prompts])
    ]
    too_long = [i for i, fitted in enumerate(out) if len(fitted.token_ids) > max_tokens]
    kept = _largest(
        [len(prompts[i].events) - 1 for i in too_long],
        lambda which, counts: tokenise(
            [prompts[too_long[w]].text(num_events=n) for w, n in zip(which, counts, strict=True)]
        ),
        max_tokens,
    )
    heads = []
    for i, (num_events, token_ids) in zip(too_long, kept, strict=True):
        out[i] = Fitted(token_ids, len(prompts[i].events) - max(num_events, 0))
        if num_events < 0:
            heads.append(i)
    lengths = {i: len(prompts[i].text(num_events=0)) - len(prompts[i].tail) - 1 for i in heads}
    cut = _largest(
        [max(lengths[i], 0) for i in heads],
        lambda which, counts: tokenise(
            [prompts[heads[w]].text(num_events=0, body_characters=n) for w, n in zip(which, counts, strict=True)]
        ),
        max_tokens,
    )
    for i, (num_characters, token_ids) in zip(heads, cut, strict=True):
        out[i].token_ids = token_ids
        out[i].num_cut_characters = lengths[i] - max(num_characters, 0)
        if num_characters < 0:
            out[i].error = f"the instruction alone exceeds {max_tokens} tokens; raise knowledge.max_tokens"
    return out


def _largest(
    highest: Sequence[int], tokenise_sized: Callable[[list[int], list[int]], list[list[int]]], max_tokens: int
) -> list[tuple[int, list[int]]]:
    """Finds for each case the largest size in 0..highest that fits, all cases in step.

    Returns:
        (size, token ids) of each case; (-1, []) where not even size 0 fits.
    """
    best: list[tuple[int, list[int]]] = [(-1, []) for _ in highest]
    low, high = [0] * len(highest), list(highest)
    while open_cases := [c for c in range(len(highest)) if low[c] <= high[c]]:
        sizes = [(low[c] + high[c]) // 2 for c in open_cases]
        for case, size, token_ids in zip(open_cases, sizes, tokenise_sized(open_cases, sizes), strict=True):
            if len(token_ids) <= max_tokens:
                best[case], low[case] = (size, token_ids), size + 1
            else:
                high[case] = size - 1
    return best
