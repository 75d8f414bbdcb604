"""Lanes: the same steps for any number of workers, every row once, any step at once, bounded memory."""

from __future__ import annotations

import itertools
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import s3fs
from tiny import tiny_prepared

from llm4msr import storage
from llm4msr.training import reader as reader_module
from llm4msr.training.reader import TrainReader, list_row_groups, prefetch, read_batches, read_row_group, valid_share

FILE_ROWS = [1010, 370, 8, 999, 613]  # row groups of 100, the last of each file shorter
TOTAL = sum(FILE_ROWS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("tiny") / "prepared"), num_rows=1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """3,000 rows in five files, in order of user, 100 rows of each user."""
    folder, first, out = tmp_path_factory.mktemp("rows"), 0, []
    for i, num_rows in enumerate(FILE_ROWS):
        row_id = np.arange(first, first + num_rows)
        table = pa.table({"row_id": row_id, "user_row": (row_id // 100).astype(np.int32), "label": row_id % 2})
        storage.write_parquet(f"{folder}/bucket-{i:05d}.parquet", table, row_group_size=100)
        out.append((f"{folder}/bucket-{i:05d}.parquet", num_rows))
        first += num_rows
    return out


@pytest.fixture
def reads(monkeypatch):
    """The (uri, index) of every row group that is read from disk."""
    found, real = [], storage.read_row_group

    def counted(uri, index, *args):
        found.append((uri, index))
        return real(uri, index, *args)

    monkeypatch.setattr(storage, "read_row_group", counted)
    return found


def reader(files, rank=0, world_size=1, **changes):
    options = {"batch_size": 64, "num_lanes": 8, "seed": 0, "buffer_rows": 512} | changes
    return TrainReader(list_row_groups(files), rank=rank, world_size=world_size, **options)


def ids(batches):
    return [batch["row_id"].tolist() for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def steps(files, world_size, epoch=0, first_step=0, **changes):
    """The rows of each global step: the workers' rows, one worker after the other."""
    of_worker = [ids(reader(files, r, world_size, **changes).epoch(epoch, first_step)) for r in range(world_size)]
    return [flat(shares) for shares in zip(*of_worker, strict=True)]


@pytest.mark.parametrize("buffer_rows", [1, 200, 512, 2000, 10**6])
@pytest.mark.parametrize("rows_per_user", [1, 5])
def test_any_number_of_workers_takes_the_same_steps(files, buffer_rows, rows_per_user):
    options = {"epoch": 2, "buffer_rows": buffer_rows, "rows_per_user": rows_per_user}
    alone = steps(files, 1, **options)
    for world_size in (2, 3, 4, 8):
        assert steps(files, world_size, **options) == alone


@pytest.mark.parametrize("num_lanes", [1, 7, 8])
def test_an_epoch_has_each_row_at_most_once_and_few_sit_out(files, num_lanes):
    sat_out = []
    for epoch in range(4):
        seen = flat(steps(files, 1, epoch, num_lanes=num_lanes, batch_size=56))
        assert len(seen) == len(set(seen)) == TOTAL // num_lanes * num_lanes
        sat_out.append(set(range(TOTAL)) - set(seen))
    if num_lanes == 7:
        assert all(len(rows) == TOTAL % 7 for rows in sat_out)
        assert not set.intersection(*sat_out)


def test_others_sit_out_even_of_a_single_row_group(files):
    sat_out = [
        set(range(1010 + 370, 1388)) - set(flat(steps(files[2:3], 1, epoch, num_lanes=7, batch_size=7)))
        for epoch in range(20)
    ]
    assert {len(rows) for rows in sat_out} == {1} and len(set.union(*sat_out)) >= 5


def test_no_rows_come_first_in_every_epoch(tmp_path):
    """A window that is a quarter of a row group holds other rows of it in each epoch, and rows meet other rows."""
    uri = f"{tmp_path}/bucket-00000.parquet"
    table = pa.table({"row_id": np.arange(400), "user_row": np.zeros(400, np.int32), "label": np.zeros(400, np.int64)})
    storage.write_parquet(uri, table, row_group_size=400)
    files = [(uri, 400)]
    whole = {"num_lanes": 1, "batch_size": 10, "buffer_rows": 100}
    epochs = [flat(steps(files, 1, epoch, **whole)) for epoch in range(8)]
    quarters = [[set(rows[i : i + 100]) for i in range(0, 400, 100)] for rows in epochs]
    shared = [len(a & b) for one, other in itertools.combinations(quarters, 2) for a in one for b in other]
    assert len(shared) == 28 * 16 and min(shared) >= 10 and max(shared) <= 42  # 25 on average


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_steps_are_equal_and_the_last_is_short(files, world_size):
    readers = [reader(files, rank, world_size) for rank in range(world_size)]
    assert {r.steps_per_epoch for r in readers} == {47}  # 375 rows a lane, 8 a slice
    sizes = [len(rows) for rows in steps(files, world_size)]
    assert sizes == [64] * 46 + [56] == [readers[0].rows_in_step(step) for step in range(47)]
    shares = [len(next(r.epoch(0))["row_id"]) for r in readers]
    assert shares == {1: [64], 3: [24, 24, 16], 8: [8] * 8}[world_size]


def test_orders_are_seeded_and_differ_between_epochs(files):
    first = steps(files, 1)
    assert first == steps(files, 1)
    assert first != steps(files, 1, epoch=1)
    assert first != steps(files, 1, seed=1)
    one_group = {"num_lanes": 1, "batch_size": 8}
    assert steps(files[2:3], 1, **one_group) != steps(files[2:3], 1, epoch=1, **one_group)


@pytest.mark.parametrize("buffer_rows", [1, 128, 512, 1984, 10**6])
@pytest.mark.parametrize("rows_per_user", [1, 5])
@pytest.mark.parametrize("world_size", [1, 3])
def test_going_on_at_any_step_is_the_rest_of_the_epoch(files, buffer_rows, rows_per_user, world_size):
    options = {"epoch": 1, "buffer_rows": buffer_rows, "rows_per_user": rows_per_user}
    whole = steps(files, world_size, **options)
    for first_step in (0, 1, 7, 8, 9, 30, 46, 47):
        assert steps(files, world_size, first_step=first_step, **options) == whole[first_step:]


def test_going_on_reads_only_what_is_ahead(files, reads):
    some = reader(files, buffer_rows=64)
    list(some.epoch(0))  # 47 windows a lane: a row group is decoded once for all that lie in it
    assert len(some.groups) == len(set(reads)) and len(reads) <= len(some.groups) + 7  # lanes meet within one
    reads.clear()
    list(some.epoch(0, first_step=44))
    assert len(reads) <= 8 * 2
    reads.clear()
    list(some.epoch(0, first_step=47))
    assert not reads


def test_lanes_open_their_windows_in_turn(files, reads):
    """After the first step, no step reads for more than a few lanes at once."""
    per_step = []
    for _ in reader(files, buffer_rows=1024).epoch(0):  # windows of 16 steps and 128 rows
        per_step.append(len(reads))
        reads.clear()
    assert max(per_step[1:]) <= 4


def test_a_batch_mixes_row_groups_and_scatters_neighbours(tmp_path):
    groups, group_rows = 64, 512
    total = groups * group_rows
    table = pa.table({"row_id": np.arange(total)})
    storage.write_parquet(f"{tmp_path}/rows.parquet", table, row_group_size=group_rows)
    # As in a real run: a window of a lane is half a row group, and a slice is 1/64 of it.
    some = reader([(f"{tmp_path}/rows.parquet", total)], buffer_rows=group_rows // 2 * 8, batch_size=32)
    row_R = np.array(flat(ids(some.epoch(0))))
    distinct = [len(np.unique(batch // group_rows)) for batch in row_R.reshape(-1, 32)]
    assert np.median(distinct) >= 8
    place_R = np.argsort(row_R) // 32  # the step of each row
    apart = np.abs(np.diff(place_R))
    assert np.median(apart) >= 10 and np.mean(apart == 0) < 0.05  # of a window of 64 steps
    correlation = np.mean([abs(np.corrcoef(flat(ids(some.epoch(e))), np.arange(total))[0, 1]) for e in range(4)])
    assert correlation < 0.25  # 64 blocks in random order: 1/8 is expected


def test_a_lane_that_fits_into_one_window_is_shuffled_whole(files, reads):
    some = reader(files, buffer_rows=47 * 64)
    next(some.epoch(0))
    assert set(reads) == {(group.uri, group.index) for group in some.groups}


@pytest.mark.parametrize("rows_per_user", [3, 8, 1000])
def test_rows_of_a_user_come_in_runs(files, rows_per_user):
    some = reader(files, num_lanes=1, buffer_rows=10**6, batch_size=60, rows_per_user=rows_per_user)
    row_R = np.array(flat(ids(some.epoch(0))))
    assert len(row_R) == len(set(row_R)) == TOTAL
    new = np.flatnonzero(np.r_[True, np.diff(row_R // 100) != 0])
    size = np.diff(np.r_[new, TOTAL])
    num_runs = 30 * -(-100 // rows_per_user)
    assert 0.9 * num_runs <= len(new) <= num_runs  # two runs of a user may meet
    assert size.max() <= min(rows_per_user, 100) * 4
    assert not (np.diff(row_R) == 1).mean() > 0.1  # shuffled within the user
    if rows_per_user == 8:
        users = [len(set(batch // 100)) for batch in row_R.reshape(-1, 60)]
        assert 6 <= np.mean(users) <= 10  # 60 / 8 runs a batch
    plain = np.array(flat(ids(reader(files, num_lanes=1, buffer_rows=10**6, batch_size=60).epoch(0))))
    assert np.mean([len(set(batch // 100)) for batch in plain.reshape(-1, 60)]) > 20


def test_rows_held_do_not_grow_with_the_data(files, monkeypatch):
    """Follows every block of rows that reading and shuffling make until it is freed."""
    alive, peak = [], [0]

    def follow(owner, name):
        real = getattr(owner, name)

        def followed(*args):
            rows = real(*args)
            alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(rows["row_id"])]
            peak[0] = max(peak[0], sum(len(ref()) for ref in alive))
            return rows

        monkeypatch.setattr(owner, name, followed)

    follow(reader_module, "read_row_group")
    follow(reader_module, "_shuffled")
    follow(reader_module._Span, "read")

    def peak_of(some_files, world_size, **changes):
        peak[0] = 0
        for batch in reader(some_files, 0, world_size, **changes).epoch(0):
            assert all(column.base is None for column in batch.values())  # a batch that waits holds no window
        return peak[0]

    # A window and a row group per lane; one lane shuffles its next window, or the row group that it has just read.
    bound = 8 * (64 + 100) + 100
    assert 1024 <= peak_of(files[:2], 1) <= bound
    assert 1024 <= peak_of(files, 1) <= bound
    assert peak_of(files, 4) <= 2 * (64 + 100) + 100
    assert peak_of(files, 1, buffer_rows=1) <= 8 * (8 + 100) + 100  # all lanes open a window in every step


def test_columns_have_the_types_of_the_schema_and_none_is_read_unasked(prepared):
    groups = list_row_groups(prepared.files("train"))
    options = {"batch_size": 64, "num_lanes": 8, "rank": 0, "world_size": 1, "seed": 0, "buffer_rows": 512}
    batch = next(TrainReader(groups, **options).epoch(0))
    assert list(batch) == list(read_row_group(groups[0]))
    assert batch["row_id"].dtype == np.int64
    assert {batch[name].dtype for name in ("user_row", "item_row", "scenario", "search_source")} == {np.dtype(np.int32)}
    some = next(TrainReader(groups, **options, columns=["label", "row_id"]).epoch(0))
    assert list(some) == ["label", "row_id"]
    for name, column in some.items():
        np.testing.assert_array_equal(column, batch[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 60}, "batch_size 60 is not a multiple of num_lanes 8"),
        ({"world_size": 9}, "9 workers share num_lanes 8"),
        ({"num_lanes": 4096, "batch_size": 4096}, "3000 rows of train for num_lanes 4096"),
        ({"num_lanes": 0}, "num_lanes is 0"),
        ({"rows_per_user": 0}, "rows_per_user is 0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(files, changes, message):
    with pytest.raises(ValueError, match=message):
        reader(files, **changes)


@pytest.mark.parametrize("damage", ["cut off", "one byte"])
def test_a_damaged_file_is_named(files, tmp_path, damage):
    content, uri = bytearray(Path(files[0][0]).read_bytes()), f"{tmp_path}/bucket-00000.parquet"
    content[60] ^= 0xFF  # in a page: its checksum tells
    Path(uri).write_bytes(content[:-10] if damage == "cut off" else content)
    with pytest.raises(storage.StorageError, match=f"{uri}: not a readable Parquet file"):
        list(reader([(uri, files[0][1])]).epoch(0))


def test_a_file_that_goes_away_and_a_column_that_is_not_there_are_named(files, tmp_path):
    uri = f"{tmp_path}/bucket-00000.parquet"
    storage.copy(files[0][0], uri)
    some = reader([(uri, files[0][1])])
    with pytest.raises(storage.StorageError, match=rf"{uri}: columns \['price'\] are missing"):
        next(reader([(uri, files[0][1])], columns=["row_id", "price"]).epoch(0))
    storage.remove(uri)
    with pytest.raises(storage.StorageError, match=f"{uri}: no such file"):
        next(some.epoch(0))


def test_a_file_with_other_rows_than_the_manifest_is_refused(prepared):
    uri, num_rows = prepared.files("train")[0]
    with pytest.raises(storage.StorageError, match=rf"{uri}: {num_rows} rows, the manifest says 5"):
        list_row_groups([(uri, 5)])


def test_a_store_is_asked_for_the_row_groups_alone(files, bucket, reads, monkeypatch):
    remote = [(f"s3://{bucket}/{uri.rsplit('/', 1)[1]}", num_rows) for uri, num_rows in files]
    for (uri, _), (remote_uri, _) in zip(files, remote, strict=True):
        storage.copy(uri, remote_uri)
    expected, some = ids(reader(files).epoch(0)), reader(remote)
    reads.clear()
    fetched, real = [], s3fs.core._fetch_range

    def fetch(fs, bucket, key, version, start, end, *args, **options):
        fetched.append(end - start)
        return real(fs, bucket, key, version, start, end, *args, **options)

    monkeypatch.setattr(s3fs.core, "_fetch_range", fetch)
    assert ids(some.epoch(0)) == expected
    metadata = {group.uri: group.metadata for group in some.groups}
    groups = [metadata[uri].row_group(index) for uri, index in reads]
    sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    assert fetched == sizes  # no footer again, no read-ahead


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_validation_files_are_shared_out_whole(files, world_size):
    shares = [valid_share(files, rank, world_size) for rank in range(world_size)]
    assert sorted(flat(shares)) == sorted(files)
    assert all(share == [file for file in files if file in share] for share in shares)
    rows = [sum(num_rows for _, num_rows in share) for share in shares]
    assert max(rows) <= TOTAL / world_size + max(FILE_ROWS)
    if world_size == 2:
        assert rows == [1010 + 370 + 8, 999 + 613] or rows == [1010 + 370, 999 + 613 + 8]


def test_read_batches_gives_a_file_in_order(files):
    batches = ids(read_batches(files[0][0], 64))
    assert flat(batches) == list(range(1010))
    assert [len(b) for b in batches] == [64, 36] * 10 + [10]
    assert list(next(read_batches(files[0][0], 64, ["label"]))) == ["label"]


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
