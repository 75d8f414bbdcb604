from __future__ import annotations

import numpy as np
import pytest

from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.storage import StorageError


def make_table(num_users_with: int = 3) -> KnowledgeTable:
    users = np.zeros((num_users_with + 1, 2), np.float16)
    users[1:] = np.arange(1, num_users_with + 1)[:, None] * [1, 10]
    index = np.array([0, *range(num_users_with, 0, -1), 0], np.int32)
    return KnowledgeTable(users, index, np.array([[1, 2], [3, 4], [5, 6]], np.float32))


def test_save_and_load_memory_mapped(tmp_path):
    table = make_table()
    table.save(str(tmp_path / "k"))
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == ["scenarios.npy", "user_index.npy", "users.npy"]
    loaded = KnowledgeTable.load(str(tmp_path / "k"))
    assert isinstance(loaded.users_NK, np.memmap)
    assert loaded.width == 2 and loaded.num_users_with_knowledge == 3
    for name in ("users_NK", "user_index_N", "scenarios_SK"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))


def test_load_from_a_remote_place(tmp_path):
    table = make_table()
    table.save("memory://knowledge-table-test")
    loaded = KnowledgeTable.load("memory://knowledge-table-test")
    np.testing.assert_array_equal(loaded.users_NK, table.users_NK)
    np.testing.assert_array_equal(loaded.user_index_N, [0, 3, 2, 1, 0])


@pytest.mark.parametrize("num_users", [2, 3, 50])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_gives_everyone_the_knowledge_of_another(num_users, seed):
    table = make_table(num_users)
    shuffled = table.shuffled(seed)
    with_knowledge = table.user_index_N > 0
    assert not np.any(shuffled.user_index_N[with_knowledge] == table.user_index_N[with_knowledge])
    assert sorted(shuffled.user_index_N) == sorted(table.user_index_N)
    assert not np.any(shuffled.user_index_N[~with_knowledge])
    np.testing.assert_array_equal(shuffled.scenarios_SK, [[5, 6], [1, 2], [3, 4]])
    np.testing.assert_array_equal(table.scenarios_SK, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(shuffled.user_index_N, table.shuffled(seed).user_index_N)


def test_shuffled_depends_on_the_seed_and_one_user_keeps_its_row():
    table = make_table(50)
    assert not np.array_equal(table.shuffled(0).user_index_N, table.shuffled(1).user_index_N)
    np.testing.assert_array_equal(make_table(1).shuffled(0).user_index_N, [0, 1, 0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("users_NK", np.zeros((2, 2), np.float32), "users_NK: found float32"),
        ("users_NK", np.ones((4, 2), np.float16), r"users_NK\[0\] must be zeros"),
        ("user_index_N", np.array([0, 4], np.int32), "needed 0 to 3"),
        ("user_index_N", np.array([1, 0], np.int32), "starting with 0"),
        ("scenarios_SK", np.zeros((1, 3), np.float32), "width 2, scenarios of 3"),
    ],
)
def test_wrong_arrays_are_refused(field, value, message):
    table = make_table()
    arrays = {n: getattr(table, n) for n in ("users_NK", "user_index_N", "scenarios_SK")} | {field: value}
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
