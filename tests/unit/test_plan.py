"""Cutting prompts into units: every missing key once, and the same units again after a crash."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4msr import storage
from llm4msr.knowledge.plan import PromptSet, cut_units, missing_prompts, num_planned, open_plan, read_prompt_set
from llm4msr.knowledge.prompts import PROMPTS
from llm4msr.knowledge.store import KEY_DTYPE, StoreIndex, keys_to_arrow


def keys(*names: str) -> np.ndarray:
    return np.array([name.encode() for name in names], KEY_DTYPE)


def stored(*names: str) -> StoreIndex:
    n = len(names)
    return StoreIndex(np.sort(keys(*names)), np.zeros(n, np.int32), np.arange(n, dtype=np.int32), ("p",), keys(), ())


def prompt_set(sizes: list[int], names: list[str]) -> PromptSet:
    levels = ("scenario", *["user"] * (len(sizes) - 1))
    files = tuple(f"f{i}" for i in range(len(sizes)))
    return PromptSet(files, levels, np.cumsum(sizes), keys(*names), np.arange(len(names), dtype=np.int32))


PROMPT_SET = prompt_set([2, 0, 3, 4], ["k0", "k1", "k2", "k3", "k2", "k4", "k5", "k1", "k6"])


def test_each_missing_key_is_taken_once_and_found_in_its_file():
    missing = missing_prompts(PROMPT_SET, stored("k0", "k3", "k4", "zz"))
    assert missing.tolist() == [1, 2, 6, 8]
    assert cut_units(PROMPT_SET, missing, 3)["unit"].to_pylist() == [
        [{"file": 0, "records": [1]}, {"file": 2, "records": [0]}, {"file": 3, "records": [1]}],
        [{"file": 3, "records": [3]}],
    ]
    assert cut_units(PROMPT_SET, missing[:0], 3).num_rows == 0
    assert missing_prompts(PROMPT_SET, stored()).tolist() == [0, 1, 2, 3, 5, 6, 8]
    assert PROMPT_SET.of_level("scenario").tolist() == [True] * 2 + [False] * 7


def test_a_rerun_does_the_units_that_were_planned(tmp_path):
    uri = str(tmp_path / "plan.parquet")
    first = open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored()), 3)
    assert [num_planned(first.slice(i, 1)) for i in range(3)] == [3, 3, 1]
    # The middle unit was committed, whatever the size of units is now.
    again = open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored("k3", "k4", "k5")), 2)
    assert again["unit"].to_pylist() == [first["unit"][0].as_py(), first["unit"][2].as_py()]
    # One prompt of it failed: only that is tried again.
    again = open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored("k0", "k1", "k2", "k3", "k5", "k6")), 2)
    assert again["unit"].to_pylist() == [[{"file": 3, "records": [0]}]]
    assert open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored()), 2)["unit"].equals(first["unit"])
    assert open_plan(uri, PROMPT_SET, np.zeros(0, np.int64), 2).num_rows == 0


def test_a_plan_that_lacks_a_missing_prompt_is_made_anew(tmp_path):
    uri = str(tmp_path / "plan.parquet")
    open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored("k6")), 3)
    anew = open_plan(uri, PROMPT_SET, missing_prompts(PROMPT_SET, stored("k0")), 3)
    assert num_planned(anew) == 6 and storage.read_parquet(uri).equals(anew)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=36, max_size=36),
    st.sets(st.integers(0, 9)),
    st.integers(1, 5),
)
def test_units_hold_every_missing_key_exactly_once(sizes, drawn, have, rows_per_unit):
    prompts = prompt_set(sizes, [f"k{n}" for n in drawn[: sum(sizes)]])
    missing = missing_prompts(prompts, stored(*(f"k{n}" for n in have)))
    starts = np.concatenate([[0], prompts.ends_F])
    found = [
        prompts.keys_P[starts[part["file"]] + record]
        for unit in cut_units(prompts, missing, rows_per_unit)["unit"].to_pylist()
        for part in unit
        for record in part["records"]
    ]
    expected = set(prompts.keys_P.tolist()) - {f"k{n}".encode() for n in have}
    assert sorted(found) == sorted(expected)


def test_a_prompt_set_is_read_file_after_file(tmp_path):
    files = []
    for number, (level, rows) in enumerate((("scenario", [0, 1]), ("user", []), ("user", [7]))):
        uri = str(tmp_path / f"{number}.parquet")
        table = PROMPTS.empty_table().select(["key", "subject_row"])
        if rows:
            names = keys(*(f"{level}{row}" for row in rows))
            table = pa.table({"key": keys_to_arrow(names), "subject_row": pa.array(rows, pa.int32())})
        storage.write_parquet(uri, table)
        files.append((uri, level))
    found = read_prompt_set(files)
    assert found.keys_P.tolist() == [b"scenario0", b"scenario1", b"user7"]
    assert found.subject_row_P.tolist() == [0, 1, 7] and found.ends_F.tolist() == [2, 2, 3]
    storage.remove(files[2][0])
    with pytest.raises(storage.StorageError, match=r"2\.parquet"):
        read_prompt_set(files)
