"""A handful of verbs over local paths and fsspec URIs (``s3://bucket/key``, ``gs://bucket/key``).

Endpoint and credentials of ``s3://`` come from the usual AWS settings (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
...), those of ``gs://`` from Google's. Nothing here caches: a directory is what the store says it is now.
`llm4msr.remote` says how often a store is asked again, and what its refusal looks like.

Three rules keep half-written output from ever being read:

* A file appears whole or not at all: local files are written beside their place and renamed; an object
  store makes an object visible only when its upload has ended. Of several writers the last one's file stays.
* A directory is finished when it holds ``manifest.json``, which is written last, and removed first; `read_manifest`
  refuses a directory without one.
* Who reads a remote file reads one version of it: if it is replaced meanwhile, it is read again from the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from llm4msr.remote import RemoteError, StorageError, again_if_disturbed, filesystem, told

__all__ = ["RemoteError", "StorageError", "filesystem", "told"]  # beside the verbs

MANIFEST = "manifest.json"


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Returns the same as a pyarrow file system, for Parquet and CSV readers."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return pafs.LocalFileSystem(), path
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def is_local(uri: str) -> bool:
    """Tells whether `uri` names a place on this machine's disk."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """Returns a local `uri` as a path."""
    assert is_local(uri), uri
    return Path(filesystem(uri)[1])


def join(uri: str, *parts: str) -> str:
    """Joins a URI and path parts with single slashes."""
    return posixpath.join(uri.rstrip("/") or "/", *parts)


def absolute(uri: str) -> str:
    """Returns a local path as an absolute one, so that processes with another directory find it; others as they are."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri


def exists(uri: str) -> bool:
    """Tells whether a file or directory is there."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return os.path.exists(path)
    try:
        with told(uri, "read"):
            fs.info(path)  # s3fs's own `exists` takes a bucket that refuses for one that is not there
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str, suffix: str | tuple[str, ...] = "") -> list[tuple[str, int]]:
    """Lists the files below a directory, or the file itself, sorted by name.

    Names that start with ``.`` or ``_`` are left out: they are unfinished writes and markers.

    Returns:
        (uri, size in bytes) of each; empty where nothing is there.
    """
    fs, path = filesystem(uri)
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError), told(uri, "listed"):  # what gcsfs says of a missing bucket
        found = fs.find(path, detail=True)
    out = []
    for name, info in sorted(found.items()):
        base = posixpath.basename(name)
        if info["type"] != "directory" and base.endswith(suffix) and not base.startswith((".", "_")):
            out.append((name if is_local(uri) else fs.unstrip_protocol(name), int(info["size"])))
    return out


def fingerprint(uri: str) -> dict[str, Any]:
    """Returns what tells one version of a file from another without reading it: size and time or ETag."""
    fs, path = filesystem(uri)
    with told(uri, "read"):
        info = fs.info(path)
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
    return {"size": int(info["size"]), "version": str(version)}


def remove(uri: str) -> None:
    """Removes a file or a whole directory; nothing happens where nothing is there.

    Manifests go first: what is left of a removal that was cut short is no finished directory.
    """
    if not exists(uri):
        return
    fs, path = filesystem(uri)
    with told(uri, "removed"):
        for name in fs.find(path):
            if posixpath.basename(name) == MANIFEST:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(name)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)
        for name in [] if is_local(uri) else fs.find(path):  # s3fs says nothing of names that it could not delete
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


@again_if_disturbed
def copy(source_uri: str, target_uri: str) -> None:
    """Copies one file between any two places; the target appears whole or not at all."""
    with open_file(source_uri) as source, atomic_write(target_uri) as target:
        while chunk := _read_chunk(source_uri, source):
            target.write(chunk)


def _read_chunk(uri: str, file: IO[bytes]) -> bytes:
    with told(uri, "read"):
        return file.read(1 << 24)


@contextmanager
def open_file(uri: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: The store refuses, or what is read in the block was replaced meanwhile.
    """
    fs, path = filesystem(uri)
    with told(uri, "read", is_foreign=True), fs.open(path, "rb") as file:
        yield file


@contextmanager
def atomic_write(uri: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when the block ends without an error."""
    fs, path = filesystem(uri)
    if is_local(uri):
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        temporary = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        return
    with told(uri, "written"):
        file = fs.open(path, "wb")
    try:
        with told(uri, "written", is_foreign=True):
            yield file
        with told(uri, "written"):
            file.close()
    except BaseException:
        _abandon(file)
        raise


def _abandon(file: Any) -> None:
    """Gives up what was written so far; close() would publish it, and so would the end of the file object."""
    file.closed = True
    with contextlib.suppress(Exception):  # what stopped the writing may stop this too: it is what is to be told
        file.discard()


@again_if_disturbed
def write_json(uri: str, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_write(uri) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(uri: str) -> Any:
    """Reads JSON.

    Raises:
        StorageError: The file is missing or not JSON.
    """
    fs, path = filesystem(uri)
    try:
        with told(uri, "read"):
            content = fs.cat_file(path)
        return json.loads(content)
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{uri}: not JSON: {error}") from error


@again_if_disturbed
def write_parquet(uri: str, table: pa.Table, row_group_size: int | None = None) -> None:
    """Writes one Parquet file, whole or not at all."""
    with atomic_write(uri) as file:
        pq.write_table(table, file, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)


@again_if_disturbed
def read_parquet(uri: str, columns: Iterable[str] | None = None) -> pa.Table:
    """Reads one Parquet file, or all of a directory in order of names.

    Raises:
        StorageError: Nothing is there, a file is damaged, or a column is missing.
    """
    files = list_files(uri, ".parquet")
    if not files:
        raise StorageError(f"{uri}: no Parquet file there")
    wanted = None if columns is None else list(columns)
    tables = []
    for name, _ in files:
        with _open_parquet(name, wanted) as file:
            tables.append(file.read(wanted))
    tables = tables if wanted is None else [table.select(wanted) for table in tables]
    return pa.concat_tables(tables) if len(tables) > 1 else tables[0]


@again_if_disturbed
def read_rows(uri: str, columns: Iterable[str], rows: Sequence[int] | np.ndarray) -> pa.Table:
    """Reads some rows of one Parquet file, in the order given; row groups that hold none of them are not read.

    Raises:
        StorageError: The file is missing or damaged, or lacks a column.
    """
    wanted, rows = list(columns), np.asarray(rows, np.int64)
    with _open_parquet(uri, wanted) as file:
        sizes = np.array([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)], np.int64)
        starts = np.cumsum(sizes) - sizes
        group = np.searchsorted(np.cumsum(sizes), rows, side="right")
        groups, place = np.unique(group, return_inverse=True)
        table = file.read_row_groups(groups.tolist(), wanted).select(wanted)
        first = np.cumsum(sizes[groups]) - sizes[groups]
        return table.take(rows - starts[group] + first[place])


@again_if_disturbed
def parquet_metadata(uri: str) -> pq.FileMetaData:
    """Reads the footer of one Parquet file: its schema, and the size and place of each row group.

    Raises:
        StorageError: The file is missing or damaged.
    """
    with _open_parquet(uri, None) as file:
        return file.metadata


@again_if_disturbed
def read_row_group(
    uri: str, index: int, columns: Iterable[str] | None = None, metadata: pq.FileMetaData | None = None
) -> pa.Table:
    """Reads one row group of one Parquet file.

    Args:
        uri: The file.
        index: Of the row group, from 0.
        columns: Those to read, in order; all where None.
        metadata: The file's footer where it is at hand, so that it is not read again.

    Raises:
        StorageError: The file is missing or damaged, or lacks a column.
    """
    wanted = None if columns is None else list(columns)
    with _open_parquet(uri, wanted, metadata) as file:
        table = file.read_row_group(index, wanted)
        return table if wanted is None else table.select(wanted)


@contextmanager
def _open_parquet(
    uri: str, columns: list[str] | None, metadata: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    fs, path = filesystem(uri)
    remote = not is_local(uri)
    try:
        with (
            told(uri, "read", is_foreign=True),
            # No read-ahead: fsspec's fetches 50 MB after each place. What one read needs is asked for at once.
            fs.open(path, "rb", cache_type="none") if remote else pa.OSFile(path) as source,
            pq.ParquetFile(source, metadata=metadata, pre_buffer=remote, page_checksum_verification=True) as file,
        ):
            if columns is not None and (missing := set(columns) - set(file.schema_arrow.names)):
                raise StorageError(f"{uri}: columns {sorted(missing)} are missing")
            yield file
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file") from error
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(f"{uri}: not a readable Parquet file: {error}") from error


def write_manifest(uri: str, value: dict[str, Any]) -> None:
    """Marks a directory as finished; call it last."""
    write_json(join(uri, MANIFEST), value)


def read_manifest(uri: str, what: str) -> dict[str, Any]:
    """Reads a finished directory's manifest.

    Args:
        uri: The directory.
        what: What it should be and how to make it, for the message.

    Raises:
        StorageError: The directory is missing or unfinished.
    """
    if not is_finished(uri):
        state = "is unfinished (no manifest.json)" if exists(uri) else "does not exist"
        raise StorageError(f"{uri} {state}: {what}")
    manifest: dict[str, Any] = read_json(join(uri, MANIFEST))
    return manifest


def is_finished(uri: str) -> bool:
    """Tells whether a directory holds a manifest."""
    return exists(join(uri, MANIFEST))
