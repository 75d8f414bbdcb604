"""The tables that scoring writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from llm4msr.schema import FeatureSchema

# What could not be scored: the number of its row in the input (or of the user), the user as text, and why.
ERRORS = pa.schema([("row", pa.int64()), ("user", pa.string()), ("message", pa.string())])


def list_results(schema: FeatureSchema) -> pa.Schema:
    """Returns the columns that lists and users give: row is the number of the list or user, items are best first."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("user", _key_type(schema.user_key_type)),
            ("scenario", pa.string()),
            ("items", pa.list_(_key_type(schema.item_key_type))),
            ("scores", pa.list_(pa.float64())),
        ]
    )


def pair_results(schema: FeatureSchema) -> pa.Schema:
    """Returns the columns that pairs give: those of the pair, its number, and its score."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("user", _key_type(schema.user_key_type)),
            ("scenario", pa.string()),
            ("item", _key_type(schema.item_key_type)),
            ("score", pa.float64()),
        ]
    )


def _key_type(name: str) -> pa.DataType:
    return pa.int64() if name == "int64" else pa.string()


def key_column(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """Returns ids of an input in the type that they are written in: null where they do not fit it."""
    kind = column.type.value_type if pt.is_dictionary(column.type) else column.type
    is_text = pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)
    fits = pt.is_integer(kind) if pt.is_integer(wanted) else is_text
    if pt.is_uint64(kind):
        column = column.cast(kind)
        column = pc.if_else(pc.greater(column, pa.scalar(np.iinfo(np.int64).max, kind)), None, column)
    return column.cast(wanted) if fits else pa.chunked_array([pa.nulls(len(column), wanted)])


def error_row(row: int, user: Any, message: str) -> dict[str, Any]:
    """Returns a row of `ERRORS`."""
    return {"row": row, "user": None if user is None else str(user), "message": message}
