"""Content-addressed vectors of one encoder: a vector is found by what was read, not by whose it is.

Layout below ``knowledge/store/<identity digest>/``: identity.json, and one ``part-<digest of its keys>.parquet`` per
commit (schema of a part: `part_schema`). A commit is one file that appears whole or not at all, so actors on many
nodes write without a lock, a run that was killed keeps every finished commit, and doing the same commit again
overwrites the same file. Nothing is ever deleted here.

A prompt without a vector is a row with its error. It says what was tried; readers do not count it, so the next run
tries again.

Everything here is arrays: a key is 16 bytes, an index entry 24, so a million vectors are found in a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.config import digest
from llm4msr.knowledge.engines.interface import FLOAT16_MAX, EncodedBatch
from llm4msr.knowledge.prompts import KEY, KEY_BYTES, Prompt

IDENTITY_FILE = "identity.json"
COUNTS = ("num_tokens", "num_dropped_events", "num_cut_characters", "num_generated_tokens")
KEY_DTYPE = f"S{KEY_BYTES}"  # numpy sorts and compares these; no two keys differ in trailing zero bytes alone
_READ_THREADS = 16  # parts read at once: an object store answers slowly but many at a time


def part_schema(width: int) -> pa.Schema:
    """Returns the schema of a part with vectors of `width` numbers; a row has a vector or an error."""
    return pa.schema(
        [
            ("key", KEY),
            ("vector", pa.list_(pa.float16(), width)),
            ("error", pa.string()),
            ("text", pa.string()),
            *((name, pa.int32()) for name in COUNTS),
        ]
    )


def prompt_keys(identity_digest: str, prompts: Sequence[Prompt]) -> np.ndarray:
    """Returns the (N,) `KEY_DTYPE` key of each prompt: a hash of the encoder's identity and of all that it reads."""
    keys = (hashlib.sha256(f"{identity_digest}\n{p.content()}".encode()).digest()[:KEY_BYTES] for p in prompts)
    return np.frombuffer(b"".join(keys), KEY_DTYPE)


def key_text(key: bytes) -> str:
    """Returns a key as people read it: 32 hex digits."""
    return key.ljust(KEY_BYTES, b"\0").hex()  # numpy drops trailing zero bytes


def keys_to_arrow(keys_N: np.ndarray) -> pa.Array:
    """Returns keys as an Arrow column of type `KEY`."""
    data = pa.py_buffer(np.ascontiguousarray(keys_N, KEY_DTYPE).tobytes())
    return pa.Array.from_buffers(KEY, len(keys_N), [None, data])


def keys_to_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns an Arrow column of type `KEY` as an (N,) array of `KEY_DTYPE`."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    arrays = [
        np.frombuffer(chunk.buffers()[1], KEY_DTYPE, len(chunk), chunk.offset * KEY_BYTES)
        for chunk in chunks
        if len(chunk)
    ]
    return np.concatenate(arrays) if arrays else np.zeros(0, KEY_DTYPE)


@dataclass(frozen=True)
class StoreIndex:
    """Where each vector of a store lies, as of when it was read. Axes: N distinct keys with a vector, E error rows.

    Attributes:
        keys_N: `KEY_DTYPE`, ascending.
        part_N: int32; which part holds the vector.
        row_N: int32; its row there.
        parts: URIs of the parts.
        error_keys_E: Keys of the error rows, of which some may have a vector by now.
        errors: What each error row says.
    """

    keys_N: np.ndarray
    part_N: np.ndarray
    row_N: np.ndarray
    parts: tuple[str, ...]
    error_keys_E: np.ndarray
    errors: tuple[str, ...]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the position in this index of each key, -1 where the store has no vector of it."""
        if not len(self.keys_N):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys_N, keys), len(self.keys_N) - 1)
        return np.where(self.keys_N[at] == keys, at, -1)

    def error_of(self, keys: np.ndarray) -> list[str | None]:
        """Returns the error of each key, the last one written of several in order of names; None where it has none."""
        errors = dict(zip(self.error_keys_E.tolist(), self.errors, strict=True))
        return [errors.get(key) for key in keys.tolist()]


class KnowledgeStore:
    """Vectors of one encoder.

    Args:
        uri: Directory of all stores.
        identity: Of the encoder; see `llm4msr.knowledge.engines.build.engine_identity`.

    Raises:
        StorageError: The directory belongs to another identity.
    """

    def __init__(self, uri: str, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.identity_digest = digest(identity)
        self.uri = storage.join(uri, self.identity_digest)
        self._identity_uri = storage.join(self.uri, IDENTITY_FILE)
        if storage.exists(self._identity_uri) and digest(storage.read_json(self._identity_uri)) != self.identity_digest:
            raise storage.StorageError(f"{self._identity_uri}: holds another identity than its directory's name says")

    def index(self) -> StoreIndex:
        """Reads the keys of all parts.

        Raises:
            StorageError: A part is damaged; the message names it.
        """
        uris = tuple(uri for uri, _ in storage.list_files(self.uri, ".parquet"))
        found = list(_in_threads(lambda uri: _read_keys(uri), uris))
        sizes = [len(keys) for keys, _, _ in found]
        keys = np.concatenate([keys for keys, _, _ in found] or [np.zeros(0, KEY_DTYPE)])
        row = np.concatenate([row for _, row, _ in found] or [np.zeros(0, np.int32)])
        keys_N, first_N = np.unique(keys, return_index=True)
        part_N = np.searchsorted(np.cumsum(sizes), first_N, side="right").astype(np.int32)
        failed = [pair for _, _, errors in found for pair in errors]
        return StoreIndex(
            keys_N,
            part_N,
            row[first_N],
            uris,
            np.array([key for key, _ in failed], KEY_DTYPE),
            tuple(error for _, error in failed),
        )

    def part_uri(self, keys: np.ndarray) -> str:
        """Returns the place of the commit of these keys, whatever their order."""
        return storage.join(self.uri, f"part-{hashlib.sha256(np.sort(keys).tobytes()).hexdigest()[:32]}.parquet")

    def commit(self, keys: np.ndarray, batch: EncodedBatch) -> str:
        """Writes what was read of some prompts as one part; all of it is there when it returns, or nothing.

        Args:
            keys: (N,) `KEY_DTYPE`, one at least, each once.
            batch: Of these prompts; those with an error are kept as such.

        Returns:
            The part's URI.

        Raises:
            ValueError: A vector without an error does not fit float16.
        """
        if not len(keys) or len(keys) != len(batch.vectors) or len(np.unique(keys)) != len(keys):
            raise ValueError(f"{len(keys)} keys for {len(batch.vectors)} vectors: each vector needs a key of its own")
        good_N = np.array([error is None for error in batch.errors])
        highest_N = np.abs(batch.vectors).max(axis=1, initial=0)
        for i in np.flatnonzero(good_N & ~(highest_N <= FLOAT16_MAX)):
            raise ValueError(
                f"vector of key {key_text(keys[i])} cannot be stored: largest value {highest_N[i]}; the store keeps "
                f"finite float16 values up to {FLOAT16_MAX:.0f}"
            )
        width = max(batch.vectors.shape[1], 1)  # where every row failed, it may not be known
        values = pa.array(np.resize(batch.vectors.astype(np.float16), len(keys) * width))
        vectors = pa.FixedSizeListArray.from_arrays(values, width)
        columns = {
            "key": keys_to_arrow(keys),
            "vector": vectors if good_N.all() else pc.if_else(pa.array(good_N), vectors, None),
            "error": pa.array(batch.errors, pa.string()),
            "text": pa.array(batch.texts, pa.string()),
        }
        columns |= {name: pa.array(getattr(batch, name), pa.int32()) for name in COUNTS}
        if not storage.exists(self._identity_uri):
            storage.write_json(self._identity_uri, self.identity)
        uri = self.part_uri(keys)
        storage.write_parquet(uri, pa.table(columns, schema=part_schema(width)))
        return uri

    def vectors(self, index: StoreIndex, positions_M: np.ndarray) -> np.ndarray:
        """Returns the (M, K) float16 vectors at some positions of `index`; a position may be asked for twice.

        Raises:
            StorageError: A part is damaged, or has vectors of another width; the message names it.
        """
        assert len(positions_M), "no vectors asked for"
        out: np.ndarray | None = None
        for uri, at, table in self._rows(index, positions_M, ["vector"]):
            part = table["vector"].combine_chunks()
            values = part.flatten().to_numpy(zero_copy_only=False).reshape(len(part), -1)
            if out is None:
                out = np.zeros((len(positions_M), values.shape[1]), np.float16)
            if values.shape[1] != out.shape[1]:
                raise storage.StorageError(f"{uri}: vectors of width {values.shape[1]}, others have {out.shape[1]}")
            out[at] = values
        assert out is not None
        return out

    def columns(self, index: StoreIndex, positions_M: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Returns other columns of `part_schema` at some positions of `index`, in their order.

        Raises:
            StorageError: A part is damaged; the message names it.
        """
        tables, places = [], []
        for _, at, table in self._rows(index, positions_M, list(names)):
            tables.append(table)
            places.append(at)
        order = np.empty(len(positions_M), np.int64)
        order[np.concatenate(places)] = np.arange(len(positions_M))
        return pa.concat_tables(tables).take(order)

    def _rows(
        self, index: StoreIndex, positions_M: np.ndarray, names: list[str]
    ) -> Iterator[tuple[str, np.ndarray, pa.Table]]:
        """Yields part by part: its URI, which of the M positions it holds, and its rows of them."""
        part_M, row_M = index.part_N[positions_M], index.row_N[positions_M]
        wanted = np.unique(part_M)
        tables = _in_threads(lambda p: storage.read_parquet(index.parts[p], names), wanted.tolist())
        order_M = np.argsort(part_M, kind="stable")
        groups = np.split(order_M, np.searchsorted(part_M[order_M], wanted[1:]))
        for part, at, table in zip(wanted.tolist(), groups, tables, strict=True):
            yield index.parts[part], at, table.take(row_M[at])


def _in_threads(read: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Yields what `read` returns for each item, in order, a few ahead at a time."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(items), _READ_THREADS):
            yield from pool.map(read, items[start : start + _READ_THREADS])


def _read_keys(uri: str) -> tuple[np.ndarray, np.ndarray, list[tuple[bytes, str]]]:
    """Returns keys and row numbers of a part's vectors, and the errors of its other rows by key."""
    table = storage.read_parquet(uri, ["key", "error"])
    keys = keys_to_numpy(table["key"])
    if uri.rsplit("/", 1)[-1] != f"part-{hashlib.sha256(np.sort(keys).tobytes()).hexdigest()[:32]}.parquet":
        raise storage.StorageError(f"{uri}: its keys are not those it was written with; delete it to redo them")
    good = table["error"].is_null().to_numpy()
    errors = list(zip(keys[~good].tolist(), table["error"].drop_null().to_pylist(), strict=True))
    return keys[good], np.flatnonzero(good).astype(np.int32), errors
