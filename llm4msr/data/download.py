"""Fetches a data set, verifies it and unpacks it to a local or s3:// folder, whose manifest is written last.

A file counts as verified where its checksum is the catalogue's, or the one that its publisher serves for it over a
connection of its own. A mirror's checksum is compared too, and finds what was damaged on the way; but who alters a file
alters that as well, so the file is not verified. The manifest says which it was, and holds the SHA-256 found, so that
two downloads can be compared. With a mirror, the publisher is asked for nothing.

What is left out: signatures, logins, and several connections at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llm4msr import storage
from llm4msr.data.archives import ArchiveError, Limits, unpack
from llm4msr.data.catalogue import DataSet, RemoteFile
from llm4msr.data.http import DownloadError, NotThereError, Patience, fetch, fetch_text

DEFAULT_CACHE = Path.home() / ".cache" / "llm4msr"
_PARTS = ".download"
_ZENODO_API = "https://zenodo.org/api/records"

logger = logging.getLogger("llm4msr.download")


@dataclass(frozen=True)
class Expected:
    """What a file should be, as somebody else than its sender says.

    Attributes:
        md5: Lower-case hex.
        sha256: The same.
        num_bytes: Its size.
        source: Who says so; None: nobody.
        is_proof: That this is who made the file, or the catalogue, and not who passed it on.
    """

    md5: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None
    source: str | None = None
    is_proof: bool = True


def download(
    data_set: DataSet,
    to_uri: str,
    *,
    mirror: str | None = None,
    cache: Path | None = None,
    patience: Patience | None = None,
    limits: Limits | None = None,
) -> str:
    """Downloads a data set, unless it is there.

    Args:
        data_set: What to download.
        to_uri: Local or s3:// folder; the data set lands in a folder of its own name below it.
        mirror: http(s):// folder that holds the files under their own names, instead of the publisher's.
        cache: Local folder of files on their way. Default: inside the target, or for s3:// `DEFAULT_CACHE`.
        patience: How long to try.
        limits: What an archive may unpack to.

    Returns:
        URI of the finished folder: the files, and a ``manifest.json`` with their sizes and where they came from.

    Raises:
        DownloadError: A file cannot be fetched or holds wrong bytes, or the target holds something else.
        ArchiveError: An archive is damaged or not safe; nothing of it stays, and unless it was verified it is fetched
            anew next time.
    """
    place = storage.join(storage.absolute(to_uri), data_set.name)
    if is_downloaded(data_set, place):
        logger.info("%s is there already", place)
        return place
    if cache is None and storage.is_local(place):
        folder = storage.local_path(storage.join(place, _PARTS))
    else:
        folder = (cache or DEFAULT_CACHE) / data_set.name
    storage.remove(storage.join(place, storage.MANIFEST))
    origins = []
    for file in data_set.files:
        url = _url(file, mirror)
        expected = find_expected(file, mirror, patience)
        logger.info("%s", url)
        fetch(url, folder / file.name, patience)
        origins.append({"url": url} | verify(folder / file.name, url, expected))
    written: dict[str, int] = {}
    try:
        for file, origin in zip(data_set.files, origins, strict=True):
            _place(file, folder / file.name, place, limits, written, verified=bool(origin["verified_by"]))
    except BaseException:
        for name in written:
            storage.remove(storage.join(place, name))
        raise
    manifest = {
        "kind": "download",
        "name": data_set.name,
        "licence": data_set.licence,
        "homepage": data_set.homepage,
        "origins": origins,
        "files": written,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.write_manifest(place, manifest)
    for file in data_set.files:
        (folder / file.name).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    logger.info("%s: %d files, %.1f MiB", place, len(written), sum(written.values()) / 2**20)
    return place


def is_downloaded(data_set: DataSet, place: str) -> bool:
    """Tells whether a folder holds the whole data set.

    Raises:
        DownloadError: It is a finished folder of something else.
    """
    if not storage.is_finished(place):
        return False
    manifest = storage.read_manifest(place, "a downloaded data set")
    if (manifest.get("kind"), manifest.get("name")) != ("download", data_set.name):
        raise DownloadError(f"{place} holds something else already ({manifest.get('kind')!r}); choose another folder")
    prefix = len(place) + 1
    found = {uri[prefix:]: size for uri, size in storage.list_files(place)}
    lost = [name for name, size in manifest["files"].items() if found.get(name) != size and _is_listed(name)]
    if lost:
        logger.warning("%s: %d of its files are gone or changed, such as %s: again", place, len(lost), lost[0])
    return not lost


def find_expected(file: RemoteFile, mirror: str | None, patience: Patience | None = None) -> Expected:
    """Returns what a file should be: as the catalogue says, or else as the publisher or the mirror does.

    Raises:
        DownloadError: There should be an answer, and it cannot be fetched or understood.
    """
    if file.md5 or file.sha256:
        return Expected(file.md5, file.sha256, None, "the catalogue")
    if file.zenodo_record and mirror is None:
        record_url = f"{_ZENODO_API}/{file.zenodo_record}"
        return parse_zenodo(fetch_text(record_url, patience), file.name, record_url)
    url = file.checksum_url if mirror is None else f"{_url(file, mirror)}.md5"
    if url is None:
        return Expected()
    try:
        return Expected(parse_md5(fetch_text(url, patience), file.name, url), source=url, is_proof=mirror is None)
    except NotThereError:
        return Expected()


def parse_md5(text: str, name: str, url: str) -> str:
    """Returns the MD5 of a file as ``md5sum`` (``HEX  NAME``) or BSD's ``md5`` (``MD5 (NAME) = HEX``) writes it.

    Raises:
        DownloadError: The text holds none for this name.
    """
    escaped = re.escape(name)
    line = (
        rf"(?im)^(?:([0-9a-f]{{32}})(?:\s+\*?(?:\S*/)?{escaped})?|MD5 ?\((?:\S*/)?{escaped}\) ?= ?([0-9a-f]{{32}}))\s*$"
    )
    if not (found := re.search(line, text)):
        raise DownloadError(f"{url}: no MD5 of {name} in it; found {text[:80]!r}")
    return (found[1] or found[2]).lower()


def parse_zenodo(text: str, name: str, url: str) -> Expected:
    """Returns what Zenodo's description of a record says of one of its files.

    Raises:
        DownloadError: It does not describe this file.
    """
    try:
        entry = next(entry for entry in json.loads(text)["files"] if entry["key"] == name)
        kind, _, digest = entry["checksum"].rpartition(":")
        num_bytes = int(entry["size"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise DownloadError(f"{url}: does not describe a file {name!r}; found {text[:80]!r}") from error
    if kind != "md5" or not re.fullmatch("[0-9a-f]{32}", digest):
        raise DownloadError(f"{url}: names {entry['checksum']!r} as the checksum of {name}; an md5 was expected")
    return Expected(md5=digest, num_bytes=num_bytes, source=url)


def verify(path: Path, url: str, expected: Expected) -> dict[str, Any]:
    """Compares a fetched file with what it should be; one with wrong bytes is deleted.

    Returns:
        num_bytes, md5, sha256 as found; compared_with: whose word these agree with, None where there is none; and
        verified_by: the same where it is proof, else None.

    Raises:
        DownloadError: The bytes are wrong.
    """
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            md5.update(chunk)
            sha256.update(chunk)
    found = {"num_bytes": path.stat().st_size, "md5": md5.hexdigest(), "sha256": sha256.hexdigest()}
    for name in ("num_bytes", "sha256", "md5"):
        wanted = getattr(expected, name)
        if wanted is not None and found[name] != wanted:
            path.unlink()
            raise DownloadError(
                f"{url}: wrong bytes: {name} {found[name]} found, {wanted} expected by {expected.source}; deleted. "
                "Run again; if this repeats, the file was replaced, or something on the way alters it"
            )
    verified_by = expected.source if expected.is_proof else None
    if verified_by is None:
        reason = f"the mirror alone says so ({expected.source})" if expected.source else "no checksum is published"
        logger.warning("%s: NOT verified, as %s; its sha256 is %s", url, reason, found["sha256"])
    else:
        logger.info("%s: verified by %s", url, verified_by)
    return found | {"compared_with": expected.source, "verified_by": verified_by}


def _place(
    file: RemoteFile, path: Path, place: str, limits: Limits | None, written: dict[str, int], verified: bool
) -> None:
    """Unpacks or copies one fetched file, and notes what is written as it goes."""
    if file.is_archive:
        try:
            for name, num_bytes in unpack(path, place, limits):
                written[name] = num_bytes
        except ArchiveError:
            if not verified:
                path.unlink()  # another try may bring another file; a verified one would be the same again
            raise
    else:
        storage.copy(str(path), storage.join(place, file.name))
        written[file.name] = path.stat().st_size


def _url(file: RemoteFile, mirror: str | None) -> str:
    return file.url if mirror is None else f"{mirror.rstrip('/')}/{quote(file.name)}"


def _is_listed(name: str) -> bool:
    """Tells whether `storage.list_files` would name a file."""
    return not name.rsplit("/", 1)[-1].startswith(("_", "."))
