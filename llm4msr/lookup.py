"""From a request's raw ids and values to the rows and indices of the model's tables.

Ids are found in arrays that may be mapped into memory and shared: whole numbers in their own order, texts in the order
of their hashes. A dictionary of a hundred million texts would be some ten gigabytes in every process.

Axes: N ids of the table, L ids that are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.request import ContextValue, Key, RequestError
from llm4msr.schema import FIRST_INDEX, PADDING_INDEX, UNSEEN_INDEX, Feature, FeatureSchema, KeyType

INT64 = np.iinfo(np.int64)
# Among N numbers none lies more than sqrt(N - 1) standard deviations from their mean: what is farther is a mistake,
# and large enough a one would leave the model without a finite score.
MAX_DEVIATIONS = 1e6


HASHED_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class HashOrder:
    """Where to look for a text among many: 8 bytes an id. Several texts may have one hash.

    Attributes:
        hash_N: uint32, ascending: the CRC-32 of each id's UTF-8.
        place_N: int32, where the id with this hash is in the table, from 0.
    """

    hash_N: np.ndarray
    place_N: np.ndarray

    @classmethod
    def of(cls, keys: pa.Array | pa.ChunkedArray) -> HashOrder:
        """Hashes all ids of a table."""
        hash_N = np.empty(len(keys), np.uint32)
        for start in range(0, len(keys), HASHED_AT_A_TIME):  # so that few texts are Python's at a time
            part = keys.slice(start, HASHED_AT_A_TIME).to_pylist()
            hash_N[start : start + len(part)] = hashes(_encoded(part))
        place_N = np.argsort(hash_N, kind="stable")
        return cls(hash_N[place_N], place_N.astype(np.int32))


class KeyIndex:
    """Raw ids to table rows: 0 for an id that the table lacks.

    Args:
        keys: Sorted, distinct ids.
        key_type: int64 or string.
        order: Of text ids, if it is there already.
    """

    def __init__(self, keys: pa.ChunkedArray, key_type: KeyType, order: HashOrder | None = None) -> None:
        self.key_type = key_type
        self.keys = _one_array(keys)
        if key_type == "int64":
            self.sorted_ids = self.keys.to_numpy()
        else:
            self.bytes = self.keys.cast(pa.large_binary())  # over the same memory, where texts are large too
            self.order = HashOrder.of(self.keys) if order is None else order

    def __call__(self, keys: Sequence[Key], field: str) -> np.ndarray:
        """Returns int32 rows.

        Raises:
            RequestError: A key is of the wrong type for this data.
        """
        if self.key_type == "string":
            texts = [key for key in keys if isinstance(key, str)]
            if len(texts) < len(keys):
                found = next(key for key in keys if not isinstance(key, str))
                raise RequestError(
                    field, f"{found!r} is not a text id: ids of this data are text, such as {self.example()!r}"
                )
            return self._text_rows(texts)
        wrong = [k for k in keys if not isinstance(k, int) or isinstance(k, bool) or not INT64.min <= k <= INT64.max]
        if wrong:
            raise RequestError(
                field, f"{wrong[0]!r} is not a 64-bit integer: ids of this data are integers, such as {self.example()}"
            )
        if not len(self.sorted_ids):
            return np.zeros(len(keys), np.int32)
        wanted = np.asarray(keys, np.int64)
        place = np.minimum(np.searchsorted(self.sorted_ids, wanted), len(self.sorted_ids) - 1)
        return np.where(self.sorted_ids[place] == wanted, place + 1, 0).astype(np.int32)

    def example(self) -> Key | None:
        """Returns some id of the table."""
        return self.keys[0].as_py() if len(self.keys) else None

    def _text_rows(self, keys: Sequence[str]) -> np.ndarray:
        """Looks at the ids that have a key's hash, one after another, until one is the same text."""
        encoded = _encoded(keys)
        wanted, hash_L = pa.array(encoded, pa.large_binary()), hashes(encoded)
        row_L = np.zeros(len(keys), np.int32)
        left, at = np.arange(len(keys)), np.searchsorted(self.order.hash_N, hash_L)  # keys not found yet; where to look
        while len(left):
            inside = at < len(self.order.hash_N)
            left, at = left[inside], at[inside]
            same_hash = self.order.hash_N[at] == hash_L[left]
            left, at = left[same_hash], at[same_hash]
            place = self.order.place_N[at]
            same = pc.equal(self.bytes.take(pa.array(place)), wanted.take(pa.array(left))).to_numpy(
                zero_copy_only=False
            )
            row_L[left[same]] = place[same] + 1
            left, at = left[~same], at[~same] + 1
        return row_L


def hashes(encoded: Sequence[bytes]) -> np.ndarray:
    """Returns the CRC-32 of each."""
    return np.fromiter(map(crc32, encoded), np.uint32, len(encoded))


def _encoded(texts: Sequence[str]) -> list[bytes]:
    """Returns UTF-8; half of a surrogate pair, which a request may hold, becomes what no id of a table is."""
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array, over the same memory if it is one already: combine_chunks() always copies."""
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())  # as one array they may have more bytes than 32-bit offsets reach
    return column.combine_chunks()


class ContextEncoder:
    """Values of context features to what prepared rows hold.

    Args:
        schema: Names the features.
        vocabularies: Values of each categorical and sequence feature; the one at position r has index r + 2.
    """

    def __init__(self, schema: FeatureSchema, vocabularies: Mapping[str, pa.Array]) -> None:
        self.features = {f.name: f for f in schema.features if f.source == "context"}
        self.index = {
            name: {value: i for i, value in enumerate(values.to_pylist(), start=FIRST_INDEX)}
            for name, values in vocabularies.items()
        }

    def __call__(self, context: Mapping[str, ContextValue], num_rows: int) -> dict[str, np.ndarray]:
        """Returns the columns of prepared rows that all have these values.

        Raises:
            RequestError: No such feature, or a value of the wrong type.
        """
        unknown = sorted(set(context) - set(self.features))
        if unknown:
            valid = ", ".join(sorted(self.features)) or "this model has none"
            raise RequestError("context", f"no context feature {unknown[0]!r}; valid: {valid}")
        return {
            name: np.full(
                (num_rows, feature.max_length) if feature.kind == "sequence" else num_rows,
                self._encode(feature, context.get(name)),
                np.float32 if feature.kind == "numeric" else np.int32,
            )
            for name, feature in self.features.items()
        }

    def _encode(self, feature: Feature, value: ContextValue | None) -> float | int | list[int]:
        if feature.kind == "sequence":
            return self._encode_list(feature, [] if value is None else value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            raise RequestError("context", f"{feature.name} is one value, found a list of {len(value)}")
        if feature.kind == "numeric":
            if value is None:
                return 0.0
            if isinstance(value, (str, bool)):
                raise RequestError("context", f"{feature.name} is numeric, found {value!r}")
            try:
                standardised = (float(value) - feature.mean) / feature.std
            except OverflowError:  # a whole number beyond float64
                standardised = np.inf
            if not abs(standardised) <= MAX_DEVIATIONS:
                raise RequestError(
                    "context",
                    f"{feature.name} is {str(value)[:30]}, more than {MAX_DEVIATIONS:.0e} standard deviations "
                    f"({feature.std:.6g} each) from the mean {feature.mean:.6g}",
                )
            return standardised
        return PADDING_INDEX if value is None else self.index[feature.name].get(str(value), UNSEEN_INDEX)

    def _encode_list(self, feature: Feature, values: ContextValue) -> list[int]:
        if not isinstance(values, (list, tuple)):
            raise RequestError("context", f"{feature.name} is a list of values, found {values!r}")
        if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (str, int, float))]:
            raise RequestError("context", f"{feature.name} is a list of text or numbers, found {wrong[0]!r} in it")
        index = self.index[feature.name]
        known = [index.get(str(value), UNSEEN_INDEX) for value in values[: feature.max_length]]
        return known + [PADDING_INDEX] * (feature.max_length - len(known))
