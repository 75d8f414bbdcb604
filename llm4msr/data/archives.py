"""Unpacks archives that somebody else made: nothing lands outside the target, and nothing but plain files does.

Names that are absolute or climb with ``..``, links, devices, encrypted and sparse members are refused, and so is an
archive that unpacks to more than a limit, whatever its table of contents says. Hidden files and what macOS adds
(``__MACOSX``) are left out.
"""

from __future__ import annotations

import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm4msr import storage
from llm4msr.data.source import DataError

_CHUNK_BYTES = 1 << 20
_DRIVE = re.compile(r"[A-Za-z]:")


class ArchiveError(DataError):
    """An archive that is damaged or not safe to unpack; the message names it and the member."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to: bytes in all, bytes for each byte of the archive, and files."""

    max_bytes: int = 64 * 2**30
    max_ratio: float = 100.0
    max_files: int = 100_000


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
    """
    limits = limits or Limits()
    budget = _Budget(archive, limits)
    with _readable(archive):
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                infos = [(info, budget.admit(_of_zip(info))) for info in opened.infolist()]
                for info, name in infos:
                    if name is not None:
                        with opened.open(info) as source:
                            yield name, _write(source, storage.join(target_uri, name), info.file_size, archive)
        else:
            with tarfile.open(archive, "r:gz") as opened:
                for member in opened:
                    name = budget.admit(_of_tar(member))
                    if name is not None:
                        source = opened.extractfile(member)
                        assert source is not None
                        yield name, _write(source, storage.join(target_uri, name), member.size, archive)


class _Budget:
    """Admits members one after another, as long as they are safe and within the limits together."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self._archive, self._limits = archive, limits
        self._most = min(limits.max_bytes, int(archive.stat().st_size * limits.max_ratio))
        self._names: set[str] = set()
        self._num_bytes = 0

    def admit(self, member: _Member) -> str | None:
        """Returns the safe name of a file to write, None for what is left out; raises ArchiveError."""
        name = self._safe_name(member.name)
        if member.kind not in ("file", "folder"):
            raise ArchiveError(f"{self._archive}: {member.name!r} is {member.kind}; only plain files are unpacked")
        parts = name.split("/")
        if member.kind == "folder" or not name or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            return None
        if name == storage.MANIFEST:
            raise ArchiveError(f"{self._archive}: {member.name!r} would stand where a finished download is marked")
        if name.casefold() in self._names:
            raise ArchiveError(f"{self._archive}: {member.name!r} is in it twice")
        self._names.add(name.casefold())
        self._num_bytes += member.num_bytes
        if self._num_bytes > self._most or len(self._names) > self._limits.max_files:
            raise ArchiveError(
                f"{self._archive}: unpacks to more than {self._most:,} bytes or {self._limits.max_files:,} files, of "
                f"{self._archive.stat().st_size:,} bytes; refused, as such archives are made to fill disks"
            )
        return name

    def _safe_name(self, name: str) -> str:
        parts = name.removesuffix("/").split("/")
        climbs = "" in parts or ".." in parts  # an empty part also stands before a leading slash
        if climbs or "\\" in name or _DRIVE.match(name) or not name.isprintable() or not _is_text(name):
            raise ArchiveError(f"{self._archive}: {name!r} is no path inside the archive; nothing of it is unpacked")
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
        while chunk := source.read(_CHUNK_BYTES):
            written += len(chunk)
            target.write(chunk)
        if written != num_bytes:  # never more: both libraries stop at the size that they were told
            raise ArchiveError(f"{archive}: {uri} should have {num_bytes:,} bytes and has {written:,}")
    return written


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{archive}: cannot be unpacked: {error}") from error
