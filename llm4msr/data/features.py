"""Fits and applies what turns raw values into model inputs: vocabularies, standardisation, feature tables.

Pure numpy and Arrow, whole columns at a time. Everything is fitted on train rows alone: an entity's value counts as
often as the entity has train rows. Fitting is by parts that merge exactly (`merge_counts`, `Moments.merge`), so
buckets can be counted anywhere. Knows no files and no splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.data.source import DataError, RawFeature
from llm4msr.schema import FIRST_INDEX, PADDING_INDEX, UNSEEN_INDEX, Feature, KeyType, Source, key_arrow_type

# A spread this small beside the mean is rounding of a constant column, not information.
_RELATIVE_STD_FLOOR = 1e-8
_COUNTS = pa.schema([("value", pa.string()), ("num_rows", pa.int64())])


@dataclass(frozen=True)
class Moments:
    """Weight, mean and sum of squared deviations of some numbers; parts merge as in Chan, Golub, LeVeque 1979."""

    weight: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values_B: np.ndarray, weight_B: np.ndarray | None = None) -> Moments:
        """Measures (B,) float64 values, each counted `weight_B` times; values that are not finite do not count."""
        weight_B = np.ones(len(values_B)) if weight_B is None else weight_B.astype(np.float64)
        used = np.isfinite(values_B) & (weight_B > 0)
        values_B, weight_B = values_B[used], weight_B[used]
        total = float(weight_B.sum())
        if total == 0:
            return cls()
        mean = float((values_B * weight_B).sum() / total)
        return cls(total, mean, float((weight_B * (values_B - mean) ** 2).sum()))

    def merge(self, other: Moments) -> Moments:
        """Returns the moments of both parts together."""
        total = self.weight + other.weight
        if total == 0:
            return self
        shift = other.mean - self.mean
        return Moments(
            total,
            self.mean + shift * other.weight / total,
            self.squares + other.squares + shift**2 * self.weight * other.weight / total,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where there is no data or no spread."""
        std = float(np.sqrt(self.squares / self.weight)) if self.weight else 0.0
        return std if std > _RELATIVE_STD_FLOOR * abs(self.mean) else 1.0


def sorted_keys(parts: Iterable[pa.Array | pa.ChunkedArray], key_type: KeyType) -> pa.Array:
    """Returns the distinct ids of all parts, ascending (strings by their UTF-8 bytes)."""
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pa.ChunkedArray) else [part])]
    keys = pc.unique(pa.chunked_array(chunks, key_arrow_type(key_type)))
    return keys.take(pc.sort_indices(keys))


def table_rows(ids: pa.Array | pa.ChunkedArray, keys: pa.Array, what: str) -> np.ndarray:
    """Returns (B,) int32 rows of the feature table, 1 for the first key.

    Args:
        ids: (B,) raw ids without nulls.
        keys: Distinct, ascending.
        what: "user" or "item", for the message.

    Raises:
        DataError: An id is not among the keys.
    """
    if pa.types.is_integer(keys.type):
        keys_N, ids_B = keys.to_numpy(), ids.to_numpy()
        row_B = np.minimum(np.searchsorted(keys_N, ids_B), max(len(keys_N) - 1, 0))
        missing = keys_N[row_B] != ids_B if len(keys_N) else np.ones(len(ids_B), bool)
    else:
        row_B = pc.fill_null(pc.index_in(ids, keys), -1).to_numpy(zero_copy_only=False)
        missing = row_B < 0
    if missing.any():
        raise DataError(f"{what} id {ids[int(np.argmax(missing))].as_py()!r} is not among the {len(keys)} known ids")
    known_row_B: np.ndarray = (row_B + 1).astype(np.int32)
    return known_row_B


def count_values(values: pa.Array | pa.ChunkedArray, weight_B: np.ndarray | None = None) -> pa.Table:
    """Counts the distinct values of a string column, each row `weight_B` times; nulls do not count.

    Returns:
        Columns value and num_rows, in the order of first occurrence.
    """
    encoded = (values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values).dictionary_encode()
    if not len(encoded):
        return _COUNTS.empty_table()
    present = encoded.is_valid().to_numpy(zero_copy_only=False)
    index = encoded.indices.drop_null().to_numpy()
    weight = None if weight_B is None else weight_B[present]
    counts = np.bincount(index, weight, minlength=len(encoded.dictionary)).astype(np.int64)
    return pa.Table.from_arrays([encoded.dictionary, pa.array(counts)], schema=_COUNTS)


def merge_counts(parts: Sequence[pa.Table]) -> pa.Table:
    """Adds up the results of several `count_values`."""
    table = pa.concat_tables([_COUNTS.empty_table(), *parts])
    merged = table.group_by("value", use_threads=False).aggregate([("num_rows", "sum")])
    return merged.rename_columns({"num_rows_sum": "num_rows"}).select(_COUNTS.names)


def fit_vocabulary(counts: pa.Table, min_count: int) -> pa.Array:
    """Returns the values seen at least `min_count` times, by descending count, then by value.

    The value at position r has index r + 2.
    """
    kept = counts.filter(pc.greater_equal(counts["num_rows"], min_count))
    kept = kept.sort_by([("num_rows", "descending"), ("value", "ascending")])
    return kept["value"].combine_chunks()


def rank_ids(num_train_rows_N: np.ndarray, min_count: int) -> tuple[np.ndarray, int]:
    """Returns the indices of ids in the order of their sorted keys, and how many ids have one of their own.

    The same rule as `fit_vocabulary`: by descending count, then by key; ids seen less than `min_count` times share
    index 1.

    Returns:
        (N,) int32 indices; the number of ids with an index of 2 or more.
    """
    order = np.argsort(-num_train_rows_N, kind="stable")
    order = order[num_train_rows_N[order] >= min_count]
    index_N = np.full(len(num_train_rows_N), UNSEEN_INDEX, np.int32)
    index_N[order] = np.arange(FIRST_INDEX, FIRST_INDEX + len(order), dtype=np.int32)
    return index_N, len(order)


def encode_categorical(
    values: pa.Array | pa.ChunkedArray, vocabulary: pa.Array, null_index: int = UNSEEN_INDEX
) -> np.ndarray:
    """Returns (B,) int32 indices; values outside the vocabulary become 1, null becomes `null_index`."""
    place_B = pc.fill_null(pc.index_in(values, vocabulary), UNSEEN_INDEX - FIRST_INDEX)
    place_B = pc.if_else(pc.is_null(values), null_index - FIRST_INDEX, place_B)
    index_B: np.ndarray = (place_B.to_numpy(zero_copy_only=False) + FIRST_INDEX).astype(np.int32)
    return index_B


def encode_numeric(values: pa.Array | pa.ChunkedArray, mean: float, std: float) -> np.ndarray:
    """Returns (B,) float32 (value - mean) / std; null and values that are not finite become 0, the mean."""
    standardised_B = (numbers(values) - mean) / std
    return np.where(np.isfinite(standardised_B), standardised_B, 0.0).astype(np.float32)


def numbers(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns (B,) float64 values, NaN for null."""
    value_B: np.ndarray = pc.fill_null(pc.cast(values, pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    return value_B


def encode_sequence(values: pa.Array | pa.ChunkedArray, vocabulary: pa.Array, max_length: int) -> np.ndarray:
    """Returns (B, max_length) int32 indices of the first values, padded with 0 at the end.

    Values outside the vocabulary, and nulls inside a list, become 1. A null or empty list is all padding.
    """
    flat, row, place = first_values(values, max_length)
    index_BT = np.full((len(values), max_length), PADDING_INDEX, np.int32)
    index_BT[row, place] = encode_categorical(flat, vocabulary)
    return index_BT


def align_entities(entities: pa.Table | None, keys: pa.Array, features: Sequence[RawFeature]) -> pa.Table:
    """Returns one row per key, in their order; who has no row gets null features and an empty text.

    Args:
        entities: key (distinct), text, one column per feature; None where the data has no such file.
        keys: Distinct, ascending; every entity's key is among them.
        features: The features of this source.
    """
    types = {"categorical": pa.string(), "numeric": pa.float64(), "sequence": pa.list_(pa.string())}
    schema = pa.schema(
        [("key", keys.type), ("text", pa.string())] + [(feature.name, types[feature.kind]) for feature in features]
    )
    entities = schema.empty_table() if entities is None else entities.select(schema.names).cast(schema)
    place = pc.index_in(keys, entities["key"].combine_chunks() if len(entities) else pa.array([], keys.type))
    columns = {"key": keys, "text": pc.fill_null(entities["text"].take(place), "")}
    columns |= {feature.name: entities[feature.name].take(place) for feature in features}
    return pa.table(columns, schema=schema)


def fit_entities(
    table: pa.Table,
    source: Source,
    id_name: str,
    features: Sequence[RawFeature],
    num_train_rows_N: np.ndarray,
    min_count: int,
) -> tuple[list[Feature], pa.Table, dict[str, pa.Array]]:
    """Fits and encodes all features of one source.

    Args:
        table: (N rows) as returned by `align_entities`.
        source: user or item.
        id_name: Name of the feature made of the key itself; it comes first.
        features: The features of this source.
        num_train_rows_N: Train rows of each key.
        min_count: Values seen less often share index 1.

    Returns:
        The fitted features; key, text, num_train_rows and encoded columns; the vocabulary of each categorical or
        sequence feature but the id.
    """
    index_N, num_known = rank_ids(num_train_rows_N, min_count)
    fitted = [Feature(id_name, "categorical", source, num_embeddings=FIRST_INDEX + num_known)]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "key": table["key"],
        "text": table["text"],
        "num_train_rows": pa.array(num_train_rows_N, pa.int64()),
        id_name: pa.array(index_N),
    }
    vocabularies = {}
    for raw in features:
        values = table[raw.name]
        if raw.kind == "numeric":
            moments = Moments.of(numbers(values), num_train_rows_N)
            feature = fit_feature(raw, moments=moments)
            columns[raw.name] = pa.array(encode_numeric(values, feature.mean, feature.std))
        elif raw.kind == "categorical":
            vocabularies[raw.name] = vocabulary = fit_vocabulary(count_values(values, num_train_rows_N), min_count)
            feature = fit_feature(raw, vocabulary=vocabulary)
            columns[raw.name] = pa.array(encode_categorical(values, vocabulary))
        else:
            flat, row, _ = first_values(values, raw.max_length)
            vocabularies[raw.name] = vocabulary = fit_vocabulary(count_values(flat, num_train_rows_N[row]), min_count)
            feature = fit_feature(raw, vocabulary=vocabulary)
            columns[raw.name] = _lists(encode_sequence(values, vocabulary, raw.max_length))
        fitted.append(feature)
    return fitted, pa.table(columns), vocabularies


def fit_feature(raw: RawFeature, vocabulary: pa.Array | None = None, moments: Moments | None = None) -> Feature:
    """Returns the fitted feature: with its number of embeddings, or with its mean and standard deviation."""
    if raw.kind == "numeric":
        assert moments is not None
        return Feature(raw.name, "numeric", raw.source, mean=moments.mean, std=moments.std)
    assert vocabulary is not None
    return Feature(
        raw.name, raw.kind, raw.source, num_embeddings=FIRST_INDEX + len(vocabulary), max_length=raw.max_length
    )


def encode_context(
    rows: pa.Table, features: Sequence[Feature], vocabularies: Mapping[str, pa.Array]
) -> dict[str, pa.Array]:
    """Returns the encoded columns of the context features, by name.

    A null category becomes 0, whose embedding is zero: a feature may belong to one scenario alone, and index 1 would
    learn nothing but the other scenarios' rows, where it is absent. A null list is all 0 likewise.
    """

    def encode(f: Feature) -> pa.Array:
        if f.kind == "numeric":
            return pa.array(encode_numeric(rows[f.name], f.mean, f.std))
        if f.kind == "sequence":
            return _lists(encode_sequence(rows[f.name], vocabularies[f.name], f.max_length))
        return pa.array(encode_categorical(rows[f.name], vocabularies[f.name], null_index=PADDING_INDEX))

    return {f.name: encode(f) for f in features}


def _lists(index_BT: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(index_BT.reshape(-1)), index_BT.shape[1])


def first_values(values: pa.Array | pa.ChunkedArray, max_length: int) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Returns the first values of all lists one after another, the row of each and its place in the row."""
    length_B = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(values)
    row = np.repeat(np.arange(len(length_B)), length_B)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    keep = place < max_length
    flat = flat.filter(pa.array(keep))
    return flat, row[keep], place[keep]
