"""Unpacks archives that somebody else made: nothing lands outside the target, and nothing but plain files does.

Names that are absolute or climb with ``..``, links, devices, encrypted and sparse members are refused, and so is an
archive that unpacks to more than a limit, whatever its table of contents says: a .tar.gz is counted as it is
decompressed, with its headers, which tarfile holds in memory. It is read to its end, as the checksum of its bytes
stands there. Hidden files and what macOS adds (``__MACOSX``) are left out, but count.
"""

from __future__ import annotations

import gzip
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

from llm4msr import storage
from llm4msr.data.source import DataError

_CHUNK_BYTES = 1 << 20
_DRIVE = re.compile(r"[A-Za-z]:")
# What stands before one member of a .tar: its header, and further ones with a long name, attributes, ...
_MAX_HEADER_BYTES = 1 << 16
# A .tar of one small file is mostly padding.
_PADDING_BYTES = 1 << 20
# Less than any file system's own limits, with room for the name of a file that is being written.
_MAX_NAME_BYTES, _MAX_PART_BYTES = 1024, 200
# What the libraries raise where an archive is not as it should be.
_UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


class ArchiveError(DataError):
    """An archive that is damaged or not safe to unpack; the message names it and the member."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold: bytes in all, bytes for each byte of the archive, and members, left out or not."""

    max_bytes: int = 64 * 2**30
    max_ratio: float = 100.0
    max_members: int = 100_000


@dataclass(frozen=True)
class _Member:
    name: str
    num_bytes: int
    kind: str  # file, folder, or what it is that is refused


def unpack(archive: Path, target_uri: str, limits: Limits | None = None) -> Iterator[tuple[str, int]]:
    """Unpacks a .zip or .tar.gz file.

    Args:
        archive: The file.
        target_uri: Folder, local or s3://; files that are there are replaced.
        limits: What it may unpack to.

    Yields:
        Name below the target and size in bytes of each file, once it is written.

    Raises:
        ArchiveError: The archive is damaged or not safe. The members of a .zip are all looked at before anything is
            written; those of a .tar.gz one by one, so that sound ones before a bad one are written by then.
        OSError: The target cannot be written; this says nothing about the archive.
    """
    for name, source, num_bytes in _members(archive, _Budget(archive, limits or Limits())):
        yield name, _write(source, storage.join(target_uri, name), num_bytes, archive)


def _members(archive: Path, budget: _Budget) -> Iterator[tuple[str, IO[bytes], int]]:
    """Yields name, opened content and size of each file to write."""
    with _readable(archive):
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                infos = [(info, budget.admit(_of_zip(info))) for info in opened.infolist()]
                for info, name in infos:
                    if name is not None:
                        with opened.open(info) as source:
                            yield name, source, info.file_size
        else:
            with gzip.open(archive) as file:
                stream = _Counted(file, budget)
                # Its types ask for a whole file; a stream is only read.
                with tarfile.open(fileobj=stream, mode="r|") as opened:  # type: ignore[call-overload]
                    for member in opened:
                        name = budget.admit(_of_tar(member))
                        stream.allow(member.size + _MAX_HEADER_BYTES)
                        if name is not None:
                            source = opened.extractfile(member)
                            assert source is not None
                            yield name, source, member.size
                stream.allow(budget.most + _PADDING_BYTES)
                while stream.read(_CHUNK_BYTES):
                    pass  # tarfile stops before the checksum


class _Counted:
    """The bytes of a .tar, for a reader that takes as many as it is told.

    Args:
        file: Where they come from.
        budget: Says how many there may be in all.
    """

    def __init__(self, file: gzip.GzipFile, budget: _Budget) -> None:
        self._file, self._budget = file, budget
        self._left = budget.most + _PADDING_BYTES
        self.allow(_MAX_HEADER_BYTES)

    def allow(self, num_bytes: int) -> None:
        """Says how many bytes may be read from here to the next call."""
        self._allowed = num_bytes

    def read(self, size: int) -> bytes:
        """Reads at most `size` bytes; raises ArchiveError where it were too many."""
        data = self._file.read(size)
        self._left -= len(data)
        self._allowed -= len(data)
        if self._left < 0:
            raise self._budget.exceeded()
        if self._allowed < 0:
            raise ArchiveError(
                f"{self._budget.archive}: more than {_MAX_HEADER_BYTES:,} bytes stand before one of its members, where "
                "a name and a few attributes were expected"
            )
        return data


class _Budget:
    """Admits members one after another, as long as they are safe and within the limits together."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self.archive, self._limits = archive, limits
        self.most = min(limits.max_bytes, int(archive.stat().st_size * limits.max_ratio))
        # As the archive writes them, by their names on a disk that does not tell A from a.
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        self._num_members = self._num_bytes = 0

    def admit(self, member: _Member) -> str | None:
        """Returns the safe name of a file to write, None for what is left out; raises ArchiveError."""
        name = self._safe_name(member.name)
        self._num_members += 1
        self._num_bytes += member.num_bytes
        if member.kind not in ("file", "folder"):
            raise ArchiveError(f"{self.archive}: {member.name!r} is {member.kind}; only plain files are unpacked")
        if self._num_bytes > self.most or self._num_members > self._limits.max_members:
            raise self.exceeded()
        parts = name.split("/")
        if member.kind == "folder" or not name or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            return None
        if parts[0].casefold() == storage.MANIFEST:
            raise ArchiveError(f"{self.archive}: {member.name!r} would stand where a finished download is marked")
        self._find_place(member.name, name.casefold())
        return name

    def exceeded(self) -> ArchiveError:
        """Returns the error of an archive that holds too much."""
        return ArchiveError(
            f"{self.archive}: unpacks to more than {self.most:,} bytes or {self._limits.max_members:,} members, of "
            f"{self.archive.stat().st_size:,} bytes; refused, as such archives are made to fill disks"
        )

    def _find_place(self, name: str, place: str) -> None:
        """Notes a file and the folders above it; raises ArchiveError where another member stands in its way."""
        *folders, _ = accumulate(place.split("/"), "{}/{}".format)
        if place in self._files:
            raise ArchiveError(f"{self.archive}: {name!r} is in it twice")
        for other in (self._folders.get(place), *map(self._files.get, folders)):
            if other is not None:
                raise ArchiveError(f"{self.archive}: {name!r} and {other!r} cannot both be there: one is a file")
        self._files[place] = name
        for folder in folders:
            self._folders.setdefault(folder, name)

    def _safe_name(self, name: str) -> str:
        parts = name.removesuffix("/").split("/")
        climbs = "" in parts or ".." in parts  # an empty part also stands before a leading slash
        if climbs or "\\" in name or _DRIVE.match(name) or not name.isprintable() or not _is_text(name):
            raise ArchiveError(
                f"{self.archive}: {name[:200]!r} is no path inside the archive; nothing of it is unpacked"
            )
        if len(name.encode()) > _MAX_NAME_BYTES or any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
            raise ArchiveError(f"{self.archive}: {name[:200]!r}... is too long a name")
        return "/".join(part for part in parts if part != ".")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeError:
        return False
    return True


def _of_zip(info: zipfile.ZipInfo) -> _Member:
    mode = stat.S_IFMT(info.external_attr >> 16)
    kind = "folder" if info.is_dir() else "file"
    if info.flag_bits & 1:
        kind = "encrypted"
    elif mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = "a link" if mode == stat.S_IFLNK else "a special file"
    # zipfile cuts the name at a zero byte and turns the other slash; what was written is what is checked.
    return _Member(info.orig_filename, info.file_size, kind)


def _of_tar(member: tarfile.TarInfo) -> _Member:
    kind = "file" if member.isreg() else "folder" if member.isdir() else "a special file"
    if member.issym() or member.islnk():
        kind = "a link"
    elif member.sparse is not None:
        kind = "a file with holes"
    return _Member(member.name, member.size, kind)


def _write(source: IO[bytes], uri: str, num_bytes: int, archive: Path) -> int:
    """Copies one member; it appears whole or not at all."""
    written = 0
    with storage.atomic_write(uri) as target:
        while True:
            with _readable(archive):
                chunk = source.read(_CHUNK_BYTES)
            if not chunk:
                break
            written += len(chunk)
            target.write(chunk)
        if written != num_bytes:  # never more: both libraries stop at the size that they were told
            raise ArchiveError(f"{archive}: {uri} should have {num_bytes:,} bytes and has {written:,}")
    return written


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Tells a damaged archive by what the libraries raise; around reading alone, as a full disk is no damage."""
    try:
        yield
    except ArchiveError:
        raise
    except _UNREADABLE as error:
        raise ArchiveError(f"{archive}: cannot be unpacked: {error}") from error
