"""Users' vectors from items' vectors: the mean direction of what the language model made of the items they liked.

No prompt about the user is read. A prompt mixes a dozen titles into one text, and a sentence encoder's mean over its
tokens blurs them; the mean of the titles' own vectors lies in the space of the items, so that a user and an item can
be compared (docs/decisions/0010-knowledge-of-users.md). KAR (Xi et al., arXiv 2306.10933) has vectors of items too.

With v_i an item's vector, standardised over the items and brought to length 1, a user's is the sum of v_i over the
user's likes, brought to length 1.

Only likes of training rows count. Rows are read bucket by bucket, twice: to see who will have a vector, and to make
them. Memory is bounded by one bucket of rows and `BLOCK_LIKES` vectors.

Axes: L likes, U users of a block, N users (row 0: unknown), F folds, K knowledge width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.knowledge.folds import folds_of
from llm4msr.knowledge.table import FILES, FOLD_FILES, column_statistics

COLUMNS = ("user_row", "item_row", "label", "moment")
BLOCK_LIKES = 65_536
MIN_STD = 1e-6


@dataclass(frozen=True)
class _Likes:
    """What whole users liked, sorted by user: user_row, row of the items' vectors, fold."""

    user_L: np.ndarray
    vector_L: np.ndarray
    fold_L: np.ndarray


def write_pooled_users(
    uri: str, rows_uris: Sequence[str], num_users: int, num_folds: int, items_NK: np.ndarray, item_index_N: np.ndarray
) -> int:
    """Writes the users' files of a `KnowledgeTable`, and those of its `UserFolds`.

    Args:
        uri: The table's directory.
        rows_uris: Buckets of training rows; each holds whole users.
        num_users: Users of the data.
        num_folds: F.
        items_NK: Vectors of items; row 0 is none.
        item_index_N: Row of `items_NK` of each item row.

    Returns:
        Number of users with a vector.
    """
    count_FN = np.zeros((num_folds, num_users + 1), np.int64)
    order = []  # users in the order in which their vectors are written
    for likes in _read(rows_uris, item_index_N, num_folds):
        np.add.at(count_FN, (likes.fold_L, likes.user_L), 1)
        order.append(np.unique(likes.user_L))
    users = np.concatenate([np.zeros(0, np.int64), *order])
    index_N = np.zeros(num_users + 1, np.int32)
    index_N[users] = np.arange(1, len(users) + 1)
    # The folds' vectors come user by user, fold by fold, of users whose likes are in two folds at least.
    folded = users[(count_FN[:, users] > 0).sum(0) > 1]
    index_FN = np.zeros((num_folds, num_users + 1), np.int32)
    index_FN[:, folded] = np.arange(1, num_folds * len(folded) + 1).reshape(-1, num_folds).T
    for name, array in ((FILES["user_index_N"], index_N), (FOLD_FILES["index_FN"], index_FN)):
        with storage.atomic_write(storage.join(uri, name)) as file:
            np.save(file, array, allow_pickle=False)
    width = items_NK.shape[1]
    mean_K, std_K = column_statistics(items_NK)
    std_K = np.maximum(std_K, MIN_STD)
    with (
        storage.atomic_write(storage.join(uri, FILES["users_NK"])) as whole,
        storage.atomic_write(storage.join(uri, FOLD_FILES["vectors_NK"])) as folds,
    ):
        for file, number in ((whole, len(users)), (folds, num_folds * len(folded))):
            header = {"descr": "<f2", "fortran_order": False, "shape": (number + 1, width)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(np.zeros(width, "<f2").tobytes())
        for likes in _read(rows_uris, item_index_N, num_folds):
            for block in _blocks(likes):
                vector_LK = _unit((items_NK[block.vector_L] - mean_K) / std_K)
                whole_UK, without_UFK, is_folded_U = _pool(block, vector_LK, num_folds)
                whole.write(whole_UK.astype("<f2").tobytes())
                folds.write(without_UFK[is_folded_U].astype("<f2").tobytes())
    return len(users)


def pool_likes(vectors_LK: np.ndarray, mean_K: np.ndarray, std_K: np.ndarray) -> np.ndarray:
    """Returns the vector (K,) of a user who liked items with these vectors: as `write_pooled_users` makes and keeps it.

    Args:
        vectors_LK: Of the liked items.
        mean_K: Over all items.
        std_K: Over all items, above 0.
    """
    vector_K = _unit(_unit((vectors_LK - mean_K) / std_K).sum(0))
    return vector_K.astype(np.float16).astype(np.float32)


def _read(rows_uris: Sequence[str], item_index_N: np.ndarray, num_folds: int) -> Iterator[_Likes]:
    for uri in rows_uris:
        table = storage.read_parquet(uri, COLUMNS)
        table = table.filter(pc.and_(pc.equal(table["label"], 1), pc.greater(table["user_row"], 0)))
        vector_L = item_index_N[table["item_row"].to_numpy()]
        table = table.append_column("vector", pa.array(vector_L)).filter(pa.array(vector_L > 0))
        user_L, moment_L = table["user_row"].to_numpy(), table["moment"].to_numpy()
        fold_L = folds_of(user_L, moment_L, num_folds)
        # The order of the sums is fixed, whatever that of the rows.
        order = np.lexsort((table["item_row"].to_numpy(), moment_L, user_L))
        yield _Likes(user_L[order].astype(np.int64), table["vector"].to_numpy()[order], fold_L[order])


def _blocks(likes: _Likes) -> Iterator[_Likes]:
    """Cuts likes into blocks of whole users, of about `BLOCK_LIKES`."""
    starts = np.flatnonzero(np.diff(likes.user_L, prepend=-1))
    cuts = starts[np.flatnonzero(np.diff(starts // BLOCK_LIKES, prepend=-1))]
    for part in np.split(np.arange(len(likes.user_L)), cuts[1:]):
        if len(part):
            yield _Likes(likes.user_L[part], likes.vector_L[part], likes.fold_L[part])


def _pool(likes: _Likes, vector_LK: np.ndarray, num_folds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the users' vectors (U, K), those without each fold's likes (U, F, K), and who has these (U,)."""
    _, first_U, user_L = np.unique(likes.user_L, return_index=True, return_inverse=True)
    in_fold = [likes.fold_L == fold for fold in range(num_folds)]
    sum_FUK = np.stack([np.add.reduceat(vector_LK * own_L[:, None], first_U) for own_L in in_fold])
    count_UF = np.stack([np.bincount(user_L[own_L], minlength=len(first_U)) for own_L in in_fold], axis=1)
    sum_UK = sum_FUK.sum(0)
    return _unit(sum_UK), _unit(sum_UK - sum_FUK).transpose(1, 0, 2), (count_UF > 0).sum(1) > 1


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Brings the vectors along the last axis to length 1, in float64; one of zeros stays."""
    vectors = vectors.astype(np.float64)
    units: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), MIN_STD)
    return units
