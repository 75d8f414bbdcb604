"""Cuts a stream of delimited text into chunks of whole records and says on which physical line each one starts.

A chunk ends with the last newline that stands outside quotes. Where quotes open after a delimiter and close before
one, as they should, numpy finds those newlines at once; where they do not, the chunk is walked record by record and
the first line of a record whose quote does not close is given up, so that one stray quote costs one line, not the
rest of the file.

What is left out: encodings in which a newline is not the byte 0x0A (UTF-16), comments, escape characters other than
the doubled quote. A carriage return that ends no line counts as a space.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm4msr.data.source import DataError
from llm4msr.storage import arrow_filesystem, told

# A quote that is not closed within this many bytes was never meant to be closed.
MAX_RECORD_BYTES = 256 * 2**20
# Stands for a delimiter of several characters, which Arrow cannot split at.
UNIT_SEPARATOR = b"\x1f"

_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


@dataclass(frozen=True)
class Chunk:
    """Whole records: `data` is what Arrow splits, `raw` and `lines` say of each record what and where it was."""

    data: bytes
    raw: pa.StringArray
    lines: np.ndarray
    bad: list[tuple[int, str]]


class Records:
    """Cuts a stream into chunks of whole records and counts physical lines."""

    def __init__(self, uri: str, delimiter: str, quoting: bool, encoding: str, block_bytes: int) -> None:
        assert len(delimiter) == 1 or not quoting, "a delimiter of several characters is split without quoting"
        if '\n,"'.encode(encoding) not in (b'\n,"', b'\xef\xbb\xbf\n,"'):
            raise DataError(f"{uri}: encoding {encoding!r} is not supported: a newline must be one byte; use UTF-8")
        self.uri, self.delimiter, self.quoting, self.block_bytes = uri, delimiter.encode(), quoting, block_bytes
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._pending, self._final, self._line = b"", False, 1
        cell = rb'(?:"(?:[^"]++|"")*+"|(?!")[^%s\n]*+)' % re.escape(self.delimiter)
        self._record = re.compile(rb"%s(?:%s%s)*+(?:\r?\n|\Z)" % (cell, re.escape(self.delimiter), cell))
        self._open = re.compile(rb'(?:%s%s)*+"(?:[^"]++|"")*+\Z' % (cell, re.escape(self.delimiter)))
        fs, path = arrow_filesystem(uri)
        try:
            with told(uri, "read", is_foreign=True):
                self._stream = fs.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None)
        except FileNotFoundError as error:
            raise DataError(f"{uri}: no such file") from error
        except OSError as error:
            raise DataError(f"{uri}: cannot be opened: {error}") from error
        while len(self._pending) < len(codecs.BOM_UTF8) and not self._final:
            self._fill(block_bytes)
        if self._pending.startswith(codecs.BOM_UTF8):
            self._pending = self._pending[len(codecs.BOM_UTF8) :]

    def _fill(self, num_bytes: int) -> None:
        try:
            with told(self.uri, "read", is_foreign=True):
                data = self._stream.read(num_bytes)
        except OSError as error:
            raise DataError(f"{self.uri}: cannot be read after line {self._line}: {error}") from error
        self._final = not data
        self._pending += self._decoder.decode(data, self._final).encode()

    def peek(self) -> bool:
        """Tells whether there is anything left."""
        while not self._pending and not self._final:
            self._fill(self.block_bytes)
        return bool(self._pending)

    def header(self) -> list[str]:
        """Consumes the first record and returns its cells, trimmed."""
        if not self.peek():
            raise DataError(f"{self.uri}: the file is empty")
        while not (match := self._first()) and not self._final and len(self._pending) < MAX_RECORD_BYTES:
            self._fill(max(self.block_bytes, len(self._pending)))
        if not match:
            raise DataError(f"{self.uri}: line 1 is not a header: a quote in it is not closed")
        self._pending = self._pending[len(match) :]
        self._line += match.count(b"\n")
        line, delimiter = _plain_returns(match).decode().rstrip("\r\n"), self.delimiter.decode()
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [""]) if self.quoting else line.split(delimiter)
        except csv.Error as error:
            raise DataError(f"{self.uri}: line 1 is not a header: {error}") from error
        return [cell.strip() for cell in cells]

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def _first(self) -> bytes | None:
        end = self._pending.find(b"\n") + 1
        if not self.quoting:
            return self._pending[:end] if end else self._pending if self._final else None
        match = self._record.match(self._pending)
        if match is None or not (self._final or match.group().endswith(b"\n")):
            return None
        return match.group()

    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks; a single empty one where there is no record."""
        try:
            if not self.peek():
                yield Chunk(b"", pa.array([], pa.string()), np.array([], np.int64), [])
            while self.peek():
                chunk = self._cut()
                if chunk is None:
                    self._fill(max(self.block_bytes, len(self._pending)))
                else:
                    yield chunk
        finally:
            self.close()

    def _cut(self) -> Chunk | None:
        """Takes the whole records off what is pending; None where there is none and more can be read."""
        text = self._pending
        if self._final and not text.endswith(b"\n"):
            text += b"\n"
        quoted = self.quoting and b'"' in text
        ends = _record_ends(text, self.delimiter[0], quoted)
        give_up = self._final or len(text) > MAX_RECORD_BYTES
        if ends is None or (give_up and (not len(ends) or (self._final and ends[-1] != len(text)))):
            return self._cut_exactly(text, give_up)
        if not len(ends):
            return None
        cut = int(ends[-1])
        return self._chunk(text, cut, np.concatenate([[0], ends[:-1]]), ends, quoted)

    def _chunk(self, text: bytes, cut: int, starts: np.ndarray, ends: np.ndarray, quoted: bool) -> Chunk:
        self._pending, text = text[cut:], text[:cut]
        text = _plain_returns(text)
        lines = self._line + np.arange(len(starts))
        self._line += text.count(b"\n") if quoted else len(starts)
        if self._line != lines[0] + len(lines):
            newlines = np.flatnonzero(np.frombuffer(text, np.uint8) == _NEWLINE)
            lines = lines[0] + np.searchsorted(newlines, starts)
        sizes = ends - starts
        first = np.frombuffer(text, np.uint8)[starts]
        blank = (sizes == 1) | ((sizes == 2) & (first == _RETURN))
        if blank.any():
            starts, lines = starts[~blank], lines[~blank]
        offsets = np.append(starts, cut).astype(np.int32)
        raw = pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets), pa.py_buffer(text))
        data = text if len(self.delimiter) == 1 else text.replace(self.delimiter, UNIT_SEPARATOR)
        return Chunk(data, raw, lines, [])

    def _cut_exactly(self, text: bytes, give_up: bool) -> Chunk | None:
        """Does the same record by record where quotes do not pair up; a record that does not end loses one line."""
        position, line = 0, self._line
        records: list[bytes] = []
        lines: list[int] = []
        bad: list[tuple[int, str]] = []
        while position < len(text):
            match = self._record.match(text, position)
            if match and match.group().endswith(b"\n"):
                end = match.end()
                if match.group() not in (b"\n", b"\r\n"):
                    records.append(_plain_returns(match.group()))
                    lines.append(line)
            elif (match or self._open.match(text, position)) and not (self._final or (give_up and not position)):
                break  # it may end in what is still to be read
            else:
                end = text.find(b"\n", position) + 1
                if not end:
                    break
                bad.append((line, _plain_returns(text[position:end]).decode()))
            line += text.count(b"\n", position, end)
            position = end
        if not position:
            return None
        self._pending, self._line = text[position:], line
        offsets = np.cumsum([0, *map(len, records)], dtype=np.int32)
        data = b"".join(records)
        raw = pa.StringArray.from_buffers(len(records), pa.py_buffer(offsets), pa.py_buffer(data))
        return Chunk(data, raw, np.array(lines, np.int64), bad)


def _plain_returns(text: bytes) -> bytes:
    """Makes each carriage return that ends no line a space."""
    if b"\r" not in text or text.count(b"\r") == text.count(b"\r\n"):
        return text
    return re.sub(rb"\r(?!\n)", b" ", text)


def _record_ends(text: bytes, delimiter: int, quoted: bool) -> np.ndarray | None:
    """Returns the offset after each record's newline, or None where quotes do not pair up as they should."""
    codes = np.frombuffer(text, np.uint8)
    newlines = np.flatnonzero(codes == _NEWLINE)
    if not quoted:
        return newlines + 1
    quotes = np.flatnonzero(codes == _QUOTE)
    # Quotes open and close in turn; a doubled quote inside a cell reads as one that closes and one that opens.
    opening, closing = quotes[0::2], quotes[1::2]
    before = np.where(opening > 0, codes[opening - 1], _NEWLINE)
    after = np.where(closing < len(codes) - 1, codes[np.minimum(closing + 1, len(codes) - 1)], _NEWLINE)
    opens = (before == delimiter) | (before == _NEWLINE)
    opens[1:] |= opening[1:] == closing[: len(opening) - 1] + 1
    closes = (after == delimiter) | (after == _NEWLINE) | (after == _RETURN) | (after == _QUOTE)
    if not (opens.all() and closes.all()):
        return None
    start_N: np.ndarray = newlines[np.searchsorted(quotes, newlines) % 2 == 0] + 1
    return start_N
