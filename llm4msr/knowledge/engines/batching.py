"""Which prompts share a forward pass, and how many tokens their beginnings have in common.

Pure planning over token counts; `llm4msr.knowledge.engines.forward` and `llm4msr.knowledge.engines.runner` do the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A shared prefix costs a pass of its own over few tokens and one more copy of its keys and values per row, so it must
# be worth something: this many tokens, and this share of the average prompt.
MIN_PREFIX_TOKENS = 16
MIN_PREFIX_SHARE = 0.1


def plan_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cuts rows into batches of similar length within a budget of tokens, padding included.

    The longest come first: a budget that the memory cannot bear shows in the first pass, and later passes fit into
    the memory of earlier ones. Equal lengths keep their order.

    Args:
        lengths: Tokens of each row.
        batch_tokens: Rows times longest row at most; a row longer than that is a batch of its own.

    Returns:
        Row numbers of each batch, in the order in which the batches should run.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        num_rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + num_rows])
        start += num_rows
    return batches


def padded_tokens(lengths: np.ndarray) -> int:
    """Returns the tokens of one batch, padding included."""
    return len(lengths) * int(lengths.max(initial=0))


def shared_prefix_length(token_ids: Sequence[Sequence[int]]) -> int:
    """Returns how many leading tokens all rows share, 0 where computing them once is not worth it.

    At least one token of every row is left out of it, so that every row has a state of its own.

    Args:
        token_ids: Token ids of each row, at least one per row.
    """
    if len(token_ids) < 2:
        return 0
    # What the first and the last in sorted order share, all between them share.
    rows = [list(row) for row in token_ids]
    first, last = min(rows), max(rows)
    limit = min(map(len, token_ids)) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    average = sum(map(len, token_ids)) / len(token_ids)
    return shared if shared >= max(MIN_PREFIX_TOKENS, MIN_PREFIX_SHARE * average) else 0
