"""Storage verbs on a local disk and on an S3 server: files appear whole or not at all, messages name the file."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import s3fs

from llm4msr import storage
from llm4msr.config import SyntheticConfig
from llm4msr.data import synthetic
from llm4msr.storage import StorageError

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", None]})
BIG = 6 << 20  # longer than one part of an upload, see the server


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    """Uploads come in the smallest parts that S3 takes, so that a big file has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "file", "s3"])
def root(request, tmp_path):
    """A folder in each kind of place."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/root"
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


def names(root: str) -> list[str]:
    return [uri.rsplit("root/", 1)[-1] if "://" in uri else Path(uri).name for uri, _ in storage.list_files(root)]


def read(uri: str) -> bytes:
    fs, path = storage.filesystem(uri)
    return fs.cat_file(path)


# ---------------------------------------------------------------- atomic writes


@pytest.mark.parametrize("size", [0, 10, BIG])
def test_a_finished_write_is_there_whole(root, size):
    uri = storage.join(root, "deep", "er", "file.bin")
    with storage.atomic_write(uri) as file:
        file.write(b"x" * size)
        assert not storage.exists(uri)
    assert read(uri) == b"x" * size
    assert [size for _, size in storage.list_files(root)] == [size]


@pytest.mark.parametrize(("size", "error"), [(0, RuntimeError), (10, KeyboardInterrupt), (BIG, RuntimeError)])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_leaves_nothing(root, size, error, tmp_path):
    uri = storage.join(root, "file.bin")
    with pytest.raises(error, match="stop"), storage.atomic_write(uri) as file:
        file.write(b"x" * size)
        raise error("stop")
    del file
    gc.collect()  # a file object that is thrown away must not publish itself either
    assert not storage.exists(uri)
    assert storage.list_files(root) == []
    if not root.startswith("s3"):
        assert os.listdir(tmp_path) == []


def test_a_failed_write_to_s3_leaves_no_upload_behind(s3_server, bucket):
    with pytest.raises(RuntimeError), storage.atomic_write(f"s3://{bucket}/file.bin") as file:
        file.write(b"x" * BIG)
        raise RuntimeError
    assert "Uploads" not in s3_server.list_multipart_uploads(Bucket=bucket)


@pytest.mark.parametrize("size", [10, BIG])
def test_a_failed_rewrite_keeps_the_old_file(root, size):
    uri = storage.join(root, "file.bin")
    with storage.atomic_write(uri) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), storage.atomic_write(uri) as file:
        file.write(b"x" * size)
        raise RuntimeError
    assert read(uri) == b"old"
    with storage.atomic_write(uri) as file:
        file.write(b"new")
    assert read(uri) == b"new"
    assert names(root) == ["file.bin"]


# ---------------------------------------------------------------- listing


def test_list_files_is_sorted_and_leaves_hidden_names_out(root):
    for name in ("b.parquet", "a.parquet", "a.parquet.gz", "sub/c.parquet", "a-1.parquet"):
        storage.write_json(storage.join(root, name), name)
    for name in ("_SUCCESS", ".hidden.parquet", "sub/_marker.parquet"):
        storage.write_json(storage.join(root, name), name)
    found = storage.list_files(root)
    uris = [uri for uri, _ in found]
    assert uris == sorted(uris)
    ends = ["a-1.parquet", "a.parquet", "a.parquet.gz", "b.parquet", "sub/c.parquet"]
    assert [uri[-len(end) :] for uri, end in zip(uris, ends, strict=True)] == ends
    assert [size for _, size in found] == [len(end) + 3 for end in ends]  # quotes and a line end
    assert len(storage.list_files(root, ".parquet")) == 4
    assert len(storage.list_files(root, (".gz", "b.parquet"))) == 2
    for uri, _ in found:  # what is listed can be opened again
        assert uri.endswith(storage.read_json(uri))
    assert storage.list_files(storage.join(root, "a.parquet")) == [(uris[1], 12)]
    assert storage.list_files(storage.join(root, "nothing")) == []


def test_relative_paths_are_listed_as_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_json("folder/file.json", 1)
    assert storage.list_files("folder") == [(str(tmp_path / "folder" / "file.json"), 2)]
    assert storage.absolute("folder") == str(tmp_path / "folder")
    assert storage.absolute("s3://bucket/folder") == "s3://bucket/folder"


def test_join_and_is_local():
    assert storage.join("s3://b/x/", "y", "z.json") == "s3://b/x/y/z.json"
    assert storage.join("/", "x") == "/x"
    assert storage.join("rel", "x") == "rel/x"
    assert [storage.is_local(uri) for uri in ("/a", "a", "file:///a", "s3://b/a")] == [True, True, True, False]
    assert storage.local_path("file:///a/b") == Path("/a/b")


def test_exists_and_remove(root):
    storage.write_json(storage.join(root, "folder", "file.json"), 1)
    assert storage.exists(storage.join(root, "folder")) and storage.exists(storage.join(root, "folder", "file.json"))
    assert not storage.exists(storage.join(root, "fold"))
    storage.remove(storage.join(root, "nothing"))
    storage.remove(storage.join(root, "folder"))
    assert not storage.exists(storage.join(root, "folder", "file.json"))


def test_the_store_is_asked_anew_each_time(s3_server, bucket):
    assert storage.list_files(f"s3://{bucket}/x") == []
    s3_server.put_object(Bucket=bucket, Key="x/late.json", Body=b"1")  # by somebody else
    assert [uri for uri, _ in storage.list_files(f"s3://{bucket}/x")] == [f"s3://{bucket}/x/late.json"]
    assert storage.exists(f"s3://{bucket}/x/late.json")


def test_fingerprint_changes_with_the_content(root):
    uri = storage.join(root, "file.json")
    storage.write_json(uri, 1)
    first = storage.fingerprint(uri)
    assert first == storage.fingerprint(uri) and first["size"] == 2
    storage.write_json(uri, 2)
    assert storage.fingerprint(uri) != first
    json.dumps(first)


def test_copy_between_places(bucket, tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "a").write_bytes(data)
    storage.copy(str(tmp_path / "a"), f"s3://{bucket}/b")
    storage.copy(f"s3://{bucket}/b", str(tmp_path / "new" / "c"))
    assert (tmp_path / "new" / "c").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        storage.copy(str(tmp_path / "none"), f"s3://{bucket}/none")
    assert not storage.exists(f"s3://{bucket}/none")


# ---------------------------------------------------------------- JSON, Parquet, manifests


def test_json_round_trip(root):
    uri = storage.join(root, "file.json")
    value = {"a": [1, 2.5, None], "中": "文"}
    storage.write_json(uri, value)
    assert storage.read_json(uri) == value
    assert read(uri).decode() == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with pytest.raises(TypeError):
        storage.write_json(uri, {1, 2})
    assert storage.read_json(uri) == value


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff\xfe\xfd", b'{"a": 1} tail'])
def test_damaged_json_is_named(root, damaged):
    uri = storage.join(root, "file.json")
    with storage.atomic_write(uri) as file:
        file.write(damaged)
    with pytest.raises(StorageError, match=r"file\.json: not JSON"):
        storage.read_json(uri)
    with pytest.raises(StorageError, match=r"none\.json: no such file"):
        storage.read_json(storage.join(root, "none.json"))


def test_parquet_round_trip_in_order_of_names(root):
    storage.write_parquet(storage.join(root, "t", "part-1.parquet"), TABLE.slice(1))
    storage.write_parquet(storage.join(root, "t", "part-0.parquet"), TABLE.slice(0, 1))
    storage.write_json(storage.join(root, "t", "other.json"), 1)
    assert storage.read_parquet(storage.join(root, "t")) == TABLE
    assert storage.read_parquet(storage.join(root, "t", "part-1.parquet")) == TABLE.slice(1)
    assert storage.read_parquet(storage.join(root, "t"), ["b"]) == TABLE.select(["b"])
    assert storage.read_parquet(storage.join(root, "t"), (name for name in ("b", "a"))) == TABLE.select(["b", "a"])


def test_folders_named_like_partitions_add_no_columns(root):
    storage.write_parquet(storage.join(root, "split=train", "x.parquet"), TABLE)
    assert storage.read_parquet(root) == TABLE


def test_row_groups(root):
    uri = storage.join(root, "t.parquet")
    storage.write_parquet(uri, TABLE, row_group_size=2)
    fs, path = storage.arrow_filesystem(uri)
    assert pq.ParquetFile(fs.open_input_file(path)).metadata.num_row_groups == 2


def test_arrow_readers_open_every_place(root):
    uri = storage.join(root, "t.csv")
    with storage.atomic_write(uri) as file:
        file.write(b"a,b\n1,x\n")
    fs, path = storage.arrow_filesystem(uri)
    assert pacsv.read_csv(fs.open_input_stream(path)).to_pylist() == [{"a": 1, "b": "x"}]


def test_damaged_parquet_is_named(root):
    with pytest.raises(StorageError, match=r"none: no Parquet file there"):
        storage.read_parquet(storage.join(root, "none"))
    storage.write_parquet(storage.join(root, "t", "a.parquet"), TABLE)
    whole = read(storage.join(root, "t", "a.parquet"))
    with pytest.raises(StorageError, match=r"a\.parquet: columns \['c'\] are missing"):
        storage.read_parquet(storage.join(root, "t"), ["a", "c"])
    for damaged in (b"", b"no parquet at all", whole[:-9], b"\0" * len(whole[:-8]) + whole[-8:]):
        with storage.atomic_write(storage.join(root, "t", "b.parquet")) as file:
            file.write(damaged)
        with pytest.raises(StorageError, match=r"b\.parquet: not a readable Parquet file"):
            storage.read_parquet(storage.join(root, "t"))


def test_manifest_marks_a_finished_directory(root):
    folder = storage.join(root, "run")
    with pytest.raises(StorageError, match=r"run does not exist: run the job"):
        storage.read_manifest(folder, "run the job")
    storage.write_json(storage.join(folder, "part.json"), 1)
    assert not storage.is_finished(folder)
    with pytest.raises(StorageError, match=r"run is unfinished \(no manifest\.json\): run the job"):
        storage.read_manifest(folder, "run the job")
    storage.write_manifest(folder, {"rows": 3})
    assert storage.is_finished(folder)
    assert storage.read_manifest(folder, "run the job") == {"rows": 3}


def test_generated_data_goes_to_s3_too(bucket, tmp_path):
    config = SyntheticConfig(num_users=5, num_items=9, num_shards=2)
    truth = synthetic.generate(config, f"s3://{bucket}/raw")
    assert synthetic.generate(config, f"s3://{bucket}/raw") == truth
    synthetic.generate(config, str(tmp_path))
    files = storage.list_files(f"s3://{bucket}/raw", ".csv")
    assert len(files) == 10
    for uri, size in files:
        assert read(uri) == (tmp_path / uri.removeprefix(f"s3://{bucket}/raw/")).read_bytes() and size > 0
    synthetic.generate(config.model_copy(update={"num_shards": 1}), f"s3://{bucket}/raw")
    assert len(storage.list_files(f"s3://{bucket}/raw", ".csv")) == 5


def test_some_rows_are_read_in_the_order_given_and_other_row_groups_are_not(tmp_path):
    uri = str(tmp_path / "t.parquet")
    table = pa.table({"a": list(range(10)), "b": [str(i) for i in range(10)], "c": [0] * 10})
    storage.write_parquet(uri, table, row_group_size=3)
    assert storage.read_rows(uri, ["b", "a"], [9, 0, 4, 4]).to_pydict() == {
        "b": ["9", "0", "4", "4"],
        "a": [9, 0, 4, 4],
    }
    assert storage.read_rows(uri, ["a"], []).to_pydict() == {"a": []}
    # The first row group is damaged, which is seen by who reads it alone.
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[pq.ParquetFile(uri).metadata.row_group(0).column(0).dictionary_page_offset + 20] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    assert storage.read_rows(uri, ["a"], [5, 3])["a"].to_pylist() == [5, 3]
    with pytest.raises(storage.StorageError, match=r"t\.parquet"):
        storage.read_rows(uri, ["a"], [5, 1])
    with pytest.raises(storage.StorageError, match=r"t\.parquet: columns \['x'\] are missing"):
        storage.read_rows(uri, ["x"], [0])
    with pytest.raises(storage.StorageError, match=r"none\.parquet: no such file"):
        storage.read_rows(str(tmp_path / "none.parquet"), ["a"], [0])


def test_a_local_disk_is_asked_once(tmp_path, monkeypatch):
    uri = str(tmp_path / "t.parquet")
    storage.write_parquet(uri, pa.table({"a": [1]}))
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise OSError("Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        storage.read_parquet(uri)
    assert len(calls) == 1
