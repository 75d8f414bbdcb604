from __future__ import annotations

import numpy as np
import pytest

from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.storage import StorageError

FIELDS = ("users_NK", "user_index_N", "scenarios_SK", "items_NK", "item_index_N")


def make_table(num_users_with: int = 3, num_items_with: int = 2) -> KnowledgeTable:
    """Users in reverse order of their rows; items in order, the last shares the first one's vector."""
    users = np.zeros((num_users_with + 1, 2), np.float16)
    users[1:] = np.arange(1, num_users_with + 1)[:, None] * [1, 10]
    user_index = np.array([0, *range(num_users_with, 0, -1), 0], np.int32)
    items = np.zeros((num_items_with + 1, 2), np.float16)
    items[1:] = np.arange(1, num_items_with + 1)[:, None] * [-1, 5]
    item_index = np.array([0, *range(1, num_items_with + 1), 0, min(1, num_items_with)], np.int32)
    return KnowledgeTable(users, user_index, np.array([[1, 2], [3, 4], [5, 6]], np.float32), items, item_index)


def test_save_and_load_memory_mapped(tmp_path):
    table = make_table()
    table.save(str(tmp_path / "k"))
    names = ["item_index.npy", "items.npy", "scenarios.npy", "user_index.npy", "users.npy"]
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == names
    loaded = KnowledgeTable.load(str(tmp_path / "k"))
    assert all(isinstance(getattr(loaded, name), np.memmap) for name in FIELDS)
    assert loaded.width == 2 and loaded.num_users_with_knowledge == 3
    assert loaded.num_items_with_knowledge == 3 and loaded.has_items
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))


def test_load_from_a_remote_place():
    table = make_table()
    table.save("memory://knowledge-table-test")
    loaded = KnowledgeTable.load("memory://knowledge-table-test")
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))


def test_a_level_that_was_not_extracted_is_one_row_of_zeros(tmp_path):
    make_table(num_items_with=0).save(str(tmp_path))
    loaded = KnowledgeTable.load(str(tmp_path))
    assert (loaded.has_items, loaded.num_items_with_knowledge) == (False, 0)
    np.testing.assert_array_equal(loaded.shuffled(0).item_index_N, [0, 0, 0])
    np.testing.assert_array_equal(loaded.item_statistics(), [[0, 0], [1, 1]])


@pytest.mark.parametrize("num", [2, 3, 50])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_gives_everyone_the_knowledge_of_another(num, seed):
    table = make_table(num, num)
    shuffled = table.shuffled(seed)
    for name in ("user_index_N", "item_index_N"):
        before, after = getattr(table, name), getattr(shuffled, name)
        with_knowledge = before > 0
        assert not np.any(after[with_knowledge] == before[with_knowledge])
        assert set(after) == set(before)
        assert not np.any(after[~with_knowledge])
        np.testing.assert_array_equal(after, getattr(table.shuffled(seed), name))
    assert shuffled.item_index_N[1] == shuffled.item_index_N[-1]  # they shared a vector, and still do
    np.testing.assert_array_equal(shuffled.scenarios_SK, [[5, 6], [1, 2], [3, 4]])
    np.testing.assert_array_equal(table.scenarios_SK, [[1, 2], [3, 4], [5, 6]])


def test_shuffled_is_one_cycle_through_all_vectors():
    """Not many small ones: following who gets whose vector leads through everybody."""
    table = make_table(20, 20)
    for before, after in zip(
        (table.user_index_N, table.item_index_N),
        (table.shuffled(3).user_index_N, table.shuffled(3).item_index_N),
        strict=True,
    ):
        goes_to = dict(zip(before.tolist(), after.tolist(), strict=True))
        row, seen = 1, set()
        while row not in seen:
            seen.add(row)
            row = goes_to[row]
        assert seen == set(range(1, 21))


def test_shuffled_depends_on_the_seed_and_a_single_vector_stays():
    table = make_table(50, 50)
    for name in ("user_index_N", "item_index_N"):
        assert not np.array_equal(getattr(table.shuffled(0), name), getattr(table.shuffled(1), name))
    moved_users = dict(zip(table.user_index_N, table.shuffled(0).user_index_N, strict=True))
    moved_items = dict(zip(table.item_index_N, table.shuffled(0).item_index_N, strict=True))
    assert moved_users != moved_items  # a user and an item are not shuffled alike
    np.testing.assert_array_equal(make_table(1, 1).shuffled(0).user_index_N, [0, 1, 0])
    np.testing.assert_array_equal(make_table(1, 1).shuffled(0).item_index_N, [0, 1, 0, 1])


def test_statistics_are_those_of_the_vectors_without_row_0(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(1001, 6)) * [1, 0.01, 5, 1, 1, 0] + [0, 100, -20, 3, 0, 7]).astype(np.float16)
    vectors[0] = 0
    index = np.arange(1001, dtype=np.int32)
    table = KnowledgeTable(vectors, index, np.zeros((1, 6), np.float32), vectors[:501] * 2, index[:501])
    monkeypatch.setattr("llm4msr.knowledge.table.STATISTICS_BLOCK_BYTES", 64 * 48)  # many blocks, the last one short
    for found, rows in (
        (table.user_statistics(), vectors[1:]),
        (table.item_statistics(), vectors[1:501] * 2),
    ):
        exact = rows.astype(np.float64)
        np.testing.assert_allclose(found[0], exact.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1], exact.std(0), rtol=1e-5, atol=1e-6)
        assert found[0].dtype == found[1].dtype == np.float32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("users_NK", np.zeros((2, 2), np.float32), "users_NK: found float32"),
        ("users_NK", np.ones((4, 2), np.float16), r"users_NK\[0\] must be zeros"),
        ("user_index_N", np.array([0, 4], np.int32), "user_index_N holds 0 to 4 .* needed 0 to 3"),
        ("user_index_N", np.array([1, 0], np.int32), "starting with 0"),
        ("scenarios_SK", np.zeros((1, 3), np.float32), "width 2, scenarios of 3, items of 2"),
        ("items_NK", np.zeros((2, 2), np.float32), "items_NK: found float32"),
        ("items_NK", np.zeros((0, 2), np.float16), r"items_NK: found float16 of shape \(0, 2\)"),
        ("items_NK", np.zeros((3, 4), np.float16), "scenarios of 2, items of 4"),
        ("items_NK", np.ones((3, 2), np.float16), r"items_NK\[0\] must be zeros"),
        ("item_index_N", np.array([0, 3], np.int32), "item_index_N holds 0 to 3 .* needed 0 to 2"),
        ("item_index_N", np.array([0, -1], np.int32), "item_index_N holds -1 to 0"),
        ("item_index_N", np.array([0, 1], np.int64), "item_index_N: found int64"),
    ],
)
def test_wrong_arrays_are_refused(field, value, message):
    arrays = {name: getattr(make_table(), name) for name in FIELDS} | {field: value}
    with pytest.raises(ValueError, match=message):
        KnowledgeTable(**arrays)


def test_missing_and_damaged_files_are_named(tmp_path):
    make_table().save(str(tmp_path))
    (tmp_path / "user_index.npy").write_bytes(b"not an array")
    with pytest.raises(StorageError, match=r"user_index\.npy: not a readable"):
        KnowledgeTable.load(str(tmp_path))
    (tmp_path / "users.npy").unlink()
    with pytest.raises(StorageError, match=r"users\.npy: no such file"):
        KnowledgeTable.load(str(tmp_path))


def test_pickled_arrays_are_not_loaded(tmp_path):
    make_table().save(str(tmp_path))
    np.save(tmp_path / "users.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(StorageError, match=r"users\.npy: not a readable"):
        KnowledgeTable.load(str(tmp_path))


@pytest.mark.parametrize("name", ["items.npy", "item_index.npy"])
def test_a_table_from_before_item_knowledge_is_refused(tmp_path, name):
    make_table().save(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=rf"{name}: no such file; .* of another version: extract again"):
        KnowledgeTable.load(str(tmp_path))
