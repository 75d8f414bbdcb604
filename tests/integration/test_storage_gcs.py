"""The verbs of storage on gs://, with gcsfs, against a server on this machine that speaks Google's JSON API."""

from __future__ import annotations

import subprocess
import sys

import fsspec
import pyarrow as pa
import pytest

from llm4msr import storage
from llm4msr.storage import StorageError

TABLE = pa.table({"a": list(range(5000)), "b": [str(i) for i in range(5000)]})


@pytest.fixture(scope="module")
def root():
    """A folder in a bucket."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        # Read on import: it would ask by gRPC, which the server does not speak.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield "gs://bucket/root"
    server.stop()


def test_each_verb(root, tmp_path):
    value = {"a": [1, None], "中": "文"}
    assert not storage.exists(root) and storage.list_files(root) == []
    storage.write_json(f"{root}/value.json", value)
    assert storage.read_json(f"{root}/value.json") == value
    first = storage.fingerprint(f"{root}/value.json")
    storage.write_json(f"{root}/value.json", [value])
    assert storage.fingerprint(f"{root}/value.json") != first
    with pytest.raises(RuntimeError), storage.atomic_write(f"{root}/value.json") as file:
        file.write(b"x")
        raise RuntimeError
    assert storage.read_json(f"{root}/value.json") == [value]
    storage.write_parquet(f"{root}/t/0.parquet", TABLE, row_group_size=1000)
    assert storage.read_parquet(f"{root}/t") == TABLE
    assert storage.read_rows(f"{root}/t/0.parquet", ["a"], [4999, 3])["a"].to_pylist() == [4999, 3]
    assert storage.parquet_metadata(f"{root}/t/0.parquet").num_row_groups == 5
    assert storage.read_row_group(f"{root}/t/0.parquet", 1) == TABLE.slice(1000, 1000)
    storage.copy(f"{root}/t/0.parquet", str(tmp_path / "copy"))
    storage.copy(str(tmp_path / "copy"), f"{root}/t/1.parquet")
    assert storage.read_parquet(f"{root}/t").num_rows == 2 * TABLE.num_rows
    fs, path = storage.arrow_filesystem(f"{root}/t/0.parquet")
    assert pa.parquet.read_table(path, filesystem=fs) == TABLE
    names = ["t/0.parquet", "t/1.parquet", "value.json"]
    assert [uri for uri, _ in storage.list_files(root)] == [f"{root}/{name}" for name in names]
    assert storage.exists(f"{root}/t") and not storage.exists(f"{root}/none")
    storage.write_manifest(root, value)
    assert storage.is_finished(root) and storage.read_manifest(root, "") == value
    storage.remove(root)
    assert not storage.exists(root) and storage.list_files(root) == []


def test_what_is_missing_is_named(root):
    with pytest.raises(StorageError, match=r"gs://bucket/none\.json: no such file"):
        storage.read_json("gs://bucket/none.json")
    with pytest.raises(
        StorageError, match=r"gs://none/x cannot be written; object store: .*; make the bucket, or mend"
    ):
        storage.write_json("gs://none/x", 1)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "gs://bucket/x: what speaks to such a store is not installed: pip install 'llm4msr[gcs]'"),
        ("ftq://host/x", "ftq://host/x: Protocol not known: ftq; valid are a path, file://, s3:// and gs://"),
    ],
)
def test_a_place_that_nothing_here_speaks_to(uri, message):
    """In a process that cannot import gcsfs."""
    probe = (
        "import sys; sys.modules['gcsfs'] = None; from llm4msr import storage\n"
        f"try: storage.exists('{uri}')\nexcept storage.StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(message), done.stdout + done.stderr
