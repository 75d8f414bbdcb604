"""Turns one column of the user's table, whether CSV text or a Parquet type, into what events and entities hold.

Each function takes a whole column and returns the values, null where nothing stands; those that can meet a value
they cannot use also return a mask of these rows (None where there is none), and their values are null there.
Cells are trimmed and empty ones are null, as in `llm4msr.data.csv`. What rejects a row is the adapter's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr.data.csv import convert
from llm4msr.data.source import DataError
from llm4msr.schema import SPLITS, KeyType

Use = Literal["key", "categorical", "numeric", "text", "sequence", "words", "label", "time", "iso", "split"]

# The last moment that still is a time, 9999-12-31T23:59:59.999Z: numbers beyond it are in another unit.
MAX_TIME_MS = 253_402_300_799_999
_ISO = (
    r"^(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<clock>\d{2}:\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"
    r" ?(?P<zone>Z|(?P<sign>[+-])(?P<zone_hour>\d{2})(?::?(?P<zone_minute>\d{2}))?)?)?$"
)
_ISO_START = r"^\d{4}-\d{2}-\d{2}(?:[T ]|$)"
_COMPACT_DATE = r"^(?:19|20)\d{2}(?:\d{4})?$"
# A combining mark belongs to its letter: without \p{M} words of Hindi or Thai fall apart.
_NO_WORD = r"[^\p{L}\p{M}\p{N}_]+"
_SPLIT_NAMES = (*SPLITS, "validation", "val")
_SPLIT_INDEX = (*range(len(SPLITS)), SPLITS.index("valid"), SPLITS.index("valid"))


def is_key_integer(kind: pa.DataType) -> bool:
    """Tells whether ids of this type are kept as int64; uint64 may not fit and becomes text."""
    return pa.types.is_integer(kind) and not pa.types.is_uint64(kind)


def check_type(uri: str, column: str, kind: pa.DataType, use: Use) -> None:
    """Checks that a column's type can serve its use.

    Raises:
        DataError: It cannot; names file, column, type and what is valid.
    """
    t = pa.types
    if t.is_dictionary(kind):
        kind = kind.value_type
    if t.is_null(kind) or t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return
    number = t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind)
    listed = (t.is_list(kind) or t.is_large_list(kind)) and t.is_string(kind.value_type)
    accepted, valid = {
        "key": (t.is_integer(kind), "integer or string"),
        "categorical": (number or t.is_boolean(kind), "string, integer, float or bool"),
        "numeric": (number or t.is_boolean(kind), "integer, float, decimal, bool or string"),
        "text": (number or listed, "string, list<string> or a number"),
        "sequence": (listed, "string or list<string>"),
        "words": (False, "string"),
        "label": (number or t.is_boolean(kind), "bool, a number or string"),
        "time": (number, "a number or string; for timestamp and date types set table.timestamp_unit = 'iso'"),
        "iso": (
            t.is_timestamp(kind) or t.is_date(kind),
            "string, timestamp or date; for numbers set table.timestamp_unit = 's' or 'ms'",
        ),
        "split": (False, "string"),
    }[use]
    if not accepted:
        raise DataError(f"{uri}: column {column!r} has type {kind}, which cannot be read as {use}; valid: {valid}")


def to_text(column: pa.ChunkedArray) -> pa.Array:
    """Returns strings: numbers and booleans as written, lists joined by a comma."""
    values = _plain(column)
    if pa.types.is_list(values.type):
        values = pc.binary_join(_drop_blank(values), ", ")
    elif pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    return convert(pc.fill_null(values.cast(pa.string()), ""), "string")[0]


def to_key(column: pa.ChunkedArray, key_type: KeyType) -> pa.Array:
    """Returns raw ids of the given type; int64 only for columns of which `is_key_integer` holds."""
    return _plain(column).cast(pa.int64()) if key_type == "int64" else to_text(column)


def to_number(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray | None]:
    """Returns float64 and what is no finite number; NaN is null."""
    values = _plain(column)
    if pa.types.is_string(values.type):
        return convert(pc.fill_null(values, ""), "float64")[:2]
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    values = values.cast(pa.float64(), safe=False)
    values = pc.if_else(pc.is_nan(values), None, values)
    bad = _mask(pc.is_inf(values))
    return (values, None) if bad is None else (pc.if_else(bad, None, values), bad)


def to_integer(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray | None]:
    """Returns int64 and what is no integer."""
    values = _plain(column)
    if pa.types.is_string(values.type):
        return convert(pc.fill_null(values, ""), "int64")[:2]
    if is_key_integer(values.type):
        return values.cast(pa.int64()), None
    return convert(pc.fill_null(values.cast(pa.string()), ""), "int64")[:2]


def to_label(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray | None]:
    """Returns int8 0 or 1 and what is neither 0, 1, true nor false."""
    text = pc.utf8_lower(to_text(column))
    place = pc.index_in(text, pa.array(["0", "1", "false", "true", "0.0", "1.0"]))
    return pc.bit_wise_and(place, 1).cast(pa.int8()), _mask(pc.and_(pc.is_null(place), pc.is_valid(text)))


def to_split(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray | None]:
    """Returns int8 indices into `SPLITS` and what names no split; case does not matter."""
    text = pc.utf8_lower(to_text(column))
    place = pc.index_in(text, pa.array(_SPLIT_NAMES))
    index = pa.array(_SPLIT_INDEX, pa.int8()).take(place)
    return index, _mask(pc.and_(pc.is_null(place), pc.is_valid(text)))


def to_time_ms(
    column: pa.ChunkedArray, unit: Literal["s", "ms", "iso"], timezone: str
) -> tuple[pa.Array, np.ndarray | None]:
    """Returns Unix times in ms (int64) and what is no time.

    Args:
        column: Numbers in `unit`; with iso ISO 8601 text (date, or date and time to the minute at least) or Arrow
            timestamps and dates.
        unit: As `TableConfig.timestamp_unit`.
        timezone: IANA zone of ISO times that name none.
    """
    values = _plain(column)
    if unit != "iso":
        numbers, bad = to_number(column)
        times = pc.multiply(numbers, 1000.0 if unit == "s" else 1.0)
        beyond = pc.greater(pc.abs(times), MAX_TIME_MS)
        times = pc.round(pc.if_else(beyond, None, times)).cast(pa.int64())
        outside = _mask(beyond)
        return times, bad if outside is None else outside if bad is None else bad | outside
    if not pa.types.is_string(values.type):
        times = values.cast(pa.timestamp("ms", getattr(values.type, "tz", None)), safe=False)
        return _in_zone(times, timezone).cast(pa.int64()), None
    text = convert(pc.fill_null(values, ""), "string")[0]
    times = _parse_iso(text, timezone)
    return times, _mask(pc.and_(pc.is_null(times), pc.is_valid(text)))


def other_time_unit(column: pa.ChunkedArray, unit: Literal["s", "ms", "iso"]) -> tuple[np.ndarray, str]:
    """Tells which values of a column look like times written in another unit than the configured one.

    Returns:
        (B,) bool, True for text that begins as ISO 8601 where `unit` is s or ms, and for numbers where it is iso; and
        the setting that would read them. Numbers that may be a year or a date without hyphens are not counted.
    """
    text = to_text(column)
    if unit == "iso":
        other = pc.and_(pc.is_valid(to_number(column)[0]), pc.invert(pc.match_substring_regex(text, _COMPACT_DATE)))
        hint = "set data.table.timestamp_unit = 's' or 'ms'"
    else:
        other, hint = pc.match_substring_regex(text, _ISO_START), "set data.table.timestamp_unit = 'iso'"
    return pc.fill_null(other, False).to_numpy(zero_copy_only=False), hint


def to_words(column: pa.ChunkedArray) -> pa.Array:
    """Returns lists of lower-cased words: runs of letters, marks, digits and underscores."""
    return _drop_blank(pc.split_pattern_regex(pc.utf8_lower(to_text(column)), _NO_WORD))


def to_sequence(column: pa.ChunkedArray, separator: str) -> pa.Array:
    """Returns lists of values, trimmed, empty ones dropped; text is split at `separator`."""
    values = _plain(column)
    return _drop_blank(values if pa.types.is_list(values.type) else pc.split_pattern(to_text(column), separator))


def join_text(columns: Sequence[pa.Array | pa.ChunkedArray], separator: str) -> pa.Array | pa.ChunkedArray:
    """Joins the texts of each row, leaving out nulls; a row of nulls becomes empty text.

    Args:
        columns: At least one, of equal length.
        separator: What stands between two texts.
    """
    # Arrow's join drops a row of nulls from its result instead of writing empty text.
    nothing = pc.if_else(pc.is_null(pc.coalesce(*columns)), "", pa.scalar(None, pa.string()))
    return pc.binary_join_element_wise(*columns, nothing, separator, null_handling="skip")


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """Returns one array of the plain type: no dictionaries, views, or 64-bit offsets; all-null columns are text."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    t = pa.types
    if t.is_dictionary(values.type):
        values = values.dictionary_decode()
    if t.is_null(values.type) or t.is_large_string(values.type) or t.is_string_view(values.type):
        return values.cast(pa.string())
    return values.cast(pa.list_(values.type.value_type)) if t.is_large_list(values.type) else values


def _mask(bad: pa.Array) -> np.ndarray | None:
    bad = pc.fill_null(bad, False).to_numpy(zero_copy_only=False)
    return bad if bad.any() else None


def _drop_blank(lists: pa.ListArray) -> pa.ListArray:
    """Trims the values of lists of text and drops empty and null ones; null lists stay null."""
    rows = pc.list_parent_indices(lists).to_numpy()
    values = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    kept = pc.fill_null(pc.not_equal(values, ""), False)
    counts = np.bincount(rows[kept.to_numpy(zero_copy_only=False)], minlength=len(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values.filter(kept), mask=pc.is_null(lists))


def _in_zone(times: pa.Array, timezone: str) -> pa.Array:
    """Reads naive timestamps as local times of a zone.

    A time that happens twice is the earlier one; one that the clock leaps over is the moment of the leap.
    """
    if times.type.tz is not None:
        return times
    return pc.assume_timezone(times, timezone, ambiguous="earliest", nonexistent="latest")


def _parse_iso(text: pa.StringArray, timezone: str) -> pa.Array:
    """Returns Unix times in ms, null where the text is no ISO 8601 date or date-time."""
    parts = pc.extract_regex(text, _ISO)

    def part(name: str, default: str) -> pa.Array:
        found = pc.struct_field(parts, name)
        return pc.if_else(pc.equal(found, ""), default, found)

    second = pc.binary_join_element_wise(part("clock", "00:00"), part("second", "00"), ":")
    written = pc.binary_join_element_wise(part("date", ""), second, " ")
    local = pc.strptime(written, format="%Y-%m-%d %H:%M:%S", unit="s", error_is_null=True)
    # strptime rolls 30 February over into March; a time that exists is written back as it was read.
    exists = pc.equal(pc.strftime(local, format="%Y-%m-%d %H:%M:%S"), written)
    local = pc.if_else(exists, local, None)
    sign = pc.if_else(pc.equal(part("sign", "+"), "-"), -1, 1)
    minutes = pc.add(
        pc.multiply(part("zone_hour", "0").cast(pa.int64()), 60), part("zone_minute", "0").cast(pa.int64())
    )
    zoned = pc.subtract(local.cast(pa.int64()), pc.multiply(pc.multiply(sign, minutes), 60))
    naive = _in_zone(local, timezone).cast(pa.int64())
    seconds = pc.if_else(pc.equal(part("zone", ""), ""), naive, zoned)
    fraction = pc.utf8_slice_codeunits(pc.utf8_rpad(part("fraction", "0"), 3, "0"), 0, 3).cast(pa.int64())
    return pc.add(pc.multiply(seconds, 1000), fraction)
