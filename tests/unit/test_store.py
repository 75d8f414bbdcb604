from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4msr.knowledge.store import EncodedBatch, KnowledgeStore
from llm4msr.storage import StorageError

IDENTITY = {"model": "test", "dtype": "float32"}


def batch(*vectors: tuple[float, ...], error: str | None = None) -> EncodedBatch:
    n = len(vectors)
    return EncodedBatch(
        vectors=np.array(vectors, np.float32),
        num_tokens=np.arange(10, 10 + n, dtype=np.int32),
        num_dropped_events=np.arange(n, dtype=np.int32),
        num_cut_characters=np.zeros(n, np.int32),
        errors=(error,) * n,
    )


def strings(*keys: str) -> pa.Array:
    return pa.array(keys, pa.string())


@pytest.fixture
def store(tmp_path) -> KnowledgeStore:
    return KnowledgeStore(str(tmp_path), IDENTITY)


def test_what_is_committed_is_found_in_the_order_asked_for(store):
    assert store.keys().to_pylist() == []
    store.commit(["a", "b"], batch((1, 2), (3, 4)))
    store.commit(["c"], batch((5.5, -6)))
    assert sorted(store.keys().to_pylist()) == ["a", "b", "c"]
    assert store.missing(strings("d", "a", "d", "c", "e")).to_pylist() == ["d", "e"]
    vectors = store.load(strings("c", "a", "c"))
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, [[5.5, -6], [1, 2], [5.5, -6]])
    _, counts = store.read(strings("b", "c"))
    assert {name: values.tolist() for name, values in counts.items()} == {
        "num_tokens": [11, 10],
        "num_dropped_events": [1, 0],
        "num_cut_characters": [0, 0],
    }


def test_the_same_commit_overwrites_the_same_file(store):
    first = store.commit(["a", "b"], batch((1, 2), (3, 4)))
    again = store.commit(["b", "a"], batch((3, 4), (1, 2)))
    assert again == first
    assert first.rsplit("/", 1)[-1].startswith("part-")
    np.testing.assert_array_equal(store.load(strings("a", "b")), [[1, 2], [3, 4]])


def test_a_key_in_two_files_is_one_key(store):
    store.commit(["a", "b"], batch((1, 2), (3, 4)))
    store.commit(["b", "c"], batch((3, 4), (5, 6)))
    assert sorted(store.keys().to_pylist()) == ["a", "b", "c"]
    np.testing.assert_array_equal(store.load(strings("a", "b", "c")), [[1, 2], [3, 4], [5, 6]])


def test_encoders_do_not_mix(store, tmp_path):
    store.commit(["a"], batch((1, 2)))
    other = KnowledgeStore(str(tmp_path), IDENTITY | {"dtype": "bfloat16"})
    assert other.uri != store.uri and other.missing(strings("a")).to_pylist() == ["a"]
    (tmp_path / store.identity_digest / "identity.json").write_text('{"model": "changed"}')
    with pytest.raises(StorageError, match=r"identity\.json: holds another identity"):
        KnowledgeStore(str(tmp_path), IDENTITY)


def test_absent_keys_are_named(store):
    store.commit(["a"], batch((1, 2)))
    with pytest.raises(StorageError, match="1 of 2 keys are not stored, first z"):
        store.load(strings("a", "z"))


@pytest.mark.parametrize("damage", ["cut", "emptied", "other_keys", "other_columns"])
def test_a_damaged_part_is_named(store, damage):
    from pathlib import Path

    part = Path(store.commit(["a", "b"], batch((1, 2), (3, 4))))
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "emptied":
        part.write_bytes(b"")
    elif damage == "other_keys":
        other = Path(store.commit(["c"], batch((5, 6))))
        other.replace(part)
    else:
        pq.write_table(pq.read_table(part).drop_columns(["vector"]), part)
    with pytest.raises(StorageError, match=part.name):
        store.keys()
        store.load(strings("a"))


def test_parts_of_another_width_are_refused(store):
    store.commit(["a"], batch((1, 2)))
    store.commit(["b"], batch((1, 2, 3)))
    with pytest.raises(StorageError, match=r"part-.*vectors of width"):
        store.load(strings("a", "b"))


def test_only_finite_float16_goes_in(store):
    for value in (65505.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"vector of key b cannot be stored.*65504"):
            store.commit(["a", "b"], batch((1, 2), (3, value)))
    with pytest.raises(ValueError, match="broken"):
        store.commit(["a"], batch((1, 2), error="broken"))
    with pytest.raises(ValueError, match="2 keys for 1 vectors"):
        store.commit(["a", "b"], batch((1, 2)))
    assert store.keys().to_pylist() == []
    store.commit(["a"], batch((65504.0, -65504.0)))
    np.testing.assert_array_equal(store.load(strings("a")), [[65504, -65504]])
