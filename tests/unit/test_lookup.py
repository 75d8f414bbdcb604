"""Raw ids to table rows: whole numbers, and texts by the order of their hashes."""

from __future__ import annotations

import itertools
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4msr import lookup
from llm4msr.lookup import HashOrder, KeyIndex
from llm4msr.request import RequestError

SAME_HASH = ["buckeroo", "plumless", "axzlcrfp", "falcczar", "zrpuagmd"]


def index_of(keys, key_type="string", num_chunks=1):
    array = pa.array(keys, pa.string() if key_type == "string" else pa.int64())
    cuts = np.linspace(0, len(keys), num_chunks + 1).astype(int)
    parts = [array.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
    return KeyIndex(pa.chunked_array(parts, array.type), key_type)


def test_finds_integers_and_gives_0_to_the_others():
    index = index_of([-5, 3, 10, 2**53, 2**53 + 1, 2**63 - 1], "int64")

    rows = index([3, 2**53 + 1, 2**53, 4, -5, 2**63 - 1, -(2**63), 11], "items")

    assert rows.tolist() == [2, 5, 4, 0, 1, 6, 0, 0]
    assert rows.dtype == np.int32


def test_finds_text_and_gives_0_to_the_others():
    rows = index_of(["a", "b", "ü"])(["ü", "c", "a", "", "A", "u\u0308", "a\0", "\ud800", "a"], "items")

    assert rows.tolist() == [3, 0, 1, 0, 0, 0, 0, 0, 1]
    assert rows.dtype == np.int32


def test_texts_with_the_same_hash_are_told_apart():
    assert len({crc32(text.encode()) for text in SAME_HASH}) == 1
    known = sorted([*SAME_HASH[:3], "another", "other"])

    rows = index_of(known)([*SAME_HASH, *known], "user")

    assert rows.tolist() == [*(known.index(text) + 1 for text in SAME_HASH[:3]), 0, 0, 1, 2, 3, 4, 5]
    assert index_of(SAME_HASH[:1])(SAME_HASH, "user").tolist() == [1, 0, 0, 0, 0]


@settings(deadline=None, max_examples=60)
@given(st.sets(st.text(max_size=3)), st.lists(st.text(max_size=3)), st.integers(1, 3))
def test_as_a_dictionary_would(known, asked, num_chunks):
    keys = sorted(known)
    rows = {key: i for i, key in enumerate(keys, start=1)}

    found = index_of(keys, num_chunks=num_chunks)([*asked, *keys], "user")

    assert found.tolist() == [rows.get(key, 0) for key in [*asked, *keys]]


def test_many_are_hashed_in_parts(monkeypatch):
    keys = [f"user {i:03d}" for i in range(100)]
    whole = HashOrder.of(pa.array(keys))
    monkeypatch.setattr(lookup, "HASHED_AT_A_TIME", 7)
    parts = HashOrder.of(pa.array(keys))

    assert (whole.hash_N[:-1] <= whole.hash_N[1:]).all()
    assert parts.hash_N.tolist() == whole.hash_N.tolist() and parts.place_N.tolist() == whole.place_N.tolist()
    assert index_of(keys)(keys, "user").tolist() == list(range(1, 101))


@pytest.mark.parametrize(("key_type", "keys"), [("int64", [1, 2]), ("string", ["1", ""])])
def test_an_empty_table_knows_nobody(key_type, keys):
    for num_chunks in (0, 1):
        index = index_of([], key_type, num_chunks)
        assert index(keys, "user").tolist() == [0, 0] and index.example() is None


@pytest.mark.parametrize("wrong", ["3", 3.0, True, None, 2**63, -(2**63) - 1])
def test_refuses_what_is_no_64_bit_integer(wrong):
    with pytest.raises(RequestError, match=r"is not a 64-bit integer: .*, such as 3") as e:
        index_of([3], "int64")([3, wrong], "items")
    assert e.value.field == "items"
    assert str(e.value).startswith(repr(wrong))


@pytest.mark.parametrize("wrong", [3, 3.0, True, None])
def test_refuses_what_is_no_text(wrong):
    with pytest.raises(RequestError, match="is not a text id: ids of this data are text, such as 'a'"):
        index_of(["a"])(["a", wrong], "user")


@pytest.mark.parametrize(("key_type", "type_"), [("int64", pa.int64()), ("string", pa.large_string())])
def test_a_table_of_one_piece_is_not_copied(key_type, type_):
    keys = pa.chunked_array([pa.array(range(100_000), pa.int64()).cast(type_)])
    before = pa.total_allocated_bytes()
    index = KeyIndex(keys, key_type, HashOrder.of(keys) if key_type == "string" else None)

    assert index([keys[7].as_py()], "user").tolist() == [8]
    assert pa.total_allocated_bytes() - before < 10_000
