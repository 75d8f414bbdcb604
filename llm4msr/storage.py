"""A handful of verbs over local paths and fsspec URIs (``s3://bucket/key``).

Endpoint and credentials of ``s3://`` come from the usual AWS settings (``AWS_ENDPOINT_URL``,
``AWS_ACCESS_KEY_ID``, ...). Nothing here caches: a directory is what the store says it is now.

A remote store that throttles, times out or drops a connection is asked again after longer and longer waits
(`ATTEMPTS`), by every verb here but the open file of `atomic_write`.

Two rules keep half-written output from ever being read:

* A file appears whole or not at all: local files are written beside their place and renamed; an object
  store makes an object visible only when its upload has ended.
* A directory is finished when it holds ``manifest.json``, which is written last; `read_manifest` refuses
  a directory without one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_random_exponential

MANIFEST = "manifest.json"
ATTEMPTS = 6  # some ten seconds in all, beside what the client of the store repeats by itself
# What will not pass by waiting.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

_Verb = TypeVar("_Verb", bound=Callable[..., Any])
logger = logging.getLogger("llm4msr.storage")


class StorageError(ValueError):
    """Something that should be readable is missing or damaged; the message names it."""


class RemoteReadError(StorageError, OSError):
    """A remote file that could not be read, because it is damaged or because the store does not deliver."""


def _persistent(verb: _Verb) -> _Verb:
    """Repeats a verb on a remote `uri`, its first argument, as long as what went wrong may pass."""

    @functools.wraps(verb)
    def persistent(uri: str, *args: Any, **options: Any) -> Any:
        if is_local(uri):
            return verb(uri, *args, **options)
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_random_exponential(multiplier=0.5, max=20),
            stop=stop_after_attempt(ATTEMPTS),
            before_sleep=before_sleep_log(logger, logging.WARNING),
            reraise=True,
        )
        return retrying(verb, uri, *args, **options)

    return persistent  # type: ignore[return-value]


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL)
    from botocore.exceptions import ConnectionError, HTTPClientError

    return isinstance(error, (ConnectionError, HTTPClientError))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of `uri` and the path inside it."""
    fs, path = fsspec.core.url_to_fs(uri, **({"use_listings_cache": False} if uri.startswith("s3://") else {}))
    return fs, path


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


@_persistent
def exists(uri: str) -> bool:
    """Tells whether a file or directory is there."""
    fs, path = filesystem(uri)
    return fs.exists(path)


@_persistent
def list_files(uri: str, suffix: str | tuple[str, ...] = "") -> list[tuple[str, int]]:
    """Lists the files below a directory, or the file itself, sorted by name.

    Names that start with ``.`` or ``_`` are left out: they are unfinished writes and markers.

    Returns:
        (uri, size in bytes) of each; empty where nothing is there.
    """
    return _list_files(uri, suffix)


def _list_files(uri: str, suffix: str | tuple[str, ...]) -> list[tuple[str, int]]:
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    found = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)
    out = []
    for name, info in sorted(found.items()):
        base = posixpath.basename(name)
        if base.endswith(suffix) and not base.startswith((".", "_")):
            out.append((name if is_local(uri) else fs.unstrip_protocol(name), int(info["size"])))
    return out


@_persistent
def fingerprint(uri: str) -> dict[str, Any]:
    """Returns what tells one version of a file from another without reading it: size and time or ETag."""
    fs, path = filesystem(uri)
    info = fs.info(path)
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
    return {"size": int(info["size"]), "version": str(version)}


@_persistent
def remove(uri: str) -> None:
    """Removes a file or a whole directory; nothing happens where nothing is there."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def copy(source_uri: str, target_uri: str) -> None:
    """Copies one file between any two places; the target appears whole or not at all."""
    fs, path = filesystem(source_uri)
    with fs.open(path, "rb") as source, atomic_write(target_uri) as target:
        while chunk := source.read(1 << 24):
            target.write(chunk)


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
    else:
        file = fs.open(path, "wb")
        try:
            yield file
        except BaseException:
            file.discard()  # abandons the multipart upload; close() would publish what was written so far
            file.closed = True  # or the file object would close itself when it is thrown away
            raise
        file.close()


@_persistent
def write_json(uri: str, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_write(uri) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@_persistent
def read_json(uri: str) -> Any:
    """Reads JSON.

    Raises:
        StorageError: The file is missing or not JSON.
    """
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            return json.loads(file.read())
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{uri}: not JSON: {error}") from error


@_persistent
def write_parquet(uri: str, table: pa.Table, row_group_size: int | None = None) -> None:
    """Writes one Parquet file, whole or not at all."""
    with atomic_write(uri) as file:
        pq.write_table(table, file, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)


@_persistent
def read_parquet(uri: str, columns: Iterable[str] | None = None) -> pa.Table:
    """Reads one Parquet file, or all of a directory in order of names.

    Raises:
        StorageError: Nothing is there, a file is damaged, or a column is missing.
    """
    files = _list_files(uri, ".parquet")
    if not files:
        raise StorageError(f"{uri}: no Parquet file there")
    wanted = None if columns is None else list(columns)
    tables = []
    for name, _ in files:
        with _open_parquet(name, wanted) as file:
            tables.append(file.read(wanted))
    tables = tables if wanted is None else [table.select(wanted) for table in tables]
    return pa.concat_tables(tables) if len(tables) > 1 else tables[0]


@_persistent
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


@_persistent
def parquet_metadata(uri: str) -> pq.FileMetaData:
    """Reads the footer of one Parquet file: its schema, and the size and place of each row group.

    Raises:
        StorageError: The file is missing or damaged.
    """
    with _open_parquet(uri, None) as file:
        return file.metadata


@_persistent
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
            # No read-ahead: fsspec's fetches 50 MB after each place. What one read needs is asked for at once.
            fs.open(path, "rb", cache_type="none") if remote else pa.OSFile(path) as source,
            pq.ParquetFile(source, metadata=metadata, pre_buffer=remote, page_checksum_verification=True) as file,
        ):
            if columns is not None and (missing := set(columns) - set(file.schema_arrow.names)):
                raise StorageError(f"{uri}: columns {sorted(missing)} are missing")
            yield file
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file") from error
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri}: not a readable Parquet file: {error}") from error
    except OSError as error:
        kind = RemoteReadError if remote else StorageError
        raise kind(f"{uri}: not a readable Parquet file: {error}") from error


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
    return read_json(join(uri, MANIFEST))


def is_finished(uri: str) -> bool:
    """Tells whether a directory holds a manifest."""
    return exists(join(uri, MANIFEST))
