"""The version of each raw file, from which the place of the prepared data follows.

A file in an object store has an ETag. A local one is known by its content: it keeps its version when it is copied,
mounted anew or touched, so that nothing trained from it is trained again. What was read is noted beside the prepared
data with the file's size and time, and read again only when one of these changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm4msr import storage

READERS = 8  # files read at once; hashing lets go of the interpreter
WORTH_A_LINE_BYTES = 10**9  # about a second on one core

_log = logging.getLogger(__name__)


def file_versions(uris: Sequence[str], notes_uri: str) -> list[dict[str, Any]]:
    """Returns the size and version of each file, as JSON has them.

    Args:
        uris: The files.
        notes_uri: JSON file that keeps what was found of local ones; made if there is none.

    Raises:
        StorageError: A file cannot be read, or the notes cannot be written.
    """
    prints = [storage.fingerprint(uri) for uri in uris]
    local = {uri: found for uri, found in zip(uris, prints, strict=True) if storage.is_local(uri)}
    if not local:
        return prints
    notes = storage.read_json(notes_uri) if storage.exists(notes_uri) else {}
    known = {uri: note["sha256"] for uri, note in notes.items() if note["fingerprint"] == local.get(uri)}
    unread = [uri for uri in local if uri not in known]
    num_bytes = sum(local[uri]["size"] for uri in unread)
    if num_bytes > WORTH_A_LINE_BYTES:
        _log.info("reading %d new raw files, %.1f GB, to tell their version", len(unread), num_bytes / 1e9)
    with ThreadPoolExecutor(READERS) as pool:
        known |= dict(zip(unread, pool.map(_sha256, unread), strict=True))
    if unread:
        new = {uri: {"fingerprint": local[uri], "sha256": known[uri]} for uri in unread}
        storage.write_json(notes_uri, notes | new)
    return [
        {"size": found["size"], "version": known.get(uri, found["version"])}
        for uri, found in zip(uris, prints, strict=True)
    ]


def _sha256(uri: str) -> str:
    try:
        with open(storage.local_path(uri), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage.StorageError(f"{uri}: cannot be read ({os.strerror(error.errno or 0)})") from error
