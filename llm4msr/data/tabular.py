"""Reads one table file, CSV or Parquet, as blocks that look alike, and builds checked blocks from them.

The rows of both formats carry their line and the start of their text, so that a rejected row can be found again.
Parquet has neither: its rows count from 1 and their text is the read columns joined by commas.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm4msr.data.columns import to_text
from llm4msr.data.csv import LINE, MISSING_VALUE, RAW, Column, read_csv, read_header, reject_rows
from llm4msr.data.source import Block, DataError
from llm4msr.schema import REJECTS
from llm4msr.storage import arrow_filesystem, told

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
DUPLICATE_KEY = "duplicate key"
NOT_A_TIME = "not a time"
_PARQUET_BLOCK_ROWS = 131_072


def nearest(name: str, found: Sequence[str]) -> str:
    """Returns a hint at what may have been meant, with a space before it, or nothing."""
    by_lower = {other.lower(): other for other in found}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def column_types(uri: str) -> dict[str, pa.DataType]:
    """Returns the columns of a file with their types; those of CSV are strings.

    Raises:
        DataError: The file is missing, empty or damaged.
    """
    if not uri.endswith(".parquet"):
        return dict.fromkeys(read_header(uri, _delimiter(uri)), pa.string())
    schema = _parquet(uri).schema_arrow
    return dict(zip(schema.names, schema.types, strict=True))


def read_blocks(uri: str, columns: Sequence[str]) -> Iterator[Block]:
    """Streams columns of a CSV or Parquet file.

    Yields:
        Blocks whose tables hold `columns` (CSV: strings, null where empty), then `LINE` and `RAW`.

    Raises:
        DataError: The file is missing or damaged, or a column is not there.
    """
    if uri.endswith(".parquet"):
        yield from _read_parquet(uri, columns)
    else:
        wanted = [Column(name, "string", nullable=True) for name in columns]
        yield from read_csv(uri, wanted, delimiter=_delimiter(uri))


def first_seen(keys: Iterable[Hashable], seen: set[Hashable]) -> np.ndarray:
    """Tells which keys were not seen before, in `seen` or earlier in `keys`, and adds all to `seen`."""
    is_new = []
    for key in keys:
        is_new.append(key not in seen)
        seen.add(key)
    return np.array(is_new, bool)


class BlockBuilder:
    """Collects the converted columns of one block; the first thing found wrong with a row rejects it.

    Args:
        block: As read, with `LINE` and `RAW`.
        uri: Its file.
    """

    def __init__(self, block: Block, uri: str) -> None:
        self.table, self.uri = block.table, uri
        self._rejects = [block.rejects]
        self._bad = np.zeros(len(block.table), bool)
        self._columns: dict[str, pa.Array] = {}

    def reject(self, mask: pa.Array | np.ndarray | None, reason: str, column: str, hint: str = "") -> None:
        """Rejects rows; `mask` is True where, None is nowhere; the detail names the raw `column`, then gives `hint`."""
        if mask is None:
            return
        if not isinstance(mask, np.ndarray):
            mask = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        new = mask & ~self._bad
        if new.any():
            raw = self.table.select([column, LINE, RAW])
            self._rejects.append(reject_rows(raw, pa.array(new), reason, column, self.uri, hint)[1])
            self._bad |= new

    def require(self, values: pa.Array, column: str, reason: str = MISSING_VALUE) -> None:
        """Rejects rows without a value."""
        if values.null_count:
            self.reject(pc.is_null(values), reason, column)

    def drop(self, mask: np.ndarray) -> None:
        """Leaves rows out that are no fault of the data."""
        self._bad |= mask

    @property
    def good(self) -> np.ndarray:
        """Rows that nothing was found wrong with so far."""
        return ~self._bad

    def add(self, name: str, values: pa.Array) -> None:
        """Adds a column of the result."""
        self._columns[name] = values

    def build(self) -> Block:
        """Returns the rows that nothing was found wrong with, and the rejects in order of lines."""
        table = pa.table(self._columns)
        table = table.filter(pa.array(~self._bad)) if self._bad.any() else table
        rejects = [part for part in self._rejects if len(part)]
        return Block(table, pa.concat_tables(rejects).sort_by(LINE) if rejects else REJECTS.empty_table())


def _delimiter(uri: str) -> str:
    return "\t" if uri.endswith((".tsv", ".tsv.gz")) else ","


def _parquet(uri: str) -> pq.ParquetFile:
    fs, path = arrow_filesystem(uri)
    try:
        with told(uri, "read", is_foreign=True):
            return pq.ParquetFile(path, filesystem=fs)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: not a readable Parquet file: {error}") from error


def _read_parquet(uri: str, columns: Sequence[str]) -> Iterator[Block]:
    line = 1
    try:
        for batch in _parquet(uri).iter_batches(_PARQUET_BLOCK_ROWS, columns=list(columns), use_threads=False):
            table = pa.table(batch).select(list(columns))
            texts = [to_text(column) for column in table.columns]
            raw = pc.binary_join_element_wise(*texts, ",", null_handling="replace", null_replacement="")
            table = table.append_column(LINE, pa.array(np.arange(line, line + len(table)), pa.int64()))
            line += len(batch)
            yield Block(table.append_column(RAW, raw), REJECTS.empty_table())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: cannot be read after row {line - 1}: {error}") from error
