"""Fitting and encoding of features, against tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4msr.data import features
from llm4msr.data.features import Moments
from llm4msr.data.source import DataError, RawFeature
from llm4msr.schema import Feature


def test_vocabulary_is_ordered_by_count_then_value_and_drops_rare_values():
    counts = features.count_values(pa.array(["b", "a", None, "c", "b", "d", "a"]))
    assert features.fit_vocabulary(counts, 1).to_pylist() == ["a", "b", "c", "d"]
    assert features.fit_vocabulary(counts, 2).to_pylist() == ["a", "b"]
    assert features.fit_vocabulary(counts, 3).to_pylist() == []


def test_values_count_as_often_as_their_rows_do():
    counts = features.count_values(pa.chunked_array([["x", "y"], [None, "x"]]), np.array([1, 5, 7, 3]))
    assert dict(zip(*counts.to_pydict().values(), strict=True)) == {"x": 4, "y": 5}
    assert features.fit_vocabulary(counts, 1).to_pylist() == ["y", "x"]


def test_a_value_of_entities_without_train_rows_gets_no_index():
    counts = features.count_values(pa.array(["seen", "unseen"]), np.array([2, 0]))
    assert features.fit_vocabulary(counts, 1).to_pylist() == ["seen"]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=30), st.integers(0, 30))
def test_counts_of_parts_merge_to_the_counts_of_the_whole(values, cut):
    array = pa.array(values, pa.string())
    merged = features.merge_counts(
        [features.count_values(array.slice(0, cut)), features.count_values(array.slice(cut))]
    )
    whole = features.count_values(array)
    assert sorted(merged.to_pylist(), key=str) == sorted(whole.to_pylist(), key=str)


def test_categorical_null_and_unknown_become_1():
    encoded = features.encode_categorical(pa.chunked_array([["b", None], ["z", "a"]]), pa.array(["a", "b"]))
    assert encoded.tolist() == [3, 1, 1, 2]
    assert encoded.dtype == np.int32
    assert features.encode_categorical(pa.array(["a"]), pa.array([], pa.string())).tolist() == [1]


def test_an_absent_context_value_is_padding_and_an_unknown_one_is_unseen():
    rows = pa.table({"source": pa.array(["b", None, "z", "a"]), "price": pa.array([1.0, None, 5.0, 3.0])})
    fitted = [
        Feature("source", "categorical", "context", num_embeddings=4),
        Feature("price", "numeric", "context", mean=3.0, std=2.0),
    ]
    encoded = features.encode_context(rows, fitted, {"source": pa.array(["a", "b"])})
    assert encoded["source"].equals(pa.array([3, 0, 1, 2], pa.int32()))
    assert encoded["price"].to_pylist() == [-1.0, 0.0, 1.0, 0.0]


def test_a_list_of_the_context_that_is_absent_is_padding():
    rows = pa.table({"words": pa.array([["b", "z", "a"], None, [], [None]], pa.list_(pa.string()))})
    fitted = [Feature("words", "sequence", "context", num_embeddings=4, max_length=2)]
    encoded = features.encode_context(rows, fitted, {"words": pa.array(["a", "b"])})["words"]
    assert encoded.type == pa.list_(pa.int32(), 2)
    assert encoded.to_pylist() == [[3, 1], [0, 0], [0, 0], [1, 0]]


def test_sequence_keeps_the_first_values_and_pads_with_0():
    values = pa.chunked_array([[["a", "b", "a"], None], [[], ["z", None], ["b"]]], pa.list_(pa.string()))
    encoded = features.encode_sequence(values, pa.array(["a", "b"]), 2)
    assert encoded.tolist() == [[2, 3], [0, 0], [0, 0], [1, 1], [3, 0]]


def test_sequence_of_a_sliced_array_reads_its_own_rows():
    values = pa.array([["a"], ["b"], ["c"]], pa.list_(pa.string())).slice(1, 2)
    assert features.encode_sequence(values, pa.array(["a", "b", "c"]), 1).tolist() == [[3], [4]]


def test_moments_of_weighted_values():
    # 1, 1, 4 with null, nan, inf and an unweighted 100 left out: mean 2, variance 2.
    values = np.array([1.0, 4.0, np.nan, np.inf, 100.0])
    moments = Moments.of(values, np.array([2, 1, 5, 5, 0]))
    assert (moments.weight, moments.mean) == (3.0, 2.0)
    assert moments.std == pytest.approx(2**0.5)


def test_moments_of_parts_merge_to_those_of_the_whole_even_far_from_zero():
    values = 1.7e12 + np.arange(1000.0) * 1000
    whole = Moments.of(values)
    merged = Moments().merge(Moments.of(values[:300])).merge(Moments()).merge(Moments.of(values[300:]))
    assert merged.weight == whole.weight
    assert merged.mean == pytest.approx(values.mean(), rel=1e-15)
    assert merged.std == pytest.approx(np.std(values - 1.7e12), rel=1e-9)


@pytest.mark.parametrize("values", [[], [3.0, 3.0], [0.1] * 7])
def test_no_spread_or_no_data_gives_std_1(values):
    assert Moments.of(np.array(values)).std == 1.0


def test_numeric_is_standardised_and_null_becomes_the_mean():
    encoded = features.encode_numeric(pa.array([1.0, None, 5.0, float("inf")]), mean=3.0, std=2.0)
    assert encoded.tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert encoded.dtype == np.float32


def test_ids_are_ranked_by_count_then_key():
    index, num_known = features.rank_ids(np.array([1, 5, 0, 5, 2]), min_count=2)
    assert index.tolist() == [1, 2, 1, 3, 4]
    assert num_known == 3


def test_ids_beyond_float32_keep_their_rows():
    big = 103656000000
    keys = features.sorted_keys([pa.array([big + 1, 7]), pa.chunked_array([[big], [7]])], "int64")
    assert keys.to_pylist() == [7, big, big + 1]
    assert features.table_rows(pa.array([big + 1, 7, big]), keys, "item").tolist() == [3, 1, 2]


def test_string_ids_sort_by_bytes_and_unknown_ones_are_refused():
    keys = features.sorted_keys([pa.array(["b", "B", "é", "b"])], "string")
    assert keys.to_pylist() == ["B", "b", "é"]
    assert features.table_rows(pa.array(["é", "B"]), keys, "user").tolist() == [3, 1]
    with pytest.raises(DataError, match="user id 'x' is not among the 3 known ids"):
        features.table_rows(pa.array(["b", "x"]), keys, "user")
    with pytest.raises(DataError, match="item id 8 is not among the 1 known ids"):
        features.table_rows(pa.array([8]), pa.array([7]), "item")


RAW = (
    RawFeature("genre", "item", "categorical"),
    RawFeature("year", "item", "numeric"),
    RawFeature("words", "item", "sequence", max_length=2),
)


def test_entities_are_aligned_by_key_and_missing_ones_are_unknown():
    entities = pa.table(
        {
            "words": pa.array([["w"], None], pa.list_(pa.string())),
            "key": pa.array([30, 10]),
            "text": pa.array(["thirty", None]),
            "genre": pa.array(["g", "h"]),
            "year": pa.array([1.0, 2.0]),
        }
    )
    aligned = features.align_entities(entities, pa.array([10, 20, 30]), RAW)
    assert aligned.to_pylist() == [
        {"key": 10, "text": "", "genre": "h", "year": 2.0, "words": None},
        {"key": 20, "text": "", "genre": None, "year": None, "words": None},
        {"key": 30, "text": "thirty", "genre": "g", "year": 1.0, "words": ["w"]},
    ]
    nobody = features.align_entities(None, pa.array([10]), RAW)
    assert nobody.to_pylist() == [{"key": 10, "text": "", "genre": None, "year": None, "words": None}]


def test_entities_are_fitted_on_train_rows():
    table = features.align_entities(
        pa.table(
            {
                "key": pa.array([10, 20, 30]),
                "text": pa.array(["", "", "t"]),
                "genre": pa.array(["g", "h", "only valid"]),
                "year": pa.array([2.0, 5.0, 1000.0]),
                "words": pa.array([["cut", "b", "never"], ["b"], ["never"]]),
            }
        ),
        pa.array([10, 20, 30]),
        RAW,
    )
    fitted, encoded, vocabularies = features.fit_entities(table, "item", "item_id", RAW, np.array([1, 2, 0]), 1)
    # year in train is 2, 5, 5: mean 4, variance 2.
    assert fitted == [
        Feature("item_id", "categorical", "item", num_embeddings=4),
        Feature("genre", "categorical", "item", num_embeddings=4),
        Feature("year", "numeric", "item", mean=4.0, std=pytest.approx(2**0.5)),
        Feature("words", "sequence", "item", num_embeddings=4, max_length=2),
    ]
    assert {name: values.to_pylist() for name, values in vocabularies.items()} == {
        "genre": ["h", "g"],
        "words": ["b", "cut"],
    }
    assert encoded["item_id"].to_pylist() == [3, 2, 1]
    assert encoded["genre"].to_pylist() == [3, 2, 1]
    assert encoded["words"].to_pylist() == [[3, 2], [2, 0], [1, 0]]
    assert encoded["year"].to_pylist() == pytest.approx([-(2**0.5), 0.5**0.5, 996 / 2**0.5])
    assert encoded["num_train_rows"].to_pylist() == [1, 2, 0]
