"""Streams one CSV file as typed Arrow blocks; what cannot be used comes out as rejects with the exact line.

Every adapter of delimited text reads through here, so all agree on what a number, a missing cell and a damaged row
are. `records` cuts the stream into chunks of whole records, pyarrow splits them into cells, and the cells
are converted column by column: tried whole first, sorted by their form only where that fails.

What is left out: guessing. Names, types and delimiter are given, and a cell means the same in every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from llm4msr.data.records import UNIT_SEPARATOR, Chunk, Records
from llm4msr.data.source import Block, DataError
from llm4msr.schema import REJECTS

LINE = "line"
RAW = "raw"
RAW_CHARS = 200

WRONG_COLUMN_COUNT = "wrong column count"
NOT_A_NUMBER = "not a number"
MISSING_VALUE = "missing value"
BAD_QUOTING = "bad quoting"

_FLOAT = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_ARROW_TYPES = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}

ColumnType = Literal["int64", "float64", "string"]


@dataclass(frozen=True)
class Column:
    """One column to read.

    Attributes:
        name: Name in the yielded table; `LINE` and `RAW` are taken.
        type: int64 also takes integral float text such as 1.684742e+12; float64 is finite.
        aliases: Names accepted in the header, the first one found wins; () = the name alone.
        required: The header must have it; otherwise a column that is not there is all null.
        nullable: An empty cell is null; where False an empty cell rejects its row.
    """

    name: str
    type: ColumnType
    aliases: tuple[str, ...] = ()
    required: bool = True
    nullable: bool = False


def read_header(uri: str, delimiter: str = ",", quoting: bool = True, encoding: str = "utf-8") -> list[str]:
    """Returns the column names in the first line of a file.

    Raises:
        DataError: The file is missing, empty or damaged.
    """
    records = Records(uri, delimiter, quoting, encoding, 1 << 16)
    names = records.header()
    records.close()
    return names


def read_csv(
    uri: str,
    columns: Sequence[Column],
    *,
    delimiter: str = ",",
    quoting: bool = True,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    block_bytes: int = 16 * 2**20,
) -> Iterator[Block]:
    """Streams a file, local or remote, plain or ``.gz``.

    Args:
        uri: The file.
        columns: What to read; other columns of the file are skipped.
        delimiter: One character; several (``::``) only without quoting.
        quoting: Cells may stand in double quotes, with delimiters and newlines inside.
        header: Names of the file's columns where its first line does not hold them.
        encoding: Of the text. Bytes that are not valid become U+FFFD.
        block_bytes: Text per block; a record that is longer is still read whole.

    Returns:
        Blocks, lazily and at least one. Tables hold the columns in the order given, then `LINE` (int64, physical line
        from 1) and `RAW` (string, the whole record's text, shared with the read buffer: select what you keep).
        Rejects have one of the reasons ``wrong column count``, ``not a number``, ``missing value``, ``bad quoting``.

    Raises:
        DataError: The file is missing, empty or damaged, or a required column is not in the header. The header is
            looked at before this returns.
    """
    assert not {LINE, RAW} & {c.name for c in columns}, columns
    assert len({c.name for c in columns}) == len(columns), columns
    records = Records(uri, delimiter, quoting, encoding, block_bytes)
    names = list(header) if header is not None else records.header()
    if header is not None and not records.peek():
        raise DataError(f"{uri}: the file is empty")
    places = find_columns(columns, names, uri)
    return _blocks(records, list(zip(columns, places, strict=True)), len(names))


def find_columns(columns: Sequence[Column], header: Sequence[str], uri: str) -> list[int | None]:
    """Returns where in a header each column is, None for one that is not there and need not be.

    Raises:
        DataError: A required column is missing, or a name stands there twice.
    """
    return [_place(column, list(header), uri) for column in columns]


def _place(column: Column, header: list[str], uri: str) -> int | None:
    accepted = column.aliases or (column.name,)
    for alias in accepted:
        if header.count(alias) > 1:
            raise DataError(f"{uri}: the header names column {alias!r} {header.count(alias)} times: {_shown(header)}")
        if alias in header:
            return header.index(alias)
    if not column.required:
        return None
    raise DataError(f"{uri}: no column {' or '.join(map(repr, accepted))} in the header; found {_shown(header)}")


def reject_rows(
    table: pa.Table, mask: pa.Array | pa.ChunkedArray, reason: str, column: str, uri: str, hint: str = ""
) -> tuple[pa.Table, pa.Table]:
    """Takes rows out of a table that `read_csv` yielded, or of one that kept its `LINE` and `RAW`.

    Args:
        table: Rows with the columns `column`, `LINE` and `RAW`.
        mask: True where a row is to be rejected; null counts as False.
        reason: What is wrong, of a small vocabulary.
        column: Where; named in the detail with the value found.
        uri: The file.
        hint: What may help, added to the detail.

    Returns:
        The rows that stay, and the others as `schema.REJECTS`.
    """
    mask = pc.fill_null(mask, False)
    if not pc.any(mask).as_py():
        return table, REJECTS.empty_table()
    bad = table.filter(mask)
    hint = hint and f"; {hint}"
    details = [f"column {column!r}: found {_shorten(value)}{hint}" for value in bad[column].to_pylist()]
    return table.filter(pc.invert(mask)), _rejects(uri, bad[LINE].to_pylist(), reason, details, bad[RAW])


def _shown(names: list[str]) -> str:
    shown = [name if len(name) <= 60 else name[:60] + "..." for name in names[:40]]
    return f"{shown}" + (f" and {len(names) - 40} more" if len(names) > 40 else "")


def _shorten(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _rejects(
    uri: str, lines: Sequence[int] | np.ndarray, reason: str, details: Sequence[str], raw: pa.Array | pa.ChunkedArray
) -> pa.Table:
    cut = pc.utf8_slice_codeunits(pc.utf8_rtrim(raw, "\r\n"), 0, RAW_CHARS)
    columns = [pa.array([uri] * len(lines), pa.string()), pa.array(lines, pa.int64())]
    columns += [pa.array([reason] * len(lines), pa.string()), pa.array(details, pa.string()), cut.cast(pa.string())]
    return pa.table(columns, schema=REJECTS)


def _blocks(records: Records, columns: list[tuple[Column, int | None]], num_columns: int) -> Iterator[Block]:
    for chunk in records:
        rejects = []
        if chunk.bad:
            bad_lines, texts = zip(*chunk.bad, strict=True)
            detail = "a quoted cell does not end before a delimiter or the end of a line"
            rejects.append(_rejects(records.uri, bad_lines, BAD_QUOTING, [detail] * len(texts), pa.array(texts)))
        cells, wrong = _split_cells(chunk, records, [p for _, p in columns if p is not None], num_columns)
        good = np.ones(len(chunk.lines), bool)
        if wrong:
            rows, counts = np.array(list(wrong)), wrong.values()
            good[rows] = False
            details = [f"expected {num_columns} columns, found {count}" for count in counts]
            rejects.append(
                _rejects(records.uri, chunk.lines[rows], WRONG_COLUMN_COUNT, details, chunk.raw.take(pa.array(rows)))
            )
        lines = chunk.lines if not wrong else chunk.lines[good]
        raw = chunk.raw if not wrong else chunk.raw.filter(pa.array(good))
        bad = np.zeros(len(lines), bool)
        arrays = []
        for column, place in columns:
            if place is None:
                arrays.append(pa.nulls(len(lines), _ARROW_TYPES[column.type]))
                continue
            text = cells[place]
            values, unusable, empty = convert(text, column.type)
            arrays.append(values)
            for mask, reason in ((unusable, NOT_A_NUMBER), (None if column.nullable else empty, MISSING_VALUE)):
                if mask is None or not (new := mask & ~bad).any():
                    continue
                rows = np.flatnonzero(new)
                found = [_shorten(value) for value in text.take(pa.array(rows)).to_pylist()]
                details = [f"column {column.name!r}: found {value}" for value in found]
                rejects.append(_rejects(records.uri, lines[rows], reason, details, raw.take(pa.array(rows))))
                bad |= new
        names = [column.name for column, _ in columns]
        table = pa.table([*arrays, pa.array(lines, pa.int64()), raw], names=[*names, LINE, RAW])
        table = table.filter(pa.array(~bad)) if bad.any() else table
        yield Block(table, pa.concat_tables(rejects).sort_by(LINE) if rejects else REJECTS.empty_table())


def _split_cells(
    chunk: Chunk, records: Records, places: list[int], num_columns: int
) -> tuple[dict[int, pa.StringArray], dict[int, int]]:
    """Returns the text of the columns asked for, and {record: cells found} of records with a wrong number."""
    wrong: dict[int, int] = {}
    if not len(chunk.lines):
        return dict.fromkeys(places, pa.array([], pa.string())), wrong

    def skip(row: pacsv.InvalidRow) -> str:
        wrong[row.number - 1] = row.actual_columns
        return "skip"

    names = [str(i) for i in range(num_columns)]
    delimiter = records.delimiter if len(records.delimiter) == 1 else UNIT_SEPARATOR
    quoted = records.quoting and b'"' in chunk.data
    table = pacsv.read_csv(
        pa.BufferReader(chunk.data),
        read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(chunk.data) + 1),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter.decode(),
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
            invalid_row_handler=skip,
        ),
        convert_options=pacsv.ConvertOptions(
            check_utf8=False,
            include_columns=[names[place] for place in dict.fromkeys(places)],
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=False,
        ),
    )
    assert table.num_rows + len(wrong) == len(chunk.lines), (table.num_rows, len(wrong), len(chunk.lines))
    return {place: table[names[place]].combine_chunks() for place in places}, wrong


def convert(text: pa.StringArray, kind: str) -> tuple[pa.Array, np.ndarray | None, np.ndarray | None]:
    """Converts cells, trimmed.

    Args:
        text: Strings without nulls.
        kind: int64, float64 or string, as `Column.type`.

    Returns:
        Values (null where empty or not usable); where text stands that is no number, and where nothing stands, each
        None where that is nowhere.
    """
    text = pc.ascii_trim_whitespace(text)
    blank = pc.equal(text, "")
    empty = blank.to_numpy(zero_copy_only=False) if pc.any(blank).as_py() else None
    if empty is not None:
        text = pc.if_else(blank, pa.scalar(None, pa.string()), text)
    if kind == "string":
        return text, None, empty
    values = _numbers(text, kind)
    lost = pc.and_(pc.is_null(values), pc.is_valid(text)).to_numpy(zero_copy_only=False)
    return values, lost if lost.any() else None, empty


def _numbers(text: pa.StringArray, kind: str) -> pa.Array:
    """Converts trimmed text, null where it is no number."""
    try:
        values = pc.cast(text, _ARROW_TYPES[kind])
        if kind == "float64" and pc.all(pc.is_finite(values)).as_py() is not False:
            return values
        if kind == "int64" and not pc.any(pc.match_substring(text, "x", ignore_case=True)).as_py():
            return values
    except pa.ArrowInvalid:
        pass
    nothing = pa.scalar(None, pa.string())
    text = pc.replace_substring_regex(text, r"^\+([0-9.])", r"\1")
    floats = pc.cast(pc.if_else(pc.match_substring_regex(text, _FLOAT), text, nothing), pa.float64())
    floats = pc.if_else(pc.is_finite(floats), floats, pa.scalar(None, pa.float64()))
    if kind == "float64":
        return floats
    whole = pc.and_(pc.equal(pc.floor(floats), floats), pc.less(pc.abs(floats), 2.0**63))
    floats = pc.cast(pc.if_else(whole, floats, pa.scalar(None, pa.float64())), pa.int64(), safe=False)
    short = pc.cast(pc.if_else(pc.match_substring_regex(text, "^-?[0-9]{1,18}$"), text, nothing), pa.int64())
    long = pc.match_substring_regex(text, "^-?[0-9]+$")
    long = pc.and_(long, pc.is_null(short)).to_numpy(zero_copy_only=False)
    values = pc.coalesce(short, floats)
    if not any(long):
        return values
    exact = values.to_pylist()
    for row in np.flatnonzero(long.astype(bool)):
        number = int(text[row].as_py())
        exact[row] = number if -(2**63) <= number < 2**63 else None
    return pa.array(exact, pa.int64())
