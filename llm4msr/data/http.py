"""Fetches one file over HTTP(S) into a local one, however often the connection breaks.

What has come is kept in ``NAME.part`` and gone on with, in the same run and in later ones, as long as the server says
that the file is still the same (If-Range with its ETag or Last-Modified); a file that changed, and one of a server
that knows no ranges or names no version, is begun anew. ``NAME`` appears when all of it is there.

Proxies and certificates come from the usual settings (``HTTPS_PROXY``, ``NO_PROXY``, ``REQUESTS_CA_BUNDLE``, ...).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

import requests
import urllib3

import llm4msr
from llm4msr.data.source import DataError

_CHUNK_BYTES = 1 << 16
_LOG_EVERY_S = 10.0
_MAX_WAIT_S = 60.0
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_MAX_TEXT_BYTES = 4 << 20

_Result = TypeVar("_Result")
logger = logging.getLogger("llm4msr.download")


class DownloadError(DataError):
    """A file that cannot be fetched, or is not what it should be; the message names its address."""


class NotThereError(DownloadError):
    """The server has no such file."""


class _BrokenError(Exception):
    """What may pass by trying again."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Patience:
    """How long to try: attempts in a row that bring nothing new, and the first wait, which doubles each time."""

    attempts: int = 8
    first_wait_s: float = 1.0
    timeout_s: float = 60.0


@dataclass(frozen=True)
class _Version:
    """Which version of a file a part is of; `total` in bytes."""

    url: str
    validator: str | None = None
    total: int | None = None


def fetch(url: str, path: Path, patience: Patience | None = None) -> None:
    """Fetches a file; nothing happens where it is there already.

    Args:
        url: http:// or https://.
        path: Where to; beside it lie ``.part`` and ``.part.json`` until then.
        patience: How long to try.

    Raises:
        DownloadError: The server refuses, or the connection broke too often; what has come is kept.
    """
    if path.exists():
        return
    patience = patience or Patience()
    path.parent.mkdir(parents=True, exist_ok=True)
    part, state = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    with _locked(part) as file, requests.Session() as session:
        try:
            _retry(url, patience, lambda: _continue(session, url, file, state, patience), lambda: _size(file))
        except DownloadError as error:
            if _size(file):
                raise type(error)(f"{error}; {part} keeps {_size(file):,} bytes: run again to go on") from error
            raise
        file.flush()
        os.fsync(file.fileno())
        part.rename(path)
    state.unlink(missing_ok=True)


def fetch_text(url: str, patience: Patience | None = None) -> str:
    """Returns a small text file.

    Raises:
        NotThereError: The server has no such file.
        DownloadError: The server refuses, or the connection broke too often, or the file is not small.
    """
    patience = patience or Patience()

    def get() -> bytes:
        with requests.Session() as session, _get(session, url, {}, patience) as response:
            data = b""
            for chunk in _chunks(response):
                data += chunk
                if len(data) > _MAX_TEXT_BYTES:
                    raise DownloadError(f"{url}: more than {_MAX_TEXT_BYTES:,} bytes, where a short text was expected")
            return data

    return _retry(url, patience, get, lambda: 0).decode("utf-8", "replace")


def _retry(url: str, patience: Patience, action: Callable[[], _Result], progress: Callable[[], int]) -> _Result:
    """Repeats an action until it succeeds or has failed too often without more `progress` than ever before."""
    failures, best = 0, progress()
    while True:
        try:
            return action()
        except _BrokenError as error:
            failures = failures + 1 if progress() <= best else 1
            best = max(best, progress())
            if failures >= patience.attempts:
                raise DownloadError(f"{url}: failed {failures} times in a row, the last time with: {error}") from error
            wait_s = patience.first_wait_s * 2 ** (failures - 1) * random.uniform(0.5, 1)
            wait_s = min(max(wait_s, error.wait_s), _MAX_WAIT_S)
            logger.warning("%s: %s; trying again in %.0f s", url, error, wait_s)
            time.sleep(wait_s)


def _continue(session: requests.Session, url: str, file: IO[bytes], state: Path, patience: Patience) -> None:
    """Asks for what is missing of a part, or for the whole file, and appends it."""
    version = _read_version(state)
    if version is None or version.url != url or version.validator is None:
        file.truncate(0)
    have = _size(file)
    if version and have and version.total == have:
        return
    headers = {}
    if version and version.validator is not None and have:
        headers = {"Range": f"bytes={have}-", "If-Range": version.validator}
    with _get(session, url, headers, patience) as response:
        if response.status_code == requests.codes.ok:
            if have:
                logger.info("%s: begun anew, as it changed or its server sends whole files only", url)
            file.truncate(0)
            length = response.headers.get("Content-Length", "")
            version = _Version(url, _validator(response), int(length) if length.isdecimal() else None)
            state.write_text(json.dumps(asdict(version)))
        elif not version or not _goes_on(response, version, have):
            file.truncate(0)
            raise _BrokenError(f"status {response.status_code} with {response.headers.get('Content-Range')!r}, no part")
        told = time.monotonic()
        for chunk in _chunks(response):
            file.write(chunk)
            if time.monotonic() - told > _LOG_EVERY_S:
                told = time.monotonic()
                logger.info("%s: %s", url, _shown(_size(file), version.total))
    if version.total is not None and _size(file) != version.total:
        if _size(file) > version.total:
            file.truncate(0)
        raise _BrokenError(f"the connection ended after {_shown(_size(file), version.total)}")


def _goes_on(response: requests.Response, version: _Version, have: int) -> bool:
    """Tells whether a response is the rest of the version that the part is of."""
    found = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
    if response.status_code != requests.codes.partial_content or not found or int(found[1]) != have:
        return False
    same = _validator(response) in (None, version.validator)
    return same and (version.total is None or found[2] in ("*", str(version.total)))


def _validator(response: requests.Response) -> str | None:
    """Returns what names a version byte for byte: a strong ETag, or the time of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


@contextmanager
def _get(
    session: requests.Session, url: str, headers: dict[str, str], patience: Patience
) -> Iterator[requests.Response]:
    """Opens a response with status 200, 206 or 416; what may pass is a `_BrokenError`."""
    headers = {"Accept-Encoding": "identity", "User-Agent": f"llm4msr/{llm4msr.__version__}"} | headers
    timeout_s = (min(30.0, patience.timeout_s), patience.timeout_s)
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout_s) as response:
            addresses = [one.url for one in (*response.history, response)]
            if url.startswith("https:") and not all(address.startswith("https:") for address in addresses):
                raise DownloadError(f"{url}: leads to {addresses[-1]}, which is not https")
            status, reason = response.status_code, f"{response.status_code} {response.reason}"
            if status in _PASSING:
                wait = response.headers.get("Retry-After", "")
                raise _BrokenError(reason, float(wait) if wait.isdecimal() else 0.0)
            if status in (requests.codes.not_found, requests.codes.gone):
                raise NotThereError(f"{url}: {reason}: no such file there")
            if status not in (200, 206, 416):
                raise DownloadError(f"{url}: {reason}")
            yield response
    except requests.exceptions.SSLError as error:
        raise DownloadError(f"{url}: no safe connection: {error}") from error
    except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise _BrokenError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {error}") from error


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yields the bytes as they are sent; a .gz file stays one, whatever the server calls it."""
    chunks: Iterator[bytes] = response.raw.stream(_CHUNK_BYTES, decode_content=False)
    return chunks


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"{part}: another process is writing it; wait for it or stop it") from error
        yield file


def _read_version(state: Path) -> _Version | None:
    try:
        return _Version(**json.loads(state.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _size(file: IO[bytes]) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _shown(num_bytes: int, total: int | None) -> str:
    return f"{num_bytes / 2**20:,.1f} of {total / 2**20:,.1f} MiB" if total else f"{num_bytes / 2**20:,.1f} MiB"
