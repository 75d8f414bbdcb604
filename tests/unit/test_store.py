from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4msr.knowledge.engines.interface import EncodedBatch
from llm4msr.knowledge.prompts import Prompt
from llm4msr.knowledge.store import (
    KEY_DTYPE,
    KnowledgeStore,
    key_text,
    keys_to_arrow,
    keys_to_numpy,
    prompt_keys,
)
from llm4msr.storage import StorageError

IDENTITY = {"model": "test", "dtype": "float32"}


def batch(*vectors: tuple[float, ...], errors: dict[int, str] | None = None) -> EncodedBatch:
    n = len(vectors)
    return EncodedBatch(
        vectors=np.array(vectors, np.float32),
        num_tokens=np.arange(10, 10 + n, dtype=np.int32),
        num_dropped_events=np.arange(n, dtype=np.int32),
        num_cut_characters=np.zeros(n, np.int32),
        errors=tuple((errors or {}).get(i) for i in range(n)),
        texts=tuple(f"answer {i}" for i in range(n)),
        num_generated_tokens=np.full(n, 3, np.int32),
    )


def keys(*names: str) -> np.ndarray:
    """Keys of 16 bytes, some of which end in zeros as real ones may."""
    return np.array([name.encode() for name in names], KEY_DTYPE)


def load(store: KnowledgeStore, *names: str) -> list[list[float]]:
    index = store.index()
    positions = index.find(keys(*names))
    assert (positions >= 0).all()
    return store.vectors(index, positions).tolist()


@pytest.fixture
def store(tmp_path) -> KnowledgeStore:
    return KnowledgeStore(str(tmp_path), IDENTITY)


def test_what_is_committed_is_found_in_the_order_asked_for(store):
    assert store.index().find(keys("a")).tolist() == [-1]
    store.commit(keys("b", "a"), batch((3, 4), (1, 2)))
    store.commit(keys("c"), batch((5.5, -6)))
    index = store.index()
    assert index.keys_N.tolist() == [b"a", b"b", b"c"]
    assert (index.find(keys("d", "a", "d", "c", "")) >= 0).tolist() == [False, True, False, True, False]
    vectors = store.vectors(index, index.find(keys("c", "a", "c")))
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, [[5.5, -6], [1, 2], [5.5, -6]])
    columns = store.columns(index, index.find(keys("c", "a", "b")), ["num_tokens", "num_dropped_events", "text"])
    assert columns.to_pydict() == {
        "num_tokens": [10, 11, 10],
        "num_dropped_events": [0, 1, 0],
        "text": ["answer 0", "answer 1", "answer 0"],
    }


def test_keys_survive_the_trip_through_arrow():
    raw = [bytes(range(16)), b"\0" * 16, b"x" * 13 + b"\0" * 3, b"\xff" * 16]
    made = np.frombuffer(b"".join(raw), KEY_DTYPE)
    column = keys_to_arrow(made)
    assert column.to_pylist() == raw
    assert [key_text(key) for key in made] == [key.hex() for key in raw]
    np.testing.assert_array_equal(
        keys_to_numpy(pa.chunked_array([column[:1], column[3:], column[1:3]])), made[[0, 3, 1, 2]]
    )
    assert len(keys_to_numpy(pa.chunked_array([], column.type))) == 0


def test_a_key_follows_from_the_encoder_and_from_all_that_is_read():
    prompts = [
        Prompt("user", "1", "head", ("a",), "tail", ("s",), (0,)),
        Prompt("user", "2", "head", ("a",), "tail", ("s",), (0,)),
    ]
    other = Prompt("user", "1", "head", ("b",), "tail", ("s",), (0,))
    first, second, third = prompt_keys("id", [*prompts, other])
    assert first == second != third
    assert prompt_keys("other", prompts)[0] != first
    assert prompt_keys("id", []).shape == (0,)


def test_the_same_commit_overwrites_the_same_file(store):
    first = store.commit(keys("a", "b"), batch((1, 2), (3, 4)))
    assert first == store.part_uri(keys("b", "a"))
    assert store.commit(keys("b", "a"), batch((3, 4), (1, 2))) == first
    assert load(store, "a", "b") == [[1, 2], [3, 4]]


def test_a_key_in_two_files_is_one_key(store):
    store.commit(keys("a", "b"), batch((1, 2), (3, 4)))
    store.commit(keys("b", "c"), batch((3, 4), (5, 6)))
    assert store.index().keys_N.tolist() == [b"a", b"b", b"c"]
    assert load(store, "a", "b", "c") == [[1, 2], [3, 4], [5, 6]]


def test_a_failed_prompt_is_a_row_that_counts_for_nothing(store):
    store.commit(keys("a", "b"), batch((1, 2), (0, 0), errors={1: "too long"}))
    index = store.index()
    assert index.keys_N.tolist() == [b"a"]
    assert index.error_of(keys("b", "a")) == ["too long", None]
    table = pq.read_table(index.parts[0])
    assert table["vector"].to_pylist() == [[1, 2], None] and table["error"].to_pylist() == [None, "too long"]
    # Tried again with success: both parts stay, the vector is what is read.
    store.commit(keys("b"), batch((3, 4)))
    assert load(store, "b", "a") == [[3, 4], [1, 2]]
    # Where every row failed, the width may not be known.
    none = np.zeros(2, np.int32)
    unread = EncodedBatch(np.zeros((2, 0), np.float32), none, none, none, ("e", "e"), (None, None), none)
    store.commit(keys("c", "d"), unread)
    assert store.index().find(keys("c", "a")).tolist() == [-1, 0]


def test_encoders_do_not_mix(store, tmp_path):
    store.commit(keys("a"), batch((1, 2)))
    other = KnowledgeStore(str(tmp_path), IDENTITY | {"dtype": "bfloat16"})
    assert other.uri != store.uri and other.index().find(keys("a")).tolist() == [-1]
    (tmp_path / store.identity_digest / "identity.json").write_text('{"model": "changed"}')
    with pytest.raises(StorageError, match=r"identity\.json: holds another identity"):
        KnowledgeStore(str(tmp_path), IDENTITY)


@pytest.mark.parametrize("damage", ["cut", "emptied", "bit", "other_keys", "other_columns"])
def test_a_damaged_part_is_named(store, damage):
    part = Path(store.commit(keys("a", "b"), batch((1, 2), (3, 4))))
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "emptied":
        part.write_bytes(b"")
    elif damage == "bit":
        # The second page: a number of the vectors, which no digest of keys would find.
        content = bytearray(part.read_bytes())
        column = pq.ParquetFile(part).metadata.row_group(0).column(1)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        part.write_bytes(content)
    elif damage == "other_keys":
        other = Path(store.commit(keys("c"), batch((5, 6))))
        other.replace(part)
    else:
        pq.write_table(pq.read_table(part).drop_columns(["vector"]), part)
    with pytest.raises(StorageError, match=part.name):
        load(store, "a")


def test_parts_of_another_width_are_refused(store):
    store.commit(keys("a"), batch((1, 2)))
    store.commit(keys("b"), batch((1, 2, 3)))
    with pytest.raises(StorageError, match=r"part-.*vectors of width"):
        load(store, "a", "b")


def test_only_finite_float16_goes_in(store):
    for value in (65505.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=rf"vector of key {key_text(b'b')} cannot be stored.*65504"):
            store.commit(keys("a", "b"), batch((1, 2), (3, value)))
    with pytest.raises(ValueError, match="2 keys for 1 vectors"):
        store.commit(keys("a", "b"), batch((1, 2)))
    with pytest.raises(ValueError, match="a key of its own"):
        store.commit(keys("a", "a"), batch((1, 2), (1, 2)))
    assert not len(store.index().keys_N)
    store.commit(keys("a"), batch((65504.0, -65504.0)))
    assert load(store, "a") == [[65504, -65504]]
