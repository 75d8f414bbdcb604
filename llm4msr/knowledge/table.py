"""The knowledge of one prepared data set as arrays: what training and serving look up instead of running an LLM.

Pure numpy over memory-mapped files, so the workers of a node share one copy and importing it costs nothing.
How the vectors came to be is the business of `llm4msr.knowledge.pipeline`; how they are used, of the models.

Axes: N rows of users or items, S scenarios, K knowledge width. Row 0 of a feature table is the unknown user or item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm4msr import storage
from llm4msr.knowledge.folds import UserFolds

FILES = {
    "users_NK": "users.npy",
    "user_index_N": "user_index.npy",
    "scenarios_SK": "scenarios.npy",
    "items_NK": "items.npy",
    "item_index_N": "item_index.npy",
}
# Of a table that training may read: not in a checkpoint.
FOLD_FILES = {"vectors_NK": "folds.npy", "index_FN": "fold_index.npy"}
STATISTICS_BLOCK_BYTES = 1 << 26  # as float64


@dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of users, scenarios and items.

    Equal prompts have one vector, so a row of `users_NK` may belong to several users, one of `items_NK` to several
    items. A level that was not extracted has row 0 alone and an index of zeros (scenarios: S rows of zeros).

    Attributes:
        users_NK: (user vectors + 1, K) float16; row 0 is zeros and means "no knowledge".
        user_index_N: (num_users + 1,) int32; row of `users_NK` of each user row, 0 where there is none.
        scenarios_SK: (S, K) float32, in the order of the schema's scenarios.
        items_NK: (item vectors + 1, K) float16; row 0 is zeros and means "no knowledge".
        item_index_N: (num_items + 1,) int32; row of `items_NK` of each item row, 0 where there is none.
        folds: What training rows see of their user; None: the same as everybody.
    """

    users_NK: np.ndarray
    user_index_N: np.ndarray
    scenarios_SK: np.ndarray
    items_NK: np.ndarray
    item_index_N: np.ndarray
    folds: UserFolds | None = None

    def __post_init__(self) -> None:
        """Checks types, shapes and the range of the indices."""
        for name, dtype, ndim in (
            ("users_NK", np.float16, 2),
            ("user_index_N", np.int32, 1),
            ("scenarios_SK", np.float32, 2),
            ("items_NK", np.float16, 2),
            ("item_index_N", np.int32, 1),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != ndim or not len(array):
                raise ValueError(
                    f"{name}: found {array.dtype} of shape {array.shape}, needed {np.dtype(dtype)} with {ndim} axes "
                    "and at least one row"
                )
        if not self.users_NK.shape[1] == self.scenarios_SK.shape[1] == self.items_NK.shape[1]:
            raise ValueError(
                f"users have knowledge of width {self.users_NK.shape[1]}, scenarios of {self.scenarios_SK.shape[1]}, "
                f"items of {self.items_NK.shape[1]}: needed one width"
            )
        for level, vectors_NK, index_N in (
            ("user", self.users_NK, self.user_index_N),
            ("item", self.items_NK, self.item_index_N),
        ):
            low, high = int(index_N.min()), int(index_N.max())
            if low < 0 or high >= len(vectors_NK) or index_N[0] != 0:
                raise ValueError(
                    f"{level}_index_N holds {low} to {high} and starts with {index_N[0]}: "
                    f"needed 0 to {len(vectors_NK) - 1}, starting with 0"
                )
            if np.any(vectors_NK[0]):
                raise ValueError(f"{level}s_NK[0] must be zeros: it stands for {level}s without knowledge")

    @property
    def width(self) -> int:
        """Length K of every vector."""
        return int(self.users_NK.shape[1])

    @property
    def num_users_with_knowledge(self) -> int:
        """Users whose knowledge row is not 0."""
        return int(np.count_nonzero(self.user_index_N))

    @property
    def num_items_with_knowledge(self) -> int:
        """Items whose knowledge row is not 0."""
        return int(np.count_nonzero(self.item_index_N))

    @property
    def has_items(self) -> bool:
        """Whether there is any vector of an item: a model without them has no item knowledge."""
        return len(self.items_NK) > 1

    def user_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean_K and std_K (float32) of the users' vectors, row 0 left out; 0 and 1 where there are none."""
        return column_statistics(self.users_NK)

    def item_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean_K and std_K (float32) of the items' vectors, row 0 left out; 0 and 1 where there are none."""
        return column_statistics(self.items_NK)

    def random_pairs(self, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns vectors (P, K), float32, of random users and of random items, the same each time; none are missing.

        Args:
            num_pairs: P; 0 are returned where either level has no vector.
        """
        rng = np.random.default_rng(0)
        tables = (self.users_NK, self.items_NK)
        num_pairs = num_pairs if all(len(vectors_NK) > 1 for vectors_NK in tables) else 0
        users_PK, items_PK = (
            vectors_NK[rng.integers(1, max(len(vectors_NK), 2), num_pairs)].astype(np.float32) for vectors_NK in tables
        )
        return users_PK, items_PK

    def shuffled(self, seed: int) -> KnowledgeTable:
        """Returns the control: the same vectors, given to the wrong users, scenarios and items.

        Users' vectors move along one random cycle through all of them, so that no user keeps its own when there are
        at least two, and users who share a vector still share one; users without knowledge stay without. A user's
        folds come from whom its vector comes from. Items likewise, along a cycle of their own. Scenario rows move on
        by one.

        Args:
            seed: Seed of the cycles.
        """
        user_index_N = _cycle(len(self.users_NK), np.random.default_rng(seed))[self.user_index_N]
        folds = self.folds
        if folds is not None:
            owner = np.zeros(len(self.users_NK), np.int64)  # of each vector
            owner[self.user_index_N[::-1]] = np.arange(len(self.user_index_N))[::-1]
            folds = UserFolds(folds.vectors_NK, folds.index_FN[:, owner[user_index_N]])
        return KnowledgeTable(
            users_NK=self.users_NK,
            user_index_N=user_index_N,
            scenarios_SK=np.roll(self.scenarios_SK, 1, axis=0),
            items_NK=self.items_NK,
            item_index_N=_cycle(len(self.items_NK), np.random.default_rng((seed, 1)))[self.item_index_N],
            folds=folds,
        )

    def random(self, seed: int) -> KnowledgeTable:
        """Returns the other control: Gaussian noise in place of every vector, as wide and as large as the vectors.

        Each component has the mean and the standard deviation that it has over the vectors of its level. Users who
        share a vector share the noise; users, items and levels without knowledge stay without. A user has the same
        noise in all folds where it has a vector. A single scenario keeps its vector: it has no deviation. The noise is
        held in memory.

        Args:
            seed: Seed of the noise.
        """
        users_NK = _noise(self.users_NK, np.random.default_rng((seed, 2)))
        folds = self.folds
        if folds is not None:
            folds = UserFolds(users_NK, np.where(folds.index_FN > 0, self.user_index_N, 0).astype(np.int32))
        return KnowledgeTable(
            users_NK=users_NK,
            user_index_N=self.user_index_N,
            scenarios_SK=_noise(self.scenarios_SK, np.random.default_rng((seed, 3)), first=0),
            items_NK=_noise(self.items_NK, np.random.default_rng((seed, 4))),
            item_index_N=self.item_index_N,
            folds=folds,
        )

    def save(self, uri: str) -> None:
        """Writes the arrays as plain .npy files below a directory; not the folds, which only training needs."""
        for field, name in FILES.items():
            with storage.atomic_write(storage.join(uri, name)) as file:
                np.save(file, np.ascontiguousarray(getattr(self, field)), allow_pickle=False)

    @classmethod
    def load(cls, uri: str) -> KnowledgeTable:
        """Opens a table, with its folds where it has any: memory-mapped on a local disk, read from anywhere else.

        Raises:
            StorageError: A file is missing or is not what `save` writes.
        """
        arrays = {field: load_array(storage.join(uri, name)) for field, name in FILES.items()}
        with_folds = storage.exists(storage.join(uri, FOLD_FILES["index_FN"]))
        try:
            folds = {field: load_array(storage.join(uri, name)) for field, name in FOLD_FILES.items() if with_folds}
            return cls(**arrays, folds=UserFolds(**folds) if folds else None)
        except ValueError as error:
            raise storage.StorageError(f"{uri}: not a knowledge table: {error}") from error


def load_array(uri: str) -> np.ndarray:
    """Opens one file of a table: memory-mapped on a local disk, read from anywhere else.

    Raises:
        StorageError: It is missing, or no .npy file.
    """
    try:
        if storage.is_local(uri):
            array: np.ndarray = np.load(storage.local_path(uri), mmap_mode="r", allow_pickle=False)
            return array
        with storage.open_file(uri) as file:
            array = np.load(file, allow_pickle=False)
            return array
    except storage.RemoteError:
        raise
    except FileNotFoundError as error:
        raise storage.StorageError(
            f"{uri}: no such file; a knowledge table is made of {', '.join(FILES.values())}, one without them all is "
            "damaged or of another version: extract again, or for a checkpoint train again"
        ) from error
    except (ValueError, OSError, EOFError) as error:
        raise storage.StorageError(f"{uri}: not a readable .npy file: {error}") from error


def _cycle(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Returns where each row goes (int32): 0 stays, the others along one random cycle through them all."""
    order = rng.permutation(np.arange(1, num_rows, dtype=np.int32))
    moved = np.zeros(num_rows, dtype=np.int32)
    moved[order] = np.roll(order, 1)
    return moved


def _noise(vectors_NK: np.ndarray, rng: np.random.Generator, first: int = 1) -> np.ndarray:
    """Returns noise with mean and deviation of the rows from `first` on, block by block; the rows before stay."""
    noise_NK = np.zeros_like(vectors_NK, subok=False)
    mean_K, std_K = column_statistics(vectors_NK, first)
    largest = np.finfo(vectors_NK.dtype).max
    for low, high in _blocks(vectors_NK, first):
        block_NK = mean_K + std_K * rng.standard_normal((high - low, len(mean_K)), np.float32)
        noise_NK[low:high] = block_NK.clip(-largest, largest)
    return noise_NK


def _blocks(vectors_NK: np.ndarray, first: int) -> Iterator[tuple[int, int]]:
    """Yields the bounds of blocks of rows that are small enough to be held as float64."""
    block_rows = max(1, STATISTICS_BLOCK_BYTES // (8 * vectors_NK.shape[1]))
    for low in range(first, len(vectors_NK), block_rows):
        yield low, min(low + block_rows, len(vectors_NK))


def column_statistics(vectors_NK: np.ndarray, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean_K and std_K of the rows from `first` on, read in blocks: never the whole table as float32."""
    num_rows, width = len(vectors_NK) - first, vectors_NK.shape[1]
    if not num_rows:
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    # The sums are taken around the first vector: vectors of one template are much alike.
    origin_K = vectors_NK[first].astype(np.float64)
    sum_K, square_K = np.zeros(width), np.zeros(width)
    for low, high in _blocks(vectors_NK, first):
        block_NK = vectors_NK[low:high] - origin_K
        sum_K += block_NK.sum(0)
        square_K += np.square(block_NK).sum(0)
    mean_K = sum_K / num_rows
    std_K = np.sqrt(np.maximum(square_K / num_rows - np.square(mean_K), 0))
    return (origin_K + mean_K).astype(np.float32), std_K.astype(np.float32)
