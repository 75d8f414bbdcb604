"""Which vectors of a knowledge table are near a given one: exact, in blocks, so that a million rows take seconds.

Similarity is the cosine after the mean of its table is taken from each vector: the states of a language model share
one large direction, and those of one template another, so that the plain cosine of any two is close to 1. An index of
approximate neighbours would have to be built and kept for questions that are asked one at a time.

Axes: N rows, B rows of a block, K knowledge width, M rows that were found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 1 << 25


def mean_vector(vectors_NK: np.ndarray, first_row: int) -> np.ndarray:
    """Returns mean_K (float32) of the rows from `first_row` on, zeros where there are none."""
    sum_K = np.zeros(vectors_NK.shape[1])
    for _, block_BK in _blocks(vectors_NK, first_row):
        sum_K += block_BK.sum(0, dtype=np.float64)
    return (sum_K / max(len(vectors_NK) - first_row, 1)).astype(np.float32)


def nearest_rows(
    vectors_NK: np.ndarray, mean_K: np.ndarray, centred_K: np.ndarray, num: int, without_row: int = 0
) -> list[tuple[int, float]]:
    """Finds the rows whose vectors, less their mean, point most nearly where `centred_K` does; row 0 is left out.

    Args:
        vectors_NK: A table of vectors; row 0 means "no knowledge".
        mean_K: float32; mean of the others.
        centred_K: float32; what to be near to, less the mean of its own table.
        num: Rows wanted at most.
        without_row: Another row to leave out.

    Returns:
        (row, cosine), nearest first, equal ones by row; the cosine of a zero vector is 0.
    """
    query_K = _unit(centred_K)
    row_M, similarity_M = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for start, block_BK in _blocks(vectors_NK, 1):
        block_BK -= mean_K
        length_B = np.sqrt(np.einsum("bk,bk->b", block_BK, block_BK))
        similarity_B = (block_BK @ query_K) / np.where(length_B > 0, length_B, 1)
        row_B = np.arange(start, start + len(block_BK))
        kept_B = row_B != without_row
        row_M = np.concatenate([row_M, row_B[kept_B]])
        similarity_M = np.concatenate([similarity_M, similarity_B[kept_B]])
        best = np.lexsort((row_M, -similarity_M))[:num]
        row_M, similarity_M = row_M[best], similarity_M[best]
    return list(zip(row_M.tolist(), similarity_M.tolist(), strict=True))


def cosine(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Returns the cosine of two float32 vectors, 0 where one of them is zero."""
    return float(_unit(a_K) @ _unit(b_K))


def _unit(vector_K: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector_K)
    return vector_K / length if length > 0 else vector_K


def _blocks(vectors_NK: np.ndarray, first_row: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of a block's first row and the block as float32."""
    num_rows = max(BLOCK_BYTES // (4 * vectors_NK.shape[1]), 1)
    for start in range(first_row, len(vectors_NK), num_rows):
        yield start, vectors_NK[start : start + num_rows].astype(np.float32)
