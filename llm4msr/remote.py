"""Object stores: how often their clients ask again, and what a person is told when that was in vain.

Every request to a store is repeated by the store's own client, in all that reads and writes, open files included:

* ``s3://`` by botocore in its mode "standard": `ATTEMPTS` tries with random waits of up to 1, 2, 4, 8, 16, 20, 20, ...
  seconds, where a connection fails or breaks, an answer takes more than 15 s, or its status is 500, 502, 503, 504 or
  429. AWS_MAX_ATTEMPTS and AWS_RETRY_MODE, or ``max_attempts`` and ``retry_mode`` of a profile, say otherwise. s3fs
  begins up to five such rounds where a store throttles (SlowDown), a connection breaks or a download ends too early.
* ``gs://`` by gcsfs: six tries with waits of up to 1, 2, 4, ... seconds.

What waiting does not mend (rights, keys that ran out, a bucket that is not there) is not tried again. There is no limit
on the time of a whole verb, and no loop of our own around it but that of `again_if_disturbed`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random

ATTEMPTS = 7  # some 25 s where each is answered at once, 51 s at most; throttled five times that
# Modules of the clients' own errors, which s3fs and pyarrow may have put inside an OSError.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")
_CURES = (
    (
        ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestTimeTooSkewed", "RefreshError"),
        "the credentials have run out (or this machine's clock is wrong): get new ones, then give the same command",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "CredentialsError", "AuthorizationHeaderMalformed", "401"),
        "give all nodes the keys of this very store",
    ),
    (
        ("AccessDenied", "AllAccessDisabled", "403", "Forbidden"),
        "these credentials may not do this: list, read, write and delete are needed in a workspace",
    ),
    (("NoSuchBucket", "FileNotFoundError"), "make the bucket, or mend its name"),
    (
        ("SlowDown", "503", "429", "ServiceUnavailable"),
        "the store throttles: run fewer processes at once, and give the same command, which goes on",
    ),
    (("FileExpired", "NoSuchUpload"), "somebody else changed it meanwhile: give the same command"),
)
_MISSING = ("NoSuchBucket", "NoSuchUpload")  # is no missing file, though s3fs says so
_OTHERWISE = "the store or the way to it is disturbed: see that it answers from this node, then give the same command"


class StorageError(ValueError):
    """Something that should be readable is missing or damaged, or a store refuses; the message names the place."""


class RemoteError(StorageError, OSError):
    """An object store did not do what it was asked; the message names the place, what was said, and what helps."""


class Disturbed(RemoteError):
    """A file was replaced while it was read, or its upload was gone at the end: to do it again from the start helps."""


again_if_disturbed = retry(
    retry=retry_if_exception_type(Disturbed), wait=wait_random(0, 0.5), stop=stop_after_attempt(5), reraise=True
)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of `uri` and the path inside it; nothing is asked of a store yet.

    Raises:
        StorageError: Nothing installed here speaks to such a place.
    """
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        options = {"use_listings_cache": False, "config_kwargs": {"retries": _retries()}}
    elif uri.startswith(("gs://", "gcs://")):
        options = {"use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        extra = "pip install 'llm4msr[gcs]', on all nodes" if uri.startswith(("gs://", "gcs://")) else str(error)
        raise StorageError(f"{uri}: what speaks to such a store is not installed: {extra}") from error
    except ValueError as error:
        raise StorageError(f"{uri}: {error}; valid are a path, file://, s3:// and gs://") from error
    return fs, path


@functools.cache  # a session takes a quarter of a second
def _retries() -> dict[str, Any]:
    """Returns what botocore is told about trying again: nothing that the user has set."""
    from botocore.session import Session

    session = Session()
    retries: dict[str, Any] = {}
    if session.get_config_variable("max_attempts") is None:
        retries["total_max_attempts"] = ATTEMPTS
    if "AWS_RETRY_MODE" not in os.environ and "retry_mode" not in session.get_scoped_config():
        retries["mode"] = "standard"
    return retries


def client_error(error: BaseException | None) -> BaseException | None:
    """Returns what the client of a store raised, `error` or what it came from; None where there is no such thing."""
    while error is not None and type(error).__module__.partition(".")[0] not in _CLIENTS:
        error = error.__cause__
    return error


@contextmanager
def told(uri: str, deed: str, is_foreign: bool = False) -> Iterator[None]:
    """Turns what a store's client raises inside the block into a `RemoteError`; FileNotFoundError stays one.

    Where it is to be written, that is one as well: a bucket is missing.

    Args:
        uri: The place; nothing is done for a local one.
        deed: What cannot be done to it: read, written, listed, removed.
        is_foreign: Other code runs in the block as well, whose OSErrors are none of the store's.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        found = client_error(error)
        code = _code(found)
        is_local = "://" not in uri or uri.startswith("file://")
        is_ours = found is None and (is_foreign or not isinstance(error, OSError))
        is_missing = isinstance(error, FileNotFoundError) and deed != "written" and code not in _MISSING
        if is_local or is_ours or is_missing:
            raise
        if code in ("400", "403") and getattr(found, "operation_name", "").startswith("Head"):
            found = _why(uri) or found  # the answer to a HEAD has no body that could say it
        said = f"{type(found or error).__name__}: {' '.join(str(found or error).split())}"
        kind = Disturbed if _code(found) in ("FileExpired", "NoSuchUpload") else RemoteError
        raise kind(f"{uri} cannot be {deed}; object store: {said}; {_cure(found or error)}") from error


def _code(error: BaseException | None) -> str:
    """Returns the store's own word for what is wrong, or the name of the client's error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "code", "") or type(error).__name__)


def _cure(error: BaseException) -> str:
    code = _code(error)
    return next((cure for words, cure in _CURES if any(word in code for word in words)), _OTHERWISE)


def _why(uri: str) -> BaseException | None:
    """Asks for one name of the bucket, to hear from the refusal what is wrong."""
    fs, path = filesystem(uri)
    try:
        fs.call_s3("list_objects_v2", Bucket=fs.split_path(path)[0], MaxKeys=1)
    except Exception as error:
        return client_error(error)
    return None
