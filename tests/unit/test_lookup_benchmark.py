"""The benchmark of text ids: both sides find the same rows, and both are measured."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from benchmarks import lookup as bench
from llm4msr.training.node_copy import write_table


def test_both_sides_find_the_same(tmp_path):
    keys = bench.make_ids(5_000)
    assert keys.to_pylist() == sorted(set(keys.to_pylist())) and len(keys) == 5_000
    write_table(tmp_path, "user", pa.table({"key": keys}))
    rng = np.random.default_rng(0)
    dictionary, mapped = (bench.open_side(side, tmp_path) for side in bench.SIDES)
    for _ in range(5):
        asked = bench.draw(tmp_path, rng)
        found = mapped(asked)
        assert found.tolist() == dictionary(asked).tolist()
        assert np.count_nonzero(found == 0) == bench.NUM_CANDIDATES // bench.UNKNOWN_EACH


def test_every_side_is_measured():
    result = bench.run((20_000,), 1, "short form")
    assert len(result.seconds) == 2 and all(s[0] > 0 for s in result.seconds.values())
    # The size of a dictionary of 20,000 texts in each of two processes, and next to nothing beside the shared files.
    assert 1 < result.medians["dictionary, 20000 ids: own MiB of a replica"] < 10
    assert result.medians["mapped, 20000 ids: own MiB of a replica"] < 1
    assert 24 <= result.medians["mapped, 20000 ids: file bytes an id"] < 36
    assert len(result.ratios) == 2 and len(result.goals) == 2 and result.met is None
