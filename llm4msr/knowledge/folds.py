"""Out-of-fold knowledge of users: what a training row may be asked with.

A user's prompt quotes what the user liked. A training row that asks about one of these items would find its own answer
in the prompt, and the ranker would learn to look there instead of learning what interests mean: at serving nothing of
the kind is quoted. So items are dealt into F folds by a hash of their id; for each fold a user has one more prompt,
which quotes none of the fold's items; and a training row sees the one of its item's fold. Validation, test and serving
see the whole prompt. It is the out-of-fold rule of stacked generalisation (Wolpert 1992) and target encoding.

Axes: N rows of users or items (row 0: unknown), F folds, K knowledge width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm4msr.data.splits import bucket_of


def item_folds(item_keys: pa.Array, num_folds: int) -> np.ndarray:
    """Returns the fold of every item row, int8 (N,); that of row 0, the unknown item, is 0.

    It follows from the raw id alone, so that an item stays in its fold when the data grows.

    Args:
        item_keys: Raw ids of the items' feature table; record i is item_row i + 1.
        num_folds: F, 2 to 127.
    """
    return np.concatenate([[0], bucket_of(item_keys, num_folds)]).astype(np.int8)


@dataclass(frozen=True)
class UserFolds:
    """Vectors of users by fold.

    Attributes:
        vectors_NK: (vectors + 1, K) float16; row 0 is zeros and means "no knowledge".
        index_FN: (F, num_users + 1) int32; row of `vectors_NK` of each user's prompt without the items of a fold, 0
            where nothing else was liked.
        fold_N: (num_items + 1,) int8; fold of each item row.
    """

    vectors_NK: np.ndarray
    index_FN: np.ndarray
    fold_N: np.ndarray

    def __post_init__(self) -> None:
        """Checks types, shapes and the range of the indices."""
        for name, dtype, ndim in (("vectors_NK", np.float16, 2), ("index_FN", np.int32, 2), ("fold_N", np.int8, 1)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != ndim or not array.size:
                raise ValueError(
                    f"{name}: found {array.dtype} of shape {array.shape}, needed {np.dtype(dtype)} with {ndim} axes"
                )
        if int(self.index_FN.min()) < 0 or int(self.index_FN.max()) >= len(self.vectors_NK):
            raise ValueError(f"index_FN holds rows outside of the {len(self.vectors_NK)} of vectors_NK")
        if int(self.fold_N.min()) < 0 or int(self.fold_N.max()) >= len(self.index_FN):
            raise ValueError(f"fold_N names folds outside of the {len(self.index_FN)} of index_FN")

    def rows(self, user_row_B: np.ndarray, item_row_B: np.ndarray) -> np.ndarray:
        """Returns (B,) the rows of `vectors_NK` that training rows may see."""
        return self.index_FN[self.fold_N[item_row_B], user_row_B]
