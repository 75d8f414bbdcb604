"""The knowledge of one prepared data set as arrays: what training and serving look up instead of running an LLM.

Pure numpy over memory-mapped files, so the workers of a node share one copy and importing it costs nothing.
How the vectors came to be is the business of `llm4msr.knowledge.pipeline`; how they become meta layers, of the models.

Axes: N user rows of the feature table (0 = unknown user), M users with knowledge, S scenarios, K knowledge width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm4msr import storage

USERS = "users.npy"
USER_INDEX = "user_index.npy"
SCENARIOS = "scenarios.npy"


@dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of users and scenarios.

    Attributes:
        users_NK: (M + 1, K) float16; row 0 is zeros and means "no knowledge", each other row belongs to one user.
        user_index_N: (num_users + 1,) int32; knowledge row of each user row, 0 where there is none.
        scenarios_SK: (S, K) float32, in the order of the schema's scenarios.
    """

    users_NK: np.ndarray
    user_index_N: np.ndarray
    scenarios_SK: np.ndarray

    def __post_init__(self) -> None:
        """Checks types, shapes and the range of the index."""
        for name, array, dtype, ndim in (
            ("users_NK", self.users_NK, np.float16, 2),
            ("user_index_N", self.user_index_N, np.int32, 1),
            ("scenarios_SK", self.scenarios_SK, np.float32, 2),
        ):
            if array.dtype != dtype or array.ndim != ndim or not len(array):
                raise ValueError(
                    f"{name}: found {array.dtype} of shape {array.shape}, needed {np.dtype(dtype)} with {ndim} axes "
                    "and at least one row"
                )
        if self.users_NK.shape[1] != self.scenarios_SK.shape[1]:
            raise ValueError(
                f"users have knowledge of width {self.users_NK.shape[1]}, scenarios of {self.scenarios_SK.shape[1]}"
            )
        low, high = int(self.user_index_N.min()), int(self.user_index_N.max())
        if low < 0 or high >= len(self.users_NK) or self.user_index_N[0] != 0:
            raise ValueError(
                f"user_index_N holds {low} to {high} and starts with {self.user_index_N[0]}: "
                f"needed 0 to {len(self.users_NK) - 1}, starting with 0"
            )
        if np.any(self.users_NK[0]):
            raise ValueError("users_NK[0] must be zeros: it stands for a user without knowledge")

    @property
    def width(self) -> int:
        """Length K of every vector."""
        return self.users_NK.shape[1]

    @property
    def num_users_with_knowledge(self) -> int:
        """Users whose knowledge row is not 0."""
        return int(np.count_nonzero(self.user_index_N))

    def shuffled(self, seed: int) -> KnowledgeTable:
        """Returns the control: the same vectors, given to the wrong users and scenarios.

        Users with knowledge swap rows along one random cycle through all of them, so that none keeps its own when
        there are at least two; users without knowledge stay without. Scenario rows move on by one.

        Args:
            seed: Seed of the cycle.
        """
        rows = len(self.users_NK)
        order = np.random.default_rng(seed).permutation(np.arange(1, rows, dtype=np.int32))
        moved = np.zeros(rows, dtype=np.int32)
        moved[order] = np.roll(order, 1)
        return KnowledgeTable(self.users_NK, moved[self.user_index_N], np.roll(self.scenarios_SK, 1, axis=0))

    def save(self, uri: str) -> None:
        """Writes the three arrays as plain .npy files below a directory."""
        for name, array in ((USERS, self.users_NK), (USER_INDEX, self.user_index_N), (SCENARIOS, self.scenarios_SK)):
            with storage.atomic_write(storage.join(uri, name)) as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)

    @classmethod
    def load(cls, uri: str) -> KnowledgeTable:
        """Opens a saved table: memory-mapped on a local disk, read from anywhere else.

        Raises:
            StorageError: A file is missing or is not what `save` writes.
        """
        arrays = [_load(storage.join(uri, name)) for name in (USERS, USER_INDEX, SCENARIOS)]
        try:
            return cls(*arrays)
        except ValueError as error:
            raise storage.StorageError(f"{uri}: not a knowledge table: {error}") from error


def _load(uri: str) -> np.ndarray:
    try:
        if storage.is_local(uri):
            return np.load(storage.local_path(uri), mmap_mode="r", allow_pickle=False)
        fs, path = storage.filesystem(uri)
        with fs.open(path, "rb") as file:
            return np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise storage.StorageError(f"{uri}: no such file") from error
    except (ValueError, OSError, EOFError) as error:
        raise storage.StorageError(f"{uri}: not a readable .npy file: {error}") from error
