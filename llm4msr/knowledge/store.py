"""Content-addressed vectors of one encoder: a vector is found by what was read, not by whose it is.

Layout below ``knowledge/store/<identity digest>/``: identity.json, and one ``part-<digest of its keys>.parquet`` per
commit. A commit is one file that appears whole or not at all, so actors on many nodes write without a lock, a run that
was killed keeps every finished commit, and doing the same commit again overwrites the same file. The same key may
lie in several files: its content is the same, so it does not matter which is read. Nothing is ever deleted here.
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
from llm4msr.knowledge.prompts import Prompt

IDENTITY_FILE = "identity.json"
COUNTS = ("num_tokens", "num_dropped_events", "num_cut_characters")
_READ_THREADS = 16  # parts read at once: an object store answers slowly but many at a time
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class EncodedBatch:
    """Vectors of N prompts and how they were read. Axes: N prompts, K knowledge width.

    Attributes:
        vectors: (N, K) float32; zeros where `errors` names a reason.
        num_tokens: (N,) int32, special tokens included.
        num_dropped_events: (N,) int32; events left out to keep the limit.
        num_cut_characters: (N,) int32; characters cut from the head to keep the limit.
        errors: For each prompt why it has no vector, or None.
    """

    vectors: np.ndarray
    num_tokens: np.ndarray
    num_dropped_events: np.ndarray
    num_cut_characters: np.ndarray
    errors: tuple[str | None, ...]


def prompt_keys(identity_digest: str, prompts: Sequence[Prompt]) -> list[str]:
    """Returns the key of each prompt: 32 hex digits of the encoder's identity and all that it reads."""
    return [hashlib.sha256(f"{identity_digest}\n{p.content()}".encode()).hexdigest()[:32] for p in prompts]


class KnowledgeStore:
    """Vectors of one encoder.

    Args:
        uri: Directory of all stores.
        identity: Of the encoder; see `llm4msr.knowledge.encoder.encoder_identity`.

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

    def keys(self) -> pa.Array:
        """Returns the distinct keys of all parts.

        Raises:
            StorageError: A part is damaged; the message names it.
        """
        parts = [table["key"] for _, table in self._parts(["key"])]
        return pc.unique(pa.chunked_array([c for p in parts for c in p.chunks], type=pa.string()))

    def missing(self, keys: pa.Array) -> pa.Array:
        """Returns the distinct keys that no part holds, in order of first appearance."""
        distinct = pc.unique(keys)
        return distinct.filter(pc.invert(pc.is_in(distinct, value_set=self.keys())))

    def commit(self, keys: Sequence[str], batch: EncodedBatch) -> str:
        """Writes vectors as one part; all of them are there when it returns, or none.

        Args:
            keys: Key of each prompt of the batch.
            batch: Vectors without errors.

        Returns:
            The part's URI.

        Raises:
            ValueError: A vector does not fit float16, or belongs to a failed prompt.
        """
        if len(keys) != len(batch.vectors) or not len(keys):
            raise ValueError(
                f"{len(keys)} keys for {len(batch.vectors)} vectors: each vector needs its key, one at least"
            )
        highest = np.abs(batch.vectors).max(axis=1)
        bad = next((i for i, h in enumerate(highest) if not h <= FLOAT16_MAX or batch.errors[i]), None)
        if bad is not None:
            raise ValueError(
                f"vector of key {keys[bad]} cannot be stored: {batch.errors[bad] or f'largest value {highest[bad]}'}; "
                f"the store keeps finite float16 values up to {FLOAT16_MAX:.0f}"
            )
        width = batch.vectors.shape[1]
        values = pa.array(batch.vectors.astype(np.float16).reshape(-1))
        columns = {"key": pa.array(keys, pa.string()), "vector": pa.FixedSizeListArray.from_arrays(values, width)}
        columns |= {name: pa.array(getattr(batch, name), pa.int32()) for name in COUNTS}
        if not storage.exists(self._identity_uri):
            storage.write_json(self._identity_uri, self.identity)
        uri = storage.join(self.uri, _part_name(keys))
        storage.write_parquet(uri, pa.table(columns))
        return uri

    def load(self, keys: pa.Array) -> np.ndarray:
        """Returns the (N, K) float16 vectors of N keys, in their order; a key may be asked for twice.

        Raises:
            StorageError: A part is damaged, or a key is in none; the message names it.
        """
        return self.read(keys)[0]

    def read(self, keys: pa.Array) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the vectors as `load` does, and the columns `COUNTS` as (N,) int32 arrays.

        Raises:
            StorageError: As for `load`.
        """
        distinct = pc.unique(keys)
        found = np.zeros(len(distinct), dtype=bool)
        vectors: np.ndarray | None = None
        counts = {name: np.zeros(len(distinct), dtype=np.int32) for name in COUNTS}
        for uri, table in self._parts(["key", "vector", *COUNTS]):
            place = pc.index_in(table["key"], value_set=distinct).combine_chunks()
            wanted = place.is_valid()
            rows = place.filter(wanted).to_numpy()
            if not len(rows):
                continue
            table = table.filter(wanted)
            part = _vectors(table)
            if vectors is None:
                vectors = np.zeros((len(distinct), part.shape[1]), dtype=np.float16)
            if part.shape[1] != vectors.shape[1]:
                raise storage.StorageError(f"{uri}: vectors of width {part.shape[1]}, others have {vectors.shape[1]}")
            vectors[rows] = part
            for name in COUNTS:
                counts[name][rows] = table[name].to_numpy()
            found[rows] = True
        if not found.all() or vectors is None:
            absent = distinct[int(np.argmin(found))].as_py() if len(found) else None
            raise storage.StorageError(
                f"{self.uri}: {len(found) - int(found.sum())} of {len(found)} keys are not stored, first {absent}"
            )
        order = pc.index_in(keys, value_set=distinct).to_numpy()
        return vectors[order], {name: values[order] for name, values in counts.items()}

    def _parts(self, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
        uris = [uri for uri, _ in storage.list_files(self.uri, ".parquet")]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for start in range(0, len(uris), _READ_THREADS):
                batch = uris[start : start + _READ_THREADS]
                yield from zip(batch, pool.map(lambda uri: _read_part(uri, columns), batch), strict=True)


def _read_part(uri: str, columns: list[str]) -> pa.Table:
    table = storage.read_parquet(uri, columns)
    if uri.rsplit("/", 1)[-1] != _part_name(table["key"].to_pylist()):
        raise storage.StorageError(f"{uri}: its keys are not those it was written with; delete it to redo them")
    return table


def _part_name(keys: Sequence[str]) -> str:
    return f"part-{hashlib.sha256(','.join(sorted(keys)).encode()).hexdigest()[:32]}.parquet"


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
