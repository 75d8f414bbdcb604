"""What a training row may know of its user: vectors made without the likes of the row's own moment.

A vector made of what a user liked holds the answer to the very rows that training asks about. A ranker that may look
there learns to look there, and at serving finds nothing. So the moments of a user's rows are dealt into F folds, each
user has one more vector per fold, made without the fold's likes, and a training row sees that of its own fold. It is
the out-of-fold rule of stacked generalisation (Wolpert 1992). Validation, test and serving see the whole vector.

All rows of one moment (an impression; a positive and the negatives drawn for it) are in one fold. A user whose likes
are all in one fold has no vector in any: had it one in the others, a missing vector would mark the rows of its likes.

Axes: B rows, N users (row 0: unknown), F folds, K knowledge width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def folds_of(user_row_B: np.ndarray, moment_B: np.ndarray, num_folds: int) -> np.ndarray:
    """Returns the fold of each row, (B,) int64: a user's moments are dealt out in turn, not all users from fold 0.

    Args:
        user_row_B: Users.
        moment_B: Number of the row's moment among its user's (`schema.rows_schema`).
        num_folds: F.
    """
    fold_B: np.ndarray = (user_row_B.astype(np.int64) + moment_B) % num_folds
    return fold_B


@dataclass(frozen=True)
class UserFolds:
    """Vectors of users by fold.

    Attributes:
        vectors_NK: (vectors + 1, K) float16; row 0 is zeros and means "no knowledge".
        index_FN: (F, num_users + 1) int32; row of `vectors_NK` of each user's vector without the likes of a fold, 0 in
            all folds where these are not in two folds at least.
    """

    vectors_NK: np.ndarray
    index_FN: np.ndarray

    def __post_init__(self) -> None:
        """Checks types, shapes and the range of the index."""
        for name, dtype in (("vectors_NK", np.float16), ("index_FN", np.int32)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 2 or not array.size:
                raise ValueError(
                    f"{name}: found {array.dtype} of shape {array.shape}, needed {np.dtype(dtype)} with 2 axes"
                )
        if int(self.index_FN.min()) < 0 or int(self.index_FN.max()) >= len(self.vectors_NK):
            raise ValueError(f"index_FN names rows outside of the {len(self.vectors_NK)} of vectors_NK")
        if np.any(self.vectors_NK[0]):
            raise ValueError("vectors_NK[0] must be zeros: it stands for users without knowledge")

    def rows(self, user_row_B: np.ndarray, moment_B: np.ndarray) -> np.ndarray:
        """Returns (B,) the rows of `vectors_NK` that training rows may see."""
        row_B: np.ndarray = self.index_FN[folds_of(user_row_B, moment_B, len(self.index_FN)), user_row_B]
        return row_B
