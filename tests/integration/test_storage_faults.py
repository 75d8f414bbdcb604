"""Storage on an S3 server that throttles, breaks off, lags or refuses: the right result, or one clear line."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from s3_faults import DENIED, EXPIRED, UNKNOWN_KEY, Fault, faulty_here, fresh, refusal, slow_down

from llm4msr import remote, storage
from llm4msr.storage import RemoteError, StorageError

TABLE = pa.table({"a": list(range(5000)), "b": [str(i) for i in range(5000)]})
BIG = os.urandom(11 << 20)  # three parts of an upload
VALUE = {"a": [1, 2.5, None], "中": "文"}


@pytest.fixture
def store(s3_server, monkeypatch):
    """The proxy, which all that this process reads and writes goes through."""
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
    with faulty_here(monkeypatch) as running:
        yield running


@pytest.fixture
def few(store, monkeypatch):
    """Two tries of each request."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    fresh()


@pytest.fixture
def root(bucket, s3_server) -> str:
    """A folder with a file of each kind, written past the proxy."""
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=1000)
    parquet = sink.getvalue().to_pybytes()
    files = {"value.json": json.dumps(VALUE).encode(), "big.bin": BIG, "t/0.parquet": parquet, "t/1.parquet": parquet}
    for name, content in files.items():
        s3_server.put_object(Bucket=bucket, Key=f"root/{name}", Body=content)
    return f"s3://{bucket}/root"


def keys(s3_server, bucket: str) -> list[str]:
    return [entry["Key"] for entry in s3_server.list_objects_v2(Bucket=bucket).get("Contents", [])]


def content(s3_server, uri: str) -> bytes:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return s3_server.get_object(Bucket=bucket, Key=key)["Body"].read()


def opened(uri: str) -> bytes:
    with storage.open_file(uri) as file:
        return file.read()


def write(uri: str, data: bytes) -> None:
    with storage.atomic_write(uri) as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])


def manifest(uri: str) -> dict:
    storage.write_manifest(uri, VALUE)
    return storage.read_manifest(uri, "")


def copied(uri: str) -> bytes:
    storage.copy(f"{uri}/big.bin", f"{uri}/copied")
    return opened(f"{uri}/copied")


def written(uri: str) -> pa.Table:
    storage.write_parquet(f"{uri}/new.parquet", TABLE)
    return storage.read_parquet(f"{uri}/new.parquet")


def removed(uri: str) -> list:
    storage.remove(uri)
    return storage.list_files(uri)


ROWS = pa.table({"a": [4999, 3]})
# What each verb does to the folder, and what must come of it.
VERBS = {
    "exists": (
        lambda uri: [storage.exists(f"{uri}/{name}") for name in ("value.json", "t", "none")],
        [True, True, False],
    ),
    "list_files": (lambda uri: len(storage.list_files(uri)), 4),
    "fingerprint": (lambda uri: storage.fingerprint(f"{uri}/big.bin")["size"], len(BIG)),
    "read_json": (lambda uri: storage.read_json(f"{uri}/value.json"), VALUE),
    "read_parquet": (lambda uri: storage.read_parquet(f"{uri}/t"), pa.concat_tables([TABLE, TABLE])),
    "read_rows": (lambda uri: storage.read_rows(f"{uri}/t/0.parquet", ["a"], [4999, 3]), ROWS),
    "parquet_metadata": (lambda uri: storage.parquet_metadata(f"{uri}/t/0.parquet").num_row_groups, 5),
    "read_row_group": (lambda uri: storage.read_row_group(f"{uri}/t/0.parquet", 1), TABLE.slice(1000, 1000)),
    "open_file": (lambda uri: opened(f"{uri}/big.bin"), BIG),
    "write_manifest": (manifest, VALUE),
    "write_parquet": (written, TABLE),
    "copy": (copied, BIG),
    "remove": (removed, []),
}
PASSING = {
    "throttled": slow_down(2),
    "500": Fault("error", times=2, status=500, code="InternalError", message="We encountered an internal error."),
    "reset": Fault("reset", times=2),
    "lost": Fault("lost", ("GetObject", "ListObjects", "HeadObject", "PutObject", "UploadPart", "DeleteObjects"), 2),
    "cut": Fault("cut", ("GetObject", "ListObjects"), 2),
    "late": Fault("late", times=1, seconds=5),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(fault, store, root, bucket, s3_server, monkeypatch):
    if fault == "late":
        monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 3)
        fresh()
    num_given = 0
    names = VERBS if fault != "late" else ("read_json", "read_parquet", "write_parquet", "remove")
    for name in names:
        verb, expected = VERBS[name]
        store.faults = [replace(PASSING[fault])]
        assert verb(root) == expected, name
        num_given += len(store.given)
        store.given.clear()
    assert num_given >= (len(names) if fault != "cut" else 8)
    assert keys(s3_server, bucket) == []


@pytest.mark.parametrize("verb", ["Create", "UploadPart", "Complete", "PutObject"])
@pytest.mark.parametrize("fault", ["throttled", "500", "reset"])
def test_a_broken_upload_is_gone_on_with(fault, verb, store, root, bucket, s3_server):
    data = BIG[: 1 << 20] if verb == "PutObject" else BIG
    store.faults = [replace(PASSING[fault], verbs=(verb,))]
    write(f"{root}/new.bin", data)
    assert {request.verb for request in store.given} == {verb}
    assert content(s3_server, f"{root}/new.bin") == data
    assert "Uploads" not in s3_server.list_multipart_uploads(Bucket=bucket)


def test_an_upload_whose_end_was_not_heard_of_is_done_again(store, root, s3_server):
    gone = Fault("error", ("Complete",), 1, "", 404, "NoSuchUpload", "The specified upload does not exist.")
    store.faults = [Fault("lost", ("Complete",), 1), gone]
    storage.copy(f"{root}/big.bin", f"{root}/copied")
    assert store.verbs().count("Create") == 2 and content(s3_server, f"{root}/copied") == BIG
    store.faults = [Fault("lost", ("Complete",), 1), replace(gone, times=1)]
    with pytest.raises(RemoteError, match=r"new.bin cannot be written; .*NoSuchUpload.*; somebody else changed it"):
        write(f"{root}/new.bin", BIG)


FOREVER = {
    "throttled": (slow_down(None), r"\(SlowDown\)|\(503\)", "the store throttles: run fewer processes at once"),
    "500": (refusal("InternalError", 500, "We are sorry."), r"\(InternalError\)|\(500\)", "the store or the way to it"),
    "reset": (
        Fault("reset", times=None),
        "ConnectionError|ClosedError|HTTPClientError",
        "see that it answers",
    ),
    "expired": (EXPIRED, r"\(ExpiredToken\) .*: The provided token has expired", "get new ones, then give the same"),
    "unknown": (UNKNOWN_KEY, r"\(InvalidAccessKeyId\) .* does not exist in our records", "the keys of this very store"),
    "denied": (DENIED, r"\(AccessDenied\) .*: Access Denied", "list, read, write and delete are needed in a workspace"),
}


@pytest.mark.parametrize("fault", FOREVER)
def test_what_does_not_pass_is_told_in_one_line(fault, few, store, root, bucket, s3_server):
    before = keys(s3_server, bucket)
    given, said, cure = FOREVER[fault]
    for name, (verb, _) in VERBS.items():
        store.faults = [replace(given)]
        with pytest.raises(RemoteError) as error:
            verb(root)
        message = str(error.value)
        assert re.fullmatch(rf"{root}(/\S+)? cannot be (read|written|listed|removed); object store: .*", message), name
        assert re.search(said, message), f"{name}: {message}"
        assert cure in message
        # A refused HEAD is followed by two questions: is it another region's bucket, and why. What may pass is asked
        # twice; s3fs begins five rounds of that where it may help, and reads in rounds of rounds.
        assert len(store.given) <= (4 if fault in ("expired", "unknown", "denied") else 50), name
        store.given.clear()
    assert keys(s3_server, bucket) == before


def test_a_download_that_always_ends_too_early_is_never_taken_for_the_whole(few, store, root):
    store.faults = [Fault("cut", ("GetObject",), None)]
    for name in ("read_json", "read_parquet", "read_rows", "open_file", "copy"):
        with pytest.raises(RemoteError, match=rf"{root}/\S+ cannot be read; object store: "):
            VERBS[name][0](root)


@pytest.mark.parametrize("size", [1000, len(BIG)])
def test_a_write_that_fails_at_its_end_leaves_the_old_file_for_good(size, few, store, root, bucket, s3_server):
    for fault in (slow_down(None, "PutObject", "Complete"), replace(EXPIRED, verbs=("PutObject", "Complete"))):
        store.faults = [fault]
        with pytest.raises(RemoteError, match=r"root/value.json cannot be written; object store: "):
            write(f"{root}/value.json", BIG[:size])
        store.faults = []
        gc.collect()  # a file object that is thrown away must not publish itself either
        assert storage.read_json(f"{root}/value.json") == VALUE
        assert "Uploads" not in s3_server.list_multipart_uploads(Bucket=bucket)


def test_a_bucket_that_is_not_there_is_named(store, root):
    for verb in (storage.exists, storage.read_json, storage.list_files, lambda uri: storage.write_json(uri, 1)):
        with pytest.raises(StorageError, match=r"s3://none/x cannot be .*NoSuchBucket.*; make the bucket, or mend its"):
            verb("s3://none/x")


def test_a_bucket_that_refuses_is_not_one_that_is_missing(few, store, bucket):
    store.faults = [replace(DENIED)]
    for verb in (storage.exists, storage.list_files, storage.remove):
        with pytest.raises(RemoteError, match=rf"s3://{bucket} cannot be .*AccessDenied"):
            verb(f"s3://{bucket}")


def test_names_that_a_store_does_not_delete_are_told(few, store, root, bucket, s3_server):
    """S3 answers to a request for many names with 200, and says in its body which it refused."""
    store.faults = [
        Fault("error", ("DeleteObjects",), None, "", 200, "AccessDenied"),
        replace(DENIED, verbs=("DeleteObject",)),
    ]
    with pytest.raises(RemoteError, match=rf"{root} cannot be removed; .*AccessDenied"):
        storage.remove(root)


def test_a_finished_folder_loses_its_manifest_first(few, store, root, bucket, s3_server):
    storage.write_manifest(f"{root}/t", VALUE)
    store.faults = [slow_down(None, "DeleteObjects")]
    with pytest.raises(RemoteError, match="cannot be removed"):
        storage.remove(root)
    store.faults = []
    assert "root/t/0.parquet" in keys(s3_server, bucket) and not storage.is_finished(f"{root}/t")


@pytest.mark.parametrize(("setting", "tries"), [({}, remote.ATTEMPTS), ({"AWS_MAX_ATTEMPTS": "3"}, 3), ("profile", 4)])
def test_the_usual_settings_say_how_often(setting, tries, store, root, monkeypatch, tmp_path):
    if setting == "profile":
        (tmp_path / "config").write_text("[default]\nmax_attempts = 4\n")
        setting = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    fresh()
    store.faults = [refusal("InternalError", 500, "We are sorry.")]
    with pytest.raises(RemoteError):
        storage.write_json(f"{root}/new.json", 1)
    assert store.verbs() == ["PutObject"] * tries


def test_a_hundred_throttled_at_once_all_end_well(store, bucket, s3_server):
    store.faults = [slow_down(60)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_json(f"s3://{bucket}/{i}.json", i), range(100)))
        assert list(pool.map(lambda i: storage.read_json(f"s3://{bucket}/{i}.json"), range(100))) == list(range(100))
    assert len(store.given) == 60


# ---------------------------------------------------------------- several at once


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("store")
    return f"s3://{request.getfixturevalue('bucket')}/place"


def test_readers_see_one_writers_file_whole(place):
    """Writers replace a file of several parts while it is read: bytes, Parquet and JSON are of one of them each."""
    num_rows, ended = 200_000, threading.Event()
    tables = [pa.table({"a": [w] * num_rows, "b": os.urandom(num_rows).hex()[:0] or [w] * num_rows}) for w in range(3)]

    def publish(writer: int) -> None:
        write(f"{place}/bytes", bytes([writer]) * len(BIG))
        storage.write_parquet(f"{place}/table.parquet", tables[writer], row_group_size=20_000)
        storage.write_manifest(place, {"writer": [writer] * 1000})

    def go_on(writer: int) -> None:
        while not ended.is_set():
            publish(writer)

    publish(0)
    seen = set()
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(go_on, writer) for writer in range(3)]
        try:
            for _ in range(200):
                storage.copy(f"{place}/bytes", f"{place}/copied")
                data = opened(f"{place}/copied")
                assert len(data) == len(BIG) and len(set(data[:: 1 << 16])) == 1
                table = storage.read_parquet(f"{place}/table.parquet")
                found = {*table["a"].unique().to_pylist(), *table["b"].unique().to_pylist()}
                assert len(found) == 1 and table.num_rows == num_rows
                (writer,) = set(storage.read_manifest(place, "")["writer"])
                seen |= {data[0], *found, writer}
                if len(seen) == 3:
                    break
        finally:
            ended.set()
        for one in writers:
            one.result()
    assert seen == {0, 1, 2}
    assert sorted(uri.rsplit("/", 1)[-1] for uri, _ in storage.list_files(place)) == [
        *("bytes", "copied", "manifest.json", "table.parquet")
    ]


def test_a_file_replaced_while_it_is_read_is_read_again(store, root, s3_server, bucket):
    """Between the request for a file's size and those for its content."""
    other = pa.table({"a": list(range(9)), "b": ["x"] * 9})
    sink = pa.BufferOutputStream()
    pq.write_table(other, sink)
    asked, passed_on = [], store.take

    def replacing(request):
        if request.verb == "GetObject" and not asked:
            asked.append(request)
            s3_server.put_object(Bucket=bucket, Key="root/t/0.parquet", Body=sink.getvalue().to_pybytes())
        return passed_on(request)

    store.take = replacing
    assert storage.read_parquet(f"{root}/t/0.parquet") == other
    assert asked


# ---------------------------------------------------------------- listings that lag


def test_what_is_asked_for_by_name_needs_no_listing(store, root):
    store.faults = [Fault("stale", ("ListObjects",), None, hidden="new|manifest")]
    storage.write_manifest(f"{root}/t", VALUE)
    storage.write_parquet(f"{root}/new.parquet", TABLE)
    assert storage.is_finished(f"{root}/t") and storage.read_manifest(f"{root}/t", "") == VALUE
    assert storage.read_parquet(f"{root}/new.parquet") == TABLE
    assert storage.list_files(f"{root}/new.parquet")
    assert len(storage.list_files(root)) == 4
    storage.remove(f"{root}/new.parquet")
    assert not storage.exists(f"{root}/new.parquet")


# ---------------------------------------------------------------- a command, as a person sees it


@pytest.mark.parametrize("fault", FOREVER)
def test_a_command_ends_with_one_line_and_status_2(fault, few, store, root):
    given, said, cure = FOREVER[fault]
    store.faults = [replace(given)]
    command = [sys.executable, "-m", "jobs.status", "--workspace_uri", root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.match(rf"python -m jobs.status: {root}\S* cannot be (read|listed); object store: ", done.stderr)
    assert re.search(said, done.stderr) and cure in done.stderr
