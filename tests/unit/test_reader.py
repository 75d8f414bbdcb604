"""Reading shares: every row once, equal steps, other orders each epoch, errors that surface."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from tiny import tiny_prepared

from llm4msr import storage
from llm4msr.training.reader import TrainReader, list_row_groups, prefetch, read_share


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("tiny") / "prepared"), num_rows=1000)


def ids(batches):
    return [batch["row_id"].tolist() for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def reader(prepared, rank=0, world_size=1, batch_size=64, seed=0, buffer_rows=128):
    return TrainReader(list_row_groups(prepared.files("train")), batch_size, rank, world_size, seed, buffer_rows)


@pytest.mark.parametrize("buffer_rows", [1, 130, 10_000])
def test_one_worker_sees_each_row_once_per_epoch(prepared, buffer_rows):
    batches = ids(reader(prepared, buffer_rows=buffer_rows).epoch(0))
    assert sorted(flat(batches)) == list(range(700))
    assert [len(b) for b in batches] == [64] * 10 + [60]


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_share_disjointly_with_equal_steps(prepared, world_size):
    shares = [ids(reader(prepared, rank, world_size).epoch(3)) for rank in range(world_size)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    assert len(shares[0]) == reader(prepared, 0, world_size).steps_per_epoch
    seen = flat(flat(share) for share in shares)
    assert len(seen) == len(set(seen)) == 700 // world_size * world_size


def test_orders_are_seeded_and_differ_between_epochs(prepared):
    first = ids(reader(prepared).epoch(0))
    assert first == ids(reader(prepared).epoch(0))
    assert first != ids(reader(prepared).epoch(1))
    assert first != ids(reader(prepared, seed=1).epoch(0))


def test_buffer_mixes_row_groups(prepared):
    """With a buffer over all rows, the first batch draws from many of the seven row groups."""
    batch = ids(reader(prepared, buffer_rows=10_000).epoch(0))[0]
    assert len({row_id // 100 for row_id in batch}) >= 5


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_validation_covers_each_row_once(prepared, world_size):
    groups = list_row_groups(prepared.files("valid"))
    shares = [flat(ids(read_share(groups, 32, rank, world_size))) for rank in range(world_size)]
    assert sorted(flat(shares)) == list(range(700, 850))


def test_a_file_with_other_rows_than_the_manifest_is_refused(prepared):
    uri, num_rows = prepared.files("train")[0]
    with pytest.raises(storage.StorageError, match=rf"{uri}: {num_rows} rows, the manifest says 5"):
        list_row_groups([(uri, 5)])


def test_prefetch_keeps_order_and_raises_what_the_thread_raised():
    assert list(prefetch(iter(range(20)), lambda x: x * 2)) == [x * 2 for x in range(20)]

    def fail(x):
        if x == 3:
            raise ValueError("row 3 is bad")
        return x

    got = []
    with pytest.raises(ValueError, match="row 3 is bad"):
        for x in prefetch(iter(range(9)), fail):
            got.append(x)
    assert got == [0, 1, 2]


def test_prefetch_ends_its_thread_when_the_consumer_stops():
    made = []
    stream = prefetch(iter(range(10**6)), lambda x: made.append(x) or x, depth=2)
    assert next(stream) == 0
    stream.close()
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count < 20


def test_columns_have_the_types_of_the_schema(prepared):
    batch = next(reader(prepared).epoch(0))
    assert batch["row_id"].dtype == np.int64
    assert {batch[name].dtype for name in ("user_row", "item_row", "scenario", "search_source")} == {np.dtype(np.int32)}
