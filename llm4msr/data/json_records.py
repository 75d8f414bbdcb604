"""Streams one file of JSON objects as typed Arrow blocks; what cannot be used comes out as rejects with the exact line.

The objects stand one after another: each on a line of its own, or pretty-printed over several, or both in turn. An
object begins where a line begins with ``{``, so a damaged one costs itself and nothing after it. A block of sound
objects is read by pyarrow at once; one that pyarrow refuses is read object by object.

Python's own notation (``{'a': "it's"}``), in which some old files are published, is read as well, slowly. What is left
out: objects inside a list, encodings in which a newline is not the byte 0x0A, and guessing types.
"""

from __future__ import annotations

import ast
import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from llm4msr.data.csv import LINE, RAW, RAW_CHARS
from llm4msr.data.source import Block, DataError
from llm4msr.schema import REJECTS
from llm4msr.storage import arrow_filesystem, told

NOT_JSON = "not JSON"
WRONG_TYPE = "wrong type"

# An object that has not ended within this many bytes was never meant to end.
MAX_OBJECT_BYTES = 64 * 2**20
# Python's parser takes hundreds of times the memory of its text.
_MAX_LITERAL_CHARS = 2**20
_NEWLINE, _BRACE = b"\n{"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Field:
    """One field to read; a field that an object does not have, or that is null, is null.

    Attributes:
        name: In the objects and in the yielded table; `LINE` and `RAW` are taken.
        type: string, float64 (any number), int64, or lists of them; a value of another type rejects its object.
        from_number: type is string, and numbers are taken as their text.
    """

    name: str
    type: pa.DataType
    from_number: bool = False


def read_json(uri: str, fields: Sequence[Field], *, block_bytes: int = 16 * 2**20) -> Iterator[Block]:
    """Streams a file, local or remote, plain or ``.gz``.

    Args:
        uri: The file, in UTF-8. Bytes that are not valid become U+FFFD.
        fields: What to read; other fields are skipped.
        block_bytes: Text per block; an object that is longer is still read whole.

    Yields:
        Blocks. Tables hold the fields in the order given, then `LINE` (int64, physical line from 1 on which the object
        begins) and `RAW` (string, the object's text). Rejects have the reason ``not JSON`` or ``wrong type``.

    Raises:
        DataError: The file is missing, empty or damaged.
    """
    line, num_bytes = 1, 0
    for text in _texts(uri, block_bytes):
        yield _block(text, line, fields, uri)
        line += text.count(b"\n")
        num_bytes += len(text)
    if not num_bytes:
        raise DataError(f"{uri}: the file is empty")


def _texts(uri: str, block_bytes: int) -> Iterator[bytes]:
    """Yields the file's text in pieces that end before a line that begins an object."""
    fs, path = arrow_filesystem(uri)
    try:
        with told(uri, "read", is_foreign=True):
            stream = fs.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be opened: {error}") from error
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    pending, lines_done = b"", 0
    with stream:
        while True:
            try:
                with told(uri, "read", is_foreign=True):
                    data = stream.read(max(block_bytes, len(pending)))
            except OSError as error:
                last = 1 + lines_done + pending.count(b"\n")
                raise DataError(f"{uri}: cannot be read after line {last}: {error}") from error
            pending += decoder.decode(data, not data).encode()
            if not data:
                break
            cut = pending.rfind(b"\n{") + 1
            if not cut and len(pending) > MAX_OBJECT_BYTES:
                cut = pending.rfind(b"\n") + 1 or len(pending)
            if cut:
                yield pending[:cut]
                lines_done += pending.count(b"\n", 0, cut)
                pending = pending[cut:]
    if pending:
        yield pending


def _block(text: bytes, first_line: int, fields: Sequence[Field], uri: str) -> Block:
    codes = np.frombuffer(text, np.uint8)
    starts = np.flatnonzero((codes[:-1] == _NEWLINE) & (codes[1:] == _BRACE)) + 1
    if text[: starts[0] if len(starts) else len(text)].strip():
        starts = np.concatenate([[0], starts])
    lines = first_line + np.searchsorted(np.flatnonzero(codes == _NEWLINE), starts)
    table = _read_at_once(text, fields) if len(starts) else None
    if table is None or len(table) != len(starts):
        return _read_one_by_one(text, starts, lines, fields, uri)
    offsets = pa.py_buffer(np.append(starts, len(text)).astype(np.int32))
    raw = pa.StringArray.from_buffers(len(starts), offsets, pa.py_buffer(text))
    table = table.append_column(LINE, pa.array(lines, pa.int64())).append_column(RAW, raw)
    return Block(table, REJECTS.empty_table())


def _read_at_once(text: bytes, fields: Sequence[Field]) -> pa.Table | None:
    """Returns the fields of all objects, None where one of them is not as it should be."""
    try:
        return pajson.read_json(
            pa.BufferReader(text),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pajson.ParseOptions(
                explicit_schema=pa.schema([(field.name, field.type) for field in fields]),
                newlines_in_values=True,
                unexpected_field_behavior="ignore",
            ),
        ).select([field.name for field in fields])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _read_one_by_one(text: bytes, starts: np.ndarray, lines: np.ndarray, fields: Sequence[Field], uri: str) -> Block:
    found: list[tuple[dict[str, Any], int, str]] = []
    rejects: list[tuple[int, str, str, str]] = []
    for start, end, line in zip(starts.tolist(), [*starts[1:].tolist(), len(text)], lines.tolist(), strict=True):
        chunk, position = text[start:end].decode(), 0
        while position < len(chunk):
            if chunk[position].isspace():
                position += 1
                continue
            at = line + chunk.count("\n", 0, position)
            try:
                value, after = _decode(chunk, position)
            except (ValueError, RecursionError) as error:
                rejects.append((at, NOT_JSON, _explain(error, chunk, position), chunk[position:]))
                break
            raw = chunk[position:after]
            if isinstance(value, dict):
                found.append((value, at, raw))
            else:
                detail = f"expected an object {{...}}, found {type(value).__name__}"
                rejects.append((at, NOT_JSON, detail, raw))
            position = after
    columns, wrong = _columns(found, fields)
    rejects += [(found[row][1], WRONG_TYPE, detail, found[row][2]) for row, detail in sorted(wrong.items())]
    table = pa.table(columns)
    table = table.append_column(LINE, pa.array([line for _, line, _ in found], pa.int64()))
    table = table.append_column(RAW, pa.array([raw for *_, raw in found], pa.string()))
    good = np.ones(len(found), bool)
    good[list(wrong)] = False
    rejects.sort(key=lambda reject: reject[0])
    return Block(
        table.filter(pa.array(good)),
        pa.table(
            [
                pa.array([uri] * len(rejects), pa.string()),
                *(pa.array([reject[i] for reject in rejects], REJECTS.field(i + 1).type) for i in range(3)),
                pa.array([raw.rstrip("\r\n")[:RAW_CHARS] for *_, raw in rejects], pa.string()),
            ],
            schema=REJECTS,
        ),
    )


def _decode(chunk: str, position: int) -> tuple[Any, int]:
    """Returns the value that begins at `position` and where it ends; ValueError where there is none."""
    try:
        return _DECODER.raw_decode(chunk, position)
    except ValueError:
        literal = chunk[position:].strip()
        if not literal.startswith("{") or len(literal) > _MAX_LITERAL_CHARS:
            raise
        try:
            return ast.literal_eval(literal), len(chunk)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
        raise


def _explain(error: Exception, chunk: str, position: int) -> str:
    if chunk.startswith("[", position):
        return "objects must stand one after another, not in a list"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos - position + 1} of the object)"
    return " ".join(str(error).split())[:80]


def _columns(
    found: Sequence[tuple[dict[str, Any], int, str]], fields: Sequence[Field]
) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """Returns the columns, null where a value has another type, and what is wrong with these objects, by place."""
    columns: dict[str, pa.Array] = {}
    wrong: dict[int, str] = {}
    for field in fields:
        values = [_plain(value.get(field.name), field) for value, *_ in found]
        for row, value in enumerate(values):
            if not _fits(value, field.type):
                shown = repr(value)
                shown = shown if len(shown) <= 80 else shown[:80] + "..."
                wrong.setdefault(row, f"field {field.name!r}: found {shown}, expected {field.type}")
                values[row] = None
        columns[field.name] = pa.array(values, field.type)
    return columns, wrong


def _plain(value: Any, field: Field) -> Any:
    """Replaces halves of characters, which Arrow's text cannot hold, and makes numbers text where text is wanted."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_plain(one, field) for one in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if field.from_number and number else value


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Tells whether a value is null or of a type; a whole number may be written with a fraction of 0."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(one, kind.value_type) for one in value)
    if pa.types.is_string(kind):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if pa.types.is_floating(kind):
        return isinstance(value, float) or abs(value) < 2**63
    return abs(value) < 2**63 and value == int(value)


def object_keys(raw: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns (B,) int64, the same for objects whose text is the same byte for byte, the space around it aside."""
    texts = pc.cast(raw, pa.binary()).to_pylist()
    digests = b"".join(blake2b(text.strip(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, np.int64)
