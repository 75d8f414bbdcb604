"""Conversions of one column: times, numbers, words and sequences, with exact values."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from llm4msr.data import columns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-03-10", datetime(2024, 3, 10, 8, tzinfo=UTC)),  # midnight in Los Angeles, winter time
        ("2024-03-10 02:30", datetime(2024, 3, 10, 10, tzinfo=UTC)),  # skipped by summer time: the moment of the change
        ("2024-11-03T01:30:00", datetime(2024, 11, 3, 8, 30, tzinfo=UTC)),  # happens twice: the earlier
        ("2024-07-01T12:00:00.1239", datetime(2024, 7, 1, 19, 0, 0, 123000, tzinfo=UTC)),
        ("2024-07-01T12:00:00,5Z", datetime(2024, 7, 1, 12, 0, 0, 500000, tzinfo=UTC)),
        ("2024-07-01T12:00:00+05:30", datetime(2024, 7, 1, 6, 30, tzinfo=UTC)),
        ("2024-07-01 12:00 -08", datetime(2024, 7, 1, 20, tzinfo=UTC)),
        ("1969-12-31T23:59:59Z", datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2023-02-29", None),
        ("2024-13-01", None),
        ("2024-07-01T24:00", None),
        ("2024-07-01T12:60", None),
        ("01.07.2024", None),
        ("2024-07-01T12", None),
        ("1719800000", None),
    ],
)
def test_iso_times(text, expected):
    times, bad = columns.to_time_ms(pa.chunked_array([["2024-07-01T12:00Z", text, ""]]), "iso", "America/Los_Angeles")
    assert times.to_pylist() == [1719835200000, expected and int(expected.timestamp() * 1000), None]
    assert (None if bad is None else bad.tolist()) == (None if expected else [False, True, False])


def test_arrow_times_and_numbers():
    zoned = pa.chunked_array([pa.array([datetime(2024, 5, 1, tzinfo=UTC), None], pa.timestamp("us", "Europe/Rome"))])
    assert columns.to_time_ms(zoned, "iso", "Asia/Tokyo")[0].to_pylist() == [1714521600000, None]
    days = pa.chunked_array([pa.array([date(2024, 5, 1)])])
    assert columns.to_time_ms(days, "iso", "UTC")[0].to_pylist() == [1714521600000]
    assert columns.to_time_ms(pa.chunked_array([[1714521600123]]), "ms", "UTC")[0].to_pylist() == [1714521600123]
    numbers, bad = columns.to_number(pa.chunked_array([[1.5, float("nan"), float("inf"), None]]))
    assert numbers.to_pylist() == [1.5, None, None, None] and bad.tolist() == [False, False, True, False]
    assert columns.to_number(pa.chunked_array([[True, False]]))[0].to_pylist() == [1.0, 0.0]
    assert columns.to_text(pa.chunked_array([[3.0, float("nan"), 1.5]])).to_pylist() == ["3", None, "1.5"]
    assert columns.to_text(pa.chunked_array([pa.array(["a", "", " "], pa.large_string())])).to_pylist() == [
        "a",
        None,
        None,
    ]
    assert columns.to_text(pa.chunked_array([pa.nulls(2)])).to_pylist() == [None, None]


def test_words_and_sequences():
    text = pa.chunked_array([["Café-au-lait, 16 OZ!", " ", None], ["हिन्दी x_1", "--"]])
    assert columns.to_words(text).to_pylist() == [["café", "au", "lait", "16", "oz"], None, None, ["हिन्दी", "x_1"], []]
    text = pa.chunked_array([["a| b ||c", "", None, "|", "a;b"]])
    assert columns.to_sequence(text, "|").to_pylist() == [["a", "b", "c"], None, None, [], ["a;b"]]
    lists = pa.chunked_array([pa.array([[" a", "", None, "b|c"], None, []], pa.large_list(pa.large_string()))])
    assert columns.to_sequence(lists, "|").to_pylist() == [["a", "b|c"], None, []]


def test_joined_text_keeps_rows_of_nulls():
    first, second = pa.array(["a", None, None, "d"]), pa.array(["b", None, "c", None])
    assert columns.join_text([first, second], "; ").to_pylist() == ["a; b", "", "c", "d"]
    assert columns.join_text([first], "; ").to_pylist() == ["a", "", "", "d"]
