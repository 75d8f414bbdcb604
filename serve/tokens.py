"""Bearer tokens: who may call.

Several are valid at a time, so that one can be replaced without a moment at which callers are refused: add the new one,
let the callers change, remove the old one. A file is read again when it changes; tokens of the environment stay until
the replica restarts.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from llm4msr.config import ConfigError

logger = logging.getLogger("llm4msr.serve")

TOKENS_VARIABLE, FILE_VARIABLE = "LLM4MSR_TOKENS", "LLM4MSR_TOKENS_FILE"
MIN_LENGTH = 16
LOOK_EVERY_S = 2.0


class Tokens:
    """The valid tokens, from the variable LLM4MSR_TOKENS (separated by commas) or the file LLM4MSR_TOKENS_FILE names.

    A file has one token a line; empty lines and those that start with # are left out. While it cannot be read or holds
    no valid token, those of before stay valid.

    Args:
        environ: The process's environment.

    Raises:
        ConfigError: Neither or both are set, or there is no token of at least 16 characters.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        text, path = environ.get(TOKENS_VARIABLE), environ.get(FILE_VARIABLE)
        if (text is None) == (path is None):
            raise ConfigError(
                f"set {TOKENS_VARIABLE} (tokens, separated by commas) or {FILE_VARIABLE} (a file with one a line), one "
                "of them, on every node; or let everybody in with auth = 'off'"
            )
        self._path = None if path is None else Path(path)
        self._stamp: tuple[float, int] | None = None
        self._looked = -LOOK_EVERY_S
        self._digests: tuple[bytes, ...] = ()
        if text is not None:
            self._digests = _digests(text.split(","), TOKENS_VARIABLE)
        else:
            self._read()

    def accepts(self, authorization: str | None) -> bool:
        """Tells whether a header ``Authorization: Bearer TOKEN`` holds a valid token, in the same time for all."""
        self._look()
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip()) if scheme.lower() == "bearer" else b""
        # Each is compared, and in constant time: how long an answer takes says nothing about how much was right.
        return sum(hmac.compare_digest(given, valid) for valid in self._digests) > 0

    def example(self, environ: Mapping[str, str]) -> str:
        """Returns a valid token."""
        text = environ.get(TOKENS_VARIABLE)
        return _tokens(text.split(",") if text is not None else self._path.read_text(encoding="utf-8").splitlines())[0]

    def _look(self) -> None:
        """Reads the file again if it has changed, looking every few seconds."""
        now = time.monotonic()
        if self._path is None or now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            self._read()
        except ConfigError as error:
            logger.error("%s; the tokens of before stay valid", error)

    def _read(self) -> None:
        try:
            found = os.stat(self._path)
            stamp = (found.st_mtime, found.st_size)
            if stamp == self._stamp:
                return
            self._digests = _digests(self._path.read_text(encoding="utf-8").splitlines(), f"{self._path}")
            self._stamp = stamp
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{FILE_VARIABLE}={self._path}: cannot be read: {error}") from error


def _digests(tokens: list[str], where: str) -> tuple[bytes, ...]:
    found = _tokens(tokens)
    short = [number for number, token in enumerate(found, start=1) if len(token) < MIN_LENGTH]
    if short:
        raise ConfigError(f"{where}: token {short[0]} has fewer than {MIN_LENGTH} characters: it could be guessed")
    if not found:
        raise ConfigError(f"{where}: no token: one of at least {MIN_LENGTH} characters is needed")
    return tuple(map(_digest, found))


def _tokens(texts: list[str]) -> list[str]:
    found = [text.strip() for text in texts]
    return [text for text in found if text and not text.startswith("#")]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
